r"""The base of on-policy methods: collect with the policy, estimate advantages, improve the policy on that batch.

One iteration: (1) collect ``n_steps`` steps of every environment with the policy frozen; (2) values, generalised
advantages and critic targets of the whole batch (:func:`corollary.kernels.scans.gae`), critic targets
``R = A + V``; (3) :meth:`OnPolicyAgent.improve`, by default `n_epochs` passes over shuffled minibatches of

    loss = mean surrogate + value_coef mean (V - R)^2 / 2 - entropy_coef mean H(pi(.|s)),

one Adam step each; (4) diagnostics of the whole batch under the new policy. A method changes one or more of four
hooks: :meth:`~OnPolicyAgent.surrogate`, :meth:`~OnPolicyAgent.before_step` (may stop a seed before a minibatch),
:meth:`~OnPolicyAgent.after_epoch` (may stop a seed or repair the policy) and :meth:`~OnPolicyAgent.improve` itself.

All seeds advance together. A seed that stops early sits out the remaining steps (see
:mod:`corollary.core.optimisers`), so it learns what it would have learnt alone.

Axes: ``S`` seeds, ``T`` steps, ``N`` environments of a seed, ``B = T * N`` samples of a batch, or fewer of a minibatch.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..core.agent import Metrics
from ..core.checkpoint import below
from ..core.distributions import Distribution, kl
from ..core.errors import ConfigError
from ..core.networks import Activation, ValueNetwork
from ..core.normalisers import EPSILON, RewardNormaliser, RunningMoments
from ..core.online_agent import OnlineAgent, OnlineConfig
from ..core.optimisers import SeedwiseAdam
from ..core.policies import Policy, policy_for
from ..core.rollout import Rollout
from ..kernels.scans import gae
from .objectives import (
    clipped_value_coefficient,
    clipped_value_loss,
    explained_variance,
    ratio_diagnostics,
    value_coefficient,
    value_loss,
)

HEAD_GAIN = 0.01
"""Gain of the policy's last layer: the first policy hardly depends on the state (Andrychowicz et al., 2020)."""


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(OnlineConfig):
    """What every on-policy method shares; the defaults are PPO's for MuJoCo.

    Attributes:
        n_steps: steps of each environment per iteration, >= 1; the batch has ``n_envs * n_steps`` samples.
        batch_size: samples per gradient step; must divide ``n_envs * n_steps``.
        n_epochs: passes over the batch, >= 1; more of them use the data better and move the policy further.
        learning_rate: Adam's step size, > 0.
        learning_rate_decay: ``"linear"`` lets it fall to zero over one call of `learn`; ``"none"`` keeps it.
        adam_eps: Adam's epsilon, > 0; matters late in training, when gradients are small.
        max_grad_norm: Euclidean norm that each gradient is scaled down to; ``None`` does not clip.
        joint_grad_norm: one norm over policy and critic together (code with one optimiser), or one for each.
        discount: gamma in [0, 1].
        trace_decay: lambda of generalised advantage estimation in [0, 1]; 0 trusts the critic, 1 the rewards.
        value_coef: weight of ``(V - R)^2 / 2``, >= 0.
        value_clip: half-width of the value clip, > 0; ``None`` does not clip.
        entropy_coef: weight of the entropy bonus, >= 0.
        normalize_advantage: to mean 0 and standard deviation 1 over each ``"minibatch"``, the whole ``"batch"``, or
            ``"none"``.
        recompute_advantage: evaluate values and advantages again before each epoch.
        normalize_reward: divide rewards by the running standard deviation of the discounted return, whose running
            sum is reset when the episode is ``"done"`` (Stable-Baselines3) or only when ``"terminated"``
            (gymnasium); ``"none"`` leaves rewards as they are.
        scale_returns: the critic learns returns divided by their running standard deviation, whatever the scale of
            rewards; advantages stay in units of the reward (Tianshou's ``rew_norm``).
        bootstrap_on_truncation: whether an episode cut by a time limit goes on in its value; ``False`` treats the
            cut as an end, which is biased, to reproduce scores published that way.
        hidden: widths of the policy's hidden layers; empty for a linear policy, a table on one-hot states.
        critic_hidden: widths of the critic's; empty for those of the policy.
        activation: between layers.
        init: ``"orthogonal"`` (gain sqrt 2, policy head 0.01, value head 1, no biases) or ``"torch"``.
        initial_log_std: logarithm of the Gaussian policy's first standard deviation, in units of the action.
    """

    n_steps: int = 2048
    batch_size: int = 64
    n_epochs: int = 10
    learning_rate: float = 3e-4
    learning_rate_decay: Literal["none", "linear"] = "linear"
    adam_eps: float = 1e-5
    max_grad_norm: float | None = 0.5
    joint_grad_norm: bool = False
    discount: float = 0.99
    trace_decay: float = 0.95
    value_coef: float = 0.5
    value_clip: float | None = None
    entropy_coef: float = 0.0
    normalize_advantage: Literal["minibatch", "batch", "none"] = "minibatch"
    recompute_advantage: bool = False
    normalize_obs: bool = True
    normalize_reward: Literal["none", "done", "terminated"] = "terminated"
    scale_returns: bool = False
    bootstrap_on_truncation: bool = True
    hidden: tuple[int, ...] = (64, 64)
    critic_hidden: tuple[int, ...] = ()
    activation: Activation = "tanh"
    init: Literal["torch", "orthogonal"] = "orthogonal"
    initial_log_std: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        for name in ("n_steps", "batch_size", "n_epochs"):
            self.require(name, getattr(self, name) >= 1, ">= 1")
        for name in ("learning_rate", "adam_eps"):
            self.require(name, getattr(self, name) > 0, "> 0")
        for name in ("discount", "trace_decay"):
            self.require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("value_coef", "entropy_coef"):
            self.require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("max_grad_norm", "value_clip"):
            value = getattr(self, name)
            self.require(name, value is None or value > 0, "> 0, or None")
        self.require("hidden", all(n >= 1 for n in self.hidden), "positive widths, or empty")
        self.require("critic_hidden", all(n >= 1 for n in self.critic_hidden), "positive widths, or empty")


@dataclass(frozen=True)
class Samples:
    """A batch or minibatch of what the old policy did; every tensor leads with ``[S, B]``.

    Attributes:
        obs: normalised states ``[S, B, d_s]``.
        action: ``[S, B, d_a]``.
        log_prob: of the action under the old policy, ``[S, B]``.
        parameters: of the old policy's distributions, ``[S, B, P]``.
        advantage: ``[S, B]``.
        target: the critic's, in its units, ``[S, B]``.
        value: the critic's estimate when the batch was collected, in its units, ``[S, B]``.
        weight: 1 for a transition and 0 for a row that is none, ``[S, B]``; ``None`` if all are transitions.
    """

    obs: Tensor
    action: Tensor
    log_prob: Tensor
    parameters: Tensor
    advantage: Tensor
    target: Tensor
    value: Tensor
    weight: Tensor | None

    def __len__(self) -> int:
        """B."""
        return self.log_prob.shape[1]

    def take(self, rows: Tensor) -> "Samples":
        """Return the rows ``[S, b]`` of each seed."""
        n_seeds, size = self.log_prob.shape
        flat = (rows + size * torch.arange(n_seeds, device=rows.device).unsqueeze(1)).flatten()

        def taken(each: Tensor | None) -> Any:
            return None if each is None else each.flatten(0, 1).index_select(0, flat).view(*rows.shape, *each.shape[2:])

        return Samples(**{name: taken(each) for name, each in vars(self).items()})

    def last(self, size: int) -> "Samples":
        """Return the last `size` rows of each seed, or all if there are fewer; none for 0."""
        first = max(len(self) - size, 0)
        cut: dict[str, Any] = {n: None if each is None else each[:, first:] for n, each in vars(self).items()}
        return Samples(**cut)

    def minibatches(self, size: int) -> "Iterator[Samples]":
        """Cut into consecutive pieces of `size` samples; a shorter rest joins the last one."""
        whole = max(len(self) // size, 1)
        sizes = [size] * (whole - 1) + [len(self) - size * (whole - 1)]
        pieces = [[None] * whole if each is None else each.split(sizes, 1) for each in vars(self).values()]
        return (Samples(*piece) for piece in zip(*pieces, strict=True))

    def mean(self, values: Tensor) -> Tensor:
        """Average ``[S, B]`` over the transitions, ``[S]``."""
        if self.weight is None:
            return values.mean(1)
        return (values * self.weight).sum(1) / self.weight.sum(1).clamp(min=1)

    def over_size(self, values: Tensor) -> Tensor:
        """Return ``[S, B, ...]`` with each sample's weight in :meth:`mean` multiplied in."""
        if self.weight is None:
            return values / len(self)
        share = self.weight / self.weight.sum(1, keepdim=True).clamp(min=1)
        return values * share.view(*share.shape, *(1,) * (values.ndim - 2))

    def max(self, values: Tensor) -> Tensor:
        """Largest of non-negative ``[S, B]`` over the transitions, ``[S]``."""
        return (values if self.weight is None else values * self.weight).amax(1)

    def standardized(self, advantage: Tensor) -> Tensor:
        """``(A - mean) / (std + 1e-8)`` over the transitions, with the unbiased standard deviation."""
        if self.weight is None:
            if len(self) == 1:
                return advantage
            std, mean = torch.std_mean(advantage, 1, keepdim=True)
            return (advantage - mean) / (std + 1e-8)
        rows, valid = self.weight.sum(1, keepdim=True), self.weight > 0
        centred = advantage - self.mean(advantage).unsqueeze(1)
        # Equal advantages: the rounding of their mean would remain, which a division by its own size makes 1.
        highest = torch.where(valid, advantage, -torch.inf).amax(1, keepdim=True)
        lowest = torch.where(valid, advantage, torch.inf).amin(1, keepdim=True)
        centred = torch.where(highest > lowest, centred, 0.0)
        std = ((centred.square() * self.weight).sum(1, keepdim=True) / (rows - 1).clamp(min=1)).sqrt()
        return torch.where(rows > 1, centred / (std + 1e-8), advantage)


C = TypeVar("C", bound=OnPolicyConfig)


class OnPolicyAgent(OnlineAgent[C]):
    """Collection, advantages, the default improvement step and diagnostics; a method defines its hooks."""

    actor: Policy
    critic: ValueNetwork
    optimizer: SeedwiseAdam
    critic_optimizer: SeedwiseAdam
    """Of methods whose critic learns apart from the policy (:meth:`fit_critic`); others have none."""

    # -------------------------------------------------------------------------------------------------- the hooks

    @abstractmethod
    def surrogate(self, distribution: Distribution, log_prob: Tensor, batch: Samples) -> Tensor:
        """Return each sample's policy loss ``[S, B]``; `log_prob` is the action's under the new `distribution`."""

    @property
    def has_coefficient(self) -> bool:
        """Whether :meth:`coefficient` gives the surrogate's derivative with the present configuration."""
        return False

    def coefficient(self, log_prob: Tensor, batch: Samples) -> Tensor:
        """Return the derivative of the surrogate in `log_prob`, ``[S, B]``, if that is all it depends on.

        This and the closed forms of distributions replace most of a backward pass: with minibatches this small, its
        many little operations are what a step consists of.
        """
        raise NotImplementedError

    def before_step(self, log_prob: Tensor, batch: Samples, active: list[bool]) -> list[bool]:
        """Say which seeds take the step on this minibatch and go on; all that still do unless overridden."""
        return active

    def after_epoch(self, samples: Samples, batch: Samples, log_prob: Tensor, active: list[bool]) -> list[bool]:
        """Say which seeds go on to the next epoch, given all samples, the last minibatch and its log-probabilities."""
        return active

    def improve(self, samples: Samples, rollout: Rollout) -> Metrics:
        """Improve policy and critic on the batch: epochs of minibatches, in each a step on the joint loss."""
        cfg = self.config
        active = [True] * len(self.seeds)
        norms, steps = torch.zeros((2, len(self.seeds)), dtype=self.dtype, device=self.device)
        for epoch in range(cfg.n_epochs):
            if epoch > 0 and cfg.recompute_advantage:
                samples = self.with_advantages(samples, rollout)
            for batch in samples.take(self.permutation(epoch, len(samples))).minibatches(cfg.batch_size):
                gradients, log_prob = self.gradients(batch)
                active = self.before_step(log_prob, batch, active)
                if not any(active):
                    break
                everyone = all(active)
                norm = self.optimizer.apply(gradients, active=None if everyone else active)
                norms += norm if everyone else torch.where(torch.tensor(active, device=self.device), norm, 0)
                steps += 1 if everyone else steps.new_tensor(active)
            active = self.after_epoch(samples, batch, log_prob, active)
            if not any(active):
                break
        return {"gradient_steps": steps, "grad_norm": norms / steps.clamp(min=1)}

    def fit_critic(self, samples: Samples, epochs: int, batch_size: int) -> None:
        """Fit the critic alone, for methods that keep it apart: shuffled minibatches, steps of `critic_optimizer`."""
        for epoch in range(epochs):
            for batch in samples.take(self.permutation(epoch, len(samples))).minibatches(batch_size):
                self.critic_optimizer.step(self.config.value_coef * batch.mean(self.value_errors(batch)))

    # ---------------------------------------------------------------------------------------------- the iteration

    def build(self) -> None:
        """Make policy, critic and their optimiser."""
        cfg = self.config
        if (cfg.n_envs * cfg.n_steps) % cfg.batch_size:
            raise ConfigError(
                f"batch_size={cfg.batch_size} does not divide the {cfg.n_envs * cfg.n_steps} steps of a rollout "
                f"(n_envs={cfg.n_envs} times n_steps={cfg.n_steps}): choose a divisor."
            )
        width = self.problem.observation_dim
        shared: dict[str, Any] = {"activation": cfg.activation, "init": cfg.init}
        self.actor = policy_for(
            self.problem.actions,
            lambda n_out: self.mlp("actor", width, n_out, hidden=cfg.hidden, output_gain=HEAD_GAIN, **shared),
            cfg.initial_log_std,
        )
        self.critic = self.value_network("critic")
        self.networks = nn.ModuleDict({"actor": self.actor, "critic": self.critic})
        self.action_noise = self.actor.noise
        self.optimizer = self.make_optimizer(actor=self.actor, critic=self.critic)
        self.optimizers = {"adam": self.optimizer}
        if cfg.normalize_reward != "none":
            self.reward_normaliser = RewardNormaliser(
                len(self.seeds), cfg.n_envs, cfg.discount, reset_on=cfg.normalize_reward
            )
        self.return_moments = RunningMoments(len(self.seeds), 1) if cfg.scale_returns else None
        self._shuffle, self._noise = self.stream("minibatch"), self.stream("action")

    def value_network(self, purpose: str) -> ValueNetwork:
        """Make a state-value network."""
        cfg = self.config
        return ValueNetwork(
            self.mlp(
                purpose,
                self.problem.observation_dim,
                1,
                hidden=cfg.critic_hidden or cfg.hidden,
                activation=cfg.activation,
                init=cfg.init,
                output_gain=1.0,
            )
        )

    def make_optimizer(self, **networks: nn.Module) -> SeedwiseAdam:
        """Make an optimiser of these networks with the configuration's settings."""
        cfg = self.config
        return SeedwiseAdam(
            {name: list(network.parameters()) for name, network in networks.items()},
            cfg.learning_rate,
            eps=cfg.adam_eps,
            max_grad_norm=cfg.max_grad_norm,
            joint_norm=cfg.joint_grad_norm,
        )

    def iterate(self, progress: float) -> Metrics:
        """Collect, improve, and describe what changed; `progress` sets the learning rate."""
        cfg = self.config
        self.progress = progress
        if cfg.learning_rate_decay == "linear":
            self.optimizer.learning_rate = cfg.learning_rate * (1 - progress)
        rollout = self.collect()
        samples = self.evaluate_rollout(rollout)
        metrics = self.improve(samples, rollout)
        self.iteration += 1
        return metrics | self.diagnose(samples)

    def collect(self) -> Rollout:
        """Take `n_steps` steps of every environment with the policy as it is."""
        cfg = self.config
        return self.take_steps(self.actor, self.draw_action_noise(self._noise, self.iteration, cfg.n_steps, cfg.n_envs))

    def take_steps(self, behaviour: Policy, noise: Tensor) -> Rollout:
        """Go on in every environment with `behaviour`, a step for each of the T rows of `noise` ``[S, T, N, d_a]``."""
        return self.go_on(behaviour.actor(), noise)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return normalisers, environments and recent returns."""
        found = super().extra_tensors()
        if self.reward_normaliser is not None:
            moments = self.reward_normaliser.state()
            found |= {f"rewards/{name}": torch.from_numpy(array) for name, array in moments.items()}
        if self.return_moments is not None:
            found |= {name: torch.from_numpy(array) for name, array in self.return_moments.state("returns/").items()}
        return found

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`extra_tensors` returned."""
        super().load_extra_tensors(tensors)
        if self.reward_normaliser is not None:
            self.reward_normaliser.load_state(
                {name: tensor.cpu().numpy() for name, tensor in below("rewards/", tensors).items()}
            )
        if self.return_moments is not None:
            self.return_moments.load_state({name: t.cpu().numpy() for name, t in tensors.items()}, "returns/")

    def evaluate_rollout(self, rollout: Rollout) -> Samples:
        """Compute what the update needs of every step: old distributions, values, advantages, targets."""
        return self.with_advantages(self.samples_of(rollout), rollout)

    @torch.no_grad()
    def samples_of(self, rollout: Rollout) -> Samples:
        """Return the steps with the policy's distributions and values as they are; advantages and targets are 0."""
        obs, action = _rows(rollout.obs), _rows(rollout.action)
        old = self.actor(obs)
        log_prob = old.log_prob(action)
        return Samples(
            obs=obs,
            action=action,
            log_prob=log_prob,
            parameters=old.parameters_tensor(),
            advantage=torch.zeros_like(log_prob),
            target=torch.zeros_like(log_prob),
            value=self.critic(obs),
            weight=None if rollout.valid is None else _rows(rollout.valid).to(self.dtype),
        )

    @torch.no_grad()
    def with_advantages(self, samples: Samples, rollout: Rollout) -> Samples:
        """Return the samples with advantages and targets by the critic as it is now."""
        cfg = self.config
        value, next_value = self.critic(samples.obs), self.critic(_rows(rollout.next_obs))
        if self.return_moments is not None:
            variance = torch.as_tensor(self.return_moments.var, dtype=self.dtype, device=self.device)
            scale = (variance + EPSILON).sqrt()  # [S, 1]
            value, next_value = value * scale, next_value * scale
        advantage, target = gae(
            _time_first(rollout.reward),
            _time_first(value.view(rollout.reward.shape)),
            _time_first(next_value.view(rollout.reward.shape)),
            _time_first(rollout.terminated),
            _time_first(rollout.truncated),
            None if rollout.valid is None else _time_first(rollout.valid),
            discount=cfg.discount,
            trace_decay=cfg.trace_decay,
            bootstrap_on_truncation=cfg.bootstrap_on_truncation,
        )
        shape = rollout.reward.shape
        advantage, target = (
            _rows(each.unflatten(1, (shape[0], shape[2])).movedim(1, 0)) for each in (advantage, target)
        )
        if self.return_moments is not None:
            valid = None if samples.weight is None else samples.weight.bool().cpu().numpy()
            self.return_moments.update(target.unsqueeze(-1).cpu().numpy(), valid)
            target = target / scale  # the one that values were multiplied with: this batch counts from the next on
        if cfg.normalize_advantage == "batch":
            advantage = samples.standardized(advantage)
        return dataclasses.replace(samples, advantage=advantage, target=target)

    def gradients(self, batch: Samples) -> tuple[Sequence[Tensor], Tensor]:
        """Return the loss's gradients, in the optimiser's order, and the actions' new log-probabilities ``[S, B]``.

        By autograd, or in closed form where the surrogate has a :meth:`coefficient`.
        """
        cfg = self.config
        if not self.has_coefficient:
            loss, log_prob = self.loss(batch)
            return self.optimizer.gradients(loss), log_prob.detach()
        if cfg.normalize_advantage == "minibatch":
            batch = dataclasses.replace(batch, advantage=batch.standardized(batch.advantage))
        with torch.no_grad():
            distribution, pull_actor = self.actor.vjp(batch.obs)
            value, pull_critic = self.critic.vjp(batch.obs)
            log_prob = distribution.log_prob(batch.action)
            coefficient = self.coefficient(log_prob, batch)
            gradient = coefficient.unsqueeze(-1) * distribution.log_prob_gradient(batch.action)
            if cfg.entropy_coef > 0:
                gradient -= cfg.entropy_coef * distribution.entropy_gradient()
            if cfg.value_clip is None:
                error = value_coefficient(value, batch.target)
            else:
                error = clipped_value_coefficient(value, batch.value, batch.target, clip=cfg.value_clip)
            pulled = pull_actor(batch.over_size(gradient)), pull_critic(cfg.value_coef * batch.over_size(error))
            return [each for part in pulled for each in part], log_prob

    def loss(self, batch: Samples) -> tuple[Tensor, Tensor]:
        """Return each seed's loss ``[S]`` on a minibatch, and the actions' new log-probabilities ``[S, B]``."""
        per_sample, log_prob = self.policy_loss(batch)
        return batch.mean(per_sample + self.config.value_coef * self.value_errors(batch)), log_prob

    def policy_loss(self, batch: Samples) -> tuple[Tensor, Tensor]:
        """Return each sample's loss without the critic's, and its action's new log-probability, both ``[S, B]``."""
        cfg = self.config
        if cfg.normalize_advantage == "minibatch":
            batch = dataclasses.replace(batch, advantage=batch.standardized(batch.advantage))
        distribution = self.distribution(batch)
        log_prob = distribution.log_prob(batch.action)
        per_sample = self.surrogate(distribution, log_prob, batch)
        if cfg.entropy_coef > 0:
            per_sample = per_sample - cfg.entropy_coef * distribution.entropy()
        return per_sample, log_prob

    def distribution(self, batch: Samples) -> Distribution:
        """Return the policy's distributions at the batch's states, as the surrogate sees them."""
        found: Distribution = self.actor(batch.obs)
        return found

    def value_errors(self, batch: Samples) -> Tensor:
        """Return each sample's critic loss ``[S, B]``, clipped if configured."""
        value = self.critic(batch.obs)
        if self.config.value_clip is None:
            return value_loss(value, batch.target)
        return clipped_value_loss(value, batch.value, batch.target, clip=self.config.value_clip)

    def permutation(self, epoch: int, size: int) -> Tensor:
        """Draw an order ``[S, size]`` of the batch for one of this iteration's epochs."""
        keys = self._shuffle.uniform(self.iteration * self.config.n_epochs + epoch, (size,))
        return torch.argsort(keys, dim=1, stable=True)

    @torch.no_grad()
    def diagnose(self, samples: Samples) -> Metrics:
        """Compare the new policy with the old one on the whole batch; see the names below.

        ``kl_old_new``, ``kl_new_old`` and their ``max_``: closed-form divergences; ``kl_k3``: its estimate from the
        actions; ``clip_fraction``: share of ratios outside 1 +- 0.2; ``ratio_deviation``: |r - 1|;
        ``surrogate_gain``: mean of (r - 1) A; ``explained_variance``: of the critic before the update.
        """
        new = self.actor(samples.obs)
        old = new.rebuild(samples.parameters)
        log_prob = new.log_prob(samples.action)
        forward, backward = kl(old, new), kl(new, old)
        per_sample = ratio_diagnostics(log_prob, samples.log_prob)
        gain = torch.expm1((log_prob - samples.log_prob).clamp(max=20)) * samples.advantage
        return {
            "kl_old_new": samples.mean(forward),
            "max_kl_old_new": samples.max(forward),
            "kl_new_old": samples.mean(backward),
            "max_kl_new_old": samples.max(backward),
            **{name: samples.mean(values) for name, values in per_sample.items()},
            "max_ratio_deviation": samples.max(per_sample["ratio_deviation"]),
            "surrogate_gain": samples.mean(gain),
            "entropy": samples.mean(new.entropy()),
            "value": samples.mean(samples.value),
            "explained_variance": explained_variance(samples.value, samples.target, samples.weight),
        }

    # ----------------------------------------------------------------------------------------------------- acting

    def policy(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Sample with `noise`, or take the most likely action."""
        distribution: Distribution = self.actor(obs)
        return distribution.mode() if noise is None else distribution.sample(noise)

    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's most likely action as an ordinary module."""
        return self.actor.plain(seed_index)


def _rows(steps: Tensor) -> Tensor:
    """``[S, T, N, ...]`` to ``[S, T * N, ...]``."""
    return steps.flatten(1, 2)


def _time_first(steps: Tensor) -> Tensor:
    """``[S, T, N]`` to ``[T, S * N]``, what the scans take."""
    return steps.movedim(1, 0).flatten(1)
