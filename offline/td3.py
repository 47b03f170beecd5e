r"""The TD3 core under TD3+BC, PRDC, A2PR and ReBRAC: twin critics, target smoothing, delayed policy steps.

Source: S. Fujimoto, H. van Hoof, D. Meger, "Addressing Function Approximation Error in Actor-Critic Methods", ICML
2018, arXiv 1802.09477 (Algorithm 1); the policy's Q-normalisation is TD3+BC's (arXiv 2106.06860, eq. 5).

A method on this core adds a penalty to the policy loss, and where its paper has one a penalty to the target:

    critic  y     = r + gamma (1 - d) (min_j Q'_j(s', a') - p(s', a')),   a' = clip(pi'(s') + clip(sigma eps, -c, c))
            L_Q   = sum_j mean (Q_j(s, a) - y)^2
    policy  L_pi  = -lambda mean Q_1(s, pi(s)) + penalty(batch, pi(s)),   lambda = alpha / sg[mean |Q_1(s, pi(s))|]

on every `policy_freq`-th step, when all targets (critics' and policy's) move by the Polyak rate tau too.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..core.actor_critic import average, critic_loss, td_target, weighted_mean
from ..core.agent import Metrics, adam, descend
from ..core.config import OfflineConfig
from ..core.dataset import Batch
from ..core.networks import Critics, DeterministicActor, polyak_update
from ..core.offline_agent import OfflineAgent


@dataclass(frozen=True, kw_only=True)
class TD3Config(OfflineConfig):
    """Settings of the core; the defaults are those of TD3+BC's authors' code.

    Attributes:
        alpha: weight of the value against the penalty, >= 0; 0 leaves the penalty alone, large values approach TD3.
        discount: gamma in [0, 1).
        tau: Polyak rate in (0, 1]; 1 copies the online networks.
        policy_noise: standard deviation sigma of target smoothing, in half-ranges of the action box, >= 0.
        noise_clip: bound c of that noise in half-ranges, >= 0; 0 removes smoothing.
        policy_freq: critic steps per policy (and target) step, >= 1.
        actor_lr, critic_lr: Adam's step sizes, > 0.
    """

    alpha: float = 2.5
    discount: float = 0.99
    tau: float = 0.005
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    policy_freq: int = 2
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("alpha", self.alpha >= 0, ">= 0")
        self.require("discount", 0 <= self.discount < 1, "in [0, 1)")
        self.require("tau", 0 < self.tau <= 1, "in (0, 1]")
        self.require("policy_noise", self.policy_noise >= 0, ">= 0")
        self.require("noise_clip", self.noise_clip >= 0, ">= 0")
        self.require("policy_freq", self.policy_freq >= 1, ">= 1")
        self.require("actor_lr", self.actor_lr > 0, "> 0")
        self.require("critic_lr", self.critic_lr > 0, "> 0")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def policy_loss(q: Tensor, penalty: Tensor, alpha: float, weight: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """``-lambda mean w Q + penalty`` with ``lambda = alpha / sg[average |Q|]``, for ``q [..., B]``, ``penalty [...]``.

    The average counts each row by its weight. Invariant under Q -> c Q (c > 0). As in the authors' code nothing guards
    a vanishing mean |Q|: watch ``lambda``.
    """
    scale = alpha / average(q.detach().abs(), weight)
    value = weighted_mean(q, weight)
    return penalty - scale * value, {"lambda": scale, "policy_q": value.detach()}


def action_error(action: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over batch *and* action dimensions of ``w (pi(s) - a)^2``, for ``[..., B, d_a]``; shape ``[...]``."""
    squared = (action - target).square()
    return squared.mean((-2, -1)) if weight is None else weighted_mean(squared.mean(-1), weight)


C = TypeVar("C", bound=TD3Config)


class TD3Agent(OfflineAgent[C]):
    """The core's networks and update order; a method defines `penalty`."""

    actor: DeterministicActor
    critic: Critics

    @abstractmethod
    def penalty(self, batch: Batch, action: Tensor) -> tuple[Tensor, Metrics]:
        """Return the penalty ``[S]`` on the policy's actions ``[S, B, d_a]`` at the batch's states, and diagnostics."""

    def target_penalty(self, batch: Batch, next_action: Tensor) -> Tensor | None:
        """Return what the target subtracts from the next value, ``[S, B]``; ``None`` for nothing."""
        return None

    def policy_value(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return the value ``[S, B]`` that the policy climbs, the critics held constant."""
        return self.critic.first(obs, action)

    def after_critic(self, batch: Batch, next_action: Tensor, target: Tensor) -> Metrics:
        """Fit what the penalty needs, after every critic step on `target` ``[S, B]``.

        `next_action` ``[S, B, d_a]`` is the smoothed action that the target was evaluated at.
        """
        return {}

    def policy_is_due(self) -> bool:
        """Whether this update, number ``step + 1``, also moves the policy and the targets."""
        return (self.step + 1) % self.config.policy_freq == 0

    def move_policy(self, loss: Tensor) -> None:
        """Take the policy's step on `loss` ``[S]``; its target then follows."""
        descend(self.optimizers["actor"], loss)
        polyak_update(self.actor_target, self.actor, self.config.tau)

    def make_actor(self) -> DeterministicActor:
        """Make a policy; from the same stream, so equal at every call."""
        return DeterministicActor(self.mlp("actor", self.problem.observation_dim, self.problem.action_dim), self.box)

    def make_critics(self) -> Critics:
        """Make twin critics, likewise equal at every call."""
        return Critics(self.mlp("critic", self.problem.observation_dim + self.problem.action_dim, 1, members=2))

    def build(self) -> None:
        """Make actor, twin critics, their targets and the two optimisers."""
        self.actor, self.critic = self.make_actor(), self.make_critics()
        self.actor_target, self.critic_target = self.make_actor(), self.make_critics()
        self.networks = nn.ModuleDict(
            {
                "actor": self.actor,
                "critic": self.critic,
                "actor_target": self.actor_target,
                "critic_target": self.critic_target,
            }
        )
        self.optimizers = {
            "actor": adam(self.actor.parameters(), self.config.actor_lr),
            "critic": adam(self.critic.parameters(), self.config.critic_lr),
        }
        self._noise = self.stream("target noise")

    def update(self, batch: Batch) -> Metrics:
        """Take one critic step and, on every `policy_freq`-th call, one policy step and the targets' move."""
        cfg = self.config
        with torch.no_grad():
            noise = self._noise.normal(self.step, batch.action.shape[1:])
            smoothing = self.box.half_range * (cfg.policy_noise * noise).clamp(-cfg.noise_clip, cfg.noise_clip)
            next_action = self.box.clip(self.actor_target(batch.next_obs) + smoothing)
            next_value = self.critic_target(batch.next_obs, next_action).amin(1)
            if (penalty := self.target_penalty(batch, next_action)) is not None:
                next_value = next_value - penalty
            target = td_target(batch.reward, batch.terminated, next_value, cfg.discount)
        q = self.critic(batch.obs, batch.action)
        loss = critic_loss(q, target, batch.weight)
        descend(self.optimizers["critic"], loss)
        metrics = {"critic_loss": loss.detach(), "q": q.detach().mean((1, 2)), "target": target.mean(1)}
        metrics |= self.after_critic(batch, next_action, target)
        if self.policy_is_due():
            metrics |= self._policy_step(batch)
        return metrics

    def _policy_step(self, batch: Batch) -> Metrics:
        action = self.actor(batch.obs)
        penalty, diagnostics = self.penalty(batch, action)
        value = self.policy_value(batch.obs, action)
        loss, metrics = policy_loss(value, penalty, self.config.alpha, batch.weight)
        self.move_policy(loss)
        polyak_update(self.critic_target, self.critic, self.config.tau)
        return {"policy_loss": loss.detach(), "penalty": penalty.detach(), **metrics, **diagnostics}

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
