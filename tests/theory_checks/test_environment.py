"""A model as an environment: its interface, and that what it samples follows the tables, with a control."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from scipy import stats

from corollary.theory_checks.environment import TabularEnv
from corollary.theory_checks.families import combination_lock, deep_sea, frozen_lake, garnet
from corollary.theory_checks.mdp import ModelError, TabularMDP


def one(seed: int = 0) -> TabularMDP:
    return garnet(np.random.default_rng(seed), 1, 4, 2, 3, 0.9)


def visits(env: TabularEnv, steps: int, seed: int) -> tuple[Any, Any]:
    """How often each transition ``[S, A, S]`` and each first state ``[S]`` happened under random actions."""
    rng = np.random.default_rng(seed)
    n, a = env.mdp.n_states, env.mdp.n_actions
    moves, first = np.zeros((n, a, n)), np.zeros(n)
    state, _ = env.reset(seed=seed)
    first[state] += 1
    for _ in range(steps):
        action = int(rng.integers(a))
        following, _, terminated, truncated, _ = env.step(action)
        moves[state, action, following] += 1
        state = following
        if terminated or truncated:
            state, _ = env.reset()
            first[state] += 1
    return moves, first


def chance(counts: Any, law: Any) -> float:
    """The p value of Pearson's test of all rows of counts against their laws; 0 if the impossible happened."""
    counts, law = counts.reshape(-1, counts.shape[-1]), law.reshape(-1, law.shape[-1])
    if counts[law == 0].any():
        return 0.0
    expected = counts.sum(-1, keepdims=True) * law
    inside = law > 0
    statistic = ((counts - expected)[inside] ** 2 / np.maximum(expected[inside], 1e-300)).sum()
    return float(stats.chi2.sf(statistic, inside.sum() - len(law)))


def test_sampled_transitions_and_starts_follow_the_tables() -> None:
    mdp = one()
    moves, first = visits(TabularEnv(mdp, one_hot=False, horizon=5), 40_000, seed=1)
    assert chance(moves, mdp.transition[0].numpy()) > 1e-3
    assert chance(first, mdp.start[0].numpy()) > 1e-3


def test_control_a_table_that_is_off_by_two_per_cent_is_told_apart() -> None:
    mdp = one()
    moves, first = visits(TabularEnv(mdp, one_hot=False, horizon=5), 40_000, seed=1)
    other, other_start = mdp.transition[0].numpy().copy(), mdp.start[0].numpy().copy()
    for law in (*other.reshape(-1, 4), other_start):
        law[law.argmax()] -= 0.02
        law[np.where(law > 0, law, 1).argmin()] += 0.02
    assert chance(first, other_start) < 1e-2
    assert chance(moves, other) < 1e-6


def test_rewards_are_the_tables_and_states_are_told() -> None:
    mdp = one()
    env = TabularEnv(mdp)
    observation, info = env.reset(seed=0)
    for step in range(50):
        assert observation.dtype == np.float32
        assert observation.tolist() == np.eye(4)[info["state"]].tolist()
        before, action = info["state"], step % 2
        observation, reward, terminated, truncated, info = env.step(action)
        assert reward == float(mdp.reward[0, before, action])
        assert not terminated
        assert not truncated


def test_an_episode_ends_in_absorbing_states_that_pay_nothing() -> None:
    env = TabularEnv(combination_lock(3, 0.2), one_hot=False)
    env.reset(seed=0)
    steps = [env.step(0) for _ in range(3)]
    assert [step[1] for step in steps] == [0.0, 0.0, 1.0]
    assert [step[2] for step in steps] == [False, False, True]
    env.reset(seed=0)
    assert env.step(1)[1:3] == (0.2, True)


def test_which_states_end_an_episode_can_be_said() -> None:
    # A state that stays but pays does not end an episode by itself.
    p = torch.eye(2, dtype=torch.float64).view(2, 1, 2).roll(1, 2)
    p[1] = torch.tensor([0.0, 1.0])
    mdp = TabularMDP.from_arrays(p, [[0.0], [1.0]], 0.9, [1.0, 0.0])
    env = TabularEnv(mdp)
    env.reset(seed=0)
    assert not env.step(0)[2]
    env = TabularEnv(mdp, absorbing=(1,))
    env.reset(seed=0)
    assert env.step(0)[2]


def test_a_horizon_truncates_and_termination_comes_first() -> None:
    env = TabularEnv(one(), horizon=3)
    env.reset(seed=0)
    assert [env.step(0)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]
    env = TabularEnv(combination_lock(3, 0.2), horizon=3)
    env.reset(seed=0)
    assert [env.step(0)[2:4] for _ in range(3)] == [(False, False), (False, False), (True, False)]


def test_the_same_seed_gives_the_same_episode() -> None:
    def episode(seed: int) -> list[int]:
        env = TabularEnv(one(), one_hot=False)
        state, _ = env.reset(seed=seed)
        return [state] + [env.step(t % 2)[0] for t in range(30)]

    assert episode(3) == episode(3)
    assert episode(3) != episode(4)


def test_gymnasium_s_own_checker_is_content() -> None:
    for one_hot in (True, False):
        check_env(TabularEnv(deep_sea(3), one_hot=one_hot), skip_render_check=True)


def test_its_table_reads_back_as_the_model() -> None:
    mdp = deep_sea(3)
    again = TabularMDP.from_gymnasium(TabularEnv(mdp), 0.99)
    # What ends an episode is read as one more state, so the two models differ there and nowhere else.
    alive = torch.arange(9)
    torch.testing.assert_close(again.transition[0][alive][..., alive], mdp.transition[0][alive][..., alive])
    torch.testing.assert_close(again.transition[0][alive][..., 10], mdp.transition[0][alive][..., 9])
    torch.testing.assert_close(again.reward[0, :9], mdp.reward[0, :9])


def test_gymnasium_s_frozen_lake_and_its_model_sample_alike() -> None:
    model = TabularEnv(frozen_lake(), one_hot=False)
    original = gymnasium.make("FrozenLake-v1")
    rng = np.random.default_rng(0)
    lengths = []
    for env in (model, original):
        env.reset(seed=5)
        steps, ends = 0, []
        while len(ends) < 2000:
            steps += 1
            _, _, terminated, truncated, _ = env.step(int(rng.integers(4)))
            if terminated or truncated:
                ends.append(steps)
                steps = 0
                env.reset()
        lengths.append(ends)
    assert stats.ks_2samp(*lengths).pvalue > 1e-3


def test_several_instances_are_refused() -> None:
    with pytest.raises(ModelError, match="made of one instance, not of 2"):
        TabularEnv(garnet(np.random.default_rng(0), 2, 4, 2, 3, 0.9))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"horizon": 0}, "horizon must be at least 1 step, or None for no cut; got 0"),
        ({"horizon": -1}, "got -1"),
        ({"absorbing": (0, 9)}, "absorbing state 9 is none of the 4 states"),
        ({"absorbing": (-1,)}, "absorbing state -1"),
    ],
)
def test_options_out_of_range_are_refused(options, said) -> None:
    with pytest.raises(ModelError, match=said):
        TabularEnv(one(), **options)


def test_steps_outside_an_episode_and_actions_that_are_none_are_refused() -> None:
    env = TabularEnv(one(), horizon=1)
    with pytest.raises(gymnasium.error.ResetNeeded, match="call reset"):
        env.step(0)
    env.reset(seed=0)
    for action in (-1, 2):
        with pytest.raises(gymnasium.error.InvalidAction, match=f"action {action} is none of the 2"):
            env.step(action)
    env.step(1)  # a refused action leaves the episode as it was
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
