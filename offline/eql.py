r"""EQL: in-sample values under a Kullback-Leibler regularisation, and a policy cloned with exponential weights.

Paper: H. Xu, L. Jiang, J. Li, Z. Yang, Z. Wang, V. W. K. Chan, X. Zhan, "Offline RL with No OOD Actions: In-Sample
Learning via Implicit Value Regularization", ICLR 2023, arXiv 2303.15810 (implicit value regularisation with
f(x) = log x; its sibling with f(x) = x - 1 is :mod:`corollary.offline.sql`).
Reference code: ryanxhr/IVR (losses, order, networks, constants), built on IQL's.

    u    = min_j Q'_j(s, a) - V(s),      z = min(u / alpha, 5),      m = sg[max(max_batch z, -1)]
    L_V  = mean (exp(z - m) + exp(-m) V(s) / alpha)                      so that E_{a ~ data} exp(u / alpha) = 1
    L_pi = -mean min(exp(k u / alpha), 100) log pi(a|s),   k = 10
    L_Q  = sum_j mean (Q_j(s, a) - y)^2,   y = r + gamma (1 - d) V(s')

Unclipped, V = alpha log E_{a ~ data} exp(Q / alpha), as in XQL. The order of a step and the critics are
:mod:`corollary.offline.in_sample`'s.

Deviations and choices:
1. The factor k = 10 is the code's. The regularised problem's solution is the data's policy times exp(u / alpha), that
   is ``weight_scale=1``.
2. Where u / alpha > 5 only the term V / alpha has a gradient, as in the code: such a row lowers V, away from its own
   Q. XQL's loss gives it no gradient.
3. V / alpha enters the loss as -u / alpha: Q is a constant, so the gradient is the same.
4. The code's AntMaze config gives V a dropout of 0.5, but never calls V in training mode, so it has no effect: the
   presets have none. ``value_dropout=0.5`` is what was meant.
5. The code's LayerNorm adds 1e-6 to the variance (flax), this one 1e-5 (torch).
6. By default every row with a known successor is used; the authors' runs had D4RL's q-learning rows,
   ``view="d4rl_qlearning"``.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.actor_critic import weighted_mean
from ..core.config import Preset
from .in_sample import AdvantageCloningAgent, InSampleConfig, shifted_exponents
from .weighted_cloning import exponential_weight

LARGEST_EXPONENT = 5.0
"""Exponents of the value loss are clipped here, in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class EQLConfig(InSampleConfig):
    """EQL's settings beyond the core's; defaults are the authors' for MuJoCo locomotion.

    Attributes:
        alpha: strength > 0 of the regularisation, in units of Q; -> 0 the best action in the data, large values
            evaluate the data's policy.
        weight_scale: factor k >= 0 of the policy's exponent: 10 in the authors' code, 1 in the derivation, 0 clones the
            data.
    """

    value_layer_norm: bool = True
    alpha: float = 2.0
    weight_scale: float = 10.0

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("alpha", self.alpha > 0, "> 0")
        self.require("weight_scale", self.weight_scale >= 0, ">= 0")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def exponential_value_loss(residual: Tensor, alpha: float, weight: Tensor | None = None) -> Tensor:
    """``mean (e^{z - m} - e^{-m} u / alpha)`` with ``z = min(u / alpha, 5)`` and m the largest z, over ``[..., B]``.

    Unclipped, its minimiser in v, for u = x - v, is ``alpha log E e^{x / alpha}``.
    """
    exponent = residual / alpha
    shifted, scale = shifted_exponents(exponent.clamp(max=LARGEST_EXPONENT), weight)
    return weighted_mean(shifted.exp() - scale * exponent, weight)


_ANTMAZE = {"reward_transform": "antmaze_minus1", "actor_lr": 2e-4, "critic_lr": 2e-4, "value_lr": 2e-4}


class EQL(AdvantageCloningAgent[EQLConfig]):
    """Exponential Q-learning (Xu et al., 2023); see the module's head."""

    algorithm: ClassVar[str] = "offline.eql"
    config_type = EQLConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-11e", "OFF-11g", "OFF-11h", "OFF-11i")
    presets: ClassVar[dict[str, Preset]] = {
        "locomotion": Preset({}, "ryanxhr/IVR, run_mujoco.sh [code]"),
        "antmaze": Preset({**_ANTMAZE, "alpha": 0.5}, "ryanxhr/IVR, run_antmaze.sh, -v2, all but umaze-diverse [code]"),
        "antmaze-umaze-diverse": Preset({**_ANTMAZE, "alpha": 5.0}, "ryanxhr/IVR, run_antmaze.sh, -v2 [code]"),
        "kitchen": Preset(
            {"alpha": 2.0, "dropout": 0.1, "reward_transform": "none"}, "ryanxhr/IVR, run_kitchen.sh [code]"
        ),
    }

    def implicit_value_loss(self, residual: Tensor, weight: Tensor | None) -> Tensor:
        """Return the loss of the Kullback-Leibler regularisation."""
        return exponential_value_loss(residual, self.config.alpha, weight)

    def policy_weight(self, residual: Tensor) -> Tensor:
        """Return ``min(exp(k u / alpha), 100)``."""
        return exponential_weight(self.config.weight_scale / self.config.alpha * residual)
