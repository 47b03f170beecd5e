r"""What a dataset can teach, in numbers: how good its trajectories are, how much it covers, what reweighting costs.

Paper of TQ and SACo: K. Schweighofer et al., "A Dataset Perspective on Offline Reinforcement Learning", CoLLAs 2022,
arXiv 2111.04714.

    TQ(D)   = (mean_i G_i - J_random) / (J_best - J_random)          trajectory quality, G_i undiscounted returns
    SACo(D) = u(D) / u(D_ref)                                        state-action coverage, u the distinct (s, a)
    exp H   = exp(-sum_c f_c log f_c)                                effective support, f_c the share of rows in cell c
    C_max   = max d_pi / d_D,   C_mean = sum d_pi^2 / d_D            concentrability of a policy pi
    ESS     = (sum_i w_i)^2 / sum_i w_i^2                            effective sample size of weights

Continuous numbers are told apart by cells: 100 equal bins per dimension between the limits of a reference set.

Deviations and choices:
1. u is counted exactly; the paper estimates it by HyperLogLog with a relative error of 0.01.
2. What lies outside the limits of the reference counts to the outermost bin.
3. SACo depends on the sizes of both sets: compare sets of equal size. It may exceed 1, and is not clipped.
4. With many dimensions nearly every row has a cell of its own and u tells little but the number of rows;
   :func:`distance_to_data` then says more.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from .dataset import Dataset
from .errors import ConfigError, DataError

FloatArray = NDArray[np.float64]

BINS = 100
"""Bins per dimension, as in the paper."""

COARSE_BINS = (2, 5, 10)
"""Bins per dimension at which concentrability is described: with many dimensions and finer cells hardly any are shared.
"""


# ------------------------------------------------------------------------------------------------- trajectories


def trajectory_quality(dataset: Dataset, random_return: float | None = None, best_return: float | None = None) -> float:
    """TQ: 0 for the returns of a random policy, 1 for those of the best; neither bound is enforced.

    Args:
        dataset: whose mean undiscounted return is placed between the two.
        random_return: mean return of a random policy; by default the set's ``ref_min_score``.
        best_return: mean return of the best policy known, in the paper that of the online run; by default the set's
            ``ref_max_score``, an expert's. TQ is then the normalised score of the data divided by 100.

    Raises:
        DataError: if a reference is missing, or both are the same.
    """
    low = dataset.info.ref_min_score if random_return is None else random_return
    high = dataset.info.ref_max_score if best_return is None else best_return
    if low is None or high is None or low == high:
        raise DataError(
            f"{dataset.info.name} has the reference returns {low} and {high}: trajectory quality needs two different "
            "ones, of a random and of the best policy"
        )
    return float((dataset.episode_returns().mean() - low) / (high - low))


# ----------------------------------------------------------------------------------------------------- coverage


@dataclass(frozen=True, eq=False)
class Cells:
    """Equal cells over the state-action pairs of a set; a discrete action is a dimension with one bin per action.

    Attributes:
        low, high: limits of every dimension ``[d]``, states first.
        bins: number of bins of every dimension ``[d]``; a dimension without extent has one.
    """

    low: FloatArray
    high: FloatArray
    bins: NDArray[np.int64]

    @classmethod
    def of(cls, reference: Dataset, bins: int = BINS) -> "Cells":
        """Lay `bins` bins between the smallest and the largest value of each dimension of `reference`.

        Raises:
            ConfigError: if `bins` is below 1.
        """
        if bins < 1:
            raise ConfigError(f"bins must be at least 1; got {bins}.")
        pairs = state_actions(reference)
        low, high = pairs.min(0).astype(np.float64), pairs.max(0).astype(np.float64)
        counts = np.where(high > low, bins, 1)
        if reference.n_actions is not None:
            low[-1], high[-1], counts[-1] = -0.5, reference.n_actions - 0.5, reference.n_actions
        return cls(low, high, counts)

    @property
    def count(self) -> int:
        """Product of the numbers of bins: far more than fit into 64 bits, in many dimensions."""
        return math.prod(self.bins.tolist())

    def index(self, dataset: Dataset) -> NDArray[Any]:
        """Return the bin of every dimension of every row, ``[N, d]``; the upper limit belongs to the last bin.

        Raises:
            DataError: if the set has other dimensions than the reference.
        """
        pairs = state_actions(dataset)
        if pairs.shape[1] != len(self.bins):
            raise DataError(
                f"{dataset.info.name} has {pairs.shape[1]} dimensions of states and actions, the reference has "
                f"{len(self.bins)}: take a reference of the same task"
            )
        found = np.empty(pairs.shape, np.uint8 if self.bins.max() <= 256 else np.int64)
        extent = np.where(self.high > self.low, self.high - self.low, 1)
        for i, column in enumerate(pairs.T):
            bin_ = np.floor((column - self.low[i]) / extent[i] * self.bins[i])
            found[:, i] = bin_.clip(0, self.bins[i] - 1)
        return found

    def occupancy(self, dataset: Dataset) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the cells that hold rows, as sortable keys ``[u]``, and how many each holds, ``[u]``."""
        index = np.ascontiguousarray(self.index(dataset))
        keys = index.view(np.dtype((np.void, index.dtype.itemsize * index.shape[1]))).ravel()
        cells, counts = np.unique(keys, return_counts=True)
        return cells, counts


@dataclass(frozen=True)
class Coverage:
    """How the rows of a set spread over cells.

    Attributes:
        rows: N.
        occupied: cells with at least one row, u.
        share: occupied cells over all cells; next to 0 with more than a few dimensions.
        effective_support: ``exp(H)`` of the rows' distribution over cells, between 1 (all in one cell) and `occupied`
            (equally many in each).
    """

    rows: int
    occupied: int
    share: float
    effective_support: float


def coverage(dataset: Dataset, cells: Cells | None = None) -> Coverage:
    """Count exactly which cells the rows of `dataset` occupy; without `cells`, those of its own limits."""
    cells = Cells.of(dataset) if cells is None else cells
    _, counts = cells.occupancy(dataset)
    frequency = counts / counts.sum()
    support = float(np.exp(-(frequency * np.log(frequency)).sum()))
    return Coverage(len(dataset), len(counts), len(counts) / cells.count, support)


def saco(dataset: Dataset, reference: Dataset, bins: int = BINS) -> float:
    """SACo: distinct state-action pairs relative to those of `reference`, in cells between the reference's limits.

    In the paper the reference is the replay buffer of an online run; 1 for the reference itself.

    Raises:
        DataError: if the two are not of the same task.
    """
    _require_same_task(dataset, reference)
    cells = Cells.of(reference, bins)
    return coverage(dataset, cells).occupied / coverage(reference, cells).occupied


def _require_same_task(dataset: Dataset, reference: Dataset) -> None:
    """Raise a :class:`DataError` if states or actions of the two are not of the same kind."""
    ours, theirs = (
        {
            "dimensions of states": int(np.prod(each.observations.shape[1:])),
            "dimensions of actions": int(np.prod(each.actions.shape[1:])),
            "discrete actions": each.n_actions or 0,
        }
        for each in (dataset, reference)
    )
    for what, value in ours.items():
        if value != theirs[what]:
            raise DataError(
                f"{dataset.info.name} has {value} {what}, {reference.info.name} has {theirs[what]}: take a "
                "reference of the same task"
            )


def distance_to_data(dataset: Dataset, obs: ArrayLike, action: ArrayLike) -> FloatArray:
    """Euclidean distance of each pair ``[n, d_s]``, ``[n, d_a]`` to the nearest row of the set, ``[n]``; exact.

    Every dimension counts in standard deviations of the set (those without spread in its own unit). A k-d tree is
    searched; with a dozen dimensions or more a query takes time in proportion to the rows.

    Raises:
        DataError: if actions are discrete, or the dimensions are others.
    """
    if dataset.n_actions is not None:
        raise DataError(f"{dataset.info.name} has discrete actions, between which there is no distance")
    rows, asked = state_actions(dataset), np.hstack([np.asarray(obs, np.float64), np.asarray(action, np.float64)])
    if asked.shape[1] != rows.shape[1]:
        raise DataError(f"{dataset.info.name} has pairs of {rows.shape[1]} numbers; got {asked.shape[1]}")
    spread = rows.std(0, dtype=np.float64)
    scale = np.where(spread > 0, spread, 1)
    return np.asarray(cKDTree(rows / scale).query(asked / scale)[0])


def state_actions(dataset: Dataset) -> NDArray[np.float32]:
    """Return the pairs ``[N, d_s + d_a]``; a discrete action is its index."""
    observations = dataset.observations.reshape(len(dataset.observations), -1)
    rows = np.arange(len(dataset)) + dataset.episode_of_row
    return np.hstack([observations[rows], dataset.actions.reshape(len(dataset), -1).astype(np.float32)])


# ----------------------------------------------------------------------------------------------- concentrability


class Concentrability(NamedTuple):
    """Ratios of a policy's occupancy to the data's.

    Attributes:
        largest: ``max d_pi / d_D`` over what the policy visits; inf if the data misses any of it.
        mean: ``E_{d_pi}[d_pi / d_D] = 1 + chi^2(d_pi || d_D)``, at least 1; inf likewise. N rows reweighted to the
            policy are worth ``N / mean`` rows of its own.
        uncovered: probability under the policy of what the data misses.
    """

    largest: float
    mean: float
    uncovered: float


def concentrability(policy: ArrayLike, data: ArrayLike) -> Concentrability:
    """Compare two occupancies over the same finite state-action pairs (arrays of one shape); exact.

    Args:
        policy: ``d_pi``, for instance ``(1 - gamma) sum_t gamma^t P(s_t, a_t)``.
        data: ``d_D``, for instance counts over rows. Both are normalised to sum to 1.

    Raises:
        DataError: for different shapes, negative entries or a sum that is not positive.
    """
    d_pi, d_data = _distribution("policy", policy), _distribution("data", data)
    if d_pi.shape != d_data.shape:
        raise DataError(f"policy has shape {list(d_pi.shape)} and data {list(d_data.shape)}: give the same pairs")
    visited = d_pi > 0
    missed = visited & (d_data == 0)
    uncovered = float(d_pi[missed].sum())
    if missed.any():
        return Concentrability(np.inf, np.inf, uncovered)
    ratio = d_pi[visited] / d_data[visited]
    return Concentrability(float(ratio.max()), float((d_pi[visited] * ratio).sum()), 0.0)


def empirical_concentrability(rollouts: Dataset, dataset: Dataset, bins: int = BINS) -> Concentrability:
    """Plug-in estimate for continuous pairs: :func:`concentrability` of the shares of rows in cells.

    The cells lie between the limits of both sets. The estimate depends on `bins`: cells much wider than the spread of
    the policy hide differences inside them, and with cells so narrow that most hold a single row, what the data covers
    seems missed. Read it for several numbers of bins, and only where both sets have many rows per cell.

    Args:
        rollouts: rows of the policy in question (:func:`corollary.core.collect.collect`), undiscounted.
        dataset: the data to learn from.
        bins: per dimension.

    Raises:
        DataError: if the two are not of the same task.
        ConfigError: if `bins` is below 1.
    """
    _require_same_task(dataset, rollouts)
    one, other = Cells.of(dataset, bins), Cells.of(rollouts, bins)
    low, high = np.minimum(one.low, other.low), np.maximum(one.high, other.high)
    # What is constant in each set, but not the same, has a bin in each and an extent in both together.
    apart = (high > low) & (one.bins == 1) & (other.bins == 1)
    cells = Cells(low, high, np.where(apart, bins, np.maximum(one.bins, other.bins)))
    (keys_pi, counts_pi), (keys_data, counts_data) = cells.occupancy(rollouts), cells.occupancy(dataset)
    keys, position = np.unique(np.concatenate([keys_pi, keys_data]), return_inverse=True)
    occupancies = np.zeros((2, len(keys)))
    occupancies[0, position[: len(keys_pi)]] = counts_pi
    occupancies[1, position[len(keys_pi) :]] = counts_data
    return concentrability(*occupancies)


def _distribution(name: str, values: ArrayLike) -> FloatArray:
    array = np.asarray(values, np.float64)
    total = array.sum()
    if not np.isfinite(array).all() or (array < 0).any() or total <= 0:
        raise DataError(f"{name} must hold probabilities: finite, not negative, not all zero")
    return np.asarray(array / total)


# ------------------------------------------------------------------------------------------------------- weights


def effective_sample_size(weights: ArrayLike) -> float:
    """``(sum w)^2 / sum w^2``: from 1 (one weight has it all) to their number (all alike); any scale, not negative.

    The variance of a weighted mean of independent values is that of a plain mean of so many.
    """
    w = _distribution("weights", weights)
    return float(1 / np.square(w).sum())


# ------------------------------------------------------------------------------------------------------- summary


def describe(dataset: Dataset, reference: Dataset | None = None) -> dict[str, Any]:
    """Return what `corollary data info` prints of these: plain numbers, JSON-able.

    ``trajectory_quality`` is None without reference returns, ``saco`` and ``concentrability`` without a `reference`
    set; the cells of coverage are those between the limits of `reference`, or else of the set itself. Concentrability
    is that of the policy which collected `reference`, for several numbers of bins per dimension; what is infinite,
    because the data misses something of the reference, is the string ``"Infinity"``, as in run directories.

    Raises:
        DataError: if `reference` is not of the same task.
    """
    if reference is not None:
        _require_same_task(dataset, reference)
    cells = Cells.of(dataset if reference is None else reference)
    covered = coverage(dataset, cells)
    low, high = dataset.info.ref_min_score, dataset.info.ref_max_score
    summary: dict[str, Any] = {
        "trajectory_quality": None if low is None or high is None else trajectory_quality(dataset),
        "coverage": {
            "occupied cells": covered.occupied,
            "share of cells": covered.share,
            "effective support": covered.effective_support,
        },
        "saco": None,
        "concentrability": None,
    }
    if reference is not None:
        summary["saco"] = {
            "value": covered.occupied / coverage(reference, cells).occupied,
            "rows": len(dataset),
            "reference rows": len(reference),
        }
        found = {bins: empirical_concentrability(reference, dataset, bins) for bins in COARSE_BINS}
        summary["concentrability"] = {
            f"{bins} bins": {
                name: value if np.isfinite(value) else "Infinity" for name, value in ratios._asdict().items()
            }
            for bins, ratios in found.items()
        }
    return summary
