r"""Block scan: exhaustive search by matrix products over the blocks of rows that a bound cannot rule out.

Rows, scaled to x = (beta s, a) and turned onto their principal axes, are split at medians into up to 64 blocks, each with
its bounding box. A key visits the blocks whose box is nearer than the best distance known to it. In a block with centre c,

    |q - x|^2 = |q - c|^2 + |x - c|^2 - 2 (q - c).(x - c)

is one float32 product of the keys (q - c, 1, |q - c|^2) with the stored matrix (-2 (x - c), |x - c|^2, 1). Cancellation
makes this approximate: with s = |q - c| + max |x - c| and u = 2^-24, rounding the two differences, the squares and the
d + 2 products errs by less than (d + 8) u s^2. Twice that, E, is subtracted in the key's last entry, so that products are
lower bounds and products + 2 E upper bounds. Rows whose lower bound reaches the smallest upper bound are compared again in
the metric's own arithmetic (``_neighbours_metric``); the answer is therefore exact, ties included.

NumPy's product is used because PyTorch's may be switched to a lower precision by autocast or a global setting.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from . import _neighbours_reference
from ._neighbours_metric import (
    Ints,
    Kth,
    Points,
    principal_axes,
    rotation_error,
    scaled,
    select_kth,
    squared_distances,
)

_MAX_SPLITS = 6
_MIN_BLOCK = 512
_GROUP = 64  # rows that share one lower bound; a block's length is a multiple of it
_KEYS_PER_PRODUCT = 64  # a block of 16k rows then needs 4 MiB for its distances
_KEYS_PER_PASS = 512
_UNIT = 2.0**-24


class BlockScan:
    """Exact k-th nearest rows, at a cost that never exceeds one product of all keys with all rows.

    Memory: 4 (d + 3) bytes per row beside the rows themselves.
    """

    def __init__(self, rows: Points, beta: float) -> None:
        self._rows = rows
        self._beta = beta
        joint = scaled(rows, beta)
        self._mean = joint.mean(axis=0)
        joint -= self._mean
        self._axes = principal_axes(joint)
        point = joint @ self._axes
        self._reach = float(np.sqrt(np.einsum("nd,nd->n", point, point).max()))
        if self._reach > 1e18:
            raise ValueError(f"beta = {beta} makes squared distances exceed the float32 range; choose a smaller one.")
        blocks = _median_split(point)
        n_blocks, width = len(blocks), point.shape[1]
        self._n_groups = -(-max(map(len, blocks)) // _GROUP)
        length = self._n_groups * _GROUP
        self._low = np.array([point[member].min(axis=0) for member in blocks])
        self._high = np.array([point[member].max(axis=0) for member in blocks])
        self._centre = (self._low + self._high) / 2
        self._radius = np.empty(n_blocks)
        self._matrix = np.zeros((n_blocks, width + 2, length), np.float32)
        self._matrix[:, width] = np.inf  # padding is never near
        self._matrix[:, width + 1] = 1.0
        self._index = np.full((n_blocks, length), -1, np.int32)
        for b, member in enumerate(blocks):
            offset = point[member] - self._centre[b]
            square = np.einsum("nd,nd->n", offset, offset)
            self._radius[b] = np.sqrt(square.max())
            self._matrix[b, :width, : len(member)] = -2.0 * offset.T
            self._matrix[b, width, : len(member)] = square
            self._index[b, : len(member)] = member

    def kth_nearest(self, keys: Points, own: Ints | None, k: int) -> Kth:
        """Return row index [B] and D^2 [B] of the k-th nearest row; `own` [B] are the rows with the keys' states, if any."""
        if own is None or k > 1:
            return self.within(keys, k, None)
        return self.within(keys, k, squared_distances(self._rows, keys, own, np.arange(len(own)), self._beta))

    def within(self, keys: Points, k: int, bound: NDArray[np.float64] | None) -> Kth:
        """As `kth_nearest`; `bound` [B] is D^2 of some row that is k-th nearest or worse, if one is known."""
        if k > self._n_groups:  # the bounds below count one row per group
            states, actions, key_states, key_actions = map(torch.from_numpy, (*self._rows, *keys))
            row, squared = _neighbours_reference.kth_nearest(states, actions, key_states, key_actions, self._beta, k)
            return row.numpy(), squared.numpy()
        parts = [slice(b, b + _KEYS_PER_PASS) for b in range(0, len(keys.action), _KEYS_PER_PASS)]
        found = [self._pass(keys.take(part), k, None if bound is None else bound[part]) for part in parts]
        return np.concatenate([row for row, _ in found]), np.concatenate([squared for _, squared in found])

    def _pass(self, keys: Points, k: int, bound: NDArray[np.float64] | None) -> Kth:
        n_keys = len(keys.action)
        joint = scaled(keys, self._beta) - self._mean
        point = joint @ self._axes
        slack = rotation_error(point.shape[1], self._reach + np.sqrt(np.einsum("bd,bd->b", joint, joint)))
        gap = np.sqrt(self._squared_gaps(point)) - slack[:, None]
        seen = np.zeros(gap.shape, np.bool_)
        scanned = []
        upper = np.full(n_keys, np.inf)
        if bound is None:
            seen[np.arange(n_keys), gap.argmin(axis=1)] = True
            scanned.append(self._scan(point, seen, upper, k))
        else:
            upper = (np.sqrt(bound) + slack) ** 2
        scanned.append(self._scan(point, (gap <= np.sqrt(upper)[:, None]) & ~seen, upper, k))

        key, row = [], []
        for pair_key, pair_block, lower in scanned:
            pair, group = np.nonzero(lower <= upper[pair_key, None])
            members = self._index.reshape(len(self._index), _GROUP, self._n_groups)[pair_block[pair], :, group]
            key.append(np.repeat(pair_key[pair], _GROUP))
            row.append(members.ravel())
        key_of, row_of = np.concatenate(key), np.concatenate(row)
        order = np.argsort(key_of, kind="stable")
        order = order[row_of[order] >= 0]
        key_of, row_of = key_of[order], row_of[order]
        return select_kth(key_of, row_of, squared_distances(self._rows, keys, row_of, key_of, self._beta), n_keys, k)

    def _squared_gaps(self, point: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the squared distance [B, blocks] from each point to each box; 0 inside."""
        total = np.zeros((len(point), len(self._low)))
        for column, low, high in zip(point.T, self._low.T, self._high.T, strict=True):
            gap = np.maximum(low - column[:, None], column[:, None] - high)
            np.maximum(gap, 0.0, out=gap)
            total += gap * gap
        return total

    def _scan(
        self, point: NDArray[np.float64], visit: NDArray[np.bool_], upper: NDArray[np.float64], k: int
    ) -> tuple[Ints, Ints, NDArray[np.float32]]:
        """Visit blocks [B, blocks]; return the visits' keys, blocks, and lower bounds of D^2 [visits, groups].

        `upper` [B], an upper bound of the k-th smallest D^2, is lowered in place.
        """
        block, key = np.nonzero(visit.T)
        offset = point[key] - self._centre[block]
        square = np.einsum("pd,pd->p", offset, offset)
        error = 2.0 * (point.shape[1] + 8) * _UNIT * (np.sqrt(square) + self._radius[block]) ** 2
        left = np.concatenate([offset, np.ones((len(key), 1)), (square - error)[:, None]], axis=1, dtype=np.float32)
        lower = torch.empty(len(key), self._n_groups)
        buffer = np.empty((_KEYS_PER_PRODUCT, self._matrix.shape[2]), np.float32)
        grouped = torch.from_numpy(buffer).view(_KEYS_PER_PRODUCT, _GROUP, self._n_groups)
        edges = np.searchsorted(block, np.arange(len(self._matrix) + 1))
        for b, matrix in enumerate(self._matrix):
            for first in range(edges[b], edges[b + 1], _KEYS_PER_PRODUCT):
                last = min(first + _KEYS_PER_PRODUCT, edges[b + 1])
                np.matmul(left[first:last], matrix, out=buffer[: last - first])
                torch.amin(grouped[: last - first], dim=1, out=lower[first:last])
        kth = lower.amin(dim=1) if k == 1 else lower.kthvalue(k, dim=1).values
        np.minimum.at(upper, key, kth.numpy().astype(np.float64) + 2.0 * error)
        return key, block, lower.numpy()


def _median_split(point: NDArray[np.float64]) -> list[NDArray[np.intp]]:
    """Split the points at the median of their most spread coordinate, again and again; return the blocks' members."""
    blocks = [np.arange(len(point))]
    for _ in range(_MAX_SPLITS):
        if len(blocks[0]) < 2 * _MIN_BLOCK:
            break
        halves = []
        for member in blocks:
            column = point[member, point[member].var(axis=0).argmax()]
            order = np.argpartition(column, len(member) // 2)
            halves += [member[order[: len(member) // 2]], member[order[len(member) // 2 :]]]
        blocks = halves
    return blocks
