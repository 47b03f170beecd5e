r"""PROPS: a behaviour policy that makes the data of the last batches look as if the current policy had sampled them.

Paper: N. E. Corrado, J. P. Hanna, "On-Policy Policy Gradient Reinforcement Learning Without On-Policy Sampling", arXiv
2311.08290.
Reference code: NicholasCorrado/PPOROS, ppo_props_continuous.py; NicholasCorrado/PROPS, ppo_discrete.py.

What a policy gradient needs is data distributed as the target policy pi_theta would distribute it, whoever sampled
it. A buffer D keeps the last b batches of n steps. After every m steps the behaviour policy pi_phi starts again at
theta and makes the actions that are too frequent in D less likely, so that the next m steps bring what is missing:

    L(phi) = mean_D max(r, clip(r, 1 - eps, 1 + eps)) + lambda mean_D KL(pi_theta || pi_phi),
    r      = pi_phi(a|s) / pi_theta(a|s)

A sample with r < 1 - eps has no gradient in the first term: no action is pushed further down than that.

An iteration of n steps: (1) m steps with pi_phi join D, the oldest leave it; (2) unless that made n steps, pi_phi is
adapted and (1) repeated; (3) PPO improves theta on the whole of D, observations and rewards normalised again with the
statistics of now, log-probabilities, values and advantages computed again with the theta of now: D is treated as
on-policy, the ratio begins at 1 on old data too; (4) pi_phi is adapted. The steps that leave D next take no part in
adapting. pi_phi has one Adam for the whole run, whose moments survive phi's return to theta.

Old batches were sampled with older policies; how far D is from on-policy data, whatever the reason, is measured by
:func:`sampling_error`. With ``behaviour_epochs=0`` pi_phi is pi_theta and this is PPO with a buffer, the paper's
baseline; ``buffer_batches=1`` besides is PPO.

Deviations and choices:
1. The released continuous code has KL(pi_phi || pi_theta), averaged over the action's components; its lambda means
   that. The defaults are the paper's form; the presets have the code's (`kl_direction`, `kl_reduce`).
2. There, pi_theta's log-probabilities in L are those from before step (3), so that after it r is not 1 at phi = theta
   and the divergence may stop the adaptation at once: `stale_target_logp`, in the presets only.
3. Discrete actions have the full closed-form KL; the released discrete code has none.
4. A time limit does not end the value; in the presets it does, as released.
5. A last minibatch that is too short joins the one before it.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.agent import Metrics, adam, descend
from ..core.config import Preset
from ..core.distributions import Distribution, kl
from ..core.optimisers import SeedwiseAdam
from ..core.policies import Policy
from ..core.rollout import Rollout
from ..kernels.mlp import mlp
from .objectives import kl_estimate, ppo_clip_coefficient, ppo_clip_loss, props_loss
from .on_policy import OnPolicyAgent, OnPolicyConfig, Samples


@dataclass(frozen=True, kw_only=True)
class PROPSConfig(OnPolicyConfig):
    """PROPS' settings beyond the base's; the defaults are the paper's for Hopper.

    `n_steps` is n, the environment steps between two PPO updates; `batch_size` and `n_epochs` are PPO's.

    Attributes:
        clip: half-width of PPO's interval of ratios, > 0; see :class:`~corollary.online.PPO`.
        target_kl: divergence of a minibatch before whose step a seed stops its PPO update, > 0; ``None`` never stops.
        buffer_batches: b, batches of n steps in the buffer, >= 1; more data per update, but older.
        behaviour_steps: m, environment steps between two adaptations of the behaviour policy; divides `n_steps`.
        behaviour_epochs: most passes over the buffer per adaptation, >= 0; 0 samples with the target policy.
        behaviour_batch_size: samples per gradient step of the behaviour policy, >= 1.
        behaviour_learning_rate: its Adam's step size, > 0; it is not decayed.
        behaviour_clip: eps in (0, 1): the share of its probability that an action in the buffer can lose before its
            gradient ends.
        behaviour_target_kl: divergence from the target policy on a minibatch before whose step a seed stops adapting,
            > 0; ``None`` never stops.
        kl_coef: lambda >= 0; large keeps the behaviour policy at the target policy.
        kl_direction: ``"target_behaviour"`` is KL(pi_theta || pi_phi), ``"behaviour_target"`` the other order.
        kl_reduce: the ``"sum"`` of KL over the components of the action, or their ``"mean"``.
        stale_target_logp: see deviation 2 above.
        sampling_error_every: iterations between two measurements of :func:`sampling_error` on the buffer, just before
            the PPO update, logged as ``sampling_error``; 0 never measures. It takes longer than the update.
    """

    learning_rate: float = 1e-3
    batch_size: int = 128
    joint_grad_norm: bool = True
    value_clip: float | None = 0.2
    entropy_coef: float = 0.01
    clip: float = 0.2
    target_kl: float | None = 0.03
    buffer_batches: int = 2
    behaviour_steps: int = 256
    behaviour_epochs: int = 16
    behaviour_batch_size: int = 240
    behaviour_learning_rate: float = 1e-3
    behaviour_clip: float = 0.3
    behaviour_target_kl: float | None = 0.05
    kl_coef: float = 0.3
    kl_direction: Literal["target_behaviour", "behaviour_target"] = "target_behaviour"
    kl_reduce: Literal["sum", "mean"] = "sum"
    stale_target_logp: bool = False
    sampling_error_every: int = 0

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        for name in ("buffer_batches", "behaviour_batch_size"):
            self.require(name, getattr(self, name) >= 1, ">= 1")
        for name in ("behaviour_epochs", "kl_coef", "sampling_error_every"):
            self.require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("clip", "behaviour_learning_rate"):
            self.require(name, getattr(self, name) > 0, "> 0")
        for name in ("target_kl", "behaviour_target_kl"):
            value = getattr(self, name)
            self.require(name, value is None or value > 0, "> 0, or None")
        self.require("behaviour_clip", 0 < self.behaviour_clip < 1, "in (0, 1)")
        m, n = self.behaviour_steps, self.n_steps
        self.require("behaviour_steps", m >= 1 and n % m == 0, f"a divisor of n_steps={n}")
        some_stay = m < self.buffer_batches * n
        self.require("behaviour_steps", some_stay, "less than the buffer holds: nothing would be left to adapt to")


_RELEASED = {
    "bootstrap_on_truncation": False,
    "kl_direction": "behaviour_target",
    "kl_reduce": "mean",
    "stale_target_logp": True,
}
_SOURCE = "NicholasCorrado/PPOROS, ppo_props_continuous.py and the paper's settings for {}-v4 [code]"

_RAW = ("raw_obs", "raw_next_obs", "action", "raw_reward", "terminated", "truncated", "valid")
"""What the buffer keeps of a rollout."""


class PROPS(OnPolicyAgent[PROPSConfig]):
    """PPO with proximal robust on-policy sampling (Corrado and Hanna, 2023); see the module's head.

    Acting, evaluation and export use the target policy; only training steps are taken with the behaviour policy.
    """

    algorithm: ClassVar[str] = "online.props"
    config_type = PROPSConfig
    claims: ClassVar[tuple[str, ...]] = ("FND-07a", "FND-07b", "PO-15")
    presets: ClassVar[dict[str, Preset]] = {
        "swimmer": Preset(
            _RELEASED
            | {"behaviour_steps": 1024, "behaviour_batch_size": 192, "behaviour_learning_rate": 1e-5}
            | {"kl_coef": 0.1, "behaviour_target_kl": 0.03},
            _SOURCE.format("Swimmer"),
        ),
        "halfcheetah": Preset(
            _RELEASED
            | {"n_steps": 1024, "batch_size": 64, "learning_rate": 1e-4}
            | {"behaviour_steps": 512, "behaviour_batch_size": 96},
            _SOURCE.format("HalfCheetah"),
        ),
        "hopper": Preset(_RELEASED, _SOURCE.format("Hopper")),
        "walker2d": Preset(
            _RELEASED | {"behaviour_batch_size": 120, "behaviour_target_kl": 0.1}, _SOURCE.format("Walker2d")
        ),
        "ant": Preset(
            _RELEASED | {"learning_rate": 1e-4, "kl_coef": 0.1, "behaviour_target_kl": 0.03, "behaviour_clip": 0.05},
            _SOURCE.format("Ant"),
        ),
        "humanoid": Preset(
            _RELEASED
            | {"n_steps": 8192, "batch_size": 512, "learning_rate": 1e-4}
            | {
                "behaviour_batch_size": 504,
                "behaviour_learning_rate": 1e-4,
                "kl_coef": 0.1,
                "behaviour_target_kl": 0.1,
            },
            _SOURCE.format("Humanoid"),
        ),
    }

    def build(self) -> None:
        """Make the networks; the behaviour policy begins as a copy of the target policy."""
        super().build()
        cfg = self.config
        self.behaviour = copy.deepcopy(self.actor)
        self.networks["behaviour"] = self.behaviour
        self.behaviour_optimizer = SeedwiseAdam(
            {"behaviour": self.behaviour.parameters()},
            cfg.behaviour_learning_rate,
            eps=cfg.adam_eps,
            max_grad_norm=cfg.max_grad_norm,
        )
        self.optimizers["behaviour"] = self.behaviour_optimizer
        self._behaviour_shuffle = self.stream("behaviour minibatch")
        self._buffer: dict[str, Tensor] = {}
        self._adaptations: list[Metrics] = []

    # ----------------------------------------------------------------------------------------- the target policy

    has_coefficient = True

    def surrogate(self, distribution: Distribution, log_prob: Tensor, batch: Samples) -> Tensor:
        """PPO's clipped surrogate."""
        return ppo_clip_loss(log_prob, batch.log_prob, batch.advantage, clip=self.config.clip)

    def coefficient(self, log_prob: Tensor, batch: Samples) -> Tensor:
        """Return the surrogate's derivative."""
        return ppo_clip_coefficient(log_prob, batch.log_prob, batch.advantage, clip=self.config.clip)

    def before_step(self, log_prob: Tensor, batch: Samples, active: list[bool]) -> list[bool]:
        """Stop a seed whose divergence on this minibatch exceeds the target."""
        return _within(self.config.target_kl, log_prob, batch, active)

    def improve(self, samples: Samples, rollout: Rollout) -> Metrics:
        """Improve the target policy on the whole buffer, then adapt the behaviour policy to it."""
        cfg = self.config
        measured: Metrics = {}
        if cfg.sampling_error_every and (self.iteration + 1) % cfg.sampling_error_every == 0:
            measured["sampling_error"] = sampling_error(self.actor, samples.obs, samples.action, samples.weight)
        metrics = super().improve(samples, rollout)
        self._adaptations.append(self.adapt(samples if cfg.stale_target_logp else self.samples_of(rollout)))
        means = {name: torch.stack([each[name] for each in self._adaptations]).mean(0) for name in self._adaptations[0]}
        return metrics | measured | means

    # ------------------------------------------------------------------------------------- the behaviour policy

    def collect(self) -> Rollout:
        """Take `n_steps` steps, the behaviour policy being adapted after every `behaviour_steps`; return the buffer."""
        cfg = self.config
        noise = self.draw_action_noise(self._noise, self.iteration, cfg.n_steps, cfg.n_envs)
        self._adaptations = []
        for count, piece in enumerate(noise.split(cfg.behaviour_steps, 1)):
            if count > 0:
                self._adaptations.append(self.adapt(self.samples_of(self.buffer())))
            self._remember(self.take_steps(self.behaviour, piece))
        return self.buffer()

    def adapt(self, samples: Samples) -> Metrics:
        """Let the behaviour policy return to the target policy and descend L on the samples that stay in the buffer.

        Args:
            samples: the whole buffer, in order, with the target policy's distributions.
        """
        cfg = self.config
        with torch.no_grad():
            self.behaviour_optimizer.blocks["behaviour"].values.copy_(self.optimizer.blocks["actor"].values)
        samples = samples.last(cfg.n_envs * (cfg.buffer_batches * cfg.n_steps - cfg.behaviour_steps))
        active = [True] * len(self.seeds)
        steps = torch.zeros(len(self.seeds), dtype=self.dtype, device=self.device)
        for batch in self._behaviour_batches(samples):
            distribution = self.behaviour(batch.obs)
            log_prob = distribution.log_prob(batch.action)
            active = _within(cfg.behaviour_target_kl, log_prob, batch, active)
            if not any(active):
                break
            per_sample = props_loss(log_prob, batch.log_prob, clip=cfg.behaviour_clip)
            per_sample = per_sample + cfg.kl_coef * self.divergence(distribution, batch)
            self.behaviour_optimizer.step(batch.mean(per_sample), active=active)
            steps += steps.new_tensor(active)
        with torch.no_grad():
            divergence = samples.mean(self.divergence(self.behaviour(samples.obs), samples))
        return {"behaviour_gradient_steps": steps, "behaviour_kl": divergence}

    def divergence(self, behaviour: Distribution, batch: Samples) -> Tensor:
        """Return the KL between target and behaviour policy at each state ``[S, B]``, as configured."""
        target = behaviour.rebuild(batch.parameters)
        found = kl(target, behaviour) if self.config.kl_direction == "target_behaviour" else kl(behaviour, target)
        return found if self.config.kl_reduce == "sum" else found / batch.action.shape[-1]

    def _behaviour_batches(self, samples: Samples) -> Iterator[Samples]:
        """All minibatches of an adaptation, in an order of their own for each pass."""
        cfg = self.config
        adaptation = self.step // (cfg.behaviour_steps * cfg.n_envs)  # one after every m steps
        for epoch in range(cfg.behaviour_epochs):
            keys = self._behaviour_shuffle.uniform(adaptation * cfg.behaviour_epochs + epoch, (len(samples),))
            yield from samples.take(torch.argsort(keys, dim=1, stable=True)).minibatches(cfg.behaviour_batch_size)

    # -------------------------------------------------------------------------------------------------- the buffer

    def buffer(self) -> Rollout:
        """Return the steps of the last b batches, in order, normalised with the statistics as they are now."""
        raw, reward = dict(self._buffer), self._buffer["raw_reward"]
        if self.reward_normaliser is not None:
            scaled = self.reward_normaliser.normalize(reward.double().cpu().numpy())
            reward = torch.as_tensor(scaled, dtype=self.dtype, device=self.device)
        valid = raw.pop("valid")
        return Rollout(
            **raw,
            obs=self.normalize(raw["raw_obs"]),
            next_obs=self.normalize(raw["raw_next_obs"]),
            reward=reward,
            valid=None if valid.all() else valid,
        )

    def _remember(self, piece: Rollout) -> None:
        """Let a piece join the buffer, and the oldest steps leave it."""
        valid = torch.ones_like(piece.terminated) if piece.valid is None else piece.valid
        found = {name: valid if name == "valid" else getattr(piece, name) for name in _RAW}
        if self._buffer:
            old = self._buffer
            # Environments that were made anew do not go on where the buffer ends: an advantage must not cross the cut.
            goes_on = (old["raw_next_obs"][:, -1] == found["raw_obs"][:, 0]).all(-1)
            old["truncated"][:, -1] |= ~(goes_on | old["terminated"][:, -1])
            capacity = self.config.buffer_batches * self.config.n_steps
            found = {name: torch.cat([old[name], new], 1)[:, -capacity:] for name, new in found.items()}
        self._buffer = found

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return normalisers, environments, recent returns and the buffer."""
        return super().extra_tensors() | {f"buffer/{name}": tensor for name, tensor in self._buffer.items()}

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`extra_tensors` returned."""
        super().load_extra_tensors(tensors)
        held = {name: tensors[f"buffer/{name}"] for name in _RAW if f"buffer/{name}" in tensors}
        self._buffer = {name: tensor.to(self.device, copy=True) for name, tensor in held.items()}


def sampling_error(
    policy: Policy,
    obs: Tensor,
    action: Tensor,
    weight: Tensor | None = None,
    *,
    n_steps: int = 2000,
    learning_rate: float = 1e-3,
) -> Tensor:
    """How far data are from what `policy` would sample: ``max_theta' mean log pi_theta' - mean log pi_theta``.

    It is never negative, and in expectation falls as 1 / B for data that the policy sampled: the empirical divergence
    of the policy that explains the data best. As in the paper that policy keeps the hidden layers, and its last layer
    (and log_std) are fitted by Adam from the policy's own; here with the whole batch, and the best step counts. More
    steps fit better: compare values with the same `n_steps` and B only.

    Args:
        policy: pi_theta; it is left as it is.
        obs: normalised states ``[S, B, d_s]``.
        action: ``[S, B, d_a]``.
        weight: 1 for a transition and 0 for a row that is none, ``[S, B]``; ``None`` if all are transitions.
        n_steps: policies tried, the first of them `policy` itself, >= 1.
        learning_rate: Adam's step size, > 0.

    Returns:
        One number per seed, ``[S]``.
    """
    fitted = copy.deepcopy(policy)
    net = fitted.net
    hidden = [*net.weights[:-1], *net.biases[:-1]]
    with torch.no_grad():
        features = obs
        if hidden:
            features = mlp(obs, list(net.weights[:-1]), list(net.biases[:-1]), activation=net.activation)
            features = torch.relu(features) if net.activation == "relu" else torch.tanh(features)
    frozen = {id(parameter) for parameter in hidden}
    optimizer = adam([p for p in fitted.parameters() if id(p) not in frozen], learning_rate)

    def log_likelihood() -> Tensor:
        outputs = torch.baddbmm(net.biases[-1].unsqueeze(1), features, net.weights[-1].mT)
        log_prob = fitted.distribution(outputs).log_prob(action)
        return log_prob.mean(1) if weight is None else (log_prob * weight).sum(1) / weight.sum(1)

    found = []
    for _ in range(n_steps):
        found.append(log_likelihood())
        descend(optimizer, -found[-1])
    values = torch.stack(found).detach()
    return values.amax(0) - values[0]


def _within(limit: float | None, log_prob: Tensor, batch: Samples, active: list[bool]) -> list[bool]:
    """Say which of the active seeds have KL(old || new) of at most `limit` on the minibatch, estimated from actions."""
    if limit is None:
        return active
    divergence = batch.mean(kl_estimate(batch.log_prob, log_prob.detach()))
    return [a and d <= limit for a, d in zip(active, divergence.tolist(), strict=True)]
