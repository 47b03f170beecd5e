r"""The in-sample core under IQL, XQL, SQL and EQL: state values of the data's good actions, never of unseen ones.

    u     = min_j Q'_j(s, a) - V(s)
    L_V   = implicit value loss of u: expectile, exponential, truncated square, ...
    L_pi  = -mean w(u) log pi(a|s)                                          (corollary.offline.weighted_cloning)
    L_Q   = sum_j mean (Q_j(s, a) - y)^2,   y = r + gamma (1 - d) V(s')

Order of a step: V, then policy (weights from the target critics and the *new* V), then critics (targets from the new
V), then Polyak averaging of the target critics. The order is that of ikostrikov/implicit_q_learning, from which the
codes of the others descend.

A method defines the value loss, and either the weight of a logged action or a policy's step of its own (FamO2O).
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..core.actor_critic import critic_loss, td_target
from ..core.agent import Metrics, adam, descend
from ..core.dataset import Batch
from ..core.networks import Critics, Initialisation, ValueNetwork, dropout_masks, polyak_update
from .weighted_cloning import WeightedCloningAgent, WeightedCloningConfig


@dataclass(frozen=True, kw_only=True)
class InSampleConfig(WeightedCloningConfig):
    """Settings of the core beyond the policy's; defaults are those of IQL's authors for MuJoCo locomotion.

    Attributes:
        discount: gamma in [0, 1).
        tau: Polyak rate in (0, 1] of the target critics.
        critic_lr, value_lr: Adam's step sizes, > 0.
        value_layer_norm: whether V has a LayerNorm before every ReLU.
        value_dropout: probability in [0, 1) of dropping a hidden unit of V while it is fitted.
        value_order: ``"new"`` or ``"old"``: which V, after its step or before, enters weights and critic targets.
    """

    state_transform: str = "none"
    reward_transform: str | tuple[str, ...] = "return_range"
    actor_lr_decay_steps: int | None = 1_000_000
    action_margin: float = 1e-5
    init: Initialisation = "orthogonal"
    discount: float = 0.99
    tau: float = 0.005
    critic_lr: float = 3e-4
    value_lr: float = 3e-4
    value_layer_norm: bool = False
    value_dropout: float = 0.0
    value_order: Literal["new", "old"] = "new"

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("discount", 0 <= self.discount < 1, "in [0, 1)")
        self.require("tau", 0 < self.tau <= 1, "in (0, 1]")
        for name in ("critic_lr", "value_lr"):
            self.require(name, getattr(self, name) > 0, "> 0")
        self.require("value_dropout", 0 <= self.value_dropout < 1, "in [0, 1)")
        unmasked = self.value_dropout == 0 or self.value_order == "new"
        self.require("value_dropout", unmasked, "0 with value_order='old', which takes V from its own step's pass")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def shifted_exponents(exponent: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(z - m, exp(-m))`` for ``z [..., B]``, with the constant ``m = max(max_b z_b, -1)`` over the rows that count.

    A loss in exp(z) times exp(-m) has the same minimiser, a gradient that cannot overflow, and a step size that adapts
    to the batch (XQL's and EQL's codes). Rows of weight 0 have no part in m; theirs are capped at 0.
    """
    counted = exponent.detach()
    if weight is not None:
        counted = counted.masked_fill(weight <= 0, -math.inf)
    shift = counted.amax(-1, keepdim=True).clamp(min=-1)
    return (exponent - shift).clamp(max=0), torch.exp(-shift)


C = TypeVar("C", bound=InSampleConfig)


class InSampleAgent(WeightedCloningAgent[C]):
    """The core's networks and update order; a method defines the value loss and the policy's step."""

    @abstractmethod
    def implicit_value_loss(self, residual: Tensor, weight: Tensor | None) -> Tensor:
        """Return the loss ``[S]`` of the residuals ``u = Q - V [S, B]``, to be minimised in V; Q is a constant."""

    @abstractmethod
    def improve(self, batch: Batch, advantage: Tensor) -> Metrics:
        """Take the policy's step, given the advantages ``u [S, B]`` of the logged actions."""

    def critic_loss(self, q: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return the loss ``[S]`` of critics ``[S, 2, B]`` and targets ``[S, B]``."""
        return critic_loss(q, target, weight)

    def build(self) -> None:
        """Make policy, value, critics, target critics and their optimisers."""
        super().build()
        cfg = self.config
        d_s, d_a = self.problem.observation_dim, self.problem.action_dim

        def critics() -> Critics:
            return Critics(self.mlp("critic", d_s + d_a, 1, members=2, init=cfg.init))

        norm: Literal["before", "none"] = "before" if cfg.value_layer_norm else "none"
        self.value = ValueNetwork(self.mlp("value", d_s, 1, init=cfg.init, layer_norm=norm))
        self.critic, self.critic_target = critics(), critics()  # same stream, so equal at the start
        self.networks.update({"value": self.value, "critic": self.critic, "critic_target": self.critic_target})
        self.optimizers |= {
            "value": adam(self.value.parameters(), cfg.value_lr),
            "critic": adam(self.critic.parameters(), cfg.critic_lr),
        }
        self._value_dropout = self.stream("value dropout")

    def update(self, batch: Batch) -> Metrics:
        """Take one value, one policy and one critic step, then move the target critics."""
        cfg = self.config
        batch = batch._replace(action=self.box.clip(batch.action, margin=cfg.action_margin))
        with torch.no_grad():
            q_target = self.critic_target(batch.obs, batch.action).amin(1)
            old_next_value = self.value(batch.next_obs) if cfg.value_order == "old" else None
        old_value, metrics = self.value_step(batch, q_target)

        with torch.no_grad():
            new = old_next_value is None
            advantage = q_target - (self.value(batch.obs) if new else old_value)
            next_value = self.value(batch.next_obs) if old_next_value is None else old_next_value
            target = td_target(batch.reward, batch.terminated, next_value, cfg.discount)
        metrics |= self.improve(batch, advantage)

        q = self.critic(batch.obs, batch.action)
        loss = self.critic_loss(q, target, batch.weight)
        descend(self.optimizers["critic"], loss)
        polyak_update(self.critic_target, self.critic, cfg.tau)
        return {
            "critic_loss": loss.detach(),
            "q": q.detach().mean((1, 2)),
            "advantage": advantage.mean(1),
            **metrics,
        }

    def value_step(self, batch: Batch, q_target: Tensor) -> tuple[Tensor, Metrics]:
        """Take one step of V towards `q_target` ``[S, B]``; return V from before the step, ``[S, B]``."""
        widths = self.config.hidden
        masks = dropout_masks(self._value_dropout, self.step, q_target.shape[1], widths, self.config.value_dropout)
        value = self.value(batch.obs, masks)
        loss = self.implicit_value_loss(q_target - value, batch.weight)
        descend(self.optimizers["value"], loss)
        return value.detach(), {"value_loss": loss.detach(), "value": value.detach().mean(1)}


class AdvantageCloningAgent(InSampleAgent[C]):
    """The core with one policy; a method defines the value loss and the weight of a logged action."""

    @abstractmethod
    def policy_weight(self, residual: Tensor) -> Tensor:
        """Return the weight ``[S, B]`` with which each logged action is cloned, from its advantage ``u [S, B]``."""

    def improve(self, batch: Batch, advantage: Tensor) -> Metrics:
        """Take one step of weighted cloning."""
        return self.policy_step(batch.obs, batch.action, self.policy_weight(advantage), batch.weight)
