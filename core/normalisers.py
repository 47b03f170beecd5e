r"""Observations and rewards divided by running moments, for every seed separately.

Running moments start at count n = 1e-4, mean m = 0, variance v = 1. A batch with count n_b, mean m_b and population
variance v_b joins them by the parallel update of Chan, Golub and LeVeque (1979)::

    Δ = m_b - m,  n' = n + n_b,  m' = m + Δ n_b / n',  v' = (v n + v_b n_b + Δ² n n_b / n') / n'

which is what Stable-Baselines3's ``VecNormalize`` and gymnasium's ``NormalizeObservation`` and ``NormalizeReward`` do.
Statistics are float64. Rows that are no transitions (the reset rows of a next-step autoreset) take no part in those of
rewards; those of observations count whatever an environment shows, so both the last and the first one of episodes.

Axes: ``S`` seeds, ``T`` time, ``N`` environments per seed.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError

CLIP = 10.0
"""Bound of normalised observations and rewards."""

EPSILON = 1e-8
"""Added to variances before their square root."""

INITIAL_COUNT = 1e-4

ResetOn = Literal["done", "terminated"]


class RunningMoments:
    """Mean and population variance of d numbers for each of S seeds.

    Attributes:
        mean: ``[S, d]`` float64.
        var: ``[S, d]`` float64.
        count: rows seen, ``[S, 1]`` float64, beginning at 1e-4.
    """

    def __init__(self, n_seeds: int, dim: int) -> None:
        self.mean: NDArray[np.float64] = np.zeros((n_seeds, dim))
        self.var: NDArray[np.float64] = np.ones((n_seeds, dim))
        self.count: NDArray[np.float64] = np.full((n_seeds, 1), INITIAL_COUNT)

    def update(self, batch: NDArray[np.floating], valid: NDArray[np.bool_] | None = None) -> None:
        """Let the rows of `batch` ``[S, N, d]`` join the moments; those where `valid` ``[S, N]`` is False do not."""
        if valid is not None and not valid.all():
            self._update_valid(batch, valid)
            return
        n = batch.shape[1]
        if n == 1:  # what every step of a single environment brings: mean and variance are known
            mean, squares = batch[:, 0].astype(np.float64), 0.0
        else:
            mean = np.add.reduce(batch, 1, np.float64) / n
            deviation = batch - mean[:, None]
            squares = np.add.reduce(deviation * deviation, 1)
        self.mean, self.var, self.count = self._joined(n, mean, squares)

    def _update_valid(self, batch: NDArray[np.floating], valid: NDArray[np.bool_]) -> None:
        n = valid.sum(1, keepdims=True)
        kept = np.where(valid[..., None], batch, 0.0)
        mean = kept.sum(1) / np.maximum(n, 1)
        squares = (np.where(valid[..., None], batch - mean[:, None], 0.0) ** 2).sum(1)
        self.mean, self.var, self.count = self._joined(n, mean, squares)

    def _joined(
        self, n: int | NDArray[np.int64], mean: NDArray[np.float64], squares: float | NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return the moments joined by `n` rows with `mean` and a sum of squared deviations, v_b n_b, of `squares`."""
        count = self.count + n
        share = n / count
        delta = mean - self.mean
        var = (self.var * self.count + squares + delta * delta * (self.count * share)) / count
        return self.mean + delta * share, var, count

    def state(self, prefix: str = "") -> dict[str, NDArray[np.float64]]:
        """Return copies of the three arrays, their names after `prefix`."""
        return {f"{prefix}{name}": getattr(self, name).copy() for name in ("mean", "var", "count")}

    def load_state(self, arrays: Mapping[str, NDArray[np.float64]], prefix: str = "") -> None:
        """Take over what :meth:`state` returned.

        Raises:
            CheckpointError: if an array is missing or has another shape.
        """
        for name in ("mean", "var", "count"):
            setattr(self, name, stored_array(arrays, f"{prefix}{name}", getattr(self, name).shape))


def stored_array(arrays: Mapping[str, NDArray[np.float64]], name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return a copy of one stored array.

    Raises:
        CheckpointError: if it is missing or has another shape.
    """
    if name not in arrays or arrays[name].shape != shape:
        found = f"has shape {list(arrays[name].shape)}" if name in arrays else "is missing"
        raise CheckpointError(f"The stored array {name!r} of a normaliser {found} and must have {list(shape)}.")
    return arrays[name].astype(np.float64)


class ObservationNormaliser:
    """``clip((s - mean) / sqrt(var + 1e-8), -10, 10)`` with the moments of the observations seen so far.

    Args:
        n_seeds: S; each seed has moments of its own.
        dim: d, entries of an observation.

    Attributes:
        moments: the running moments, ``[S, d]``.
        frozen: set to True, :meth:`update` changes nothing any more.
    """

    def __init__(self, n_seeds: int, dim: int) -> None:
        self.moments = RunningMoments(n_seeds, dim)
        self.frozen = False

    def update(self, obs: NDArray[np.floating], valid: NDArray[np.bool_] | None = None) -> None:
        """Let one vector step's observations ``[S, N, d]`` join the moments, where `valid` ``[S, N]`` only."""
        if not self.frozen:
            self.moments.update(obs, valid)

    def normalize(self, obs: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return observations ``[S, ..., d]`` normalised with the moments as they are, float32."""
        n_seeds, dim = self.moments.mean.shape
        shape = (n_seeds, *(1,) * (obs.ndim - 2), dim)
        scaled = (obs - self.moments.mean.reshape(shape)) / np.sqrt(self.moments.var + EPSILON).reshape(shape)
        return _clipped(scaled).astype(np.float32)

    def normalize_tensor(self, obs: Tensor) -> Tensor:
        """Return a tensor ``[S, ..., d]`` normalised likewise, of the same dtype and on the same device."""
        n_seeds, dim = self.moments.mean.shape
        shape = (n_seeds, *(1,) * (obs.ndim - 2), dim)
        mean = torch.as_tensor(self.moments.mean, device=obs.device).view(shape)
        scale = torch.as_tensor(np.sqrt(self.moments.var + EPSILON), device=obs.device).view(shape)
        return ((obs - mean) / scale).clamp(-CLIP, CLIP).to(obs.dtype)

    def plain(self, seed_index: int) -> nn.Module:
        """Return one seed's normalisation as it is now, as an ordinary module on ``[n, d]`` (for export)."""
        return _Normalisation(self.moments.mean[seed_index], np.sqrt(self.moments.var[seed_index] + EPSILON))

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Return all that :meth:`load_state` needs to go on exactly."""
        return {**self.moments.state(), "frozen": np.full(len(self.moments.mean), float(self.frozen))}

    def load_state(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """Take over what :meth:`state` returned.

        Raises:
            CheckpointError: if an array is missing or has another shape.
        """
        self.moments.load_state(arrays)
        self.frozen = bool(stored_array(arrays, "frozen", (len(self.moments.mean),)).all())


class _Normalisation(nn.Module):
    """``clip((s - mean) / scale, -10, 10)`` with constants."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: NDArray[np.float64], scale: NDArray[np.float64]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def forward(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) / self.scale).clamp(-CLIP, CLIP)


class RewardNormaliser:
    r"""``clip(r / sqrt(var(G) + 1e-8), -10, 10)`` with a running discounted sum G of rewards per environment.

    The variance is that of every G seen so far; the mean is never subtracted, which would change what is optimal.
    Two published rules say when the past leaves G; the reward is divided after G has joined the moments in both::

        reset_on="done"        G ← γ G + r,                    then G ← 0 where the step terminated or truncated
        reset_on="terminated"  G ← γ G (1 - terminated) + r;   truncation leaves G alone

    Sources: ``"done"`` Stable-Baselines3's ``VecNormalize``; ``"terminated"`` gymnasium's ``NormalizeReward`` (used by
    CleanRL, SPO, PROPS), where the past leaves before the terminal step's own reward joins.

    Args:
        n_seeds: S; each seed has moments of its own.
        n_envs: N.
        discount: γ in [0, 1]; 0 divides by the spread of single rewards.
        reset_on: one of the two rules.

    Attributes:
        moments: the running moments of G, ``[S, 1]``.
        running: G, ``[S, N]`` float64.

    Raises:
        ConfigError: for a discount out of range or another rule.
    """

    def __init__(self, n_seeds: int, n_envs: int, discount: float, reset_on: ResetOn = "done") -> None:
        if not 0 <= discount <= 1:
            raise ConfigError(f"The discount of a RewardNormaliser must be in [0, 1]; got {discount}.")
        if reset_on not in ("done", "terminated"):
            raise ConfigError(f"reset_on must be 'done' or 'terminated'; got {reset_on!r}.")
        self.moments = RunningMoments(n_seeds, 1)
        self.running: NDArray[np.float64] = np.zeros((n_seeds, n_envs))
        self.discount = discount
        self.reset_on = reset_on

    def step(
        self,
        reward: NDArray[np.float64],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        valid: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float64]:
        """Let one vector step, all arrays ``[S, N]``, join G and its moments; return its normalised rewards."""
        past = self.discount * self.running
        if self.reset_on == "terminated":
            past *= ~terminated
        running = past + reward
        if valid is not None:
            running = np.where(valid, running, self.running)
        self.moments.update(running[..., None], valid)
        if self.reset_on == "done":
            running *= ~(terminated | truncated)
        self.running = running
        return self.normalize(reward)

    def rollout(
        self,
        reward: NDArray[np.float64],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        valid: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float64]:
        """Return what :meth:`step` returns at each of T steps, ``[S, T, N]``: later steps see later statistics."""
        normalised = np.empty_like(reward)
        for t in range(reward.shape[1]):
            now = None if valid is None else valid[:, t]
            normalised[:, t] = self.step(reward[:, t], terminated[:, t], truncated[:, t], now)
        return normalised

    def normalize(self, reward: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return rewards ``[S, ...]`` divided with the moments as they are."""
        shape = (len(reward), *(1,) * (reward.ndim - 1))
        return _clipped(reward / np.sqrt(self.moments.var + EPSILON).reshape(shape))

    def begin_episodes(self) -> None:
        """Forget the rewards of episodes that were left: new ones begin in all environments."""
        self.running = np.zeros_like(self.running)

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Return all that :meth:`load_state` needs to go on exactly."""
        return {**self.moments.state(), "running": self.running.copy()}

    def load_state(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """Take over what :meth:`state` returned.

        Raises:
            CheckpointError: if an array is missing or has another shape.
        """
        self.moments.load_state(arrays)
        self.running = stored_array(arrays, "running", self.running.shape)


def _clipped(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Clip in place, and faster than `numpy.clip` where the array is small."""
    return np.minimum(np.maximum(values, -CLIP, out=values), CLIP, out=values)
