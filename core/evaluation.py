"""Evaluation: every seed's policy plays the same episodes, its environments stepped side by side."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from ..kernels.streams import RandomStream
from .errors import CorollaryError, EnvironmentMismatchError

if TYPE_CHECKING:
    from .agent import Agent

EnvSource = str | gymnasium.Env[Any, Any] | Callable[[], gymnasium.Env[Any, Any]]

# Training seeds are small integers; evaluation episodes start far from them, so no episode is shared with training.
FIRST_EPISODE_SEED = 1_000_000


@dataclass(frozen=True)
class Evaluation:
    """What the policies of S seeds earned in E episodes each.

    Attributes:
        env_id: the environment's id.
        returns_SE: undiscounted sums of raw rewards.
        lengths_SE: episode lengths in environment steps.
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
    The same call gives the same bits, and nothing of the agent changes. Another `parallel` changes the batch shapes,
    so the last bits of the actions (and, with ``deterministic=False``, which noise an episode gets).

    Args:
        agent: a trained agent with S seeds.
        env: an environment id, a function that makes one, or one environment (then episodes run one at a time).
        episodes: number of episodes E per seed, at least 1.
        first_seed: reset seed of the first episode.
        parallel: most environments held at once.
        deterministic: act with the policy's mean; otherwise sample from the policy, with noise of its own stream.

    Raises:
        EnvironmentMismatchError: if the environment's spaces differ from those the agent was trained for.
        CorollaryError: if `episodes` is not positive, or the environment gives a reward that is not finite.
    """
    if episodes < 1:
        raise CorollaryError(f"evaluate needs at least one episode; got episodes={episodes}.")
    n_seeds = len(agent.seeds)
    jobs = [(s, e) for e in range(episodes) for s in range(n_seeds)]
    pool = [_make(env)]
    returns = np.zeros((n_seeds, episodes))
    lengths = np.zeros((n_seeds, episodes), np.int64)
    try:
        agent.check_environment(pool[0])
        env_id = pool[0].spec.id if pool[0].spec is not None else type(pool[0].unwrapped).__name__
        if not isinstance(env, gymnasium.Env):
            pool += [_make(env) for _ in range(min(parallel, len(jobs)) - 1)]
        _play(agent, pool, jobs, first_seed, deterministic, returns, lengths)
    finally:
        if not isinstance(env, gymnasium.Env):
            for each in pool:
                each.close()
    return Evaluation(
        env_id=env_id,
        returns_SE=returns,
        lengths_SE=lengths,
        episode_seeds=tuple(range(first_seed, first_seed + episodes)),
        scores_SE=agent.normalized_score(returns, env_id),
    )


def check_environment(agent: "Agent[Any]", env: EnvSource) -> None:
    """Raise what :func:`evaluate` would raise about the environment's spaces, without playing an episode."""
    made = _make(env)
    try:
        agent.check_environment(made)
    finally:
        if made is not env:
            made.close()


def _make(env: EnvSource) -> gymnasium.Env[Any, Any]:
    if isinstance(env, gymnasium.Env):
        return env
    # The passive checker repeats for every step what the spaces were checked for, at a third of the time of a step.
    made = gymnasium.make(env, disable_env_checker=True) if isinstance(env, str) else env()
    if not isinstance(made, gymnasium.Env):
        raise EnvironmentMismatchError(f"The environment function returned {type(made).__name__}, not a gymnasium.Env.")
    return made


def _play(
    agent: "Agent[Any]",
    pool: Sequence[gymnasium.Env[Any, Any]],
    jobs: list[tuple[int, int]],
    first_seed: int,
    deterministic: bool,
    returns: NDArray[np.float64],
    lengths: NDArray[np.int64],
) -> None:
    """Let each environment of the pool play job after job, all of them one step per round."""
    waiting = list(reversed(jobs))
    stream = None if deterministic else RandomStream(agent.seeds, "evaluation", device=agent.device)
    rounds = itertools.count()
    playing: list[tuple[gymnasium.Env[Any, Any], int, int]] = []
    observations: list[NDArray[Any]] = []

    def start(env: gymnasium.Env[Any, Any]) -> None:
        if waiting:
            seed_index, episode = waiting.pop()
            obs, _ = env.reset(seed=first_seed + episode)
            playing.append((env, seed_index, episode))
            observations.append(obs)

    for env in pool:
        start(env)
    while playing:
        actions = _act(agent, playing, observations, stream, next(rounds))
        still, still_observations, free = [], [], []
        for (env, seed_index, episode), action in zip(playing, actions, strict=True):
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[seed_index, episode] += float(reward)
            lengths[seed_index, episode] += 1
            if not np.isfinite(returns[seed_index, episode]):
                raise CorollaryError(
                    f"Reward {reward} at step {lengths[seed_index, episode]} of an evaluation episode "
                    f"(reset seed {first_seed + episode}) is not finite: mend the environment."
                )
            if terminated or truncated:
                free.append(env)
            else:
                still.append((env, seed_index, episode))
                still_observations.append(obs)
        playing, observations = still, still_observations
        for env in free:
            start(env)


def _act(
    agent: "Agent[Any]",
    playing: Sequence[tuple[gymnasium.Env[Any, Any], int, int]],
    observations: Sequence[NDArray[Any]],
    stream: RandomStream | None,
    round_: int,
) -> Sequence[Any]:
    """Return one action per playing environment from one batched call: rows are grouped by policy and padded."""
    rows_of: list[list[int]] = [[] for _ in agent.seeds]
    for row, (_, seed_index, _) in enumerate(playing):
        rows_of[seed_index].append(row)
    stacked = agent.encode(observations)
    width = max(len(rows) for rows in rows_of)
    padded = np.zeros((len(agent.seeds), width, *stacked.shape[1:]), stacked.dtype)
    for seed_index, rows in enumerate(rows_of):
        padded[seed_index, : len(rows)] = stacked[rows]
    noise = None if stream is None else agent.draw_action_noise(stream, round_, width)
    acted = agent.act(torch.as_tensor(padded), noise).cpu().numpy()
    actions = np.empty((len(playing), *acted.shape[2:]), acted.dtype)
    for seed_index, rows in enumerate(rows_of):
        actions[rows] = acted[seed_index, : len(rows)]
    return agent.decode(actions)
