"""Per-seed random streams: published vectors; company, order and restarts change nothing; distribution."""

import hashlib
import importlib
import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from corollary.kernels import streams
from corollary.kernels.streams import RandomStream, philox4x32, torch_generator

KINDS = ("uniform", "normal", "integers")
DTYPES = (torch.float32, torch.float64)


def draw(stream: RandomStream, kind: str, step: int, shape: tuple[int, ...] = (7,), high: int = 1000) -> Tensor:
    return stream.integers(step, high, shape) if kind == "integers" else getattr(stream, kind)(step, shape)


# --- the generator ---


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known answers for philox4x32-10 in the kat_vectors file of Random123 (D. E. Shaw Research).
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected) -> None:
    def words(text: str) -> tuple[Tensor, ...]:
        return tuple(torch.tensor([int(word, 16)]) for word in text.split())

    assert philox4x32(words(counter), words(key)) == words(expected)


def test_address_layout_by_numpy() -> None:
    """The words behind uniform() from an independent unsigned implementation of the documented layout."""
    seed, step, purpose, n = 2**63 + 12345, 2**35 + 9, "batch", 10
    digest = hashlib.sha256(purpose.encode()).digest()
    word_2 = (step >> 32) | (0 << 8) | int.from_bytes(digest[4:6], "little") << 16
    word_3 = int.from_bytes(digest[:4], "little")
    expected = []
    for block in range(3):
        c = [block, step % 2**32, word_2, word_3]
        k = [seed % 2**32, seed >> 32]
        for _ in range(10):
            products = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [
                products[1] >> 32 ^ c[1] ^ k[0],
                products[1] % 2**32,
                products[0] >> 32 ^ c[3] ^ k[1],
                products[0] % 2**32,
            ]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        expected += c
    single = RandomStream([seed], purpose).uniform(step, (n,))[0]
    assert single.tolist() == [(word >> 8) / 2**24 for word in expected[:n]]
    double = RandomStream([seed], purpose, dtype=torch.float64).uniform(step, (n // 2,))[0]
    pairs = zip(expected[:n:2], expected[1:n:2], strict=True)
    assert double.tolist() == [((top >> 5) * 2**26 + (bottom >> 6)) / 2**53 for top, bottom in pairs]


# --- what a number does not depend on ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_alone_equals_the_seed_among_ten(kind, dtype) -> None:
    """Over enough steps that blocks of different lengths are involved on the two sides."""
    seeds = (3, 0, 7, 2**64 - 1, 7 + 2**32, 12, 99, 5, 8, 2**40)
    together = RandomStream(seeds, "noise", dtype=dtype)
    alone = [RandomStream([seed], "noise", dtype=dtype) for seed in seeds]
    for step in range(0, 90, 2):
        ten = draw(together, kind, step, (60, 3))
        assert torch.equal(ten, torch.cat([draw(stream, kind, step, (60, 3)) for stream in alone]))
    assert ten.shape == (10, 60, 3)
    assert ten.dtype == (torch.int64 if kind == "integers" else dtype)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.one_of(st.integers(0, 200), st.integers(2**32 - 40, 2**32 + 40)), max_size=10),
    start=st.integers(0, 150),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(), (1,), (5,), (4, 3), (0,), (2000,)]),
)
def test_order_of_requests_and_resuming_change_nothing(steps, start, kind, dtype, shape) -> None:
    """Random access, a run of consecutive steps from anywhere, and a fresh stream per step: the same bits."""
    stream = RandomStream([1, 2], "noise", dtype=dtype)
    for step in [*steps, *range(start, start + 20), *reversed(steps), *range(start, start + 20, 2)]:
        fresh = RandomStream([1, 2], "noise", dtype=dtype)
        assert torch.equal(draw(stream, kind, step, shape), draw(fresh, kind, step, shape))


@pytest.mark.parametrize("kind", KINDS)
def test_block_length_changes_nothing(kind, monkeypatch) -> None:
    shape, steps = (33,), range(150)
    long = RandomStream([4, 5], "noise")
    expected = [draw(long, kind, step, shape) for step in steps]
    monkeypatch.setattr(streams, "_BLOCK_STEPS", 5)
    short = RandomStream([4, 5], "noise")
    assert all(torch.equal(draw(short, kind, step, shape), x) for step, x in zip(steps, expected, strict=True))


def test_consecutive_steps_are_computed_together(monkeypatch) -> None:
    """Two hundred steps, or every second of them, take a few computations; distant steps one each."""
    computed = []
    compute = RandomStream._compute
    monkeypatch.setattr(RandomStream, "_compute", lambda *args: computed.append(1) or compute(*args))
    for steps, at_most in ((range(200), 10), (range(1000, 1200, 2), 10), (range(10_000, 0, -1000), 10)):
        computed.clear()
        stream = RandomStream([1, 2], "noise")
        for step in steps:
            stream.normal(step, (256,))
            stream.integers(step, 100, (64,))
        assert len(computed) <= 2 * at_most


def test_callers_may_change_their_numbers() -> None:
    stream = RandomStream([1], "noise")
    for step in (0, 1, 2, 1, 2):
        before = stream.normal(step, (4,)).clone()
        stream.normal(step, (4,)).zero_()
        assert torch.equal(stream.normal(step, (4,)), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_shape_begins_with_the_smaller(kind, dtype) -> None:
    """No number depends on what is beside it: every vector length gives the same bits, one by one."""
    stream = RandomStream([1, 2], "noise", dtype=dtype)
    longest = draw(stream, kind, 9, (67,))
    for n in range(67):
        assert torch.equal(draw(stream, kind, 9, (n,)), longest[:, :n])
    assert torch.equal(draw(stream, kind, 9, (5, 4)), longest[:, :20].reshape(2, 5, 4))


def test_memory_is_bounded() -> None:
    """Many shapes, among them the largest that is still kept and one that is not."""
    stream = RandomStream(range(4), "noise", dtype=torch.float64)
    for step in range(4):
        for n in (1, 256, 2000, 16_000, 20_000):
            stream.normal(step, (n,))
            stream.integers(step, 10, (n,))
    for n in range(8000, 8020):
        stream.normal(0, (n,))
    held = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for _, block in stream._blocks.values()
        for x in block
    }
    assert 0 < sum(held.values()) <= 4 * 2**20


# --- what it does depend on ---


def largest_correlation(rows: list[Tensor]) -> float:
    """The largest correlation, in absolute value, between two different rows."""
    return float((torch.corrcoef(torch.stack(rows).double()) - torch.eye(len(rows))).abs().max())


def neighbouring_streams() -> list[Tensor]:
    """Uniforms and words whose addresses differ in one part only: seed, purpose, step, kind or position."""
    n = 20_000
    seeds = RandomStream([0, 1, 2, 2**31, 2**32, 2**63], "noise")
    rows = [*seeds.uniform(0, (n,)), *seeds.uniform(1, (n,)), *seeds.uniform(2**32, (n,))]
    rows += [RandomStream([0], purpose).uniform(0, (n,))[0] for purpose in ("batch", "noise2", "Noise")]
    rows += [seeds._words(kind, 0, 1, n // 4)[0, 0] for kind in (streams._NORMAL, streams._INTEGERS)]
    rows += [seeds.uniform(0, (n + 1,))[0, 1:], seeds.uniform(0, (n + 4,))[0, 4:]]
    return rows


def test_streams_are_uncorrelated() -> None:
    """300 pairs of 20 000 numbers: 5.5 standard errors, exceeded by chance once in 10^5 such tests."""
    assert largest_correlation(neighbouring_streams()) < 5.5 / 20_000**0.5


@pytest.mark.parametrize("ignored", ["purpose", "half the seed", "kind"])
def test_a_stream_that_ignores_part_of_its_address_is_caught(monkeypatch, ignored) -> None:
    if ignored == "purpose":
        monkeypatch.setattr(streams, "_purpose_hash", lambda purpose: 1)
    elif ignored == "half the seed":
        monkeypatch.setattr(streams, "_checked_seed", lambda seed: seed % 2**32)
    else:
        words = RandomStream._words
        monkeypatch.setattr(RandomStream, "_words", lambda self, kind, *rest: words(self, 0, *rest))
    assert largest_correlation(neighbouring_streams()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_distributions(dtype) -> None:
    """Kolmogorov-Smirnov and chi-square at 100 000 numbers, and moments within five standard errors."""
    n = 100_000
    stream = RandomStream([11], "noise", dtype=dtype)
    uniform, normal = stream.uniform(5, (n,))[0].numpy(), stream.normal(5, (n,))[0].numpy()
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert uniform.min() >= 0
    assert uniform.max() < 1
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(normal.astype(np.float64) ** power) - mean) < 5 * (variance / n) ** 0.5
    # The two of a Box-Muller pair share a radius and an angle.
    assert abs(np.corrcoef(normal[::2], normal[1::2])[0, 1]) < 5 / (n / 2) ** 0.5
    assert abs(np.corrcoef(normal[::2] ** 2, normal[1::2] ** 2)[0, 1]) < 5 / (n / 2) ** 0.5
    # Control: the test would notice a scale that is three per cent off.
    assert stats.kstest(1.03 * normal, "norm").pvalue < 1e-3
    for high in (1, 2, 7, 1000):
        integers = stream.integers(5, high, (n,))[0].numpy()
        counts = np.bincount(integers, minlength=high)
        assert len(counts) == high
        assert high == 1 or stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("words", "high", "expected"),
    [
        ((0, 0), 10, 0),
        ((2**32 - 1, 2**32 - 1), 10, 9),
        ((2**32 - 1, 2**32 - 1), 2**31, 2**31 - 1),
        ((2**31, 0), 3, 1),
        # 3 * (2^64 / 3) is just below 2^64, one more word unit is above it: the lower word decides.
        ((0x55555555, 0x55555555), 3, 0),
        ((0x55555555, 0x55555556), 3, 1),
    ],
)
def test_integers_are_the_top_of_a_96_bit_product(words, high, expected) -> None:
    assert expected == (words[0] << 32 | words[1]) * high >> 64
    assert streams._numbers(torch.tensor(words), streams._INTEGERS, high, torch.float32).tolist() == [expected]


@pytest.mark.parametrize(("dtype", "n_bits"), [(torch.float32, 32), (torch.float64, 53)])
def test_normal_at_the_extreme_words(dtype, n_bits) -> None:
    """The smallest word gives the largest radius, sqrt(2 n ln 2); the largest gives zero, not infinity."""
    words_each = -(-n_bits // 32)
    zero, largest = [0] * words_each, [2**32 - 1] * words_each
    x = streams._numbers(torch.tensor(zero + zero), streams._NORMAL, 0, dtype)
    assert x.tolist() == pytest.approx([(2 * n_bits * np.log(2)) ** 0.5, 0])
    x = streams._numbers(torch.tensor(largest + largest), streams._NORMAL, 0, dtype)
    assert x.tolist() == pytest.approx([0, 0], abs=1e-7)
    x = streams._numbers(torch.tensor(largest), streams._UNIFORM, 0, dtype)
    assert 1 - 2**-23 < x.item() < 1


# --- generators for what is drawn once ---


def test_torch_generator() -> None:
    def numbers(seed: int, purpose: str) -> list[float]:
        return torch.rand(3, generator=torch_generator(seed, purpose)).tolist()

    assert numbers(3, "init") == numbers(3, "init")
    different = [numbers(3, "init"), numbers(4, "init"), numbers(3 + 2**32, "init"), numbers(3, "init2")]
    assert all(a != b for a, b in itertools.combinations(different, 2))
    digest = hashlib.sha256(bytes([3, 0, 0, 0, 0, 0, 0, 0]) + b"init").digest()
    assert torch_generator(3, "init").initial_seed() == int.from_bytes(digest[:8], "little")


# --- bad input ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomStream([], "noise"), r"seeds is empty"),
        (
            lambda: RandomStream([-1], "noise"),
            r"seed is -1; it must be an integer in \[0, 18446744073709551615\]",
        ),
        (lambda: RandomStream([2**64], "noise"), r"seed is 18446744073709551616"),
        (lambda: RandomStream([1.0], "noise"), r"seed is 1\.0; it must be an integer"),
        (lambda: RandomStream([True], "noise"), r"seed is True"),
        (lambda: RandomStream([1], ""), r"purpose is ''; pass a text"),
        (lambda: RandomStream([1], 3), r"purpose is 3; pass a text"),
        (lambda: RandomStream([1], "noise", dtype=torch.float16), r"dtype is torch.float16"),
        (lambda: RandomStream([1], "noise").uniform(-1, (2,)), r"step is -1"),
        (lambda: RandomStream([1], "noise").uniform(2**40, (2,)), r"step is 1099511627776"),
        (lambda: RandomStream([1], "noise").normal(0.5, (2,)), r"step is 0\.5; it must be an integer"),
        (lambda: RandomStream([1], "noise").normal(0, (2, -1)), r"a length in shape is -1"),
        (
            lambda: RandomStream([1], "noise").integers(0, 0, (2,)),
            r"high is 0; it must be an integer in \[1, 2147483648\]",
        ),
        (lambda: RandomStream([1], "noise").integers(0, 2**31 + 1, (2,)), r"high is 2147483649"),
        (lambda: RandomStream([1], "noise").integers(0, 2.5, (2,)), r"high is 2\.5; it must be an integer"),
        (lambda: torch_generator(-5, "init"), r"seed is -5"),
        (lambda: torch_generator(5, ""), r"purpose is ''"),
    ],
)
def test_bad_input_gets_one_sentence(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_numpy_integers_are_welcome() -> None:
    stream = RandomStream(np.arange(2), "noise")
    assert stream.seeds == (0, 1)
    assert torch.equal(stream.integers(np.int64(3), np.int32(9), (4,)), stream.integers(3, 9, (4,)))
    assert torch.equal(stream.uniform(2**40 - 1, (2,)), stream.uniform(2**40 - 1, (2,)))


# --- Triton ---

MODULE = "corollary.kernels._philox_triton"


@pytest.fixture
def fresh_triton_module(monkeypatch):
    """The kernel's module is imported anew on first use, as the environment decides then how it runs."""
    pytest.importorskip("triton")
    saved = sys.modules.pop(MODULE, None)
    yield monkeypatch
    sys.modules.pop(MODULE, None)
    if saved is not None:
        sys.modules[MODULE] = saved


@pytest.mark.parametrize("first_step", [0, 1, 2**32 - 2, 2**40 - 3])
@pytest.mark.parametrize(("n_steps", "n_blocks"), [(1, 1), (3, 5), (3, 100), (2, 0)])
def test_interpreted_words_equal_the_reference(fresh_triton_module, first_step, n_steps, n_blocks) -> None:
    fresh_triton_module.setenv("TRITON_INTERPRET", "1")
    kernel = importlib.import_module(MODULE)
    keys = RandomStream([0, 7, 2**64 - 1], "noise")._keys
    address = (keys, first_step, n_steps, n_blocks, 0xFFFF0200, 0xFEDCBA98)
    words = kernel.stream_words(*address)
    assert torch.equal(words, streams._stream_words(*address))
    assert words.shape == (n_steps, 3, 4 * n_blocks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_numbers_equal_cpu_numbers(fresh_triton_module, dtype) -> None:
    fresh_triton_module.delenv("TRITON_INTERPRET", raising=False)
    cpu, gpu = (RandomStream([0, 7, 2**64 - 1], "noise", device, dtype) for device in ("cpu", "cuda"))
    for step in (*range(20), 2**32 - 1, 2**32):
        for kind in ("uniform", "integers"):
            assert torch.equal(draw(gpu, kind, step, (50, 3)).cpu(), draw(cpu, kind, step, (50, 3)))
        torch.testing.assert_close(gpu.normal(step, (50, 3)).cpu(), cpu.normal(step, (50, 3)))
