r"""TD3+BC: TD3 whose policy is pulled towards the logged action.

Paper: S. Fujimoto, S. Gu, "A Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2021, arXiv 2106.06860.
Equation used: (5), pi = argmax E[lambda Q(s, pi(s)) - (pi(s) - a)^2], lambda = alpha / mean |Q|.
Reference code: sfujim/TD3_BC (constants, reduction over batch and action dimensions, update order).

    L_pi = -lambda mean Q_1(s, pi(s)) + mean_{b, i} (pi(s) - a)^2         (the rest is corollary.offline.td3)

Deviations: none known in the algorithm. By default every row with a known successor is used; ``view="d4rl_qlearning"``
gives the authors' rows.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.agent import Metrics
from ..core.config import Preset
from ..core.dataset import Batch
from .td3 import TD3Agent, TD3Config, action_error


@dataclass(frozen=True, kw_only=True)
class TD3BCConfig(TD3Config):
    """TD3+BC's settings: those of the core. alpha = 2.5 for every dataset; alpha -> 0 is behaviour cloning."""


class TD3BC(TD3Agent[TD3BCConfig]):
    """TD3+BC (Fujimoto and Gu, 2021); see the module's head."""

    algorithm: ClassVar[str] = "offline.td3_bc"
    config_type = TD3BCConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-09a", "OFF-09e", "OFF-09f", "OFF-20a", "OFF-20b", "OFF-22")
    presets: ClassVar[dict[str, Preset]] = {
        "published": Preset({"view": "d4rl_qlearning"}, "sfujim/TD3_BC, all datasets [code]"),
        "antmaze-corl": Preset(
            {"reward_transform": "antmaze_minus1", "view": "d4rl_qlearning"}, "corl-team/CORL td3_bc [code]"
        ),
    }

    def penalty(self, batch: Batch, action: Tensor) -> tuple[Tensor, Metrics]:
        """Return the squared distance to the action logged with each state."""
        return action_error(action, batch.action, batch.weight), {}
