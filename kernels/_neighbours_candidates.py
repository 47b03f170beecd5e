"""Candidate lists: for every dataset row, its M nearest rows in state distance.

They depend on the states alone, not on beta, policy or seed, so they are made once per dataset and kept on disk.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from ._neighbours_blocks import BlockScan
from ._neighbours_metric import Floats, Frame, Ints, Kth, Points, select_kth, squared_distances

_FORMAT = 1  # of the file; counts up when its meaning changes
_CHUNK = 2**14
_SAMPLE = 128
_FIRST_REVIEW_SECONDS = 1.0

_log = logging.getLogger(__name__)


class CandidateLists(NamedTuple):
    """Per row its M nearest rows in state distance, nearest first; 8 N M bytes.

    With M or more copies of one state, a row may be missing from its own list (whose distances are then all 0).
    """

    row: NDArray[np.int32]  # [N, M]
    distance: NDArray[np.float32]  # [N, M] lower bounds of |s_i - s_j|, tight to 1e-6
    complete: bool  # M = N: every list holds every row

    def kth_nearest(
        self, rows: Points, keys: Points, own: Ints, beta: float, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
        """Return the k-th nearest listed row, its D^2, and whether it is certainly the k-th nearest of all; each [B].

        Certificate: a row outside the list differs by at least beta |s_i - s_M| in its state part alone, s_M being
        the list's last. If the k-th best listed row is nearer than that, no row outside can precede or tie it.

        Args:
            rows: dataset.
            keys: B keys, whose states are those of the rows `own`.
            own: [B] row indices.
            beta: weight of the state distance.
            k: rank, from 1 to M.
        """
        distance = self.distance[own]
        useful = np.ones(distance.shape, np.bool_)
        if k == 1:
            # The own row lies at the action distance alone; what is farther in state alone cannot be nearest.
            own_squared = squared_distances(rows, keys, own, np.arange(len(own)), beta)
            useful = beta * distance <= np.sqrt(own_squared)[:, None]
        key, place = np.nonzero(useful)
        candidate = self.row[own[key], place]
        candidate_squared = squared_distances(rows, keys, candidate, key, beta)
        row, squared = select_kth(key, candidate, candidate_squared, len(own), k)
        return row, squared, self.complete | (np.sqrt(squared) < beta * distance[:, -1].astype(np.float64))


class StateTree:
    """k-d tree over the states, from which lists are made."""

    def __init__(self, states: Floats, length: int, workers: int) -> None:
        points = Points(states, states[:, :0])
        frame = Frame(points, 1.0)
        point = frame.coordinates(points)
        # In the tree's own order, points of a leaf lie side by side in memory: half the time of the file's order.
        self._order = cKDTree(point).indices
        self._point = point[self._order]
        self._tree = cKDTree(self._point)
        self.place = np.argsort(self._order)  # of each row in that order
        self._length = min(length, len(states))
        self._workers = workers
        self._error = frame.slack(point).max()

    def lists(self) -> CandidateLists:
        """Make the lists of all rows."""
        n_rows = len(self._order)
        row = np.empty((n_rows, self._length), np.int32)
        distance = np.empty((n_rows, self._length), np.float32)
        for first in range(0, n_rows, _CHUNK):
            place = np.arange(first, min(first + _CHUNK, n_rows))
            member = self._order[place]
            row[member], distance[member] = self.nearest(place)
        return CandidateLists(row, distance, self._length == n_rows)

    def nearest(self, place: Ints) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Return lists and distances [n, M] of the rows at these places of the tree's order."""
        distance, found = self._tree.query(self._point[place], k=range(1, self._length + 1), workers=self._workers)
        return self._order[found], np.maximum(distance - self._error, 0.0) * (1 - 5e-7)


class CandidateSearch:
    """Candidate lists where they certify the answer, a block scan where they do not, or are not made yet.

    Unless they are wanted at once, lists are made when the time already spent in scans that lists would have spared
    exceeds the time that making them takes: at worst twice the time of the better choice known afterwards.
    """

    def __init__(
        self, rows: Points, beta: float, length: int, workers: int, cache_dir: Path | None, *, at_once: bool
    ) -> None:
        self.n_certified = 0
        self._rows = rows
        self._beta = beta
        self._length = length
        self._workers = workers
        self._scan = BlockScan(rows, beta)
        self._scan_seconds = 0.0
        self._review_at = _FIRST_REVIEW_SECONDS
        self._tree: StateTree | None = None
        self._path = None if cache_dir is None else cache_path(rows.state, length, cache_dir)
        self._lists = None if self._path is None else load(self._path, len(rows.state), length)
        if self._lists is None and at_once:
            self._make(StateTree(rows.state, length, workers))

    def kth_nearest(self, keys: Points, own: Ints | None, k: int) -> Kth:
        """Return row index [B] and D^2 [B] of the k-th nearest row; `own` [B] are the rows with the keys' states."""
        if own is None or k > min(self._length, len(self._rows.state)) or self._beta == 0:
            return self._scan.kth_nearest(keys, own, k)
        if self._lists is None:
            start = time.perf_counter()
            row, squared = self._scan.kth_nearest(keys, own, k)
            self._scan_seconds += time.perf_counter() - start
            if self._scan_seconds >= self._review_at:
                self._review(own, squared)
            return row, squared
        row, squared, certified = self._lists.kth_nearest(self._rows, keys, own, self._beta, k)
        left = np.flatnonzero(~certified)
        if len(left):
            row[left], squared[left] = self._scan.within(keys.take(left), k, squared[left])
        self.n_certified += len(own) - len(left)
        return row, squared

    def _review(self, own: Ints, squared: NDArray[np.float64]) -> None:
        """Make the lists if scans that they would have spared have cost as much, judging by the last keys' answers."""
        self._review_at = 2 * self._scan_seconds
        if self._tree is None:
            self._tree = StateTree(self._rows.state, self._length, self._workers)
        start = time.perf_counter()
        _, distance = self._tree.nearest(self._tree.place[own[:_SAMPLE]])
        seconds = (time.perf_counter() - start) / len(distance) * len(self._rows.state)
        certified = np.sqrt(squared[: len(distance)]) < self._beta * distance[:, -1]
        if certified.mean() * self._scan_seconds >= seconds:
            self._make(self._tree)
            self._tree = None

    def _make(self, tree: StateTree) -> None:
        start = time.perf_counter()
        self._lists = tree.lists()
        _log.info("made candidate lists of %d rows in %.1f s", len(self._rows.state), time.perf_counter() - start)
        if self._path is not None:
            save(self._path, self._lists)


def cache_path(states: Floats, length: int, cache_dir: Path) -> Path:
    """Return the file for these lists, named by a SHA-256 of the states."""
    digest = hashlib.sha256(f"{_FORMAT} {states.shape} {states.dtype} {length}".encode())
    digest.update(np.ascontiguousarray(states).data)
    return cache_dir / f"neighbours-{digest.hexdigest()[:32]}.npz"


def load(path: Path, n_rows: int, length: int) -> CandidateLists | None:
    """Return the lists in a file; None if there is none, or, with a warning, if it is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            row, distance = file["row"], file["distance"]
        shape = (n_rows, min(length, n_rows))
        if row.shape != shape or distance.shape != shape or row.min() < 0 or row.max() >= n_rows:
            raise ValueError(f"its arrays are not lists of {n_rows} rows")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        warnings.warn(f"Candidate lists in {path} are damaged ({error}) and will be made anew.", stacklevel=2)
        return None
    return CandidateLists(row, distance, shape[1] == n_rows)


def save(path: Path, lists: CandidateLists) -> None:
    """Write the lists to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, row=lists.row, distance=lists.distance)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
