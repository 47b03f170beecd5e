"""The fused Triton search against the reference: interpreted here, compiled where there is a GPU."""

import importlib
import sys

import pytest
import torch
from torch import Tensor

from corollary.kernels.neighbours import NeighbourIndex

pytest.importorskip("triton")
MODULE = "corollary.kernels._neighbours_triton"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch):
    """The kernel's module, imported anew: the environment decides at import how it runs."""
    saved = sys.modules.pop(MODULE, None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)
    if saved is not None:
        sys.modules[MODULE] = saved


def problem(n: int, d_s: int, d_a: int, n_keys: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    states, actions = torch.randn(n, d_s, generator=generator), torch.rand(n, d_a, generator=generator) * 2 - 1
    row = torch.randint(0, n, (n_keys,), generator=generator)
    action = actions[row] + 0.7 * torch.randn(n_keys, d_a, generator=generator)
    return states.to(device), actions.to(device), row.to(device), action.to(device)


def assert_nearest_up_to_float32(states: Tensor, actions: Tensor, row: Tensor, action: Tensor, k: int, beta: float):
    """The found row's distance, recomputed in float64, is the k-th smallest up to the documented factor."""
    found = NeighbourIndex(states, actions, beta=beta, backend="triton").query(action, row=row, k=k)
    exact = NeighbourIndex(states, actions, beta=beta, backend="reference").query(action, row=row, k=k)
    state_part = (states[found.row].double() - states[row].double()).square().sum(1)
    action_part = (actions[found.row].double() - action.double()).square().sum(1)
    distance = (beta**2 * state_part + action_part).sqrt()
    factor = 1 + (states.shape[1] + actions.shape[1] + 4) * 2.0**-23
    assert (distance <= exact.distance.double() * factor + 1e-30).all()
    assert (distance * factor + 1e-30 >= exact.distance.double()).all()
    torch.testing.assert_close(found.distance, distance.float())
    return found


@pytest.mark.parametrize(("n", "n_keys"), [(1, 1), (5, 3), (37, 9), (64, 4)])
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_interpreted_search_equals_reference(interpreted, monkeypatch, n: int, n_keys: int, beta: float) -> None:
    """Sizes inside, at and beyond the edges of a tile; few rows per program, so that partial answers are combined."""
    monkeypatch.setattr(interpreted, "_KEYS", 4)
    monkeypatch.setattr(interpreted, "_ROWS", 8)
    monkeypatch.setattr(interpreted, "_PROGRAMS", 6)
    case = problem(n, 3, 2, n_keys)
    for k in {1, min(3, n), n if n < 10 else 1}:
        assert_nearest_up_to_float32(*case, k, beta)


def test_interpreted_search_breaks_ties_by_row(interpreted, monkeypatch) -> None:
    """Each of five rows in seven copies, spread over tiles and programs: ranks count up through the copies."""
    monkeypatch.setattr(interpreted, "_KEYS", 4)
    monkeypatch.setattr(interpreted, "_ROWS", 8)
    monkeypatch.setattr(interpreted, "_PROGRAMS", 3)
    states, actions, row, action = problem(5, 3, 2, 6)
    single = NeighbourIndex(states, actions, backend="reference").query(action, row=row).row
    index = NeighbourIndex(states.repeat(7, 1), actions.repeat(7, 1), backend="triton")
    for k in (1, 2, 7):
        assert torch.equal(index.query(action, row=row, k=k).row, single + 5 * (k - 1))


def test_interpreted_search_reports_a_diverged_policy_by_its_distance(interpreted) -> None:
    """On a GPU keys are not looked at; a NaN must neither crash nor look like an answer."""
    states, actions, row, action = problem(5, 3, 2, 2)
    search = interpreted.FusedScan(states, actions, 2.0)
    found, squared = search.kth_nearest(states[row], torch.full_like(action, float("nan")), 1)
    assert ((found >= 0) & (found < 5)).all()
    assert squared.isnan().all()


def test_double_precision_rows_are_refused(interpreted) -> None:
    states, actions, _, _ = problem(5, 3, 2, 2)
    with pytest.raises(ValueError, match="float32"):
        NeighbourIndex(states.double(), actions.double(), backend="triton")


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = sys.modules.pop(MODULE, None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    states, actions, _, _ = problem(5, 3, 2, 2)
    try:
        with pytest.raises(ValueError, match="TRITON_INTERPRET"):
            NeighbourIndex(states, actions, backend="triton")
    finally:
        sys.modules.pop(MODULE, None)
        if saved is not None:
            sys.modules[MODULE] = saved


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 4])
def test_compiled_search_equals_reference(k: int) -> None:
    case = problem(100_000, 17, 6, 300, "cuda")
    found = assert_nearest_up_to_float32(*case, k, 2.0)
    assert found.row.is_cuda
    states, actions, *_ = case
    assert NeighbourIndex(states, actions).backend == "triton"
