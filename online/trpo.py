r"""TRPO: one natural-gradient step, as long as the divergence allows, accepted only if it keeps what it promises.

Paper: J. Schulman, S. Levine, P. Moritz, M. Jordan, P. Abbeel, "Trust Region Policy Optimization", ICML 2015, arXiv
1502.05477: eq. (14) and appendix C.
Reference code: openai/baselines trpo_mpi, Stable-Baselines-Team/stable-baselines3-contrib, openai/spinningup (TF1),
thu-ml/tianshou; their differences are presets.

    maximise  L(theta) = mean r A,   r = pi(a|s) / pi_old(a|s),   subject to   mean KL(pi_old || pi) <= delta

    g     = grad L at theta_old, on the whole batch
    x     : (F + c I) x = g by conjugate gradient,   F = mean J' M J, J of the distribution's parameters in theta
    theta = theta_old + kappa^j sqrt(2 delta / x'(F + c I) x) x,   the first j in 0, 1, ... with KL <= delta and
            L(theta) > L(theta_old); theta_old, to the bit, if there is none

M is the Fisher matrix of the distribution in its own parameters: F is the Hessian of either divergence at theta_old
(:func:`fisher_operator`). Divergences are closed forms, summed over the components of the action and averaged over
states. With c = 0, x exact and F on the whole batch, the quadratic model of the divergence is delta at the full step;
damping makes it smaller, much so while F is small beside c.

Guarantee: after every update ``mean KL <= kl_slack * max_kl`` over the batch, in the direction of `kl_direction`: the
very number that the log has as ``kl_old_new`` or ``kl_new_old``. The paper's bound on the return needs the maximum over
all states; the log has that of the batch.

The log also has ``cg_residual`` (of the damped system, relative to g), ``backtracks`` j and ``accepted``. Line searches
that often fail mean a poor solution or a region too large for the quadratic model.

Deviations and choices:
1. Defaults: delta and direction of the paper, 10 iterations of conjugate gradient, damping 0.1, kappa = 0.8
   and lambda = 0.97; 20 passes of minibatches for the critic, which matter more than anything in the policy's step.
2. The gain must be positive; openai/baselines and Spinning Up accept 0 too.
3. Conjugate gradient starts from 0 and stops at a residual relative to g; Stable-Baselines3 starts from small noise,
   and its residual is absolute. It runs in float64, products excepted.
4. A seed with the gradient 0 (all advantages equal) takes no step, and the log says so: ``accepted`` is 0.
5. Stable-Baselines3 averages the divergence of a Gaussian over the action's d_a dimensions too. In these units its
   delta and damping are d_a times larger: the preset ``"sb3_contrib"`` wants ``max_kl=0.01 * d_a`` and
   ``damping=0.1 * d_a`` beside it, the ``zoo_`` presets have them.
6. openai/baselines moves its observation statistics between collection and update; here they wait.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.agent import Metrics
from ..core.config import Preset
from ..core.distributions import Distribution, kl
from ..core.optimisers import FlatParameters
from ..core.policies import Policy
from ..core.rollout import Rollout
from ..kernels.conjugate_gradient import conjugate_gradient
from .objectives import policy_gradient_loss
from .on_policy import OnPolicyAgent, OnPolicyConfig, Samples


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(OnPolicyConfig):
    """TRPO's settings beyond the base's.

    `batch_size`, `n_epochs`, `learning_rate` and its decay, `adam_eps` and `max_grad_norm` are the critic's alone.

    Attributes:
        max_kl: delta, the mean divergence that a step may reach, > 0, in nats; small is slow, with a large one the
            quadratic model fails and the line search shortens the steps.
        kl_direction: of the divergence that the line search bounds: ``"old_new"`` is KL(old || new).
        kl_slack: the line search accepts up to this many times `max_kl`, >= 1.
        damping: c >= 0, in the units of F (1 / sigma^2 for a mean, 2 for log sigma); large turns the natural gradient
            into the gradient and keeps steps below `max_kl`, at 0 directions that F hardly sees are overrated.
        cg_iterations: most products of F per update, >= 1.
        fisher_every: F sees every k-th step of the batch, k >= 1; more is cheaper and noisier.
        shrink: kappa in (0, 1), factor on the step at each backtracking.
        line_search_steps: steps tried before the old policy is kept, >= 1.
    """

    max_kl: float = 0.01
    kl_direction: Literal["old_new", "new_old"] = "old_new"
    kl_slack: float = 1.0
    damping: float = 0.1
    cg_iterations: int = 10
    fisher_every: int = 1
    shrink: float = 0.8
    line_search_steps: int = 10
    batch_size: int = 128
    n_epochs: int = 20
    learning_rate: float = 1e-3
    learning_rate_decay: Literal["none", "linear"] = "none"
    max_grad_norm: float | None = None
    trace_decay: float = 0.97
    value_coef: float = 2.0
    normalize_advantage: Literal["minibatch", "batch", "none"] = "batch"

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("max_kl", self.max_kl > 0, "> 0")
        self.require("kl_slack", self.kl_slack >= 1, ">= 1")
        self.require("damping", self.damping >= 0, ">= 0")
        self.require("shrink", 0 < self.shrink < 1, "in (0, 1)")
        for name in ("cg_iterations", "fisher_every", "line_search_steps"):
            self.require(name, getattr(self, name) >= 1, ">= 1")
        self.require("normalize_advantage", self.normalize_advantage != "minibatch", "'batch' or 'none': one step")
        self.require("entropy_coef", self.entropy_coef == 0, "0: the policy's step has no entropy bonus")
        self.require("recompute_advantage", not self.recompute_advantage, "False: the policy takes one step")
        self.require("joint_grad_norm", not self.joint_grad_norm, "False: the critic has an optimiser of its own")


def fisher_operator(
    actor: Policy, parameters: FlatParameters, states: Samples, damping: float
) -> Callable[[Tensor], Tensor]:
    """Return ``v -> (F + damping I) v`` on ``[S, P]``, F the mean of ``J' M J`` over the states.

    J is the Jacobian of the distribution's parameters in the policy's `parameters`, where they are now, and M the
    Fisher matrix of the distributions `states.parameters`.
    """
    distribution = actor(states.obs, backend="reference")
    outputs, old = distribution.parameters_tensor(), distribution.rebuild(states.parameters)
    # J' u is linear in u, and its own transpose, differentiated once and for all, is v -> J v.
    u = torch.zeros_like(outputs, requires_grad=True)
    transposed = torch.autograd.grad(outputs, parameters.parameters, u, create_graph=True)

    def product(v: Tensor) -> Tensor:
        (along,) = torch.autograd.grad(transposed, u, parameters.split(v), retain_graph=True)
        weighted = (outputs * old.fisher_product(along)).sum(-1)
        back = torch.autograd.grad(states.mean(weighted).sum(), parameters.parameters, retain_graph=True)
        return torch.cat([each.flatten(1) for each in back], 1) + damping * v

    return product


_SB3 = {"kl_direction": "new_old", "cg_iterations": 15, "trace_decay": 0.95, "n_epochs": 10}
_SB3_PLAIN = _SB3 | {"normalize_obs": False, "normalize_reward": "none"}
_ZOO_MUJOCO = _SB3 | {"cg_iterations": 25, "n_epochs": 20, "n_envs": 2, "n_steps": 1024, "normalize_reward": "done"}


class TRPO(OnPolicyAgent[TRPOConfig]):
    """TRPO (Schulman et al., 2015); see the module's head."""

    algorithm: ClassVar[str] = "online.trpo"
    config_type = TRPOConfig
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
        "PO-03a",
        "PO-03c",
        "PO-03d",
        "PO-04",
    )
    presets: ClassVar[dict[str, Preset]] = {
        "baselines": Preset(
            {"n_steps": 1024, "batch_size": 64, "n_epochs": 5, "trace_decay": 0.98, "hidden": (32, 32)}
            | {"kl_slack": 1.5, "shrink": 0.5, "fisher_every": 5, "adam_eps": 1e-8}
            | {"normalize_reward": "none", "bootstrap_on_truncation": False},
            "openai/baselines trpo_mpi, MuJoCo [code]",
        ),
        "sb3_contrib": Preset(
            _SB3_PLAIN, "Stable-Baselines-Team/stable-baselines3-contrib TRPO defaults for d_a = 1 [code]"
        ),
        "spinning_up": Preset(
            {"n_steps": 4000, "batch_size": 4000, "n_epochs": 80, "kl_direction": "new_old", "adam_eps": 1e-8}
            | {"normalize_obs": False, "normalize_reward": "none", "bootstrap_on_truncation": False}
            | {"init": "torch", "initial_log_std": -0.5},
            "openai/spinningup TF1 TRPO for continuous actions [code]; its critic's target is the return, and its "
            "weights are Glorot's",
        ),
        "tianshou": Preset(
            {"n_envs": 16, "n_steps": 64, "batch_size": 1024, "trace_decay": 0.95, "adam_eps": 1e-8}
            | {"learning_rate_decay": "linear", "normalize_reward": "none", "scale_returns": True}
            | {"initial_log_std": -0.5},
            "thu-ml/tianshou mujoco_trpo.py [code]",
        ),
        "zoo_cartpole": Preset(
            _SB3_PLAIN
            | {"n_envs": 2, "n_steps": 512, "batch_size": 512, "n_epochs": 20, "damping": 1e-3, "trace_decay": 0.98},
            "RL-Zoo CartPole-v1, 1e5 steps [code]",
        ),
        "zoo_pendulum": Preset(
            _SB3_PLAIN | {"n_envs": 2, "n_steps": 1024, "n_epochs": 15, "discount": 0.9},
            "RL-Zoo Pendulum-v1, 1e5 steps, without its state-dependent exploration [code]",
        ),
        "zoo_halfcheetah": Preset(
            _ZOO_MUJOCO | {"max_kl": 0.24, "damping": 0.6}, "RL-Zoo HalfCheetah, 1e6 steps [code]; d_a = 6"
        ),
        "zoo_swimmer": Preset(
            _ZOO_MUJOCO | {"max_kl": 0.02, "damping": 0.2, "discount": 0.9999},
            "RL-Zoo Swimmer, 1e6 steps [code]; d_a = 2",
        ),
    }

    def build(self) -> None:
        """Make the networks, and an optimiser of the critic alone."""
        super().build()
        self.policy_parameters = FlatParameters(self.actor.parameters())
        self.optimizer = self.critic_optimizer = self.make_optimizer(critic=self.critic)
        self.optimizers = {"critic": self.critic_optimizer}

    def surrogate(self, distribution: Distribution, log_prob: Tensor, batch: Samples) -> Tensor:
        """``-r A`` of each sample."""
        return policy_gradient_loss(log_prob, batch.log_prob, batch.advantage)

    def improve(self, samples: Samples, rollout: Rollout) -> Metrics:
        """Step the policy, then fit the critic to the targets."""
        metrics = self.step_policy(samples)
        self.fit_critic(samples, self.config.n_epochs, self.config.batch_size)
        return metrics

    def step_policy(self, samples: Samples) -> Metrics:
        """Take each seed's natural-gradient step, shortened until it is acceptable, or none."""
        cfg, theta = self.config, self.policy_parameters
        per_sample, _ = self.policy_loss(samples)
        gradient = -theta.gradient(samples.mean(per_sample))
        product = fisher_operator(self.actor, theta, self.fisher_states(samples), cfg.damping)
        x = conjugate_gradient(product, gradient, max_iterations=cfg.cg_iterations).x
        curved = product(x)
        curvature = (x.double() * curved.double()).sum(1)
        pending = curvature > 0
        scale = (2 * cfg.max_kl / curvature).sqrt().unsqueeze(1)
        # Where the gradient is 0 the scale is infinite.
        accepted, backtracks = self.line_search(samples, torch.where(pending.unsqueeze(1), scale * x, 0.0), pending)
        norm = torch.linalg.vector_norm(gradient, dim=1)
        residual = torch.linalg.vector_norm(gradient - curved, dim=1) / torch.where(norm > 0, norm, 1.0)
        return {
            "grad_norm": norm,
            "cg_residual": residual,
            "accepted": accepted.to(self.dtype),
            "backtracks": backtracks.to(self.dtype),
        }

    def fisher_states(self, samples: Samples) -> Samples:
        """Return the steps that F sees: every `fisher_every`-th one of every environment."""
        if self.config.fisher_every == 1:
            return samples
        by_step = torch.arange(len(samples), device=self.device).view(-1, self.config.n_envs)
        return samples.take(by_step[:: self.config.fisher_every].flatten().expand(len(self.seeds), -1))

    @torch.no_grad()
    def line_search(self, samples: Samples, step: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
        """Move the `pending` seeds by the first acceptable of ``step, kappa step, kappa^2 step, ...``, or not at all.

        Args:
            samples: the batch.
            step: the full step, ``[S, P]``.
            pending: which seeds may move, bool ``[S]``.

        Returns:
            Which seeds moved, bool ``[S]``, and how many times each was refused, int64 ``[S]``.
        """
        cfg, theta = self.config, self.policy_parameters.values
        old, moved = theta.clone(), torch.zeros_like(pending)
        refused = torch.zeros_like(pending, dtype=torch.int64)
        for power in range(cfg.line_search_steps):
            if not pending.any():
                break
            theta.copy_(torch.where(pending.unsqueeze(1), old + cfg.shrink**power * step, theta))
            divergence, gain = self.measure(samples)
            # A number that is not finite satisfies neither.
            good = pending & (divergence <= cfg.kl_slack * cfg.max_kl) & (gain > 0)
            moved, pending = moved | good, pending & ~good
            refused += pending
        theta.copy_(torch.where(moved.unsqueeze(1), theta, old))
        return moved, refused

    @torch.no_grad()
    def measure(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the policy's mean divergence from the old one, and how much larger the surrogate is, both ``[S]``."""
        new = self.actor(samples.obs)
        old = new.rebuild(samples.parameters)
        divergence = kl(old, new) if self.config.kl_direction == "old_new" else kl(new, old)
        gain = -self.surrogate(new, new.log_prob(samples.action), samples) - samples.advantage
        return samples.mean(divergence), samples.mean(gain)
