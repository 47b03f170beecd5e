"""Running moments and the two normalisers: hand numbers, the whole sample's moments, and gymnasium side by side."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from corollary.core.errors import CheckpointError, ConfigError
from corollary.core.normalisers import ObservationNormaliser, RewardNormaliser, RunningMoments


def draws(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(1.0, 3.0, shape)


def flags(*shape: int, share: float = 0.2, seed: int = 1) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random(shape) < share


# -- moments


def test_one_update_by_hand() -> None:
    """From n=1e-4, m=0, v=1, the rows 1 and 3: n_b=2, m_b=2, v_b=1.

    n' = 2.0001; m' = 2 * 2 / 2.0001 = 1.99990000499975...; v' = (1e-4 + 2 + 4 * 1e-4 * 2 / 2.0001) / 2.0001.
    """
    moments = RunningMoments(1, 1)
    moments.update(np.array([[[1.0], [3.0]]]))
    assert moments.count.item() == 2.0001
    assert moments.mean.item() == pytest.approx(4 / 2.0001, rel=1e-15)
    assert moments.var.item() == pytest.approx((1e-4 + 2 + 8e-4 / 2.0001) / 2.0001, rel=1e-15)


def with_initial_rows(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of rows joined by 1e-4 pseudo-rows of mean 0 and variance 1, from the definition."""
    n = 1e-4 + len(rows)
    mean = rows.sum(0) / n
    return mean, (1e-4 * (1 + mean**2) + ((rows - mean) ** 2).sum(0)) / n


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=20), seed=st.integers(0, 2**16))
def test_any_split_into_batches_gives_the_moments_of_all_rows(sizes: list[int], seed: int) -> None:
    moments, batches = RunningMoments(2, 3), [draws(2, n, 3, seed=seed + i) for i, n in enumerate(sizes)]
    for batch in batches:
        moments.update(batch)
    for s in range(2):
        mean, var = with_initial_rows(np.concatenate([batch[s] for batch in batches]))
        np.testing.assert_allclose(moments.mean[s], mean, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(moments.var[s], var, rtol=1e-10)
    assert moments.count == pytest.approx(1e-4 + sum(sizes))


@given(seed=st.integers(0, 2**16))
def test_invalid_rows_take_no_part(seed: int) -> None:
    moments, rows = RunningMoments(3, 2), [[], [], []]
    for t in range(8):
        batch, valid = draws(3, 4, 2, seed=seed + t), flags(3, 4, share=0.5, seed=seed + t)
        batch[~valid] = np.nan  # whatever stands there
        moments.update(batch, valid)
        for s in range(3):
            rows[s].extend(batch[s, valid[s]])
    for s in range(3):
        mean, var = with_initial_rows(np.array(rows[s]))
        np.testing.assert_allclose(moments.mean[s], mean, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(moments.var[s], var, rtol=1e-10)
        assert moments.count[s] == pytest.approx(1e-4 + len(rows[s]))


def test_a_seed_without_a_valid_row_keeps_its_moments_to_the_bit() -> None:
    """var * count / count gives var back, as var was itself divided by count; for other numbers it may not."""
    moments = RunningMoments(2, 200)
    for n in (1, 3, 7):
        moments.update(draws(2, n, 200, seed=n))
    before = moments.state()
    moments.update(draws(2, 1, 200, seed=5), np.array([[False], [True]]))
    for name, array in moments.state().items():
        np.testing.assert_array_equal(array[0], before[name][0])
        assert not (array[1] == before[name][1]).any()


def test_valid_everywhere_is_as_if_it_were_not_given() -> None:
    plain, masked = RunningMoments(2, 3), RunningMoments(2, 3)
    plain.update(draws(2, 4, 3))
    masked.update(draws(2, 4, 3), np.ones((2, 4), bool))
    for name, array in plain.state().items():
        np.testing.assert_array_equal(array, masked.state()[name])


def test_a_large_offset_does_not_swallow_the_variance() -> None:
    """A control for formulas with E[x²] - E[x]²: at an offset of 1e8 they return noise of order 1."""
    rows = draws(1, 1000, 1) + 1e8
    moments = RunningMoments(1, 1)
    moments.update(rows[:, :1])
    moments.count[:] = 1  # forget the pseudo-rows at 0, whose distance dominates
    moments.var[:] = 0
    moments.mean[:] = rows[:, 0]
    for t in range(1, 1000, 9):
        moments.update(rows[:, t : t + 9])
    np.testing.assert_allclose(moments.var[0], rows[0].var(0), rtol=1e-6)
    assert abs((rows**2).mean() - rows.mean() ** 2 - rows.var()) > 0.1


def test_seeds_do_not_see_each_other() -> None:
    together, alone = ObservationNormaliser(3, 2), ObservationNormaliser(1, 2)
    rewards, reward = RewardNormaliser(3, 4, 0.9), RewardNormaliser(1, 4, 0.9)
    for t in range(5):
        batch, ends = draws(3, 4, 2, seed=t), flags(3, 4, seed=t)
        together.update(batch)
        alone.update(batch[1:2])
        np.testing.assert_array_equal(together.normalize(batch)[1:2], alone.normalize(batch[1:2]))
        np.testing.assert_array_equal(
            rewards.step(batch[..., 0], ends, ~ends)[1:2], reward.step(batch[1:2, :, 0], ends[1:2], ~ends[1:2])
        )


# -- observations


def test_normalised_observations_by_hand() -> None:
    normaliser = ObservationNormaliser(1, 3)
    normaliser.moments.mean[:], normaliser.moments.var[:] = [1.0, 2.0, 0.0], [4.0, 0.25, 0.0]
    obs = np.array([[[2.0, 1.0, 1.0], [-99.0, 99.0, 0.0]]])
    expected = [[[0.5, -2.0, 10.0], [-10.0, 10.0, 0.0]]]  # 1/sqrt(1e-8) = 1e4 is clipped to 10
    np.testing.assert_allclose(normaliser.normalize(obs), expected, rtol=1e-7)
    assert normaliser.normalize(obs).dtype == np.float32
    np.testing.assert_array_equal(obs[0, 1], [-99.0, 99.0, 0.0])  # the input is left alone


def test_tensors_and_any_axes_in_between() -> None:
    normaliser = ObservationNormaliser(2, 3)
    normaliser.update(draws(2, 6, 3))
    obs = draws(2, 4, 5, 3, seed=3)
    expected = normaliser.normalize(obs)
    for t in range(4):
        np.testing.assert_array_equal(normaliser.normalize(obs[:, t]), expected[:, t])
    np.testing.assert_array_equal(normaliser.normalize(obs[:, 0, 0]), expected[:, 0, 0])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-7)):
        tensor = normaliser.normalize_tensor(torch.as_tensor(obs, dtype=dtype))
        assert tensor.dtype == dtype
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=tolerance, atol=tolerance)


def test_a_frozen_normaliser_stays_as_it_is() -> None:
    normaliser = ObservationNormaliser(1, 3)
    normaliser.update(draws(1, 4, 3))
    before, normaliser.frozen = normaliser.moments.state(), True
    normaliser.update(draws(1, 4, 3, seed=1))
    for name, array in normaliser.moments.state().items():
        np.testing.assert_array_equal(array, before[name])


class Scripted(gymnasium.Env[Any, Any]):
    """Gives prepared observations and rewards, whatever happens."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, obs: Any, reward: Any, terminated: Any, truncated: Any) -> None:
        self.script = list(zip(obs, reward, terminated, truncated, strict=True))
        self.time = -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.time += 1
        return self.script[self.time][0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        obs, *rest = self.script[self.time]
        return obs, *rest, {}


def test_observations_agree_with_gymnasiums_wrapper() -> None:
    """Gymnasium keeps its statistics in float32 and does not clip."""
    obs = draws(300, 3)
    env = NormalizeObservation(Scripted(obs, np.zeros(300), flags(300), np.zeros(300, bool)))
    ours = ObservationNormaliser(1, 3)
    for t in range(300):
        theirs = env.reset()[0] if t == 0 else env.step(0)[0]
        ours.update(obs[None, None, t])
        np.testing.assert_allclose(ours.normalize(obs[None, t])[0], theirs, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(ours.moments.mean[0], env.obs_rms.mean, rtol=1e-3)
    np.testing.assert_allclose(ours.moments.var[0], env.obs_rms.var, rtol=1e-3)


# -- rewards


def test_both_reset_rules_by_hand() -> None:
    """γ = 0.5; step 2 truncates, step 4 terminates; G is what the moments see at each step.

    done:        1, 0.5+2 = 2.5 (then 0), 3, 1.5+4 = 5.5 (then 0), 5
    terminated:  1, 2.5, 1.25+3 = 4.25, 0+4 = 4, 2+5 = 7
    """
    reward = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    truncated, terminated = np.arange(5) == 1, np.arange(5) == 3
    seen = {"done": [1, 2.5, 3, 5.5, 5], "terminated": [1, 2.5, 4.25, 4, 7]}
    for rule, returns in seen.items():
        normaliser = RewardNormaliser(1, 1, 0.5, rule)
        for t in range(5):
            arrays = (array[None, None, t] for array in (reward, terminated, truncated))
            normalised = normaliser.step(*arrays).item()
            mean, var = with_initial_rows(np.array(returns[: t + 1]))
            assert normaliser.moments.mean.item() == pytest.approx(mean, rel=1e-12)
            assert normaliser.moments.var.item() == pytest.approx(var, rel=1e-12)
            assert normalised == pytest.approx(np.clip(reward[t] / np.sqrt(var + 1e-8), -10, 10), rel=1e-12)
        assert normaliser.running.item() == returns[-1]


def test_the_mean_is_never_subtracted() -> None:
    """Subtracting it would make a reward of 0 worth something, and a constant reward nothing."""
    normaliser = RewardNormaliser(1, 4, 0.9)
    no = np.zeros((1, 4), bool)
    for t in range(20):
        normaliser.step(np.abs(draws(1, 4, seed=t)) + 5, no, no)
    assert normaliser.moments.mean.item() > 1
    assert (normaliser.normalize(np.zeros((1, 4))) == 0).all()
    assert (normaliser.normalize(np.full((1, 4), 0.5)) > 0).all()
    assert (normaliser.normalize(np.full((1, 4), -1e9)) == -10).all()


def sb3_vecnormalize(reward: Any, done: Any, discount: float) -> tuple[Any, Any]:
    """Stable-Baselines3's formulas for one seed, ``[T, N]``: the returns seen, and the normalised rewards."""
    seen, normalised, returns = np.empty_like(reward), np.empty_like(reward), np.zeros(reward.shape[1])
    for t in range(len(reward)):
        returns = returns * discount + reward[t]
        seen[t] = returns
        _, var = with_initial_rows(seen[: t + 1].ravel())
        normalised[t] = np.clip(reward[t] / np.sqrt(var + 1e-8), -10, 10)
        returns[done[t]] = 0
    return seen, normalised


def test_rule_done_agrees_with_the_formulas_of_stable_baselines3() -> None:
    reward, terminated, truncated = draws(2, 50, 3), flags(2, 50, 3), flags(2, 50, 3, seed=2)
    normaliser = RewardNormaliser(2, 3, 0.97)
    normalised = normaliser.rollout(reward, terminated, truncated)
    for s in range(2):
        _, expected = sb3_vecnormalize(reward[s], (terminated | truncated)[s], 0.97)
        np.testing.assert_allclose(normalised[s], expected, rtol=1e-10)


def gymnasium_rewards(reward: Any, terminated: Any, truncated: Any, discount: float) -> Any:
    env = NormalizeReward(Scripted(draws(len(reward), 3), reward, terminated, truncated), gamma=discount)
    return np.array([np.clip(env.step(0)[1], -10, 10) for _ in reward])


def test_rule_terminated_agrees_with_gymnasiums_wrapper() -> None:
    reward, terminated, truncated = draws(200), flags(200), flags(200, seed=2)
    expected = gymnasium_rewards(reward, terminated, truncated, 0.97)
    arrays = [array[None, :, None] for array in (reward, terminated, truncated)]
    ours = RewardNormaliser(1, 1, 0.97, "terminated").rollout(*arrays)
    np.testing.assert_allclose(ours[0, :, 0], expected, rtol=1e-10)
    other = RewardNormaliser(1, 1, 0.97, "done").rollout(*arrays)  # control: the rules differ on this script
    assert np.abs(other[0, :, 0] - expected).max() > 0.01


@pytest.mark.parametrize("rule", ["done", "terminated"])
def test_a_rollout_equals_its_steps_and_can_be_cut_anywhere(rule: Any) -> None:
    arrays = [draws(2, 30, 3), flags(2, 30, 3), flags(2, 30, 3, seed=2), ~flags(2, 30, 3, seed=3)]
    whole, cut, stepped = (RewardNormaliser(2, 3, 0.9, rule) for _ in range(3))
    expected = whole.rollout(*arrays)
    parts = [cut.rollout(*(array[:, piece] for array in arrays)) for piece in (slice(0, 11), slice(11, 30))]
    steps = [stepped.step(*(array[:, t] for array in arrays)) for t in range(30)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), expected)
    np.testing.assert_array_equal(np.stack(steps, 1), expected)
    for name, array in whole.state().items():
        np.testing.assert_array_equal(array, cut.state()[name])
        np.testing.assert_array_equal(array, stepped.state()[name])
    # Control: dividing everything by the last statistics, as one batch would, is something else.
    assert np.abs(whole.normalize(arrays[0]) - expected).max() > 0.1


@pytest.mark.parametrize("rule", ["done", "terminated"])
def test_reset_rows_change_nothing(rule: Any) -> None:
    """The same episodes with a reset row of a next-step autoreset after each end."""
    reward = np.array([1.0, 2.0, 4.0, -1.0])
    ends = np.array([False, True, False, False])
    no = np.zeros(4, bool)
    without = RewardNormaliser(1, 1, 0.9, rule)
    without.rollout(reward[None, :, None], no[None, :, None], ends[None, :, None])
    inserted = [np.insert(array, 2, filler) for array, filler in ((reward, 0.0), (no, False), (ends, False))]
    valid = np.arange(5) != 2
    with_row = RewardNormaliser(1, 1, 0.9, rule)
    with_row.rollout(*(array[None, :, None] for array in (*inserted, valid)))
    for name, array in without.state().items():
        np.testing.assert_array_equal(array, with_row.state()[name])
    counted = RewardNormaliser(1, 1, 0.9, rule)  # control: taken for a transition it does change something
    counted.rollout(*(array[None, :, None] for array in inserted))
    assert counted.moments.var != without.moments.var


def test_options_out_of_range() -> None:
    for discount in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=rf"must be in \[0, 1\]; got {discount}"):
            RewardNormaliser(1, 1, discount)
    with pytest.raises(ConfigError, match="must be 'done' or 'terminated'; got 'end'"):
        RewardNormaliser(1, 1, 0.9, "end")  # type: ignore[arg-type]


# -- state


def test_a_restored_normaliser_goes_on_exactly() -> None:
    for make in (lambda: ObservationNormaliser(2, 3), lambda: RewardNormaliser(2, 3, 0.9, "terminated")):
        whole, resumed = make(), make()

        def feed(normaliser: Any, seed: int) -> None:
            batch = draws(2, 3, 3, seed=seed)
            if isinstance(normaliser, ObservationNormaliser):
                normaliser.update(batch)
            else:
                normaliser.step(batch[..., 0], flags(2, 3, seed=seed), flags(2, 3))

        feed(whole, 0)
        stored = whole.state()
        resumed.load_state(stored)
        for seed in range(1, 4):
            feed(whole, seed)
            feed(resumed, seed)
        for name, array in whole.state().items():
            np.testing.assert_array_equal(array, resumed.state()[name])
            assert name == "frozen" or not (array == stored[name]).all()  # nor did the stored arrays move


def test_frozen_is_stored() -> None:
    normaliser, other = ObservationNormaliser(1, 2), ObservationNormaliser(1, 2)
    normaliser.frozen = True
    other.load_state(normaliser.state())
    assert other.frozen


def test_a_state_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'mean' of a normaliser has shape \[2, 3\] and must have \[2, 4\]"):
        ObservationNormaliser(2, 4).load_state(ObservationNormaliser(2, 3).state())
    with pytest.raises(CheckpointError, match=r"'running' of a normaliser is missing and must have \[2, 3\]"):
        RewardNormaliser(2, 3, 0.9).load_state(RunningMoments(2, 1).state())


# -- Stable-Baselines3 itself


@pytest.mark.peer
def test_stable_baselines3_side_by_side() -> None:
    common = pytest.importorskip("stable_baselines3.common.vec_env")
    scripts = [Scripted(draws(200, 3, seed=i), draws(200, seed=i), flags(200), flags(200, seed=i)) for i in (2, 3)]
    venv = common.VecNormalize(common.DummyVecEnv([lambda: scripts[0], lambda: scripts[1]]), gamma=0.97)
    observations, rewards = ObservationNormaliser(1, 3), RewardNormaliser(1, 2, 0.97)
    shown = venv.reset()
    for t in range(100):
        if t:
            shown, reward, done, _ = venv.step(np.zeros(2, int))
            ours = rewards.step(venv.get_original_reward()[None].astype(float), done[None], np.zeros((1, 2), bool))
            np.testing.assert_allclose(ours[0], reward, rtol=1e-6)
        raw = venv.get_original_obs()[None]
        observations.update(raw)
        np.testing.assert_allclose(observations.normalize(raw)[0], shown, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(observations.moments.var[0], venv.obs_rms.var, rtol=1e-12)
    np.testing.assert_allclose(rewards.moments.var[0], venv.ret_rms.var, rtol=1e-12)
