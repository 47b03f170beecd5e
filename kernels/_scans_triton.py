"""Triton form of :func:`corollary.kernels.scans.backward_recursion`; import it through there.

Whether the kernel is compiled or interpreted is decided when this module is imported: with
``TRITON_INTERPRET=1`` in the environment it runs on CPU tensors, slowly, which is how it is tested on
machines without a GPU. It uses Triton's primitives only: library functions such as ``tl.sum`` were decided
for when Triton itself was imported.
"""

# Triton ships no types, and its kernels take pointers that Python has no types for.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # elements per tile
_MAX_TILE_COLUMNS = 32  # neighbouring columns are neighbours in memory: one 128-byte line of float32


@triton.jit
def _then(p_later, y_later, p_earlier, y_earlier):
    """Compose x = y + p·x_next of two rows; the later one is applied first, as time runs backwards."""
    return p_later * p_earlier, y_earlier + p_earlier * y_later


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _scan_kernel(u, c, x, n_rows, n_columns, n_tiles, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """One program per group of columns; tiles of rows from last to first, a row of x carried between them."""
    columns = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    tile_rows = tl.arange(0, TILE_ROWS)
    x_next = tl.full([TILE_COLUMNS], 0.0, x.dtype.element_ty)
    for i in range(n_tiles):
        rows = (n_tiles - 1 - i) * TILE_ROWS + tile_rows
        inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
        at = rows[:, None].to(tl.int64) * n_columns + columns[None, :]
        u_tile = tl.load(u + at, mask=inside, other=0.0)
        c_tile = tl.load(c + at, mask=inside, other=0.0)
        p, y = tl.associative_scan((c_tile, u_tile), 0, _then, reverse=True)
        x_tile = y + p * x_next[None, :]
        tl.store(x + at, x_tile, mask=inside)
        x_next = tl.reduce(tl.where(tile_rows[:, None] == 0, x_tile, 0.0), 0, _add)


def scan(u: Tensor, c: Tensor) -> Tensor:
    """Solve the recursion for contiguous ``[T, N]`` float tensors with T, N ≥ 1.

    Raises:
        ValueError: CPU tensors without Triton's interpreter.
    """
    if u.device.type != "cuda" and isinstance(_scan_kernel, triton.JITFunction):
        raise ValueError(
            f"backend 'triton' got tensors on {u.device}; move them to a CUDA device, "
            "or set TRITON_INTERPRET=1 before the first use to run it (slowly) on the CPU."
        )
    n_rows, n_columns = u.shape
    tile_columns = min(_MAX_TILE_COLUMNS, triton.next_power_of_2(n_columns))
    tile_rows = min(_TILE // tile_columns, triton.next_power_of_2(n_rows))
    x = torch.empty_like(u)
    grid = (triton.cdiv(n_columns, tile_columns),)
    n_tiles = triton.cdiv(n_rows, tile_rows)
    _scan_kernel[grid](u, c, x, n_rows, n_columns, n_tiles, TILE_ROWS=tile_rows, TILE_COLUMNS=tile_columns)
    return x
