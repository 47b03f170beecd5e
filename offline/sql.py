r"""SQL: in-sample values under a chi-square regularisation, which gives bad actions the weight zero.

Paper: H. Xu, L. Jiang, J. Li, Z. Yang, Z. Wang, V. W. K. Chan, X. Zhan, "Offline RL with No OOD Actions: In-Sample
Learning via Implicit Value Regularization", ICLR 2023, arXiv 2303.15810 (implicit value regularisation with
f(x) = x - 1; its sibling with f(x) = log x is :mod:`corollary.offline.eql`).
Reference code: ryanxhr/IVR (losses, order, networks, constants), built on IQL's.

    u    = min_j Q'_j(s, a) - V(s),      w = max(0, 1 + u / (2 alpha))
    L_V  = mean (w^2 + V(s) / alpha)                                     so that E_{a ~ data} w = 1
    L_pi = -mean min(max(u, 0), 100) log pi(a|s)
    L_Q  = sum_j mean (Q_j(s, a) - y)^2,   y = r + gamma (1 - d) V(s')

The order of a step and the critics are :mod:`corollary.offline.in_sample`'s.

Deviations and choices:
1. ``policy_weight="released"`` (default) is the code's max(u, 0), "theory" the w above, which is the density ratio of
   the regularised problem's solution to the data's policy. They differ where -2 alpha < u <= 0, and in scale.
2. V / alpha enters the loss as -u / alpha: Q is a constant, so the gradient is the same.
3. The code's AntMaze config gives V a dropout of 0.5, but never calls V in training mode, so it has no effect: the
   presets have none. ``value_dropout=0.5`` is what was meant.
4. The code's LayerNorm adds 1e-6 to the variance (flax), this one 1e-5 (torch).
5. By default every row with a known successor is used; the authors' runs had D4RL's q-learning rows,
   ``view="d4rl_qlearning"``.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..core.actor_critic import weighted_mean
from ..core.config import Preset
from .in_sample import AdvantageCloningAgent, InSampleConfig
from .weighted_cloning import WIDEST_WEIGHT


@dataclass(frozen=True, kw_only=True)
class SQLConfig(InSampleConfig):
    """SQL's settings beyond the core's; defaults are the authors' for MuJoCo locomotion.

    Attributes:
        alpha: strength > 0 of the regularisation, in units of Q; -> 0 the best action in the data, large values
            evaluate the data's policy.
        policy_weight: ``"released"`` max(u, 0), or ``"theory"`` max(0, 1 + u / (2 alpha)); both at most 100.
    """

    value_layer_norm: bool = True
    alpha: float = 1.0
    policy_weight: Literal["released", "theory"] = "released"

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("alpha", self.alpha > 0, "> 0")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def density_ratio(residual: Tensor, alpha: float) -> Tensor:
    """``max(0, 1 + u / (2 alpha))``, elementwise."""
    return (1 + residual / (2 * alpha)).clamp(min=0)


def sparse_value_loss(residual: Tensor, alpha: float, weight: Tensor | None = None) -> Tensor:
    """``mean (w^2 - u / alpha)`` with w the density ratio, over ``[..., B]``.

    At its minimiser in v, for u = x - v, the mean of w is 1.
    """
    return weighted_mean(density_ratio(residual, alpha).square() - residual / alpha, weight)


_ANTMAZE = {"reward_transform": "antmaze_minus1", "actor_lr": 2e-4, "critic_lr": 2e-4, "value_lr": 2e-4}


class SQL(AdvantageCloningAgent[SQLConfig]):
    """Sparse Q-learning (Xu et al., 2023); see the module's head."""

    algorithm: ClassVar[str] = "offline.sql"
    config_type = SQLConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-11f", "OFF-11g", "OFF-11h", "OFF-11i", "OFF-12f")
    presets: ClassVar[dict[str, Preset]] = {
        "locomotion": Preset({}, "ryanxhr/IVR, run_mujoco.sh [code]"),
        "antmaze": Preset({**_ANTMAZE, "alpha": 0.1}, "ryanxhr/IVR, run_antmaze.sh, -v2, all but umaze-diverse [code]"),
        "antmaze-umaze-diverse": Preset({**_ANTMAZE, "alpha": 3.0}, "ryanxhr/IVR, run_antmaze.sh, -v2 [code]"),
        "kitchen": Preset(
            {"alpha": 0.5, "dropout": 0.1, "reward_transform": "none"}, "ryanxhr/IVR, run_kitchen.sh [code]"
        ),
    }

    def implicit_value_loss(self, residual: Tensor, weight: Tensor | None) -> Tensor:
        """Return the loss of the chi-square regularisation."""
        return sparse_value_loss(residual, self.config.alpha, weight)

    def policy_weight(self, residual: Tensor) -> Tensor:
        """Return ``min(max(u, 0), 100)``, or the capped density ratio."""
        released = self.config.policy_weight == "released"
        return (residual if released else density_ratio(residual, self.config.alpha)).clamp(0, WIDEST_WEIGHT)
