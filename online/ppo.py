r"""PPO: several epochs of minibatch steps on one batch, each sample's gradient cut once its ratio has moved enough.

Paper: J. Schulman, F. Wolski, P. Dhariwal, A. Radford, O. Klimov, "Proximal Policy Optimization Algorithms", 2017,
arXiv 1707.06347: eq. (7) clipped surrogate, eq. (8) penalty.
Reference code: openai/baselines ppo2, vwxyzjn/cleanrl ppo_continuous_action.py, DLR-RM/stable-baselines3,
thu-ml/tianshou; their differences are presets.

    L_clip    = -mean min(r A, clip(r, 1 - eps, 1 + eps) A),           r = pi(a|s) / pi_old(a|s)
    L_penalty = mean (-r A + beta KL(pi_old || pi)),    beta halved / doubled when KL leaves [d / 1.5, 1.5 d]

The ratio is not bounded by either form (``corollary.online.SPO``, ``FixPO`` are the methods that claim it): the run
logs ``max_ratio_deviation`` and ``max_kl_old_new``.

Deviations and choices:
1. The defaults are CleanRL's for MuJoCo with three changes, each an option: a time limit does not end the value
   (``bootstrap_on_truncation``), values are not clipped, policy and critic have a gradient norm each. The presets
   give each published combination.
2. Value loss has a factor 1/2 as in CleanRL; Stable-Baselines3's and Tianshou's coefficients are doubled in their
   presets.
3. ``target_kl`` stops as CleanRL does (``kl_stop="epoch"``, last minibatch) or as Stable-Baselines3 does
   (``"minibatch"``, before the step, at 1.5 times the target).
4. The penalty's coefficient starts at 1 and follows the divergence of the whole batch after the update, closed form.
5. RPO (Rahman and Xue, 2022, arXiv 2212.07536): `rpo_alpha` adds uniform noise to the Gaussian's mean in updates.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.agent import Metrics
from ..core.config import Preset
from ..core.distributions import DiagonalGaussian, Distribution, kl
from ..core.rollout import Rollout
from .objectives import adaptive_kl_coefficient, kl_estimate, kl_penalised_loss, ppo_clip_coefficient, ppo_clip_loss
from .on_policy import OnPolicyAgent, OnPolicyConfig, Samples


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnPolicyConfig):
    """PPO's settings beyond the base's.

    Attributes:
        form: ``"clip"`` or ``"penalty"``.
        clip: half-width eps of the interval of ratios, > 0; small is slow, large plain policy gradient.
        clip_decay: ``"linear"`` lets eps fall to zero over one call of `learn`.
        dual_clip: bound c > 1 + eps on the ratio where the advantage is negative; ``None`` for none.
        target_kl: divergence at which a seed stops its update, > 0; ``None`` never stops. For the penalty form, the
            divergence d per update that beta aims at; ``None`` keeps beta at 1.
        kl_stop: ``"minibatch"`` (Stable-Baselines3) stops before a step whose minibatch is beyond 1.5 `target_kl`,
            ``"epoch"`` (CleanRL) after an epoch whose last minibatch is beyond `target_kl`.
        rpo_alpha: half-width of the noise on the mean, >= 0, in units of the action; 0 is PPO.
    """

    form: Literal["clip", "penalty"] = "clip"
    clip: float = 0.2
    clip_decay: Literal["none", "linear"] = "none"
    dual_clip: float | None = None
    target_kl: float | None = None
    kl_stop: Literal["minibatch", "epoch"] = "minibatch"
    rpo_alpha: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("clip", self.clip > 0, "> 0")
        self.require("dual_clip", self.dual_clip is None or self.dual_clip > 1 + self.clip, "> 1 + clip, or None")
        self.require("target_kl", self.target_kl is None or self.target_kl > 0, "> 0, or None")
        self.require("rpo_alpha", self.rpo_alpha >= 0, ">= 0")


_MOST_STEPS = 2**20
"""More gradient steps than one iteration takes: separates the noise of iterations."""

_CLEANRL = {"value_clip": 0.2, "joint_grad_norm": True, "bootstrap_on_truncation": False}
_ZOO = {"normalize_reward": "done", "joint_grad_norm": True, "learning_rate_decay": "none"}
_ZOO_NETWORKS = {"hidden": (256, 256), "activation": "relu", "init": "torch", "initial_log_std": -2.0}


class _PenaltyWeight(nn.Module):
    """The penalty's coefficient of each seed, ``[S]``, as a part of the state."""

    beta: Tensor

    def __init__(self, beta: Tensor) -> None:
        super().__init__()
        self.register_buffer("beta", beta)


class PPO(OnPolicyAgent[PPOConfig]):
    """PPO (Schulman et al., 2017); see the module's head."""

    algorithm: ClassVar[str] = "online.ppo"
    config_type = PPOConfig
    claims: ClassVar[tuple[str, ...]] = (
        "FND-02",
        "FND-03a",
        "FND-03d",
        "FND-07a",
        "FND-07b",
        "PO-01a",
        "PO-01b",
        "PO-01c",
        "PO-01d",
        "PO-11a",
        "PO-11c",
    )
    presets: ClassVar[dict[str, Preset]] = {
        "cleanrl": Preset(_CLEANRL, "vwxyzjn/cleanrl ppo_continuous_action.py, MuJoCo [code]"),
        "cleanrl_classic": Preset(
            _CLEANRL
            | {"n_envs": 4, "n_steps": 128, "batch_size": 128, "n_epochs": 4, "learning_rate": 2.5e-4}
            | {"entropy_coef": 0.01, "normalize_obs": False, "normalize_reward": "none"},
            "vwxyzjn/cleanrl ppo.py, classic control [code]",
        ),
        "sb3": Preset(
            {"value_coef": 1.0, "joint_grad_norm": True, "learning_rate_decay": "none"}
            | {"normalize_obs": False, "normalize_reward": "none"},
            "DLR-RM/stable-baselines3 PPO defaults, no VecNormalize [code]",
        ),
        "baselines": Preset(
            _CLEANRL | {"normalize_reward": "done"}, "openai/baselines ppo2, MuJoCo defaults with VecNormalize [code]"
        ),
        "tianshou": Preset(
            {"n_envs": 8, "n_steps": 256, "adam_eps": 1e-8, "normalize_advantage": "none", "initial_log_std": -0.5}
            | {"recompute_advantage": True, "joint_grad_norm": True, "normalize_reward": "none", "scale_returns": True},
            "thu-ml/tianshou mujoco_ppo.py [code]",
        ),
        "zoo_cartpole": Preset(
            {"n_envs": 8, "n_steps": 32, "batch_size": 256, "n_epochs": 20, "discount": 0.98, "trace_decay": 0.8}
            | {"learning_rate": 1e-3, "clip_decay": "linear", "value_coef": 1.0, "joint_grad_norm": True}
            | {"normalize_obs": False, "normalize_reward": "none"},
            "RL-Zoo CartPole-v1, 1e5 steps [code]",
        ),
        "zoo_acrobot": Preset(
            _ZOO | {"n_envs": 16, "n_steps": 256, "n_epochs": 4, "trace_decay": 0.94, "value_coef": 1.0},
            "RL-Zoo Acrobot-v1, 1e6 steps [code]",
        ),
        "zoo_pendulum": Preset(
            {"n_envs": 4, "n_steps": 1024, "discount": 0.9, "learning_rate": 1e-3, "learning_rate_decay": "none"}
            | {"value_coef": 1.0, "joint_grad_norm": True, "normalize_obs": False, "normalize_reward": "none"},
            "RL-Zoo Pendulum-v1, 1e5 steps, without its state-dependent exploration [code]",
        ),
        "zoo_halfcheetah": Preset(
            _ZOO
            | _ZOO_NETWORKS
            | {"n_steps": 512, "n_epochs": 20, "discount": 0.98, "trace_decay": 0.92, "learning_rate": 2.0633e-5}
            | {"entropy_coef": 4.01762e-4, "clip": 0.1, "max_grad_norm": 0.8, "value_coef": 1.16},
            "RL-Zoo HalfCheetah-v3, 1e6 steps [code]",
        ),
        "zoo_hopper": Preset(
            _ZOO
            | _ZOO_NETWORKS
            | {"n_steps": 512, "batch_size": 32, "n_epochs": 5, "discount": 0.999, "trace_decay": 0.99}
            | {"learning_rate": 9.80828e-5, "entropy_coef": 0.00229519, "max_grad_norm": 0.7, "value_coef": 1.671342},
            "RL-Zoo Hopper-v3, 1e6 steps [code]",
        ),
    }

    def build(self) -> None:
        """Make the networks; the penalty's coefficient beside them is state."""
        super().build()
        self._penalty = _PenaltyWeight(torch.ones(len(self.seeds), dtype=self.dtype, device=self.device))
        self.networks["penalty"] = self._penalty
        self._mean_noise = self.stream("rpo")

    def surrogate(self, distribution: Distribution, log_prob: Tensor, batch: Samples) -> Tensor:
        """Clipped or penalised surrogate of each sample."""
        cfg = self.config
        if cfg.form == "penalty":
            divergence = kl(distribution.rebuild(batch.parameters), distribution)
            beta = self._penalty.beta.unsqueeze(1)
            return kl_penalised_loss(log_prob, batch.log_prob, batch.advantage, divergence, beta)
        return ppo_clip_loss(log_prob, batch.log_prob, batch.advantage, **self._bounds())

    @property
    def has_coefficient(self) -> bool:
        """True of the clipped form; the penalty and RPO's noise need the whole distribution."""
        return self.config.form == "clip" and self.config.rpo_alpha == 0

    def coefficient(self, log_prob: Tensor, batch: Samples) -> Tensor:
        """Return the clipped surrogate's derivative."""
        return ppo_clip_coefficient(log_prob, batch.log_prob, batch.advantage, **self._bounds())

    def _bounds(self) -> dict[str, Any]:
        cfg = self.config
        clip = cfg.clip * (1 - self.progress) if cfg.clip_decay == "linear" else cfg.clip
        return {"clip": clip, "dual_clip": cfg.dual_clip}

    def distribution(self, batch: Samples) -> Distribution:
        """Return the new policy's distributions, their means shifted by RPO's noise if configured."""
        found = super().distribution(batch)
        if self.config.rpo_alpha == 0 or not isinstance(found, DiagonalGaussian):
            return found
        self._shifts += 1
        noise = self._mean_noise.uniform(self.iteration * _MOST_STEPS + self._shifts, found.mean.shape[1:])
        return DiagonalGaussian(found.mean + self.config.rpo_alpha * (2 * noise - 1), found.log_std)

    def before_step(self, log_prob: Tensor, batch: Samples, active: list[bool]) -> list[bool]:
        """Stop a seed whose divergence on this minibatch exceeds 1.5 times the target, as Stable-Baselines3 does."""
        return self._below_target(log_prob, batch, active, 1.5) if self.config.kl_stop == "minibatch" else active

    def after_epoch(self, samples: Samples, batch: Samples, log_prob: Tensor, active: list[bool]) -> list[bool]:
        """Stop a seed whose divergence on the epoch's last minibatch exceeds the target, as CleanRL does."""
        return self._below_target(log_prob, batch, active, 1.0) if self.config.kl_stop == "epoch" else active

    def _below_target(self, log_prob: Tensor, batch: Samples, active: list[bool], factor: float) -> list[bool]:
        target = self.config.target_kl
        if target is None or self.config.form == "penalty":
            return active
        divergence = batch.mean(kl_estimate(batch.log_prob, log_prob.detach()))
        return [a and d <= factor * target for a, d in zip(active, divergence.tolist(), strict=True)]

    def improve(self, samples: Samples, rollout: Rollout) -> Metrics:
        """Take the epochs of steps; then adapt the penalty's coefficient."""
        self._shifts = 0
        metrics = super().improve(samples, rollout)
        if self.config.form == "clip":
            return metrics
        if self.config.target_kl is not None:
            with torch.no_grad():
                new = self.actor(samples.obs)
                divergence = samples.mean(kl(new.rebuild(samples.parameters), new))
                self._penalty.beta.copy_(adaptive_kl_coefficient(self._penalty.beta, divergence, self.config.target_kl))
        return metrics | {"beta": self._penalty.beta.clone()}
