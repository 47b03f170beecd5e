"""The block scan of :mod:`._neighbours_blocks` compiled by Numba, for keys that few blocks can answer.

A key goes down from runs to blocks to cells, past the boxes that lie farther than the nearest row found so far, and
compares all rows of a cell at once. Rows are compared in the metric's own arithmetic (:mod:`._neighbours_metric`; the
same operations in the same order, so the same bits), and boxes are passed by only if they are farther even after every
rounding. Keys that reach many blocks are left to matrix products, which read a block once for all of them.
"""

# Numba's decorators carry no types that mypy reads.
# mypy: disable-error-code="untyped-decorator"

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from ._neighbours_metric import Floats

Floats64 = NDArray[np.float64]
Floats32 = NDArray[np.float32]

_compiled: Any = numba.njit(nogil=True)  # without any licence to reorder: the bits count


@_compiled
def nearest(
    key: Floats64,
    d_s: int,
    weight: float,
    point: Floats32,
    slack: Floats64,
    bound: Floats64,
    runs: tuple[Floats32, Floats32],
    blocks: tuple[Floats32, Floats32],
    cells: tuple[Floats32, Floats32],
    rows: Floats,
    index: NDArray[np.int32],
    tight: int,
    many: int,
    row: NDArray[np.int64],
    squared: Floats64,
) -> None:
    """Find the nearest row of each of B keys.

    Args:
        key: ``[B, d_s + d_a]``, states and actions.
        d_s: how many of these entries are the state's.
        weight: beta^2, as Python computes it: compiled code may round the square otherwise.
        point: ``[B, d]``, the keys in the coordinates of the boxes.
        slack: ``[B]``, how much farther than it is a box may seem.
        bound: ``[B]``, D^2 of some row, or inf.
        runs: centres and half widths of the boxes of runs, ``[1, d, runs]``.
        blocks: of blocks, ``[runs, d, blocks]``.
        cells: of cells, ``[runs * blocks, d, cells]``.
        rows: ``[runs * blocks * cells, d_s + d_a, places]``; NaN where there is no row.
        index: ``[runs * blocks * cells, places]``, their numbers.
        tight: runs within reach up to which `bound` needs no first look at the nearest cell.
        many: blocks within reach beyond which a key is left to others.
        row: ``[B]``, receives the row's number, or -1 for a key left to others.
        squared: ``[B]``, receives D^2.
    """
    n_runs, n_blocks, n_cells = runs[0].shape[2], blocks[0].shape[2], cells[0].shape[2]
    run_gap = np.empty(n_runs, np.float32)
    gap = np.empty(max(n_blocks, n_cells), np.float32)
    block, block_gap = np.empty(many, np.int64), np.empty(many, np.float32)
    distance = np.empty((2, rows.shape[2]))
    for b in range(len(key)):
        best, best_row = np.inf, -1
        reach = np.sqrt(bound[b]) + slack[b]
        _gaps(runs[0][0], runs[1][0], point[b], run_gap)
        if (run_gap <= reach).sum() > tight:
            r = int(run_gap.argmin())
            _gaps(blocks[0][r], blocks[1][r], point[b], gap)
            k = r * n_blocks + gap[:n_blocks].argmin()
            _gaps(cells[0][k], cells[1][k], point[b], gap)
            c = k * n_cells + gap[:n_cells].argmin()
            best, best_row = _visit(rows[c], index[c], key[b], d_s, weight, distance, best, best_row)
            reach = min(reach, np.sqrt(best) + slack[b])
        found = 0
        for r in range(n_runs):
            if run_gap[r] <= reach:
                _gaps(blocks[0][r], blocks[1][r], point[b], gap)
                for i in range(n_blocks):
                    if gap[i] <= reach:
                        if found < many:
                            block[found], block_gap[found] = r * n_blocks + i, gap[i]
                        found += 1
        if found > many:
            row[b] = -1
            continue
        for i in range(found):
            if block_gap[i] <= reach:
                k = block[i]
                _gaps(cells[0][k], cells[1][k], point[b], gap)
                for j in range(n_cells):
                    if gap[j] <= reach:
                        c = k * n_cells + j
                        best, best_row = _visit(rows[c], index[c], key[b], d_s, weight, distance, best, best_row)
                        reach = min(reach, np.sqrt(best) + slack[b])
        row[b], squared[b] = best_row, best


@_compiled
def _gaps(centre: Floats32, half: Floats32, point: Floats32, gap: Floats32) -> None:
    """Set `gap` to the distances from a point to the boxes ``[d, n]`` of a set; 0 inside."""
    d, n = centre.shape
    gap[:n] = 0
    for c in range(d):
        for i in range(n):
            outside = max(abs(centre[c, i] - point[c]) - half[c, i], np.float32(0))
            gap[i] += outside * outside
    for i in range(n):
        gap[i] = np.sqrt(gap[i])


@_compiled
def _visit(
    rows: Floats,
    index: NDArray[np.int32],
    key: Floats64,
    d_s: int,
    weight: float,
    distance: Floats64,
    best: float,
    best_row: int,
) -> tuple[float, int]:
    """Compare a key with the rows ``[d, places]`` of a cell; return the least (D^2, number) so far."""
    n = rows.shape[1]
    distance[:] = 0
    for part, first, last in ((0, 0, d_s), (1, d_s, len(key))):
        for c in range(first, last):
            for i in range(n):
                difference = key[c] - rows[c, i]
                distance[part, i] += difference * difference
    for i in range(n):
        squared = weight * distance[0, i] + distance[1, i]
        if squared < best or (squared == best and index[i] < best_row):
            best, best_row = squared, int(index[i])
    return best, best_row
