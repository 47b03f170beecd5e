"""The library's own checks, one module per topic; importing it registers them."""

from . import abstraction as abstraction
from . import approximation as approximation
from . import bandits as bandits
from . import concentration as concentration
from . import denoising as denoising
from . import dynamic_programming as dynamic_programming
from . import exploration as exploration
from . import foundations as foundations
from . import games as games
from . import language_models as language_models
from . import mirror_descent as mirror_descent
from . import offline as offline
from . import offline_data as offline_data
from . import offline_policies as offline_policies
from . import policy_gradient as policy_gradient
from . import prediction as prediction
from . import regularisation as regularisation
from . import robustness as robustness
from . import trust_regions as trust_regions
