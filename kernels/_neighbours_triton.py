"""Triton form of the neighbour search: distance and argmin in one pass, without a distance matrix.

Import it through :mod:`corollary.kernels.neighbours`. Whether the kernel is compiled or interpreted is decided when
this module is imported: with ``TRITON_INTERPRET=1`` in the environment it runs on CPU tensors, slowly, which is how it
is tested on machines without a GPU. It uses Triton's primitives only: library functions such as ``tl.min`` were decided
for when Triton itself was imported.
"""

# Triton ships no types, and its kernels take pointers that Python has no types for.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 32  # per program
_ROWS = 128  # per step of a program
_PROGRAMS = 1024  # about eight for each multiprocessor of a large GPU


@triton.jit
def _smaller(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def _nearest_kernel(
    states,  # [D_S, n_rows]
    actions,  # [D_A, n_rows]
    key_states,  # [D_S, n_keys]
    key_actions,  # [D_A, n_keys]
    after_squared,  # [n_keys] only rows behind (after_squared, after_row) count
    after_row,
    out_squared,  # [splits, n_keys]
    out_row,
    beta_squared,
    n_rows,
    n_keys,
    n_steps,
    D_S: tl.constexpr,
    D_A: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program finds the nearest of its share of the rows for a group of keys.

    Squared differences are added up in float32, column after column; a tie keeps the lower row.
    """
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    key_inside = key < n_keys
    behind_squared = tl.load(after_squared + key, mask=key_inside, other=0.0)
    behind_row = tl.load(after_row + key, mask=key_inside, other=0)
    best_squared = tl.full([KEYS], float("inf"), tl.float32)
    best_row = tl.full([KEYS], 2147483647, tl.int32)
    start = tl.program_id(1) * n_steps * ROWS
    for step in range(n_steps):
        row = start + step * ROWS + tl.arange(0, ROWS)
        inside = row < n_rows
        squared = tl.full([KEYS, ROWS], 0.0, tl.float32)
        for column in tl.static_range(D_S):
            x = tl.load(states + column * n_rows + row, mask=inside, other=0.0)
            q = tl.load(key_states + column * n_keys + key, mask=key_inside, other=0.0)
            squared += (q[:, None] - x[None, :]) * (q[:, None] - x[None, :])
        squared *= beta_squared
        for column in tl.static_range(D_A):
            x = tl.load(actions + column * n_rows + row, mask=inside, other=0.0)
            q = tl.load(key_actions + column * n_keys + key, mask=key_inside, other=0.0)
            squared += (q[:, None] - x[None, :]) * (q[:, None] - x[None, :])
        later = (squared == behind_squared[:, None]) & (row[None, :] > behind_row[:, None])
        squared = tl.where(inside[None, :] & ((squared > behind_squared[:, None]) | later), squared, float("inf"))
        nearest = tl.reduce(squared, 1, _smaller)
        its_row = tl.reduce(tl.where(squared == nearest[:, None], row[None, :], 2147483647), 1, _smaller)
        best_row = tl.where(nearest < best_squared, its_row, best_row)
        best_squared = tl.where(nearest < best_squared, nearest, best_squared)
    at = tl.program_id(1) * n_keys + key
    tl.store(out_squared + at, best_squared, mask=key_inside)
    tl.store(out_row + at, best_row, mask=key_inside)


class FusedScan:
    """All rows against all keys, k passes for rank k.

    Args:
        states: [N, d_s] float32.
        actions: [N, d_a] float32, on the same device.
        beta: weight of the state distance.

    Raises:
        ValueError: CPU tensors without Triton's interpreter; rows that are not float32.
    """

    def __init__(self, states: Tensor, actions: Tensor, beta: float) -> None:
        if states.device.type != "cuda" and isinstance(_nearest_kernel, triton.JITFunction):
            raise ValueError(
                f"backend 'triton' got tensors on {states.device}; move them to a CUDA device, "
                "or set TRITON_INTERPRET=1 before the first use to run it (slowly) on the CPU."
            )
        if states.dtype != torch.float32:
            raise ValueError(f"backend 'triton' computes in float32 and got {states.dtype} rows; convert them.")
        self._states = states
        self._actions = actions
        self._columns = states.T.contiguous(), actions.T.contiguous()  # neighbouring rows lie side by side
        self._beta = beta

    def kth_nearest(self, key_states: Tensor, key_actions: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return row index [B] int64 and its D^2 [B] in float64; the order of rows is that of float32 distances."""
        n_keys, n_rows = len(key_states), len(self._states)
        key_columns = key_states.float().T.contiguous(), key_actions.float().T.contiguous()
        groups = triton.cdiv(n_keys, _KEYS)
        n_steps = triton.cdiv(triton.cdiv(n_rows, max(1, _PROGRAMS // groups)), _ROWS)
        splits = triton.cdiv(n_rows, n_steps * _ROWS)
        squared = torch.full((n_keys,), -1.0, device=key_states.device)
        row = torch.full((n_keys,), -1, dtype=torch.int32, device=key_states.device)
        for _ in range(k):
            part_squared = torch.empty(splits, n_keys, device=row.device)
            part_row = torch.empty(splits, n_keys, dtype=torch.int32, device=row.device)
            _nearest_kernel[(groups, splits)](
                *self._columns,
                *key_columns,
                squared,
                row,
                part_squared,
                part_row,
                self._beta**2,
                n_rows,
                n_keys,
                n_steps,
                D_S=self._states.shape[1],
                D_A=self._actions.shape[1],
                KEYS=_KEYS,
                ROWS=_ROWS,
            )
            squared = part_squared.amin(dim=0)
            row = torch.where(part_squared == squared, part_row, n_rows).amin(dim=0)
        found = row.long().clamp(max=n_rows - 1)  # a key that is not a number finds nothing; its distance says so
        state_part = (key_states.double() - self._states[found].double()).square().sum(dim=1)
        action_part = (key_actions.double() - self._actions[found].double()).square().sum(dim=1)
        return found, self._beta**2 * state_part + action_part
