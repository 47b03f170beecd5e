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
_LEAF = 32  # rows; with SciPy's 16, lists of hundred thousands of rows take a tenth longer
_SAMPLE = 128
_REVIEW_SECONDS_PER_ROW = 1e-5  # spent in scans before lists are considered: seven times what their tree takes

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

    def __init__(self, states: Floats, workers: int) -> None:
        points = Points(states, states[:, :0])
        frame = Frame(points, 1.0)
        point = frame.coordinates(points)
        # In the tree's own order, points of a leaf lie side by side in memory: half the time of the file's order.
        self._order = cKDTree(point, leafsize=_LEAF).indices
        self._point = point[self._order]
        self._tree = cKDTree(self._point, leafsize=_LEAF)
        self.place = np.argsort(self._order)  # of each row in that order
        self._workers = workers
        self._error = frame.slack(point).max()

    def lists(self, length: int) -> CandidateLists:
        """Make the lists of all rows."""
        n_rows = len(self._order)
        length = min(length, n_rows)
        row = np.empty((n_rows, length), np.int32)
        distance = np.empty((n_rows, length), np.float32)
        for first in range(0, n_rows, _CHUNK):
            place = np.arange(first, min(first + _CHUNK, n_rows))
            member = self._order[place]
            row[member], distance[member] = self.nearest(place, length)
        return CandidateLists(row, distance, length == n_rows)

    def nearest(self, place: Ints, length: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Return lists and distances [n, length] of the rows at these places of the tree's order."""
        ranks = range(1, min(length, len(self._order)) + 1)
        distance, found = self._tree.query(self._point[place], k=ranks, workers=self._workers)
        return self._order[found], np.maximum(distance - self._error, 0.0) * (1 - 5e-7)


class CandidateSearch:
    """Candidate lists where they certify the answer, a block scan where they do not, or are not made yet.

    Unless they are wanted at once, lists are made when the time already spent in scans that they would have spared
    exceeds the time that making them takes, both estimated on samples. So at worst the search takes about twice the
    time that it would have taken had the future been known. Lists of two are considered beside those of full length:
    the own row and the distance to the next state take less time to find, and certify most keys where states lie far
    apart.
    """

    def __init__(
        self, rows: Points, beta: float, length: int, workers: int, cache_dir: Path | None, *, at_once: bool
    ) -> None:
        self.n_certified = 0
        self._rows = rows
        self._beta = beta
        self._lengths = [length] if at_once or length <= 2 else [2, length]
        self._workers = workers
        self._cache_dir = cache_dir
        self._scan = BlockScan(rows, beta)
        self._scan_seconds = 0.0  # in scans since lists were made last
        self._first_review = _REVIEW_SECONDS_PER_ROW * len(rows.state)
        self._review_at = self._first_review
        self._tree: StateTree | None = None
        self._lists: CandidateLists | None = None
        if cache_dir is not None:
            for length in self._lengths:
                path = cache_path(rows.state, length, cache_dir)
                self._lists = load(path, len(rows.state), length) or self._lists
        if self._lists is None and at_once:
            self._make(StateTree(rows.state, workers), length)

    def kth_nearest(self, keys: Points, own: Ints | None, k: int) -> Kth:
        """Return row index [B] and D^2 [B] of the k-th nearest row; `own` [B] are the rows with the keys' states."""
        if own is None or self._beta == 0:
            return self._scan.kth_nearest(keys, own, k)
        if self._lists is None or k > self._lists.row.shape[1]:
            start = time.perf_counter()
            row, squared = self._scan.kth_nearest(keys, own, k)
            self._spent(start, own, squared, k)
            return row, squared
        row, squared, certified = self._lists.kth_nearest(self._rows, keys, own, self._beta, k)
        left = np.flatnonzero(~certified)
        self.n_certified += len(own) - len(left)
        if len(left):
            start = time.perf_counter()
            row[left], squared[left] = self._scan.within(keys.take(left), k, squared[left])
            self._spent(start, own[left], squared[left], k)
        return row, squared

    def _spent(self, start: float, own: Ints, squared: NDArray[np.float64], k: int) -> None:
        """Count the time of a scan that began at `start`; now and then, see whether (longer) lists would pay."""
        self._scan_seconds += time.perf_counter() - start
        made = 0 if self._lists is None else self._lists.row.shape[1]
        lengths = [length for length in self._lengths if length > made and length >= k]
        if self._scan_seconds < self._review_at or not lengths:
            return
        self._review_at = 1.5 * self._scan_seconds
        self._tree = self._tree or StateTree(self._rows.state, self._workers)
        n_rows = len(self._rows.state)
        # Rows side by side, as when lists are made, in eight places.
        some = (np.linspace(0, n_rows - 1, 8)[:, None].astype(np.int64) + np.arange(_SAMPLE // 8)).ravel() % n_rows
        for length in lengths:
            start = time.perf_counter()
            self._tree.nearest(some, length)
            seconds = (time.perf_counter() - start) / len(some) * n_rows
            distance = self._tree.nearest(self._tree.place[own[:_SAMPLE]], length)[1][:, -1]
            certified = np.sqrt(squared[:_SAMPLE]) < self._beta * distance
            if certified.mean() * self._scan_seconds >= seconds:
                self._make(self._tree, length)
                self._scan_seconds, self._review_at = 0.0, self._first_review
                return

    def _make(self, tree: StateTree, length: int) -> None:
        start = time.perf_counter()
        self._lists = tree.lists(length)
        seconds = time.perf_counter() - start
        _log.info("made lists of %d candidates for %d rows in %.1f s", length, len(self._rows.state), seconds)
        if length == self._lengths[-1]:
            self._tree = None  # not needed again
        if self._cache_dir is not None:
            try:
                save(cache_path(self._rows.state, length, self._cache_dir), self._lists)
            except OSError as error:  # the next run makes them again
                warnings.warn(f"Candidate lists could not be kept in {self._cache_dir} ({error}).", stacklevel=2)


def cache_path(states: Floats, length: int, cache_dir: Path) -> Path:
    """Return the file for these lists, named by a SHA-256 of the states."""
    digest = hashlib.sha256(f"{_FORMAT} {states.shape} {states.dtype} {length}".encode())
    digest.update(np.ascontiguousarray(states).data)
    return cache_dir / f"neighbours-{digest.hexdigest()[:32]}.npz"


def load(path: Path, n_rows: int, length: int) -> CandidateLists | None:
    """Return the lists in a file; None if there is none, or, with a warning, if it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            row, distance = arrays["row"], arrays["distance"]
        shape = (n_rows, min(length, n_rows))
        if row.shape != shape or distance.shape != shape or row.min() < 0 or row.max() >= n_rows:
            raise ValueError(f"its arrays are not lists of {n_rows} rows")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        warnings.warn(f"Candidate lists in {path} are damaged or closed to us ({error}) and made anew.", stacklevel=2)
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
