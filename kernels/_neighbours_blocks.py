r"""Block scan: exhaustive search over the rows that bounding boxes cannot rule out.

Rows, in the coordinates of `Frame`, are halved at medians into cells of up to 32; 32 cells make a block, 16 blocks a
run, and each of these has its bounding box. Unless a good upper bound of a key's distance is known (that of its own
row), a first look at the nearest cell of the nearest block of the nearest run gives one; runs, then blocks, then cells
whose boxes are farther are out.

What is left is compared by matrix products: cell by cell in blocks of which the keys have few cells left, whole blocks
with all the keys that visit them elsewhere. In a block with centre c,

    |q - x|^2 = |q - c|^2 + |x - c|^2 - 2 (q - c).(x - c)

is one float32 product of the key (q - c, 1, |q - c|^2) with the stored matrix (-2 (x - c), |x - c|^2, 1).
Cancellation makes this approximate: with s = |q - c| + max |x - c| and u = 2^-24, rounding the two differences, the
squares and the d + 2 products errs by less than (d + 8) u s^2. Twice that, E, is subtracted in the key's last entry,
so that products are lower bounds and products + 2 E upper bounds. Rows whose lower bound reaches the smallest upper
bound are compared again in the metric's own arithmetic (`_neighbours_metric`). So the answer is exact, ties included.

Where Numba is installed, and once scans have taken as long as it takes to compile, keys that reach few blocks are
answered by :mod:`._neighbours_numba` instead, with the same boxes and the same answers to the bit.

NumPy's product is used because PyTorch's may be switched to a lower precision by autocast or a global setting. All of
a search runs on the calling thread: pieces this small gain little from more, and lose milliseconds when the threads of
two libraries, or of another process, wait for one core.
"""

from __future__ import annotations

import itertools
import time
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._neighbours_metric import Floats, Frame, Ints, Kth, Points, select_kth, squared_distances
from .numba_support import has_numba

_CELL = 32  # most rows of a cell, a power of two
_CELLS = 32  # most cells of a block
_BLOCKS = 16  # most blocks of a run
_TIGHT = 2  # runs within reach up to which a bound needs no first look
_MANY = 64  # blocks beyond which a key does not look at their cells
_ALONE = 8.0  # the time of a product with a whole block is that of so many cells,
_SHARED = 2.0  # and so many more per key
_PRODUCTS = 2**20  # distances held at once, 4 MiB
_TERMS = 2**18  # of one product: OpenBLAS wakes its threads for more
_KEYS_PER_PASS = 512
_COMPILE_AFTER = 3.0  # seconds of scans: what compiling takes
_UNIT = 2.0**-24
_TINY = 1e-36  # what products may lose to underflow
_FARTHEST = 1e18  # squares stay within the float32 range

Floats64 = NDArray[np.float64]


class BlockScan:
    """Exact k-th nearest rows; at worst one product of all keys with all rows.

    Takes about 8 (d + 3) bytes per row beside the rows themselves, and with Numba a copy of these.

    Args:
        rows: the dataset.
        beta: weight of the state distance.
    """

    def __init__(self, rows: Points, beta: float) -> None:
        self._rows = rows
        self._beta = beta
        self._frame = Frame(rows, beta)
        if self._frame.reach > _FARTHEST:
            raise ValueError(f"beta = {beta} takes squared distances out of the float32 range; choose a smaller one.")
        point = self._frame.coordinates(rows)
        width = point.shape[1]
        order, edges = _median_split(point.astype(np.float32))
        n_cells = len(edges) - 1
        cells = min(_CELLS, n_cells)
        blocks = min(_BLOCKS, n_cells // cells)
        self._index = np.full((n_cells, _CELL), -1, np.int32)
        cell = np.repeat(np.arange(n_cells), np.diff(edges))
        place = np.arange(len(order)) - edges[cell]
        self._index[cell, place] = order
        point = point[order]
        low = np.minimum.reduceat(point, edges[:-1]).reshape(-1, cells, width)
        high = np.maximum.reduceat(point, edges[:-1]).reshape(-1, cells, width)
        self._cells = _Boxes(low, high)
        low, high = low.min(axis=1), high.max(axis=1)
        self._centre = (low + high) / 2
        low, high = low.reshape(-1, blocks, width), high.reshape(-1, blocks, width)
        self._blocks = _Boxes(low, high)
        self._runs = _Boxes(low.min(axis=1)[None], high.max(axis=1)[None])

        self._scan_seconds = 0.0
        self._compile_after = _COMPILE_AFTER

    @cached_property
    def _entries(self) -> Floats:
        """The rows as compiled code reads them, ``[cells, d, places]``; NaN where there is none."""
        rows = np.concatenate([self._rows.state, self._rows.action], axis=1)
        entries = np.full((len(self._index), rows.shape[1], _CELL), np.nan, rows.dtype)
        cell, place = np.nonzero(self._index >= 0)
        entries[cell, :, place] = rows[self._index[cell, place]]
        return entries

    @cached_property
    def _stored(self) -> _Stored:
        """The rows' side of the products."""
        cell, place = np.nonzero(self._index >= 0)
        point = self._frame.coordinates(self._rows.take(self._index[cell, place]))
        width = point.shape[1]
        block = cell // self._cells.size
        offset = point - self._centre[block]
        square = np.einsum("nd,nd->n", offset, offset)
        radius = np.sqrt(np.maximum.reduceat(square, np.searchsorted(block, np.arange(len(self._centre)))))
        cells = np.zeros((len(self._index), width + 2, _CELL), np.float32)
        cells[:, width] = np.inf  # a place without a row is never near
        cells[:, width + 1] = 1.0
        cells[cell, :width, place] = -2.0 * offset
        cells[cell, width, place] = square
        grouped = cells.reshape(-1, self._cells.size, width + 2, _CELL)
        # Columns (place, cell): the minimum over a cell's places is then one over long rows.
        blocks = np.ascontiguousarray(grouped.transpose(0, 2, 3, 1)).reshape(len(grouped), width + 2, -1)
        return _Stored(radius, cells, blocks)

    def kth_nearest(self, keys: Points, own: Ints | None, k: int) -> Kth:
        """Return row index [B] and D^2 [B] of the k-th nearest row; `own` [B]: rows with the keys' states, if any."""
        if own is None or k > 1:
            return self.within(keys, k, np.full(len(keys.action), np.inf))
        return self.within(keys, k, squared_distances(self._rows, keys, own, np.arange(len(own)), self._beta))

    def within(self, keys: Points, k: int, bound: Floats64) -> Kth:
        """As `kth_nearest`; `bound` [B] is D^2 of some row that is k-th nearest or worse, or inf."""
        row = np.full(len(bound), -1, np.int64)
        squared = np.empty(len(bound))
        if k == 1 and self._scan_seconds >= self._compile_after and has_numba():
            self._go_down(keys, bound, row, squared)
        began = time.perf_counter()
        left = np.flatnonzero(row < 0)
        for first in range(0, len(left), _KEYS_PER_PASS):
            part = left[first : first + _KEYS_PER_PASS]
            row[part], squared[part] = self._pass(keys.take(part), k, bound[part])
        self._scan_seconds += time.perf_counter() - began
        return row, squared

    def _go_down(self, keys: Points, bound: Floats64, row: NDArray[np.int64], squared: Floats64) -> None:
        """Answer the keys that reach few blocks; the `row` of the others stays -1."""
        from ._neighbours_numba import nearest

        point = self._frame.coordinates(keys)
        _require_near(point)
        slack = 2 * self._frame.slack(point) + _Boxes.error(point, self._frame.reach)
        key = np.concatenate([keys.state, keys.action], axis=1, dtype=np.float64)
        sets = (self._runs.arrays, self._blocks.arrays, self._cells.arrays)
        nearest(
            key,
            keys.state.shape[1],
            self._beta**2,
            point.astype(np.float32),
            slack,
            bound,
            *sets,
            self._entries,
            self._index,
            _TIGHT,
            _MANY,
            row,
            squared,
        )

    def _pass(self, keys: Points, k: int, bound: Floats64) -> Kth:
        point = self._frame.coordinates(keys)
        _require_near(point)
        # The nearest row may seem farther than another by the slack of both.
        slack = 2 * self._frame.slack(point)
        box_slack = slack + _Boxes.error(point, self._frame.reach)
        run_gap = self._runs.gap(point, np.zeros(len(bound), np.intp))
        upper = bound.copy()
        loose = np.flatnonzero((run_gap <= (np.sqrt(bound) + box_slack)[:, None]).sum(axis=1) > _TIGHT)
        self._first_look(point, run_gap, loose, upper, k)
        reach = np.sqrt(upper) + box_slack
        run_key, run = np.nonzero(run_gap <= reach[:, None])
        visit, block = self._blocks.nearer(point, reach, run_key, run)
        key = run_key[visit]
        whole = (np.bincount(key, minlength=len(bound)) > _MANY)[key]
        some = np.flatnonzero(~whole)
        visit, cell = self._cells.nearer(point, reach, key[some], block[some])
        visit = some[visit]
        whole |= self._dense(block, np.bincount(visit, minlength=len(key)))
        single = ~whole[visit]
        visits = [self._visit_cells(point, key[visit[single]], cell[single], upper, k)]
        if whole.any():
            visits.append(self._visit_blocks(point, key[whole], block[whole], upper, k))
        limit = (np.sqrt(upper) + slack) ** 2
        of_key, row = map(np.concatenate, zip(*(visit.survivors(limit) for visit in visits), strict=True))
        order = np.argsort(of_key[row >= 0], kind="stable")
        of_key, row = of_key[row >= 0][order], row[row >= 0][order]
        squared = squared_distances(self._rows, keys, row, of_key, self._beta)
        return select_kth(of_key, row, squared, len(bound), k)

    def _first_look(self, point: Floats64, run_gap: NDArray[np.float32], key: Ints, upper: Floats64, k: int) -> None:
        """Lower `upper` [B] for the chosen keys by the rows of the cell that each is led to."""
        run = run_gap[key].argmin(axis=1)
        block = run * self._blocks.size + self._blocks.gap(point[key], run).argmin(axis=1)
        cell = block * self._cells.size + self._cells.gap(point[key], block).argmin(axis=1)
        self._visit_cells(point, key, cell, upper, k)

    def _dense(self, block: Ints, n_cells: Ints) -> NDArray[np.bool_]:
        """Return which visits [visits] of blocks, with so many cells left in each, are faster as whole blocks."""
        n_blocks = len(self._centre)
        visitors = np.bincount(block[n_cells > 0], minlength=n_blocks)
        cells = np.bincount(block, weights=n_cells, minlength=n_blocks)
        return (cells > _ALONE + _SHARED * visitors)[block] & (n_cells > 0)

    def _visit_cells(self, point: Floats64, key: Ints, cell: Ints, upper: Floats64, k: int) -> _Visits:
        """Compare keys with cells; lower `upper` [B], an upper bound of the k-th smallest D^2, in place."""
        left, error = self._left(point, key, cell // self._cells.size)
        lower = np.matmul(left[:, None, :], self._stored.cells[cell])[:, 0]
        _lower_bound(upper, key, lower, error, k)
        return _Visits(key, cell, lower, self._index)

    def _visit_blocks(self, point: Floats64, key: Ints, block: Ints, upper: Floats64, k: int) -> _Visits:
        """Compare keys with blocks; lower `upper` as `_visit_cells` does."""
        order = np.argsort(block, kind="stable")
        key, block = key[order], block[order]
        left, error = self._left(point, key, block)
        matrix = self._stored.blocks
        width, length = matrix.shape[1:]
        most = max(1, _TERMS // (width * length))
        buffer = np.empty((min(len(key), max(1, _PRODUCTS // length)), length), np.float32)
        lower = np.empty((len(key), self._cells.size), np.float32)  # of the nearest row of each cell
        for start in range(0, len(key), len(buffer)):
            stop = min(start + len(buffer), len(key))
            edges = np.flatnonzero(np.diff(block[start:stop], prepend=-1, append=-1)) + start
            for begin, end in itertools.pairwise(edges.tolist()):
                for first in range(begin, end, most):
                    last = min(first + most, end)
                    out = buffer[first - start : last - start]
                    np.matmul(left[first:last], matrix[block[first]], out=out)
            products = buffer[: stop - start].reshape(stop - start, _CELL, -1)
            half = _CELL // 2
            while half:
                np.minimum(products[:, :half], products[:, half : 2 * half], out=products[:, :half])
                half //= 2
            lower[start:stop] = products[:, 0]
        _lower_bound(upper, key, lower, error, k)
        return _Visits(key, block, lower, self._index.reshape(-1, self._cells.size, _CELL))

    def _left(self, point: Floats64, key: Ints, block: Ints) -> tuple[NDArray[np.float32], Floats64]:
        """Return the keys' side of the products [visits, d + 2], and their error E [visits]."""
        offset = point[key] - self._centre[block]
        square = np.einsum("vd,vd->v", offset, offset)
        error = 2.0 * (point.shape[1] + 8) * _UNIT * (np.sqrt(square) + self._stored.radius[block]) ** 2 + _TINY
        left = np.empty((len(key), point.shape[1] + 2), np.float32)
        left[:, :-2] = offset
        left[:, -2] = 1.0
        left[:, -1] = square - error
        return left, error


class _Stored(NamedTuple):
    """The rows' side of the products: (-2 (x - c), |x - c|^2, 1) in columns."""

    radius: Floats64  # [blocks] of each block around its centre
    cells: NDArray[np.float32]  # [cells, d + 2, places]
    blocks: NDArray[np.float32]  # [blocks, d + 2, places * cells]


class _Visits(NamedTuple):
    """Comparisons of keys with units (cells or blocks) of rows."""

    key: Ints  # [visits]
    unit: Ints  # [visits]
    lower: NDArray[np.float32]  # [visits, n] lower bounds of D^2 for the n rows, or n groups of rows, of the unit
    rows: NDArray[np.int32]  # [units, n] or [units, n, group] their row indices; -1 where there is none

    def survivors(self, limit: Floats64) -> tuple[Ints, Ints]:
        """Return those rows, with their keys, whose lower bound does not exceed the key's limit [B]."""
        visit, n = np.nonzero(self.lower <= limit[self.key, None])
        row = self.rows[self.unit[visit], n]
        return np.repeat(self.key[visit], row[0].size if len(row) else 0), row.ravel()


def _lower_bound(upper: Floats64, key: Ints, lower: NDArray[np.float32], error: Floats64, k: int) -> None:
    """Lower `upper` [B] to the k-th smallest upper bound within each visit; each entry of `lower` stands for a row."""
    if k <= lower.shape[1]:
        kth = lower.min(axis=1) if k == 1 else np.partition(lower, k - 1, axis=1)[:, k - 1]
        np.minimum.at(upper, key, kth + 2.0 * error)


class _Boxes:
    """Sets of boxes, in float32: half the time of float64, at an error that `error` bounds.

    Args:
        low: [sets, size, d] one corner of each box.
        high: [sets, size, d] the other.
    """

    def __init__(self, low: Floats64, high: Floats64) -> None:
        self.size = low.shape[1]
        self._centre = np.ascontiguousarray(((low + high) / 2).swapaxes(1, 2), dtype=np.float32)  # [sets, d, size]
        self._half = np.ascontiguousarray(((high - low) / 2).swapaxes(1, 2), dtype=np.float32)

    @property
    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Centres and half widths, ``[sets, d, size]`` each."""
        return self._centre, self._half

    def gap(self, point: Floats64, chosen: Ints) -> NDArray[np.float32]:
        """Return the distance [B, size] from each point to each box of its chosen set; 0 inside."""
        gap, half = self._centre[chosen], self._half[chosen]
        gap -= point.astype(np.float32)[:, :, None]
        np.abs(gap, out=gap)
        np.maximum(gap, half, out=gap)  # max(x, h) - h = max(x - h, 0), but NumPy is slow with a number and an array
        gap -= half
        squared: NDArray[np.float32] = np.einsum("bdn,bdn->bn", gap, gap)
        return np.sqrt(squared)

    def nearer(self, point: Floats64, reach: Floats64, key: Ints, chosen: Ints) -> tuple[Ints, Ints]:
        """Return which boxes of the sets `chosen` are within reach of their keys [visits], each with its visit."""
        visit, member = np.nonzero(self.gap(point[key], chosen) <= reach[key, None])
        return visit, chosen[visit] * self.size + member

    @staticmethod
    def error(point: Floats64, reach: float) -> Floats64:
        """Bound the error of `gap` [B] for boxes within `reach` of 0.

        Each coordinate is rounded five times, relative to at most the length; summing d squares adds d roundings.
        """
        length = reach + np.sqrt(np.einsum("bd,bd->b", point, point))
        error: Floats64 = 8.0 * point.shape[1] * _UNIT * length
        return error


def _require_near(point: Floats64) -> None:
    if np.abs(point).max() > _FARTHEST:
        raise ValueError("A key is too far from the data for float32 distances: its policy has diverged.")


def _median_split(point: Floats64) -> tuple[Ints, Ints]:
    """Halve the points at the median of their most spread coordinate until no part exceeds a cell.

    Returns:
        The order [N] in which parts of parts lie next to each other, and the edges [cells + 1] of the cells in it.
    """
    parts: list[tuple[Ints, Floats64]] = [(np.arange(len(point)), point)]
    while max(len(member) for member, _ in parts) > _CELL:
        halves = []
        for member, its_point in parts:
            half = len(member) // 2
            variance = np.einsum("nd,nd->d", its_point, its_point) / len(member) - its_point.mean(axis=0) ** 2
            order = np.argpartition(its_point[:, variance.argmax()], half)
            halves += [(member[side], its_point[side]) for side in (order[:half], order[half:])]
        parts = halves
    return np.concatenate([member for member, _ in parts]), np.cumsum([0, *(len(member) for member, _ in parts)])
