"""The one definition of distance and of "k-th nearest" that every CPU back end of the neighbour search ends in.

D^2(key, i) = beta^2 * sum_c (s_c - s_ic)^2 + sum_c (a_c - a_ic)^2 is summed column after column in float64, from explicit
differences of the stored values (never as |x|^2 - 2xy + |y|^2, which cancels), so that two back ends that consider the same
row get the same bits, and rows with equal entries have equal distances. Rows are ordered by (distance, row index).
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
    return beta**2 * state_part + _sum_of_squares(rows.action, keys.action, row, key)


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


def scaled(points: Points, beta: float) -> NDArray[np.float64]:
    """Return x = (beta s, a) [n, d_s + d_a], in which D is the Euclidean distance."""
    return np.concatenate([np.multiply(points.state, beta, dtype=np.float64), points.action], axis=1)


def principal_axes(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rotation [d, d] onto the principal axes of centred points, widest first.

    Boxes prune best when their sides follow the data; a rotation changes no distance beyond `rotation_error`.
    """
    return np.linalg.eigh(centred.T @ centred)[1][:, ::-1]


def rotation_error(width: int, length: Any) -> Any:
    """Bound the error of a distance between rotated float64 points whose lengths add up to `length`.

    One rotated point errs by less than d^1.5 eps times its length; the factor leaves room for centring, axes that are
    orthogonal to rounding only, and the distance itself.
    """
    return 8.0 * width**1.5 * _EPS * length


def _sum_of_squares(rows: Floats, keys: Floats, row: Ints, key: Ints) -> NDArray[np.float64]:
    difference = np.subtract(keys[key], rows[row], dtype=np.float64)
    total = np.zeros(len(row))
    for column in difference.T:
        total += column * column
    return total
