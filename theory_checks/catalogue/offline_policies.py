r"""Policies from fixed data: what penalties, budgets, filters and weights do to them.

Weights, filters, distances and losses are those of :mod:`corollary.offline`, called on tables or on rows of actions.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ...core.dataset import Batch
from ...kernels.neighbours import NeighbourIndex
from ...offline.a2pr import advantageous, regularisation_target
from ...offline.awac import softmax_weight
from ...offline.famo2o import family_weight
from ...offline.odice import cloning_weight
from ...offline.prdc import dataset_distance
from ...offline.rebrac import ReBRAC
from ...offline.sql import density_ratio, sparse_value_loss
from ...offline.td3 import action_error, policy_loss
from ...offline.weighted_cloning import WIDEST_WEIGHT, exponential_weight, weighted_cloning_loss
from .. import solvers
from ..check import Case, Check, Draw, Mutant, register
from ..families import deterministic_policies, random_policies
from ..mdp import TabularMDP
from ..regularised import Regulariser
from .offline import (
    Loss,
    behaviour_value,
    behaviours,
    discounted,
    horizon,
    in_sample_value,
    normalised,
    one_hot,
    sparse_threshold,
)

# ---------------------------------------------------------------------------------------- OFF-07 budgets of FamO2O

_BISECTIONS = 100


def _budgets(draw: Draw) -> Iterator[Case]:
    """Random MDPs; the data's policy with its advantages and occupancy, and a budget of divergence."""
    for case in behaviours(draw, discounts=(0.0, 0.5, 0.9), fast=60, full=200):
        budget = torch.from_numpy(10 ** draw.rng.uniform(-2, -0.5, len(case)))
        weights = solvers.occupancy(case.mdp, case.behaviour)
        yield case.with_parts(advantage=solvers.advantage(case.mdp, case.behaviour), budget=budget, visits=weights)


def tilted(behaviour: Tensor, advantage: Tensor, beta: Tensor, broadcast: str = "squeezed") -> Tensor:
    """``pi ~ pi_b exp(beta(s) A)`` with the library's weights of the family, ``[B, S, A]``; `beta` is ``[B, S]``.

    Advantages are taken relative to the best of a state, which changes no policy and keeps the cap of 100 away.
    """
    relative = (advantage - advantage.amax(-1, keepdim=True)).flatten(1)
    each = beta.unsqueeze(-1).expand_as(advantage).flatten(1)
    return normalised(behaviour * family_weight(relative, each, None, broadcast).view_as(advantage))


def _divergence(policy: Tensor, behaviour: Tensor) -> Tensor:
    """``KL(pi || pi_b)``, ``[B, S]``."""
    return (torch.special.xlogy(policy, policy) - torch.special.xlogy(policy, behaviour)).sum(-1)


def _balance(case: Case, *, common: bool) -> Tensor:
    """Inverse temperatures ``[B, S]`` that spend the budget: one for all states, or each state's own, by bisection."""
    low, high = torch.full_like(case.visits, -30.0), torch.full_like(case.visits, 30.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        spent = _divergence(tilted(case.behaviour, case.advantage, middle.exp()), case.behaviour)
        if common:
            spent = (case.visits * spent).sum(-1, keepdim=True).expand_as(spent)
        over = spent > case.budget.unsqueeze(1)
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return low.exp()


def _gain(case: Case, beta: Tensor, broadcast: str = "squeezed") -> Tensor:
    """``E_d sum_a pi A``, ``[B]``."""
    policy = tilted(case.behaviour, case.advantage, beta, broadcast)
    return (case.visits * (policy * case.advantage).sum(-1)).sum(-1)


def _one_budget(case: Case) -> Tensor:
    return _gain(case, _balance(case, common=True))


def _equal_budgets(case: Case) -> Tensor:
    return _gain(case, _balance(case, common=False))


_FAMO2O = "S. Wang et al. (FamO2O), NeurIPS 2023, arXiv 2310.17966"

register(
    Check(
        id="OFF-07a",
        title="A budget of divergence for all states together beats the same budget in each",
        claim="max E_d E_pi A subject to E_d KL(pi || pi_b) <= eps  is at least  the same subject to "
        "KL(pi(.|s) || pi_b(.|s)) <= eps in every s",
        source=f"{_FAMO2O}, theorem on point-wise and expected constraints [memory]; derived here",
        kind="inequality",
        tags=("offline", "offline.famo2o", "offline.famo2o_cql"),
        cases=_budgets,
        measure=_equal_budgets,
        bound=_one_budget,
        mutants=(Mutant("claimed to be equal", measure=_one_budget, bound=_equal_budgets, share=0.9),),
    )
)


def _dual_of_budget(case: Case, *, common: bool) -> Tensor:
    """``min over lambda of lambda eps + lambda log E_b exp(A / lambda)``, states added up by d, ``[B]``.

    The minimum over one lambda, or over one in each state, by golden sections of its logarithm.
    """
    golden = (math.sqrt(5) - 1) / 2

    def at(log_lambda: Tensor) -> Tensor:
        scale = log_lambda.exp()
        soft = torch.logsumexp(case.advantage / scale.unsqueeze(-1) + case.behaviour.log(), -1)
        each = case.visits * scale * (case.budget.unsqueeze(1) + soft)
        return each.sum(-1, keepdim=True).expand_as(each) if common else each

    low, high = torch.full_like(case.visits, -30.0), torch.full_like(case.visits, 30.0)
    for _ in range(_BISECTIONS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        keep_left = at(left) < at(right)
        low, high = torch.where(keep_left, low, left), torch.where(keep_left, right, high)
    least = at((low + high) / 2)
    return least[:, 0] if common else least.sum(-1)


register(
    Check(
        id="OFF-07b",
        title="Both optima are members of the family: one balance for all states, or one for each",
        claim="pi ~ pi_b exp(beta A) with beta = 1 / lambda from the dual attains min_lambda lambda (eps + E_d log E_b "
        "exp(A / lambda)); with one budget beta is the same in all states, with equal budgets it is not",
        source=f"{_FAMO2O}; derived here by Lagrange duality",
        kind="identity",
        tags=("offline", "offline.famo2o", "offline.famo2o_cql", "offline.awac", "offline.iql"),
        cases=_budgets,
        measure=lambda case: torch.stack([_one_budget(case), _equal_budgets(case)], 1),
        bound=lambda case: torch.stack([_dual_of_budget(case, common=c) for c in (True, False)], 1),
        tolerance=1e-7,
        mutants=(
            Mutant(
                "one balance where each state has its own budget",
                measure=lambda case: torch.stack([_one_budget(case), _one_budget(case)], 1),
                share=0.9,
            ),
            Mutant(
                "weights averaged over the balances of all rows, as in the released code",
                measure=lambda case: torch.stack(
                    [_one_budget(case), _gain(case, _balance(case, common=False), "released")], 1
                ),
                share=0.9,
            ),
        ),
    )
)


# ------------------------------------------------------------------------------------ OFF-09 distances of PRDC

_SPOTS, _KEYS = 20, 40
_TIPS = ("tip_state", "tip_action")


def _control(draw: Draw) -> Iterator[Case]:
    """Points on a line, pushed by the action with noise; a policy, and the nearest logged action to each of its own."""
    s, a = 41, 21
    where, push = torch.linspace(-1, 1, s, dtype=torch.float64), torch.linspace(-1, 1, a, dtype=torch.float64)
    for i in range(draw.number(6, 30)):
        gamma, speed, bumps = draw.rng.choice([0.0, 0.5, 0.9]), draw.rng.uniform(0.05, 0.4), draw.rng.uniform(1, 6, 2)
        aim = where.view(-1, 1, 1) + speed * push.view(1, -1, 1) * (1 + 0.5 * torch.sin(bumps[0] * where)).view(
            -1, 1, 1
        )
        p = torch.softmax(-((where - aim) ** 2) / (2 * 0.1**2), -1)
        r = torch.cos(bumps[1] * where).unsqueeze(1) - 0.2 * (push - 0.3).square()
        mdp = TabularMDP.from_arrays(p, r, gamma, name=f"line[{i}] gamma={gamma:g}")
        policy, other = (torch.from_numpy(draw.rng.integers(a, size=s)) for _ in range(2))
        rows = (torch.from_numpy(draw.rng.integers(n, size=60)) for n in (s, a))
        at, logged = (grid[row].unsqueeze(1) for grid, row in zip((where, push), rows, strict=True))
        index = NeighbourIndex(at, logged, beta=draw.rng.uniform(0.5, 4))
        row = index.query(push[policy].unsqueeze(1), state=where.unsqueeze(1)).row
        nearest = (push - logged[row]).abs().argmin(-1)
        actions = {"policy": policy, "nearest": nearest, "other": other}
        yield Case(mdp.names, mdp=mdp, push=push.unsqueeze(0), **{k: v.unsqueeze(0) for k, v in actions.items()})


def _linear_value(draw: Draw) -> Iterator[Case]:
    """Values linear in the action: state 0 is left with probability u, state 1 absorbs and pays its own action."""
    push = torch.linspace(0, 1, 11, dtype=torch.float64)
    p = torch.zeros(2, 11, 2, dtype=torch.float64)
    p[0, :, 1], p[0, :, 0], p[1, :, 1] = push, 1 - push, 1
    r = torch.stack([torch.zeros_like(push), push])
    for gamma in (0.5, 0.9):
        mdp = TabularMDP.from_arrays(p, r, gamma, [1.0, 0.0], name=f"linear value, gamma={gamma:g}")
        actions = {"policy": [[0, 10]], "nearest": [[1, 10]], "other": [[0, 0]]}
        yield Case(mdp.names, mdp=mdp, push=push.unsqueeze(0), **{k: torch.tensor(v) for k, v in actions.items()})


def _policy_of(case: Case, action: Tensor) -> Tensor:
    return one_hot(action, case.mdp.n_actions)


def _slope_in_action(case: Case, policy: Tensor) -> Tensor:
    """Lipschitz constant of ``Q^pi`` in the action, measured on the grid, ``[B]``."""
    q = solvers.policy_q(case.mdp, _policy_of(case, policy))
    return (q.diff(dim=-1).abs() / case.push.diff(dim=-1).unsqueeze(1)).amax((1, 2))


def _change_of_return(case: Case) -> Tensor:
    returns = [solvers.expected_return(case.mdp, _policy_of(case, each)) for each in (case.nearest, case.policy)]
    return (returns[0] - returns[1]).abs()


def _action_gap_bound(case: Case, slope_of: Tensor, occupied_by: Tensor) -> Tensor:
    """``L E_d |pi' - pi| / (1 - gamma)``, ``[B]``."""
    visits = solvers.occupancy(case.mdp, _policy_of(case, occupied_by))
    moved = (case.push.gather(1, case.nearest) - case.push.gather(1, case.policy)).abs()
    return _slope_in_action(case, slope_of) * (visits * moved).sum(-1) * horizon(case.mdp).squeeze(1)


_PRDC = "Y. Ran et al. (PRDC), ICML 2023, arXiv 2306.06569"

register(
    Check(
        id="OFF-09a",
        title="What it costs to play the nearest logged action instead",
        claim="deterministic policies, Q^pi L-Lipschitz in the action:  |J(pi') - J(pi)| <= L E_{d^{pi'}} "
        "|pi'(s) - pi(s)| / (1 - gamma)",
        source="derived here from the performance-difference lemma",
        kind="inequality",
        tags=("offline", "offline.prdc", "offline.td3_bc", "offline.a2pr"),
        cases=_control,
        measure=_change_of_return,
        bound=lambda case: _action_gap_bound(case, case.policy, case.nearest),
        extremal=_linear_value,
        mutants=(
            Mutant(
                "the Lipschitz constant of another policy's values",
                bound=lambda case: _action_gap_bound(case, case.other, case.nearest),
            ),
            Mutant("1 % less", bound=lambda case: 0.99 * _action_gap_bound(case, case.policy, case.nearest)),
            Mutant(
                "no horizon",
                bound=lambda case: _action_gap_bound(case, case.policy, case.nearest) * (1 - case.mdp.discount),
            ),
        ),
    )
)


# --------------------------------------------------------------------------------------------- OFF-22 cloning's error


def _one_state(draw: Draw) -> Iterator[Case]:
    """One state that pays its action: the values are linear, and cloning is off by the same everywhere."""
    push = torch.linspace(0, 1, 11, dtype=torch.float64)
    for gamma in (0.0, 0.9):
        mdp = TabularMDP.from_arrays(torch.ones(1, 11, 1), push.unsqueeze(0), gamma, name=f"one state, gamma={gamma:g}")
        actions = {"policy": [[7]], "nearest": [[4]]}
        yield Case(mdp.names, mdp=mdp, push=push.unsqueeze(0), **{k: torch.tensor(v) for k, v in actions.items()})


def _cloning_bound(case: Case, seen_by: str = "policy") -> Tensor:
    """``L sqrt(loss) / (1 - gamma)`` with BC's loss on the states of `seen_by`, L of the clone's values, ``[B]``."""
    visits = solvers.occupancy(case.mdp, _policy_of(case, case.parts[seen_by]))
    clone, expert = (case.push.gather(1, each).unsqueeze(-1) for each in (case.nearest, case.policy))
    loss = action_error(clone, expert, visits * case.mdp.n_states)
    return _slope_in_action(case, case.nearest) * loss.sqrt() * horizon(case.mdp).squeeze(1)


register(
    Check(
        id="OFF-22",
        title="What cloning's error costs",
        claim="deterministic clone of mu, Q^pi L-Lipschitz in the action:  |J(mu) - J(pi)| <= L sqrt(E_{d^mu} "
        "(pi(s) - mu(s))^2) / (1 - gamma)",
        source="derived here from the performance-difference lemma; compare T. Xu, Z. Li, Y. Yu, NeurIPS 2020, arXiv "
        "2010.11876 [memory]",
        kind="inequality",
        tags=("offline", "offline.bc", "offline.td3_bc"),
        cases=_control,
        extremal=_one_state,
        measure=_change_of_return,
        bound=_cloning_bound,
        mutants=(
            Mutant("1 % less", bound=lambda case: 0.99 * _cloning_bound(case)),
            Mutant("no horizon", bound=lambda case: _cloning_bound(case) * (1 - case.mdp.discount)),
            Mutant("the loss instead of its root", bound=lambda case: _cloning_bound(case).square()),
        ),
    )
)


def _rows_and_keys(draw: Draw, *, far: bool = False) -> Iterator[Case]:
    """Rows of a Lipschitz behaviour policy, and keys: state-action pairs, each with its nearest row.

    The policy is ``mu(s) = W s + b`` or, Lipschitz too, ``|W s + b|``. `far` moves rows off it.
    """
    for i in range(draw.number(12, 60)):
        d_s, d_a = draw.rng.integers(1, 4, 2)
        beta = 10 ** draw.rng.uniform(-0.7, 0.7)
        weights = torch.from_numpy(draw.rng.standard_normal((d_a, d_s)))
        offset = torch.from_numpy(draw.rng.standard_normal(d_a))

        def behave(states: Tensor, bent: bool = bool(i % 2), w: Tensor = weights, b: Tensor = offset) -> Tensor:
            out = states @ w.T + b
            return out.abs() if bent else out

        states = torch.from_numpy(draw.rng.standard_normal((200, d_s)))
        actions = behave(states)
        if far:
            actions = actions + torch.from_numpy(draw.rng.standard_normal(actions.shape))
        key_states = torch.from_numpy(draw.rng.standard_normal((_KEYS, d_s)))
        key_actions = behave(key_states) + torch.from_numpy(draw.rng.standard_normal((_KEYS, d_a)))
        slope = float(torch.linalg.matrix_norm(weights, 2))
        case = _nearest(f"rows[{i}]", states, actions, key_states, key_actions, beta, slope, behave(key_states))
        tips = {
            name: torch.from_numpy(draw.rng.standard_normal((_KEYS, d)))
            for name, d in zip(_TIPS, (d_s, d_a), strict=True)
        }
        yield case.with_parts(**tips)


def _nearest(
    name: str,
    states: Tensor,
    actions: Tensor,
    key_states: Tensor,
    key_actions: Tensor,
    beta: float,
    slope: float,
    behaviour: Tensor,
) -> Case:
    """One problem for each key, with the parts of its distance to the nearest row as PRDC takes them."""
    row = NeighbourIndex(states, actions, beta=beta).query(key_actions, state=key_states).row
    distance = dataset_distance(key_actions - actions[row], beta * (key_states - states[row]))
    n = len(key_states)
    return Case(
        [f"{name} key {j}" for j in range(n)],
        state=key_states,
        action=key_actions,
        row_state=states[row],
        row_action=actions[row],
        behaviour=behaviour,
        distance=distance,
        beta=torch.full((n,), beta, dtype=torch.float64),
        slope=torch.full((n,), slope, dtype=torch.float64),
    )


def _foot_of_the_perpendicular(draw: Draw) -> Iterator[Case]:
    """A line ``mu(s) = K s`` through the rows, and keys whose nearest point of it is a row."""
    for beta, slope in ((0.5, 2.0), (2.0, 1.0), (5.0, 3.0)):
        states = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)
        # In the metric (beta s, a) the line has the direction (1, K / beta), and keys lie across it.
        foot, out = states[2:-2], 0.1
        key_state, key_action = foot - out * slope / beta**2, slope * foot + out
        name = f"across a line, beta={beta:g}, K={slope:g}"
        case = _nearest(name, states, slope * states, key_state, key_action, beta, slope, slope * key_state)
        yield case.with_parts(tip_action=case.behaviour)


def _distance_to_behaviour(case: Case) -> Tensor:
    return torch.linalg.vector_norm(case.action - case.behaviour, dim=-1)


def _action_error_bound(case: Case) -> Tensor:
    return case.distance * (1 + (case.slope / case.beta).square()).sqrt()


register(
    Check(
        id="OFF-09b",
        title="PRDC's distance bounds the distance to the policy that gathered the data",
        claim="all rows a_i = mu(s_i), mu K-Lipschitz:  |pi(s) - mu(s)| <= d_beta(s, pi(s)) sqrt(1 + (K / beta)^2)",
        source=f"{_PRDC}, which has 1 + K / beta [memory]; this sharper form and that it is attained: derived here",
        kind="inequality",
        tags=("offline", "offline.prdc"),
        cases=_rows_and_keys,
        measure=_distance_to_behaviour,
        bound=_action_error_bound,
        extremal=_foot_of_the_perpendicular,
        mutants=(
            Mutant("no K / beta", bound=lambda case: case.distance),
            Mutant("1 % less", bound=lambda case: 0.99 * _action_error_bound(case)),
            Mutant(
                "K beta for K / beta",
                bound=lambda case: case.distance * (1 + (case.slope * case.beta).square()).sqrt(),
            ),
            Mutant("rows that are not the policy's", cases=lambda draw: _rows_and_keys(draw, far=True)),
        ),
    )
)


def _cone_over_actions(case: Case, action: Tensor) -> Tensor:
    """``Q = 3 |a - tip|``, as steep as its Lipschitz constant 3 allows, ``[B]``."""
    return 3 * torch.linalg.vector_norm(action - case.tip_action, dim=-1)


register(
    Check(
        id="OFF-09c",
        title="PRDC's distance bounds the difference in value to the data's action",
        claim="rows a_i = mu(s_i), mu K-Lipschitz, Q K_Q-Lipschitz in the action:  |Q(s, pi(s)) - Q(s, mu(s))| <= "
        "K_Q sqrt(1 + (K / beta)^2) d_beta(s, pi(s)) <= K_Q (1 + K / beta) d_beta(s, pi(s))",
        source=f"{_PRDC}, the last form [memory]; derived here",
        kind="inequality",
        tags=("offline", "offline.prdc"),
        cases=_rows_and_keys,
        measure=lambda case: (_cone_over_actions(case, case.action) - _cone_over_actions(case, case.behaviour)).abs(),
        bound=lambda case: 3 * _action_error_bound(case),
        extremal=_foot_of_the_perpendicular,
        mutants=(
            Mutant("no K / beta", bound=lambda case: 3 * case.distance),
            Mutant("1 % less", bound=lambda case: 2.97 * _action_error_bound(case)),
        ),
    )
)


def _one_row(draw: Draw) -> Iterator[Case]:
    """One row and one key, equally far in state and in action by the metric that balances both Lipschitz constants."""
    zero, beta = torch.zeros(1, 1, dtype=torch.float64), 2 / 3
    out = zero + 0.4
    case = _nearest("one row", zero, zero, out / beta, out, beta, 0.0, zero)
    yield case.with_parts(tip_state=case.row_state, tip_action=case.row_action)


def _overestimation(case: Case) -> Tensor:
    """``Q(s, a) - Q(s_i, a_i)`` for a cone with the Lipschitz constants 2 in the state and 3 in the action, ``[B]``."""

    def cone(state: Tensor, action: Tensor) -> Tensor:
        return 2 * torch.linalg.vector_norm(state - case.tip_state, dim=-1) + _cone_over_actions(case, action)

    return cone(case.state, case.action) - cone(case.row_state, case.row_action)


def _joint_bound(case: Case, slope: Tensor) -> Tensor:
    return math.sqrt(2) * slope * case.distance


register(
    Check(
        id="OFF-09d",
        title="PRDC's distance bounds how much a value may exceed the nearest row's",
        claim="Q Lipschitz, L_s in the state and L_a in the action:  Q(s, a) <= Q(s_i, a_i) + max(L_s / beta, L_a) "
        "sqrt(2) d_beta(s, a)",
        source="derived here",
        kind="inequality",
        tags=("offline", "offline.prdc"),
        cases=lambda draw: _rows_and_keys(draw, far=True),
        measure=_overestimation,
        bound=lambda case: _joint_bound(case, (2 / case.beta).clamp(min=3)),
        extremal=_one_row,
        mutants=(
            Mutant("no beta", bound=lambda case: _joint_bound(case, torch.full_like(case.beta, 3.0))),
            Mutant("no sqrt 2", bound=lambda case: _joint_bound(case, (2 / case.beta).clamp(min=3)) / math.sqrt(2)),
            Mutant("1 % less", bound=lambda case: 0.99 * _joint_bound(case, (2 / case.beta).clamp(min=3))),
        ),
    )
)


def _smooth_control(draw: Draw) -> Iterator[Case]:
    """Kernel and reward linear in an action from [0, 1] in every state; rewards of both signs."""
    grid = torch.linspace(0, 1, 11, dtype=torch.float64)
    n, s = draw.number(200, 2000), 6
    ends = torch.from_numpy(draw.rng.dirichlet(np.full(s, 0.3), (n, s, 2)))
    mix = torch.stack([1 - grid, grid], -1)
    p = torch.einsum("ak,nskt->nsat", mix, ends)
    r = torch.einsum("ak,nsk->nsa", mix, torch.from_numpy(draw.rng.uniform(-1, 1, (n, s, 2))))
    gamma = torch.from_numpy(draw.rng.choice([0.0, 0.5, 0.9], n))
    mdp = TabularMDP.from_arrays(p, r, gamma, name="smooth")
    actions = [torch.from_numpy(draw.rng.integers(11, size=(n, s))) for _ in range(2)]
    yield Case(mdp.names, mdp=mdp, push=grid.expand(n, -1), policy=actions[0], nearest=actions[1])


def _steep_control(draw: Draw) -> Iterator[Case]:
    """State 0 pays 1 - u, and is left with a tiny probability ~ u for state 1, which absorbs and pays -1."""
    grid = torch.linspace(0, 1, 11, dtype=torch.float64)
    for gamma, leave in ((0.5, 1e-6), (0.9, 1e-6)):
        p = torch.zeros(2, 11, 2, dtype=torch.float64)
        p[0, :, 1], p[0, :, 0], p[1, :, 1] = leave * grid, 1 - leave * grid, 1
        r = torch.stack([1 - leave * grid, torch.full_like(grid, -1.0)])
        mdp = TabularMDP.from_arrays(p, r, gamma, [1.0, 0.0], name=f"rarely left, gamma={gamma:g}")
        actions = {"policy": torch.tensor([[0, 0]]), "nearest": torch.tensor([[10, 0]])}
        yield Case(mdp.names, mdp=mdp, push=grid.unsqueeze(0), **actions)


def _smoothness_bound(case: Case, *, horizons: int = 2) -> Tensor:
    """``(K_r + gamma K_P R / (1 - gamma)) max_s |pi_1 - pi_2| / (1 - gamma)``, constants of the grid, ``[B]``."""
    step = case.push.diff(dim=-1).unsqueeze(1)
    k_r = (case.mdp.reward.diff(dim=-1).abs() / step).amax((1, 2))
    k_p = (case.mdp.transition.diff(dim=2).abs().sum(-1) / step).amax((1, 2))
    moved = (case.push.gather(1, case.nearest) - case.push.gather(1, case.policy)).abs().amax(-1)
    steps, largest = horizon(case.mdp).squeeze(1), case.mdp.reward.abs().amax((1, 2))
    return steps * (k_r + case.mdp.discount * k_p * largest * steps ** (horizons - 1)) * moved


register(
    Check(
        id="OFF-09e",
        title="Policies whose actions are close earn nearly the same, in smooth problems",
        claim="|r(s, a) - r(s, a')| <= K_r |a - a'|, |P(.|s, a) - P(.|s, a')|_1 <= K_P |a - a'|, |r| <= R:  "
        "|J(pi_1) - J(pi_2)| <= (K_r + gamma K_P R / (1 - gamma)) max_s |pi_1(s) - pi_2(s)| / (1 - gamma)",
        source=f"{_PRDC}, in this form, and that it is attained for rewards of both signs: derived here",
        kind="inequality",
        tags=("offline", "offline.prdc", "offline.a2pr", "offline.td3_bc"),
        cases=_smooth_control,
        measure=_change_of_return,
        bound=_smoothness_bound,
        extremal=_steep_control,
        mutants=(
            Mutant("1 % less", bound=lambda case: 0.99 * _smoothness_bound(case)),
            Mutant("one horizon", bound=lambda case: _smoothness_bound(case, horizons=1)),
        ),
    )
)


def _small_data(draw: Draw, beta: float) -> Iterator[Case]:
    """Twenty rows with different states, a policy's actions at them, and the actions PRDC pulls them to."""
    for i in range(draw.number(20, 100)):
        states, logged, played = (torch.from_numpy(draw.rng.standard_normal((_SPOTS, d))) for d in (3, 2, 2))
        row = NeighbourIndex(states, logged, beta=beta).query(played, row=torch.arange(_SPOTS)).row
        parts = {"logged": logged, "played": played, "target": logged[row]}
        yield Case([f"rows[{i}]"], **{name: part.unsqueeze(0) for name, part in parts.items()})


register(
    Check(
        id="OFF-09f",
        title="PRDC with a large beta is TD3+BC",
        claim="all states different:  beta -> infinity makes the nearest row the own one, and PRDC's penalty TD3+BC's",
        source=f"{_PRDC}; derived here",
        kind="identity",
        tags=("offline", "offline.prdc", "offline.td3_bc"),
        cases=lambda draw: _small_data(draw, 1e6),
        measure=lambda case: action_error(case.played, case.target),
        bound=lambda case: action_error(case.played, case.logged),
        mutants=(Mutant("beta = 0.1", cases=lambda draw: _small_data(draw, 0.1), share=0.9),),
    )
)

register(
    Check(
        id="OFF-09g",
        title="PRDC with beta 0 allows the nearest action of the data, whatever its state",
        claim="beta = 0:  the target of pi(s) is argmin_i |pi(s) - a_i|, so the penalty is least over all rows",
        source=f"{_PRDC}; derived here",
        kind="identity",
        tags=("offline", "offline.prdc"),
        cases=lambda draw: _small_data(draw, 0.0),
        measure=lambda case: action_error(case.played, case.target),
        bound=lambda case: torch.cdist(case.played, case.logged).square().amin(-1).mean(-1) / 2,
        tolerance=1e-12,
        mutants=(Mutant("beta = 2", cases=lambda draw: _small_data(draw, 2.0), share=0.9),),
    )
)


# ------------------------------------------------------------------------------------------------- OFF-10 A2PR


def _improvable(draw: Draw) -> Iterator[Case]:
    for case in behaviours(draw):
        proposal = random_policies(draw.rng, case.mdp)
        yield case.with_parts(proposal=proposal, q=solvers.policy_q(case.mdp, case.behaviour))


def filtered(behaviour: Tensor, q: Tensor, value: Tensor) -> Tensor:
    """``pi ~ pi_b 1[Q > V]`` by the library's filter, pi_b where nothing passes, ``[B, S, A]``."""
    kept = behaviour * advantageous(q, value.unsqueeze(-1).expand_as(q))
    return torch.where(kept.sum(-1, keepdim=True) > 0, normalised(kept.clamp(min=1e-300)), behaviour)


def _value_of(case: Case, policy: Tensor) -> Tensor:
    return solvers.policy_value(case.mdp, policy)


def _filtered_by(case: Case, other: Tensor) -> Tensor:
    """The data's policy restricted to actions with an advantage over another policy, ``[B, S, A]``."""
    return filtered(case.behaviour, solvers.policy_q(case.mdp, other), _value_of(case, other))


def _worst_policy(case: Case) -> Tensor:
    return solvers.policy_iteration(case.mdp.replace(reward=-case.mdp.reward)).policy


_A2PR = "T. Liu et al. (A2PR), ICML 2024, arXiv 2405.19909 (qualitative)"

register(
    Check(
        id="OFF-10a",
        title="The data's policy, restricted to actions with an advantage, is better in every state",
        claim="pi ~ pi_b 1[A^{pi_b} > 0]  (pi_b where no action has one):  V^pi >= V^{pi_b} everywhere",
        source=f"{_A2PR}; derived here from the performance-difference lemma",
        kind="inequality",
        tags=("offline", "offline.a2pr"),
        cases=_improvable,
        measure=behaviour_value,
        bound=lambda case: _value_of(case, filtered(case.behaviour, case.q, behaviour_value(case))),
        mutants=(
            Mutant(
                "actions without an advantage",
                bound=lambda case: _value_of(case, filtered(case.behaviour, -case.q, -behaviour_value(case))),
                share=0.9,
            ),
            Mutant(
                "the values of the worst policy",
                bound=lambda case: _value_of(case, _filtered_by(case, _worst_policy(case))),
            ),
        ),
    )
)


def better_of_two(behaviour: Tensor, proposal: Tensor, q: Tensor, value: Tensor) -> Tensor:
    """Probabilities of the library's target a* for ``a ~ pi_b`` and ``a~ ~ proposal``, ``[B, S, A]``."""
    a = q.shape[-1]
    logged, proposed = (x.reshape(-1) for x in torch.meshgrid(torch.arange(a), torch.arange(a), indexing="ij"))
    chosen, _, _ = regularisation_target(
        proposed.double().view(1, 1, -1, 1).expand(*q.shape[:2], -1, 1),
        logged.double().view(1, 1, -1, 1).expand(*q.shape[:2], -1, 1),
        q[..., proposed],
        q[..., logged],
        value.unsqueeze(-1).expand(-1, -1, a * a),
    )
    joint = behaviour[..., logged] * proposal[..., proposed]
    return torch.zeros_like(q).scatter_add(-1, chosen.squeeze(-1).long(), joint)


def _better_of_two(case: Case, q: Tensor) -> Tensor:
    return _value_of(case, better_of_two(case.behaviour, case.proposal, q, behaviour_value(case)))


register(
    Check(
        id="OFF-10b",
        title="The better of the logged and a proposed action is better in every state, whatever is proposed",
        claim="a ~ pi_b, a~ ~ any proposal, a* the one of larger Q^{pi_b}:  V^pi >= V^{pi_b} everywhere for pi the law "
        "of a*",
        source=f"{_A2PR}; derived here from the performance-difference lemma",
        kind="inequality",
        tags=("offline", "offline.a2pr"),
        cases=_improvable,
        measure=behaviour_value,
        bound=lambda case: _better_of_two(case, case.q),
        mutants=(
            Mutant("the worse of the two", bound=lambda case: _better_of_two(case, -case.q), share=0.9),
            Mutant("always the proposal", bound=lambda case: _value_of(case, case.proposal), share=0.5),
        ),
    )
)


def _misjudged(draw: Draw) -> Iterator[Case]:
    """Advantages known up to a largest error, uniform or against the truth."""
    for case in _improvable(draw):
        error = torch.from_numpy(10 ** draw.rng.uniform(-2, 0.5, len(case)))
        noise = torch.from_numpy(draw.rng.uniform(-1, 1, case.q.shape))
        noise[::2] = -(case.q - behaviour_value(case).unsqueeze(-1)).sign()[::2]
        yield case.with_parts(error=error, judged=case.q + error.view(-1, 1, 1) * noise)


def _all_wrong(draw: Draw) -> Iterator[Case]:
    """Both actions stay; the worse one is believed to have the advantage, the better one not."""
    for gamma, share in ((0.0, 0.4), (0.9, 0.4)):
        p = torch.ones(1, 1, 2, 1, dtype=torch.float64)
        mdp = TabularMDP.from_arrays(p, [[[0.0, -1.0]]], gamma, name=f"misjudged(gamma={gamma:g})")
        behaviour = torch.tensor([[[1 - share, share]]], dtype=torch.float64)
        error = (1 - share) * (1 + 1e-9)
        wrong = torch.tensor([-error, error], dtype=torch.float64)
        judged = solvers.policy_q(mdp, behaviour) + wrong
        yield Case(mdp.names, mdp=mdp, behaviour=behaviour, judged=judged, error=torch.tensor([error]).double())


def _loss_by_misjudgement(case: Case) -> Tensor:
    policy = filtered(case.behaviour, case.judged, behaviour_value(case))
    return solvers.expected_return(case.mdp, case.behaviour) - solvers.expected_return(case.mdp, policy)


register(
    Check(
        id="OFF-10c",
        title="What a critic's error may cost the filter",
        claim="|Q^ - Q^{pi_b}| <= eps, pi ~ pi_b 1[Q^ > V^{pi_b}]:  J(pi) >= J(pi_b) - eps / (1 - gamma)",
        source=f"{_A2PR}; derived here from the performance-difference lemma",
        kind="inequality",
        tags=("offline", "offline.a2pr"),
        cases=_misjudged,
        measure=_loss_by_misjudgement,
        bound=lambda case: case.error * horizon(case.mdp).squeeze(1),
        extremal=_all_wrong,
        mutants=(
            Mutant("claimed to lose nothing", bound=lambda case: torch.zeros_like(case.error), share=0.2),
            Mutant("1 % less", bound=lambda case: 0.99 * case.error * horizon(case.mdp).squeeze(1)),
            Mutant("no horizon", bound=lambda case: case.error),
        ),
    )
)


# ------------------------------------------------------------------------------------ OFF-11 policies from values


def cloned(behaviour: Tensor, weight: Tensor) -> Tensor:
    """The policy that clones with these weights, ``pi_b w / E_b w``; pi_b where all are 0; ``[B, S, A]``."""
    total = (behaviour * weight).sum(-1, keepdim=True)
    return torch.where(total > 0, behaviour * weight / total.clamp(min=1e-300), behaviour)


def _cloning_slope(case: Case, policy: Tensor, weight: Tensor) -> Tensor:
    """Slope of the library's cloning loss in the logits at a policy of full support, ``[B, S, A]``."""
    logits = policy.log().requires_grad_()
    surprise = -torch.log_softmax(logits, -1)
    loss = weighted_cloning_loss(weight, surprise, case.behaviour * policy.shape[-1])
    return torch.autograd.grad(loss.sum(), logits)[0]


_STRENGTH = 0.5


def _regularised_worth(case: Case, exponential: Tensor, sparse: Tensor) -> Tensor:
    """``E_pi Q - alpha KL`` and ``E_pi Q - alpha chi^2`` of cloning with the one and with the other, ``[B, 2, S]``."""
    one, other = cloned(case.behaviour, exponential), cloned(case.behaviour, sparse)
    kl = _divergence(one, case.behaviour)
    chi = (other.square() / case.behaviour).sum(-1) - 1
    worth = [(policy * case.q).sum(-1) for policy in (one, other)]
    return torch.stack([worth[0] - _STRENGTH * kl, worth[1] - _STRENGTH * chi], 1)


def _regularised_best(case: Case) -> Tensor:
    """Both maxima by duality: ``alpha log E exp(Q / alpha)``; ``lambda + alpha + E (Q - lambda)_+^2 / (4 alpha)``."""
    soft = Regulariser(divergence=_STRENGTH, log_reference=case.behaviour.log()).best_value(case.q)
    threshold = sparse_threshold(case.q, case.behaviour, _STRENGTH)
    excess = (case.behaviour * (case.q - threshold).clamp(min=0).square()).sum(-1)
    return torch.stack([soft, threshold.squeeze(-1) + _STRENGTH + excess / (4 * _STRENGTH)], 1)


def _advantages(case: Case) -> Tensor:
    return case.q - behaviour_value(case).unsqueeze(-1)


def _implicit(case: Case, loss: Loss) -> Tensor:
    """``Q - V`` with V the minimiser of a value loss of the library at these Q, ``[B, S, A]``."""
    frozen = case.mdp.replace(reward=case.q, discount=torch.zeros_like(case.mdp.discount))
    return case.q - in_sample_value(frozen, case.behaviour, loss).unsqueeze(-1)


def _sparse_residual(case: Case) -> Tensor:
    return _implicit(case, lambda u, w: sparse_value_loss(u, _STRENGTH, w))


def _weights_attain(case: Case, exponential: Callable[[Tensor], Tensor], sparse: Callable[[Tensor], Tensor]) -> Tensor:
    return _regularised_worth(case, exponential(_advantages(case) / _STRENGTH), sparse(_sparse_residual(case)))


def _ratio_weight(residual: Tensor) -> Tensor:
    return density_ratio(residual, _STRENGTH)


register(
    Check(
        id="OFF-11g",
        title="Weighted cloning solves the regularised improvement: exponential weights KL's, SQL's ratio chi-square's",
        claim="pi ~ pi_b exp(A / alpha) maximises E_pi Q - alpha KL(pi || pi_b) in every state; pi = pi_b "
        "(1 + (Q - V) / (2 alpha))_+ with SQL's V maximises E_pi Q - alpha chi^2(pi || pi_b)",
        source="X. Peng et al., 2019, arXiv 1910.00177; A. Nair et al. (AWAC), arXiv 2006.09359, equation (13); H. Xu "
        "et al. (SQL, EQL), arXiv 2303.15810; derived here by duality",
        kind="identity",
        tags=("offline", "offline.awac", "offline.iql", "offline.sql", "offline.eql", "offline.xql"),
        cases=_improvable,
        measure=lambda case: _weights_attain(case, exponential_weight, _ratio_weight),
        bound=_regularised_best,
        tolerance=1e-10,
        assumptions={
            "weights below the cap of 100": lambda case: (
                (_advantages(case) / _STRENGTH < math.log(WIDEST_WEIGHT)).flatten(1).all(1)
            )
        },
        mutants=(
            Mutant(
                "SQL's released weight max(u, 0)",
                measure=lambda case: _weights_attain(case, exponential_weight, lambda u: u.clamp(min=0)),
                share=0.9,
            ),
            Mutant(
                "EQL's released weight exp(10 u / alpha)",
                measure=lambda case: _weights_attain(case, lambda x: exponential_weight(10 * x), _ratio_weight),
                share=0.9,
            ),
        ),
    )
)


def _weights(case: Case, advantage: Tensor) -> list[Tensor]:
    """The library's weights of these advantages: IQL's and XQL's, AWAC's, SQL's two, EQL's, O-DICE's three."""
    return [
        exponential_weight(3 * advantage),
        softmax_weight(3 * advantage, case.behaviour * advantage.shape[-1]),
        advantage.clamp(0, WIDEST_WEIGHT),
        density_ratio(advantage, 0.2),
        exponential_weight(10 * advantage),
        cloning_weight(advantage, "chi2", "released"),
        cloning_weight(advantage, "chi2", "theory"),
        cloning_weight(advantage, "reverse_kl", "theory"),
    ]


def _cloned_values(case: Case, advantage: Tensor) -> Tensor:
    """Values of the policies that clone with each of the weights, ``[B, n, S]``."""
    return torch.stack([_value_of(case, cloned(case.behaviour, w)) for w in _weights(case, advantage)], 1)


register(
    Check(
        id="OFF-11h",
        title="Cloning with weights that rise with the advantage is better in every state",
        claim="pi ~ pi_b w(A^{pi_b}), w >= 0 nondecreasing, capped or not (pi_b where all weights are 0):  V^pi >= "
        "V^{pi_b} everywhere",
        source="derived here: Chebyshev's sum inequality gives E_pi A >= 0, then the performance-difference lemma",
        kind="inequality",
        tags=("offline", "offline.awac", "offline.iql", "offline.sql", "offline.eql", "offline.xql", "offline.odice"),
        cases=_improvable,
        measure=lambda case: behaviour_value(case).unsqueeze(1),
        bound=lambda case: _cloned_values(case, _advantages(case)),
        mutants=(
            Mutant(
                "advantages with the wrong sign", bound=lambda case: _cloned_values(case, -_advantages(case)), share=0.9
            ),
            Mutant(
                "values that leave out the future",
                bound=lambda case: _cloned_values(
                    case, case.mdp.reward - (case.behaviour * case.mdp.reward).sum(-1, keepdim=True)
                ),
                share=0.02,
            ),
        ),
    )
)

register(
    Check(
        id="OFF-11i",
        title="The minimiser of the weighted cloning loss",
        claim="min over pi of -E_b w log pi  is at  pi = pi_b w / E_b w: the slope in the logits vanishes there",
        source="derived here: up to a constant it is E_b w times KL(pi_b w / E_b w || pi)",
        kind="identity",
        tags=("offline", "offline.awac", "offline.iql", "offline.sql", "offline.eql", "offline.xql", "offline.odice"),
        cases=_improvable,
        measure=lambda case: _cloning_slope(
            case, cloned(case.behaviour, exponential_weight(_advantages(case))), exponential_weight(_advantages(case))
        ),
        bound=lambda case: torch.zeros_like(case.q),
        mutants=(
            Mutant(
                "the data's policy left out",
                measure=lambda case: _cloning_slope(
                    case, normalised(exponential_weight(_advantages(case))), exponential_weight(_advantages(case))
                ),
                share=0.9,
            ),
        ),
    )
)


# ------------------------------------------------------------------------------- OFF-20, OFF-21 TD3+BC and ReBRAC

_CRITIC_SCALES = (1e-3, 1.0, 1e4)


def _critics(draw: Draw) -> Iterator[Case]:
    """Batches of actions, logged and played, under critics linear in the action."""
    n, rows, d = draw.number(50, 500), 16, 2
    logged, played, slope = (torch.from_numpy(draw.rng.standard_normal((n, rows, d))) for _ in range(3))
    level = torch.from_numpy(draw.rng.standard_normal((n, rows)))
    yield Case([f"critic[{i}]" for i in range(n)], logged=logged, played=played, slope=slope, level=level)


def _value_at(case: Case, action: Tensor) -> Tensor:
    return (case.slope * action).sum(-1) + case.level


def _action_slope(case: Case, action: Tensor, alpha: float, scale: float = 1.0) -> Tensor:
    """Slope of the library's TD3+BC loss in the policy's actions, critic multiplied by `scale`, ``[B, n, d]``."""
    played = action.detach().requires_grad_()
    loss, _ = policy_loss(scale * _value_at(case, played), action_error(played, case.logged), alpha)
    return torch.autograd.grad(loss.sum(), played)[0]


def _scaled_slopes(case: Case) -> Tensor:
    return torch.stack([_action_slope(case, case.played, 2.5, scale) for scale in _CRITIC_SCALES], 1)


def _slope_closed_form(case: Case, *, normalised: bool = True) -> Tensor:
    """``-alpha grad Q / (n mean |Q|) + 2 (a - a_i) / (n d)``, without `normalised` as if 1 stood for mean |Q|."""
    rows, d = case.played.shape[1:]
    pull = 2 * (case.played - case.logged) / (rows * d)
    size = _value_at(case, case.played).abs().mean(-1).view(-1, 1, 1)
    divisors = [size if normalised else torch.full_like(size, 1 / scale) for scale in _CRITIC_SCALES]
    return torch.stack([pull - 2.5 * case.slope / (rows * divisor) for divisor in divisors], 1)


_TD3BC = "S. Fujimoto, S. Gu, NeurIPS 2021, arXiv 2106.06860, equation (5)"

register(
    Check(
        id="OFF-20a",
        title="TD3+BC's policy step does not depend on the scale of the critic",
        claim="Q -> c Q, c > 0, leaves the slope of -alpha mean Q / sg[mean |Q|] + mean (a - a_i)^2 as it is",
        source=f"{_TD3BC}; derived here",
        kind="identity",
        tags=("offline", "offline.td3_bc", "offline.prdc", "offline.a2pr", "offline.rebrac"),
        cases=_critics,
        measure=_scaled_slopes,
        bound=_slope_closed_form,
        mutants=(Mutant("Q not normalised", bound=lambda case: _slope_closed_form(case, normalised=False), share=0.9),),
    )
)

_ALPHAS = (1.0, 0.1, 0.01, 0.001)


def _stationary_actions(case: Case, alpha: float) -> Tensor:
    """Descend on the library's loss until the actions stay: ``[B, n, d]``."""
    rows, d = case.played.shape[1:]
    action = case.played
    for _ in range(60):  # each halves the distance
        action = action - 0.25 * rows * d * _action_slope(case, action, alpha)
    return action


def _displacement(case: Case) -> Tensor:
    """``|a - a_i| / alpha`` at the stationary actions, ``[B, n alphas, n rows]``."""
    found = [(_stationary_actions(case, alpha) - case.logged).norm(dim=-1) / alpha for alpha in _ALPHAS]
    return torch.stack(found, 1)


def _displacement_closed_form(case: Case, *, halved: bool = True) -> Tensor:
    d = case.played.shape[-1] / (2 if halved else 1)
    sizes = [_value_at(case, _stationary_actions(case, alpha)).abs().mean(-1, keepdim=True) for alpha in _ALPHAS]
    return torch.stack([d * case.slope.norm(dim=-1) / size for size in sizes], 1)


register(
    Check(
        id="OFF-20b",
        title="TD3+BC with a small alpha clones: actions move off the logged ones in proportion to alpha",
        claim="critic linear in the action:  stationary actions have |a - a_i| = alpha d |grad Q| / (2 mean |Q|), d "
        "dimensions; alpha -> 0 is behaviour cloning",
        source=f"{_TD3BC}; derived here",
        kind="identity",
        tags=("offline", "offline.td3_bc"),
        cases=_critics,
        measure=_displacement,
        bound=_displacement_closed_form,
        tolerance=1e-8,
        assumptions={
            "values that do not average to almost nothing": lambda case: (
                _value_at(case, case.logged).abs().mean(-1) > 0.3
            )
        },
        mutants=(Mutant("no 1/2", bound=lambda case: _displacement_closed_form(case, halved=False), share=0.9),),
    )
)

_CRITIC_BETA = 0.3


def _action_grids(draw: Draw) -> Iterator[Case]:
    """Random MDPs whose actions are points of the plane, a deterministic policy and the data's."""
    for case in behaviours(draw):
        policy = deterministic_policies(draw.rng, case.mdp)
        grid = torch.from_numpy(draw.rng.standard_normal((len(case), case.mdp.n_actions, 2)))
        yield case.with_parts(policy=policy, grid=grid)


def _penalty_met(case: Case) -> Tensor:
    """The library's penalty of the target in each next state, averaged over the data's actions there, ``[B, S]``."""
    b, s, a = case.behaviour.shape
    played = (case.policy @ case.grid).repeat_interleave(a, 1)
    logged = case.grid.unsqueeze(1).expand(-1, s, -1, -1).flatten(1, 2)
    nothing, row = torch.zeros(b, s * a, dtype=torch.float64), torch.zeros(b, s * a, dtype=torch.int64)
    batch = Batch(nothing, logged, nothing, nothing, nothing, logged, torch.ones_like(nothing), row)
    penalty = ReBRAC(critic_beta=_CRITIC_BETA).target_penalty(batch, played)
    return (case.behaviour * penalty.view(b, s, a)).sum(-1)


def _penalised_value(case: Case) -> Tensor:
    """Value of the policy where a step to s' pays ``gamma penalty(s')``: the critic's fixed point, ``[B, S]``."""
    ahead = (case.mdp.transition @ _penalty_met(case)[:, None, :, None]).squeeze(-1)
    paid = case.mdp.replace(reward=case.mdp.reward - case.mdp.discount.view(-1, 1, 1) * ahead)
    return solvers.policy_value(paid, case.policy)


def _penalised_closed_form(case: Case, *, first: bool = False, spread: bool = True) -> Tensor:
    """``V^pi - beta E sum_{t >= 1} gamma^t (|pi(s_t) - m(s_t)|^2 + Var)``; m, Var: of the data's action, ``[B, S]``."""
    mean = case.behaviour @ case.grid
    cost = (case.policy @ case.grid - mean).square().sum(-1)
    if spread:
        cost = cost + (case.behaviour @ case.grid.square() - mean.square()).sum(-1)
    total = discounted(case.mdp, case.policy, cost) - (0 if first else cost)
    return solvers.policy_value(case.mdp, case.policy) - _CRITIC_BETA * total


register(
    Check(
        id="OFF-21",
        title="ReBRAC's critic charges every later step its squared distance to the data, spread included",
        claim="the fixed point of Q = r + gamma P (Q(s', pi(s')) - beta_2 E_b |pi(s') - a'|^2) has  V = V^pi - beta_2 "
        "E sum_{t >= 1} gamma^t (|pi(s_t) - m_b(s_t)|^2 + tr Var_b(s_t)):  the first step is free, and so no policy "
        "is, not even the data's mean",
        source="D. Tarasov et al. (ReBRAC), NeurIPS 2023, arXiv 2305.09836 (the target); derived here",
        kind="identity",
        tags=("offline", "offline.rebrac"),
        cases=_action_grids,
        measure=_penalised_value,
        bound=_penalised_closed_form,
        mutants=(
            Mutant("the first step charged", bound=lambda case: _penalised_closed_form(case, first=True), share=0.9),
            Mutant(
                "the data's mean action for its actions",
                bound=lambda case: _penalised_closed_form(case, spread=False),
                share=0.5,
            ),
        ),
    )
)
