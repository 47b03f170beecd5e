"""Returns and advantages: worked numbers, definitions, limits, and every CPU form against the reference."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corollary.kernels.scans import backward_recursion, discounted_sums, gae, lambda_returns

BACKENDS = ("reference", "cpu")


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def at(n: int, *rows: int) -> Tensor:
    """Bool ``[n]``, True at `rows`."""
    return torch.tensor([t in rows for t in range(n)])


# One batch with a truncation at t=1, a termination at t=3 (its next value, 99, must be ignored) and an open
# end; discount 0.9, trace decay 0.8. The expected rows below are hand calculations, for example
# A_4 = 5 + 0.9*3 - 2.5 = 5.2, A_3 = 4 - 2 = 2, A_2 = 3 + 0.9*2 - 1.5 + 0.72*2 = 4.74.
REWARDS = f64(1, 2, 3, 4, 5)
VALUES = f64(0.5, 1, 1.5, 2, 2.5)
NEXT_VALUES = f64(1, 7, 2, 99, 3)
TERMINATED = at(5, 3)
TRUNCATED = at(5, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    ("trace_decay", "bootstrap_on_truncation", "expected"),
    [
        (0.8, True, f64(6.656, 7.3, 4.74, 2.0, 5.2)),
        # Control: the same batch with its truncation treated as a termination.
        (0.8, False, f64(2.12, 1.0, 4.74, 2.0, 5.2)),
        (0.0, True, f64(1.4, 7.3, 3.3, 2.0, 5.2)),
        (1.0, True, f64(8.47, 8.3, 6.6, 4.0, 7.7) - VALUES),
    ],
)
def test_gae_of_the_worked_batch(backend, batch_shape, trace_decay, bootstrap_on_truncation, expected) -> None:
    def batch(x: Tensor) -> Tensor:
        return x.reshape(5, *[1] * len(batch_shape)).expand(5, *batch_shape)

    advantages, returns = gae(
        *(batch(x) for x in (REWARDS, VALUES, NEXT_VALUES, TERMINATED, TRUNCATED)),
        discount=0.9,
        trace_decay=trace_decay,
        backend=backend,
        bootstrap_on_truncation=bootstrap_on_truncation,
    )
    torch.testing.assert_close(advantages, batch(expected), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(returns, batch(expected + VALUES), rtol=1e-14, atol=1e-14)


def test_merging_the_flags_is_caught_by_the_worked_batch() -> None:
    merged = TERMINATED | TRUNCATED
    numbers = {"discount": 0.9, "trace_decay": 0.8}
    wrong, _ = gae(REWARDS, VALUES, NEXT_VALUES, merged, torch.zeros_like(merged), **numbers)
    right, _ = gae(REWARDS, VALUES, NEXT_VALUES, TERMINATED, TRUNCATED, **numbers)
    torch.testing.assert_close(wrong, f64(2.12, 1.0, 4.74, 2.0, 5.2))
    assert (wrong - right).abs().max() > 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_lambda_returns_need_only_next_values(backend) -> None:
    """The Q(λ) form of the worked batch: V(s') equals the next row's V within each of its episodes."""
    numbers = {"discount": 0.9, "trace_decay": 0.8, "backend": backend}
    returns = lambda_returns(REWARDS, NEXT_VALUES, TERMINATED, TRUNCATED, **numbers)
    torch.testing.assert_close(returns, f64(7.156, 8.3, 6.24, 4.0, 7.7))
    _, same = gae(REWARDS, VALUES, NEXT_VALUES, TERMINATED, TRUNCATED, **numbers)
    torch.testing.assert_close(returns, same)
    cut = lambda_returns(REWARDS, NEXT_VALUES, TERMINATED, TRUNCATED, bootstrap_on_truncation=False, **numbers)
    torch.testing.assert_close(cut[:2], f64(1 + 0.9 * (0.2 * 1 + 0.8 * 2), 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_discounted_sums_by_hand(backend) -> None:
    rewards, none = f64(1, 2, 4), at(3)
    sums = discounted_sums(rewards, 0.5, at(3, 2), none, backend=backend)
    torch.testing.assert_close(sums, f64(1 + 1 + 1, 2 + 2, 4))
    # Truncated after row 0, open after row 2: each end adds its own bootstrap, 10 and 30; 20 is not read.
    bootstrap = f64(10, 20, 30)
    sums = discounted_sums(rewards, 0.5, none, at(3, 0), bootstrap=bootstrap, backend=backend)
    torch.testing.assert_close(sums, f64(1 + 5, 2 + 2 + 7.5, 4 + 15))
    # Terminated after row 2: the bootstrap is not read there either.
    sums = discounted_sums(rewards, 0.5, at(3, 2), none, bootstrap=bootstrap, backend=backend)
    torch.testing.assert_close(sums, f64(3, 4, 4))


@pytest.mark.parametrize("terminates", [True, False])
def test_lambda_return_is_the_mixture_of_n_step_returns(terminates) -> None:
    """The definition in Sutton and Barto (12.3), summed term by term for one episode."""
    n, discount, decay = 7, 0.93, 0.6
    rewards, next_values = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def n_step(t: int, k: int) -> Tensor:
        """K rewards from t on, then the value of the state reached, unless that is terminal."""
        tail = 0.0 if terminates and t + k == n else discount**k * next_values[t + k - 1]
        return sum(discount**i * rewards[t + i] for i in range(k)) + tail

    expected = [
        (1 - decay) * sum(decay ** (k - 1) * n_step(t, k) for k in range(1, n - t))
        + decay ** (n - t - 1) * n_step(t, n - t)
        for t in range(n)
    ]
    returns = lambda_returns(
        rewards,
        next_values,
        at(n, n - 1) & terminates,
        at(n, n - 1) & (not terminates),
        discount=discount,
        trace_decay=decay,
    )
    torch.testing.assert_close(returns, torch.stack(expected), rtol=1e-13, atol=1e-13)


def random_batch(seed: int, shape: tuple[int, ...], dtype=torch.float64, end_rate: float = 0.1):
    """Rewards, values, next values, terminated, truncated, valid; with and without ends at the last row."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype)
    flags = torch.rand(3, *shape, generator=generator) < end_rate
    return (*numbers, flags[0], flags[1], ~flags[2])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    # Both forms of the CPU back end: blocks from 64 rows on, single rows below that.
    n_rows=st.one_of(st.integers(1, 70), st.integers(64, 300)),
    batch_shape=st.sampled_from([(), (1,), (4,), (2, 3), (600,)]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    end_rate=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    discount=st.floats(0, 1),
    trace_decay=st.floats(0, 1),
    with_valid=st.booleans(),
)
def test_cpu_equals_reference(seed, n_rows, batch_shape, dtype, end_rate, discount, trace_decay, with_valid) -> None:
    rewards, values, next_values, *flags = random_batch(seed, (n_rows, *batch_shape), dtype, end_rate)
    flags = flags if with_valid else flags[:2]
    numbers = {"discount": discount, "trace_decay": trace_decay}
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    fast, slow = (
        (
            *gae(rewards, values, next_values, *flags, **numbers, backend=backend),
            lambda_returns(rewards, next_values, *flags, **numbers, backend=backend),
            discounted_sums(rewards, discount, *flags[:2], bootstrap=next_values, backend=backend),
        )
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(fast, slow, **tolerance)
    assert all(x.dtype == dtype and x.shape == rewards.shape for x in fast)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_rows", [12, 200])
def test_episodes_do_not_leak_into_each_other(backend, n_rows) -> None:
    """Changing everything after an episode's end leaves the episode alone; without the flag it does not."""
    rewards, values, next_values, terminated, _, _ = random_batch(0, (n_rows, 3), end_rate=0.0)
    end = n_rows // 2
    later = torch.arange(n_rows)[:, None] > end
    for cut in ("terminated", "truncated", "neither"):
        flag = torch.zeros_like(terminated)
        flag[end] = True
        flags = (flag & (cut == "terminated"), flag & (cut == "truncated"))
        numbers = {"discount": 0.99, "trace_decay": 0.95, "backend": backend}
        before, _ = gae(rewards, values, next_values, *flags, **numbers)
        after, _ = gae(rewards + 100 * later, values - 7 * later, next_values + later, *flags, **numbers)
        assert torch.equal(before[: end + 1], after[: end + 1]) == (cut != "neither")


@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_rows_are_as_if_they_were_not_there(backend) -> None:
    """NEXT_STEP autoreset: one column with reset rows after its ends equals the same column without them."""
    is_reset = at(8, 0, 3, 6)
    rewards, values, next_values, *_ = random_batch(1, (8,))
    terminated, truncated = at(8, 2), at(8, 5)
    # Whatever stands in a reset row is ignored, its flags included.
    for x in (rewards, values, next_values):
        x[is_reset] = torch.nan
    terminated[0] = truncated[3] = True
    numbers = {"discount": 0.9, "trace_decay": 0.8, "backend": backend}
    batch = (rewards, values, next_values, terminated, truncated)
    with_resets = gae(*batch, ~is_reset, **numbers)
    without = gae(*(x[~is_reset] for x in batch), **numbers)
    for padded, plain in zip(with_resets, without, strict=True):
        torch.testing.assert_close(padded[~is_reset], plain, rtol=1e-14, atol=1e-14)
        assert (padded[is_reset] == 0).all()
    # Control: without the mask the reset rows' numbers come through.
    assert gae(*batch, **numbers)[0].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_invalid_row_is_a_wall_even_without_a_flag(backend) -> None:
    """Rows before a gap end as at the end of the batch, also where no flag says so."""
    rewards, values, next_values, *_ = random_batch(2, (9,))
    none, valid = at(9), ~at(9, 4, 5)
    numbers = {"discount": 0.9, "trace_decay": 0.8, "backend": backend}

    def estimates(rows: slice, valid: Tensor | None) -> tuple[Tensor, ...]:
        r, v, v_next, no = rewards[rows], values[rows], next_values[rows], none[rows]
        advantages, returns = gae(r, v, v_next, no, no, valid, **numbers)
        mixed = lambda_returns(r, v_next, no, no, valid, **numbers)
        sums = discounted_sums(r, 0.9, no, no, valid, v_next, backend=backend)
        return advantages, returns, mixed, sums

    for whole, first, last in zip(
        estimates(slice(9), valid), estimates(slice(4), None), estimates(slice(6, 9), None), strict=True
    ):
        torch.testing.assert_close(whole, torch.cat([first, torch.zeros(2, dtype=first.dtype), last]))
    # Control: without the mask the rows before the gap see what follows it.
    leaking, alone = estimates(slice(9), None)[0], estimates(slice(4), None)[0]
    assert (leaking[:4] - alone).abs().min() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_next_values_may_be_nan(backend) -> None:
    next_values = NEXT_VALUES.clone()
    next_values[3] = torch.nan
    numbers = {"discount": 0.9, "trace_decay": 0.8, "backend": backend}
    advantages, _ = gae(REWARDS, VALUES, next_values, TERMINATED, TRUNCATED, **numbers)
    torch.testing.assert_close(advantages, f64(6.656, 7.3, 4.74, 2.0, 5.2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend) -> None:
    batch = random_batch(4, (80, 2))
    copies = [x.clone() for x in batch]
    gae(*batch, discount=0.9, trace_decay=0.8, backend=backend)
    lambda_returns(batch[0], *batch[2:], discount=0.9, trace_decay=0.8, backend=backend)
    backward_recursion(batch[0], batch[1], backend=backend)
    assert all(torch.equal(x, copy) for x, copy in zip(batch, copies, strict=True))


def test_recursion_by_hand_and_on_views() -> None:
    """x = (1 + 2*7, 2 + 0.5*10, 10), also through a transposed view, and with no columns at all."""
    u, c = f64(1, 2, 10), f64(2, 0.5, 77)
    for backend in BACKENDS:
        assert backward_recursion(u, c, backend=backend).tolist() == [15, 7, 10]
        views = (torch.stack([x, x]).T for x in (u, c))
        assert backward_recursion(*views, backend=backend).tolist() == [[15, 15], [7, 7], [10, 10]]
        assert backward_recursion(u.new_empty(3, 0), u.new_empty(3, 0), backend=backend).shape == (3, 0)


def test_gradients() -> None:
    """The reference is differentiable, "auto" notices that a gradient is needed, the others refuse."""
    rewards, values, next_values, *flags = random_batch(5, (6, 2), end_rate=0.2)
    leaves = tuple(x.requires_grad_() for x in (rewards, values, next_values))
    numbers = {"discount": 0.9, "trace_decay": 0.8}
    assert torch.autograd.gradcheck(lambda *x: gae(*x, *flags, **numbers, backend="reference"), leaves)
    assert torch.autograd.gradcheck(lambda r, v: lambda_returns(r, v, *flags, **numbers), (rewards, next_values))
    assert torch.autograd.gradcheck(lambda u, c: backward_recursion(u, c), (rewards, values))
    with pytest.raises(ValueError, match=r"'cpu' has no gradient .* torch\.no_grad"):
        gae(*leaves, *flags, **numbers, backend="cpu")
    with torch.no_grad():
        gae(*leaves, *flags, **numbers, backend="cpu")


GOOD = {
    "rewards": REWARDS,
    "values": VALUES,
    "next_values": NEXT_VALUES,
    "terminated": TERMINATED,
    "truncated": TRUNCATED,
    "discount": 0.9,
    "trace_decay": 0.8,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": VALUES[:4]}, r"values has shape \[4\] but rewards \[5\]"),
        (
            {"next_values": NEXT_VALUES.float()},
            r"next_values has dtype torch.float32 but rewards torch.float64",
        ),
        ({"rewards": REWARDS.long()}, r"rewards has dtype torch.int64; convert it to float32 or float64"),
        ({"rewards": [1.0, 2.0]}, r"rewards is a list; pass a torch.Tensor"),
        ({x: f64() for x in ("rewards", "values", "next_values")}, r"shape \[0\]; it needs a time axis"),
        ({"terminated": TERMINATED.double()}, r"terminated is torch.float64; pass a bool tensor"),
        ({"truncated": [False] * 5}, r"truncated is list; pass a bool tensor"),
        ({"truncated": TRUNCATED[:, None]}, r"truncated has shape \[5, 1\] .* but rewards have \[5\]"),
        ({"valid": torch.ones(5)}, r"valid is torch.float32; pass a bool tensor"),
        ({"discount": 1.01}, r"discount is 1.01; it must lie in \[0, 1\]"),
        ({"trace_decay": float("nan")}, r"trace_decay is nan"),
        ({"backend": "cuda"}, r"backend is 'cuda'; choose one of auto, reference, cpu, triton"),
        ({"rewards": REWARDS.to("meta")}, r"values has device cpu but rewards meta"),
    ],
)
def test_bad_input_gets_one_sentence(change, message) -> None:
    gae(**GOOD)
    with pytest.raises(ValueError, match=message):
        gae(**{**GOOD, **change})


def test_cpu_form_refuses_another_device() -> None:
    u = torch.empty(3, 2, device="meta")
    with pytest.raises(ValueError, match="'cpu' got tensors on meta"):
        backward_recursion(u, u, backend="cpu")


def test_missing_triton_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "corollary.kernels._scans_triton", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"corollary\[gpu\]"):
        backward_recursion(REWARDS, VALUES, backend="triton")
