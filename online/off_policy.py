r"""The base of off-policy actor-critic methods: act, remember, take gradient steps on what is remembered.

One iteration: (1) `train_every` steps of every environment, with actions drawn uniformly from the action box until
`learning_starts` steps are taken and from the policy afterwards; (2) the transitions join the replay
(:class:`~corollary.core.replay.Replay`); (3) after the warm-up, `gradient_steps` times :meth:`OffPolicyAgent.update` on
a uniform batch. A method defines its networks beside actor and critics, and the update.

Updates see normalised states, and actions in units of the box, (-1, 1): critics are functions of the unit action, and
densities are those of the unit action.

All seeds advance together: every tensor of a batch leads with ``[S, B]``.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..core.agent import Metrics, adam
from ..core.checkpoint import below
from ..core.dataset import Batch
from ..core.errors import EnvironmentMismatchError
from ..core.networks import ActionBox, Critics
from ..core.online_agent import OnlineAgent, OnlineConfig
from ..core.policies import Actor, SquashedGaussianPolicy
from ..core.replay import Replay
from ..core.rollout import Collector, Rollout


@dataclass(frozen=True, kw_only=True)
class OffPolicyConfig(OnlineConfig):
    """What every off-policy method shares; the defaults are SAC's.

    Attributes:
        buffer_size: transitions of each seed that are remembered, and saved with the agent, >= 1; the oldest are
            forgotten first.
        learning_starts: environment steps of a seed with uniform actions and without learning, >= 0.
        train_every: steps of each environment per iteration, >= 1.
        gradient_steps: gradient steps per iteration, >= 1; one for each environment step is
            ``n_envs * train_every``. More of them use the data better and lean more on the critics.
        batch_size: rows per gradient step, drawn uniformly with replacement, >= 1.
        discount: gamma in [0, 1).
        tau: Polyak rate in (0, 1] of target networks; 1 copies the online networks.
        actor_lr, critic_lr: Adam's step sizes, > 0.
        hidden: widths of the hidden layers of every network.
        log_std_range: interval of the logarithm of the policy's standard deviation, before the tanh.
        log_std_bound: ``"clip"``, or ``"tanh"`` for a smooth map of the network's output onto that interval.
    """

    buffer_size: int = 1_000_000
    learning_starts: int = 10_000
    train_every: int = 1
    gradient_steps: int = 1
    batch_size: int = 256
    discount: float = 0.99
    tau: float = 0.005
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    hidden: tuple[int, ...] = (256, 256)
    log_std_range: tuple[float, float] = (-20.0, 2.0)
    log_std_bound: Literal["clip", "tanh"] = "clip"

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        for name in ("buffer_size", "train_every", "gradient_steps", "batch_size"):
            self.require(name, getattr(self, name) >= 1, ">= 1")
        self.require("learning_starts", self.learning_starts >= 0, ">= 0")
        self.require("discount", 0 <= self.discount < 1, "in [0, 1)")
        self.require("tau", 0 < self.tau <= 1, "in (0, 1]")
        for name in ("actor_lr", "critic_lr"):
            self.require(name, getattr(self, name) > 0, "> 0")
        self.require("hidden", len(self.hidden) >= 1 and min(self.hidden) >= 1, "one or more positive widths")
        self.require("log_std_range", self.log_std_range[0] < self.log_std_range[1], "an increasing pair")


C = TypeVar("C", bound=OffPolicyConfig)


class OffPolicyAgent(OnlineAgent[C]):
    """Collection, replay, actor and twin critics; a method defines its update.

    Attributes:
        actor: the tanh-squashed Gaussian policy.
        critic: two values ``Q_m(s, a)`` of unit actions.
        replay: what was experienced, in the units of the environment.
        action_box: the bounded action box.
    """

    actor: SquashedGaussianPolicy
    critic: Critics
    replay: Replay
    action_box: ActionBox

    @abstractmethod
    def update(self, batch: Batch, index: int) -> Metrics:
        """Take one gradient step for all seeds; `index` grows by one from call to call and addresses random numbers."""

    # ---------------------------------------------------------------------------------------------- the iteration

    def build(self) -> None:
        """Make actor, critics, their optimisers and the replay.

        Raises:
            EnvironmentMismatchError: if actions are not continuous and bounded.
        """
        cfg, problem = self.config, self.problem
        self.action_box = self._bounded_box()
        self.actor, self.critic = self.make_actor(), self.make_critics()
        self.networks = nn.ModuleDict({"actor": self.actor, "critic": self.critic})
        self.optimizers = {
            "actor": adam(self.actor.parameters(), cfg.actor_lr),
            "critic": adam(self.critic.parameters(), cfg.critic_lr),
        }
        self.replay = Replay(
            self.seeds, cfg.buffer_size, problem.observation_dim, problem.action_dim, self.device, self.dtype
        )
        self._collector: Collector | None = None
        self._warmup, self._exploration = self.stream("warm-up"), self.stream("action")
        self.update_noise = self.stream("update")

    def make_actor(self) -> SquashedGaussianPolicy:
        """Make a policy; from the same streams, so equal at every call."""
        cfg = self.config
        net = self.mlp("actor", self.problem.observation_dim, 2 * self.problem.action_dim)
        return SquashedGaussianPolicy(net, self.action_box, cfg.log_std_range, cfg.log_std_bound)

    def make_critics(self) -> Critics:
        """Make twin critics, likewise equal at every call."""
        return Critics(self.mlp("critic", self.problem.observation_dim + self.problem.action_dim, 1, members=2))

    @property
    def warm_up(self) -> int:
        """Environment steps per seed before the first gradient step."""
        return self.config.learning_starts

    def iterate(self, progress: float) -> Metrics:
        """Collect, remember, and after the warm-up learn; return the diagnostics of the last gradient step."""
        cfg = self.config
        self.remember(self.collect())
        metrics: Metrics = {}
        if self.step >= cfg.learning_starts:
            first = self.iteration * cfg.gradient_steps
            for index in range(first, first + cfg.gradient_steps):
                metrics |= self.update(self.sample(index), index)
        self.iteration += 1
        return metrics

    def collect(self) -> Rollout:
        """Take `train_every` steps of every environment."""
        cfg = self.config
        if self.step < cfg.learning_starts:
            shape = (cfg.train_every, cfg.n_envs, self.problem.action_dim)
            noise, act = self._warmup.uniform(self.iteration, shape), self._uniform_actor()
        else:
            noise, act = self.exploration_noise(), self.actor.actor()
        return self.go_on(act, noise)

    def exploration_noise(self) -> Tensor:
        """Draw the noise ``[S, train_every, n_envs, d_a]`` that the policy collects with."""
        return self.draw_action_noise(self._exploration, self.iteration, self.config.train_every, self.config.n_envs)

    def remember(self, rollout: Rollout) -> None:
        """Append the rollout's transitions to the replay."""
        self.replay.add(
            obs=rollout.raw_obs.flatten(1, 2),
            action=rollout.action.flatten(1, 2),
            reward=rollout.raw_reward.flatten(1, 2),
            next_obs=rollout.raw_next_obs.flatten(1, 2),
            terminated=rollout.terminated.flatten(1, 2),
            valid=None if rollout.valid is None else rollout.valid.flatten(1, 2),
        )

    def sample(self, index: int) -> Batch:
        """Draw the batch of gradient step `index` as updates see it."""
        batch = self.replay.sample(index, self.config.batch_size)
        action = self.action_box.unit(batch.action)
        return batch._replace(
            obs=self.normalize(batch.obs),
            next_obs=self.normalize(batch.next_obs),
            action=action,
            next_action=action,
        )

    # ------------------------------------------------------------------------------------------- acting and state

    def policy(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Sample with `noise`, or play the squashed mean."""
        distribution = self.actor(obs)
        action: Tensor = self.action_box(distribution.mode() if noise is None else distribution.sample(noise))
        return action

    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's squashed mean as an ordinary module."""
        return self.actor.plain(seed_index)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return normalisers, environments, recent returns and the replay."""
        return super().extra_tensors() | {f"replay/{name}": tensor for name, tensor in self.replay.state().items()}

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`extra_tensors` returned."""
        super().load_extra_tensors(tensors)
        self.replay.load_state(below("replay/", tensors))

    def lean_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the state without what was experienced, the replay empty."""
        description, tensors = super().lean_state()
        return description, tensors | {f"extra/replay/{name}": t for name, t in self.replay.empty_state().items()}

    def _bounded_box(self) -> ActionBox:
        name = self.problem.env_id or "The environment"
        if self.box is None:
            raise EnvironmentMismatchError(
                f"{name} has the discrete action space {self.problem.actions.space}, but {self.algorithm} needs "
                "continuous actions: use online.ppo or another on-policy method, which take both."
            )
        if not bool((torch.isfinite(self.box.half_range) & (self.box.half_range > 0)).all()):
            raise EnvironmentMismatchError(
                f"{name} has the action space {self.problem.actions.space}, but {self.algorithm} squashes its actions "
                "into a box and needs finite bounds low < high: wrap it in gymnasium.wrappers.TransformAction with "
                "such a space, or use online.ppo."
            )
        return self.box

    def _uniform_actor(self) -> Actor:
        low, high = self.problem.actions.low, self.problem.actions.high

        def act(obs: NDArray[Any], noise: NDArray[Any]) -> NDArray[Any]:
            action: NDArray[Any] = low + (high - low) * noise
            return action

        return act
