"""Dynamic and linear programs: all solvers and closed forms agree; how fast and how well they do."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from .. import solvers
from ..check import Case, Check, Draw, Mutant, register
from ..families import puterman_two_state, random_mdps, random_policies, textbook_mdps
from ..mdp import ModelError, TabularMDP, concatenate
from ..sparse import SparseMDP, solve

_TAGS = ("foundations",)
_LINPROG: Any = optimize.linprog  # its overloads take longer to read than the call
_LP_TOLERANCE = 1e-6  # HiGHS satisfies constraints to 1e-7


def _model(mdp: TabularMDP, **parts: Any) -> Case:
    return Case(mdp.names, mdp=mdp, **parts)


# -------------------------------------------------------------------------------------------- FND-18 solver agreement


def _textbook_and_random(draw: Draw) -> Iterator[Case]:
    """The named problems, padded to one size, and Garnets."""
    yield _model(concatenate(textbook_mdps()))
    yield from (_model(mdp) for mdp in random_mdps(draw, n_states=(3, 8), n_actions=(2, 4), fast=30))


def _numpy_optimum(case: Case) -> Tensor:
    """Howard's policy iteration written with NumPy, one instance after the other: V*, ``[B, 1, S]``."""
    found = []
    for p, r, gamma in zip(case.mdp.transition.numpy(), case.mdp.reward.numpy(), case.mdp.discount, strict=True):
        states, discount = np.arange(len(r)), float(gamma)
        action = np.zeros(len(r), int)
        while True:
            value = np.linalg.solve(np.eye(len(r)) - discount * p[states, action], r[states, action])
            q = r + discount * p @ value
            better = q.max(1) > q[states, action] + 1e-12 * (1 + np.abs(q).max())
            if not better.any():
                break
            action = np.where(better, q.argmax(1), action)
        found.append(value)
    return torch.from_numpy(np.stack(found)).unsqueeze(1)


def _long_horizon(mdp: TabularMDP) -> Tensor:
    """Backward induction over so many discounted steps that what follows is below 1e-11, ``[B, S]``."""
    value = torch.empty_like(mdp.reward[..., 0])
    for gamma in mdp.discount.unique().tolist():
        where = (mdp.discount == gamma).nonzero().squeeze(1)
        largest = float(mdp.reward.abs().max()) / (1 - gamma)
        steps = 1 + (int(np.log(1e-11 / largest) / np.log(gamma)) if gamma > 0 else 0)
        value[where] = solvers.finite_horizon(mdp[where], steps, discount=gamma).value[:, 0]
    return value


def _every_solver(case: Case) -> Tensor:
    """V* by each of the library's solvers and layouts, ``[B, solvers, S]``."""
    mdp: TabularMDP = case.mdp
    stay = torch.eye(mdp.n_states + 3).unsqueeze(1).expand(-1, mdp.n_actions + 2, -1)
    larger = TabularMDP.from_arrays(stay, torch.ones(mdp.n_states + 3), 0.5)  # what the others are padded to
    found = [
        solvers.value_iteration(mdp, 1e-10).value,
        solvers.modified_policy_iteration(mdp, 3, 1e-10).value,
        solvers.policy_iteration(mdp).value,
        solvers.policy_iteration(mdp, start=torch.zeros_like(mdp.reward[..., 0], dtype=torch.int64)).value,
        torch.cat([solvers.policy_iteration(one).value for one in mdp]),
        solvers.policy_iteration(concatenate([mdp, larger])).value[: len(mdp), : mdp.n_states],
        torch.from_numpy(np.stack([solve(SparseMDP.from_tabular(one), 1e-10).value for one in mdp])),
        _long_horizon(mdp),
    ]
    return torch.stack(found, 1)


register(
    Check(
        id="FND-18a",
        title="All solvers and layouts find the same optimal values",
        claim="value iteration = policy iteration = modified policy iteration = long backward induction = NumPy; "
        "batched = one by one = padded = sparse",
        source="derived here; M. Puterman, Markov Decision Processes, 1994, chapter 6",
        kind="identity",
        tags=_TAGS,
        cases=_textbook_and_random,
        measure=_every_solver,
        bound=_numpy_optimum,
        tolerance=1e-9,
        mutants=(
            Mutant(
                "gamma squared",
                measure=lambda case: _every_solver(case.with_parts(mdp=_squared(case.mdp))),
                cases=lambda draw: iter([_model(puterman_two_state())]),
                share=1.0,
            ),
            Mutant(
                "backward induction of ten steps",
                measure=lambda case: solvers.finite_horizon(case.mdp, 10).value[:, :1],
                share=0.9,
            ),
        ),
    )
)


def _squared(mdp: TabularMDP) -> TabularMDP:
    return mdp.replace(discount=mdp.discount**2)


def _small(draw: Draw) -> Iterator[Case]:
    """Textbook and random problems, every other one beginning in state 0 for certain."""
    yield from (_model(mdp) for mdp in textbook_mdps())
    for mdp in random_mdps(draw, fast=24, full=150):
        start = mdp.start.clone()
        start[::2] = torch.eye(mdp.n_states, dtype=torch.float64)[0]
        yield _model(mdp.replace(start=start))


def _program_values(case: Case) -> Tensor:
    """Optimal values of the two linear programs, in units of ``rho^T V``: ``[B, 2]``."""
    mdp = case.mdp
    primal = (mdp.start * solvers.primal_linear_program(mdp)).sum(-1)
    return torch.stack([primal, _dual_value(mdp) / (1 - mdp.discount)], 1)


def _dual_value(mdp: TabularMDP) -> Tensor:
    return (solvers.dual_linear_program(mdp) * mdp.reward).sum((-2, -1))


def _optimal_return(case: Case) -> Tensor:
    return (case.mdp.start * solvers.policy_iteration(case.mdp).value).sum(-1, keepdim=True)


def _dual_without_a_row(case: Case) -> Tensor:
    """The dual program without the balance of flow in the last state; infinite if that makes it unbounded."""
    found = []
    for one in case.mdp:
        p, r, gamma = one.transition[0].numpy(), one.reward[0].numpy(), float(one.discount)
        s, a = r.shape
        flow = np.repeat(np.eye(s), a, 1) - gamma * p.reshape(s * a, s).T
        first = (1 - gamma) * one.start[0].numpy()
        result = _LINPROG(-r.ravel(), A_eq=flow[:-1], b_eq=first[:-1], bounds=(0, None), method="highs")
        found.append(-result.fun / (1 - gamma) if result.status == 0 else np.inf)
    return torch.tensor(found, dtype=torch.float64).unsqueeze(1)


register(
    Check(
        id="FND-06a",
        title="Values and occupancies are dual linear programs",
        claim="min {rho^T V : V >= r + gamma P V} = max {<mu, r> : mu an occupancy} / (1 - gamma) = rho^T V*, "
        "also where rho is 0 in reachable states",
        source="M. Puterman, Markov Decision Processes, 1994, section 6.9",
        kind="identity",
        tags=_TAGS,
        cases=_small,
        measure=_program_values,
        bound=_optimal_return,
        tolerance=_LP_TOLERANCE,
        mutants=(
            Mutant(
                "flow of rho instead of (1 - gamma) rho",
                # The program scales with its right-hand side.
                measure=lambda case: (_dual_value(case.mdp) / (1 - case.mdp.discount) ** 2).unsqueeze(1),
                share=0.7,
            ),
            Mutant("one state's balance of flow left out", measure=_dual_without_a_row, share=0.5),
        ),
    )
)


def _first_action_program(case: Case) -> Tensor:
    """The primal program without the constraints of other actions, ``[B, S]``."""
    p, r = case.mdp.transition[:, :, :1], case.mdp.reward[:, :, :1]
    return solvers.primal_linear_program(case.mdp.replace(transition=p, reward=r))


register(
    Check(
        id="FND-06b",
        title="The primal program's solution is the optimal value",
        claim="rho > 0:  argmin {rho^T V : V >= r + gamma P V} = V*",
        source="M. Puterman, Markov Decision Processes, 1994, section 6.9",
        kind="identity",
        tags=_TAGS,
        cases=_small,
        assumptions={"rho > 0": lambda case: (case.mdp.start > 0).all(-1)},
        measure=lambda case: solvers.primal_linear_program(case.mdp),
        bound=lambda case: solvers.policy_iteration(case.mdp).value,
        tolerance=1e-5,  # a coordinate is as precise as the program's value is, divided by its weight rho(s)
        mutants=(Mutant("constraints of the first action only", measure=_first_action_program, share=0.5),),
        not_mutants={
            "rho = 0 somewhere": "V* is then one minimiser among many, and on some draws the one the solver ends in"
        },
    )
)


def _mixed_occupancies(draw: Draw) -> Iterator[Case]:
    """Averages of the occupancies of two policies: occupancies that no policy was chosen for."""
    for mdp in random_mdps(draw):
        pair = [random_policies(draw.rng, mdp, 0.5) for _ in range(2)]
        both = [solvers.occupancy(mdp, policy).unsqueeze(-1) * policy for policy in pair]
        yield _model(mdp, measure=(both[0] + both[1]) / 2, pair=torch.stack(pair, 1))


def _conditional(case: Case) -> Tensor:
    """The policy ``mu(s, a) / sum_a mu(s, a)``."""
    return case.measure / case.measure.sum(-1, keepdim=True)


def _occupied(case: Case, policy: Tensor) -> Tensor:
    return solvers.occupancy(case.mdp, policy).unsqueeze(-1) * policy


register(
    Check(
        id="FND-06c",
        title="Every measure that balances the flow is the occupancy of its conditional policy",
        claim="mu >= 0, sum_a mu = (1 - gamma) rho + gamma mu P, pi = mu / sum_a mu:  d^pi(s) pi(a|s) = mu(s, a)",
        source="M. Puterman, Markov Decision Processes, 1994, section 6.9",
        kind="identity",
        tags=_TAGS,
        cases=_mixed_occupancies,
        measure=lambda case: _occupied(case, _conditional(case)),
        bound=lambda case: case.measure,
        mutants=(
            Mutant(
                "the mean of the policies instead of their occupancies",
                measure=lambda case: _occupied(case, case.pair.mean(1)),
                share=0.7,
            ),
        ),
    )
)


def _slackness(case: Case, occupancy: Tensor) -> Tensor:
    optimum = solvers.policy_iteration(case.mdp)
    return occupancy * (optimum.value.unsqueeze(-1) - optimum.q)


register(
    Check(
        id="FND-06d",
        title="Complementary slackness",
        claim="mu an optimal occupancy:  mu(s, a) (V*(s) - Q*(s, a)) = 0 for all s, a",
        source="M. Puterman, Markov Decision Processes, 1994, section 6.9",
        kind="identity",
        tags=_TAGS,
        cases=_small,
        measure=lambda case: _slackness(case, solvers.dual_linear_program(case.mdp)),
        bound=lambda case: torch.zeros(len(case), dtype=torch.float64).view(-1, 1, 1),
        tolerance=_LP_TOLERANCE,
        mutants=(
            Mutant(
                "occupancy of the uniform policy",
                measure=lambda case: _slackness(case, _occupied(case, solvers.uniform_policy(case.mdp))),
                share=0.8,
            ),
        ),
    )
)


def _known(draw: Draw) -> Iterator[Case]:
    for mdp in textbook_mdps():
        if mdp.known:
            yield _model(mdp, known=mdp.known)


def _recomputed(case: Case) -> Tensor:
    """Every known number of the problem, by the solvers, in the order of `_stated`."""
    mdp, known = case.mdp, case.known
    makers: dict[str, Callable[[], Tensor]] = {
        "optimal value": lambda: solvers.policy_iteration(mdp).value[0],
        "optimal value at start": lambda: solvers.policy_iteration(mdp).value[0, known["start"]],
        "gain": lambda: solvers.average_reward(mdp, _always(mdp, mdp.n_actions - 1)).gain,
        "finite horizon 3": lambda: solvers.finite_horizon(mdp, 3).value[0].reshape(-1),
        "undiscounted optimum": lambda: (mdp.start * solvers.finite_horizon(mdp, known["horizon"]).value[:, 0]).sum(-1),
    }
    return torch.cat([makers[name]().reshape(-1) for name in makers if name in known]).unsqueeze(0)


def _always(mdp: TabularMDP, action: int) -> Tensor:
    return torch.eye(mdp.n_actions, dtype=torch.float64)[action].expand(mdp.reward.shape)


def _stated(case: Case) -> Tensor:
    names = ("optimal value", "optimal value at start", "gain", "finite horizon 3", "undiscounted optimum")
    numbers = [torch.tensor(case.known[name], dtype=torch.float64).reshape(-1) for name in names if name in case.known]
    return torch.cat(numbers).unsqueeze(0)


register(
    Check(
        id="FND-18b",
        title="Closed-form values of textbook problems are reproduced",
        claim="optimal values, gains and finite-horizon values of the named problems as their sources give them",
        source="the sources named with each problem in families.py; exact fractions where the problem has them",
        kind="identity",
        tags=_TAGS,
        cases=_known,
        measure=_recomputed,
        bound=_stated,
        tolerance=1e-8,
        mutants=(
            Mutant(
                "gamma squared",
                measure=lambda case: _recomputed(case.with_parts(mdp=_squared(case.mdp))),
                cases=lambda draw: (c for c in _known(draw) if any("optimal" in name for name in c.known)),
                share=0.5,
            ),
        ),
    )
)


def _broken(draw: Draw) -> Iterator[Case]:
    """Models with one thing wrong."""
    p, r = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    scaled, terminal, negative = p.clone(), p.clone(), p.clone()
    scaled[1, 0] *= 1.001
    terminal[2] = 0
    negative[0, 1] = torch.tensor([-0.1, 0.6, 0.5])
    models = {
        "a row scaled by 1.001": (scaled, r, 0.9),
        "a terminal state with empty rows": (terminal, r, 0.9),
        "a negative probability": (negative, r, 0.9),
        "gamma = 1": (p, r, 1.0),
        "a reward that is no number": (p, r.masked_fill(r == 0, torch.nan), 0.9),
        "a reward of another size": (p, r[:2], 0.9),
    }
    yield Case(list(models), models=list(models.values()))


def _refused(case: Case) -> Tensor:
    """1 where making the model raises, ``[B]``."""
    found = []
    for p, r, gamma in case.models:
        try:
            TabularMDP.from_arrays(p, r, gamma)
            found.append(0.0)
        except ModelError:
            found.append(1.0)
    return torch.tensor(found, dtype=torch.float64)


def _sound(draw: Draw) -> Iterator[Case]:
    p = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    yield Case(["sound"], models=[(p, torch.zeros(3, 2), 0.9)])


register(
    Check(
        id="FND-18c",
        title="What is no Markov decision process is refused",
        claim="rows that do not sum to 1, negative probabilities, gamma = 1, rewards that do not fit: an error",
        source="derived here",
        kind="fact",
        tags=_TAGS,
        cases=_broken,
        measure=_refused,
        bound=lambda case: torch.ones(len(case), dtype=torch.float64),
        mutants=(Mutant("a sound model", cases=_sound, share=1.0),),
    )
)


# ------------------------------------------------------------------------------------- FND-09 rates of dynamic programs


def _first_policies(draw: Draw) -> Iterator[Case]:
    """A random deterministic first policy."""
    for mdp in random_mdps(draw):
        yield _model(mdp, action=torch.from_numpy(draw.rng.integers(mdp.n_actions, size=(len(mdp), mdp.n_states))))


_IMPROVEMENTS = 6


def _improved(mdp: TabularMDP, action: Tensor) -> tuple[Tensor, Tensor]:
    """Values of a policy and the next policy, by one step of the library's policy iteration."""
    step = solvers.policy_iteration(mdp, 1, action)
    return step.value, step.action


def _improved_in_one_state(mdp: TabularMDP, action: Tensor) -> tuple[Tensor, Tensor]:
    """The same, but only the first state in which another action is better changes."""
    value, better = _improved(mdp, action)
    first = (better != action).double().argmax(-1, keepdim=True)
    return value, action.scatter(-1, first, better.gather(-1, first))


_Step = Callable[[TabularMDP, Tensor], tuple[Tensor, Tensor]]


def _policy_values(case: Case, step: _Step = _improved) -> Tensor:
    """``V^{pi_k}`` for k = 0, ..., K, ``[B, K + 1, S]``."""
    action, values = case.action, []
    for _ in range(_IMPROVEMENTS + 1):
        value, action = step(case.mdp, action)
        values.append(value)
    return torch.stack(values, 1)


def _errors(case: Case, values: Tensor) -> Tensor:
    """``max_s |V* - V_k|``, ``[B, K]``."""
    return (solvers.policy_iteration(case.mdp).value.unsqueeze(1) - values).abs().amax(-1)


register(
    Check(
        id="FND-09a",
        title="A step of policy iteration gains at least what a step of value iteration would",
        claim="max |V* - V^{pi_{k+1}}| <= gamma max |V* - V^{pi_k}|, pi_{k+1} greedy in V^{pi_k}",
        source="M. Puterman, Markov Decision Processes, 1994, section 6.4",
        kind="inequality",
        tags=_TAGS,
        cases=_first_policies,
        measure=lambda case: _errors(case, _policy_values(case))[:, 1:],
        bound=lambda case: case.mdp.gamma * _errors(case, _policy_values(case))[:, :-1],
        tolerance=1e-10,
        mutants=(
            Mutant(
                "improved in one state only",
                measure=lambda case: _errors(case, _policy_values(case, _improved_in_one_state))[:, 1:],
                bound=lambda case: case.mdp.gamma * _errors(case, _policy_values(case, _improved_in_one_state))[:, :-1],
                share=0.3,
            ),
            Mutant(
                "gamma squared",
                bound=lambda case: case.mdp.gamma**2 * _errors(case, _policy_values(case))[:, :-1],
            ),
        ),
    )
)


def _backups(case: Case, values: Tensor) -> Tensor:
    return torch.stack([solvers.backup(case.mdp, value) for value in values.unbind(1)], 1)


def _descent(case: Case, step: _Step = _improved) -> Tensor:
    """The largest amounts by which ``V^{pi_k} <= T V^{pi_k}`` and ``T V^{pi_k} <= V^{pi_{k+1}}`` fail, ``[B, 2]``."""
    values = _policy_values(case, step)
    ahead = _backups(case, values)
    return torch.stack([(values - ahead).amax((1, 2)), (ahead[:, :-1] - values[:, 1:]).amax((1, 2))], 1)


register(
    Check(
        id="FND-09b",
        title="Policy iteration never gets worse",
        claim="V^{pi_{k+1}} >= T V^{pi_k} >= V^{pi_k} everywhere, pi_{k+1} greedy in V^{pi_k}",
        source="M. Puterman, Markov Decision Processes, 1994, section 6.4",
        kind="inequality",
        tags=_TAGS,
        cases=_first_policies,
        measure=_descent,
        bound=lambda case: torch.zeros(len(case), 1, dtype=torch.float64),
        tolerance=1e-10,
        mutants=(
            Mutant(
                "improved in one state only", measure=lambda case: _descent(case, _improved_in_one_state), share=0.3
            ),
        ),
    )
)

register(
    Check(
        id="FND-09c",
        title="Policy iteration stops",
        claim="it evaluates at most A^S policies, whatever the first one",
        source="R. Howard, 1960; no policy comes twice",
        kind="inequality",
        tags=_TAGS,
        cases=_first_policies,
        measure=lambda case: solvers.policy_iteration(case.mdp, start=case.action).iterations.double(),
        bound=lambda case: torch.full((len(case),), float(case.mdp.n_actions) ** case.mdp.n_states).double(),
        loose="it takes 2 to 6 evaluations where the bound allows thousands",
        mutants=(Mutant("one policy is enough", bound=lambda case: torch.ones(len(case), dtype=torch.float64)),),
    )
)


def _first_values(draw: Draw) -> Iterator[Case]:
    """First values for value iteration; every fourth is the optimum plus a constant, where the rate is attained."""
    for mdp in random_mdps(draw):
        value = 5 * torch.from_numpy(draw.rng.standard_normal((len(mdp), mdp.n_states)))
        value[::4] = solvers.policy_iteration(mdp).value[::4] + 5.0
        yield _model(mdp, value=value)


_SWEEPS = (1, 2, 5, 20)


def _swept(case: Case, sweeps: int = 0) -> Tensor:
    """Values after 1, 2, 5, 20 steps of value iteration (or of its modification), ``[B, 4, S]``."""
    after = [solvers.modified_policy_iteration(case.mdp, sweeps, 1e-300, steps, case.value).value for steps in _SWEEPS]
    return torch.stack(after, 1)


def _geometric(case: Case, offset: int = 0) -> Tensor:
    """``gamma^k max |V* - V_0|``, ``[B, 4]``."""
    first = _errors(case, case.value.unsqueeze(1))
    return case.mdp.gamma ** torch.tensor([k + offset for k in _SWEEPS], dtype=torch.float64) * first


register(
    Check(
        id="FND-09d",
        title="Value iteration converges at the rate gamma",
        claim="max |V* - V_k| <= gamma^k max |V* - V_0|",
        source="M. Puterman, Markov Decision Processes, 1994, Theorem 6.3.3",
        kind="inequality",
        tags=_TAGS,
        cases=_first_values,
        measure=lambda case: _errors(case, _swept(case)),
        bound=_geometric,
        tolerance=1e-10,
        mutants=(Mutant("a step ahead", bound=lambda case: _geometric(case, 1)),),
    )
)


def _adverse_loss(case: Case) -> Tensor:
    """``max_s V* - V^pi`` for pi greedy in the case's values, ties broken against it."""
    optimum = solvers.policy_iteration(case.mdp)
    policy = solvers.adverse_greedy_policy(solvers.q_values(case.mdp, case.value), optimum.q)
    return (optimum.value - solvers.policy_value(case.mdp, policy)).amax(-1)


def _span_of_a_step(case: Case) -> Tensor:
    moved = solvers.backup(case.mdp, case.value) - case.value
    return moved.amax(-1) - moved.amin(-1)


def _nearly_solved(draw: Draw) -> Iterator[Case]:
    for case in _first_values(draw):
        steps = int(draw.rng.integers(1, 10))
        yield case.with_parts(value=solvers.value_iteration(case.mdp, 1e-300, steps, case.value).value)


def _tied(draw: Draw) -> Iterator[Case]:
    """State 0: action 0 leads to the absorbing state 1, action 1 stays and pays -2 gamma; both look the same."""
    for gamma in (0.5, 0.9, 0.99):
        p = torch.zeros(2, 2, 2, dtype=torch.float64)
        p[0, 0, 1] = p[0, 1, 0] = p[1, :, 1] = 1
        r = torch.tensor([[0.0, -2 * gamma], [0.0, 0.0]], dtype=torch.float64)
        mdp = TabularMDP.from_arrays(p, r, gamma, name=f"tied(gamma={gamma:g})")
        value = torch.tensor([[1 - 2 * gamma, -1.0]], dtype=torch.float64) / (1 - gamma)
        yield _model(mdp, value=value)


register(
    Check(
        id="FND-09e",
        title="Stopping by the span makes the greedy policy as good as was asked",
        claim="pi greedy in V:  max V* - V^pi <= gamma sp(TV - V) / (1 - gamma), "
        "so sp <= eps (1 - gamma) / gamma is enough",
        source="M. Puterman, Markov Decision Processes, 1994, section 6.6; bounds of J. MacQueen, 1966",
        kind="inequality",
        tags=_TAGS,
        cases=_nearly_solved,
        extremal=_tied,
        measure=_adverse_loss,
        bound=lambda case: case.mdp.discount * _span_of_a_step(case) / (1 - case.mdp.discount),
        mutants=(
            Mutant("without (1 - gamma)", bound=lambda case: case.mdp.discount * _span_of_a_step(case)),
            Mutant(
                "1 % less",
                bound=lambda case: 0.99 * case.mdp.discount * _span_of_a_step(case) / (1 - case.mdp.discount),
            ),
        ),
    )
)


def _from_below(draw: Draw) -> Iterator[Case]:
    """First values with ``V <= TV``: those of a policy, or a constant below all of them."""
    for mdp in random_mdps(draw):
        value = solvers.policy_value(mdp, random_policies(draw.rng, mdp))
        value[::2] = -1.0
        yield _model(mdp, value=value)


def _not_monotone(case: Case) -> Tensor:
    """The largest decrease between values after 0, 1, 2, 5, 20 steps with three sweeps each, and excess over V*."""
    values = torch.cat([case.value.unsqueeze(1), _swept(case, 3)], 1)
    optimum = solvers.policy_iteration(case.mdp).value.unsqueeze(1)
    return torch.stack([(values[:, :-1] - values[:, 1:]).amax((1, 2)), (values - optimum).amax((1, 2))], 1)


register(
    Check(
        id="FND-09f",
        title="Modified policy iteration rises to the optimum from below",
        claim="V_0 <= T V_0:  V_k <= V_{k+1} <= V* everywhere, with any number of sweeps (three here)",
        source="M. Puterman, Markov Decision Processes, 1994, Theorem 6.5.5",
        kind="inequality",
        tags=_TAGS,
        cases=_from_below,
        assumptions={"V_0 <= T V_0": lambda case: (case.value <= solvers.backup(case.mdp, case.value) + 1e-12).all(-1)},
        measure=_not_monotone,
        bound=lambda case: torch.zeros(len(case), 1, dtype=torch.float64),
        tolerance=1e-10,
        mutants=(Mutant("V_0 is any function", cases=_first_values, share=0.5),),
    )
)
