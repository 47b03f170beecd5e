"""Evaluation: every seed's policy plays the same episodes, its environments stepped side by side."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from ..kernels.streams import RandomStream
from .columns import is_whole
from .environments import environment_id, environment_name, has_time_limit, make_single, raised, require_distinct
from .errors import CorollaryError, marked, tell_divergence

if TYPE_CHECKING:
    from .agent import Agent

EnvSource = str | gymnasium.Env[Any, Any] | Callable[[], gymnasium.Env[Any, Any]]

# An episode this long in an environment that states no limit will most likely never end.
LONGEST_EPISODE = 100_000

# Training seeds are small integers; evaluation episodes start far from them, so no episode is shared with training.
FIRST_EPISODE_SEED = 1_000_000


@dataclass(frozen=True)
class Evaluation:
    """What the policies of S seeds earned in E episodes each.

    Attributes:
        env_id: the environment's id.
        returns_SE: undiscounted sums of raw rewards; nan for a seed whose training has diverged.
        lengths_SE: episode lengths in environment steps; for such a seed the steps until that showed.
        episode_seeds: the reset seed of each of the E episodes, equal for all policies.
        scores_SE: normalised scores, when the agent's dataset has reference returns for this environment.
    """

    env_id: str
    returns_SE: NDArray[np.float64]
    lengths_SE: NDArray[np.int64]
    episode_seeds: tuple[int, ...]
    scores_SE: NDArray[np.float64] | None

    @property
    def mean_return(self) -> NDArray[np.float64]:
        """Mean return of each seed, ``[S]``."""
        mean: NDArray[np.float64] = self.returns_SE.mean(1)
        return mean

    @property
    def mean_score(self) -> NDArray[np.float64] | None:
        """Mean normalised score of each seed, ``[S]``, or ``None`` without reference returns."""
        return None if self.scores_SE is None else self.scores_SE.mean(1)


def evaluate(
    agent: "Agent[Any]",
    env: EnvSource,
    episodes: int = 10,
    *,
    first_seed: int = FIRST_EPISODE_SEED,
    parallel: int = 16,
    deterministic: bool = True,
) -> Evaluation:
    """Play `episodes` episodes with every seed's policy.

    Episode e is reset with seed ``first_seed + e`` for every policy; all policies act in one batched call per step.
    The same call gives the same bits, and nothing of the agent changes (but for one evaluated in the very environment
    object that it learns from, which begins new training episodes there). Another `parallel` changes the batch shapes,
    so the last bits of the actions (and, with ``deterministic=False``, which noise an episode gets).

    A seed whose training has diverged (its networks or its actions are not finite) has no returns: they are nan, a
    :class:`RuntimeWarning` names the seed, and the other seeds play on.

    Args:
        agent: a trained agent with S seeds.
        env: an environment id, a function that makes one, or one environment (then episodes run one at a time).
        episodes: number of episodes E per seed, at least 1.
        first_seed: reset seed of the first episode.
        parallel: most environments held at once.
        deterministic: act with the policy's mean; otherwise sample from the policy, with noise of its own stream.

    Raises:
        EnvironmentMismatchError: if the environment cannot be made, or its spaces differ from those the agent was
            trained for.
        ConfigError: if a function returns the same environment twice.
        CorollaryError: if `episodes` or `parallel` is not positive, every seed has diverged, or the environment raises,
            gives an observation or a reward that is not finite, or without a time limit lets an episode go on for
            100 000 steps.
    """
    if not is_whole(episodes) or episodes < 1:
        raise CorollaryError(f"evaluate needs at least one episode, a whole number; got episodes={episodes!r}.")
    if parallel < 1:
        raise CorollaryError(f"evaluate needs at least one environment; got parallel={parallel}.")
    n_seeds = len(agent.seeds)
    pool = [make_single(env)]
    returns = np.zeros((n_seeds, episodes))
    lengths = np.zeros((n_seeds, episodes), np.int64)
    try:
        agent.check_environment(pool[0])
        env_id = environment_id(env, pool[0]) or environment_name(pool[0])
        lost = agent.diverged()
        jobs = [(s, e) for e in range(episodes) for s in np.flatnonzero(~lost).tolist()]
        if not isinstance(env, gymnasium.Env):
            while len(pool) < min(parallel, len(jobs)):
                pool.append(make_single(env))
            require_distinct(pool)
        _play(agent, pool, jobs, first_seed, deterministic, returns, lengths, lost)
    finally:
        agent.played_in(env)
        if not isinstance(env, gymnasium.Env):
            for each in pool:
                each.close()
    if lost.any():
        tell_divergence(
            f"{agent.algorithm} has diverged (seed {marked(agent.seeds, lost)}): networks or actions are not finite, "
            f"so it has no returns in {env_id}. Load an earlier checkpoint, or train anew with smaller step sizes.",
            of_all=bool(lost.all()),
            stacklevel=2,
        )
        returns[lost] = np.nan
    return Evaluation(
        env_id=env_id,
        returns_SE=returns,
        lengths_SE=lengths,
        episode_seeds=tuple(range(first_seed, first_seed + episodes)),
        scores_SE=agent.normalized_score(returns, env_id),
    )


def check_environment(agent: "Agent[Any]", env: EnvSource) -> None:
    """Raise what :func:`evaluate` would raise about the environment's spaces, without playing an episode."""
    made = make_single(env)
    try:
        agent.check_environment(made)
    finally:
        if made is not env:
            made.close()


def _play(
    agent: "Agent[Any]",
    pool: Sequence[gymnasium.Env[Any, Any]],
    jobs: list[tuple[int, int]],
    first_seed: int,
    deterministic: bool,
    returns: NDArray[np.float64],
    lengths: NDArray[np.int64],
    lost: NDArray[np.bool_],
) -> None:
    """Let each environment of the pool play job after job, all of them one step per round; note who gets `lost`."""
    waiting = list(reversed(jobs))
    stream = None if deterministic else RandomStream(agent.seeds, "evaluation", device=agent.device)
    rounds = itertools.count()
    name, is_limited = environment_name(pool[0]), has_time_limit(pool[0])
    playing: list[tuple[gymnasium.Env[Any, Any], int, int]] = []
    observations: list[Any] = []

    def place(seed_index: int, episode: int) -> str:
        return f"{name}, step {lengths[seed_index, episode]} of the evaluation episode of seed {first_seed + episode}"

    def start(env: gymnasium.Env[Any, Any]) -> None:
        if waiting:
            seed_index, episode = waiting.pop()
            try:
                obs, _ = env.reset(seed=first_seed + episode)
            except Exception as error:
                raise raised(place(seed_index, episode), "reset", error) from error
            playing.append((env, seed_index, episode))
            observations.append(obs)

    for env in pool:
        start(env)
    while playing:
        encoded = agent.encode(observations)
        if not np.isfinite(encoded).all():
            row = int(np.argwhere(~np.isfinite(encoded))[0, 0])
            raise _not_finite("observation", observations[row], place(*playing[row][1:]))
        actions = _act(agent, playing, encoded, stream, next(rounds))
        broken = ~np.isfinite(actions).all(1)
        if broken.any():
            lost[[playing[row][1] for row in np.flatnonzero(broken)]] = True
            waiting = [job for job in waiting if not lost[job[0]]]
        still, still_observations, free = [], [], []
        for (env, seed_index, episode), action in zip(playing, agent.decode(actions), strict=True):
            if lost[seed_index]:
                free.append(env)
                continue
            try:
                obs, reward, terminated, truncated, _ = env.step(action)
            except Exception as error:
                raise raised(place(seed_index, episode), "step", error) from error
            lengths[seed_index, episode] += 1
            if not math.isfinite(reward):
                raise _not_finite("reward", reward, place(seed_index, episode))
            returns[seed_index, episode] += float(reward)
            if terminated or truncated:
                free.append(env)
            elif lengths[seed_index, episode] == LONGEST_EPISODE and not is_limited:
                raise CorollaryError(
                    f"{place(seed_index, episode)} goes on, and the environment states no time limit: wrap it in "
                    "gymnasium.wrappers.TimeLimit."
                )
            else:
                still.append((env, seed_index, episode))
                still_observations.append(obs)
        playing, observations = still, still_observations
        for env in free:
            start(env)


def _not_finite(what: str, value: Any, place: str) -> CorollaryError:
    return CorollaryError(f"{place}: the {what} {value} is not finite: mend the environment.")


def _act(
    agent: "Agent[Any]",
    playing: Sequence[tuple[gymnasium.Env[Any, Any], int, int]],
    encoded: NDArray[Any],
    stream: RandomStream | None,
    round_: int,
) -> NDArray[Any]:
    """Return a row ``[d_a]`` per row of `encoded` from one batched call: rows are grouped by policy and padded."""
    rows_of: list[list[int]] = [[] for _ in agent.seeds]
    for row, (_, seed_index, _) in enumerate(playing):
        rows_of[seed_index].append(row)
    width = max(len(rows) for rows in rows_of)
    padded = np.zeros((len(agent.seeds), width, *encoded.shape[1:]), encoded.dtype)
    for seed_index, rows in enumerate(rows_of):
        padded[seed_index, : len(rows)] = encoded[rows]
    noise = None if stream is None else agent.draw_action_noise(stream, round_, width)
    acted = agent.act(torch.as_tensor(padded), noise).cpu().numpy()
    actions = np.empty((len(playing), *acted.shape[2:]), acted.dtype)
    for seed_index, rows in enumerate(rows_of):
        actions[rows] = acted[seed_index, : len(rows)]
    return actions
