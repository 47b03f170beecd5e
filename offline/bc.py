r"""Behaviour cloning and its 10 % variant: regression of the logged action.

Reference code: corl-team/CORL ``any_percent_bc.py`` (deterministic actor; constants).

    L = mean_{b, i} (pi(s) - a)_i^2,       pi(s) = centre + half_range * tanh(f(s))

``top_fraction=0.1`` keeps the 10 % of trajectories with the highest discounted return ("10%BC", L. Chen et al.,
"Decision Transformer", NeurIPS 2021, arXiv 2106.01345, section 5.1).

Deviations and choices:
1. Other papers clone with a Gaussian's log-likelihood; this is the deterministic regression of CORL and TD3+BC.
2. Trajectories are the dataset's true episodes. CORL cuts D4RL's transition view every 1000 rows, where timeout rows
   are missing, so its trajectories drift over episode borders.
3. By default every row with a known successor is used, of the kept trajectories with 10%BC; CORL's runs had D4RL's
   q-learning rows, ``view="d4rl_qlearning"``.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..core.agent import Metrics, adam, descend
from ..core.config import OfflineConfig, Preset
from ..core.dataset import Batch, Dataset
from ..core.networks import DeterministicActor
from ..core.offline_agent import OfflineAgent
from .td3 import action_error


@dataclass(frozen=True, kw_only=True)
class BCConfig(OfflineConfig):
    """Behaviour cloning's settings beyond the common ones.

    Attributes:
        top_fraction: share of trajectories kept, in (0, 1], ranked by discounted return; 1 keeps all.
        top_discount: discount in [0, 1] of that return.
        learning_rate: Adam's step size, > 0.
    """

    top_fraction: float = 1.0
    top_discount: float = 0.99
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("top_fraction", 0 < self.top_fraction <= 1, "in (0, 1]")
        self.require("top_discount", 0 <= self.top_discount <= 1, "in [0, 1]")
        self.require("learning_rate", self.learning_rate > 0, "> 0")


class BC(OfflineAgent[BCConfig]):
    """Behaviour cloning; ``BC(preset="10%")`` clones the best tenth of the trajectories."""

    algorithm: ClassVar[str] = "offline.bc"
    config_type = BCConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-22",)
    presets: ClassVar[dict[str, Preset]] = {"10%": Preset({"top_fraction": 0.1}, "corl-team/CORL 10%BC [code]")}

    def select_data(self, dataset: Dataset) -> Dataset:
        """Keep the best `top_fraction` of the trajectories."""
        if self.config.top_fraction == 1:
            return dataset
        return dataset.top_fraction(self.config.top_fraction, self.config.top_discount)

    def build(self) -> None:
        """Make the actor and its optimiser."""
        net = self.mlp("actor", self.problem.observation_dim, self.problem.action_dim)
        self.actor = DeterministicActor(net, self.box)
        self.networks = nn.ModuleDict({"actor": self.actor})
        self.optimizers = {"actor": adam(self.actor.parameters(), self.config.learning_rate)}

    def update(self, batch: Batch) -> Metrics:
        """Take one regression step."""
        loss = action_error(self.actor(batch.obs), batch.action, batch.weight)
        descend(self.optimizers["actor"], loss)
        return {"policy_loss": loss.detach()}

    @property
    def is_deterministic(self) -> bool:
        """True: exploration adds noise."""
        return True

    def policy(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Return ``pi(s)``; the policy is deterministic, so `noise` is not used."""
        action: Tensor = self.actor(obs)
        return action

    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's actor as an ordinary module."""
        return self.actor.plain(seed_index)
