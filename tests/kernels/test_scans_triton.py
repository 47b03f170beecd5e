"""The Triton scan against the reference: under Triton's interpreter here, compiled where there is a GPU."""

import importlib
import sys

import pytest
import torch

from corollary.kernels.scans import backward_recursion, gae

pytest.importorskip("triton")
MODULE = "corollary.kernels._scans_triton"


@pytest.fixture
def fresh_module(monkeypatch):
    """The kernel's module is imported anew on first use, as the environment decides then how it runs."""
    saved = sys.modules.pop(MODULE, None)
    yield monkeypatch
    sys.modules.pop(MODULE, None)
    if saved is not None:
        sys.modules[MODULE] = saved


@pytest.fixture
def interpreted(fresh_module):
    fresh_module.setenv("TRITON_INTERPRET", "1")
    return fresh_module


def random_recursion(n_rows: int, n_columns: int, dtype: torch.dtype, device: str = "cpu"):
    generator = torch.Generator().manual_seed(1000 * n_rows + n_columns)
    u = torch.randn(n_rows, n_columns, generator=generator, dtype=torch.float64)
    c = torch.rand(n_rows, n_columns, generator=generator, dtype=torch.float64)
    c[torch.rand(n_rows, n_columns, generator=generator) < 0.2] = 0.0  # several episodes per column
    return u.to(device, dtype), c.to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tile", [4, 2048])
@pytest.mark.parametrize(("n_rows", "n_columns"), [(1, 1), (5, 1), (13, 3), (8, 4), (3, 37)])
def test_interpreted_scan_equals_reference(interpreted, dtype, tile, n_rows, n_columns) -> None:
    """Sizes inside, at and beyond the edges of a tile; small tiles make x travel between several of them."""
    module = importlib.import_module(MODULE)
    interpreted.setattr(module, "_TILE", tile)
    interpreted.setattr(module, "_MAX_TILE_COLUMNS", min(tile, 32))
    u, c = random_recursion(n_rows, n_columns, dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        backward_recursion(u, c, backend="triton"),
        backward_recursion(u, c, backend="reference"),
        rtol=tolerance,
        atol=tolerance,
    )


def test_interpreted_gae_of_the_worked_batch(interpreted) -> None:
    """The numbers of test_scans.py, with two batch axes."""
    columns = {
        "rewards": torch.tensor([1.0, 2, 3, 4, 5]),
        "values": torch.tensor([0.5, 1, 1.5, 2, 2.5]),
        "next_values": torch.tensor([1.0, 7, 2, 99, 3]),
        "terminated": torch.arange(5) == 3,
        "truncated": torch.arange(5) == 1,
    }
    batch = {name: x[:, None, None].expand(5, 2, 3) for name, x in columns.items()}
    advantages, _ = gae(**batch, discount=0.9, trace_decay=0.8, backend="triton")
    expected = torch.tensor([6.656, 7.3, 4.74, 2.0, 5.2])[:, None, None].expand(5, 2, 3)
    torch.testing.assert_close(advantages, expected)


def test_cpu_tensors_without_the_interpreter_are_refused(fresh_module) -> None:
    fresh_module.delenv("TRITON_INTERPRET", raising=False)
    u, c = random_recursion(3, 2, torch.float32)
    with pytest.raises(ValueError, match=r"got tensors on cpu; .* TRITON_INTERPRET=1"):
        backward_recursion(u, c, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("n_rows", "n_columns"), [(1, 1), (2049, 1), (5000, 3), (128, 4096), (300, 70)])
def test_compiled_scan_equals_reference(fresh_module, dtype, n_rows, n_columns) -> None:
    fresh_module.delenv("TRITON_INTERPRET", raising=False)
    u, c = random_recursion(n_rows, n_columns, dtype, "cuda")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for backend in ("triton", "auto"):
        torch.testing.assert_close(
            backward_recursion(u, c, backend=backend),
            backward_recursion(u, c, backend="reference"),
            rtol=tolerance,
            atol=tolerance,
        )
