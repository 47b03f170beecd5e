"""Exact solvers against each other, closed forms, simulation, symmetries, and QuantEcon (marker `peer`)."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corollary import kernels
from corollary.theory_checks import solvers
from corollary.theory_checks.check import Draw
from corollary.theory_checks.families import (
    chain,
    cliff_walk,
    combination_lock,
    deep_sea,
    deterministic_policies,
    dirichlet,
    frozen_lake,
    garnet,
    linear_mdp,
    puterman_inventory,
    puterman_two_state,
    random_mdps,
    random_policies,
    river_swim,
    textbook_mdps,
)
from corollary.theory_checks.mdp import TabularMDP, concatenate
from corollary.theory_checks.solvers import SolverError


def close(left: Tensor, right: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@st.composite
def models(draw: st.DrawFn) -> TabularMDP:
    """A few random MDPs of one size, possibly with one state, one action, one successor, gamma = 0."""
    s, a = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    branching = draw(st.integers(1, s))
    gamma = draw(st.sampled_from([0.0, 0.5, 0.9, 0.99]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return garnet(rng, 3, s, a, branching, gamma, full_start=draw(st.booleans()))


# ----------------------------------------------------------------------------------------------------- agreement


def test_all_solvers_agree_on_hundreds_of_random_problems() -> None:
    number = 0
    for mdp in random_mdps(Draw(np.random.default_rng(0)), fast=300):
        exact = solvers.policy_iteration(mdp)
        assert exact.converged.all()
        assert (exact.bound < 1e-9).all()
        for found in (
            solvers.value_iteration(mdp, 1e-10),
            solvers.modified_policy_iteration(mdp, 3, 1e-10),
            solvers.modified_policy_iteration(mdp, 50, 1e-10),
        ):
            assert found.converged.all()
            assert ((found.value - exact.value).abs().amax(-1) <= found.bound + 1e-11).all()
            assert (found.bound <= 1e-10).all()
        start = torch.from_numpy(np.random.default_rng(1).integers(mdp.n_actions, size=exact.action.shape))
        again = solvers.policy_iteration(mdp, start=start)
        close(again.value, exact.value)
        close(solvers.policy_value(mdp, exact.policy), exact.value)
        close(exact.q.amax(-1), exact.value)
        number += len(mdp)
    assert number >= 300


@given(models(), st.sampled_from([1, 2, 1000]))
def test_compiled_policy_iteration_is_the_batched_one(mdp: TabularMDP, most: int) -> None:
    first = torch.from_numpy(np.random.default_rng(0).integers(mdp.n_actions, size=mdp.start.shape))
    batched, compiled = (solvers.policy_iteration(mdp, most, first, backend=backend) for backend in ("torch", "numba"))
    for part in ("action", "converged", "iterations"):
        assert torch.equal(getattr(batched, part), getattr(compiled, part))
    close(batched.value, compiled.value)
    close(batched.q, compiled.q)
    # What sweeps suggest may differ, as batched ones stop together and are in single precision: not where they lead.
    batched, compiled = (solvers.policy_iteration(mdp, backend=backend) for backend in ("torch", "numba"))
    assert (batched.converged & compiled.converged).all()
    close(batched.value, compiled.value)
    close(compiled.q.gather(-1, compiled.action.unsqueeze(-1)).squeeze(-1), compiled.value)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_either_back_end_solves_what_is_hard_for_it(backend) -> None:
    """Sizes that no block divides, discounts near 1, actions that are equal, and the textbooks' problems."""
    for mdp in (
        *textbook_mdps(),
        *(dirichlet(np.random.default_rng(s), 2, s, 3, 1.0, 0.99999) for s in range(1, 14)),
        garnet(np.random.default_rng(0), 3, 200, 2, 3, 0.999),
    ):
        found = solvers.policy_iteration(mdp, backend=backend)
        assert found.converged.all()
        size = 1 / (1 - mdp.discount.max())
        exact = solvers.policy_value(mdp, found.policy)
        # Values as large as the horizon, solved from equations whose condition is twice that.
        assert (found.value - exact).abs().max() <= 8 * np.finfo(np.float64).eps * size**2
        assert (found.bound <= 1e-9 * size).all()
    equal = TabularMDP.from_arrays(torch.full((3, 4, 3), 1 / 3, dtype=torch.float64), torch.ones(3, 4), 0.9)
    found = solvers.policy_iteration(equal, backend=backend)
    assert found.action.tolist() == [[0, 0, 0]]
    assert found.iterations.tolist() == [1]
    kept = torch.tensor([[3, 1, 2]])
    assert torch.equal(solvers.policy_iteration(equal, start=kept, backend=backend).action, kept)


def test_what_policy_iteration_refuses(monkeypatch) -> None:
    mdp = chain(3, 0.9)
    with pytest.raises(SolverError, match="Unknown back end 'gpu'; choose one of torch, numba"):
        solvers.policy_iteration(mdp, backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(SolverError, match="max_iterations must be at least 1; got 0"):
        solvers.policy_iteration(mdp, 0)
    for start in (torch.full(mdp.start.shape, mdp.n_actions), torch.zeros(1, 1, dtype=torch.int64), -torch.ones(1, 3)):
        with pytest.raises(SolverError, match=f"start must be actions below {mdp.n_actions}, of shape"):
            solvers.policy_iteration(mdp, start=start)
    differentiated = mdp.replace(reward=mdp.reward.clone().requires_grad_())
    with pytest.raises(SolverError, match="gives no gradients: take 'torch'"):
        solvers.policy_iteration(differentiated, backend="numba")
    monkeypatch.setitem(sys.modules, "corollary.kernels.policy_iteration_numba", None)
    monkeypatch.delattr(kernels, "policy_iteration_numba", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"needs Numba; .*pip install 'corollary\[compiled\]'"):
        solvers.policy_iteration(mdp, backend="numba")


def test_linear_programs_agree_with_policy_iteration() -> None:
    for mdp in random_mdps(Draw(np.random.default_rng(2)), fast=30):
        exact = solvers.policy_iteration(mdp)
        close(solvers.primal_linear_program(mdp), exact.value, 1e-6)
        flow = solvers.dual_linear_program(mdp)
        assert (flow >= -1e-9).all()
        close(flow.sum((1, 2)), torch.ones(len(mdp), dtype=torch.float64), 1e-7)
        close((flow * mdp.reward).sum((1, 2)) / (1 - mdp.discount), (mdp.start * exact.value).sum(-1), 1e-6)


def test_control_another_discount_is_another_problem() -> None:
    mdp = puterman_two_state()
    wrong = solvers.policy_iteration(mdp.replace(discount=mdp.discount**2)).value
    assert (wrong - solvers.policy_iteration(mdp).value).abs().min() > 1


@pytest.mark.parametrize("mdp", textbook_mdps(), ids=lambda mdp: mdp.names[0])
def test_all_solvers_agree_on_textbook_problems(mdp) -> None:
    exact = solvers.policy_iteration(mdp).value
    for found in (
        solvers.value_iteration(mdp, 1e-10).value,
        solvers.modified_policy_iteration(mdp, 5, 1e-10).value,
        solvers.policy_iteration(mdp, start=torch.zeros(exact.shape, dtype=torch.int64)).value,
    ):
        close(found, exact)
    # Where the start never is a value is not pinned down by the primal program.
    everywhere = mdp.replace(start=torch.full_like(mdp.start, 1 / mdp.n_states))
    close(solvers.primal_linear_program(everywhere), exact, 1e-6)
    returned = (solvers.dual_linear_program(mdp) * mdp.reward).sum() / (1 - mdp.discount[0])
    close(returned, (mdp.start * exact).sum(), 1e-6)


def test_a_large_batch_takes_the_threads_and_finds_the_same() -> None:
    mdp = garnet(np.random.default_rng(3), 200, 6, 3, 2, 0.95)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = solvers.policy_iteration(mdp)
        torch.set_num_threads(2)
        together = solvers.policy_iteration(mdp)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone.action, together.action)
    close(alone.value, together.value)


def test_values_that_all_move_alike_are_as_good_as_solved() -> None:
    # With dense transitions what a step adds is soon the same in all states, long before it is small.
    mdp = dirichlet(np.random.default_rng(19), 4, 50, 3, 1.0, 0.999)
    found = solvers.value_iteration(mdp, 1e-8)
    assert (found.iterations < 20).all()
    assert ((found.value - solvers.policy_iteration(mdp).value).abs().amax(-1) <= found.bound + 1e-10).all()
    assert (found.bound <= 1e-8).all()
    plain = solvers.finite_horizon(mdp, 20, discount=0.999).value[:, 0]  # control: the same steps without the middle
    assert ((plain - found.value).abs().amax(-1) > 100).all()


def test_giving_up_is_said() -> None:
    mdp = concatenate([river_swim(6, gamma) for gamma in (0.0, 0.5, 0.9, 0.99)])
    found = solvers.value_iteration(mdp, 1e-10, max_iterations=40)
    assert found.converged.tolist() == [True, True, False, False]
    exact = solvers.policy_iteration(mdp).value
    assert ((found.value - exact).abs().amax(-1) <= found.bound + 1e-11).all()
    assert not solvers.policy_iteration(mdp, 1, torch.zeros(4, 6, dtype=torch.int64)).converged.all()


def test_a_tolerance_must_be_positive() -> None:
    with pytest.raises(SolverError, match="must be > 0; got 0"):
        solvers.value_iteration(puterman_two_state(), 0.0)


# --------------------------------------------------------------------------------------------------- closed forms


def test_puterman_two_states_by_hand() -> None:
    # Staying pays 5 and leads away with probability 1/2; away costs 1 for ever.
    value = solvers.policy_iteration(puterman_two_state(0.95)).value[0]
    close(value, torch.tensor([(5 - 5.5 * 0.95) / (0.525 * 0.05), -20.0], dtype=torch.float64))
    close(value, torch.tensor([-8.571428571428571, -20.0], dtype=torch.float64))


def test_puterman_inventory_to_the_sixteenth() -> None:
    mdp = puterman_inventory()
    found = solvers.finite_horizon(mdp, 3)
    known = torch.tensor(mdp.known["finite horizon 3"], dtype=torch.float64)
    close(found.value[0], known, 1e-14)
    assert found.action[0, 0].tolist() == [3, 0, 0, 0]
    assert found.action[0, 1].tolist() == [2, 0, 0, 0]
    assert found.action[0, 2].tolist() == [0, 0, 0, 0]


def test_river_swim_values_gain_and_finite_horizon() -> None:
    for gamma in (0.9, 0.95):
        mdp = river_swim(6, gamma)
        close(
            solvers.policy_iteration(mdp).value[0], torch.tensor(mdp.known["optimal value"], dtype=torch.float64), 1e-8
        )
    right = torch.zeros(1, 6, 2, dtype=torch.float64)
    right[..., 1] = 1
    close(solvers.average_reward(mdp, right).gain, torch.tensor([7203 / 16805], dtype=torch.float64), 1e-12)
    twenty = [3.39726396, 4.05265063, 5.30186790, 6.67836688, 8.09400027, 9.52144452]
    close(solvers.finite_horizon(mdp, 20).value[0, 0], torch.tensor(twenty, dtype=torch.float64), 1e-8)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("size", [2, 4, 7])
def test_deep_sea(size, seed) -> None:
    mdp = deep_sea(size, seed=seed)
    optimum = solvers.finite_horizon(mdp, size)
    assert float((mdp.start * optimum.value[:, 0]).sum()) == pytest.approx(0.99)
    uniform = solvers.finite_horizon(mdp, size, solvers.uniform_policy(mdp)).value[:, 0]
    assert float((mdp.start * uniform).sum()) == pytest.approx(2.0**-size - 0.005)
    reached = solvers.state_laws(mdp, solvers.uniform_policy(mdp), size)
    assert int((reached > 0).any(1).sum()) == size * (size + 1) // 2


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_cliff_walk(gamma) -> None:
    mdp = cliff_walk(gamma)
    assert float(solvers.policy_iteration(mdp).value[0, 36]) == pytest.approx(-(1 - gamma**13) / (1 - gamma))


@pytest.mark.parametrize(("gamma", "value"), [(0.9, 0.06889090), (0.95, 0.18047158), (0.99, 0.54202593)])
def test_frozen_lake(gamma, value) -> None:
    assert float(solvers.policy_iteration(frozen_lake(gamma)).value[0, 0]) == pytest.approx(value, abs=1e-8)


def test_frozen_lake_undiscounted_in_the_limit() -> None:
    mdp = frozen_lake(0.9)
    assert float(solvers.finite_horizon(mdp, 3000).value[0, 0, 0]) == pytest.approx(14 / 17, abs=1e-8)


def test_lock_and_chain() -> None:
    lock = combination_lock(5, 0.3)
    assert float(solvers.finite_horizon(lock, 5).value[0, 0, 0]) == 1.0
    uniform = solvers.finite_horizon(lock, 5, solvers.uniform_policy(lock)).value[0, 0, 0]
    assert float(uniform) == pytest.approx(2.0**-5 + 0.15)
    row = chain(5)
    close(solvers.policy_iteration(row).value[0], torch.tensor(row.known["optimal value"], dtype=torch.float64))


def test_one_state_and_one_action() -> None:
    mdp = TabularMDP.from_arrays(torch.ones(1, 1, 1), torch.full((1, 1), 3.0), 0.75)
    for found in (solvers.policy_iteration(mdp), solvers.value_iteration(mdp, 1e-12)):
        assert float(found.value) == pytest.approx(12.0)
    close(solvers.occupancy(mdp, torch.ones(1, 1, 1).double()), torch.ones(1, 1).double())


def test_a_linear_mdp_is_linear() -> None:
    mdp, phi = linear_mdp(np.random.default_rng(5), 8, 3, 4, 0.9)
    value = torch.from_numpy(np.random.default_rng(6).standard_normal((1, 8)))
    target = solvers.q_values(mdp, value).reshape(-1, 1)
    features = phi.reshape(-1, 4)
    close(features @ torch.linalg.lstsq(features, target).solution, target, 1e-10)


# ------------------------------------------------------------------------------------------- one policy, by series


def test_values_and_occupancies_are_their_series() -> None:
    rng = np.random.default_rng(7)
    mdp = garnet(rng, 4, 5, 3, 2, [0.0, 0.5, 0.9, 0.95])
    policy = random_policies(rng, mdp)
    p, r = solvers.dynamics(mdp, policy)
    value, visits = torch.zeros_like(r), torch.zeros_like(r)
    law, weight = mdp.start, torch.ones(4, 1, dtype=torch.float64)
    ahead = r
    for _ in range(800):
        value, visits = value + weight * ahead, visits + (1 - mdp.gamma) * weight * law
        ahead = torch.einsum("bst,bt->bs", p, ahead)
        law, weight = torch.einsum("bs,bst->bt", law, p), weight * mdp.gamma
    close(solvers.policy_value(mdp, policy), value)
    close(solvers.occupancy(mdp, policy), visits)
    close(solvers.occupancy(mdp, policy).sum(-1), torch.ones(4, dtype=torch.float64))
    close(
        solvers.expected_return(mdp, policy),
        (visits.unsqueeze(-1) * policy * mdp.reward).sum((1, 2)) / (1 - mdp.discount),
    )
    close((policy * solvers.advantage(mdp, policy)).sum(-1), torch.zeros_like(r))
    close(solvers.iterate_policy(mdp, policy, torch.zeros_like(r), 800), value)


def test_evaluation_is_differentiable_in_policy_and_model() -> None:
    rng = np.random.default_rng(8)
    mdp = garnet(rng, 2, 4, 2, 2, 0.9)
    logits = torch.from_numpy(rng.standard_normal((2, 4, 2))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: solvers.expected_return(mdp, x.softmax(-1)), (logits,))
    assert torch.autograd.gradcheck(lambda x: solvers.occupancy(mdp, x.softmax(-1)), (logits,))


# ------------------------------------------------------------------------------- finite horizon and average reward


def test_a_finite_horizon_by_enumeration_of_all_policies() -> None:
    rng = np.random.default_rng(9)
    mdp = garnet(rng, 3, 3, 2, 2, 0.9)
    rules = torch.cartesian_prod(*[torch.arange(2)] * 6).view(-1, 2, 3)  # two steps, three states
    values = []
    for rule in rules:
        policy = torch.nn.functional.one_hot(rule, 2).double().expand(3, -1, -1, -1)
        values.append(solvers.finite_horizon(mdp, 2, policy).value[:, 0])
    close(torch.stack(values).amax(0), solvers.finite_horizon(mdp, 2).value[:, 0])


def test_a_long_discounted_horizon_is_the_discounted_problem() -> None:
    mdp = garnet(np.random.default_rng(10), 5, 6, 3, 2, 0.9)
    exact = solvers.policy_iteration(mdp).value
    close(solvers.finite_horizon(mdp, 300, discount=0.9).value[:, 0], exact)
    # With the optimum for final value any horizon will do.
    close(solvers.finite_horizon(mdp, 2, final=exact, discount=0.9).value[:, 0], exact)
    assert (solvers.finite_horizon(mdp, 10, discount=0.9).value[:, 0] - exact).abs().max() > 0.1  # control


def test_laws_of_the_state() -> None:
    rng = np.random.default_rng(11)
    mdp = garnet(rng, 3, 5, 2, 2, 0.9)
    policy = random_policies(rng, mdp)
    laws = solvers.state_laws(mdp, policy, 400)
    weights = (1 - 0.9) * 0.9 ** torch.arange(400, dtype=torch.float64)
    close((weights.view(1, -1, 1) * laws).sum(1), solvers.occupancy(mdp, policy))
    by_step = policy.unsqueeze(1).expand(-1, 400, -1, -1)
    close(solvers.state_laws(mdp, by_step, 400), laws)


def test_gain_and_bias_satisfy_their_equation_and_the_gain_is_the_long_run_mean() -> None:
    rng = np.random.default_rng(12)
    mdp = dirichlet(rng, 6, 5, 3, 0.5, 0.9)
    policy = random_policies(rng, mdp)
    found = solvers.average_reward(mdp, policy)
    p, r = solvers.dynamics(mdp, policy)
    close(found.gain.unsqueeze(1) + found.bias, r + torch.einsum("bst,bt->bs", p, found.bias))
    close((found.stationary * found.bias).sum(-1), torch.zeros(6, dtype=torch.float64))
    close(torch.einsum("bs,bst->bt", found.stationary, p), found.stationary)
    total = solvers.finite_horizon(mdp, 4000, policy).value[:, 0]
    close(total / 4000, found.gain.unsqueeze(1).expand_as(total), 2e-3)


def test_several_recurrent_classes_are_refused_by_name() -> None:
    split = TabularMDP.from_arrays(torch.eye(2).view(2, 1, 2), torch.zeros(2, 1), 0.9, name="split")
    joined = TabularMDP.from_arrays(torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]]), torch.zeros(2, 1), 0.9, name="joined")
    both = concatenate([joined, split])
    policy = torch.ones(2, 2, 1, dtype=torch.float64)
    assert solvers.is_unichain(both, policy).tolist() == [True, False]
    with pytest.raises(SolverError, match=r"^split: the policy has several recurrent classes"):
        solvers.average_reward(both, policy)
    assert float(solvers.average_reward(joined, policy[:1]).stationary[0, 1]) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------------------- greedy


def test_ties_are_closed_up_to_rounding_and_broken_against_the_policy() -> None:
    q = torch.tensor([[[1.0, 1.0 - 1e-12, 0.5]]], dtype=torch.float64)
    assert solvers.greedy_ties(q).tolist() == [[[True, True, False]]]
    true = torch.tensor([[[1.0, 0.2, -5.0]]], dtype=torch.float64)
    assert solvers.adverse_greedy_policy(q, true).tolist() == [[[0.0, 1.0, 0.0]]]
    assert solvers.adverse_greedy_policy(q, -true).tolist() == [[[1.0, 0.0, 0.0]]]


# ------------------------------------------------------------------------------------------------------ symmetries


@given(models(), st.integers(0, 2**32))
def test_renaming_states_and_actions_renames_the_solution(mdp, seed) -> None:
    rng = np.random.default_rng(seed)
    states = torch.from_numpy(rng.permutation(mdp.n_states))
    actions = torch.from_numpy(rng.permutation(mdp.n_actions))
    renamed = mdp.replace(
        transition=mdp.transition[:, states][:, :, actions][..., states],
        reward=mdp.reward[:, states][:, :, actions],
        start=mdp.start[:, states],
    )
    before, after = solvers.policy_iteration(mdp), solvers.policy_iteration(renamed)
    close(after.value, before.value[:, states])
    close(after.q, before.q[:, states][:, :, actions])
    policy = random_policies(rng, mdp)
    close(solvers.occupancy(renamed, policy[:, states][:, :, actions]), solvers.occupancy(mdp, policy)[:, states])


def test_control_renaming_rows_alone_is_another_problem() -> None:
    mdp = garnet(np.random.default_rng(13), 5, 6, 2, 2, 0.9)
    order = torch.tensor([1, 2, 3, 4, 5, 0])
    wrong = mdp.replace(transition=mdp.transition[:, order], reward=mdp.reward[:, order])  # successors keep their names
    gap = solvers.policy_iteration(wrong).value - solvers.policy_iteration(mdp).value[:, order]
    assert gap.abs().max() > 0.05


@given(models(), st.floats(0.01, 100), st.floats(-50, 50))
def test_scaling_and_shifting_rewards_scales_and_shifts_values(mdp, scale, shift) -> None:
    changed = mdp.replace(reward=scale * mdp.reward + shift)
    before, after = solvers.policy_iteration(mdp), solvers.policy_iteration(changed)
    expected = scale * before.value + shift / (1 - mdp.gamma)
    close(after.value, expected, 1e-9 * (1 + abs(shift)) * (1 + scale))
    policy = solvers.uniform_policy(mdp)
    close(solvers.advantage(changed, policy), scale * solvers.advantage(mdp, policy), 1e-8 * (1 + abs(shift)))


def test_control_a_shift_without_the_horizon_is_seen() -> None:
    mdp = garnet(np.random.default_rng(14), 5, 6, 2, 2, 0.9)
    after = solvers.policy_iteration(mdp.replace(reward=mdp.reward + 1)).value
    gap = after - solvers.policy_iteration(mdp).value
    close(gap, torch.full_like(gap, 10.0))
    assert (gap - 1.0).abs().min() > 1


@given(models(), st.integers(1, 3))
def test_actions_given_twice_change_no_value(mdp, copies) -> None:
    twice = mdp.replace(
        transition=torch.cat([mdp.transition] + [mdp.transition[:, :, :1]] * copies, 2),
        reward=torch.cat([mdp.reward] + [mdp.reward[:, :, :1]] * copies, 2),
    )
    close(solvers.policy_iteration(twice).value, solvers.policy_iteration(mdp).value)
    close(solvers.finite_horizon(twice, 5).value, solvers.finite_horizon(mdp, 5).value)


def test_control_the_uniform_policy_does_see_actions_given_twice() -> None:
    mdp = garnet(np.random.default_rng(15), 5, 6, 2, 2, 0.9)
    twice = mdp.replace(
        transition=torch.cat([mdp.transition, mdp.transition[:, :, :1]], 2),
        reward=torch.cat([mdp.reward, mdp.reward[:, :, :1]], 2),
    )
    gap = solvers.policy_value(twice, solvers.uniform_policy(twice)) - solvers.policy_value(
        mdp, solvers.uniform_policy(mdp)
    )
    assert gap.abs().max() > 0.01


@given(models(), models())
def test_padded_and_joined_problems_keep_their_solutions(first, second) -> None:
    joined = solvers.policy_iteration(concatenate([first, second])).value
    close(joined[: len(first), : first.n_states], solvers.policy_iteration(first).value)
    close(joined[len(first) :, : second.n_states], solvers.policy_iteration(second).value)


@given(models())
def test_independent_problems_in_one_have_block_solutions(mdp) -> None:
    one, other = mdp[0], mdp[1]
    s = mdp.n_states
    p = torch.zeros(2 * s, mdp.n_actions, 2 * s, dtype=torch.float64)
    p[:s, :, :s], p[s:, :, s:] = one.transition[0], other.transition[0]
    both = TabularMDP.from_arrays(p, torch.cat([one.reward[0], other.reward[0]]), mdp.discount[0])
    blocks = torch.cat([solvers.policy_iteration(each).value[0] for each in (one, other)])
    close(solvers.policy_iteration(both).value[0], blocks)


@given(models())
def test_without_a_future_it_is_a_bandit(mdp) -> None:
    bandit = mdp.replace(discount=torch.zeros_like(mdp.discount))
    found = solvers.policy_iteration(bandit)
    assert torch.equal(found.value, mdp.reward.amax(-1))
    assert torch.equal(solvers.occupancy(bandit, solvers.uniform_policy(bandit)), mdp.start)


@given(models())
def test_no_deterministic_policy_is_better_than_the_optimum(mdp) -> None:
    rng = np.random.default_rng(0)
    best = solvers.policy_iteration(mdp).value
    for _ in range(5):
        assert (solvers.policy_value(mdp, deterministic_policies(rng, mdp)) <= best + 1e-9).all()


# ------------------------------------------------------------------------------------------------------------ peer


@pytest.mark.peer
@pytest.mark.parametrize("method", ["value_iteration", "policy_iteration", "modified_policy_iteration"])
def test_quantecon_finds_the_same(method) -> None:
    quantecon = pytest.importorskip("quantecon")
    problems = [*textbook_mdps()]
    for mdp in random_mdps(Draw(np.random.default_rng(16)), (0.5, 0.9, 0.95, 0.99), fast=40):
        problems += list(mdp)
    for mdp in problems:
        exact = solvers.policy_iteration(mdp)
        p, r, gamma = mdp.transition[0].numpy(), mdp.reward[0].numpy(), float(mdp.discount[0])
        found = quantecon.markov.DiscreteDP(r, p, gamma).solve(method=method, epsilon=1e-9, max_iter=100_000)
        np.testing.assert_allclose(found.v, exact.value[0].numpy(), rtol=0, atol=1e-8)
        # Among equal actions another one may be chosen, so not the actions are compared but what they are worth.
        taken = torch.nn.functional.one_hot(torch.from_numpy(np.asarray(found.sigma)).long(), mdp.n_actions).double()
        close(solvers.policy_value(mdp, taken.unsqueeze(0)), exact.value, 1e-8)


@pytest.mark.peer
def test_quantecon_agrees_on_backward_induction() -> None:
    quantecon = pytest.importorskip("quantecon")
    mdp = garnet(np.random.default_rng(17), 1, 6, 3, 2, 0.9)
    peer = quantecon.markov.DiscreteDP(mdp.reward[0].numpy(), mdp.transition[0].numpy(), 0.9)
    values, _ = quantecon.markov.backward_induction(peer, 7)
    np.testing.assert_allclose(values, solvers.finite_horizon(mdp, 7, discount=0.9).value[0].numpy(), atol=1e-12)
