r"""IQL: values of the data's best actions by expectile regression, and a policy cloned with advantage weights.

Paper: I. Kostrikov, A. Nair, S. Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022,
arXiv 2110.06169. Equations used: (5) value loss, (6) critic loss, (7) policy loss.
Reference code: ikostrikov/implicit_q_learning (update order, networks, constants); corl-team/CORL for its variant.

    u     = min_j Q'_j(s, a) - V(s)
    L_V   = mean |tau - 1[u < 0]| u^2                                  (expectile tau)
    L_pi  = -mean min(exp(beta u), 100) log pi(a|s)
    L_Q   = sum_j mean (Q_j(s, a) - y)^2,   y = r + gamma (1 - d) V(s')

Order of a step: V, then policy (weights from the target critics and the *new* V), then critics (targets from the new
V), then Polyak averaging of the target critics.

Deviations and choices:
1. ``value_order="old"`` and ``critic_reduction="mean"`` are CORL's: u and V(s') from before the value step, and the
   average of the two critic losses.
2. The paper's critic loss (6) has one critic; the authors' code has two and a minimum, as here.
3. The density is a Gaussian with mean in the box, not squashed; samples are clipped to the box when they act.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.agent import Metrics, adam, cosine_decay, descend
from ..core.config import OfflineConfig, Preset
from ..core.dataset import Batch
from ..core.distributions import DiagonalGaussian
from ..core.networks import (
    Critics,
    DeterministicActor,
    GaussianActor,
    Initialisation,
    ValueNetwork,
    polyak_update,
)
from ..core.offline_agent import OfflineAgent
from .td3 import critic_loss, td_target

_WIDEST_WEIGHT = 100.0
_LOG_WIDEST = math.log(_WIDEST_WEIGHT)


@dataclass(frozen=True, kw_only=True)
class IQLConfig(OfflineConfig):
    """IQL's settings beyond the common ones; defaults are the authors' for MuJoCo locomotion.

    Attributes:
        expectile: tau in (0, 1); 0.5 evaluates the behaviour policy, -> 1 the best action in the data.
        beta: inverse temperature >= 0 of the policy's weights; 0 clones the data, large values take the best action.
        discount: gamma in [0, 1).
        tau: Polyak rate in (0, 1] of the target critics.
        actor_lr, critic_lr, value_lr: Adam's step sizes, > 0.
        actor_lr_decay_steps: steps of a cosine decay of `actor_lr` to 0; None keeps it constant.
        log_std_range: clip of the policy's log standard deviation.
        action_margin: logged actions are clipped this far (in half-ranges) inside the box, in [0, 1).
        dropout: probability in [0, 1) of dropping a hidden unit of the policy.
        policy: ``"gaussian"``, or ``"deterministic"`` with -log pi replaced by the squared error summed over
            dimensions.
        init: ``"orthogonal"`` (gain sqrt 2) or ``"torch"`` initialisation of all networks.
        value_order: ``"new"`` or ``"old"``: which V enters weights and critic targets (note 1 above).
        critic_reduction: ``"sum"`` or ``"mean"`` over the two critics.
    """

    state_transform: str = "none"
    reward_transform: str | tuple[str, ...] = "return_range"
    expectile: float = 0.7
    beta: float = 3.0
    discount: float = 0.99
    tau: float = 0.005
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    value_lr: float = 3e-4
    actor_lr_decay_steps: int | None = 1_000_000
    log_std_range: tuple[float, float] = (-5.0, 2.0)
    action_margin: float = 1e-5
    dropout: float = 0.0
    policy: str = "gaussian"
    init: Initialisation = "orthogonal"
    value_order: str = "new"
    critic_reduction: str = "sum"

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("expectile", 0 < self.expectile < 1, "in (0, 1)")
        self.require("beta", self.beta >= 0, ">= 0")
        self.require("discount", 0 <= self.discount < 1, "in [0, 1)")
        self.require("tau", 0 < self.tau <= 1, "in (0, 1]")
        for name in ("actor_lr", "critic_lr", "value_lr"):
            self.require(name, getattr(self, name) > 0, "> 0")
        decay = self.actor_lr_decay_steps
        self.require("actor_lr_decay_steps", decay is None or decay >= 1, "at least 1, or None")
        self.require("log_std_range", self.log_std_range[0] < self.log_std_range[1], "an increasing pair")
        self.require("action_margin", 0 <= self.action_margin < 1, "in [0, 1)")
        self.require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self.require("policy", self.policy in ("gaussian", "deterministic"), "'gaussian' or 'deterministic'")
        self.require("init", self.init in ("orthogonal", "torch"), "'orthogonal' or 'torch'")
        self.require("value_order", self.value_order in ("new", "old"), "'new' or 'old'")
        self.require("critic_reduction", self.critic_reduction in ("sum", "mean"), "'sum' or 'mean'")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def expectile_loss(residual: Tensor, expectile: float) -> Tensor:
    """``mean |tau - 1[u < 0]| u^2`` over ``[..., B]``; its minimiser in v, for u = x - v, is x's tau-expectile."""
    # Not torch.where of two floats, which is float32 whatever the residual's dtype.
    weight = (expectile - (residual < 0).to(residual.dtype)).abs()
    return (weight * residual.square()).mean(-1)


def advantage_weight(residual: Tensor, beta: float) -> Tensor:
    """``min(exp(beta u), 100)``; the exponent is capped first, so it cannot overflow."""
    return (beta * residual).clamp(max=_LOG_WIDEST).exp()


def weighted_cloning_loss(weight: Tensor, negative_log_likelihood: Tensor) -> Tensor:
    """``mean w(s, a) * (-log pi(a|s))`` over ``[..., B]``, the weights held constant."""
    return (weight.detach() * negative_log_likelihood).mean(-1)


class IQL(OfflineAgent[IQLConfig]):
    """Implicit Q-learning (Kostrikov et al., 2022); see the module's head."""

    algorithm: ClassVar[str] = "offline.iql"
    config_type = IQLConfig
    presets: ClassVar[dict[str, Preset]] = {
        "locomotion": Preset({}, "ikostrikov/implicit_q_learning, mujoco_config [code]"),
        "antmaze": Preset(
            {"expectile": 0.9, "beta": 10.0, "reward_transform": "antmaze_minus1"},
            "ikostrikov/implicit_q_learning, antmaze_config [code]",
        ),
        "kitchen": Preset(
            {"beta": 0.5, "dropout": 0.1, "reward_transform": "none"},
            "ikostrikov/implicit_q_learning, kitchen_config [code]",
        ),
        "adroit": Preset(
            {"beta": 0.5, "dropout": 0.1, "reward_transform": "none"},
            "ikostrikov/implicit_q_learning, same settings as kitchen [code]",
        ),
        "corl": Preset(
            {
                "state_transform": "standardize",
                "reward_transform": "none",
                "log_std_range": (-20.0, 2.0),
                "action_margin": 0.0,
                "init": "torch",
                "value_order": "old",
                "critic_reduction": "mean",
            },
            "corl-team/CORL iql.py, halfcheetah and walker2d [code]",
        ),
        "corl-hopper-medium": Preset(
            {
                "state_transform": "standardize",
                "reward_transform": "return_range_corl",
                "tau": 0.001,
                "action_margin": 0.0,
                "init": "torch",
                "value_order": "old",
                "critic_reduction": "mean",
                "policy": "deterministic",
            },
            "corl-team/CORL iql.py, hopper-medium and hopper-medium-replay [code]",
        ),
    }

    def build(self) -> None:
        """Make policy, value, critics, target critics and their optimisers."""
        cfg = self.config
        d_s, d_a = self.problem.observation_dim, self.problem.action_dim

        def critics() -> Critics:
            return Critics(self.mlp("critic", d_s + d_a, 1, members=2, init=cfg.init))

        actor_net = self.mlp("actor", d_s, d_a, init=cfg.init)
        self.actor: GaussianActor | DeterministicActor
        if cfg.policy == "gaussian":
            self.actor = GaussianActor(actor_net, self.box, cfg.log_std_range)
        else:
            self.actor = DeterministicActor(actor_net, self.box)
        self.value = ValueNetwork(self.mlp("value", d_s, 1, init=cfg.init))
        self.critic, self.critic_target = critics(), critics()  # same stream, so equal at the start
        self.networks = nn.ModuleDict(
            {
                "actor": self.actor,
                "value": self.value,
                "critic": self.critic,
                "critic_target": self.critic_target,
            }
        )
        self.optimizers = {
            "actor": adam(self.actor.parameters(), cfg.actor_lr),
            "value": adam(self.value.parameters(), cfg.value_lr),
            "critic": adam(self.critic.parameters(), cfg.critic_lr),
        }
        self._dropout = self.stream("dropout")

    def update(self, batch: Batch) -> Metrics:
        """Take one value, one policy and one critic step, then move the target critics."""
        cfg = self.config
        action = self.box.clip(batch.action, margin=cfg.action_margin)
        with torch.no_grad():
            q_target = self.critic_target(batch.obs, action).amin(1)
            old_next_value = self.value(batch.next_obs) if cfg.value_order == "old" else None
        value = self.value(batch.obs)
        value_loss = expectile_loss(q_target - value, cfg.expectile)
        descend(self.optimizers["value"], value_loss)

        with torch.no_grad():
            new = old_next_value is None
            advantage = q_target - (self.value(batch.obs) if new else value)
            next_value = self.value(batch.next_obs) if old_next_value is None else old_next_value
            target = td_target(batch.reward, batch.terminated, next_value, cfg.discount)
        policy_metrics = self._policy_step(batch.obs, action, advantage)

        q = self.critic(batch.obs, action)
        loss = critic_loss(q, target)
        descend(self.optimizers["critic"], loss if cfg.critic_reduction == "sum" else loss / 2)
        polyak_update(self.critic_target, self.critic, cfg.tau)
        return {
            "value_loss": value_loss.detach(),
            "critic_loss": loss.detach(),
            "value": value.detach().mean(1),
            "q": q.detach().mean((1, 2)),
            "advantage": advantage.mean(1),
            **policy_metrics,
        }

    def _policy_step(self, obs: Tensor, action: Tensor, advantage: Tensor) -> Metrics:
        cfg = self.config
        weight = advantage_weight(advantage, cfg.beta)
        proposed = self.actor(obs, self._masks(obs.shape[1]))
        if isinstance(proposed, Tensor):
            likelihood = (proposed - action).square().sum(-1)
        else:
            likelihood = -proposed.log_prob(action)
        loss = weighted_cloning_loss(weight, likelihood)
        for group in self.optimizers["actor"].param_groups:
            group["lr"] = cfg.actor_lr * cosine_decay(self.step, cfg.actor_lr_decay_steps)
        descend(self.optimizers["actor"], loss)
        clipped = (weight >= _WIDEST_WEIGHT).to(weight.dtype).mean(1)
        return {"policy_loss": loss.detach(), "weight": weight.mean(1), "clipped_weight_fraction": clipped}

    def _masks(self, batch_size: int) -> list[Tensor]:
        """Draw inverted-dropout masks ``[S, B, width]``, one per hidden layer; none without dropout."""
        keep = 1 - self.config.dropout
        if keep == 1:
            return []
        uniforms = self._dropout.uniform(self.step, (batch_size, sum(self.config.hidden)))
        return [(u < keep).to(u.dtype) / keep for u in uniforms.split(list(self.config.hidden), dim=-1)]

    def policy(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Return the mean action, or a sample where `noise` is given."""
        proposed: Tensor | DiagonalGaussian = self.actor(obs)
        if isinstance(proposed, Tensor):
            return proposed
        return proposed.mean if noise is None else proposed.sample(noise)

    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's mean action as an ordinary module."""
        return self.actor.plain(seed_index)
