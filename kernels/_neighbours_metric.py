"""The one definition of distance and of "k-th nearest" that every CPU back end of the neighbour search ends in.

D^2(key, i) = beta^2 * sum_c (s_c - s_ic)^2 + sum_c (a_c - a_ic)^2 is summed column after column in float64, from
explicit differences of the stored values (never as |x|^2 - 2xy + |y|^2, which cancels), so that two back ends that
consider the same row get the same bits, and rows with equal entries have equal distances. Rows are ordered by
(distance, row index).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Kth = tuple[NDArray[np.int64], NDArray[np.float64]]  # per key: row index, D^2

_EPS = float(np.finfo(np.float64).eps)


class Points(NamedTuple):
    """Rows or keys: their state part and their action part."""

    state: Floats  # [n, d_s]
    action: Floats  # [n, d_a]

    def take(self, index: Ints | slice) -> Points:
        """Return the chosen points."""
        return Points(self.state[index], self.action[index])


def squared_distances(rows: Points, keys: Points, row: Ints, key: Ints, beta: float) -> NDArray[np.float64]:
    """Return D^2 [n] between key number ``key[n]`` and row number ``row[n]``."""
    state_part = _sum_of_squares(rows.state, keys.state, row, key)
    squared: NDArray[np.float64] = beta**2 * state_part + _sum_of_squares(rows.action, keys.action, row, key)
    return squared


def select_kth(key: Ints, row: Ints, squared: NDArray[np.float64], n_keys: int, k: int) -> Kth:
    """Return per key the k-th of its candidates in the order (distance, row index), and its D^2.

    Args:
        key: [n] the key that each candidate belongs to, ascending; every key in ``range(n_keys)`` has at least k.
        row: [n] the candidate's row index; no row twice for one key.
        squared: [n] its D^2.
        n_keys: number of keys.
        k: rank, from 1.
    """
    first = np.searchsorted(key, np.arange(n_keys))
    if k > 1:
        chosen = np.lexsort((row, squared, key))[first + k - 1]
        return row[chosen].astype(np.int64), squared[chosen]
    smallest = np.minimum.reduceat(squared, first)
    tied = np.where(squared == smallest[key], row, np.iinfo(row.dtype).max)
    return np.minimum.reduceat(tied, first).astype(np.int64), smallest


class Frame:
    """Coordinates in which D is the Euclidean distance: (beta s, a), centred and turned onto the rows' principal axes.

    Boxes prune best when their sides follow the data; a rotation changes no distance beyond rounding.

    Args:
        rows: the points that set centre and axes.
        beta: weight of the state distance.
    """

    def __init__(self, rows: Points, beta: float) -> None:
        self._beta = beta
        self._centre = Points(rows.state.mean(axis=0, dtype=np.float64), rows.action.mean(axis=0, dtype=np.float64))
        joint = self._joint(rows)
        self._axes = np.linalg.eigh(joint.T @ joint)[1][:, ::-1]
        self.reach = float(np.sqrt(np.einsum("nd,nd->n", joint, joint).max()))  # the farthest row's distance from 0

    def coordinates(self, points: Points) -> NDArray[np.float64]:
        """Return the coordinates [n, d_s + d_a] of points."""
        coordinates: NDArray[np.float64] = self._joint(points) @ self._axes
        return coordinates

    def slack(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bound |computed - true distance| [n] between points with these coordinates and any row.

        Centring, scaling and rotating move a point by less than d^1.5 eps times its length; the factor leaves room for
        axes that are orthogonal to rounding only and for the distance itself.
        """
        length = self.reach + np.sqrt(np.einsum("nd,nd->n", coordinates, coordinates))
        slack: NDArray[np.float64] = 8.0 * coordinates.shape[1] ** 1.5 * _EPS * length
        return slack

    def _joint(self, points: Points) -> NDArray[np.float64]:
        # Centred before it is scaled: then every rounding is relative to the centred length.
        state = self._beta * (points.state - self._centre.state)
        return np.concatenate([state, points.action - self._centre.action], axis=1)


def _sum_of_squares(rows: Floats, keys: Floats, row: Ints, key: Ints) -> NDArray[np.float64]:
    difference = np.take(keys.astype(np.float64), key, axis=0)
    difference -= np.take(rows, row, axis=0)
    difference *= difference
    total: NDArray[np.float64] = np.add.reduce(np.ascontiguousarray(difference.T), axis=0)
    return total
