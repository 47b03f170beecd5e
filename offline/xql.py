r"""XQL: the soft maximum of the data's action values by Gumbel regression, and a policy cloned with advantage weights.

Paper: D. Garg, J. Hejna, M. Geist, S. Ermon, "Extreme Q-Learning: MaxEnt RL without Entropy", ICLR 2023,
arXiv 2301.02328.
Reference code: Div99/XQL, folder ``offline`` (losses, order, constants, scripts in ``reproduce``), a fork of IQL's.

    z    = min((min_j Q'_j(s, a) - V(s)) / T, clip),      m = sg[max(max_batch z, -1)]
    L_V  = mean (exp(z - m) - z exp(-m) - exp(-m))                       (Gumbel loss e^z - z - 1 times exp(-m))
    L_pi = -mean min(exp(beta u), 100) log pi(a|s),       u = min_j Q'_j(s, a) - V(s)
    L_Q  = sum_j mean H(Q_j(s, a) - y),                   y = r + gamma (1 - d) V(s'),  H Huber's x^2/2, linear from 20

Unclipped, V = T log E_{a ~ data} exp(Q / T). The order of a step and the critics are
:mod:`corollary.offline.in_sample`'s; V takes `num_value_updates` steps on the batch.

Deviations and choices:
1. A row whose z is clipped gives V no gradient, in either direction, as in the code. The paper's draft clips from
   below too.
2. The code draws random actions and noise once per step, for all of its value updates, as here. It cannot combine the
   two; here noise is added to the logged actions and the random ones are left as they are.
3. The code's AntMaze config gives V a dropout of 0.5, but never calls V in training mode, so it has no effect: the
   presets have none. ``value_dropout=0.5`` is what was meant.
4. The code's LayerNorm adds 1e-6 to the variance (flax), this one 1e-5 (torch).
5. Before learning in the environment take ``actor_lr_decay_steps=None``, as the authors' fine-tuning does (IQL's
   choice 3); the AntMaze presets have it.
6. The code's branch ``log_loss`` and its gradient penalty, off in all scripts, are left out.
7. By default every row with a known successor is used; the authors' runs had D4RL's q-learning rows,
   ``view="d4rl_qlearning"``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.actor_critic import weighted_mean
from ..core.agent import Metrics
from ..core.config import Preset
from ..core.dataset import Batch
from .in_sample import AdvantageCloningAgent, InSampleConfig, shifted_exponents
from .weighted_cloning import exponential_weight

NOISE_BOUND = 0.5
"""Noise on logged actions is clipped here, in half-ranges of the action box."""


@dataclass(frozen=True, kw_only=True)
class XQLConfig(InSampleConfig):
    """XQL's settings beyond the core's; defaults are the authors' that are the same for all MuJoCo locomotion sets.

    Attributes:
        temperature: T > 0 of V, in units of Q; -> 0 the best action in the data, large values the mean.
        clip: upper bound > 0 of z; rows with Q - V beyond clip * T teach V nothing. Large values clip nothing.
        beta: inverse temperature >= 0 of the policy's weights; 0 clones the data, large values take the best action.
        huber: delta > 0 of the critics' Huber loss; large values give half of the squared error.
        num_value_updates: value steps per step, >= 1.
        sample_random_times: uniform actions per row that V is fitted to beside the logged one, >= 0; the more, the
            nearer V is to the soft maximum over all actions.
        action_noise: standard deviation, in half-ranges of the action box, of noise on the actions that V is fitted
            to, >= 0; 0 for none.
    """

    value_layer_norm: bool = True
    temperature: float = 2.0
    clip: float = 7.0
    beta: float = 3.0
    huber: float = 20.0
    num_value_updates: int = 1
    sample_random_times: int = 0
    action_noise: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        for name in ("temperature", "clip", "huber"):
            self.require(name, getattr(self, name) > 0, "> 0")
        for name in ("beta", "sample_random_times", "action_noise"):
            self.require(name, getattr(self, name) >= 0, ">= 0")
        self.require("num_value_updates", self.num_value_updates >= 1, "at least 1")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def gumbel_loss(residual: Tensor, temperature: float, clip: float, weight: Tensor | None = None) -> Tensor:
    """``mean (e^{z - m} - (z + 1) e^{-m})`` with ``z = min(u / T, clip)`` and m the largest z, over ``[..., B]``.

    Unclipped, its minimiser in v, for u = x - v, is ``T log E e^{x / T}``.
    """
    z = (residual / temperature).clamp(max=clip)
    shifted, scale = shifted_exponents(z, weight)
    return weighted_mean(shifted.exp() - (z + 1) * scale, weight)


def _preset(script: str, settings: dict[str, Any]) -> Preset:
    return Preset(settings, f"Div99/XQL, offline/reproduce/{script} [code]")


_ANTMAZE = {"beta": 10.0, "reward_transform": "antmaze_minus1", "actor_lr_decay_steps": None}
_KITCHEN = {"beta": 0.5, "dropout": 0.1, "reward_transform": "none"}


class XQL(AdvantageCloningAgent[XQLConfig]):
    """Extreme Q-learning (Garg et al., 2023); see the module's head."""

    algorithm: ClassVar[str] = "offline.xql"
    config_type = XQLConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-11d", "OFF-11g", "OFF-11h", "OFF-11i")
    presets: ClassVar[dict[str, Preset]] = {
        "consistent": _preset("mujoco/mujoco_consistent.sh", {}),
        "consistent-antmaze": _preset("antmaze/ant_consistent.sh", {**_ANTMAZE, "temperature": 0.6}),
        "consistent-kitchen": _preset("franka/kitchen_consistent.sh", {**_KITCHEN, "temperature": 5.0}),
        "consistent-adroit": _preset("androit/androit_consistent.sh", {**_KITCHEN, "temperature": 5.0}),
        "halfcheetah-medium": _preset(
            "mujoco/halfcheetah_medium.sh", {"temperature": 1.0, "batch_size": 1024, "action_noise": 0.1}
        ),
        "halfcheetah-medium-replay": _preset("mujoco/halfcheetah_replay.sh", {"temperature": 1.0, "clip": 5.0}),
        "halfcheetah-medium-expert": _preset(
            "mujoco/halfcheetah_expert.sh", {"temperature": 1.0, "clip": 5.0, "batch_size": 1024}
        ),
        "hopper-medium": _preset("mujoco/hopper_medium.sh", {"temperature": 5.0, "batch_size": 1024}),
        "hopper-medium-replay": _preset("mujoco/hopper_replay.sh", {"temperature": 2.0}),
        "hopper-medium-expert": _preset(
            "mujoco/hopper_expert.sh", {"temperature": 2.0, "batch_size": 1024, "sample_random_times": 1}
        ),
        "walker2d-medium": _preset("mujoco/walker_medium.sh", {"temperature": 10.0, "batch_size": 1024}),
        "walker2d-medium-replay": _preset(
            "mujoco/walker_replay.sh", {"temperature": 5.0, "clip": 5.0, "batch_size": 1024}
        ),
        "walker2d-medium-expert": _preset("mujoco/walker_expert.sh", {"temperature": 2.0, "clip": 5.0}),
        "antmaze-umaze": _preset("antmaze/ant_umaze.sh", {**_ANTMAZE, "temperature": 2.0}),
        "antmaze-umaze-diverse": _preset(
            "antmaze/ant_umaze_diverse.sh", {**_ANTMAZE, "temperature": 5.0, "sample_random_times": 1}
        ),
        "antmaze-medium-play": _preset("antmaze/ant_medium_play.sh", {**_ANTMAZE, "temperature": 0.8, "clip": 5.0}),
        "antmaze-medium-diverse": _preset(
            "antmaze/ant_medium_diverse.sh", {**_ANTMAZE, "temperature": 0.6, "num_value_updates": 4}
        ),
        "antmaze-large-play": _preset(
            "antmaze/ant_large_play.sh", {**_ANTMAZE, "temperature": 0.6, "clip": 5.0, "batch_size": 1024}
        ),
        "antmaze-large-diverse": _preset(
            "antmaze/ant_large_diverse.sh", {**_ANTMAZE, "temperature": 0.55, "clip": 5.0, "batch_size": 1024}
        ),
        "kitchen-complete": _preset("franka/kitchen_complete.sh", {**_KITCHEN, "temperature": 2.0, "batch_size": 1024}),
        "kitchen-partial": _preset("franka/kitchen_partial.sh", {**_KITCHEN, "temperature": 5.0, "batch_size": 1024}),
        "kitchen-mixed": _preset("franka/kitchen_mixed.sh", {**_KITCHEN, "temperature": 8.0, "batch_size": 1024}),
    }

    def build(self) -> None:
        """Make the core's networks, and the streams of the actions that V is fitted to beside the logged ones."""
        super().build()
        self._action_noise, self._random_actions = self.stream("value action noise"), self.stream("random actions")

    def implicit_value_loss(self, residual: Tensor, weight: Tensor | None) -> Tensor:
        """Return the Gumbel loss."""
        return gumbel_loss(residual, self.config.temperature, self.config.clip, weight)

    def policy_weight(self, residual: Tensor) -> Tensor:
        """Return ``min(exp(beta u), 100)``."""
        return exponential_weight(self.config.beta * residual)

    def critic_loss(self, q: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return the Huber losses added up over the two critics."""
        per_row = F.huber_loss(q, target.unsqueeze(1).expand_as(q), reduction="none", delta=self.config.huber)
        return weighted_mean(per_row, None if weight is None else weight.unsqueeze(1)).sum(1)

    def value_step(self, batch: Batch, q_target: Tensor) -> tuple[Tensor, Metrics]:
        """Take `num_value_updates` steps of V, on the actions that the configuration adds too."""
        n_logged = q_target.shape[1]
        batch, q_target = self._with_more_actions(batch, q_target)
        old_value, metrics = super().value_step(batch, q_target)
        for _ in range(self.config.num_value_updates - 1):
            _, metrics = super().value_step(batch, q_target)
        return old_value[:, :n_logged], metrics

    def _with_more_actions(self, batch: Batch, q_target: Tensor) -> tuple[Batch, Tensor]:
        """Return what V is fitted to: rows, of which only states and weights are used, and their ``Q' [S, B']``."""
        cfg = self.config
        if cfg.action_noise > 0:
            noise = cfg.action_noise * self._action_noise.normal(self.step, batch.action.shape[1:])
            noisy = batch.action + self.box.half_range * noise.clamp(-NOISE_BOUND, NOISE_BOUND)
            q_target = self._target_value(batch.obs, self.box.clip(noisy))
        if (times := cfg.sample_random_times) > 0:
            n_rows, d_a = batch.action.shape[1:]
            obs = batch.obs.repeat(1, times, 1)
            unit = 2 * self._random_actions.uniform(self.step, (times * n_rows, d_a)) - 1
            q_target = torch.cat([q_target, self._target_value(obs, self.box(unit))], 1)
            weight = None if batch.weight is None else batch.weight.repeat(1, 1 + times)
            batch = batch._replace(obs=torch.cat([batch.obs, obs], 1), weight=weight)
        return batch, q_target

    def _target_value(self, obs: Tensor, action: Tensor) -> Tensor:
        with torch.no_grad():
            value: Tensor = self.critic_target(obs, action).amin(1)
        return value
