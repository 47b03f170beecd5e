"""Agents that learn from an environment: spaces, normalisers, many environments at once, and their exact state."""

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor, nn

from .agent import Agent, Metrics
from .checkpoint import below
from .config import Config
from .environments import Environments, EnvSource, Vectorization, environment_name, is_known, make_environments
from .errors import ConfigError, EnvironmentMismatchError
from .networks import ActionBox
from .normalisers import ObservationNormaliser, RewardNormaliser
from .policies import Actor
from .recent import RecentReturns
from .rollout import Collector, Rollout
from .spaces import Actions, Observations, space_from_json, space_to_json

if TYPE_CHECKING:
    from .evaluation import EnvSource as EvaluationSource
    from .loop import Callback

C = TypeVar("C", bound="OnlineConfig")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(Config):
    """What every algorithm that learns from an environment shares.

    Attributes:
        n_envs: environments of each seed, stepped side by side, >= 1; more of them give less correlated batches.
        vectorization: ``"sync"`` steps them in this process, ``"async"`` each in a process of its own (gymnasium's),
            ``"envpool"`` in EnvPool's threads; ignored for a vector environment given as such.
        normalize_obs: divide observations by running moments, ``clip((s - mean) / sqrt(var + 1e-8), -10, 10)``.
    """

    n_envs: int = 1
    vectorization: Vectorization = "sync"
    normalize_obs: bool = False

    def __post_init__(self) -> None:
        """Check the ranges given above."""
        super().__post_init__()
        self.require("n_envs", self.n_envs >= 1, ">= 1")


@dataclass(frozen=True)
class OnlineProblem:
    """What an agent must know of its environment.

    Attributes:
        observation_space, action_space: as :func:`corollary.core.spaces.space_to_json` writes them.
        env_id: the environment's id, if it is registered.
    """

    observation_space: Mapping[str, Any]
    action_space: Mapping[str, Any]
    env_id: str | None

    @cached_property
    def observations(self) -> Observations:
        """The map from observations to vectors."""
        return Observations(space_from_json(self.observation_space), self.env_id or "the environment")

    @cached_property
    def actions(self) -> Actions:
        """The map from rows to actions."""
        return Actions(space_from_json(self.action_space), self.env_id or "the environment")

    @property
    def observation_dim(self) -> int:
        """d_s."""
        return self.observations.dim

    @property
    def action_dim(self) -> int:
        """d_a: entries of a Box, components of a (Multi)Discrete space."""
        return self.actions.dim


class OnlineAgent(Agent[C]):
    """Base of the algorithms that learn from an environment.

    Args:
        env: a Gymnasium id, a function that makes one environment, one environment (for one seed and
            ``n_envs=1``), or a gymnasium vector environment or a function that makes one (its size wins over
            ``n_envs``).
        seeds: how many independent runs to train together (seeds 0, 1, ...), or their seeds as a list. Each has its
            own environments, normalisers and random streams: seed 7 gives the same run alone or among others, up to
            rounding of batched products.
        preset: a name from the class's `presets`; explicit options win over it.
        device: where updates run; acting runs on the processor.
        precision: ``"float32"``; ``"float64"`` for checks.
        **options: fields of the class's configuration.

    Raises:
        ConfigError: for an unknown option or preset, or a value out of range.
        EnvironmentMismatchError: for something that is no gymnasium environment, or has spaces that are not supported.
    """

    def __init__(
        self,
        env: EnvSource,
        seeds: int | Sequence[int] = 1,
        *,
        preset: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        **options: Any,
    ) -> None:
        super().__init__(seeds, preset=preset, device=device, precision=precision, **options)
        if precision == "bf16":
            raise ConfigError("precision='bf16' is for offline agents; online agents take 'float32' or 'float64'.")
        self._source: EnvSource | None = env
        self._environments: Environments | None = None
        self._resumed: dict[str, NDArray[Any]] | None = None
        self._begun = False
        made = self.environments
        self.config = dataclasses.replace(self.config, n_envs=made.n_envs)  # a vector environment's own size
        self._start(
            OnlineProblem(
                space_to_json(made.observation_space),
                space_to_json(made.action_space),
                made.env_id,
            )
        )

    # ------------------------------------------------------------------------------- what an algorithm defines

    @abstractmethod
    def policy(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Map normalised states ``[S, n, d_s]`` to actions ``[S, n, d_a]``; `noise` ``[S, n, d_a]`` samples."""

    @abstractmethod
    def iterate(self, progress: float) -> Metrics:
        """Collect and learn once: move `step` by the environment steps taken per seed.

        Args:
            progress: the share in [0, 1) of this call of :meth:`learn` that is done, for schedules.
        """

    @abstractmethod
    def plain_actor(self, seed_index: int) -> nn.Module:
        """Return one seed's deterministic actor on normalised states as an ordinary module."""

    # ----------------------------------------------------------------------------------------- learning, acting

    def learn(
        self,
        n_steps: int,
        *,
        env: EnvSource | None = None,
        eval_env: "EvaluationSource | None" = None,
        eval_every: int | None = None,
        eval_episodes: int = 10,
        log_every: int = 10_000,
        run_dir: str | Path | None = None,
        save_every: int | None = None,
        resume: bool = False,
        progress: bool | None = None,
        callbacks: Sequence["Callback"] = (),
        command: Mapping[str, Any] | None = None,
    ) -> Self:
        """Take `n_steps` environment steps with every seed.

        `env` is where, if not in the environments so far: new episodes begin there, as :meth:`set_env` says, except for
        a loaded agent that had none, which goes on where it was saved. All else is as in
        :func:`corollary.core.learn.learn`.
        """
        from .learn import check_arguments, learn

        check_arguments(self, n_steps, eval_env, eval_every, eval_episodes, log_every, save_every)
        learn(
            self,
            n_steps,
            nullcontext() if env is None else self._entering(env),
            eval_env=eval_env,
            eval_every=eval_every,
            eval_episodes=eval_episodes,
            log_every=log_every,
            run_dir=run_dir,
            save_every=save_every,
            resume=resume,
            progress=progress,
            callbacks=callbacks,
            command=command,
        )
        return self

    @property
    def environments(self) -> Environments:
        """The environments that experience comes from, made at the first use.

        Raises:
            ConfigError: if the agent was loaded and does not know an id to make them from.
        """
        if self._environments is None:
            if self._source is None:
                raise ConfigError("This loaded agent has no environment: pass learn(n_steps, env=...).")
            self._environments = make_environments(
                self._source, self.seeds, self.config.n_envs, vectorization=self.config.vectorization
            )
        return self._environments

    def set_env(self, env: EnvSource) -> None:
        """Learn from `env` from now on; new episodes begin there.

        Raises:
            EnvironmentMismatchError: if its spaces are others than those the agent was made for.
        """
        with self._entering(env):
            pass

    @contextmanager
    def _entering(self, env: EnvSource) -> Iterator[None]:
        """Learn from `env` from now on, as :meth:`set_env` says; an error in the block closes that again."""
        made = make_environments(env, self.seeds, self.config.n_envs, vectorization=self.config.vectorization)
        theirs = OnlineProblem(space_to_json(made.observation_space), space_to_json(made.action_space), made.env_id)
        for name in ("observation_space", "action_space"):
            if getattr(theirs, name) != getattr(self.problem, name):
                made.close()
                raise EnvironmentMismatchError(
                    f"{made.name} has {name} {getattr(made, name)}, but the agent was made for "
                    f"{space_from_json(getattr(self.problem, name))}."
                )
        if made.n_envs != self.config.n_envs:
            made.close()
            raise EnvironmentMismatchError(
                f"{made.name} is a vector of {made.n_envs} environments, but the agent was made for n_envs="
                f"{self.config.n_envs}."
            )
        if self._source is not None:  # a loaded agent that lacked environments goes on where it was saved
            self._leave_episodes()
        former, self._source, self._environments = self._environments, env, made
        try:
            yield
        except BaseException:
            made.close()
            raise
        if former is not None:
            former.close()

    def close(self) -> None:
        """Close the environments; :attr:`environments` makes new ones when they are needed again."""
        if self._environments is not None:
            if self._begun:
                self._resumed, self._begun = self._environments.state(), False
            self._environments.close()
            self._environments = None

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map observation vectors ``[S, n, d_s]`` to actions ``[S, n, d_a]``, continuous ones inside their box."""
        with torch.no_grad():
            action = self.policy(self.normalize(obs.to(self.device, self.dtype)), noise)
            return action if self.box is None else self.box.clip(action)

    def normalize(self, obs: Tensor) -> Tensor:
        """Apply the running moments, as they are, to ``[S, n, d_s]``."""
        return obs if self.observation_normaliser is None else self.observation_normaliser.normalize_tensor(obs)

    def encode(self, observations: Sequence[Any]) -> NDArray[Any]:
        """Return n observations as vectors ``[n, d_s]``."""
        return np.stack([self.problem.observations.encode(each) for each in observations])

    def encode_batch(self, observations: Any) -> NDArray[Any]:
        """Return a vector environment's observations as vectors ``[n, d_s]``."""
        return self.problem.observations.encode_batch(observations)

    def is_single(self, observation: Any) -> bool:
        """Whether the observation has no leading batch axis; its shape decides."""
        return self.problem.observations.is_single(observation)

    def decode(self, actions: NDArray[Any]) -> Sequence[Any]:
        """Return rows as actions of single environments."""
        return self.problem.actions.to_env(actions)

    def decode_batch(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Return rows as a vector environment's actions."""
        return self.problem.actions.to_env_batch(actions)

    def check_environment(self, env: gymnasium.Env[Any, Any]) -> None:
        """Raise an :class:`EnvironmentMismatchError` unless `env` has the spaces of the training environment."""
        name = environment_name(env)
        for kind in ("observation_space", "action_space"):
            theirs, ours = getattr(env, kind), getattr(self.problem, kind)
            if space_to_json(theirs) != ours:
                raise EnvironmentMismatchError(
                    f"{name} has {kind.replace('_', ' ')} {theirs}, but this agent was trained in "
                    f"{self.problem.env_id or 'an environment'} with {space_from_json(ours)}."
                )

    # -------------------------------------------------------------------------------------------- exact state

    def select(self, index: int) -> Self:
        """Return a copy with only the seed at position `index`; it learns in environments of its own."""
        chosen = super().select(index)
        if not isinstance(self._source, gymnasium.Env | VectorEnv):
            chosen._source = self._source
        return chosen

    def restore(self, path: str | Path) -> None:
        """Take over the state of a checkpoint of the same run; the environments stay the ones given here."""
        source, environments = self._source, self._environments
        super().restore(path)
        self._source, self._environments = source, environments

    def description(self) -> dict[str, Any]:
        """Return all that `config.json` of a checkpoint says: settings, seeds, step, problem."""
        return {
            "algorithm": self.algorithm,
            "config": dataclasses.asdict(self.config),
            "preset": self.preset,
            "seeds": list(self.seeds),
            "precision": self.precision,
            "step": self.step,
            "problem": dataclasses.asdict(self.problem),
        }

    @classmethod
    def _from_description(cls, description: Mapping[str, Any], device: torch.device) -> Self:
        agent = cls.__new__(cls)
        Agent.__init__(
            agent, description["seeds"], device=device, precision=description["precision"], **description["config"]
        )
        problem = OnlineProblem(**description["problem"])
        agent._source = problem.env_id if is_known(problem.env_id) else None
        agent._environments, agent._resumed, agent._begun = None, None, False
        agent._start(problem)
        return agent

    # --------------------------------------------------------------------------------------- building blocks

    @property
    def problem(self) -> OnlineProblem:
        """What this agent knows of its environment."""
        return self._problem

    def _start(self, problem: OnlineProblem) -> None:
        self._problem = problem
        self.iteration = 0
        self.progress = 0.0
        self.recent_returns = RecentReturns(len(self.seeds))
        self.observation_normaliser = (
            ObservationNormaliser(len(self.seeds), problem.observation_dim) if self.config.normalize_obs else None
        )
        self.reward_normaliser: RewardNormaliser | None = None  # of methods that scale rewards
        self._collector: Collector | None = None
        bounded = problem.actions.kind == "continuous"
        low, high = problem.actions.low.tolist(), problem.actions.high.tolist()
        self.box = ActionBox(low, high, self.dtype).to(self.device) if bounded else None
        self._begin()

    def go_on(self, act: Actor, noise: Tensor) -> Rollout:
        """Take a step in every environment for each of the T rows of `noise` ``[S, T, N, d_a]``; move `step`.

        Where that fails or is interrupted, new episodes begin at the next call: nobody knows where these are now.
        """
        if not self._begun:
            self._collector = Collector(
                self.environments,
                self.begin_episodes(),
                len(self.seeds),
                self.observation_normaliser,
                self.reward_normaliser,
            )
        assert self._collector is not None
        try:
            rollout = self._collector.collect(act, noise, self.device, self.dtype)
        except BaseException:
            self._leave_episodes()
            raise
        self.step += noise.shape[1] * noise.shape[2]
        return rollout

    def _leave_episodes(self) -> None:
        self._begun, self._resumed = False, None

    def played_in(self, env: object) -> None:
        """Begin new episodes if others were played in the environment that this agent learns from."""
        if self._environments is not None and self._environments.holds(env):
            self._leave_episodes()

    def begin_episodes(self) -> NDArray[np.float32]:
        """Return what the environments show, ``[R, d_s]``: first observations, or where a restored run stopped."""
        stored = self._resumed
        if self.reward_normaliser is not None and (stored is None or not self.environments.exact_resume):
            self.reward_normaliser.begin_episodes()
        if stored is not None:
            restored = self.environments.restore(stored)
            self._resumed, self._begun = None, True
            return restored
        obs = self.environments.reset()
        self._begun = True
        if self.observation_normaliser is not None:
            self.observation_normaliser.update(obs.reshape(len(self.seeds), -1, obs.shape[-1]))
        return obs

    def finished_episodes(self) -> list[tuple[int, float, int]]:
        """Return seed index, return and length of the episodes that ended since the last call."""
        episodes = self.environments.finished()
        self.recent_returns.add(episodes)
        return episodes

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return normalisers, environments and recent returns."""
        iteration = torch.full((len(self.seeds),), self.iteration)
        found = {"recent_returns": self.recent_returns.tensor(), "iteration": iteration}
        if self.observation_normaliser is not None:
            moments = self.observation_normaliser.state()
            found |= {f"observations/{name}": torch.from_numpy(array) for name, array in moments.items()}
        states = self.environments.state() if self._begun else self._resumed
        return found | {f"environments/{name}": torch.from_numpy(array) for name, array in (states or {}).items()}

    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`extra_tensors` returned; the environments follow when they are made."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        self.recent_returns.load(tensors["recent_returns"])
        self.iteration = int(arrays["iteration"][0])
        if self.observation_normaliser is not None:
            self.observation_normaliser.load_state(below("observations/", arrays))
        self._resumed = below("environments/", arrays) or None

    def plain_policy(self, seed_index: int = 0) -> nn.Module:
        """Return one seed's deterministic policy on raw observation vectors ``[n, d_s]`` as an ordinary module."""
        from .export import PlainPolicy

        normaliser = self.observation_normaliser
        states = nn.Identity() if normaliser is None else normaliser.plain(seed_index)
        actions = self.problem.actions.start if self.box is None else self.box
        return copy.deepcopy(PlainPolicy(self.plain_actor(seed_index), states, actions))
