"""k-d tree search: SciPy's tree over the rows (beta s, a), turned onto their principal axes."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from ._neighbours_metric import Frame, Ints, Kth, Points, select_kth, squared_distances


class JointTree:
    """Exact k-th nearest rows from a k-d tree.

    The tree chooses arbitrarily among equal distances and sees rotated points, so it is asked for one neighbour more
    than needed and, where ranks k and k + 1 are closer than rounding, for all rows in the ball around the key; the
    metric's own arithmetic then decides.
    """

    def __init__(self, rows: Points, beta: float, workers: int) -> None:
        self._rows = rows
        self._beta = beta
        self._workers = workers
        self._frame = Frame(rows, beta)
        self._tree = cKDTree(self._frame.coordinates(rows))

    def kth_nearest(self, keys: Points, own: Ints | None, k: int) -> Kth:
        """Return row index [B] and D^2 [B] of the k-th nearest row; knowing the rows `own` does not help here."""
        del own
        n_rows, n_keys = len(self._rows.action), len(keys.action)
        point = self._frame.coordinates(keys)
        asked = min(k + 1, n_rows)
        answer = self._tree.query(point, k=range(1, asked + 1), workers=self._workers)
        distance, row = np.asarray(answer[0]), np.asarray(answer[1])
        key, row = np.repeat(np.arange(n_keys), asked), row.ravel()
        reach = distance[:, k - 1] + 2 * self._frame.slack(point)
        tied = np.flatnonzero(distance[:, -1] <= reach) if asked > k else np.empty(0, np.int64)
        if len(tied):
            balls = self._tree.query_ball_point(point[tied], reach[tied], workers=self._workers)
            clear = ~np.isin(key, tied)
            key = np.concatenate([key[clear], np.repeat(tied, [len(ball) for ball in balls])])
            row = np.concatenate([row[clear], *(np.asarray(ball, dtype=np.int64) for ball in balls)])
            order = np.argsort(key, kind="stable")
            key, row = key[order], row[order]
        squared = squared_distances(self._rows, keys, row, key, self._beta)
        return select_kth(key, row, squared, n_keys, k)
