"""Nearest rows: hand numbers, limits in beta, agreement of back ends bit for bit, certificates, cache, bad input.

Each guarantee that rests on a bound has a control: the bound taken away must give wrong rows on the same instance.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corollary.kernels import _neighbours_blocks, _neighbours_candidates
from corollary.kernels._neighbours_metric import Points
from corollary.kernels.neighbours import NeighbourIndex

# "numba" stands for "blocks" once scans have taken long enough to be compiled.
FAST = ("kdtree", "blocks", "numba", "candidates")
BACKENDS = ("reference", *FAST, "auto")


def made(states: Tensor, actions: Tensor, backend: str = "auto", **options: Any) -> NeighbourIndex:
    with pytest.MonkeyPatch.context() as patch:
        if backend == "numba":
            backend = "blocks"
            patch.setattr(_neighbours_blocks, "_COMPILE_AFTER", 0.0)
        return NeighbourIndex(states, actions, backend=backend, **options)  # type: ignore[arg-type]


def walk(n: int, d_s: int = 4, d_a: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Standardised random walk with random actions: neighbouring rows have near states, as in trajectories."""
    generator = torch.Generator().manual_seed(seed)
    states = (0.2 * torch.randn(n, d_s, generator=generator)).cumsum(0)
    states = (states - states.mean(0)) / (states.std(0, correction=0) + 1e-3)
    return states, torch.rand(n, d_a, generator=generator) * 2 - 1


def lattice(n: int, d_s: int = 4, d_a: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Small integers: duplicated rows and exactly tied distances abound."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(0, 3, (n, d_s), generator=generator).float()
    return states, torch.randint(-1, 2, (n, d_a), generator=generator).float()


def keys_of(actions: Tensor, n: int, noise: float, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Row indices and actions near those rows' own."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(0, len(actions), (n,), generator=generator)
    return row, actions[row] + noise * torch.randn(n, actions.shape[1], generator=generator)


def by_hand(states: Tensor, actions: Tensor, state: Tensor, action: Tensor, beta: float, k: int) -> tuple[float, int]:
    """Sort all rows by (distance, index) in Python's own arithmetic."""
    ranked = sorted(
        (
            beta**2 * sum((x - y) ** 2 for x, y in zip(state.tolist(), s, strict=True))
            + sum((x - y) ** 2 for x, y in zip(action.tolist(), a, strict=True)),
            index,
        )
        for index, (s, a) in enumerate(zip(states.tolist(), actions.tolist(), strict=True))
    )
    return ranked[k - 1]


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many cells, blocks and runs, and keys on both paths, already with few rows."""
    for name, value in {
        "_CELL": 4,
        "_CELLS": 4,
        "_BLOCKS": 4,
        "_MANY": 6,
        "_ALONE": 1.0,
        "_SHARED": 1.0,
        "_PRODUCTS": 64,
        "_TERMS": 256,
    }.items():
        monkeypatch.setattr(_neighbours_blocks, name, value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_numbers(backend: str) -> None:
    states = torch.tensor([[0.0], [1.0], [1.0]])
    actions = torch.tensor([[0.0], [3.0], [-3.0]])
    index = made(states, actions, beta=2.0, backend=backend)
    # Key (0, 3): squared distances 9, 4 + 0, 4 + 36.
    for k, row, distance in ((1, 1, 2.0), (2, 0, 3.0), (3, 2, math.sqrt(40))):
        found = index.query(torch.tensor([[3.0]]), row=torch.tensor([0]), k=k)
        assert found.row.tolist() == [row]
        assert found.distance.item() == pytest.approx(distance, rel=1e-7)
    # Key (1, 0): row 0 at 4, rows 1 and 2 tie at 9, and the lower index comes first.
    assert [index.query(torch.zeros(1, 1), row=torch.tensor([1]), k=k).row.item() for k in (1, 2, 3)] == [0, 1, 2]
    # The same key, its state given as numbers.
    assert index.query(torch.zeros(1, 1), state=torch.ones(1, 1)).row.item() == 0


@given(
    make=st.sampled_from([walk, lattice]),
    n=st.integers(1, 70),
    d_s=st.integers(1, 4),
    d_a=st.integers(1, 3),
    beta=st.sampled_from([0.0, 1e-3, 0.5, 2.0, 1e6]),
    noise=st.sampled_from([0.0, 0.3, 3.0]),
    list_length=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_every_back_end_finds_what_sorting_finds(make, n, d_s, d_a, beta, noise, list_length, seed, data) -> None:
    states, actions = make(n, d_s, d_a, seed)
    k = data.draw(st.integers(1, n))
    row, action = keys_of(actions, 5, noise, seed)
    expected = [by_hand(states, actions, states[r], a, beta, k) for r, a in zip(row, action, strict=True)]
    for backend in BACKENDS:
        index = made(states, actions, beta=beta, backend=backend, list_length=list_length)
        for found in (index.query(action, row=row, k=k), index.query(action, state=states[row], k=k)):
            assert found.row.tolist() == [i for _, i in expected]
            torch.testing.assert_close(found.distance, torch.tensor([math.sqrt(s) for s, _ in expected]))


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("make", [walk, lattice])
@pytest.mark.parametrize("k", [1, 2, 5, 40])
@pytest.mark.parametrize("noise", [0.0, 0.2, 3.0])
def test_fast_back_ends_equal_the_reference_bit_for_bit(make, k: int, noise: float) -> None:
    states, actions = make(3000)
    row, action = keys_of(actions, 100, noise)
    reference = made(states, actions, backend="reference")
    for backend in FAST:
        index = made(states, actions, backend=backend)
        assert_same(index.query(action, row=row, k=k), reference.query(action, row=row, k=k))
        away = states[row] + 0.1
        assert_same(index.query(action, state=away, k=k), reference.query(action, state=away, k=k))


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("beta", [1.0, 44.077533705263484])  # the second one's square is not the product of the two
def test_the_bits_of_double_rows_and_of_an_awkward_beta_agree_too(beta: float) -> None:
    states, actions = (part.double() for part in walk(3000))
    row, action = keys_of(actions, 500, 0.2)
    reference = made(states, actions, beta=beta, backend="reference").query(action, row=row)
    for backend in FAST:
        assert_same(made(states, actions, beta=beta, backend=backend).query(action, row=row), reference)


def test_keys_of_the_default_block_sizes() -> None:
    """As above with the sizes that are shipped, more keys than one pass, and both paths taken."""
    states, actions = walk(20_000, 6, 3)
    row, action = keys_of(actions, 600, 0.5)
    expected = made(states, actions, backend="reference").query(action[-90:], row=row[-90:])
    for backend in FAST:
        found = made(states, actions, backend=backend).query(action, row=row)
        assert_same((found.row[-90:], found.distance[-90:]), expected)


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("backend", FAST)
def test_far_from_the_origin_nothing_cancels(backend: str) -> None:
    """States around 1000 that differ in the fourth digit, beta = 7.5 (AntMaze's)."""
    states, actions = walk(2000, 5, 2)
    states = 1000 + 0.1 * states
    row, action = keys_of(actions, 64, 0.3)
    expected = made(states, actions, beta=7.5, backend="reference").query(action, row=row)
    assert_same(made(states, actions, beta=7.5, backend=backend).query(action, row=row), expected)
    # Control: |x|^2 - 2 x.y + |y|^2 in float32 picks other rows.
    joint, key = torch.cat([7.5 * states, actions], 1), torch.cat([7.5 * states[row], action], 1)
    expanded = (key**2).sum(1, keepdim=True) - 2 * key @ joint.T + (joint**2).sum(1)
    assert (expanded.argmin(1) != expected.row).any()


@pytest.mark.usefixtures("tiny_blocks")
def test_products_need_their_error_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the block scan: with E = 0 the rounding of float32 products decides among near ties."""
    states, actions = walk(1000, 4, 2)
    states = (1e-4 * states).round(decimals=5) + torch.arange(1000)[:, None] // 16 * 30.0  # near ties, far apart
    row, action = keys_of(actions, 200, 0.0)
    action = action + 25.0
    expected = made(states, actions, backend="reference").query(action, row=row)
    assert_same(made(states, actions, backend="blocks").query(action, row=row), expected)
    monkeypatch.setattr(_neighbours_blocks, "_UNIT", 0.0)
    found = made(states, actions, backend="blocks").query(action, row=row)
    assert (found.row != expected.row).any()


@pytest.mark.parametrize(("k", "list_length"), [(1, 8), (3, 50)])
def test_prdc_3_certified_answers_are_exact(k: int, list_length: int) -> None:
    """PRDC-3: wherever a list certifies, it is right; control: without the certificate it is not."""
    states, actions = walk(2000, 3, 3)
    row, action = keys_of(actions, 400, 0.2)
    lists = _neighbours_candidates.StateTree(states.numpy(), 1).lists(list_length)
    rows, keys = Points(states.numpy(), actions.numpy()), Points(states[row].numpy(), action.numpy())
    found, _, certified = lists.kth_nearest(rows, keys, row.numpy(), 2.0, k)
    expected = made(states, actions, backend="reference").query(action, row=row, k=k).row.numpy()
    assert 0.1 < certified.mean() < 0.9
    assert (found == expected)[certified].all()
    assert not (found == expected)[~certified].all()


def test_lists_hold_the_nearest_states() -> None:
    states, _ = walk(300, 3)
    lists = _neighbours_candidates.StateTree(states.numpy(), 1).lists(5)
    distance = torch.cdist(states.double(), states.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = distance.sort(dim=1).values[:, :5].numpy()
    assert (lists.row[:, 0] == np.arange(300)).all()
    assert (lists.distance <= expected).all()
    np.testing.assert_allclose(lists.distance, expected, rtol=2e-6)


def test_counts_tell_certified_from_searched() -> None:
    states, actions = walk(500)
    index = made(states, actions, backend="candidates", list_length=4)
    row, action = keys_of(actions, 64, 0.0)
    index.query(action, row=row)  # the own row, at distance 0, is always certain here
    assert (index.n_keys, index.n_certified) == (64, 64)
    index.query(action, state=states[row])
    assert (index.n_keys, index.n_certified) == (128, 64)
    assert len(index) == 500


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_rows_the_lowest_index_wins(backend: str) -> None:
    """Also when a row has more copies than its list has places."""
    states, actions = walk(60)
    index = made(states.repeat(8, 1), actions.repeat(8, 1), backend=backend, list_length=4)
    row, action = keys_of(actions.repeat(8, 1), 100, 0.1)
    single = made(states, actions, backend="reference").query(action, row=row % 60).row
    assert torch.equal(index.query(action, row=row).row, single)
    assert torch.equal(index.query(action, row=row, k=8).row, single + 7 * 60)


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits_in_beta(backend: str) -> None:
    """Infinity: the row itself, as in TD3+BC. Zero: the nearest action of all, whatever its state."""
    states, actions = walk(20)
    row, action = keys_of(actions, 50, 1.0)
    assert torch.equal(made(states, actions, beta=1e6, backend=backend).query(action, row=row).row, row)
    nearest_action = torch.cdist(action.double(), actions.double()).argmin(1)
    found = made(states, actions, beta=0.0, backend=backend).query(action, row=row)
    assert torch.equal(found.row, nearest_action)
    control = made(states, actions, beta=0.1, backend=backend).query(action, row=row)
    assert not torch.equal(control.row, row)
    assert not torch.equal(control.row, nearest_action)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_shapes_and_dtypes(backend: str) -> None:
    states, actions = walk(50)
    index = made(states, actions, backend=backend)
    row, action = keys_of(actions, 12, 0.3)
    flat = index.query(action, row=row)
    stacked = index.query(action.reshape(3, 4, 2), row=row.reshape(3, 4))
    assert_same((stacked.row.flatten(), stacked.distance.flatten()), flat)
    assert stacked.row.shape == stacked.distance.shape == (3, 4)
    assert (stacked.row.dtype, stacked.distance.dtype) == (torch.int64, torch.float32)
    assert index.query(action[0], row=row[0]).row.shape == ()
    assert index.query(action[:0], row=row[:0]).row.shape == (0,)
    assert index.query(action.bfloat16(), row=row).distance.dtype == torch.bfloat16
    double = made(states.double(), actions.double(), backend=backend).query(action.double(), row=row)
    assert torch.equal(double.row, flat.row)
    assert double.distance.dtype == torch.float64


def test_autocast_and_precision_settings_change_nothing() -> None:
    states, actions = walk(3000)
    row, action = keys_of(actions, 64, 3.0)
    index = made(states, actions, backend="blocks")
    expected = index.query(action, row=row)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(index.query(action, row=row), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_auto_makes_lists_once_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first review at once and lists for free they are made after one query; the answers stay the same."""
    monkeypatch.setattr(_neighbours_candidates, "_REVIEW_SECONDS_PER_ROW", 0.0)
    states, actions = walk(1000)
    row, action = keys_of(actions, 64, 0.05)
    expected = made(states, actions, backend="reference").query(action, row=row)
    index = made(states, actions, backend="auto")
    for _ in range(200):
        assert_same(index.query(action, row=row), expected)
        if index.n_certified:
            break
    else:
        pytest.fail("no lists after 200 queries of a set whose lists take milliseconds")
    assert index._search._lists is not None
    # Control: keys that lists could never certify do not pay for them.
    useless = made(states, actions, beta=1e-6, backend="auto")
    for _ in range(50):
        useless.query(action, row=row)
    assert useless.n_certified == 0
    assert useless._search._lists is None


class TestCache:
    def test_lists_are_made_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        states, actions = walk(200)
        row, action = keys_of(actions, 32, 0.5)
        expected = made(states, actions, backend="candidates", cache_dir=tmp_path).query(action, row=row)
        assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]
        monkeypatch.setattr(_neighbours_candidates, "StateTree", None)  # making lists again would fail
        for backend in ("candidates", "auto"):
            index = made(states, 2 * actions, beta=3.0, backend=backend, cache_dir=tmp_path)
            index.query(action, row=row)
            assert index.n_certified > 0
        again = made(states, actions, backend="candidates", cache_dir=tmp_path)
        assert_same(again.query(action, row=row), expected)

    def test_other_states_or_lengths_have_other_files(self, tmp_path: Path) -> None:
        states, actions = walk(50)
        for s, m in ((states, 4), (states + 1, 4), (states.double(), 4), (states, 5)):
            made(s, actions.to(s.dtype), backend="candidates", list_length=m, cache_dir=tmp_path)
        assert len(list(tmp_path.iterdir())) == 4

    def test_a_folder_that_cannot_be_written_costs_time_only(self, tmp_path: Path) -> None:
        states, actions = walk(200)
        row, action = keys_of(actions, 32, 0.5)
        expected = made(states, actions, backend="candidates").query(action, row=row)
        (tmp_path / "file").touch()
        with pytest.warns(UserWarning, match="Candidate lists (could not be kept|.* are damaged or closed to us)"):
            index = made(states, actions, backend="candidates", cache_dir=tmp_path / "file")
        assert_same(index.query(action, row=row), expected)

    @pytest.mark.parametrize("damage", ["cut", "noise", "empty", "other arrays", "pickle", "wild rows"])
    def test_a_damaged_file_is_made_anew(self, tmp_path: Path, damage: str) -> None:
        states, actions = walk(200)
        row, action = keys_of(actions, 32, 0.5)
        expected = made(states, actions, backend="candidates", cache_dir=tmp_path).query(action, row=row)
        (path,) = tmp_path.iterdir()
        whole = path.read_bytes()
        if damage == "cut":
            path.write_bytes(whole[: len(whole) // 2])
        elif damage == "noise":
            path.write_bytes(whole[:1000] + bytes(255 - byte for byte in whole[1000:3000]) + whole[3000:])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "other arrays":
            np.savez(path, row=np.zeros((3, 4), np.int32))
        elif damage == "pickle":
            np.savez(path, row=np.array([{}], dtype=object), distance=np.zeros((200, 32), np.float32))
        else:
            np.savez(path, row=np.full((200, 32), 999, np.int32), distance=np.zeros((200, 32), np.float32))
        with pytest.warns(UserWarning, match="damaged"):
            index = made(states, actions, backend="candidates", cache_dir=tmp_path)
        assert_same(index.query(action, row=row), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made(states, actions, backend="candidates", cache_dir=tmp_path)


def bad_rows() -> list[tuple[str, Tensor, Tensor]]:
    states, actions = walk(10)
    with_nan, with_inf = states.clone(), actions.clone()
    with_nan[3, 1] = math.nan
    with_inf[7, 0] = math.inf
    return [
        ("Row 3 holds NaN", with_nan, actions),
        ("Row 7 holds NaN", states, with_inf),
        ("equally many rows", states[:9], actions),
        ("matrices", states[0], actions),
        ("must not be empty", states[:0], actions[:0]),
        ("must not be empty", states[:, :0], actions),
        ("both be float32", states, actions.double()),
        ("both be float32", states.int(), actions.int()),
    ]


@pytest.mark.parametrize(("message", "states", "actions"), bad_rows())
def test_bad_rows(message: str, states: Tensor, actions: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        made(states, actions)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("beta is -1", {"beta": -1.0}),
        ("beta is nan", {"beta": math.nan}),
        ("out of the float32 range", {"beta": 1e30}),
        ("Unknown back end 'ball'; choose one of auto", {"backend": "ball"}),
        ("list_length", {"list_length": 0}),
        ("workers", {"workers": 0}),
    ],
)
def test_bad_options(message: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        made(*walk(10), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_keys(backend: str) -> None:
    states, actions = walk(10)
    index = made(states, actions, backend=backend)
    row, action = keys_of(actions, 4, 0.1)
    for message, arguments in {
        "axis of 2": {"action": action[:, :1], "row": row},
        "not both or neither": {"action": action},
        "both or neither": {"action": action, "row": row, "state": states[row]},
        "k is 11": {"action": action, "row": row, "k": 11},
        "k is 0": {"action": action, "row": row, "k": 0},
        "must be int64": {"action": action, "row": row.int()},
        "one per key": {"action": action, "row": row[:3]},
        "Key states": {"action": action, "state": states[:3]},
        "diverged": {"action": action / 0, "row": row},
        "A key holds NaN": {"action": action, "state": states[row] * math.nan},
        "outside 0 .. 9": {"action": action, "row": row + 10},
        "outside 0": {"action": action, "row": row - 10},
    }.items():
        with pytest.raises(ValueError, match=message):
            index.query(**arguments)


@pytest.mark.parametrize("backend", ["blocks", "candidates"])
def test_a_key_out_of_the_float32_range_is_refused(backend: str) -> None:
    states, actions = walk(100)
    index = made(states, actions, backend=backend)
    with pytest.raises(ValueError, match="too far"):
        index.query(torch.full((1, 2), 1e20), row=torch.tensor([0]))
