r"""IQL: values of the data's best actions by expectile regression, and a policy cloned with advantage weights.

Paper: I. Kostrikov, A. Nair, S. Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022,
arXiv 2110.06169. Equations used: (5) value loss, (6) critic loss, (7) policy loss.
Reference code: ikostrikov/implicit_q_learning (update order, networks, constants); corl-team/CORL for its variant.

    u     = min_j Q'_j(s, a) - V(s)
    L_V   = mean |tau - 1[u < 0]| u^2                                  (expectile tau)
    L_pi  = -mean min(exp(beta u), 100) log pi(a|s)
    L_Q   = sum_j mean (Q_j(s, a) - y)^2,   y = r + gamma (1 - d) V(s')

The order of a step and the critics are :mod:`corollary.offline.in_sample`'s.

Deviations and choices:
1. ``value_order="old"`` and ``critic_reduction="mean"`` are CORL's: u and V(s') from before the value step, and the
   average of the two critic losses.
2. The paper's critic loss (6) has one critic; the authors' code has two and a minimum, as here.
3. The policy's step size decays to 0 over `actor_lr_decay_steps`, and is whole again in `learn`; whoever goes on in the
   environment takes ``actor_lr_decay_steps=None`` from the beginning (the authors' fine-tuning has no decay).
4. The density is a Gaussian with mean in the box, not squashed; samples are clipped to the box when they act.
5. By default every row with a known successor is used; the authors' and CORL's runs had D4RL's q-learning rows,
   ``view="d4rl_qlearning"``, which every preset sets.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..core.actor_critic import weighted_mean
from ..core.config import Preset
from .in_sample import AdvantageCloningAgent, InSampleConfig
from .weighted_cloning import exponential_weight


@dataclass(frozen=True, kw_only=True)
class IQLConfig(InSampleConfig):
    """IQL's settings beyond the core's; defaults are the authors' for MuJoCo locomotion.

    Attributes:
        expectile: tau in (0, 1); 0.5 evaluates the behaviour policy, -> 1 the best action in the data.
        beta: inverse temperature >= 0 of the policy's weights; 0 clones the data, large values take the best action.
        critic_reduction: ``"sum"`` or ``"mean"`` over the two critics.
    """

    expectile: float = 0.7
    beta: float = 3.0
    critic_reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("expectile", 0 < self.expectile < 1, "in (0, 1)")
        self.require("beta", self.beta >= 0, ">= 0")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def expectile_loss(residual: Tensor, expectile: float, weight: Tensor | None = None) -> Tensor:
    """``mean |tau - 1[u < 0]| u^2`` over ``[..., B]``; its minimiser in v, for u = x - v, is x's tau-expectile."""
    # Not torch.where of two floats, which is float32 whatever the residual's dtype.
    asymmetry = (expectile - (residual < 0).to(residual.dtype)).abs()
    return weighted_mean(asymmetry * residual.square(), weight)


_PUBLISHED = {"view": "d4rl_qlearning"}
_ANTMAZE = {**_PUBLISHED, "expectile": 0.9, "beta": 10.0, "reward_transform": "antmaze_minus1"}
_KITCHEN = {**_PUBLISHED, "beta": 0.5, "dropout": 0.1, "reward_transform": "none"}
_CORL = {
    **_PUBLISHED,
    "state_transform": "standardize",
    "reward_transform": "none",
    "log_std_range": (-20.0, 2.0),
    "action_margin": 0.0,
    "init": "torch",
    "value_order": "old",
    "critic_reduction": "mean",
}


class IQL(AdvantageCloningAgent[IQLConfig]):
    """Implicit Q-learning (Kostrikov et al., 2022); see the module's head."""

    algorithm: ClassVar[str] = "offline.iql"
    config_type = IQLConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-07b", "OFF-11a", "OFF-11b", "OFF-11c", "OFF-11g", "OFF-11h", "OFF-11i")
    presets: ClassVar[dict[str, Preset]] = {
        "locomotion": Preset(_PUBLISHED, "ikostrikov/implicit_q_learning, mujoco_config [code]"),
        "antmaze": Preset(_ANTMAZE, "ikostrikov/implicit_q_learning, antmaze_config [code]"),
        "antmaze-finetune": Preset(
            {**_ANTMAZE, "actor_lr_decay_steps": None},
            "ikostrikov/implicit_q_learning, antmaze_finetune_config: for learning in the environment after it [code]",
        ),
        "kitchen": Preset(_KITCHEN, "ikostrikov/implicit_q_learning, kitchen_config [code]"),
        "adroit": Preset(_KITCHEN, "ikostrikov/implicit_q_learning, same settings as kitchen [code]"),
        "corl": Preset(_CORL, "corl-team/CORL iql.py, halfcheetah and walker2d [code]"),
        "corl-hopper-medium": Preset(
            {**_CORL, "reward_transform": "return_range_corl", "tau": 0.001, "policy": "deterministic"},
            "corl-team/CORL iql.py, hopper-medium and hopper-medium-replay [code]",
        ),
        "corl-hopper-medium-expert": Preset(
            {**_CORL, "expectile": 0.5, "beta": 6.0}, "corl-team/CORL iql.py, hopper-medium-expert [code]"
        ),
        "corl-adroit": Preset(
            {**_CORL, "expectile": 0.8, "dropout": 0.1}, "corl-team/CORL iql.py, pen, door, hammer and relocate [code]"
        ),
        "corl-maze2d": Preset(_CORL, "corl-team/CORL iql.py, maze2d, same settings as halfcheetah [code]"),
    }

    def implicit_value_loss(self, residual: Tensor, weight: Tensor | None) -> Tensor:
        """Return the expectile loss."""
        return expectile_loss(residual, self.config.expectile, weight)

    def policy_weight(self, residual: Tensor) -> Tensor:
        """Return ``min(exp(beta u), 100)``."""
        return exponential_weight(self.config.beta * residual)

    def critic_loss(self, q: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return the squared errors, added up or averaged over the two critics."""
        loss = super().critic_loss(q, target, weight)
        return loss if self.config.critic_reduction == "sum" else loss / 2
