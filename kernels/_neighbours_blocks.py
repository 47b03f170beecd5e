r"""Block scan: exhaustive search by matrix products over the blocks of rows that a bound cannot rule out.

Rows, in the coordinates of `Frame`, are halved at medians into blocks of up to 1024, each with its bounding box. A
key visits the blocks whose box is nearer than the best distance known to it (whole runs of blocks are ruled out
first, then single ones). In a block with centre c,

    |q - x|^2 = |q - c|^2 + |x - c|^2 - 2 (q - c).(x - c)

is one float32 product of the keys (q - c, 1, |q - c|^2) with the stored matrix (-2 (x - c), |x - c|^2, 1).
Cancellation makes this approximate: with s = |q - c| + max |x - c| and u = 2^-24, rounding the two differences, the
squares and the d + 2 products errs by less than (d + 8) u s^2. Twice that, E, is subtracted in the key's last entry,
so that products are lower bounds and products + 2 E upper bounds. Rows whose lower bound reaches the smallest upper
bound are compared again in the metric's own arithmetic (`_neighbours_metric`); so the answer is exact, ties included.

NumPy's product is used because PyTorch's may be switched to a lower precision by autocast or a global setting.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from . import _neighbours_reference
from ._neighbours_metric import Frame, Ints, Kth, Points, select_kth, squared_distances

_BLOCK = 1024  # most rows of a block
_RUN = 16  # most blocks of a run
_GROUP = 32  # neighbouring rows of a block that share one lower bound; its length is a multiple of this
_PRODUCTS = 2**20  # distances held at once, 4 MiB
_KEYS_PER_PASS = 512
_UNIT = 2.0**-24
_TINY = 1e-36  # what products may lose to underflow
_FARTHEST = 1e18  # squares stay within the float32 range

Floats64 = NDArray[np.float64]


class BlockScan:
    """Exact k-th nearest rows; at worst one product of all keys with all rows.

    Takes 4 (d + 3) bytes per row beside the rows themselves.
    """

    def __init__(self, rows: Points, beta: float) -> None:
        self._rows = rows
        self._beta = beta
        self._frame = Frame(rows, beta)
        if self._frame.reach > _FARTHEST:
            raise ValueError(f"beta = {beta} takes squared distances out of the float32 range; choose a smaller one.")
        point = self._frame.coordinates(rows)
        blocks = _median_split(point)
        n_blocks, width = len(blocks), point.shape[1]
        self._n_groups = -(-max(map(len, blocks)) // _GROUP)
        length = self._n_groups * _GROUP
        low = np.array([point[member].min(axis=0) for member in blocks])
        high = np.array([point[member].max(axis=0) for member in blocks])
        self._centre = (low + high) / 2
        self._run = min(_RUN, n_blocks)
        low, high = low.reshape(-1, self._run, width), high.reshape(-1, self._run, width)
        self._box = _Boxes.between(low, high)
        self._run_box = _Boxes.between(low.min(axis=1)[None], high.max(axis=1)[None])
        self._radius = np.empty(n_blocks)
        self._matrix = np.zeros((n_blocks, width + 2, length), np.float32)
        self._matrix[:, width] = np.inf  # padding is never near
        self._matrix[:, width + 1] = 1.0
        self._index = np.full((n_blocks, self._n_groups, _GROUP), -1, np.int32)
        for b, member in enumerate(blocks):
            offset = point[member] - self._centre[b]
            square = np.einsum("nd,nd->n", offset, offset)
            self._radius[b] = np.sqrt(square.max())
            self._matrix[b, :width, : len(member)] = -2.0 * offset.T
            self._matrix[b, width, : len(member)] = square
            self._index[b].reshape(-1)[: len(member)] = member

    def kth_nearest(self, keys: Points, own: Ints | None, k: int) -> Kth:
        """Return row index [B] and D^2 [B] of the k-th nearest row; `own` [B]: rows with the keys' states, if any."""
        if own is None or k > 1:
            return self.within(keys, k, None)
        return self.within(keys, k, squared_distances(self._rows, keys, own, np.arange(len(own)), self._beta))

    def within(self, keys: Points, k: int, bound: Floats64 | None) -> Kth:
        """As `kth_nearest`; `bound` [B] is D^2 of some row that is k-th nearest or worse, if one is known."""
        if k > self._n_groups:  # the bounds below count one row per group
            states, actions, key_states, key_actions = map(torch.from_numpy, (*self._rows, *keys))
            row, squared = _neighbours_reference.kth_nearest(states, actions, key_states, key_actions, self._beta, k)
            return row.numpy(), squared.numpy()
        parts = [slice(b, b + _KEYS_PER_PASS) for b in range(0, len(keys.action), _KEYS_PER_PASS)]
        found = [self._pass(keys.take(part), k, None if bound is None else bound[part]) for part in parts]
        return np.concatenate([row for row, _ in found]), np.concatenate([squared for _, squared in found])

    def _pass(self, keys: Points, k: int, bound: Floats64 | None) -> Kth:
        n_keys = len(keys.action)
        point = self._frame.coordinates(keys)
        if np.abs(point).max(initial=0.0) > _FARTHEST:
            raise ValueError("A key is too far from the data for float32 distances: its policy has diverged.")
        # The true nearest row may seem farther than another by the slack of both.
        slack = 2 * self._frame.slack(point)
        box_slack = slack + _Boxes.error(point, self._frame.reach)
        run_gap = self._run_box.gap(point, np.zeros(n_keys, np.intp))
        scans = []
        if bound is None:
            upper = np.full(n_keys, np.inf)
            near = run_gap.argmin(axis=1)
            first = near * self._run + self._box.gap(point, near).argmin(axis=1)
            scans.append(self._scan(point, np.arange(n_keys), first, upper, k))
        else:
            upper = bound.copy()
            first = np.full(n_keys, -1, np.intp)
        reach = np.sqrt(upper) + box_slack
        key, run = np.nonzero(run_gap <= reach[:, None])
        visit, member = np.nonzero(self._box.gap(point[key], run) <= reach[key, None])
        key, block = key[visit], run[visit] * self._run + member
        new = block != first[key]
        scans.append(self._scan(point, key[new], block[new], upper, k))
        of_key, row = self._survivors(scans, (np.sqrt(upper) + slack) ** 2)
        squared = squared_distances(self._rows, keys, row, of_key, self._beta)
        return select_kth(of_key, row, squared, n_keys, k)

    def _scan(self, point: Floats64, key: Ints, block: Ints, upper: Floats64, k: int) -> _Scan:
        """Bound the distances of visits (key, block) from below.

        `upper` [B], an upper bound of the k-th smallest D^2 of each key, is lowered in place.
        """
        order = np.argsort(block, kind="stable")
        key, block = key[order], block[order]
        offset = point[key] - self._centre[block]
        square = np.einsum("pd,pd->p", offset, offset)
        error = 2.0 * (point.shape[1] + 8) * _UNIT * (np.sqrt(square) + self._radius[block]) ** 2 + _TINY
        left = np.empty((len(key), point.shape[1] + 2), np.float32)
        left[:, :-2] = offset
        left[:, -2] = 1.0
        left[:, -1] = square - error
        length = _GROUP * self._n_groups
        buffer = np.empty((min(len(key), _PRODUCTS // length), length), np.float32)
        grouped = torch.from_numpy(buffer).view(-1, self._n_groups, _GROUP)
        lower = torch.empty(len(key), self._n_groups)
        for start in range(0, len(key), len(buffer) or 1):
            stop = min(start + len(buffer), len(key))
            edges = [start, *(np.flatnonzero(np.diff(block[start:stop])) + start + 1).tolist(), stop]
            for first, last in itertools.pairwise(edges):
                np.matmul(left[first:last], self._matrix[block[first]], out=buffer[first - start : last - start])
            torch.amin(grouped[: stop - start], dim=2, out=lower[start:stop])
        kth = lower.amin(dim=1) if k == 1 else lower.kthvalue(k, dim=1).values
        np.minimum.at(upper, key, kth.numpy().astype(np.float64) + 2.0 * error)
        return _Scan(key, block, lower.numpy())

    def _survivors(self, scans: list[_Scan], upper: Floats64) -> tuple[Ints, Ints]:
        """Return the candidates, key and row, ordered by key, whose lower bound is at most the key's upper bound."""
        keys, rows = [], []
        for scan in scans:
            visit, group = np.nonzero(scan.lower <= upper[scan.key, None])
            keys.append(np.repeat(scan.key[visit], _GROUP))
            rows.append(self._index[scan.block[visit], group].ravel())
        key, row = np.concatenate(keys), np.concatenate(rows)
        order = np.argsort(key, kind="stable")
        order = order[row[order] >= 0]
        return key[order], row[order]


class _Scan(NamedTuple):
    key: Ints  # [visits]
    block: Ints  # [visits]
    lower: NDArray[np.float32]  # [visits, groups] lower bounds of D^2 in each group of the block's rows


class _Boxes(NamedTuple):
    """Sets of n boxes each, in float32: half the time of float64, at an error that `error` bounds."""

    centre: NDArray[np.float32]  # [sets, d, n]
    half: NDArray[np.float32]  # [sets, d, n] half the length of the sides

    @classmethod
    def between(cls, low: Floats64, high: Floats64) -> _Boxes:
        """Make boxes of their corners [sets, n, d]."""
        both = ((low + high) / 2, (high - low) / 2)
        return cls(*(np.ascontiguousarray(side.swapaxes(1, 2), dtype=np.float32) for side in both))

    @staticmethod
    def error(point: Floats64, reach: float) -> Floats64:
        """Bound the error of `gap` [B] for boxes within `reach` of 0.

        Each coordinate is rounded five times, relative to at most the length; summing d squares adds d roundings.
        """
        length = reach + np.sqrt(np.einsum("bd,bd->b", point, point))
        error: Floats64 = 8.0 * point.shape[1] * _UNIT * length
        return error

    def gap(self, point: Floats64, chosen: Ints) -> NDArray[np.float32]:
        """Return the distance [B, n] from each point to each box of its chosen set; 0 inside."""
        gap = self.centre[chosen] - point.astype(np.float32)[:, :, None]
        np.abs(gap, out=gap)
        gap -= self.half[chosen]
        np.maximum(gap, 0.0, out=gap)
        squared: NDArray[np.float32] = np.einsum("bdn,bdn->bn", gap, gap)
        return np.sqrt(squared)


def _median_split(point: Floats64) -> list[Ints]:
    """Halve the points at the median of their most spread coordinate, again and again; return the blocks' members.

    Blocks that were one block before lie next to each other.
    """
    blocks: list[Ints] = [np.arange(len(point))]
    while max(map(len, blocks)) > _BLOCK:
        halves = []
        for member in blocks:
            column = point[member, point[member].var(axis=0).argmax()]
            order = np.argpartition(column, len(member) // 2)
            halves += [member[order[: len(member) // 2]], member[order[len(member) // 2 :]]]
        blocks = halves
    return blocks
