r"""The policy half of IQL and its relatives: cloning of the logged actions, each with a weight.

    L_pi = -mean w(s, a) log pi(a|s),        pi(.|s) = N(m(s), diag(sigma)^2) with one sigma for all states

The weight is what an algorithm derives from its values. Weights exp(beta A) make the minimiser over all policies the
solution ``pi ~ pi_b exp(beta A)`` of an improvement constrained by KL(pi || pi_b), pi_b the data's policy (X. B. Peng
et al., "Advantage-Weighted Regression", 2019, arXiv 1910.00177, eq. 10 [memory]).

The density is not squashed; samples are clipped to the action box when they act.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor, nn

from ..core.actor_critic import weighted_mean
from ..core.agent import Metrics, adam, cosine_decay, descend
from ..core.config import OfflineConfig
from ..core.distributions import DiagonalGaussian
from ..core.networks import DeterministicActor, GaussianActor, Initialisation, dropout_masks
from ..core.offline_agent import OfflineAgent

WIDEST_WEIGHT = 100.0
"""Weights are capped here, in all of the published codes."""


@dataclass(frozen=True, kw_only=True)
class WeightedCloningConfig(OfflineConfig):
    """Settings of the policy.

    Attributes:
        actor_hidden: widths of the policy's hidden layers; ``None`` for those of `hidden`.
        actor_lr: Adam's step size, > 0.
        actor_lr_decay_steps: steps of a cosine decay of `actor_lr` to 0 while learning from a dataset; None keeps it
            constant, as it is while learning from an environment.
        log_std_range: clip of the policy's log standard deviation.
        action_margin: logged actions are clipped this far (in half-ranges) inside the box, in [0, 1).
        dropout: probability in [0, 1) of dropping a hidden unit of the policy.
        squash_mean: whether the mean goes through tanh, which keeps it inside the box.
        policy: ``"gaussian"``, or ``"deterministic"`` with -log pi replaced by the squared error summed over
            dimensions.
        init: ``"orthogonal"`` (gain sqrt 2) or ``"torch"`` initialisation of all networks.
    """

    actor_hidden: tuple[int, ...] | None = None
    actor_lr: float = 3e-4
    actor_lr_decay_steps: int | None = None
    log_std_range: tuple[float, float] = (-5.0, 2.0)
    action_margin: float = 0.0
    dropout: float = 0.0
    squash_mean: bool = True
    policy: Literal["gaussian", "deterministic"] = "gaussian"
    init: Initialisation = "torch"

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("actor_hidden", self.actor_hidden is None or min(self.actor_hidden, default=0) >= 1, "widths >= 1")
        self.require("actor_lr", self.actor_lr > 0, "> 0")
        decay = self.actor_lr_decay_steps
        self.require("actor_lr_decay_steps", decay is None or decay >= 1, "at least 1, or None")
        self.require("log_std_range", self.log_std_range[0] < self.log_std_range[1], "an increasing pair")
        self.require("action_margin", 0 <= self.action_margin < 1, "in [0, 1)")
        self.require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self.require("init", self.init in ("orthogonal", "torch"), "'orthogonal' or 'torch'")
        squashed = self.squash_mean or self.policy == "gaussian"
        self.require("squash_mean", squashed, "True with policy='deterministic', whose action is tanh of the network")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def exponential_weight(exponent: Tensor) -> Tensor:
    """``min(exp(x), 100)``; the exponent is capped first, so it cannot overflow."""
    return exponent.clamp(max=math.log(WIDEST_WEIGHT)).exp()


def weighted_cloning_loss(weight: Tensor, negative_log_likelihood: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """``mean w(s, a) * (-log pi(a|s))`` over ``[..., B]``, the weights held constant."""
    return weighted_mean(weight.detach() * negative_log_likelihood, row_weight)


C = TypeVar("C", bound=WeightedCloningConfig)


class WeightedCloningAgent(OfflineAgent[C]):
    """The policy, its optimiser and its step; an algorithm adds the values that the weights come from."""

    actor: GaussianActor | DeterministicActor

    def build(self) -> None:
        """Make the policy and its optimiser."""
        cfg = self.config
        net = self.mlp("actor", self.actor_input_dim, self.problem.action_dim, hidden=cfg.actor_hidden, init=cfg.init)
        if cfg.policy == "gaussian":
            self.actor = GaussianActor(net, self.box, cfg.log_std_range, squash_mean=cfg.squash_mean)
        else:
            self.actor = DeterministicActor(net, self.box)
        self.networks = nn.ModuleDict({"actor": self.actor})
        self.optimizers = {"actor": adam(self.actor.parameters(), cfg.actor_lr)}
        self._dropout = self.stream("dropout")

    @property
    def actor_input_dim(self) -> int:
        """Numbers that the policy's network sees: d_s unless overridden."""
        return self.problem.observation_dim

    def policy_step(self, obs: Tensor, action: Tensor, weight: Tensor, row_weight: Tensor | None) -> Metrics:
        """Take one step on the weighted cloning loss of rows ``[S, B]``."""
        cfg = self.config
        proposed = self.actor(obs, self._masks(obs.shape[1]))
        deterministic = isinstance(proposed, Tensor)
        surprise = (proposed - action).square().sum(-1) if deterministic else -proposed.log_prob(action)
        loss = weighted_cloning_loss(weight, surprise, row_weight)
        decay = None if self.online_phase else cfg.actor_lr_decay_steps
        for group in self.optimizers["actor"].param_groups:
            group["lr"] = cfg.actor_lr * cosine_decay(self.step, decay)
        descend(self.optimizers["actor"], loss)
        capped = (weight >= WIDEST_WEIGHT).to(weight.dtype).mean(1)
        return {"policy_loss": loss.detach(), "weight": weight.mean(1), "clipped_weight_fraction": capped}

    def _masks(self, batch_size: int) -> list[Tensor]:
        widths = list(self.config.actor_hidden or self.config.hidden)
        return dropout_masks(self._dropout, self.step, batch_size, widths, self.config.dropout)

    @property
    def is_deterministic(self) -> bool:
        """Whether the policy is one of squared errors; exploration then adds noise."""
        return self.config.policy == "deterministic"

    def policy(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Return the mean action, or a sample where `noise` is given."""
        proposed: Tensor | DiagonalGaussian = self.actor(obs)
        if isinstance(proposed, Tensor):
            return proposed
        return proposed.mean if noise is None else proposed.sample(noise)

    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's mean action as an ordinary module."""
        return self.actor.plain(seed_index)
