"""What online agents step: R = S * N environments behind one interface, row = seed index * N + environment index.

* ``terminated`` and ``truncated`` stay apart, and ``next_obs`` is the true successor, also where an episode ended.
* Environments made here (from an id or a function) begin episode k of environment i of run s with a seed that is a
  function of (s, i, k) alone. Their state is then a function of that seed and of the actions since, so a run that was
  saved in the middle of its episodes goes on exactly once the same actions have been taken again, and ``"sync"`` and
  ``"async"`` give the same run.
* Vector environments made elsewhere (the user's, or EnvPool's) reset themselves, in either of gymnasium's two autoreset
  modes. A restored run begins new episodes there.

Axes: ``S`` seeds (independent runs), ``N`` environments per seed, ``R`` rows, ``d`` entries of an observation vector.
"""

import contextlib
import functools
import hashlib
import importlib
import math
import os
import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, get_args

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from .errors import CheckpointError, ConfigError, CorollaryError, EnvironmentMismatchError, suggest
from .spaces import Actions, Observations

SingleEnv = gymnasium.Env[Any, Any]
BatchEnv = VectorEnv[Any, Any, Any]
EnvSource = str | SingleEnv | BatchEnv | Callable[[], SingleEnv | BatchEnv]
Vectorization = Literal["sync", "async", "envpool"]


class Step(NamedTuple):
    """One step of R environments. The arrays are new at every step; do not write into them."""

    next_obs: NDArray[np.float32]  # [R, d] the true successor: at an episode's end its last observation
    reward: NDArray[np.float64]  # [R] raw
    terminated: NDArray[np.bool_]  # [R] the task ended: nothing to bootstrap from
    truncated: NDArray[np.bool_]  # [R] the episode was cut; both flags may be set
    valid: NDArray[np.bool_]  # [R] False where the step was a reset, which is no transition
    obs: NDArray[np.float32]  # [R, d] what to act on next: next_obs itself, or a copy with first observations in it


def make_environments(
    source: EnvSource, seeds: Sequence[int], n_envs: int, *, vectorization: Vectorization = "sync"
) -> "Environments":
    """Make N environments for each of S seeds.

    Args:
        source: a gymnasium id; a function that makes one environment, called R times, or one vector environment,
            called once per seed; or one environment or vector environment, for one seed, which is left open.
        seeds: the seed of each run.
        n_envs: N; the size of a vector environment wins over it.
        vectorization: ``"sync"`` steps one environment after the other in this process; ``"async"`` gives each a
            process of its own, which pays where one step takes longer than a few tenths of a millisecond;
            ``"envpool"`` takes EnvPool's compiled environment of that id. Vector environments are taken as they are.

    Raises:
        ConfigError: options out of range or that do not go together, or EnvPool is not installed.
        EnvironmentMismatchError: something that is no gymnasium environment, spaces that are not supported or differ
            among the environments, or a vector environment that does not reset itself.
    """
    if vectorization not in get_args(Vectorization):
        raise ConfigError(
            f"vectorization must be one of {', '.join(get_args(Vectorization))}; got {vectorization!r}."
            f"{suggest(str(vectorization), get_args(Vectorization))}"
        )
    if not seeds or n_envs < 1:
        raise ConfigError(f"At least one seed and one environment are needed; got {len(seeds)} and {n_envs}.")
    if isinstance(source, VectorEnv):  # asked first, as EnvPool's are gymnasium.Env too
        if len(seeds) > 1:
            raise ConfigError(f"One vector environment serves one seed, not {len(seeds)}: pass a function making one.")
        return _VectorEnvironments([source], seeds, environment_id(source, source), left_open=True)
    if isinstance(source, gymnasium.Env):
        if len(seeds) * n_envs > 1 or vectorization != "sync":
            raise ConfigError(
                "One environment serves one seed with n_envs=1 and vectorization='sync'; got "
                f"{len(seeds)} seeds, n_envs={n_envs} and {vectorization!r}: pass its id or a function making one."
            )
        return _InProcess([source], seeds, 1, environment_id(source, source), left_open=True)
    if vectorization == "envpool":
        if not isinstance(source, str):
            raise ConfigError(f"vectorization='envpool' needs the id of one of EnvPool's environments; got {source!r}.")
        with _closed_on_error() as pools:
            pools.extend(_EnvPool(source, n_envs) for _ in seeds)
            return _VectorEnvironments(pools, seeds, source)
    first = make_environment(source)
    env_id = environment_id(source, first)
    with _closed_on_error(first) as made:
        if isinstance(first, VectorEnv):
            made.extend(make_environment(source) for _ in seeds[1:])
            return _VectorEnvironments(made, seeds, env_id)
        if vectorization == "async":
            first.close()
            return _Processes(source, first, seeds, n_envs, env_id)
        made.extend(make_environment(source) for _ in range(len(seeds) * n_envs - 1))
        return _InProcess(made, seeds, n_envs, env_id)


def episode_seed(seed: int, env_index: int, episode: int) -> int:
    """Return the reset seed of one episode: 2^30 + the low 30 bits of SHA-256 of the text ``seed/env_index/episode``.

    That is a signed 32-bit integer, as compiled environments want it, and far from the seeds of evaluation episodes,
    which count up from one million.
    """
    digest = hashlib.sha256(f"{seed}/{env_index}/{episode}".encode()).digest()
    return 2**30 + int.from_bytes(digest[:4], "little") % 2**30


class Environments(ABC):
    """R = S * N environments; made by :func:`make_environments`.

    Attributes:
        env_id: the id under which gymnasium (or EnvPool) makes the environment, or None.
        name: the id, or the name of the class; used in messages.
        seeds: the seed of each run.
        n_envs: N.
        n_rows: R = S * N.
        observations: the map from observations to vectors ``[d]``.
        actions: the map from rows ``[d_a]`` to actions.
        exact_resume: whether :meth:`restore` continues the episodes that :meth:`state` left.
    """

    exact_resume: bool

    def __init__(
        self, env: SingleEnv | BatchEnv, of_one: "_Spaces", seeds: Sequence[int], n_envs: int, env_id: str | None
    ) -> None:
        self.env_id = env_id
        self.name = env_id or environment_name(env)
        self.seeds = tuple(seeds)
        self.n_envs = n_envs
        self.n_rows = len(self.seeds) * n_envs
        self.observations = Observations(of_one.observation, self.name)
        self.actions = Actions(of_one.action, self.name)
        self._returns = np.zeros(self.n_rows)
        self._lengths = np.zeros(self.n_rows, np.int64)
        self._finished: list[tuple[int, float, int]] = []
        self._rows = range(self.n_rows)

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """The observation space of one environment."""
        return self.observations.space

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        """The action space of one environment."""
        return self.actions.space

    @abstractmethod
    def reset(self) -> NDArray[np.float32]:
        """Begin the next episode in every row and return the first observations ``[R, d]``."""

    @abstractmethod
    def step(self, actions: NDArray[Any]) -> Step:
        """Take the actions ``[R, d_a]``: float32, clipped to the box, or int64 indices of categories.

        Raises:
            CorollaryError: if an environment raises, or gives a reward or an observation that is not finite.
            EnvironmentMismatchError: if an observation does not fit the observation space.
        """

    @abstractmethod
    def state(self) -> dict[str, NDArray[Any]]:
        """Return arrays ``[S, ...]``, copies all, from which :meth:`restore` goes on.

        Episodes that ended and were not asked for by :meth:`finished` are not part of it.

        Raises:
            CorollaryError: before the first :meth:`reset`.
        """

    @abstractmethod
    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Go on from what :meth:`state` returned; return the observations ``[R, d]`` to act on.

        With `exact_resume` the running episodes continue. Where repeating their actions leads elsewhere, a warning
        says so and new episodes begin, as they do in all rows without `exact_resume`.

        Raises:
            CheckpointError: if the state is one of other environments.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the environments made here."""

    def holds(self, env: object) -> bool:
        """Whether `env` is one of these environments, perhaps in other wrappers."""
        return isinstance(env, gymnasium.Env) and any(env.unwrapped is each.unwrapped for each in self._singles())

    def _singles(self) -> Sequence[SingleEnv]:
        """The single environments that live in this process."""
        return ()

    def finished(self) -> list[tuple[int, float, int]]:
        """Return (seed index, sum of raw rewards, length) of the episodes that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, reward: NDArray[np.float64], next_obs: NDArray[np.float32]) -> None:
        """Add a step's rewards to the running returns and check what the step gave."""
        self._returns += reward
        self._require_finite("reward", reward)
        self._require_finite("observation", next_obs)

    def _finish(self, rows: Sequence[int]) -> None:
        """Take down the episodes of `rows` as finished; their next ones are counted from zero."""
        for row in rows:
            self._finished.append((row // self.n_envs, float(self._returns[row]), int(self._lengths[row])))
        self._open(rows)

    def _open(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._returns[row] = 0.0
            self._lengths[row] = 0

    def _require_finite(self, what: str, values: NDArray[np.floating], rows: Sequence[int] | None = None) -> None:
        # One product instead of many tests: a NaN or an infinity shows in the sum of squares.
        if math.isfinite(np.vdot(values, values)):
            return
        for row, value in zip(rows or self._rows, values.reshape(len(values), -1), strict=True):
            if not np.isfinite(value).all():
                raise CorollaryError(
                    f"{self._place(row)}: the {what} holds {value[~np.isfinite(value)][0]}, which is not finite: "
                    "mend the environment."
                )

    def _place(self, row: int) -> str:
        seed, index, step = self.seeds[row // self.n_envs], row % self.n_envs, self._lengths[row]
        return f"{self.name}, row {row} (seed {seed}, environment {index}), step {step} of its episode"


# ------------------------------------------------------------------------------------------------------------
# Environments made here
# ------------------------------------------------------------------------------------------------------------


class _Repeatable(Environments):
    """Environments whose every episode begins with a seed of its own and whose actions since then are kept."""

    exact_resume = True

    def __init__(
        self, env: SingleEnv, of_one: "_Spaces", seeds: Sequence[int], n_envs: int, env_id: str | None
    ) -> None:
        super().__init__(env, of_one, seeds, n_envs, env_id)
        self._episodes = [-1] * self.n_rows
        self._is_box = isinstance(of_one.observation, spaces.Box)
        self._log = _ActionLog(self.n_rows, self.actions)
        self._obs: NDArray[np.float32] | None = None

    @abstractmethod
    def _begin(self, rows: Sequence[int]) -> list[Any]:
        """Begin the current episodes of `rows`; return their first observations."""

    @abstractmethod
    def _repeat(self, actions: Sequence[Sequence[Any]]) -> list["_Outcome | None"]:
        """Begin the current episodes of all rows and take each row's actions again."""

    def reset(self) -> NDArray[np.float32]:
        self._open(self._rows)
        self._obs = self._first_obs(self._rows)
        return self._obs

    def _open(self, rows: Sequence[int]) -> None:
        super()._open(rows)
        for row in rows:
            self._episodes[row] += 1
            self._log.begin(row)

    def _first_obs(self, rows: Sequence[int]) -> NDArray[np.float32]:
        obs = self._encoded(self._begin(rows), rows)
        self._require_finite("observation", obs, rows)
        return obs

    def _encoded(self, observations: Sequence[Any], rows: Sequence[int]) -> NDArray[np.float32]:
        """Return the observations of `rows` as vectors in memory of their own: environments may reuse theirs."""
        try:
            if self._is_box:  # R arrays are a batch of a Box, but R dicts are no batch of a Dict
                return self.observations.encode_batch(observations)
            return np.stack([self.observations.encode(obs) for obs in observations])
        except EnvironmentMismatchError:
            for row, obs in zip(rows, observations, strict=True):
                try:
                    self.observations.encode(obs)
                except EnvironmentMismatchError as error:
                    raise EnvironmentMismatchError(f"{self._place(row)}: {error}") from error
            raise

    def state(self) -> dict[str, NDArray[Any]]:
        if self._obs is None:
            raise CorollaryError("Environments have no state before their first episode: call reset() first.")
        since_reset = self._log.since_reset()
        actions = np.zeros((self.n_rows, int(self._lengths.max()), self.actions.dim), self._log.dtype)
        for row, taken in enumerate(since_reset):
            actions[row, : len(taken)] = taken
        arrays = {
            "obs": self._obs.copy(),
            "episodes": np.array(self._episodes),
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "actions": actions,  # of the running episode, [S, N, longest, d_a], zeros behind the shorter ones
        }
        return {name: array.reshape(len(self.seeds), self.n_envs, *array.shape[1:]) for name, array in arrays.items()}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        if "actions" not in arrays:
            raise CheckpointError(
                f"{self.name}: the stored state is one of environments that reset themselves: restore it with those."
            )
        lead, (d, d_a) = (len(self.seeds), self.n_envs), (self.observations.dim, self.actions.dim)
        stored = arrays["obs"], arrays["actions"]
        if stored[0].shape != (*lead, d) or stored[1].shape[:2] != lead or stored[1].shape[3:] != (d_a,):
            raise CheckpointError(
                f"{self.name}: the stored state has observations {list(stored[0].shape)} and actions "
                f"{list(stored[1].shape)}, these environments {[*lead, d]} and {[*lead, '...', d_a]}: restore it with "
                "the environment, seeds and n_envs it was stored with."
            )
        obs, actions = (each.reshape(self.n_rows, *each.shape[2:]).copy() for each in stored)
        self._episodes = arrays["episodes"].ravel().tolist()
        self._returns[:], self._lengths[:] = arrays["returns"].ravel(), arrays["lengths"].ravel()
        since_reset = [taken[:length] for taken, length in zip(actions, self._lengths.tolist(), strict=True)]
        self._log.fill(since_reset)
        outcomes = self._repeat([self.actions.to_env(taken) for taken in since_reset])
        lost = [row for row, outcome in enumerate(outcomes) if not self._is_as_stored(row, outcome, obs[row])]
        if lost:
            warnings.warn(
                f"{self.name}, rows {lost}: repeating the stored actions did not lead to the stored "
                "observation and return, so this environment is not exactly resumable (it carries something from "
                "episode to episode, or draws from a generator that reset(seed=...) does not seed); new episodes "
                "begin there.",
                stacklevel=2,
            )
            self._open(lost)
            obs[lost] = self._first_obs(lost)
        self._obs = obs
        return obs

    def _is_as_stored(self, row: int, outcome: "_Outcome | None", obs: NDArray[np.float32]) -> bool:
        if outcome is None or outcome.total != self._returns[row]:
            return False
        return np.array_equal(self._encoded([outcome.obs], [row])[0], obs)


class _InProcess(_Repeatable):
    """R environments stepped one after the other."""

    def __init__(
        self,
        envs: Sequence[SingleEnv],
        seeds: Sequence[int],
        n_envs: int,
        env_id: str | None,
        *,
        left_open: bool = False,
    ) -> None:
        super().__init__(envs[0], _common_spaces(envs), seeds, n_envs, env_id)
        self._envs, self._left_open = envs, left_open
        self._steps = [env.step for env in envs]
        self._all_valid = np.ones(self.n_rows, bool)

    def step(self, actions: NDArray[Any]) -> Step:
        actions = self._log.append(actions)
        self._lengths += 1
        observations: list[Any] = []
        reward, flags = np.empty(self.n_rows), np.empty((2, self.n_rows), bool)
        terminated, truncated = flags
        row = 0
        try:
            for row, step, action in zip(self._rows, self._steps, self.actions.to_env(actions), strict=True):
                obs, reward[row], terminated[row], truncated[row], _ = step(action)
                observations.append(obs)
        except Exception as error:
            raise raised(self._place(row), "step", error) from error
        next_obs = self._encoded(observations, self._rows)
        self._add(reward, next_obs)
        self._obs = next_obs
        if np.count_nonzero(flags):
            ended = np.flatnonzero(terminated | truncated).tolist()
            self._finish(ended)
            self._obs = next_obs.copy()
            self._obs[ended] = self._first_obs(ended)
        return Step(next_obs, reward, terminated, truncated, self._all_valid.copy(), self._obs)

    def _begin(self, rows: Sequence[int]) -> list[Any]:
        observations = []
        for row in rows:
            try:
                obs, _ = self._envs[row].reset(seed=self._seed(row))
            except Exception as error:
                raise raised(self._place(row), "reset", error) from error
            observations.append(obs)
        return observations

    def _repeat(self, actions: Sequence[Sequence[Any]]) -> list["_Outcome | None"]:
        return [_repeated(env, self._seed(row), actions[row]) for row, env in enumerate(self._envs)]

    def _seed(self, row: int) -> int:
        return episode_seed(self.seeds[row // self.n_envs], row % self.n_envs, self._episodes[row])

    def _singles(self) -> Sequence[SingleEnv]:
        return self._envs

    def close(self) -> None:
        if not self._left_open:
            for env in self._envs:
                env.close()


class _Processes(_Repeatable):
    """R environments, each in a process of its own."""

    def __init__(
        self,
        source: str | Callable[[], SingleEnv | BatchEnv],
        like: SingleEnv,
        seeds: Sequence[int],
        n_envs: int,
        env_id: str | None,
    ) -> None:
        super().__init__(like, _common_spaces([like]), seeds, n_envs, env_id)
        makers = [
            functools.partial(_SelfSeeding, source, row, seeds[row // n_envs], row % n_envs, os.getpid())
            for row in range(self.n_rows)
        ]
        try:
            self._vector = AsyncVectorEnv(makers, autoreset_mode="SameStep")
        except Exception as error:  # whatever the function or gymnasium's comparison of the spaces raised
            raise EnvironmentMismatchError(
                f"{self.name}: the environments could not be made in processes of their own, or do not have the same "
                f"spaces: {error}"
            ) from error

    def step(self, actions: NDArray[Any]) -> Step:
        actions = self._log.append(actions)
        self._lengths += 1
        step = _step_vector(self._vector, self.actions.to_env_batch(actions), self.observations, same_step=True)
        self._add(step.reward, step.next_obs)
        ended = np.flatnonzero(step.terminated | step.truncated).tolist()
        if ended:
            self._finish(ended)
            self._require_finite("observation", step.obs)
        self._obs = step.obs
        return step

    def _begin(self, rows: Sequence[int]) -> list[Any]:
        observations = self._call("reset", "begin", self._episodes, rows)
        return [observations[row] for row in rows]

    def _repeat(self, actions: Sequence[Sequence[Any]]) -> list["_Outcome | None"]:
        return list(self._call("step", "repeat", self._episodes, actions))

    def _call(self, what: str, method: str, *arguments: Any) -> tuple[Any, ...]:
        try:
            return self._vector.call(method, *arguments)
        except Exception as error:
            raise raised(self.name, what, error) from error

    def close(self) -> None:
        self._vector.close()


class _SelfSeeding(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One row's environment in its process, where gymnasium resets it: it knows each episode's seed itself."""

    def __init__(
        self, source: str | Callable[[], SingleEnv | BatchEnv], row: int, seed: int, env_index: int, owner: int
    ) -> None:
        if os.getpid() != owner:  # a terminal's Ctrl-C goes to all processes, but the owner's alone ends the iteration
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        env = make_environment(source)
        assert isinstance(env, gymnasium.Env)
        super().__init__(env)
        self._row, self._seed, self._env_index, self._episode = row, seed, env_index, -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._episode += 1
        return self.env.reset(seed=episode_seed(self._seed, self._env_index, self._episode), options=options)

    def begin(self, episodes: Sequence[int], rows: Sequence[int]) -> Any:
        """Begin the given episode, unless `rows` leaves this row out."""
        if self._row not in rows:
            return None
        self._episode = episodes[self._row] - 1
        return self.reset()[0]

    def repeat(self, episodes: Sequence[int], actions: Sequence[Sequence[Any]]) -> "_Outcome | None":
        """Begin the given episode and take this row's actions."""
        self._episode = episodes[self._row]
        seed = episode_seed(self._seed, self._env_index, self._episode)
        return _repeated(self.env, seed, actions[self._row])


class _Outcome(NamedTuple):
    obs: Any
    total: float


def _repeated(env: SingleEnv, seed: int, actions: Sequence[Any]) -> _Outcome | None:
    """Return where `actions` lead in the episode of `seed`, or None if it ends there or before."""
    obs, _ = env.reset(seed=seed)
    total = 0.0
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        if terminated or truncated:
            return None
    return _Outcome(obs, total)


class _ActionLog:
    """The actions of every row since its reset. All rows share one time axis, so that a step costs one write."""

    def __init__(self, n_rows: int, actions: Actions) -> None:
        self.dtype = np.float32 if actions.kind == "continuous" else np.int64
        self._taken: NDArray[Any] = np.empty((64, n_rows, actions.dim), self.dtype)  # [time, R, d_a]
        self._now = 0
        self._begun = [0] * n_rows

    def append(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Note one step's actions ``[R, d_a]`` and return them as they are kept, which is what must be done."""
        if self._now == len(self._taken):
            self._make_room()
        kept: NDArray[Any] = self._taken[self._now]
        kept[:] = actions
        self._now += 1
        return kept

    def begin(self, row: int) -> None:
        """Forget the actions of `row`."""
        self._begun[row] = self._now

    def since_reset(self) -> list[NDArray[Any]]:
        """Return each row's actions ``[L, d_a]``."""
        return [self._taken[begun : self._now, row] for row, begun in enumerate(self._begun)]

    def fill(self, since_reset: Sequence[NDArray[Any]]) -> None:
        """Take over what :meth:`since_reset` returned."""
        self._now = max(len(actions) for actions in since_reset)
        self._taken = np.empty((max(64, 2 * self._now), *self._taken.shape[1:]), self._taken.dtype)
        for row, actions in enumerate(since_reset):
            self._begun[row] = self._now - len(actions)
            self._taken[self._begun[row] : self._now, row] = actions

    def _make_room(self) -> None:
        """Move what is still needed to the front, into twice the memory if that is more than half of it."""
        oldest = min(self._begun)
        kept = self._taken[oldest:]
        if 2 * len(kept) > len(self._taken):
            self._taken = np.empty((2 * len(self._taken), *kept.shape[1:]), kept.dtype)
        self._taken[: len(kept)] = kept
        self._begun = [begun - oldest for begun in self._begun]
        self._now -= oldest


# ------------------------------------------------------------------------------------------------------------
# Vector environments
# ------------------------------------------------------------------------------------------------------------


class _VectorEnvironments(Environments):
    """One vector environment for each seed, which resets itself."""

    exact_resume = False

    def __init__(
        self, parts: Sequence[BatchEnv], seeds: Sequence[int], env_id: str | None, *, left_open: bool = False
    ) -> None:
        super().__init__(parts[0], _common_spaces(parts), seeds, parts[0].num_envs, env_id)
        self._parts, self._left_open = parts, left_open
        self._same_step = _resets_in_same_step(parts[0], self.name)
        for part in parts:
            if part.num_envs != self.n_envs or _resets_in_same_step(part, self.name) != self._same_step:
                raise EnvironmentMismatchError(
                    f"{self.name}: the vector environments of the seeds have different sizes or autoreset modes: the "
                    "function that makes them must make them alike."
                )
        self._resets = -1
        self._resetting = np.zeros(self.n_rows, bool)

    def reset(self) -> NDArray[np.float32]:
        self._resets += 1
        self._open(self._rows)
        self._resetting[:] = False
        vectors = []
        for seed, part in zip(self.seeds, self._parts, strict=True):
            try:
                obs, _ = part.reset(seed=episode_seed(seed, 0, self._resets))
            except Exception as error:
                raise raised(f"{self.name} of seed {seed}", "reset", error) from error
            vectors.append(self.observations.encode_batch(obs))
        stacked = np.concatenate(vectors)
        self._require_finite("observation", stacked)
        return stacked

    def step(self, actions: NDArray[Any]) -> Step:
        self._lengths += ~self._resetting
        sent = np.split(self.actions.to_env_batch(actions), len(self._parts))
        steps = [
            _step_vector(part, each, self.observations, self._same_step)
            for part, each in zip(self._parts, sent, strict=True)
        ]
        step = steps[0] if len(steps) == 1 else Step(*map(np.concatenate, zip(*steps, strict=True)))
        if not self._same_step:
            valid = ~self._resetting
            step = step._replace(
                reward=np.where(valid, step.reward, 0.0),
                terminated=step.terminated & valid,
                truncated=step.truncated & valid,
                valid=valid,
            )
        self._add(step.reward, step.next_obs)
        done = step.terminated | step.truncated
        self._finish(np.flatnonzero(done).tolist())
        if self._same_step:
            self._require_finite("observation", step.obs)
        else:
            self._resetting = done
        return step

    def state(self) -> dict[str, NDArray[Any]]:
        return {"resets": np.full(len(self.seeds), self._resets)}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        if "resets" not in arrays:
            raise CheckpointError(
                f"{self.name}: the stored state is one of environments stepped one by one: restore it with those."
            )
        self._resets = int(arrays["resets"].max())
        warnings.warn(
            f"{self.name} is a vector environment that resets itself: its episodes cannot be resumed, new ones begin.",
            stacklevel=2,
        )
        return self.reset()

    def _singles(self) -> Sequence[SingleEnv]:
        return [each for part in self._parts for each in getattr(part.unwrapped, "envs", ())]

    def close(self) -> None:
        if not self._left_open:
            for part in self._parts:
                part.close()


def _step_vector(env: BatchEnv, actions: NDArray[Any], observations: Observations, same_step: bool) -> Step:
    """Step a vector environment; at an episode's end its true last observation is put into ``next_obs``."""
    try:
        batch, reward, terminated, truncated, infos = env.step(actions)
    except Exception as error:
        raise raised(observations.env_name, "step", error) from error
    obs = next_obs = observations.encode_batch(batch).copy()  # environments may reuse their memory
    terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
    ended = np.flatnonzero(terminated | truncated)
    if ended.size and same_step != ("final_obs" in infos):
        raise EnvironmentMismatchError(
            f"{observations.env_name} ended an episode {'without' if same_step else 'with'} infos['final_obs'], "
            "against its metadata['autoreset_mode']: mend the environment, or step single environments instead."
        )
    if ended.size and same_step:
        next_obs = obs.copy()
        for row in ended.tolist():
            next_obs[row] = observations.encode(_entry(infos["final_obs"], row))
    return Step(next_obs, np.array(reward, np.float64), terminated, truncated, np.ones(len(obs), bool), obs)


def _entry(final_obs: Any, row: int) -> Any:
    """Return one row of what holds a final observation per row: an array (of arrays, or of dicts), or dicts of them."""
    return (
        {key: _entry(part, row) for key, part in final_obs.items()} if isinstance(final_obs, dict) else final_obs[row]
    )


def _resets_in_same_step(env: BatchEnv, name: str) -> bool:
    mode = env.metadata.get("autoreset_mode")
    value = getattr(mode, "value", mode)
    if value not in ("NextStep", "SameStep"):
        raise EnvironmentMismatchError(
            f"{name} has metadata['autoreset_mode']={mode!r}, but a vector environment must reset itself: make it with "
            "AutoresetMode.NEXT_STEP or SAME_STEP (gymnasium 1.1 or newer), or pass a function that makes one "
            "environment."
        )
    return bool(value == "SameStep")


class _EnvPool(VectorWrapper[Any, Any, Any, Any, Any]):
    """EnvPool's vector environment of one seed. It is seeded where it is made, so a reset makes it anew."""

    def __init__(self, env_id: str, n_envs: int) -> None:
        try:
            envpool = importlib.import_module("envpool")
        except ImportError:
            raise ConfigError("vectorization='envpool' needs the package envpool: pip install envpool.") from None
        self._make = functools.partial(envpool.make_gymnasium, env_id, num_envs=n_envs)
        try:
            made = self._make()
        except Exception as error:  # an assertion where the id is unknown
            raise EnvironmentMismatchError(f"EnvPool cannot make {env_id!r}: {error}") from error
        super().__init__(made)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.env.close()
        self.env = self._make(seed=seed)
        return self.env.reset()


# ------------------------------------------------------------------------------------------------------------
# What both kinds need
# ------------------------------------------------------------------------------------------------------------


class _Spaces(NamedTuple):
    observation: gymnasium.Space[Any]
    action: gymnasium.Space[Any]


def require_distinct(envs: Sequence[SingleEnv | BatchEnv]) -> None:
    """Raise a :class:`ConfigError` if one of the environments is another one of them."""
    if len({id(env) for env in envs}) < len(envs):
        raise ConfigError("The function returned the same environment twice: it must make a new one in every call.")


def _common_spaces(envs: Sequence[SingleEnv | BatchEnv]) -> _Spaces:
    """Return the spaces of one environment after a check that all have the same, and that each is one of its own."""
    require_distinct(envs)
    every = [
        _Spaces(env.single_observation_space, env.single_action_space)
        if isinstance(env, VectorEnv)
        else _Spaces(env.observation_space, env.action_space)
        for env in envs
    ]
    for number, other in enumerate(every):
        for kind, ours, theirs in zip(_Spaces._fields, every[0], other, strict=True):
            if ours != theirs:
                raise EnvironmentMismatchError(
                    f"The environments have different {kind} spaces, number 0 {ours} and number {number} {theirs}: the "
                    "function that makes them must make them alike."
                )
    return every[0]


def make_environment(source: object) -> SingleEnv | BatchEnv:
    """Return the environment that `source` is, makes or names.

    Raises:
        EnvironmentMismatchError: an id that cannot be made, or something that is no gymnasium environment.
    """
    if isinstance(source, str):
        try:
            # The passive checker repeats at every step what is checked here, at a third of the time of a quick step.
            return gymnasium.make(source, disable_env_checker=True)
        except (gymnasium.error.Error, ImportError) as error:
            raise EnvironmentMismatchError(f"The environment {source!r} cannot be made: {error}") from error
    made = source() if callable(source) else source
    if not isinstance(made, gymnasium.Env | VectorEnv):
        kind = f"{type(made).__module__}.{type(made).__qualname__}"
        raise EnvironmentMismatchError(
            f"A {kind} is no gymnasium environment: pass a gymnasium id, a gymnasium.Env, a gymnasium.vector.VectorEnv "
            "or a function that returns one of these (the package shimmy converts those of the old gym)."
        )
    return made


def raised(place: str, call: str, error: Exception) -> CorollaryError:
    """Return one sentence that says what an environment raised, where, and in which call."""
    return CorollaryError(f"{place}: the environment raised {type(error).__name__} in {call}: {error}")


def make_single(source: object) -> SingleEnv:
    """Return what :func:`make_environment` makes, which must be one environment and not a vector of them."""
    made = make_environment(source)
    if isinstance(made, VectorEnv):  # asked first, as EnvPool's are gymnasium.Env too
        if made is not source:
            made.close()
        raise EnvironmentMismatchError(
            f"{environment_name(made)} is vectorised, but environments are stepped one by one here: pass a single one, "
            "its id, or a function that makes one."
        )
    return made


def environment_name(env: SingleEnv | BatchEnv) -> str:
    """Return the id under which `env` is registered, or else the name of its class."""
    return _registered(env) or type(env.unwrapped).__name__


def environment_id(source: object, env: SingleEnv | BatchEnv) -> str | None:
    """Return the id that makes `env` again, ``module:id`` where `source` names the module that registers it.

    None where there is no such id: what has wrappers, arguments or a time limit of its own is another environment.
    """
    registered = _registered(env)
    if isinstance(source, str):
        module, colon, _ = source.rpartition(":")
        return None if registered is None else f"{module}{colon}{registered}"
    entry = gymnasium.registry.get(registered or "")
    if entry is None or env.spec is None or env.spec.additional_wrappers:
        return None
    given, usual = ({k: v for k, v in kwargs.items() if k not in _ALIKE} for kwargs in (env.spec.kwargs, entry.kwargs))
    is_usual = given == usual and env.spec.max_episode_steps == entry.max_episode_steps
    return registered if is_usual else None


def has_time_limit(env: SingleEnv) -> bool:
    """Whether the environment's registration or one of gymnasium's wrappers ends its episodes after some steps."""
    if env.spec is not None and env.spec.max_episode_steps is not None:
        return True
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            return True
        env = env.env
    return False


# Arguments of gymnasium.make and make_vec that leave an environment what it is.
_ALIKE = ("render_mode", "num_envs", "vectorization_mode", "max_episode_steps")


def _registered(env: SingleEnv | BatchEnv) -> str | None:
    found: str | None = getattr(env.spec, "id", None)  # EnvPool's environments have specs of their own kind, without
    return found


def is_known(env_id: str | None) -> bool:
    """Whether gymnasium can make this id, as far as can be told before, or it names the module that registers it."""
    if env_id is None or ":" in env_id:
        return env_id is not None
    # Hopper-v2 and its like stay registered, with a function that raises.
    entry = getattr(gymnasium.registry.get(env_id), "entry_point", None)
    return entry is not None and not getattr(entry, "__name__", "").startswith("_raise")


def is_same_environment(one: str | None, other: str | None) -> bool:
    """Whether two ids name one environment, with or without the module that registers it."""
    return one is not None and other is not None and one.rpartition(":")[2] == other.rpartition(":")[2]


@contextlib.contextmanager
def _closed_on_error(*made: SingleEnv | BatchEnv) -> Iterator[list[Any]]:
    """Close the environments of the list, `made` at first, if the block raises."""
    environments: list[Any] = list(made)
    try:
        yield environments
    except BaseException:
        for each in environments:
            each.close()
        raise
