r"""CQL: soft actor-critic with critics pushed down at sampled actions and up at the logged ones; Cal-QL as an option.

Papers: A. Kumar, A. Zhou, G. Tucker, S. Levine, "Conservative Q-Learning for Offline Reinforcement Learning", NeurIPS
2020, arXiv 2006.04779: eq. (4), CQL(H), and its Lagrangian form [memory]; M. Nakamoto et al., "Cal-QL: Calibrated
Offline RL Pre-Training for Efficient Online Fine-Tuning", NeurIPS 2023, arXiv 2303.05479: eq. (5.1) [memory].
Reference code: aviralkumar2907/CQL (defaults, ``"min_max"``, ``gap_scale="penalty"``), young-geng/CQL and
corl-team/CORL (order of a step, presets, ``"max_min"``, ``gap_scale="difference"``), nakamotoo/Cal-QL.

    gap_j = T log sum_i exp(x_i / T) - Q_j(s, a),               x_i = Q_j(s, a_i) - log q_i(a_i) for 3 n actions a_i:
            n of each distribution q: uniform on the box, pi(.|s'), pi(.|s); densities are those of the unit action
    y     = r + gamma (1 - d) min_j Q'_j(s', a'),                                                     a' ~ pi(.|s')
    L_Q   = sum_j mean (Q_j(s, a) - y)^2 + alpha_c mean gap_j
    L_pi  = mean (alpha log pi(a~|s) - min_j Q_j(s, a~)),                                             a~ ~ pi(.|s)
    L_alpha  = -log alpha mean (log pi(a~|s) + H)                                                     H = -d_a
    Cal-QL:    max(Q_j(s, a_i), G) for Q_j(s, a_i) at the policy's 2 n actions, G the row's discounted return to go

`target_gap` tau makes the penalty's weight a multiplier alpha' >= 0 of the constraint gap <= tau: the penalty is
``alpha' alpha_c (gap - tau)`` or ``alpha' (alpha_c gap - tau)`` (`gap_scale`), which alpha' climbs.

All losses of a step are taken at the parameters from before it (CORL's and young-geng's order); then the target critics
follow by Polyak averaging. The gap is log(3 n) larger than with the mean over the actions, which changes no gradient.

Deviations and choices:
1. The authors' step differs in its order (alpha moves first).
2. Their first 40 000 policy steps maximise the likelihood of the logged actions (`bc_steps`), the policy's mean clipped
   to +-9; they call it immaterial, and the others leave it out. It is the default of the authors' presets only, without
   the clipping.
3. Last layers begin near 0, as CORL's: Xavier with gain 0.01 (orthogonal where `init` is); the authors' are uniform in
   +-1e-3 (policy) and +-3e-3 (critics), and their hidden weights uniform in +-1/16 in every layer, with biases 0.1.
   CORL learns a scale and an offset (-1 at first) of the log standard deviation; here the offset is the last bias's
   first value, `initial_log_std`, and there is no scale.
4. ``backup_entropy`` subtracts alpha log pi(a'|s') from the target's value: off in all of the presets.
5. CORL's offline code gives 5 hidden layers to the first critic only; here to both.
6. Cal-QL's authors compute the returns of experienced rows too, once their episode has ended; CORL takes 0 for them.
   Here they have no bound. A cut episode counts as if nothing came after it (theirs); `sparse_reward` makes one of
   nothing but the lowest reward go on for ever (theirs on AntMaze and Adroit).
7. By default every row with a known successor is used; CORL's runs had D4RL's q-learning rows,
   ``view="d4rl_qlearning"``.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..core.actor_critic import critic_loss, entropy_coefficient_loss, sac_policy_loss, td_target, weighted_mean
from ..core.agent import Metrics, adam, descend
from ..core.config import OfflineConfig, Preset
from ..core.dataset import Batch, Transitions
from ..core.distributions import DiagonalGaussian, SquashedGaussian
from ..core.networks import Critics, polyak_update
from ..core.offline_agent import OfflineAgent
from ..core.policies import SquashedGaussianPolicy
from ..kernels.scans import backward_recursion

LARGEST_MULTIPLIER = 1e6
"""The Lagrange multiplier is capped here, in all of the published codes."""


@dataclass(frozen=True, kw_only=True)
class CQLConfig(OfflineConfig):
    """CQL's settings; defaults are the authors' for MuJoCo locomotion, without their `bc_steps`.

    Attributes:
        actor_hidden: widths of the policy's hidden layers; ``None`` for those of `hidden`.
        init, actor_init: ``"torch"`` or ``"orthogonal"`` initialisation of the critics and of the policy.
        critic_layer_norm: whether the critics have a LayerNorm before every ReLU.
        log_std_range: clip of the policy's log standard deviation, before the tanh.
        initial_log_std: that logarithm at first.
        action_margin: logged actions are clipped this far (in half-ranges) inside the box, in [0, 1).
        discount: gamma in [0, 1).
        tau: Polyak rate in (0, 1] of the target critics.
        actor_lr, critic_lr: Adam's step sizes, > 0; alpha has the policy's, the Lagrange multiplier the critics'.
        entropy_coef: alpha >= 0, in units of reward; 0 maximises the value alone, a large one plays at random.
            ``None`` tunes it, from 1 on, so that the policy's entropy stays near `target_entropy`.
        target_entropy: of the unit action, in nats; ``None`` for -d_a.
        backup_entropy: whether critics value the policy's entropy in the next state.
        max_backup: ``"none"`` takes one next action; ``"max_min"`` and ``"min_max"`` the best of `n_actions`, judged by
            the smaller critic or by each critic for itself.
        conservative_weight: alpha_c >= 0; 0 is SAC on the data, a large one makes values of unseen actions vanish.
        n_actions: n >= 1, actions drawn from each of the three distributions.
        temperature: T > 0; small ones push at the best action alone, large ones at all alike.
        difference_floor: each row's gap is clipped to at least this; ``None`` for no clip.
        target_gap: tau of the Lagrangian form; ``None`` for a constant weight.
        gap_scale: what tau bounds: ``"difference"``, the gap, or ``"penalty"``, alpha_c times the gap.
        initial_multiplier: alpha' at first, > 0.
        bc_steps: first steps >= 0 in which the policy maximises the logged actions' likelihood instead of their value.
        calibrated: whether values at the policy's actions are bounded below by the return to go: Cal-QL.
        sparse_reward: whether, for that bound, an episode with no other reward than the lowest of the data and no
            termination is taken to go on like that for ever.
    """

    hidden: tuple[int, ...] = (256, 256, 256)
    state_transform: str = "none"
    actor_hidden: tuple[int, ...] | None = None
    init: Literal["torch", "orthogonal"] = "torch"
    actor_init: Literal["torch", "orthogonal"] = "torch"
    critic_layer_norm: bool = False
    log_std_range: tuple[float, float] = (-5.0, 2.0)
    initial_log_std: float = 0.0
    action_margin: float = 0.0
    discount: float = 0.99
    tau: float = 0.005
    actor_lr: float = 1e-4
    critic_lr: float = 3e-4
    entropy_coef: float | None = None
    target_entropy: float | None = None
    backup_entropy: bool = False
    max_backup: Literal["none", "max_min", "min_max"] = "none"
    conservative_weight: float = 5.0
    n_actions: int = 10
    temperature: float = 1.0
    difference_floor: float | None = None
    target_gap: float | None = None
    gap_scale: Literal["difference", "penalty"] = "difference"
    initial_multiplier: float = 1.0
    bc_steps: int = 0
    calibrated: bool = False
    sparse_reward: bool = False

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("actor_hidden", self.actor_hidden is None or min(self.actor_hidden, default=0) >= 1, "widths >= 1")
        self.require("log_std_range", self.log_std_range[0] < self.log_std_range[1], "an increasing pair")
        self.require("action_margin", 0 <= self.action_margin < 1, "in [0, 1)")
        self.require("discount", 0 <= self.discount < 1, "in [0, 1)")
        self.require("tau", 0 < self.tau <= 1, "in (0, 1]")
        for name in ("actor_lr", "critic_lr", "temperature", "initial_multiplier"):
            self.require(name, getattr(self, name) > 0, "> 0")
        self.require("entropy_coef", self.entropy_coef is None or self.entropy_coef >= 0, ">= 0, or None")
        alone = not self.backup_entropy or self.max_backup == "none"
        self.require("backup_entropy", alone, "False where max_backup takes the best of several actions")
        tuned = self.entropy_coef is None or self.target_entropy is None
        self.require("target_entropy", tuned, "None where entropy_coef is fixed")
        for name, unused in (("gap_scale", "difference"), ("initial_multiplier", 1.0)):
            lagrangian = self.target_gap is not None or getattr(self, name) == unused
            self.require(name, lagrangian, f"{unused!r} unless there is a target_gap")
        self.require("conservative_weight", self.conservative_weight >= 0, ">= 0")
        self.require("n_actions", self.n_actions >= 1, ">= 1")
        self.require("bc_steps", self.bc_steps >= 0, ">= 0")
        self.require("sparse_reward", self.calibrated or not self.sparse_reward, "False unless calibrated")


# Losses are written for one seed; every axis in front of those named is a batch of independent seeds.


def conservative_gap(
    q: Tensor, q_sampled: Tensor, log_density: Tensor, temperature: float, floor: float | None = None
) -> Tensor:
    """``T log sum_i exp((Q(s, a_i) - log q_i(a_i)) / T) - Q(s, a)``, clipped to at least `floor`.

    Takes ``[..., B]``, ``[..., N, B]`` and ``[..., N, B]`` for N sampled actions; shape ``[..., B]``.
    """
    gap = temperature * torch.logsumexp((q_sampled - log_density) / temperature, -2) - q
    return gap if floor is None else gap.clamp(min=floor)


def return_to_go(data: Transitions, discount: float, *, sparse_reward: bool = False) -> Tensor:
    """Sum up ``r_t + gamma r_{t+1} + ...`` to the end of each row's episode, ``[N]``.

    With `sparse_reward`, rows of an episode that never terminated and held nothing but the data's lowest reward r get
    ``r / (1 - gamma)``: failure that goes on.
    """
    goes_on = torch.zeros_like(data.reward)
    goes_on[:-1] = (data.episode[1:] == data.episode[:-1]).to(goes_on.dtype)
    returns = backward_recursion(data.reward.contiguous(), discount * goes_on)
    if not sparse_reward:
        return returns
    lowest = data.reward.min()
    other = ((data.reward > lowest) | (data.terminated > 0)).to(goes_on.dtype)
    others = torch.zeros(int(data.episode.max()) + 1, dtype=other.dtype, device=other.device)
    failed = others.index_add_(0, data.episode, other)[data.episode] == 0
    return torch.where(failed, lowest / (1 - discount), returns)


class PolicyInputs(NamedTuple):
    """What the policy sees of a batch, and what the method wants of it.

    Attributes:
        obs, next_obs: inputs ``[S, B, k]`` of the policy's network at s and at s'.
        value_weight: factor ``[S, B]`` of the value in the policy's loss; ``None`` for ones.
        metrics: diagnostics.
    """

    obs: Tensor
    next_obs: Tensor
    value_weight: Tensor | None
    metrics: Metrics


C = TypeVar("C", bound=CQLConfig)


class ConservativeAgent(OfflineAgent[C]):
    """Networks and update of CQL, with a seam for what the policy sees beside the state."""

    _returns: Tensor | None = None

    @property
    def actor_input_dim(self) -> int:
        """Numbers that the policy's network sees: d_s unless overridden."""
        return self.problem.observation_dim

    def policy_inputs(self, batch: Batch) -> PolicyInputs:
        """Return what the policy sees: the states, unless overridden."""
        return PolicyInputs(batch.obs, batch.next_obs, None, {})

    # ------------------------------------------------------------------------------------------------ networks

    def build(self) -> None:
        """Make policy, critics, target critics, the coefficients that are tuned, and their optimisers."""
        cfg = self.config
        self.actor, self.critic, self.critic_target = self.make_actor(), self.make_critics(), self.make_critics()
        self.networks = nn.ModuleDict({"actor": self.actor, "critic": self.critic, "critic_target": self.critic_target})
        self.optimizers = {
            "actor": adam(self.actor.parameters(), cfg.actor_lr),
            "critic": adam(self.critic.parameters(), cfg.critic_lr),
        }
        coefficient = 1.0 if cfg.entropy_coef is None else cfg.entropy_coef
        self.target_entropy = float(-self.problem.action_dim) if cfg.target_entropy is None else cfg.target_entropy
        self._coefficient = torch.full((len(self.seeds),), coefficient, dtype=self.dtype, device=self.device)
        if cfg.entropy_coef is None:
            self.log_coefficient = nn.Parameter(self._coefficient.log())
            self.networks.register_parameter("log_entropy_coef", self.log_coefficient)
            self.optimizers["entropy"] = adam([self.log_coefficient], cfg.actor_lr)
        if cfg.target_gap is not None:
            self.log_multiplier = nn.Parameter(torch.full_like(self._coefficient, math.log(cfg.initial_multiplier)))
            self.networks.register_parameter("log_multiplier", self.log_multiplier)
            self.optimizers["multiplier"] = adam([self.log_multiplier], cfg.critic_lr)
        self._normals, self._uniforms = self.stream("actions"), self.stream("uniform actions")

    def make_actor(self) -> SquashedGaussianPolicy:
        """Make the policy."""
        cfg, d_a = self.config, self.problem.action_dim
        output: Literal["orthogonal", "xavier"] = "orthogonal" if cfg.actor_init == "orthogonal" else "xavier"
        net = self.mlp(
            "actor",
            self.actor_input_dim,
            2 * d_a,
            hidden=cfg.actor_hidden,
            init=cfg.actor_init,
            output_init=output,
            output_gain=0.01,
        )
        with torch.no_grad():
            net.biases[-1][:, d_a:] = cfg.initial_log_std
        return SquashedGaussianPolicy(net, self.box, cfg.log_std_range)

    def make_critics(self) -> Critics:
        """Make twin critics; from the same stream, so equal at every call."""
        cfg = self.config
        output: Literal["orthogonal", "xavier"] = "orthogonal" if cfg.init == "orthogonal" else "xavier"
        net = self.mlp(
            "critic",
            self.problem.observation_dim + self.problem.action_dim,
            1,
            members=2,
            init=cfg.init,
            output_init=output,
            output_gain=0.01,
            layer_norm="before" if cfg.critic_layer_norm else "none",
        )
        return Critics(net)

    def on_data(self, data: Transitions) -> None:
        """Sum up the return to go of every row, and none for rows that are not of the data (index -1)."""
        cfg = self.config
        if cfg.calibrated:
            returns = return_to_go(data, cfg.discount, sparse_reward=cfg.sparse_reward)
            self._returns = torch.cat([returns, returns.new_tensor([-torch.inf])])

    # -------------------------------------------------------------------------------------------------- update

    def update(self, batch: Batch) -> Metrics:
        """Take a step on every loss, each at the parameters from before, then move the target critics."""
        cfg = self.config
        batch = batch._replace(action=self.box.clip(batch.action, margin=cfg.action_margin))
        inputs = self.policy_inputs(batch)
        here = self.actor(inputs.obs)
        n, n_next = cfg.n_actions, 1 if cfg.max_backup == "none" else cfg.n_actions
        noise = self._normals.normal(self.step, (1 + n_next + 2 * n, *batch.action.shape[1:]))
        for_policy, for_target, for_penalty = noise.split([1, n_next, 2 * n], 1)
        with torch.no_grad():
            next_policy = self.actor(inputs.next_obs)
            target = self.target(batch, next_policy, for_target)
            actions, log_density = self.sample_actions(here, next_policy, for_penalty)
        metrics = self._policy_step(batch, inputs.value_weight, here, for_policy.squeeze(1))
        metrics |= self._critic_step(batch, target, actions, log_density)
        polyak_update(self.critic_target, self.critic, cfg.tau)
        return metrics | inputs.metrics

    def target(self, batch: Batch, next_policy: SquashedGaussian, noise: Tensor) -> Tensor:
        """Return ``y [S, B]``, with next actions drawn by `noise` ``[S, n, B, d_a]``."""
        cfg = self.config
        action, log_prob = drawn(next_policy, noise)
        next_q = self.evaluate(self.critic_target, batch.next_obs, self.box(action))  # [S, 2, n, B]
        best = next_q.amax(2).amin(1) if cfg.max_backup == "min_max" else next_q.amin(1).amax(1)
        if cfg.backup_entropy:
            best = best - self.entropy_coefficient() * log_prob.squeeze(1)
        return td_target(batch.reward, batch.terminated, best, cfg.discount)

    def sample_actions(
        self, here: SquashedGaussian, next_policy: SquashedGaussian, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw n actions from each of: uniform, policy at s', policy at s (`noise` ``[S, 2 n, B, d_a]``).

        Returns them in the box, ``[S, 3 n, B, d_a]``, and the log-densities of the unit actions, ``[S, 3 n, B]``.
        """
        n = self.config.n_actions
        uniform = 2 * self._uniforms.uniform(self.step, (n, *noise.shape[2:])) - 1
        at_next, next_log_prob = drawn(next_policy, noise[:, :n])
        at_own, own_log_prob = drawn(here, noise[:, n:])
        uniform_log_density = torch.full_like(own_log_prob, -uniform.shape[-1] * math.log(2))
        actions = self.box(torch.cat([uniform, at_next, at_own], 1))
        return actions, torch.cat([uniform_log_density, next_log_prob, own_log_prob], 1)

    def evaluate(self, critic: Critics, obs: Tensor, actions: Tensor) -> Tensor:
        """Evaluate ``n`` actions ``[S, n, B, d_a]`` at each state ``[S, B, d_s]`` in one call: ``[S, 2, n, B]``."""
        n = actions.shape[1]
        states = obs.unsqueeze(1).expand(-1, n, -1, -1)
        values: Tensor = critic(states.flatten(1, 2), actions.flatten(1, 2))
        return values.view(*values.shape[:2], n, -1)

    def _critic_step(self, batch: Batch, target: Tensor, actions: Tensor, log_density: Tensor) -> Metrics:
        cfg = self.config
        values = self.evaluate(self.critic, batch.obs, torch.cat([batch.action.unsqueeze(1), actions], 1))
        q, q_sampled = values[:, :, 0], values[:, :, 1:]
        metrics: Metrics = {}
        if self._returns is not None:
            bound = self._returns[batch.index][:, None, None]  # [S, 1, 1, B]
            from_uniform, from_policy = q_sampled.split([cfg.n_actions, 2 * cfg.n_actions], 2)
            metrics["bounded_fraction"] = (from_policy.detach() < bound).to(q.dtype).mean((1, 2, 3))
            q_sampled = torch.cat([from_uniform, torch.maximum(from_policy, bound)], 2)
        row_weight = None if batch.weight is None else batch.weight.unsqueeze(1)
        rows = conservative_gap(q, q_sampled, log_density.unsqueeze(1), cfg.temperature, cfg.difference_floor)
        gap = weighted_mean(rows, row_weight)  # [S, 2]
        penalty, multiplier = self._penalty(gap)
        loss = critic_loss(q, target, batch.weight) + penalty
        descend(self.optimizers["critic"], loss)
        return {
            "critic_loss": loss.detach(),
            "gap": gap.detach().mean(1),
            "q": q.detach().mean((1, 2)),
            "target": target.mean(1),
            **multiplier,
            **metrics,
        }

    def _penalty(self, gap: Tensor) -> tuple[Tensor, Metrics]:
        """Return the critics' penalty ``[S]`` for the gaps ``[S, 2]``; step the Lagrange multiplier if there is one."""
        cfg = self.config
        if cfg.target_gap is None:
            return cfg.conservative_weight * gap.sum(1), {}
        if cfg.gap_scale == "difference":
            excess = (cfg.conservative_weight * (gap - cfg.target_gap)).sum(1)
        else:
            excess = (cfg.conservative_weight * gap - cfg.target_gap).sum(1)
        multiplier = self.log_multiplier.exp().clamp(max=LARGEST_MULTIPLIER)
        constant = multiplier.detach()
        descend(self.optimizers["multiplier"], -0.5 * multiplier * excess.detach())
        return constant * excess, {"multiplier": constant}

    def _policy_step(self, batch: Batch, value_weight: Tensor | None, here: SquashedGaussian, noise: Tensor) -> Metrics:
        latent, log_densities = here.draw(noise)
        log_prob = log_densities.sum(-1)
        coefficient = self.entropy_coefficient()
        if self.step < self.config.bc_steps:
            unit = self.box.unit(batch.action).clamp(-1 + 1e-6, 1 - 1e-6)  # in these units a bound is never rounded to
            gain = here.log_densities(torch.atanh(unit)).sum(-1)
        else:
            gain = self.critic.constant(batch.obs, self.box(torch.tanh(latent))).amin(1)
            gain = gain if value_weight is None else value_weight * gain
        loss = weighted_mean(sac_policy_loss(log_prob, gain, coefficient), batch.weight)
        descend(self.optimizers["actor"], loss)
        if self.config.entropy_coef is None:
            dual = entropy_coefficient_loss(self.log_coefficient, log_prob, self.target_entropy, batch.weight)
            descend(self.optimizers["entropy"], dual)
        return {
            "policy_loss": loss.detach(),
            "entropy": -log_prob.detach().mean(1),
            "entropy_coef": coefficient.squeeze(1),
        }

    def entropy_coefficient(self) -> Tensor:
        """Return alpha as a constant ``[S, 1]``."""
        tuned = self.config.entropy_coef is None
        return (self.log_coefficient.detach().exp() if tuned else self._coefficient).unsqueeze(1)

    # -------------------------------------------------------------------------------------------------- acting

    def policy(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Sample with `noise`, or play the squashed mean."""
        distribution = self.actor(obs)
        action: Tensor = self.box(distribution.mode() if noise is None else distribution.sample(noise))
        return action

    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's squashed mean as an ordinary module."""
        return self.actor.plain(seed_index)


def drawn(policy: SquashedGaussian, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw n unit actions ``[S, n, B, d_a]`` by `noise` of that shape; also return their log-densities ``[S, n, B]``.

    `policy` has the parameters ``[S, B, d_a]``.
    """
    base = policy.base
    repeated = SquashedGaussian(DiagonalGaussian(base.mean.unsqueeze(1), base.log_std.unsqueeze(1)))
    latent, log_densities = repeated.draw(noise)
    return torch.tanh(latent), log_densities.sum(-1)


_CORL = {
    "init": "orthogonal",
    "log_std_range": (-20.0, 2.0),
    "initial_log_std": -1.0,
}
_CORL_LOCOMOTION = _CORL | {"state_transform": "standardize", "actor_lr": 3e-5, "conservative_weight": 10.0}
_CORL_ANTMAZE = _CORL | {
    "reward_transform": "antmaze_cql_corl",
    "max_backup": "max_min",
    "target_gap": 0.8,
    "initial_multiplier": math.e,
}


class CQL(ConservativeAgent[CQLConfig]):
    """CQL (Kumar et al., 2020) and Cal-QL (Nakamoto et al., 2023); see the module's head."""

    algorithm: ClassVar[str] = "offline.cql"
    config_type = CQLConfig
    claims: ClassVar[tuple[str, ...]] = ("OFF-02a", "OFF-02b", "OFF-02c")
    presets: ClassVar[dict[str, Preset]] = {
        "locomotion": Preset(
            {"bc_steps": 40_000}, "aviralkumar2907/CQL README and cql_mujoco_new.py, alpha_c 5 of its '5 or 10' [code]"
        ),
        "antmaze": Preset(
            {
                "bc_steps": 40_000,
                "reward_transform": "antmaze_cql",
                "target_gap": 5.0,
                "gap_scale": "penalty",
            },
            "aviralkumar2907/CQL README and cql_antmaze_new.py [code]",
        ),
        "corl": Preset(_CORL_LOCOMOTION, "corl-team/CORL configs/offline/cql, locomotion [code]"),
        "corl-hopper-medium": Preset(
            _CORL_LOCOMOTION | {"reward_transform": "return_range_corl"},
            "corl-team/CORL configs/offline/cql, hopper-medium [code]",
        ),
        "corl-adroit": Preset(
            _CORL | {"state_transform": "standardize", "conservative_weight": 1.0},
            "corl-team/CORL configs/offline/cql, pen, door, hammer and relocate [code]",
        ),
        "corl-antmaze": Preset(
            _CORL_ANTMAZE | {"hidden": (256,) * 5, "actor_hidden": (256,) * 3, "difference_floor": -200.0},
            "corl-team/CORL configs/offline/cql, antmaze [code], with choice 5",
        ),
        "corl-maze2d": Preset(
            _CORL_LOCOMOTION | {"target_gap": 5.0, "initial_multiplier": math.e},
            "corl-team/CORL configs/offline/cql, maze2d [code]",
        ),
        "cal-ql-antmaze": Preset(
            _CORL_ANTMAZE
            | {"hidden": (256,) * 4, "actor_hidden": (256, 256), "actor_init": "orthogonal", "action_margin": 1e-5}
            | {"calibrated": True, "sparse_reward": True},
            "nakamotoo/Cal-QL scripts/run_antmaze.sh [code]",
        ),
    }
