"""Exact nearest dataset row in the metric beta^2 |s - s_i|^2 + |a - a_i|^2 (PRDC's search).

What "exact" means: distances are those of the stored values, computed in float64 from explicit differences, and rows
are ordered by (distance, row index). Among equal distances (duplicated rows occur in real data) the lowest index wins.
The CPU back ends return the same row and the same bits of distance for every key. "triton" orders rows by distances
rounded to float32: its row is the nearest up to a factor 1 + (d_s + d_a + 4) 2^-23, and rows with equal entries tie to
the lowest index.

Metric: Ran et al., "Policy Regularization with Dataset Constraint for Offline Reinforcement Learning", ICML 2023.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _neighbours_reference
from ._neighbours_blocks import BlockScan
from ._neighbours_candidates import CandidateSearch
from ._neighbours_metric import Points
from ._neighbours_tree import JointTree

if TYPE_CHECKING:
    from ._neighbours_triton import FusedScan

Backend = Literal["auto", "reference", "kdtree", "blocks", "candidates", "triton"]


class Neighbours(NamedTuple):
    """Answer of a query, on the device of its actions."""

    row: Tensor  # [*batch] int64, index of the k-th nearest row
    distance: Tensor  # [*batch] in the dtype of the actions: sqrt(beta^2 |s - s_i|^2 + |a - a_i|^2)


class NeighbourIndex:
    """Search structure over N dataset rows (s_i, a_i).

    Back ends:

    - ``"reference"``: every key against every row in float64. Slow; what the others are tested against.
    - ``"kdtree"``: SciPy's k-d tree. Fast for keys near the data, very slow far from it.
    - ``"blocks"``: matrix products over those blocks of rows that a bound cannot rule out; at worst over all.
      Takes about 8 N (d_s + d_a + 3) bytes beside the rows.
    - ``"candidates"``: each row's `list_length` nearest rows in state, made at the start. They answer keys whose state
      is a dataset row, certified exact when the answer is nearer than any unlisted row can be; "blocks" answers the
      rest (and everything if beta = 0, where no state distance can certify).
    - ``"triton"``: one fused pass over all rows on a GPU, without a distance matrix.
    - ``"auto"``: triton for float32 rows on a CUDA device. On CPU lists from `cache_dir` if they are there; else blocks
      until the time spent in them on keys that lists would certify exceeds the time that making the lists takes
      (both estimated on samples; lists of two are considered too), then candidates. The answers do not depend on when
      that is.

    Args:
        states: [N, d_s] dataset states as the metric should see them (standardised), float32 or float64. Rows are not
            copied and must not change.
        actions: [N, d_a] dataset actions, of the same dtype and device.
        beta: weight of the state distance, >= 0. 0: the nearest action whatever its state. Large: the own row.
        backend: one of the above.
        list_length: M, rows per candidate list; they take 8 N M bytes. Longer lists certify more keys and take longer
            to make.
        workers: threads of k-d trees; by default PyTorch's number of threads.
        cache_dir: folder that keeps candidate lists between runs, one file per set of states; None keeps nothing.

    Raises:
        ValueError: wrong ranks, unequal lengths, dtypes or devices, no rows, non-finite entries, negative or non-finite
            beta, unknown back end, list_length or workers below 1.

    Attributes:
        n_keys: keys asked for so far.
    """

    def __init__(
        self,
        states: Tensor,
        actions: Tensor,
        *,
        beta: float = 2.0,
        backend: Backend = "auto",
        list_length: int = 32,
        workers: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        _check_rows(states, actions)
        if not (np.isfinite(beta) and beta >= 0):
            raise ValueError(f"beta is {beta}; it must be a finite number >= 0.")
        if backend not in get_args(Backend):
            raise ValueError(f"Unknown back end {backend!r}; choose one of {', '.join(get_args(Backend))}.")
        if list_length < 1 or (workers is not None and workers < 1):
            raise ValueError(f"list_length ({list_length}) and workers ({workers}) must be at least 1.")
        self.beta = float(beta)
        self.backend: Backend = _on_gpu(states) if backend == "auto" and states.is_cuda else backend
        self.n_keys = 0
        self._states = states.detach()
        self._actions = actions.detach()
        self._search: JointTree | BlockScan | CandidateSearch | FusedScan | None = None
        if self.backend == "reference":
            return
        if self.backend == "triton":
            self._search = _fused_scan(self._states, self._actions, self.beta)
            return
        self._rows = rows = Points(_numpy(self._states), _numpy(self._actions))
        workers = torch.get_num_threads() if workers is None else workers
        if self.backend == "kdtree":
            self._search = JointTree(rows, self.beta, workers)
        elif self.backend == "blocks":
            self._search = BlockScan(rows, self.beta)
        else:
            folder = None if cache_dir is None else Path(cache_dir)
            self._search = CandidateSearch(
                rows, self.beta, list_length, workers, folder, at_once=backend == "candidates"
            )

    @property
    def n_certified(self) -> int:
        """How many of the keys a candidate list answered; the others took a full search."""
        return self._search.n_certified if isinstance(self._search, CandidateSearch) else 0

    def __len__(self) -> int:
        """Return the number of rows N."""
        return self._states.shape[0]

    def query(self, action: Tensor, row: Tensor | None = None, state: Tensor | None = None, k: int = 1) -> Neighbours:
        """Find the k-th nearest row of each key (s, a).

        Args:
            action: [*batch, d_a] the keys' actions.
            row: [*batch] int64, for keys whose states are those of dataset rows: these rows' indices.
            state: [*batch, d_s] the keys' states otherwise. Exactly one of `row` and `state` is given.
            k: rank, from 1 (nearest) to N. The own row counts.

        Returns:
            Row index and distance, both [*batch].

        Raises:
            ValueError: shapes or dtypes that do not fit, both or neither of `row` and `state`, k out of range; on CPU
                also non-finite keys and row indices out of range (on a GPU looking for them would wait for it).
        """
        self._check_keys(action, row, state, k)
        batch, device = action.shape[:-1], self._states.device
        key_action = _float(action).reshape(-1, self._actions.shape[1]).to(device)
        key_state = None if state is None else _float(state).reshape(-1, self._states.shape[1]).to(device)
        own = None if row is None else row.detach().reshape(-1).to(device)
        self.n_keys += len(key_action)
        if len(key_action) == 0:
            return Neighbours(torch.empty(batch, dtype=torch.int64, device=action.device), action.new_empty(batch))
        found, distance = self._ask(key_action, key_state, own, k)
        return Neighbours(found.to(action.device).reshape(batch), distance.to(action).reshape(batch))

    def _ask(self, action: Tensor, state: Tensor | None, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Return row [B] and D [B] for keys [B, d] on the rows' device, of which `state` or `own` is given."""
        if isinstance(self._search, JointTree | BlockScan | CandidateSearch):
            # In NumPy to the end: PyTorch wakes its threads even for a square root (8 ms when a core is busy).
            row = None if own is None else _numpy(own)
            key_state = self._rows.state[row] if state is None else _numpy(state)
            found, squared = self._search.kth_nearest(Points(key_state, _numpy(action)), row, k)
            return torch.from_numpy(found), torch.from_numpy(np.sqrt(squared))
        if state is None:
            state = self._states[own]
        if self._search is None:
            answer = _neighbours_reference.kth_nearest(self._states, self._actions, state, action, self.beta, k)
        else:
            answer = self._search.kth_nearest(state, action, k)
        if answer[1].is_cuda:
            return answer[0], answer[1].sqrt()
        return answer[0], torch.from_numpy(np.sqrt(answer[1].numpy()))  # PyTorch's root may differ in its last bit

    def _check_keys(self, action: Tensor, row: Tensor | None, state: Tensor | None, k: int) -> None:
        n_rows, d_s = self._states.shape
        d_a = self._actions.shape[1]
        if action.ndim == 0 or action.shape[-1] != d_a:
            raise ValueError(f"Key actions {tuple(action.shape)} must end in an axis of {d_a}, as the rows' actions.")
        if (row is None) == (state is None):
            raise ValueError("Give the row index of each key's state or the state itself, not both or neither.")
        if not 1 <= k <= n_rows:
            raise ValueError(f"k is {k}; it must lie between 1 and the number of rows, {n_rows}.")
        if row is not None and (row.shape != action.shape[:-1] or row.dtype != torch.int64):
            raise ValueError(
                f"Row indices are {row.dtype} {tuple(row.shape)}; they must be int64, one per key: "
                f"{tuple(action.shape[:-1])}."
            )
        if state is not None and state.shape != (*action.shape[:-1], d_s):
            raise ValueError(
                f"Key states {tuple(state.shape)} must be {(*action.shape[:-1], d_s)}, one per key action."
            )
        if self._states.is_cuda:
            return
        if not action.isfinite().all() or (state is not None and not state.isfinite().all()):
            raise ValueError("A key holds NaN or infinity: the policy that made it has diverged.")
        if row is not None and row.numel() and (row.min() < 0 or row.max() >= n_rows):
            raise ValueError(f"A row index lies outside 0 .. {n_rows - 1}.")


def _check_rows(states: Tensor, actions: Tensor) -> None:
    if states.ndim != 2 or actions.ndim != 2 or len(states) != len(actions):
        raise ValueError(
            f"States {tuple(states.shape)} and actions {tuple(actions.shape)} must be matrices of equally many rows."
        )
    if not states.numel() or not actions.numel():
        raise ValueError(f"States {tuple(states.shape)} and actions {tuple(actions.shape)} must not be empty.")
    if states.dtype != actions.dtype or states.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"States ({states.dtype}) and actions ({actions.dtype}) must both be float32 or both float64.")
    if states.device != actions.device:
        raise ValueError(f"States are on {states.device}, actions on {actions.device}; put both on one device.")
    broken = ~(states.isfinite().all(dim=1) & actions.isfinite().all(dim=1))
    if broken.any():
        raise ValueError(f"Row {int(broken.int().argmax())} holds NaN or infinity; remove or repair it.")


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().contiguous().numpy()


def _float(tensor: Tensor) -> Tensor:
    """Detach, and widen half precisions, which NumPy and Triton's columns do not share."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def _on_gpu(states: Tensor) -> Backend:
    return "triton" if states.dtype == torch.float32 and find_spec("triton") else "reference"


def _fused_scan(states: Tensor, actions: Tensor, beta: float) -> FusedScan:
    try:
        from ._neighbours_triton import FusedScan
    except ImportError as error:
        raise ImportError("backend 'triton' needs Triton; install it with: pip install 'corollary[gpu]'") from error
    return FusedScan(states, actions, beta)
