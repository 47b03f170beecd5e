r"""O-DICE: state values by distribution correction, the next state's gradient projected off the current state's.

Paper: L. Mao, H. Xu, W. Zhang, X. Zhan, "ODICE: Revealing the Mystery of Distribution Correction Estimation via
Orthogonal-gradient Update", ICLR 2024, arXiv 2402.00348.
Reference code: maoliyuan/ODICE-Pytorch (losses, order, networks, constants, imitation).

The dual of "maximise reward minus an f-divergence of occupancies", its initial-state term taken over the data's states:

    min_V  (1 - lambda) E V(s) + lambda E f*(d),      d = r + gamma (1 - end) V(s') - V(s)
    f*(d) = max(0, d/2 + 1)^2 - 1  (chi-square),      exp(d - 1)  (reverse KL)

d moves with V(s) (forward) and with V(s') (backward), and the two may cancel. With the target network V', its smaller
head, in the other place, and each mean over rows and heads h,

    L_f = lambda mean f*(r + gamma (1 - end) V'(s') - V_h(s)),       g_f its gradient
    L_b = lambda eta mean f*(r + gamma (1 - end) V_h(s') - V'(s)),   g_b its gradient
    g   = (1 - lambda) grad mean V_h(s) + g_f + (g_b - c g_f),       c = <g_f, g_b> / max(<g_f, g_f>, 1e-10)

where a gradient is one vector of all parameters of both heads. Order of a step: V along g, Polyak averaging of V',
policy with weights from the forward residuals d before the step:

    L_pi = -mean w log pi(a|s),    w = mean_h min(max(d_h, 0), 100)      (reverse KL: mean_h min(exp(d_h - 1), 100))

Where V' = V is the forward-only fixed point, lambda E_{a ~ data} max(0, 1 + d/2) = 1 - lambda, so that lambda is not
free of scale: with rewards so small that every d >= -2, V is the mean of its targets plus 2 (2 lambda - 1) / lambda.
States where no d exceeds 0 teach the policy nothing: watch ``zero_weight_fraction``.

Deviations and choices:
1. ``policy_weight="released"`` (default) is the code's max(d, 0), "theory" the density ratio max(d/2 + 1, 0) of the
   dual. They differ where -2 < d <= 0, and in scale.
2. ``gradient="semi"`` (g_b left out) and ``"true"`` (one residual, the gradient of both its ends, no target network)
   are the code's variants. They have no eta.
3. Imitation (the presets): rewards 0 and one trajectory, the code's ``[T:T+1]``. The code takes the observation that
   follows in the file for the last step's successor, which is the next episode's first; here it is the recorded one,
   or the step is left out.
4. The mean is not squashed: centre + half_range * f(s), which is the code's f(s) where the box is (-1, 1)^d_a.
5. lambda and eta per dataset stand in the paper's appendix D only; those of the presets are [memory, low].
6. There is no Q here, and V's gradient is made of two backward passes: of the in-sample core
   (:mod:`corollary.offline.in_sample`) only the policy's half, weighted cloning, is shared.
7. As in the code nothing caps the exponential in reverse KL's loss, which overflows float32 from d = 89 on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.actor_critic import td_target, weighted_mean
from ..core.agent import Metrics, adam, descend, step_along
from ..core.config import Preset
from ..core.dataset import Batch, Dataset
from ..core.networks import ValueNetwork, polyak_update
from .weighted_cloning import WIDEST_WEIGHT, WeightedCloningAgent, WeightedCloningConfig, exponential_weight

Divergence = Literal["chi2", "reverse_kl"]
PolicyWeight = Literal["released", "theory"]

QUANTILES = (0.05, 0.5, 0.95)
"""Those of the residuals that are reported."""


@dataclass(frozen=True, kw_only=True)
class ODICEConfig(WeightedCloningConfig):
    """O-DICE's settings beyond the policy's; defaults are those of the authors' code for MuJoCo locomotion.

    Attributes:
        lambda_: weight in (0, 1) of the divergence's dual against the level of V. At 0.5 the forward-only V is the mean
            of its targets (where all d >= -2); -> 0 lets it fall without bound, -> 1 lifts it above the best target
            until every weight is zero.
        eta: weight >= 0 of the backward term; 0 leaves the forward term alone.
        f: divergence, ``"chi2"`` (Pearson's) or ``"reverse_kl"``.
        gradient: ``"orthogonal"``, ``"semi"`` (forward only) or ``"true"`` (both, unprojected).
        policy_weight: of chi2, ``"released"`` max(d, 0), or ``"theory"`` max(d/2 + 1, 0); both at most 100.
        twin_value: whether V has two heads, of which the smaller one is the target, or one.
        discount: gamma in [0, 1).
        tau: Polyak rate in (0, 1] of the target network.
        value_lr: Adam's step size, > 0.
        value_layer_norm: whether V has a LayerNorm before every ReLU.
        actor_weight_decay: coefficient >= 0 of |theta|^2 / 2 in the policy's loss, log_std included; 0 for none.
        trajectory: the one recorded episode, from 0, that is learnt from; None for all.
    """

    state_transform: str = "none"
    reward_transform: str | tuple[str, ...] = "return_range"
    actor_hidden: tuple[int, ...] | None = (1024, 1024)
    actor_lr: float = 2e-4
    squash_mean: bool = False
    lambda_: float = 0.6
    eta: float = 1.0
    f: Divergence = "chi2"
    gradient: Literal["orthogonal", "semi", "true"] = "orthogonal"
    policy_weight: PolicyWeight = "released"
    twin_value: bool = True
    discount: float = 0.99
    tau: float = 0.005
    value_lr: float = 2e-4
    value_layer_norm: bool = True
    actor_weight_decay: float = 1e-4
    trajectory: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("lambda_", 0 < self.lambda_ < 1, "in (0, 1)")
        self.require("discount", 0 <= self.discount < 1, "in [0, 1)")
        self.require("tau", 0 < self.tau <= 1, "in (0, 1]")
        self.require("value_lr", self.value_lr > 0, "> 0")
        for name in ("eta", "actor_weight_decay"):
            self.require(name, getattr(self, name) >= 0, ">= 0")
        weight_of = self.f == "chi2" or self.policy_weight == "released"
        self.require("policy_weight", weight_of, "'released' with reverse_kl, which has one weight only")
        self.require("trajectory", self.trajectory is None or self.trajectory >= 0, ">= 0, or None")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def conjugate(residual: Tensor, f: Divergence) -> Tensor:
    """``f*(d)``, elementwise: ``max(0, d/2 + 1)^2 - 1``, or ``exp(d - 1)``."""
    if f == "reverse_kl":
        return torch.exp(residual - 1)
    return (residual / 2 + 1).clamp(min=0).square() - 1


def dual_terms(
    value: Tensor, residual: Tensor, lambda_: float, f: Divergence, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the two terms of V's loss, ``(1 - lambda) mean v`` and ``lambda mean f*(d)``, over ``[..., B]``."""
    return (1 - lambda_) * weighted_mean(value, weight), lambda_ * weighted_mean(conjugate(residual, f), weight)


def cloning_weight(residual: Tensor, f: Divergence, kind: PolicyWeight) -> Tensor:
    """Return the policy's weight, elementwise, at most 100; of kind "theory" it is the slope of ``f*``."""
    if f == "reverse_kl":
        return exponential_weight(residual - 1)
    return (residual if kind == "released" else residual / 2 + 1).clamp(0, WIDEST_WEIGHT)


def orthogonal_part(gradient: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return ``g - c d`` and each seed's ``c = <g, d> / max(<d, d>, 1e-10)``, of shape ``[S]``.

    Args:
        gradient: g, one tensor ``[S, ...]`` per parameter; together they are one vector for each seed.
        direction: d, likewise.
    """
    pairs = list(zip(gradient, direction, strict=True))
    along = torch.stack([torch.linalg.vecdot(g.flatten(1), d.flatten(1)) for g, d in pairs]).sum(0)
    length = torch.stack([torch.linalg.vecdot(d.flatten(1), d.flatten(1)) for d in direction]).sum(0)
    coefficient = along / length.clamp(min=1e-10)  # the direction vanishes where every weight f*' is zero
    return [g - coefficient.view(-1, *[1] * (g.ndim - 1)) * d for g, d in pairs], coefficient


def _preset(lambda_: float, eta: float, **settings: Any) -> Preset:
    settings = {"reward_transform": "return_range_corl", "view": "d4rl_qlearning"} | settings
    return Preset(
        {"lambda_": lambda_, "eta": eta, **settings},
        "lambda, eta: the paper's appendix D [memory, low]; the rest: maoliyuan/ODICE-Pytorch, main_odice_rl.py [code]",
    )


_ANTMAZE = {"reward_transform": "antmaze_odice", "value_layer_norm": False}
_SINGLE = {**_ANTMAZE, "twin_value": False}
_IMITATION = {
    "reward_transform": "zero",
    "state_transform": "standardize",
    "trajectory": 1,
    "lambda_": 0.4,
    "squash_mean": True,
    "value_layer_norm": False,
    "actor_lr": 1e-4,
    "value_lr": 1e-4,
}


class ODICE(WeightedCloningAgent[ODICEConfig]):
    """O-DICE (Mao et al., 2024); see the module's head."""

    algorithm: ClassVar[str] = "offline.odice"
    config_type = ODICEConfig
    claims: ClassVar[tuple[str, ...]] = (
        "OFF-03",
        "OFF-11h",
        "OFF-11i",
        "OFF-12a",
        "OFF-12b",
        "OFF-12c",
        "OFF-12d",
        "OFF-12e",
        "OFF-12f",
    )
    presets: ClassVar[dict[str, Preset]] = {
        "halfcheetah-medium": _preset(0.5, 1.0),
        "halfcheetah-medium-replay": _preset(0.6, 1.0),
        "halfcheetah-medium-expert": _preset(0.5, 1.0),
        "hopper-medium": _preset(0.6, 1.0),
        "hopper-medium-replay": _preset(0.6, 1.0),
        "hopper-medium-expert": _preset(0.5, 1.0),
        "walker2d-medium": _preset(0.5, 1.0),
        "walker2d-medium-replay": _preset(0.6, 1.0),
        "walker2d-medium-expert": _preset(0.5, 1.0),
        "antmaze-umaze": _preset(0.6, 1.0, **_ANTMAZE),
        "antmaze-umaze-diverse": _preset(0.4, 1.0, **_SINGLE),
        "antmaze-medium-play": _preset(0.7, 0.2, **_ANTMAZE),
        "antmaze-medium-diverse": _preset(0.7, 0.2, **_ANTMAZE),
        "antmaze-large-play": _preset(0.7, 0.8, **_SINGLE),
        "antmaze-large-diverse": _preset(0.8, 0.8, **_SINGLE),
        "imitation-hopper": Preset(
            {**_IMITATION, "actor_weight_decay": 1e-5},
            "maoliyuan/ODICE-Pytorch, offline_IL.yaml, run_offline_il.sh: trajectory 1, 10, 20 or 30 [code]",
        ),
        "imitation-walker2d": Preset(
            {**_IMITATION, "actor_weight_decay": 1e-3},
            "maoliyuan/ODICE-Pytorch, offline_IL.yaml, run_offline_il.sh: trajectory 1, 10, 20 or 30 [code]",
        ),
    }

    def select_data(self, dataset: Dataset) -> Dataset:
        """Keep the one trajectory that is to be imitated, if the configuration names one."""
        chosen = self.config.trajectory
        return dataset if chosen is None else dataset.episode(chosen)

    def build(self) -> None:
        """Make policy, value, target value and their optimisers."""
        super().build()
        cfg = self.config
        self.optimizers["actor"] = adam(self.actor.parameters(), cfg.actor_lr, cfg.actor_weight_decay)
        heads = 2 if cfg.twin_value else 1
        norm: Literal["before", "none"] = "before" if cfg.value_layer_norm else "none"

        def values() -> ValueNetwork:
            return ValueNetwork(
                self.mlp("value", self.problem.observation_dim, 1, members=heads, init=cfg.init, layer_norm=norm)
            )

        self.value, self.value_target = values(), values()  # same stream, so equal at the start
        self.networks.update({"value": self.value, "value_target": self.value_target})
        self.optimizers["value"] = adam(self.value.parameters(), cfg.value_lr)
        self._quantiles = torch.tensor(QUANTILES, dtype=self.dtype, device=self.device)

    def update(self, batch: Batch) -> Metrics:
        """Take one value step, move the target, and take one policy step."""
        cfg = self.config
        residual, metrics = self.value_step(batch)
        polyak_update(self.value_target, self.value, cfg.tau)
        weight = cloning_weight(residual, cfg.f, cfg.policy_weight)
        action = self.box.clip(batch.action, margin=cfg.action_margin)
        metrics |= self.policy_step(batch.obs, action, weight.mean(1), batch.weight)
        low, median, high = torch.quantile(residual.flatten(1), self._quantiles, 1)
        return {
            **metrics,
            "zero_weight_fraction": (weight == 0).to(weight.dtype).mean((1, 2)),
            "residual_05": low,
            "residual_50": median,
            "residual_95": high,
        }

    def value_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Take one step of V; return the residuals from before it, ``[S, M, B]`` for M heads, and diagnostics."""
        cfg = self.config
        value = self.value(batch.obs)
        next_value = self.value(batch.next_obs) if cfg.gradient == "true" else self._target(batch.next_obs)
        forward = self._aim(batch, next_value) - value
        level, forward_loss = self._terms(batch, value, forward)
        metrics = {"value_loss": (level + forward_loss).detach(), "value": value.detach().mean((1, 2))}
        if cfg.gradient == "orthogonal":
            backward = self._aim(batch, self.value(batch.next_obs)) - self._target(batch.obs)
            backward_loss = cfg.eta * self._terms(batch, value, backward)[1]
            metrics |= {"backward_loss": backward_loss.detach()}
            metrics |= {"projection": self._orthogonal_step(level, forward_loss, backward_loss)}
        else:
            descend(self.optimizers["value"], level + forward_loss)
        return forward.detach(), metrics

    def _orthogonal_step(self, level: Tensor, forward_loss: Tensor, backward_loss: Tensor) -> Tensor:
        """Step along ``grad level + g_f + (g_b - c g_f)`` of losses ``[S]``; return ``c [S]``."""
        parameters = list(self.value.parameters())
        forward = torch.autograd.grad(forward_loss.sum(), parameters, retain_graph=True)
        backward = torch.autograd.grad(backward_loss.sum(), parameters)
        projected, coefficient = orthogonal_part(backward, forward)
        gradient = torch.autograd.grad(level.sum(), parameters)
        step_along(self.optimizers["value"], torch._foreach_add(torch._foreach_add(gradient, forward), projected))
        return coefficient

    def _terms(self, batch: Batch, value: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Average the loss's two terms over the heads: ``[S, M, B]`` to ``[S]``."""
        weight = None if batch.weight is None else batch.weight.unsqueeze(1)
        level, penalty = dual_terms(value, residual, self.config.lambda_, self.config.f, weight)
        return level.mean(1), penalty.mean(1)

    def _aim(self, batch: Batch, next_value: Tensor) -> Tensor:
        """``r + gamma (1 - end) v'`` for ``v' [S, M, B]``."""
        return td_target(batch.reward.unsqueeze(1), batch.terminated.unsqueeze(1), next_value, self.config.discount)

    def _target(self, obs: Tensor) -> Tensor:
        """Return the target network's smaller head, ``[S, 1, B]``."""
        with torch.no_grad():
            value: Tensor = self.value_target(obs).amin(1, keepdim=True)
        return value
