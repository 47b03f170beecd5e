r"""SAC: maximise return plus entropy with a squashed Gaussian policy, twin critics and a self-tuned coefficient.

Papers: T. Haarnoja, A. Zhou, P. Abbeel, S. Levine, "Soft Actor-Critic: Off-Policy Maximum Entropy Deep Reinforcement
Learning with a Stochastic Actor", ICML 2018, arXiv 1801.01290; T. Haarnoja et al., "Soft Actor-Critic Algorithms and
Applications", 2018, arXiv 1812.05905: eq. (5) critics, (9) policy, (18) coefficient [memory].
Reference code: rail-berkeley/softlearning, DLR-RM/stable-baselines3, vwxyzjn/cleanrl sac_continuous_action.py.

    y       = r + gamma (1 - d) (min_m Q'_m(s', a') - alpha log pi(a'|s')),      a' ~ pi(.|s')
    L_Q     = sum_m mean (Q_m(s, a) - y)^2 / 2
    L_pi    = mean (alpha log pi(a~|s) - min_m Q_m(s, a~)),                      a~ = tanh(mu(s) + sigma(s) eps)
    L_alpha = -log alpha mean (log pi(a~|s) + H)                                 H the entropy aimed at, -d_a by default

Order of a step: critics, then policy with the new critics, then coefficient (with the a~ of the policy step), then
Polyak averaging of the target critics. All of them use the alpha from before the step.

Deviations and choices:
1. As in the second paper there is no state-value network. The coefficient's loss is linear in log alpha, as in
   Stable-Baselines3 and the authors' code; the paper's, and CleanRL's, is linear in alpha.
2. log pi is the density of the unit action in (-1, 1)^d_a, as in the authors' code and Stable-Baselines3. CleanRL's
   is that of the action in the environment's units, which moves the target entropy where the box is not (-1, 1).
3. The tanh's Jacobian is computed without the 1e-6 that CleanRL and Stable-Baselines3 add.
4. `policy_delay` is CleanRL's: every so many critic steps, as many policy steps on one batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.actor_critic import entropy_coefficient_loss, sac_policy_loss, td_target
from ..core.agent import Metrics, adam, descend
from ..core.config import Preset
from ..core.dataset import Batch
from ..core.networks import polyak_update
from .objectives import value_loss
from .off_policy import OffPolicyAgent, OffPolicyConfig


@dataclass(frozen=True, kw_only=True)
class SACConfig(OffPolicyConfig):
    """SAC's settings beyond the base's; the defaults are the second paper's.

    Attributes:
        entropy_coef: alpha >= 0, in units of reward; 0 maximises the return alone, a large one plays at random.
            ``None`` tunes it so that the policy's entropy stays near `target_entropy`.
        initial_entropy_coef: alpha at first when it is tuned, > 0.
        target_entropy: of the unit action, in nats; ``None`` for -d_a.
        entropy_lr: Adam's step size of log alpha, > 0.
        policy_delay: critic steps between policy steps, of which then as many are taken, >= 1.
    """

    entropy_coef: float | None = None
    initial_entropy_coef: float = 1.0
    target_entropy: float | None = None
    entropy_lr: float = 3e-4
    policy_delay: int = 1

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("entropy_coef", self.entropy_coef is None or self.entropy_coef >= 0, ">= 0, or None")
        for name in ("initial_entropy_coef", "entropy_lr"):
            self.require(name, getattr(self, name) > 0, "> 0")
        self.require("policy_delay", self.policy_delay >= 1, ">= 1")


class SAC(OffPolicyAgent[SACConfig]):
    """SAC (Haarnoja et al., 2018); see the module's head."""

    algorithm: ClassVar[str] = "online.sac"
    config_type = SACConfig
    claims: ClassVar[tuple[str, ...]] = ("REG-01a", "REG-01b", "REG-01c", "REG-01e")
    presets: ClassVar[dict[str, Preset]] = {
        "sb3": Preset({"learning_starts": 100}, "DLR-RM/stable-baselines3 SAC defaults [code]"),
        "cleanrl": Preset(
            {"learning_starts": 5000, "critic_lr": 1e-3, "entropy_lr": 1e-3, "policy_delay": 2}
            | {"log_std_range": (-5.0, 2.0), "log_std_bound": "tanh"},
            "vwxyzjn/cleanrl sac_continuous_action.py [code], with choices 1 to 3",
        ),
        "zoo_mujoco": Preset({}, "RL-Zoo sac.yml, MuJoCo, 1e6 steps [code]"),
        "zoo_swimmer": Preset({"discount": 0.9999}, "RL-Zoo sac.yml at 00128b5d, Swimmer-v3, 1e6 steps [code]"),
        "zoo_pendulum": Preset(
            {"learning_starts": 100, "actor_lr": 1e-3, "critic_lr": 1e-3, "entropy_lr": 1e-3},
            "RL-Zoo sac.yml, Pendulum-v1, 2e4 steps [code]",
        ),
    }

    def build(self) -> None:
        """Make the base's networks, target critics, and the coefficient if it is tuned."""
        super().build()
        cfg = self.config
        self.critic_target = self.make_critics()
        self.networks["critic_target"] = self.critic_target
        self.target_entropy = float(-self.problem.action_dim) if cfg.target_entropy is None else cfg.target_entropy
        coefficient = cfg.initial_entropy_coef if cfg.entropy_coef is None else cfg.entropy_coef
        self.coefficient = torch.full((len(self.seeds),), coefficient, dtype=self.dtype, device=self.device)
        if cfg.entropy_coef is None:
            self.log_coefficient = nn.Parameter(self.coefficient.log())
            self.networks.register_parameter("log_entropy_coef", self.log_coefficient)
            self.optimizers["entropy"] = adam([self.log_coefficient], cfg.entropy_lr)

    def update(self, batch: Batch, index: int) -> Metrics:
        """Take one critic step, on every `policy_delay`-th call policy steps, and move the target critics."""
        cfg = self.config
        noise = self.update_noise.normal(index, (1 + cfg.policy_delay, *batch.action.shape[1:]))
        target = self.target(batch, noise[:, 0])
        q = self.critic(batch.obs, batch.action)
        critic_loss = value_loss(q, target.unsqueeze(1).expand_as(q)).mean(2).sum(1)
        metrics = {"critic_loss": critic_loss.detach(), "q": q.detach().mean((1, 2)), "target": target.mean(1)}
        descend(self.optimizers["critic"], critic_loss)
        if (index + 1) % cfg.policy_delay == 0:
            for eps in noise[:, 1:].unbind(1):
                metrics |= self._policy_step(batch.obs, eps)
        polyak_update(self.critic_target, self.critic, cfg.tau)
        return metrics

    @torch.no_grad()
    def target(self, batch: Batch, noise: Tensor) -> Tensor:
        """Return ``y [S, B]`` with the next action drawn by `noise` ``[S, B, d_a]``."""
        latent, log_densities = self.actor(batch.next_obs).draw(noise)
        next_q = self.critic_target(batch.next_obs, torch.tanh(latent)).amin(1)
        next_value: Tensor = next_q - self.entropy_coefficient() * log_densities.sum(-1)
        return td_target(batch.reward, batch.terminated, next_value, self.config.discount)

    def policy_loss(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss ``[S]``, its actions drawn by `noise` ``[S, B, d_a]``, and their ``log pi [S, B]``."""
        latent, log_densities = self.actor(obs).draw(noise)
        log_prob = log_densities.sum(-1)
        q = self.critic.constant(obs, torch.tanh(latent)).amin(1)
        return sac_policy_loss(log_prob, q, self.entropy_coefficient()).mean(1), log_prob.detach()

    def entropy_coefficient(self) -> Tensor:
        """Return alpha as a constant ``[S, 1]``."""
        tuned = self.config.entropy_coef is None
        return (self.log_coefficient.detach().exp() if tuned else self.coefficient).unsqueeze(1)

    def _policy_step(self, obs: Tensor, noise: Tensor) -> Metrics:
        loss, log_prob = self.policy_loss(obs, noise)
        descend(self.optimizers["actor"], loss)
        metrics = {
            "policy_loss": loss.detach(),
            "entropy": -log_prob.mean(1),
            "entropy_coef": self.entropy_coefficient().squeeze(1),
        }
        if self.config.entropy_coef is None:
            descend(
                self.optimizers["entropy"],
                entropy_coefficient_loss(self.log_coefficient, log_prob, self.target_entropy),
            )
        return metrics
