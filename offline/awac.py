r"""AWAC: an off-policy critic of the policy itself, and a policy cloned with the weights of its advantages.

Paper: A. Nair, A. Gupta, M. Dalal, S. Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline
Datasets", 2020, arXiv 2006.09359. Equations used: the critic's backup (with actions of the policy) and (13), the
policy's weighted likelihood [memory].
Reference code: corl-team/CORL awac.py (defaults, presets, update order); rail-berkeley/rlkit awac_trainer.py, the
authors' (`"mujoco"`).

    y     = r + gamma (1 - d) min_j Q'_j(s', a'),                               a' ~ pi(.|s'), clipped to the box
    L_Q   = sum_j mean (Q_j(s, a) - y)^2
    A     = min_j Q_j(s, a) - min_j Q_j(s, a~),                                 a~ ~ pi(.|s), clipped to the box
    L_pi  = -mean w log pi(a|s),    w = min(exp(A / lambda), 100),   or   w = exp(A / lambda) / mean exp(A / lambda)

Order of a step: critics, then policy with the new critics, then Polyak averaging of the target critics.

Deviations and choices:
1. ``weights="exponential"`` is CORL's. ``"softmax"`` is the authors' and d3rlpy's: without a cap, and normalised over
   the batch, so that the weights' scale does not depend on how good the policy has become.
2. The authors learn log sigma through a sigmoid onto (-6, 0), from its middle -3; here it is clipped to that interval
   and begins at 0, its end. They ask the critics for unclipped samples; CORL clips, as here. Their advantage takes the
   critics from before the step, here those from after it (CORL's).
3. The authors take 25 000 (hand) to 50 000 (MuJoCo) steps of this update before the first environment step, with
   batches of 128; the 1024 of ``"mujoco"`` are those of the steps in the environment.
4. By default every row with a known successor is used; CORL's runs had D4RL's q-learning rows,
   ``view="d4rl_qlearning"``.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.actor_critic import average, critic_loss, td_target
from ..core.agent import Metrics, adam, descend
from ..core.config import Preset
from ..core.dataset import Batch
from ..core.networks import Critics, polyak_update
from .weighted_cloning import WeightedCloningAgent, WeightedCloningConfig, exponential_weight


@dataclass(frozen=True, kw_only=True)
class AWACConfig(WeightedCloningConfig):
    """AWAC's settings beyond the policy's; defaults are CORL's for MuJoCo locomotion.

    Attributes:
        temperature: lambda > 0, in units of value; small ones take the best action, large ones clone the data.
        weights: ``"exponential"``, capped at 100, or ``"softmax"`` over the batch, of mean 1.
        discount: gamma in [0, 1).
        tau: Polyak rate in (0, 1] of the target critics.
        critic_lr: Adam's step size, > 0.
        actor_weight_decay: coefficient >= 0 of the penalty ``|theta|^2 / 2`` on the policy's parameters.
    """

    hidden: tuple[int, ...] = (256, 256, 256)
    log_std_range: tuple[float, float] = (-20.0, 2.0)
    squash_mean: bool = False
    temperature: float = 0.3333
    weights: Literal["exponential", "softmax"] = "exponential"
    discount: float = 0.99
    tau: float = 0.005
    critic_lr: float = 3e-4
    actor_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        self.require("policy", self.policy == "gaussian", "'gaussian': the critics need samples of it")
        super().__post_init__()
        self.require("temperature", self.temperature > 0, "> 0")
        self.require("discount", 0 <= self.discount < 1, "in [0, 1)")
        self.require("tau", 0 < self.tau <= 1, "in (0, 1]")
        self.require("critic_lr", self.critic_lr > 0, "> 0")
        self.require("actor_weight_decay", self.actor_weight_decay >= 0, ">= 0")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def softmax_weight(exponent: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """``exp(x) / average exp(x)`` over ``[..., B]``, rows counted by `row_weight`; 0 where that is 0 for all."""
    bounds = torch.finfo(exponent.dtype)
    if row_weight is not None:
        exponent = exponent.masked_fill(row_weight == 0, -torch.inf)  # or it might be the largest
    stable = (exponent - exponent.amax(-1, keepdim=True).clamp(min=bounds.min)).exp()
    return stable / average(stable, row_weight).clamp(min=bounds.tiny).unsqueeze(-1)


class AWAC(WeightedCloningAgent[AWACConfig]):
    """AWAC (Nair et al., 2020); see the module's head."""

    algorithm: ClassVar[str] = "offline.awac"
    config_type = AWACConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-07b", "OFF-11g", "OFF-11h", "OFF-11i")
    presets: ClassVar[dict[str, Preset]] = {
        "locomotion": Preset({}, "corl-team/CORL configs/offline/awac, halfcheetah, hopper and walker2d [code]"),
        "antmaze": Preset(
            {"temperature": 0.1, "reward_transform": "antmaze_minus1"},
            "corl-team/CORL configs/offline/awac, antmaze [code]",
        ),
        "adroit": Preset({"temperature": 0.1}, "corl-team/CORL configs/offline/awac, pen, door, ... [code]"),
        "maze2d": Preset({"temperature": 0.1}, "corl-team/CORL configs/offline/awac, maze2d [code]"),
        "mujoco": Preset(
            {
                "hidden": (256, 256),
                "actor_hidden": (256, 256, 256, 256),
                "batch_size": 1024,
                "state_transform": "none",
                "squash_mean": True,
                "log_std_range": (-6.0, 0.0),
                "temperature": 2.0,
                "weights": "softmax",
                "actor_weight_decay": 1e-4,
            },
            "rail-berkeley/rlkit examples/awac/mujoco/awac1.py, the authors' [code], with choices 2 and 3",
        ),
    }

    def build(self) -> None:
        """Make policy, critics, target critics and their optimisers."""
        super().build()
        cfg = self.config
        inputs = self.problem.observation_dim + self.problem.action_dim

        def critics() -> Critics:
            return Critics(self.mlp("critic", inputs, 1, members=2, init=cfg.init))

        self.critic, self.critic_target = critics(), critics()  # same stream, so equal at the start
        self.networks.update({"critic": self.critic, "critic_target": self.critic_target})
        self.optimizers["actor"] = adam(self.actor.parameters(), cfg.actor_lr, cfg.actor_weight_decay)
        self.optimizers["critic"] = adam(self.critic.parameters(), cfg.critic_lr)
        self._noise = self.stream("actions")

    def update(self, batch: Batch) -> Metrics:
        """Take one critic and one policy step, then move the target critics."""
        cfg = self.config
        batch = batch._replace(action=self.box.clip(batch.action, margin=cfg.action_margin))
        with torch.no_grad():
            # The critics' step leaves the policy as it is, so both of its actions can be drawn before.
            noise = self._noise.normal(self.step, (2 * batch.action.shape[1], batch.action.shape[2]))
            sampled = self.box.clip(self.policy(torch.cat([batch.next_obs, batch.obs], 1), noise))
            next_action, own_action = sampled.chunk(2, 1)
            next_value = self.critic_target(batch.next_obs, next_action).amin(1)
            target = td_target(batch.reward, batch.terminated, next_value, cfg.discount)
        q = self.critic(batch.obs, batch.action)
        loss = critic_loss(q, target, batch.weight)
        descend(self.optimizers["critic"], loss)

        with torch.no_grad():
            both = self.critic(torch.cat([batch.obs, batch.obs], 1), torch.cat([batch.action, own_action], 1)).amin(1)
            value_of_logged, value_of_own = both.chunk(2, 1)
            advantage = value_of_logged - value_of_own
            weight = self.policy_weight(advantage, batch.weight)
        metrics = self.policy_step(batch.obs, batch.action, weight, batch.weight)
        polyak_update(self.critic_target, self.critic, cfg.tau)
        return {
            "critic_loss": loss.detach(),
            "q": q.detach().mean((1, 2)),
            "target": target.mean(1),
            "advantage": advantage.mean(1),
            **metrics,
        }

    def policy_weight(self, advantage: Tensor, row_weight: Tensor | None) -> Tensor:
        """Return the weight ``[S, B]`` with which each logged action is cloned, from its advantage ``[S, B]``."""
        exponent = advantage / self.config.temperature
        if self.config.weights == "exponential":
            return exponential_weight(exponent)
        return softmax_weight(exponent, row_weight)
