"""The replay ring: order and wrap-around by hand, a list as second implementation, uniformity, exact state."""

from collections import deque

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corollary.core.errors import CheckpointError
from corollary.core.replay import Replay
from corollary.kernels.streams import RandomStream

CPU = torch.device("cpu")


def ring(capacity: int, seeds: tuple[int, ...] = (0, 1), dtype: torch.dtype = torch.float32) -> Replay:
    return Replay(seeds, capacity, observation_dim=2, action_dim=1, device=CPU, dtype=dtype)


def add(replay: Replay, numbers: list[list[int]], valid: list[list[bool]] | None = None) -> None:
    """Append one row per number x, per seed: s = (x, 10x), a = -x, r = 100x, s' = (x + 1, 10x + 1), d = x odd."""
    x = torch.tensor(numbers, dtype=torch.float32)
    obs = torch.stack([x, 10 * x], -1)
    mask = None if valid is None else torch.tensor(valid)
    replay.add(obs, -x.unsqueeze(-1), 100 * x, obs + 1, x % 2 == 1, mask)


def held(replay: Replay, seed: int = 0) -> list[int]:
    """The numbers in a seed's ring, by place."""
    size = int(replay.sizes[seed])
    index = torch.arange(size).expand(len(replay.sizes), -1)
    return replay.gather(index).obs[seed, :, 0].int().tolist()


def test_a_row_comes_back_field_by_field() -> None:
    replay = ring(8)
    add(replay, [[3, 4], [5, 6]])
    batch = replay.gather(torch.tensor([[1, 0], [0, 0]]))
    assert batch.obs.tolist() == [[[4, 40], [3, 30]], [[5, 50], [5, 50]]]
    assert batch.action.tolist() == [[[-4], [-3]], [[-5], [-5]]]
    assert batch.reward.tolist() == [[400, 300], [500, 500]]
    assert batch.next_obs.tolist() == [[[5, 41], [4, 31]], [[6, 51], [6, 51]]]
    assert batch.terminated.tolist() == [[0, 1], [1, 1]]
    assert batch.next_action_valid.tolist() == [[0, 0], [0, 0]]
    assert batch.index.tolist() == [[1, 0], [0, 0]]


def test_the_oldest_rows_make_room() -> None:
    replay = ring(4)
    add(replay, [[0, 1, 2], [10, 11, 12]])
    assert (held(replay), held(replay, 1)) == ([0, 1, 2], [10, 11, 12])
    add(replay, [[3, 4, 5], [13, 14, 15]])  # 3 fills the last place; 4 and 5 replace 0 and 1
    assert (held(replay), held(replay, 1)) == ([4, 5, 2, 3], [14, 15, 12, 13])


def test_of_more_rows_than_fit_the_last_stay() -> None:
    replay = ring(4)
    add(replay, [list(range(11)), list(range(11))])  # row x lies at place x mod 4
    assert held(replay) == [8, 9, 10, 7]


def test_what_is_no_transition_is_left_out() -> None:
    replay = ring(4)
    add(replay, [[0, 1, 2], [0, 1, 2]], [[True, False, True], [False, True, False]])
    add(replay, [[3, 4, 5], [3, 4, 5]], [[True, True, True], [False, False, True]])
    assert (held(replay), held(replay, 1)) == ([5, 2, 3, 4], [1, 5])
    assert replay.sizes.tolist() == [4, 2]


@given(
    st.integers(1, 7), st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=9), max_size=6)
)
def test_agreement_with_a_queue(capacity, masks) -> None:
    replay, queues, number = ring(capacity), [deque(maxlen=capacity) for _ in range(2)], 0
    for mask in masks:
        numbers = list(range(number, number + len(mask)))
        number += len(mask)
        add(replay, [numbers, numbers], [[bool(row[seed]) for row in mask] for seed in range(2)])
        for seed, queue in enumerate(queues):
            queue.extend(x for x, row in zip(numbers, mask, strict=True) if row[seed])
    for seed, queue in enumerate(queues):
        assert sorted(held(replay, seed)) == sorted(queue)


# ---------------------------------------------------------------------------------------------------------- sampling


def counts(replay: Replay, n_batches: int, batch_size: int) -> Tensor:
    """How often each place of each seed's ring was drawn, ``[S, capacity]``."""
    drawn = torch.cat([replay.sample(step, batch_size).index for step in range(n_batches)], 1)
    return torch.stack([row.bincount(minlength=replay.capacity) for row in drawn])


def test_sampling_is_uniform_over_what_is_held() -> None:
    def exceeds(observed: Tensor) -> bool:
        """Pearson's test at one in a thousand."""
        return scipy.stats.chisquare(observed.numpy()).pvalue < 0.001

    replay = ring(20)
    add(replay, [list(range(30)), list(range(30))], [[True] * 30, [True] * 13 + [False] * 17])
    drawn = counts(replay, 200, 200)
    assert drawn[1, 13:].sum() == 0  # nothing from the part that is not filled
    assert not exceeds(drawn[0])
    assert not exceeds(drawn[1, :13])
    folded = drawn[0, :13].clone()  # the control: a place among 20, modulo the 13 that are held
    folded[:7] += drawn[0, 13:]
    assert exceeds(folded)


def test_no_draw_lies_behind_the_last_row(monkeypatch) -> None:
    """The largest uniform number below 1 times any size rounds to less than the size."""
    largest = torch.tensor(1 - 2.0**-53, dtype=torch.float64)
    powers = 2 ** torch.arange(31)
    sizes = torch.cat([torch.arange(1, 5000), powers, powers + 1, powers + 3])
    assert torch.equal((sizes * largest).long(), sizes - 1)
    assert torch.equal((sizes * largest.float()).long()[:5], sizes[:5])  # the control: rounded to float32 it is 1
    assert ring(5)._stream.uniform(0, (3,)).dtype == torch.float64
    monkeypatch.setattr(RandomStream, "uniform", lambda self, step, shape: largest.expand(1, *shape))
    for size in (1, 5, 50, 4999):
        replay = ring(size, (0,))
        add(replay, [list(range(size))])
        assert replay.sample(0, 2).index.tolist() == [[size - 1] * 2]


def test_a_batch_is_a_function_of_seed_step_and_content() -> None:
    together, alone = ring(50, (3, 7)), ring(50, (7,))
    rows = list(range(40))
    add(together, [rows, rows])
    add(alone, [rows])
    first = together.sample(5, 16)
    together.sample(6, 16)
    assert torch.equal(together.sample(5, 16).index, first.index)  # whatever was drawn in between
    assert torch.equal(alone.sample(5, 16).index[0], first.index[1])
    assert not torch.equal(first.index[0], first.index[1])
    assert not torch.equal(together.sample(6, 16).index, first.index)


# ------------------------------------------------------------------------------------------------------- exact state


def test_a_restored_ring_goes_on_in_its_middle() -> None:
    whole, resumed = ring(8), ring(8)
    add(whole, [list(range(11)), list(range(11))], [[True] * 11, [True] * 5 + [False] * 6])  # one wrapped, one not
    resumed.load_state({name: tensor.clone() for name, tensor in whole.state().items()})
    for replay in (whole, resumed):
        add(replay, [[20, 21, 22], [20, 21, 22]])
    assert (held(whole), held(whole, 1)) == (held(resumed), held(resumed, 1))
    *fields, weight = zip(whole.sample(3, 32), resumed.sample(3, 32), strict=True)
    assert all(torch.equal(a, b) for a, b in fields)
    assert weight == (None, None)


def test_only_what_is_filled_is_saved() -> None:
    replay = ring(1000)
    assert replay.state()["rows"].shape == (2, 0, 7)
    add(replay, [[0, 1, 2], [0, 1, 2]], [[True] * 3, [True, False, False]])
    assert replay.state()["rows"].shape == (2, 3, 7)
    assert replay.state()["rows"][1, 1:].abs().sum() == 0  # no leftovers of memory: equal states are equal files


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "is missing"),
        ({"rows": torch.zeros(2, 9, 7), "added": torch.zeros(2)}, r"has rows \[2, 9, 7\]"),
        ({"rows": torch.zeros(2, 3, 6), "added": torch.zeros(2)}, r"has rows \[2, 3, 6\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state, said) -> None:
    with pytest.raises(CheckpointError, match=said):
        ring(8).load_state(state)
