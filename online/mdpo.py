r"""MDPO: each update is one step of mirror descent on the policy, approached with several gradient steps.

Paper: M. Tomar, L. Shani, Y. Efroni, M. Ghavamzadeh, "Mirror Descent Policy Optimization", ICLR 2022, arXiv
2005.09814v5: the on-policy algorithm.
Reference code: manantomar/Mirror-Descent-Policy-Optimization, mdpo_on.

    pi_{k+1} = argmax_pi  E_{s~rho_k} [ E_{a~pi} A_k(s, a) - KL(pi(.|s) || pi_k(.|s)) / t_k ]
             = pi_k exp(t_k A_k) / Z                                                  (over all policies)
    L        = -mean r A + mean KL(pi || pi_k) / t_k,                  r = pi(a|s) / pi_k(a|s)

The divergence has the new policy first, other than TRPO's and PPO's: both orders have the same curvature at pi_k, but
only this one has the exponentiated policy as its minimiser. Its gradient is zero at pi_k, so the first of the
`policy_steps` is the policy gradient's; the proximal term acts from the second on.

An iteration: advantages, standardised over the batch; m steps of Adam on L with the whole batch each; then `n_epochs`
passes of minibatches for the critic, which has an optimiser of its own. With t_k = 1 the penalty (a KL of 1e-3) is
weak beside the surrogate (1e-2): learning rate and m decide how far the policy moves, ``kl_new_old`` in the log.

Deviations and choices:
1. t_k falls from `step_size` to ``step_size / K`` over the K updates of one call of `learn`, as in the paper; the
   released code counts from 1 + 1/K to 2/K. `min_step_size` bounds the weight 1/t_k of the last updates, about K.
2. A time limit does not end the value. Preset ``"released"`` has it end.
3. The released code drops the critic's last incomplete minibatch; here a shorter rest joins the one before.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.agent import Metrics
from ..core.config import Preset
from ..core.distributions import Distribution, kl
from ..core.optimisers import SeedwiseAdam
from ..core.rollout import Rollout
from .objectives import kl_penalised_loss
from .on_policy import OnPolicyAgent, OnPolicyConfig, Samples


@dataclass(frozen=True, kw_only=True)
class MDPOConfig(OnPolicyConfig):
    """MDPO's settings beyond the base's; the defaults are the paper's for MuJoCo ("loaded" version).

    `batch_size` and `n_epochs` are the critic's, `adam_eps` and `max_grad_norm` the policy's; `learning_rate` is
    that of both.

    Attributes:
        policy_steps: m, gradient steps on the mirror-descent problem per iteration, >= 1; one is a policy-gradient
            step.
        step_size: t of the first update, > 0, in units of one over the standardised advantage; small keeps the policy
            near the old one, large drops the proximal term.
        step_size_decay: ``"linear"`` lets t fall towards zero over one call of `learn`; ``"none"`` keeps it.
        min_step_size: t never falls below it, >= 0.
    """

    policy_steps: int = 10
    step_size: float = 1.0
    step_size_decay: Literal["none", "linear"] = "linear"
    min_step_size: float = 0.0
    batch_size: int = 128
    n_epochs: int = 5
    learning_rate_decay: Literal["none", "linear"] = "none"
    value_coef: float = 2.0
    value_clip: float | None = 0.2
    normalize_advantage: Literal["minibatch", "batch", "none"] = "batch"
    normalize_reward: Literal["none", "done", "terminated"] = "done"

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("policy_steps", self.policy_steps >= 1, ">= 1")
        self.require("step_size", self.step_size > 0, "> 0")
        self.require("min_step_size", self.min_step_size >= 0, ">= 0")
        self.require("recompute_advantage", not self.recompute_advantage, "False: an iteration has one mirror step")
        self.require("joint_grad_norm", not self.joint_grad_norm, "False: the critic has an optimiser of its own")


class MDPO(OnPolicyAgent[MDPOConfig]):
    """On-policy MDPO (Tomar et al., 2022); see the module's head."""

    algorithm: ClassVar[str] = "online.mdpo"
    config_type = MDPOConfig
    claims: ClassVar[tuple[str, ...]] = (
        "FND-02",
        "FND-03a",
        "FND-03d",
        "REG-02",
        "REG-03a",
        "REG-03b",
        "PO-03a",
        "PO-03c",
        "PO-04",
        "PO-05a",
        "PO-05b",
        "PO-06a",
        "PO-06b",
        "PO-13",
        "PO-14a",
        "PO-14b",
        "PO-14c",
    )
    presets: ClassVar[dict[str, Preset]] = {
        "released": Preset(
            {"bootstrap_on_truncation": False}, "manantomar/Mirror-Descent-Policy-Optimization mdpo_on, MuJoCo [code]"
        ),
    }

    def build(self) -> None:
        """Make the networks, and an optimiser each."""
        super().build()
        self.optimizer = self.make_optimizer(actor=self.actor)
        self.critic_optimizer = SeedwiseAdam({"critic": self.critic.parameters()}, self.config.learning_rate)
        self.optimizers = {"policy": self.optimizer, "critic": self.critic_optimizer}

    @property
    def mirror_step(self) -> float:
        """t_k of the iteration at hand; `progress` is below 1, so it is never 0."""
        cfg = self.config
        decayed = cfg.step_size * (1 - self.progress) if cfg.step_size_decay == "linear" else cfg.step_size
        return max(decayed, cfg.min_step_size)

    def surrogate(self, distribution: Distribution, log_prob: Tensor, batch: Samples) -> Tensor:
        """``-r A + KL(pi || pi_k) / t_k`` of each sample."""
        divergence = kl(distribution, distribution.rebuild(batch.parameters))
        return kl_penalised_loss(log_prob, batch.log_prob, batch.advantage, divergence, 1 / self.mirror_step)

    def improve(self, samples: Samples, rollout: Rollout) -> Metrics:
        """Take the policy's steps on the whole batch, then the critic's on minibatches."""
        cfg = self.config
        norms = []
        for _ in range(cfg.policy_steps):
            per_sample, _ = self.policy_loss(samples)
            norms.append(self.optimizer.step(samples.mean(per_sample)))
        self.critic_optimizer.learning_rate = self.optimizer.learning_rate
        self.fit_critic(samples, cfg.n_epochs, cfg.batch_size)
        return {"grad_norm": torch.stack(norms).mean(0), "mirror_step": torch.full_like(norms[0], self.mirror_step)}
