"""Reward and state transforms against hand numbers and, for CORL's segmentation, a literal loop."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corollary.core import transforms
from corollary.core.dataset import Dataset, Episode
from corollary.core.errors import ConfigError, DataError
from corollary.core.transforms import (
    REWARD_TRANSFORMS,
    RewardTransform,
    StateTransform,
    reward_transform,
    state_transform,
)


def episodes(*rewards: list[float], terminated: bool = True) -> Dataset:
    return Dataset.from_episodes(
        Episode(np.zeros((len(r) + 1, 1)), np.zeros((len(r), 1)), r, terminated, not terminated) for r in rewards
    )


SPARSE = episodes([0, 0, 1], [0, 0])


@pytest.mark.parametrize(
    ("name", "of_0", "of_1"),
    [
        ("none", 0.0, 1.0),
        ("zero", 0.0, 0.0),
        ("antmaze_minus1", -1.0, 0.0),
        ("antmaze_odice", -3.0, 0.0),
        ("antmaze_cql", -2.0, 2.0),
        ("antmaze_cql_corl", -5.0, 5.0),
        ("antmaze_x100", 0.0, 100.0),
        ("antmaze_prdc", -1.0, 9999.0),
    ],
)
def test_fixed_transforms(name: str, of_0: float, of_1: float) -> None:
    transform = reward_transform(name, SPARSE)
    assert transform.name == name
    assert transform(torch.tensor([0.0, 1.0])).tolist() == [of_0, of_1]
    assert transform(np.array([0.0, 1.0])).tolist() == [of_0, of_1]


def test_return_range_by_hand() -> None:
    dataset = episodes([1, 1, 1], [4, 7], [-5])  # returns 3, 11, -5: range 16
    assert reward_transform("return_range", dataset) == RewardTransform("return_range", 1000 / 16, 0.0)


def test_corl_mixes_episodes_that_never_terminate() -> None:
    """Three cut episodes of 1000 rows, rewards 1, 2 and 3 per row: returns 1000, 2000, 3000.

    Without the timeout rows 999 rows are left of each. CORL's first episode takes one row of the second (return
    999 + 2), its second 998 rows of the second and two of the third (1996 + 6); the rest is not an episode.
    """
    dataset = episodes([1.0] * 1000, [2.0] * 1000, [3.0] * 1000, terminated=False)
    assert reward_transform("return_range_corl", dataset).scale == pytest.approx(1000 / (2002 - 1001))
    assert reward_transform("return_range", dataset).scale == pytest.approx(1000 / (3000 - 1000))


def literal_corl_range(rewards: list[float], terminals: list[bool], limit: int) -> float | None:
    returns, ep_return, ep_length = [], 0.0, 0
    for reward, terminal in zip(rewards, terminals, strict=True):
        ep_return += reward
        ep_length += 1
        if terminal or ep_length == limit:
            returns.append(ep_return)
            ep_return, ep_length = 0.0, 0
    return max(returns) - min(returns) if returns else None


@given(
    st.lists(st.tuples(st.lists(st.integers(-4, 4), min_size=1, max_size=7), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 6),
)
def test_corl_segmentation_against_a_literal_loop(recorded: list[tuple[list[int], bool]], limit: int) -> None:
    dataset = Dataset.from_episodes(
        Episode(np.zeros((len(r) + 1, 1)), np.zeros((len(r), 1)), r, end, not end) for r, end in recorded
    )
    rows = dataset.view_rows("d4rl_qlearning")
    expected = literal_corl_range(dataset.rewards[rows].tolist(), dataset.terminated[rows].tolist(), limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "CORL_EPISODE_ROWS", limit)
        if not expected:
            with pytest.raises(DataError, match=r"return_range_corl: .* (no complete episode|same return)"):
                reward_transform("return_range_corl", dataset)
        else:
            assert reward_transform("return_range_corl", dataset).scale == pytest.approx(1000 / expected)


def test_composition_applies_the_first_name_first() -> None:
    dataset = episodes([0, 0, 1], [0, 0])
    composed = reward_transform(["antmaze_minus1", "antmaze_x100"], dataset)
    assert (composed.name, composed.scale, composed.shift) == ("antmaze_minus1+antmaze_x100", 100.0, -100.0)
    assert reward_transform([], dataset) == reward_transform("none", dataset)
    # r - 1 gives returns -2 and -2 (three rows with one success, two without): no range is left.
    with pytest.raises(
        DataError, match=r"return_range: all episodes of episodes have the same return.*for instance 'none'"
    ):
        reward_transform(["antmaze_minus1", "return_range"], dataset)
    # Order matters: 100 r gives returns 100 and 0.
    assert reward_transform(["antmaze_x100", "return_range"], dataset).scale == pytest.approx(1000.0)


def test_reward_errors() -> None:
    with pytest.raises(ConfigError, match=r"no reward transform 'return_rang'.*Did you mean 'return_range'\?"):
        reward_transform("return_rang", SPARSE)
    with pytest.raises(DataError, match="antmaze_odice is defined for rewards 0 and 1"):
        reward_transform("antmaze_odice", episodes([0, 2]))
    with pytest.raises(DataError, match=r"return_range_corl: .* no complete episode"):
        reward_transform("return_range_corl", episodes([1.0, 2.0], terminated=False))


def test_every_name_makes_a_json_record() -> None:
    dataset = episodes([0, 1, 1], [0, 0], [1])
    for name in REWARD_TRANSFORMS:
        transform = reward_transform(name, dataset)
        assert RewardTransform(**json.loads(json.dumps(dataclasses.asdict(transform)))) == transform


def observed(values: np.ndarray) -> Dataset:
    n = len(values) - 1
    return Dataset.from_episodes([Episode(values, np.zeros((n, 1)), np.zeros(n), True, False)])


def test_standardize_by_hand() -> None:
    # Rows 1 and 5 (mean 3, population std 2); the final observation 1000 is no row. The second entry is constant.
    t = observed(np.array([[1.0, 7.0], [5.0, 7.0], [1000.0, 7.0]])).transitions()
    transform = state_transform("standardize", t)
    assert transform == StateTransform("standardize", (3.0, 7.0), (2.001, 0.001))
    torch.testing.assert_close(transform(torch.tensor([[5.0, 7.0]])), torch.tensor([[2 / 2.001, 0.0]]))
    torch.testing.assert_close(transform.inverse(torch.tensor([[2.0, -1.0]])), torch.tensor([[7.002, 6.999]]))
    torch.testing.assert_close(transform.inverse(transform(t.obs)), t.obs)


def test_standardize_accumulates_in_float64() -> None:
    rng = np.random.default_rng(0)
    values = (1e4 + rng.standard_normal((50_001, 2))).astype(np.float32)
    exact = values[:-1].astype(np.float64)
    transform = state_transform("standardize", observed(values).transitions())
    np.testing.assert_allclose(transform.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(transform.scale, exact.std(axis=0) + 1e-3, rtol=1e-9)
    # The control: float32 accumulation is visibly off.
    off = np.add.accumulate(values[:-1, 0])[-1] / 50_000
    assert abs(off - exact[:, 0].mean()) > 1e-3


def test_none_is_the_identity_and_states_survive_json() -> None:
    t = observed(np.array([[0.1, 1e-20], [3.7, 2.0]])).transitions()
    identity = state_transform("none", t)
    assert torch.equal(identity(t.obs), t.obs)
    for name in transforms.STATE_TRANSFORMS:
        transform = state_transform(name, t)
        assert StateTransform(**json.loads(json.dumps(dataclasses.asdict(transform)))) == transform
    with pytest.raises(ConfigError, match=r"no state transform 'standardise'.*Did you mean 'standardize'\?"):
        state_transform("standardise", t)
