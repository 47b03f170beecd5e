"""Triton form of the words of :class:`corollary.kernels.streams.RandomStream`, used on CUDA devices.

Whether the kernel is compiled or interpreted is decided when this module is imported; see
:mod:`corollary.kernels._scans_triton`, also for why it keeps to Triton's primitives.
"""

# Triton ships no types, and its kernels take pointers that Python has no types for.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS_PER_PROGRAM = 256


@triton.jit
def _words_kernel(words, keys, first_step, n_blocks, n_seeds, n, word_2, word_3, SIZE: tl.constexpr):
    """The words of `n` Philox blocks: the flat index runs over steps, seeds and a step's blocks."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < n
    seed = i // n_blocks % n_seeds
    step = first_step + i // n_blocks // n_seeds
    c0 = (i % n_blocks).to(tl.uint32)
    c1 = step.to(tl.uint32)
    c2 = (step >> 32 | word_2).to(tl.uint32)
    c3 = tl.full([SIZE], word_3, tl.int64).to(tl.uint32)
    k0 = tl.load(keys + 2 * seed, mask=inside, other=0).to(tl.uint32)
    k1 = tl.load(keys + 2 * seed + 1, mask=inside, other=0).to(tl.uint32)
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product_2.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    tl.store(words + 4 * i, c0.to(tl.int64), mask=inside)
    tl.store(words + 4 * i + 1, c1.to(tl.int64), mask=inside)
    tl.store(words + 4 * i + 2, c2.to(tl.int64), mask=inside)
    tl.store(words + 4 * i + 3, c3.to(tl.int64), mask=inside)


def stream_words(keys: Tensor, first_step: int, n_steps: int, n_blocks: int, word_2: int, word_3: int) -> Tensor:
    """``[n_steps, S, 4 * n_blocks]`` int64 words in [0, 2^32) for keys ``[S, 2]``."""
    n_seeds = len(keys)
    n = n_steps * n_seeds * n_blocks
    words = torch.empty(n_steps, n_seeds, 4 * n_blocks, dtype=torch.int64, device=keys.device)
    if n > 0:
        grid = (triton.cdiv(n, _BLOCKS_PER_PROGRAM),)
        numbers = (first_step, n_blocks, n_seeds, n, word_2, word_3)
        _words_kernel[grid](words, keys, *numbers, SIZE=_BLOCKS_PER_PROGRAM)
    return words
