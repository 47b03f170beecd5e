"""Models: what is refused and in which words, shapes of rewards and starts, gymnasium's tables, selecting, padding."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from corollary.core.errors import CorollaryError
from corollary.theory_checks import solvers
from corollary.theory_checks.families import garnet, textbook_mdps
from corollary.theory_checks.mdp import ModelError, TabularMDP, concatenate


def rows(n: int = 1, s: int = 3, a: int = 2) -> torch.Tensor:
    """Uniform transitions ``[n, S, A, S]``."""
    return torch.full((n, s, a, s), 1 / s, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- what is refused


def test_a_row_that_does_not_sum_to_one_is_named_with_how_much_is_missing() -> None:
    p = rows(3)
    p[1, 2, 0] *= 1.001
    with pytest.raises(ModelError, match=r"lock\[1\], state 2, action 0: P does not sum to 1; .* misses 1 by 0\.001\."):
        TabularMDP.from_arrays(p, torch.zeros(3, 2), 0.9, name="lock")


def test_only_the_first_bad_row_is_named() -> None:
    p = rows()
    p[0, 1, 1], p[0, 2, 0] = 0.0, 0.0
    with pytest.raises(ModelError, match=r"^mdp, state 1, action 1: P does not sum to 1; .* misses 1 by -1\.$"):
        TabularMDP.from_arrays(p, torch.zeros(3, 2), 0.9)


def test_rows_rounded_to_float32_are_refused_with_the_remedy() -> None:
    p = torch.full((3, 2, 3), 1 / 3, dtype=torch.float32)
    with pytest.raises(ModelError, match="the rounding of float32: divide each row by its sum in float64"):
        TabularMDP.from_arrays(p, torch.zeros(3, 2), 0.9)
    p = p.double()
    TabularMDP.from_arrays(p / p.sum(-1, keepdim=True), torch.zeros(3, 2), 0.9)


def test_rounding_is_forgiven_and_more_is_not() -> None:
    p = rows()
    p[0, 0, 0, 0] += 5e-10
    TabularMDP.from_arrays(p, torch.zeros(3, 2), 0.9)
    p[0, 0, 0, 0] += 1e-9
    with pytest.raises(ModelError, match="does not sum to 1"):
        TabularMDP.from_arrays(p, torch.zeros(3, 2), 0.9)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([-0.1, 0.6, 0.5], "state 0, action 1: P has a negative probability; the row's least entry is -0.1"),
        ([float("nan"), 0.5, 0.5], "state 0, action 1: P is not finite"),
        ([float("inf"), 0.0, 0.0], "state 0, action 1: P is not finite"),
    ],
)
def test_what_is_no_probability(row, said) -> None:
    p = rows()
    p[0, 0, 1] = torch.tensor(row)
    with pytest.raises(ModelError, match=said):
        TabularMDP.from_arrays(p, torch.zeros(3, 2), 0.9)


def test_only_a_wrong_sum_is_put_down_to_rounding() -> None:
    p = rows()
    p[0, 0, 1] = torch.tensor([-0.1, 0.6, 0.5 + 1e-7], dtype=torch.float64)
    with pytest.raises(ModelError, match=r"negative probability; .* its sum misses 1 by 1e-07\.$"):
        TabularMDP.from_arrays(p, torch.zeros(3, 2), 0.9)


@pytest.mark.parametrize("discount", [-0.1, 1.0, 1.5, float("nan")])
def test_discounts_outside_their_range(discount) -> None:
    with pytest.raises(ModelError, match=r"the discount must be in \[0, 1\)"):
        TabularMDP.from_arrays(rows(), torch.zeros(3, 2), discount)


def test_of_several_discounts_the_wrong_one_is_named() -> None:
    with pytest.raises(ModelError, match=r"^mdp\[1\]: the discount must be in \[0, 1\); got 1\.0\.$"):
        TabularMDP.from_arrays(rows(2), torch.zeros(3, 2), [0.9, 1.0])


def test_gamma_zero_is_a_model() -> None:
    r = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    mdp = TabularMDP.from_arrays(rows(), r, 0.0)
    torch.testing.assert_close(solvers.policy_iteration(mdp).value[0], r.amax(-1))


@pytest.mark.parametrize(
    ("transition", "reward", "discount", "start", "said"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 2), 0.9, None, r"P must have shape \[S, A, S\].*got \[3, 2\]"),
        (torch.zeros(3, 2, 4), torch.zeros(3, 2), 0.9, None, r"P must have shape.*got \[3, 2, 4\]"),
        (torch.zeros(0, 2, 0), torch.zeros(0, 2), 0.9, None, r"P must have shape.*got \[0, 2, 0\]"),
        (rows(), torch.zeros(2, 2), 0.9, None, r"reward must have shape.* S = 3 and A = 2 .*got \[2, 2\]"),
        (rows(2), torch.zeros(3, 3, 2), 0.9, None, r"reward must have shape.*got \[3, 3, 2\]"),
        (rows(2), torch.zeros(3, 2), [0.9] * 3, None, r"discount must be one number or one per instance \(2\)"),
        (rows(), torch.zeros(3, 2), 0.9, [1.0, 0.0], r"start must have shape \[S\] or \[B, S\].*got \[2\]"),
        (rows(), torch.zeros(3, 2), 0.9, [0.6, 0.6, 0.0], "mdp: start does not sum to 1.*misses 1 by 0.2"),
        (rows(), torch.full((3, 2), torch.inf), 0.9, None, "state 0, action 0: the reward is not a finite number"),
        ([[["a"]]], torch.zeros(1, 1), 0.9, None, "numbers in full arrays"),
        ([[[1.0], [1.0, 0.0]]], torch.zeros(1, 1), 0.9, None, "numbers in full arrays"),
    ],
)
def test_shapes_and_values_that_do_not_fit(transition, reward, discount, start, said) -> None:
    with pytest.raises(ModelError, match=said):
        TabularMDP.from_arrays(transition, reward, discount, start)


def test_every_error_is_the_library_s_own() -> None:
    assert issubclass(ModelError, CorollaryError)


# --------------------------------------------------------------------------------------------------- what is taken


def test_rewards_per_state_and_per_successor() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), (2, 3, 2))
    per_state, per_successor = rng.random((2, 3)), rng.random((2, 3, 2, 3))
    by_state = TabularMDP.from_arrays(p, per_state, 0.9).reward.numpy()
    np.testing.assert_array_equal(by_state, np.repeat(per_state[:, :, None], 2, 2))
    by_successor = TabularMDP.from_arrays(p, per_successor, 0.9).reward.numpy()
    np.testing.assert_allclose(by_successor, np.einsum("bsat,bsat->bsa", p, per_successor))
    shared = TabularMDP.from_arrays(p, per_successor[0], 0.9).reward.numpy()
    np.testing.assert_allclose(shared, np.einsum("bsat,sat->bsa", p, per_successor[0]))


def test_parts_that_are_given_once_are_shared_and_the_start_is_uniform_by_default() -> None:
    mdp = TabularMDP.from_arrays(rows(3), torch.zeros(3, 2), 0.9)
    assert mdp.reward.shape == (3, 3, 2)
    assert mdp.discount.tolist() == [0.9] * 3
    torch.testing.assert_close(mdp.start, torch.full((3, 3), 1 / 3, dtype=torch.float64))
    assert mdp.names == ("mdp[0]", "mdp[1]", "mdp[2]")
    assert (len(mdp), mdp.n_states, mdp.n_actions) == (3, 3, 2)


def test_selecting_instances() -> None:
    mdp = garnet(np.random.default_rng(0), 5, 4, 2, 2, [0.0, 0.5, 0.9, 0.95, 0.99])
    for chosen in (mdp[2], mdp[2:3], mdp[torch.tensor([2])]):
        assert chosen.names == (mdp.names[2],)
        torch.testing.assert_close(chosen.transition, mdp.transition[2:3])
        torch.testing.assert_close(chosen.discount, mdp.discount[2:3])
    assert [one.names[0] for one in mdp] == list(mdp.names)
    torch.testing.assert_close(mdp[torch.tensor([4, 0])].discount, mdp.discount[[4, 0]])


def test_replacing_checks_again() -> None:
    mdp = garnet(np.random.default_rng(0), 2, 4, 2, 2, 0.9)
    with pytest.raises(ModelError, match=r"reward must have shape \[2, 4, 2\]; got \[2, 4\]"):
        mdp.replace(reward=torch.zeros(2, 4))


# ------------------------------------------------------------------------------------------------------- gymnasium


def test_frozen_lake_read_from_its_table() -> None:
    env = gymnasium.make("FrozenLake-v1")
    mdp = TabularMDP.from_gymnasium(env, 0.9)
    assert mdp.names == ("FrozenLake-v1",)
    assert mdp.transition.shape == (1, 17, 4, 17)
    table = env.unwrapped.P  # type: ignore[attr-defined]
    for s in range(16):
        for a in range(4):
            law, reward = np.zeros(17), 0.0
            for probability, successor, pay, terminated in table[s][a]:
                law[16 if terminated else successor] += probability
                reward += probability * pay
            np.testing.assert_allclose(mdp.transition[0, s, a].numpy(), law)
            assert float(mdp.reward[0, s, a]) == pytest.approx(reward)
    assert mdp.start[0].tolist() == [1.0] + [0.0] * 16
    assert mdp.transition[0, 16, :, 16].tolist() == [1.0] * 4


def test_deterministic_frozen_lake_by_hand() -> None:
    # Six steps along the edge of the 4 x 4 map; the sixth pays 1.
    mdp = TabularMDP.from_gymnasium(gymnasium.make("FrozenLake-v1", is_slippery=False), 0.9, name="dry")
    assert mdp.names == ("dry",)
    assert float(solvers.policy_iteration(mdp).value[0, 0]) == pytest.approx(0.9**5)


def test_an_environment_by_its_name_and_one_without_a_table() -> None:
    assert TabularMDP.from_gymnasium("CliffWalking-v1", 0.9).n_actions == 4
    with pytest.raises(ModelError, match="has no transition table P"):
        TabularMDP.from_gymnasium("CartPole-v1", 0.9)


class Table(gymnasium.Env[Any, Any]):
    """An environment that is nothing but a table."""

    def __init__(self, table: Any, **attributes: Any) -> None:
        self.P = table
        vars(self).update(attributes)


def test_tables_of_lists_are_read_as_those_of_dicts() -> None:
    stay, go = [(1.0, 0, 0.5, False)], [(0.25, 0, 0.0, False), (0.75, 1, 4.0, True)]
    listed = TabularMDP.from_gymnasium(Table([[stay, go], [stay, stay]]), 0.9)
    keyed = TabularMDP.from_gymnasium(Table({0: {0: stay, 1: go}, 1: {0: stay, 1: stay}}), 0.9)
    assert torch.equal(listed.transition, keyed.transition)
    assert listed.transition[0, 0, 1].tolist() == [0.25, 0.0, 0.75]  # what ends goes to the third state
    assert listed.reward[0, 0].tolist() == [0.5, 3.0]
    assert listed.start[0].tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([[[(1.0, -1, 0.0, False)]]], r"state 0, action 0: .*successor -1 is none of the 1 states"),
        ([[[(1.0, 1, 0.0, False)]]], "successor 1 is none of the 1 states"),
        ([[[(1.0, 0.0, 0.0, False)]]], r"state 0, action 0: P\[s\]\[a\] must list"),
        ([[[(1.0, 0, 0.0)]]], "not enough values"),
        ([[[(0.5, 0, 0.0, False)]]], "state 0, action 0: P does not sum to 1"),
        ([[[(1.0, 0, 0.0, False)]], []], "IndexError"),
        ([[[(1.0, 0, 0.0, False)]], [[(1.0, 0, 0.0, False)]] * 2], "state 1: .*; state 0 has 1"),
        ({1: {0: [(1.0, 1, 0.0, False)]}}, "KeyError"),
        (7, "TypeError"),
    ],
)
def test_tables_of_another_form_are_named_with_state_and_action(table, said) -> None:
    with pytest.raises(ModelError, match=said):
        TabularMDP.from_gymnasium(Table(table), 0.9)


def test_a_start_of_another_size_is_refused() -> None:
    env = Table([[[(1.0, 0, 0.0, False)]]], initial_state_distrib=[0.5, 0.5])
    with pytest.raises(ModelError, match=r"initial_state_distrib has shape \[2\], but P has 1 states"):
        TabularMDP.from_gymnasium(env, 0.9)


# --------------------------------------------------------------------------------------------------------- padding


def test_padding_changes_nothing() -> None:
    models = textbook_mdps()
    joined = concatenate(models)
    assert joined.names == tuple(m.names[0] for m in models)
    optimum = solvers.policy_iteration(joined)
    for i, mdp in enumerate(models):
        s, a = mdp.n_states, mdp.n_actions
        alone = solvers.policy_iteration(mdp)
        torch.testing.assert_close(optimum.value[i, :s], alone.value[0], rtol=0, atol=1e-10)
        assert not optimum.value[i, s:].any()
        torch.testing.assert_close(optimum.q[i, :s, :a], alone.q[0], rtol=0, atol=1e-10)
        uniform = torch.zeros(1, joined.n_states, joined.n_actions, dtype=torch.float64)
        uniform[..., :a] = 1 / a
        occupied = solvers.occupancy(joined[i], uniform)[0]
        torch.testing.assert_close(occupied[:s], solvers.occupancy(mdp, solvers.uniform_policy(mdp))[0])
        assert not occupied[s:].any()


def test_control_padding_that_pays_would_be_seen() -> None:
    # The same comparison, with the added action of the smaller model paying more than its own.
    small, large = garnet(np.random.default_rng(0), 1, 3, 2, 2, 0.9), garnet(np.random.default_rng(1), 1, 4, 3, 2, 0.9)
    joined = concatenate([small, large])
    r = joined.reward.clone()
    r[0, :3, 2] += 1
    wrong = solvers.policy_iteration(joined.replace(reward=r)).value[0, :3]
    assert (wrong - solvers.policy_iteration(small).value[0]).abs().min() > 0.1
