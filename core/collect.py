"""Recording a dataset: one environment, one policy, episodes with T+1 observations."""

import contextlib
import random
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, Protocol, cast

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from .dataset import ACTION_TOLERANCE, Dataset, DatasetInfo, Episode
from .environments import environment_id, environment_name, make_single, raised
from .errors import ConfigError, DataError
from .evaluation import EnvSource
from .progress import counting_bar
from .scores import known_reference


class Predictor(Protocol):
    """Anything that acts as Stable-Baselines3's models and our agents do."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Return an action and the next recurrent state."""


Policy = Callable[[NDArray[Any]], Any] | Predictor

# Branches of the seed: every stream below is independent of the others.
_RESETS, _ACTIONS, _GLOBAL = range(3)


def collect(
    env: EnvSource,
    policy: Policy | None = None,
    *,
    n_steps: int | None = None,
    n_episodes: int | None = None,
    seed: int = 0,
    deterministic: bool = False,
    name: str | None = None,
    progress: bool | None = None,
) -> Dataset:
    """Record what `policy` does in `env`.

    Every episode keeps its T+1 observations, so the true successor of each step is in the dataset.
    ``terminated`` and ``truncated`` come from the environment; a step that reports both ended the task on its
    last permitted step and is stored as terminated. With `n_steps` the last episode is cut at exactly that
    many rows and stored as truncated, its true successor known, so nothing recorded is thrown away
    (``provenance["cut_episodes"]`` is then 1).

    Actions are converted to float32 (indices to int64) before the environment sees them: it is stepped with
    exactly what is stored. Episode i is reset with a seed derived from `seed` and i. Random actions have a
    stream of their own. During the call Python's, NumPy's and PyTorch's (CPU) global generators are seeded
    from `seed` and afterwards put back, so a policy that draws from them, such as a Stable-Baselines3 model,
    is reproducible too. A policy with a generator of its own, or one that samples on a GPU, is seeded by the
    caller.

    Args:
        env: a Gymnasium id, an environment (left open), or a function that makes one (closed at the end).
        policy: ``policy(obs) -> action``, an object with ``predict`` (as in Stable-Baselines3; recurrent
            state is carried through an episode), or None for uniform random actions.
        n_steps: rows to record; or
        n_episodes: complete episodes to record, at least 1. Needs an environment whose episodes end.
        seed: source of all randomness.
        deterministic: passed to ``predict``; False samples, as behaviour data usually does.
        name: name of the dataset; by default made from the environment's id and the policy's type.
        progress: show a progress bar; None shows it when standard error is a terminal.

    Returns:
        A dataset whose provenance holds seed, policy and versions; reference returns are filled in where
        `corollary.core.scores` has them for this environment id.

    Raises:
        EnvironmentMismatchError: an environment that cannot be made or is vectorised.
        DataError: one that has unsupported spaces, or gives an observation or reward that is not finite; an action
            outside the space. Names episode and step.
        CorollaryError: if the environment raises; names episode and step.
        ConfigError: neither or both of `n_steps` and `n_episodes`, or one below 1.
    """
    if (n_steps is None) == (n_episodes is None):
        raise ConfigError("collect needs either n_steps or n_episodes")
    goal = cast(int, n_steps if n_episodes is None else n_episodes)
    if goal < 1:
        raise ConfigError(f"collect needs at least one step or episode; got {goal}")
    made = make_single(env)
    bar = counting_bar(progress)
    try:
        recorder = _Recorder(made, environment_id(env, made), policy, seed, deterministic)
        episodes: list[Episode] = []
        rows = done = 0
        with bar, isolated_generators(derived_seed(seed, _GLOBAL)):
            task = bar.add_task(f"collecting {recorder.env_id}", total=goal, headline="")
            while done < goal:
                episode = recorder.episode(len(episodes), None if n_steps is None else n_steps - rows)
                episodes.append(episode)
                rows += len(cast(NDArray[Any], episode.actions))
                done = len(episodes) if n_steps is None else rows
                bar.update(task, completed=done)
        return Dataset.from_episodes(episodes, **recorder.action_fields, info=recorder.info(name))
    finally:
        if not isinstance(env, gymnasium.Env):
            made.close()


@contextlib.contextmanager
def isolated_generators(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's (CPU) global generators inside the block; then put them back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def derived_seed(seed: int, *branch: int) -> int:
    """Return a 32-bit seed for one branch of `seed`; different branches give independent streams."""
    return int(np.random.SeedSequence(seed, spawn_key=branch).generate_state(1)[0])


class _Recorder:
    """Plays episodes in one environment and checks everything that crosses its boundary."""

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        registered_id: str | None,
        policy: Policy | None,
        seed: int,
        deterministic: bool,
    ) -> None:
        self.env, self.policy, self.seed, self.deterministic = env, policy, seed, deterministic
        self.registered_id, self.env_id = registered_id, environment_name(env)
        self.action_fields = self._supported_action_fields()
        if not isinstance(env.observation_space, spaces.Box) or not env.observation_space.shape:
            raise DataError(
                f"{self.env_id} has the observation space {env.observation_space}, but a dataset stores "
                "arrays: wrap the environment in gymnasium.wrappers.FlattenObservation"
            )
        self.random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ACTIONS,)))
        self.was_cut = False

    def _supported_action_fields(self) -> dict[str, Any]:
        space = self.env.action_space
        if isinstance(space, spaces.Discrete):
            return {"n_actions": int(space.n)}
        if isinstance(space, spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f":
            if not space.is_bounded():
                raise DataError(
                    f"{self.env_id} has the unbounded action space {space}: give it finite bounds with "
                    "gymnasium.wrappers.RescaleAction or ClipAction"
                )
            return {"action_low": space.low, "action_high": space.high}
        raise DataError(f"{self.env_id} has the action space {space}; supported are Discrete and one-dimensional Box")

    def info(self, name: str | None) -> DatasetInfo:
        """Describe what was recorded."""
        spec, policy = self.env.spec, self.policy
        versions = {"gymnasium": gymnasium.__version__}
        if any("mujoco" in base.__module__ for base in type(self.env.unwrapped).__mro__):
            versions["mujoco"] = version("mujoco")
        acting = "random" if policy is None else getattr(policy, "__name__", type(policy).__name__)
        reference = known_reference(self.env_id)
        return DatasetInfo(
            name=name or f"{self.env_id}-{acting}".lower(),
            env_id=self.registered_id,
            ref_min_score=reference.min if reference else None,
            ref_max_score=reference.max if reference else None,
            score_source=reference.source if reference else None,
            horizon=None if spec is None else spec.max_episode_steps,
            provenance={
                "format": "collected",
                "policy": "uniform random actions" if policy is None else acting,
                "deterministic": int(self.deterministic),
                "seed": self.seed,
                "cut_episodes": int(self.was_cut),
                **versions,
            },
        )

    def episode(self, number: int, limit: int | None) -> Episode:
        """Play episode `number` to its end, or to `limit` steps."""
        reset_seed = derived_seed(self.seed, _RESETS, number)
        place = f"{self.env_id}, episode {number} (reset seed {reset_seed})"
        with _blamed_on(place, "reset"):
            observation, _ = self.env.reset(seed=reset_seed)
        observations = [self._observation(observation, f"{place}, reset")]
        actions: list[Any] = []
        rewards: list[float] = []
        state: Any = None
        terminated = truncated = False
        while not (terminated or truncated):
            step = len(rewards)
            chosen, state = self._choose(observation, state, first=step == 0)
            stored, sent = self._action(chosen, f"{place}, step {step}")
            with _blamed_on(place, f"step {step}"):
                observation, reward, ended, cut, _ = self.env.step(sent)
            observations.append(self._observation(observation, f"{place}, step {step}"))
            value = np.asarray(reward)
            if value.ndim or value.dtype.kind not in "fiub" or not np.isfinite(value):
                raise DataError(f"{place}, step {step}: the reward is {reward!r}, not one finite number")
            actions.append(stored)
            rewards.append(float(value))
            terminated, truncated = bool(ended), bool(cut) and not ended
            if not (terminated or truncated) and len(rewards) == limit:
                truncated = self.was_cut = True
        return Episode(np.stack(observations), np.stack(actions), np.asarray(rewards), terminated, truncated)

    def _choose(self, observation: Any, state: Any, *, first: bool) -> tuple[Any, Any]:
        if self.policy is None:
            return self._uniform(), None
        if callable(predict := getattr(self.policy, "predict", None)):
            return predict(  # type: ignore[no-any-return]
                observation, state=state, episode_start=np.array([first]), deterministic=self.deterministic
            )
        return cast(Callable[[Any], Any], self.policy)(observation), None

    def _uniform(self) -> Any:
        space = self.env.action_space
        if isinstance(space, spaces.Discrete):
            return space.start + self.random.integers(space.n)
        assert isinstance(space, spaces.Box)
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        return low + (high - low) * self.random.random(space.shape)

    def _observation(self, observation: Any, place: str) -> NDArray[np.float32]:
        array = np.asarray(observation)
        expected = self.env.observation_space.shape
        if array.shape != expected or array.dtype.kind not in "fiu":
            raise DataError(
                f"{place}: the observation is {array.dtype} of shape {list(array.shape)}; "
                f"the observation space says shape {list(expected or ())}"
            )
        with np.errstate(over="ignore"):  # beyond the float32 range becomes inf, reported below
            stored = array.astype(np.float32)
        if not np.isfinite(stored).all():
            raise DataError(f"{place}: the observation holds {stored[~np.isfinite(stored)][0]}, not finite")
        return stored

    def _action(self, action: Any, place: str) -> tuple[NDArray[Any], Any]:
        """Return the action as it is stored and as the environment gets it."""
        array, space = np.asarray(action), self.env.action_space
        if isinstance(space, spaces.Discrete):
            if array.size != 1 or array.dtype.kind not in "iu" or not space.contains(np.int64(array.item())):
                raise DataError(f"{place}: the policy chose {action!r}, outside the action space {space}")
            return np.int64(array.item()) - space.start, np.int64(array.item())
        assert isinstance(space, spaces.Box)
        if array.shape != space.shape or array.dtype.kind not in "fiu":
            raise DataError(
                f"{place}: the policy chose {array.dtype} of shape {list(array.shape)}; the action space is {space}"
            )
        stored = array.astype(np.float32)
        slack = ACTION_TOLERANCE * (space.high - space.low)
        inside = (stored >= space.low - slack) & (stored <= space.high + slack)
        if not inside.all():  # also where the action is NaN
            dimension = int(np.flatnonzero(~inside)[0])
            raise DataError(
                f"{place}: the policy chose {stored[dimension]} in dimension {dimension}, outside "
                f"[{space.low[dimension]}, {space.high[dimension]}]: clip its actions to the space"
            )
        return stored, stored.astype(space.dtype, copy=False)


@contextlib.contextmanager
def _blamed_on(place: str, call: str) -> Iterator[None]:
    """Turn whatever the environment raises into one sentence that says where."""
    try:
        yield
    except Exception as error:
        raise raised(place, call, error) from error
