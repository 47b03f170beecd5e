r"""Off-policy MDPO: many gradient steps on a mirror-descent objective around a policy that is frozen for m steps.

Paper: M. Tomar, L. Shani, Y. Efroni, M. Ghavamzadeh, "Mirror Descent Policy Optimization", ICLR 2022, arXiv 2005.09814
(off-policy MDPO, with KL and with Tsallis entropy).
Reference code: manantomar/Mirror-Descent-Policy-Optimization, mdpo_off.

    L_pi = mean (c log_q pi(a~|s) + q (lambda - c) log_q pi_old(a~|s) - Q_1(s, a~))
           + rho (mean mu(s)^2 + mean (log sigma(s))^2),                             a~ = tanh(mu(s) + sigma(s) eps)
    L_V  = mean (V(s) - sg[min_m Q_m(s, a~) - lambda log_q pi(a~|s)])^2 / 2
    L_Q  = sum_m mean (Q_m(s, a) - (r + gamma (1 - d) V'(s')))^2 / 2

with ``log_q x = (x^(q-1) - 1) / (q - 1)`` of each component's density, summed over components, and c = 1 / t_k. For
q = 1 the loss without regularisation is least at ``pi_old^(1 - t lambda) exp(t Q)``, normalised; at c = lambda it is
SAC's. Every `old_policy_every` environment steps pi becomes pi_old.

Order of a step: one evaluation of a~, its densities and its values serves L_pi and the target of L_V; then policy, then
critics and V together, then Polyak averaging of V'.

Deviations and choices:
1. V's target is per sample. The released code subtracts a row from a column there, so that each V(s) is fitted to its
   own min Q minus the whole batch's mean of lambda log_q pi.
2. Collection samples from the policy. The released code plays the squashed mean after the warm-up, against the paper;
   `deterministic_collection` does too.
3. Densities are computed in logarithms, without the released code's bounds on them from below. One of its versions
   halves log_q where q is not 1; this one does not.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.actor_critic import td_target
from ..core.agent import Metrics, adam, descend
from ..core.config import Preset
from ..core.dataset import Batch
from ..core.distributions import SquashedGaussian, kl
from ..core.networks import ValueNetwork, polyak_update
from .objectives import mdpo_off_policy_loss, tsallis_log, value_loss
from .off_policy import OffPolicyAgent, OffPolicyConfig


@dataclass(frozen=True, kw_only=True)
class OffPolicyMDPOConfig(OffPolicyConfig):
    """Off-policy MDPO's settings beyond the base's; the defaults are the authors'.

    Attributes:
        kl_coef: c = 1 / t_k > 0, the weight of staying near the old policy; large values barely move.
        entropy_coef: lambda >= 0, in units of reward; 0 maximises the return alone.
        tsallis_index: q in [1, 2]; 1 is Shannon's entropy and the KL divergence.
        old_policy_every: environment steps m >= 1 between copies of the policy to the old policy.
        regularization: rho >= 0, the weight of the squares of the Gaussian's mean and log standard deviation.
        deterministic_collection: collect with the squashed mean, as the authors' code does, instead of samples.
    """

    kl_coef: float = 1.0
    entropy_coef: float = 0.2
    tsallis_index: float = 1.0
    old_policy_every: int = 1000
    regularization: float = 1e-3
    deterministic_collection: bool = False

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("kl_coef", self.kl_coef > 0, "> 0")
        self.require("entropy_coef", self.entropy_coef >= 0, ">= 0")
        self.require("tsallis_index", 1 <= self.tsallis_index <= 2, "in [1, 2]")
        self.require("old_policy_every", self.old_policy_every >= 1, ">= 1")
        self.require("regularization", self.regularization >= 0, ">= 0")


class OffPolicyMDPO(OffPolicyAgent[OffPolicyMDPOConfig]):
    """Off-policy MDPO (Tomar et al., 2022); see the module's head."""

    algorithm: ClassVar[str] = "online.mdpo_off"
    config_type = OffPolicyMDPOConfig
    claims: ClassVar[tuple[str, ...]] = ("REG-01a", "REG-01b", "REG-01c", "REG-01d", "REG-01e")
    presets: ClassVar[dict[str, Preset]] = {
        "kl": Preset({}, "MDPO-KL for MuJoCo, 1e6 steps; best q for HalfCheetah and Hopper [code, paper]"),
        "walker2d": Preset({"tsallis_index": 2.0}, "MDPO-Tsallis, best q for Walker2d [memory]"),
        "ant": Preset({"tsallis_index": 2.0}, "MDPO-Tsallis, best q for Ant [memory]"),
        "humanoid": Preset({"tsallis_index": 1.2}, "MDPO-Tsallis, best q for Humanoid [memory]"),
        "humanoidstandup": Preset({"tsallis_index": 1.4}, "MDPO-Tsallis, best q for HumanoidStandup [memory]"),
        "released": Preset(
            {"deterministic_collection": True},
            "manantomar/Mirror-Descent-Policy-Optimization mdpo_off, its collection [code]",
        ),
    }

    def build(self) -> None:
        """Make the base's networks, V and its target, and the old policy."""
        super().build()

        def value() -> ValueNetwork:
            return ValueNetwork(self.mlp("value", self.problem.observation_dim, 1))

        self.value, self.value_target = value(), value()  # same streams, so equal at the start
        self.old_actor = self.make_actor()
        self.networks.update({"value": self.value, "value_target": self.value_target, "old_actor": self.old_actor})
        values = [*self.critic.parameters(), *self.value.parameters()]
        self.optimizers["critic"] = adam(values, self.config.critic_lr)

    def iterate(self, progress: float) -> Metrics:
        """Collect and learn; then, whenever m environment steps are full, let the policy become the old one."""
        before = self.step
        metrics = super().iterate(progress)
        if self.step // self.config.old_policy_every > before // self.config.old_policy_every:
            self.old_actor.load_state_dict(self.actor.state_dict())
        return metrics

    def exploration_noise(self) -> Tensor:
        """Draw the noise that the policy collects with: none if it collects deterministically."""
        noise = super().exploration_noise()
        return torch.zeros_like(noise) if self.config.deterministic_collection else noise

    def update(self, batch: Batch, index: int) -> Metrics:
        """Take one step of the policy, then of critics and value, and move the target value."""
        cfg = self.config
        noise = self.update_noise.normal(index, batch.action.shape[1:])
        policy_loss, value_target, policy_metrics = self.policy_loss(batch.obs, noise)
        descend(self.optimizers["actor"], policy_loss)

        target = self.target(batch)
        q, value = self.critic(batch.obs, batch.action), self.value(batch.obs)
        critic_loss = value_loss(q, target.unsqueeze(1).expand_as(q)).mean(2).sum(1)
        v_loss = value_loss(value, value_target).mean(1)
        descend(self.optimizers["critic"], critic_loss + v_loss)
        polyak_update(self.value_target, self.value, cfg.tau)
        return {
            "critic_loss": critic_loss.detach(),
            "value_loss": v_loss.detach(),
            "policy_loss": policy_loss.detach(),
            "q": q.detach().mean((1, 2)),
            "value": value.detach().mean(1),
            "target": target.mean(1),
            **policy_metrics,
        }

    @torch.no_grad()
    def target(self, batch: Batch) -> Tensor:
        """Return the critics' targets ``r + gamma (1 - d) V'(s')``, ``[S, B]``."""
        next_value: Tensor = self.value_target(batch.next_obs)
        return td_target(batch.reward, batch.terminated, next_value, self.config.discount)

    def policy_loss(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Metrics]:
        """Return the policy's loss ``[S]``, the targets of V ``[S, B]`` (no gradient), and diagnostics.

        Actions are drawn by `noise` ``[S, B, d_a]``; ``kl_new_old`` is KL(pi || pi_old) before the step, closed form.
        """
        cfg = self.config
        policy: SquashedGaussian = self.actor(obs)
        with torch.no_grad():  # of the old policy's parameters; its densities depend on the action
            old: SquashedGaussian = self.old_actor(obs)
        latent, log_densities = policy.draw(noise)
        log_q = tsallis_log(log_densities, cfg.tsallis_index).sum(-1)
        old_log_q = tsallis_log(old.log_densities(latent), cfg.tsallis_index).sum(-1)
        q = self.critic.constant(obs, torch.tanh(latent))
        per_sample = mdpo_off_policy_loss(
            log_q,
            old_log_q,
            q[:, 0],
            kl_coefficient=cfg.kl_coef,
            entropy_coefficient=cfg.entropy_coef,
            index=cfg.tsallis_index,
        )
        size = policy.base.mean.square() + policy.base.log_std.square()
        loss = per_sample.mean(1) + cfg.regularization * size.mean((1, 2))
        value_target = (q.amin(1) - cfg.entropy_coef * log_q).detach()
        with torch.no_grad():
            divergence = kl(policy.base, old.base).mean(1)
        return loss, value_target, {"entropy": -log_densities.detach().sum(-1).mean(1), "kl_new_old": divergence}
