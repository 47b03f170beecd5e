"""Rollouts: what a fixed policy did in a fixed number of steps of many environments.

Axes: ``S`` seeds, ``T`` steps, ``N`` environments of a seed.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .environments import Environments
from .errors import marked, tell_divergence
from .normalisers import ObservationNormaliser, RewardNormaliser
from .policies import Actor


@dataclass(frozen=True)
class Rollout:
    """T consecutive steps of S * N environments.

    Observations are stored twice: as the environment gave them, for methods that look at them again with later
    statistics, and as the policy saw them, so that its probabilities can be computed again exactly.

    Attributes:
        raw_obs, raw_next_obs: ``[S, T, N, d_s]``; the successor is the true one, at episode ends too.
        obs, next_obs: the same, normalised with the statistics at the time.
        action: ``[S, T, N, d_a]``, unclipped; int64 categories of a discrete space.
        raw_reward, reward: ``[S, T, N]``, as the environment gave it and scaled.
        terminated, truncated: ``[S, T, N]`` bool.
        valid: ``[S, T, N]`` bool; ``None`` if every row is a transition. The others are resets of a vector
            environment that resets in a step of its own.
    """

    raw_obs: Tensor
    raw_next_obs: Tensor
    obs: Tensor
    next_obs: Tensor
    action: Tensor
    raw_reward: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor | None


class Collector:
    """Steps the environments of all seeds with a policy and keeps the running moments.

    Args:
        environments: R = S * N rows.
        obs: what they show now, ``[R, d_s]``.
        n_seeds: S.
        observation_normaliser, reward_normaliser: per-seed moments, updated here at every step as Stable-Baselines3
            and gymnasium do; ``None`` leaves the numbers as they are.
    """

    def __init__(
        self,
        environments: Environments,
        obs: NDArray[np.float32],
        n_seeds: int,
        observation_normaliser: ObservationNormaliser | None = None,
        reward_normaliser: RewardNormaliser | None = None,
    ) -> None:
        self.environments = environments
        self.observation_normaliser = observation_normaliser
        self.reward_normaliser = reward_normaliser
        self._shape = (n_seeds, environments.n_envs)
        self._lost = np.zeros(n_seeds, bool)  # seeds that have been named as diverged
        self._raw = self._by_seed(obs)

    def collect(self, act: Actor, noise: Tensor, device: torch.device, dtype: torch.dtype) -> Rollout:
        """Take T steps of every environment.

        A seed whose policy has diverged, so that its actions are not finite, takes actions of zeros instead: the other
        seeds must go on. A :class:`RuntimeWarning` names it once.

        Args:
            act: chooses actions for normalised observations.
            noise: what it samples with, ``[S, T, N, d_a]``.
            device: of the rollout's tensors.
            dtype: of its numbers.

        Raises:
            CorollaryError: if the policies of all seeds have diverged.
        """
        n_seeds, n_steps, n_envs, d_a = noise.shape
        normaliser, shape = self.observation_normaliser, (n_steps, n_seeds, n_envs)
        draws = noise.movedim(1, 0).cpu().numpy()
        raw_obs = np.empty((*shape, self._raw.shape[-1]), np.float32)
        raw_next_obs, obs, next_obs = (np.empty_like(raw_obs) for _ in range(3))
        actions: list[NDArray[Any]] = []
        reward = np.empty(shape)
        terminated, truncated, valid = (np.empty(shape, bool) for _ in range(3))
        raw, seen = self._raw, self._seen(self._raw)
        for t in range(n_steps):
            raw_obs[t], obs[t] = raw, seen
            action = act(seen, draws[t])
            if action.dtype.kind == "f" and not math.isfinite(np.vdot(action, action)):
                action = self._finite(action)
            step = self.environments.step(action.reshape(-1, d_a))
            actions.append(action)
            raw_next = raw_next_obs[t] = self._by_seed(step.next_obs)
            reward[t], terminated[t], truncated[t] = (
                self._by_seed(each) for each in (step.reward, step.terminated, step.truncated)
            )
            valid[t] = self._by_seed(step.valid)
            raw = self._by_seed(step.obs)
            if normaliser is not None:
                normaliser.update(raw)
            seen = self._seen(raw)
            # The same observation seen with the same moments, unless an episode ended in between.
            next_obs[t] = seen if not (terminated[t] | truncated[t]).any() else self._seen(raw_next)
        self._raw = raw.copy()

        def tensor(steps: NDArray[Any], kind: torch.dtype | None = dtype) -> Tensor:
            return torch.as_tensor(steps, dtype=kind).movedim(0, 1).contiguous().to(device)

        chosen = np.stack(actions)
        flags = terminated, truncated, valid
        return Rollout(
            raw_obs=tensor(raw_obs),
            raw_next_obs=tensor(raw_next_obs),
            obs=tensor(obs),
            next_obs=tensor(next_obs),
            action=tensor(chosen, dtype if chosen.dtype.kind == "f" else None),
            raw_reward=tensor(reward),
            reward=tensor(self._scaled(reward, *flags)),
            terminated=tensor(terminated, None),
            truncated=tensor(truncated, None),
            valid=None if valid.all() else tensor(valid, None),
        )

    def _finite(self, action: NDArray[Any]) -> NDArray[Any]:
        """Return the actions ``[S, N, d_a]`` with zeros for what is not finite."""
        is_finite = np.isfinite(action)
        lost = ~is_finite.all((1, 2))
        if lost.all() or (lost & ~self._lost).any():
            others = "" if lost.all() else " It takes actions of zeros, so that the others go on."
            tell_divergence(
                f"{self.environments.name}: the actions of the policy are not finite (seed "
                f"{marked(self.environments.seeds, lost)}): its training has diverged. Load an earlier checkpoint, or "
                f"train anew with smaller step sizes.{others}",
                of_all=bool(lost.all()),
                stacklevel=2,
            )
        self._lost |= lost
        return np.where(is_finite, action, 0).astype(action.dtype)

    def _seen(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        return raw if self.observation_normaliser is None else self.observation_normaliser.normalize(raw)

    def _scaled(
        self,
        reward: NDArray[np.float64],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        valid: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        if self.reward_normaliser is None:
            return reward
        terminated, truncated, valid = (np.moveaxis(each, 0, 1) for each in (terminated, truncated, valid))
        scaled = self.reward_normaliser.rollout(np.moveaxis(reward, 0, 1), terminated, truncated, valid)
        return np.moveaxis(scaled, 1, 0)

    def _by_seed(self, rows: NDArray[Any]) -> NDArray[Any]:
        """``[R, ...]`` to ``[S, N, ...]``."""
        return rows.reshape(*self._shape, *rows.shape[1:])
