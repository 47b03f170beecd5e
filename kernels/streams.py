r"""Random streams that belong to a seed: each number is a pure function of (seed, purpose, step, position).

A sequential generator gives seed 7 other numbers when it runs beside nine other seeds, when something else
draws first, or after a restart. Here a number is computed from its address by the counter-based generator
Philox4x32-10 (Salmon, Moraes, Dror and Shaw, *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011), so none
of these matters and there is nothing to save but the step counter.

The address of a number's 32-bit words::

    key      (seed bits 0-31, seed bits 32-63)
    counter  word 0: index of the block of four words that one evaluation of Philox yields
             word 1: step bits 0-31
             word 2: step bits 32-39 | kind of number << 8 | purpose hash bits 32-47 << 16
             word 3: purpose hash bits 0-31

The purpose hash is the first six bytes, little-endian, of the SHA-256 of the purpose's UTF-8 text. Different
seeds, steps, kinds (uniform, normal, integers) and positions never share an address; two different purposes
do with probability :math:`2^{-48}`. Within a step the numbers lie one after another in the flat order of
their shape, so the same step in a larger shape begins with the numbers of a smaller one.

Words, uniforms and integers are the same bits on every device; normals pass through the device's logarithm,
sine and cosine, whose last bits may differ from device to device.
"""

import hashlib
import math
import operator
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox4x32's constants in Salmon et al.'s Random123
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

_UNIFORM, _NORMAL, _INTEGERS = range(3)
_N_STEPS = 2**40
_MAX_HIGH = 2**31  # the product with a 32-bit word, plus a carry, still fits into int64

# Philox costs about a hundred small tensor operations whatever the size, so consecutive steps are computed in
# one go and kept. A block holds at most this many steps and words, which bounds the memory to 4 MiB per
# stream.
_BLOCK_STEPS = 64
_BLOCK_WORDS = 2**16
_BLOCKS_HELD = 8
# A request this close behind a block continues it (an actor that is updated every second step skips some),
# and the next block is twice as long; any other request computes its own step alone.
_NEAR = 16


class RandomStream:
    """Random numbers of one purpose for several seeds at once, each seed with a stream of its own.

    ``seeds`` become the leading axis ``S`` of every result, in the order given.

    Args:
        seeds: integers in [0, 2^64).
        purpose: what the numbers are for, such as ``"batch"``; streams of different purposes are independent.
        device: where the numbers are made and returned.
        dtype: float32 or float64, of :meth:`uniform` and :meth:`normal`.

    Raises:
        ValueError: a seed is no integer or out of range, there is none, the purpose is no text or empty, or
            the dtype is another one.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        purpose: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.seeds = tuple(_checked_seed(seed) for seed in seeds)
        if not self.seeds:
            raise ValueError("seeds is empty; a random stream needs at least one seed.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; a random stream has float32 or float64.")
        self.purpose = purpose
        self.device = torch.device(device)
        self.dtype = dtype
        self._purpose_hash = _purpose_hash(purpose)
        keys = [[seed & _WORD, seed >> 32] for seed in self.seeds]
        self._keys = torch.tensor(keys, dtype=torch.int64, device=self.device)
        # (kind, high, shape) -> the first step of a block, and its numbers step by step.
        self._blocks: dict[tuple[int, int, tuple[int, ...]], tuple[int, tuple[Tensor, ...]]] = {}

    def uniform(self, step: int, shape: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1): multiples of 2^-24 (float32) or 2^-53 (float64).

        Args:
            step: in [0, 2^40), usually the count of gradient or environment steps.
            shape: of one seed's numbers.

        Returns:
            ``[S, *shape]``, the caller's own to change.

        Raises:
            ValueError: the step or a length in the shape is no integer or out of range.
        """
        return self._draw(_UNIFORM, 0, step, shape)

    def normal(self, step: int, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers by the Box-Muller transform, at most 6.7 (float32) or 8.6 (float64).

        Args:
            step: in [0, 2^40), usually the count of gradient or environment steps.
            shape: of one seed's numbers.

        Returns:
            ``[S, *shape]``, the caller's own to change.

        Raises:
            ValueError: the step or a length in the shape is no integer or out of range.
        """
        return self._draw(_NORMAL, 0, step, shape)

    def integers(self, step: int, high: int, shape: Sequence[int]) -> Tensor:
        """Integers in [0, `high`): the top of the product of `high` and a 64-bit number.

        Every value has a probability within 2^-64 of ``1 / high``: a relative bias of at most 2^-33.

        Args:
            step: in [0, 2^40), usually the count of gradient or environment steps.
            high: in [1, 2^31].
            shape: of one seed's numbers.

        Returns:
            ``[S, *shape]`` int64, the caller's own to change.

        Raises:
            ValueError: the step, `high` or a length in the shape is no integer or out of range.
        """
        return self._draw(_INTEGERS, _checked("high", high, 1, _MAX_HIGH), step, shape)

    def _draw(self, kind: int, high: int, step: int, shape: Sequence[int]) -> Tensor:
        """One step's numbers, out of a block of consecutive steps."""
        step = _checked("step", step, 0, _N_STEPS - 1)
        wanted = (kind, high, tuple(shape))
        first, block = self._blocks.get(wanted, (0, ()))
        if not first <= step < first + len(block):
            steps_past = step - (first + len(block))
            n_steps = 2 * len(block) if block and 0 <= steps_past <= _NEAR else 1
            first, block = step, self._compute(kind, high, step, n_steps, wanted[2])
            self._blocks.pop(wanted, None)  # so that it is put last again: the first one is dropped
            if len(self._blocks) == _BLOCKS_HELD:
                del self._blocks[next(iter(self._blocks))]
            if len(block) * block[0].numel() <= _BLOCK_WORDS:
                self._blocks[wanted] = (first, block)
        # A copy: what the caller does to its numbers must not come back with another request for them.
        return block[step - first].clone()

    def _compute(
        self, kind: int, high: int, first_step: int, n_steps: int, shape: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """The numbers of up to `n_steps` steps, each ``[S, *shape]``."""
        size = math.prod(_checked("a length in shape", length, 0, _WORD) for length in shape)
        words_per_number = 2 if kind == _INTEGERS or self.dtype == torch.float64 else 1
        n_blocks = -(-size * words_per_number // 4)
        words_per_step = max(1, len(self.seeds) * 4 * n_blocks)
        n_steps = max(1, min(n_steps, _BLOCK_STEPS, _BLOCK_WORDS // words_per_step, _N_STEPS - first_step))
        words = self._words(kind, first_step, n_steps, n_blocks)
        numbers = _numbers(words, kind, high, self.dtype)[..., :size]
        return numbers.reshape(n_steps, len(self.seeds), *shape).unbind()

    def _words(self, kind: int, first_step: int, n_steps: int, n_blocks: int) -> Tensor:
        """``[n_steps, S, 4 * n_blocks]`` int64 words in [0, 2^32)."""
        word_2 = kind << 8 | self._purpose_hash >> 32 << 16
        word_3 = self._purpose_hash & _WORD
        if self.device.type == "cuda" and find_spec("triton") is not None:
            from corollary.kernels._philox_triton import stream_words
        else:
            stream_words = _stream_words
        return stream_words(self._keys, first_step, n_steps, n_blocks, word_2, word_3)


def torch_generator(seed: int, purpose: str) -> torch.Generator:
    """Make a sequential CPU generator for what is drawn once, such as initial weights.

    It is seeded with the first eight bytes, little-endian, of the SHA-256 of the seed (eight bytes,
    little-endian) followed by the purpose's UTF-8 text. PyTorch's CPU generator uses 32 of these bits, so two
    different (seed, purpose) pairs agree with probability 2^-32.

    Args:
        seed: in [0, 2^64).
        purpose: what the numbers are for.

    Raises:
        ValueError: the seed is no integer or out of range, or the purpose is no text or empty.
    """
    _purpose_hash(purpose)
    digest = hashlib.sha256(_checked_seed(seed).to_bytes(8, "little") + purpose.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words from four counter words and two key words.

    Args:
        counter: int64 tensors with values in [0, 2^32), of shapes that broadcast.
        key: likewise.

    Returns:
        Four int64 tensors with values in [0, 2^32), in the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64 bits of each product are right although int64 wraps around. Its lower half needs no mask yet:
        # the upper half is cut off when it has been mixed into c0 and c2, the only words that are multiplied.
        product_0, product_2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product_2 >> 32) ^ c1 ^ k0) & _WORD
        c2 = ((product_0 >> 32) ^ c3 ^ k1) & _WORD
        c1, c3 = product_2, product_0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def _stream_words(keys: Tensor, first_step: int, n_steps: int, n_blocks: int, word_2: int, word_3: int) -> Tensor:
    """Reference of the words of a stream: ``[n_steps, S, 4 * n_blocks]`` for keys ``[S, 2]``."""

    def constant(word: int) -> Tensor:
        return torch.full((1, 1, 1), word, dtype=torch.int64, device=keys.device)

    steps = torch.arange(first_step, first_step + n_steps, device=keys.device)[:, None, None]
    blocks = torch.arange(n_blocks, device=keys.device)
    counter = (blocks, steps & _WORD, constant(word_2) | steps >> 32, constant(word_3))
    words = philox4x32(counter, (keys[:, :1], keys[:, 1:]))
    return torch.stack(words, dim=-1).flatten(-2)


def _numbers(words: Tensor, kind: int, high: int, dtype: torch.dtype) -> Tensor:
    """Turn words along the last axis into numbers; elementwise, so no number depends on what is beside it."""
    if kind == _INTEGERS:
        top, bottom = words[..., ::2], words[..., 1::2]
        return (top * high + (bottom * high >> 32)) >> 32
    if dtype == torch.float64:
        top, bottom = words[..., ::2], words[..., 1::2]
        fractions, n_bits, n_exact = top >> 5 << 26 | bottom >> 6, 53, 53
    else:
        fractions, n_bits, n_exact = words, 32, 24
    if kind == _UNIFORM:
        return (fractions >> n_bits - n_exact).to(dtype).mul_(2.0**-n_exact)
    u, v = fractions[..., ::2], fractions[..., 1::2]
    # The radius comes from a number in (0, 1], whose logarithm is finite.
    radius = (u + 1).to(dtype).mul_(2.0**-n_bits).log_().mul_(-2.0).sqrt_()
    angle = v.to(dtype).mul_(2.0 * math.pi * 2.0**-n_bits)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)


def _purpose_hash(purpose: str) -> int:
    if not isinstance(purpose, str) or not purpose:
        raise ValueError(f"purpose is {purpose!r}; pass a text such as 'batch'.")
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:6], "little")


def _checked_seed(seed: int) -> int:
    return _checked("seed", seed, 0, 2**64 - 1)


def _checked(name: str, value: int, low: int, high: int) -> int:
    """`value` as a plain int between `low` and `high`."""
    try:
        integer = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be an integer.") from None
    if isinstance(value, bool) or not low <= integer <= high:
        raise ValueError(f"{name} is {value!r}; it must be an integer in [{low}, {high}].")
    return integer
