r"""Values from fixed data: what pessimism, conservatism, duality and in-sample losses are on solvable problems.

The losses, penalties and gradients are those of :mod:`corollary.offline`, called on tables: a row for every action of
every state, weighted with the data's policy, so that a mean over rows is an expectation.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.actor_critic import critic_loss
from ...offline.cql import conservative_gap
from ...offline.eql import LARGEST_EXPONENT, exponential_value_loss
from ...offline.iql import expectile_loss
from ...offline.odice import Divergence, PolicyWeight, cloning_weight, conjugate, dual_terms, orthogonal_part
from ...offline.sql import sparse_value_loss
from ...offline.weighted_cloning import WIDEST_WEIGHT
from ...offline.xql import XQLConfig, gumbel_loss
from .. import solvers
from ..check import Case, Check, Draw, Mutant, register
from ..families import dirichlet, random_mdps, random_policies
from ..mdp import TabularMDP
from ..regularised import Regulariser
from ..regularised import policy_iteration as regularised_optimum

Loss = Callable[[Tensor, Tensor], Tensor]
"""A value loss of the library: residuals ``Q - v [..., A]`` and the weights of their rows, to ``[...]``."""


def horizon(mdp: TabularMDP) -> Tensor:
    """``1 / (1 - gamma)``, ``[B, 1]``."""
    return 1 / (1 - mdp.gamma)


def one_hot(action: Tensor, n_actions: int) -> Tensor:
    """Actions ``[...]`` as probabilities ``[..., A]``."""
    return torch.nn.functional.one_hot(action, n_actions).double()


def normalised(weights: Tensor) -> Tensor:
    """Weights ``[..., A]`` as probabilities."""
    return weights / weights.sum(-1, keepdim=True)


def behaviours(draw: Draw, *, holes: bool = False, **sizes: Any) -> Iterator[Case]:
    """Random MDPs with the policy that gathered the data; with `holes` it never takes some of the actions."""
    for mdp in random_mdps(draw, **sizes):
        behaviour = random_policies(draw.rng, mdp)
        if holes:
            kept = torch.from_numpy(draw.rng.random(behaviour.shape) < 0.6)
            kept |= one_hot(behaviour.argmax(-1), mdp.n_actions).bool()
            behaviour = normalised(behaviour * kept)
        yield Case(mdp.names, mdp=mdp, behaviour=behaviour)


def discounted(mdp: TabularMDP, policy: Tensor, amount: Tensor) -> Tensor:
    """``(I - gamma P_pi)^-1 x``: what is met on the way, discounted, for amounts ``[B, S]``."""
    p, _ = solvers.dynamics(mdp, policy)
    identity = torch.eye(mdp.n_states, dtype=torch.float64)
    return torch.linalg.solve(identity - mdp.discount.view(-1, 1, 1) * p, amount)


def behaviour_value(case: Case) -> Tensor:
    """Value of the data's policy, ``[B, S]``."""
    return solvers.policy_value(case.mdp, case.behaviour)


# ------------------------------------------------------------------------------------------------ OFF-01 pessimism

_STEPS = 5


def _pessimistic_iterations(draw: Draw, scale: float = 1.0) -> Iterator[Case]:
    """Counts of 1 to 30 samples of each pair; bonuses are 1 to 1.5 times the true error, times `scale`."""
    n, s, a = draw.number(400, 1500), 5, 3
    mdp = dirichlet(draw.rng, n, s, a, 0.5, 0.0)
    counts = draw.rng.integers(1, 31, (n, s, a))
    p_hat = torch.from_numpy(draw.rng.multinomial(counts, mdp.transition.numpy()) / counts[..., None])
    r_hat = torch.from_numpy(draw.rng.binomial(counts, mdp.reward.numpy()) / counts)
    inflation = torch.from_numpy(scale * draw.rng.uniform(1, 1.5, (n, _STEPS, s, a)))
    yield _pessimistic_case(mdp, p_hat, r_hat, _STEPS, lambda h, error: inflation[:, h] * error)


def _pessimistic_case(
    mdp: TabularMDP, p_hat: Tensor, r_hat: Tensor, steps: int, bonus_of: Callable[[int, Tensor], Tensor]
) -> Case:
    """Run pessimistic value iteration; the bonus of a step is a function of the true error there."""
    values, bonuses, actions = [torch.zeros_like(mdp.start)], [], []
    for h in reversed(range(steps)):
        ahead = values[-1]
        error = (r_hat - mdp.reward).abs() + ((p_hat - mdp.transition) @ ahead[:, None, :, None]).squeeze(-1).abs()
        bonus = bonus_of(h, error)
        q = (r_hat + (p_hat @ ahead[:, None, :, None]).squeeze(-1) - bonus).clamp(0, steps - h)
        value, action = q.max(-1)
        values.append(value)
        bonuses.append(bonus)
        actions.append(action)
    parts = {"bonus": bonuses, "value": values[1:], "action": actions}
    stacked = {name: torch.stack(each[::-1], 1) for name, each in parts.items()}
    return Case(mdp.names, mdp=mdp, p_hat=p_hat, r_hat=r_hat, **stacked)


def _bonus_covers_error(case: Case) -> Tensor:
    """Whether ``|r^ - r| + |(P^ - P) V^_{h+1}| <= Gamma_h`` everywhere, up to rounding, ``[B]``."""
    ahead = torch.cat([case.value[:, 1:], torch.zeros_like(case.value[:, :1])], 1)  # [B, H, S]
    moved = torch.einsum("bsat,bht->bhsa", case.p_hat - case.mdp.transition, ahead).abs()
    error = (case.r_hat - case.mdp.reward).abs().unsqueeze(1) + moved
    return (error <= case.bonus + 1e-12).flatten(1).all(1)


def _pessimistic_policy_value(case: Case) -> Tensor:
    """``V_h`` of the greedy policy in the true problem, ``[B, H, S]``."""
    policy = one_hot(case.action, case.mdp.n_actions)
    return solvers.finite_horizon(case.mdp, case.action.shape[1], policy).value[:, :-1]


def _total_bonus(case: Case, action: Tensor) -> Tensor:
    """``sum_h E_pi[Gamma_h(s_h, a_h) | s_0 = s]`` for actions ``[B, H, S]``, ``[B, S]``."""
    total = torch.zeros_like(case.mdp.start)
    for h in reversed(range(action.shape[1])):
        chosen = one_hot(action[:, h], case.mdp.n_actions)
        p, _ = solvers.dynamics(case.mdp, chosen)
        total = (chosen * case.bonus[:, h]).sum(-1) + (p @ total.unsqueeze(-1)).squeeze(-1)
    return total


def _pessimistic_loss(case: Case) -> Tensor:
    optimum = solvers.finite_horizon(case.mdp, case.action.shape[1]).value[:, 0]
    return optimum - _pessimistic_policy_value(case)[:, 0]


def _pessimistic_bound(case: Case) -> Tensor:
    return 2 * _total_bonus(case, solvers.finite_horizon(case.mdp, case.action.shape[1]).action)


def _worst_estimate(draw: Draw) -> Iterator[Case]:
    """One step, two actions: the better one is underestimated by its bonus, then pays it; the other is known."""
    for gap in (0.2, 0.05):
        reward = torch.tensor([[[0.9 - 2 * gap + 1e-9, 0.9]]], dtype=torch.float64)
        mdp = TabularMDP.from_arrays(torch.ones(1, 1, 2, 1), reward, 0.0, name=f"underestimated by {gap:g}")
        r_hat = reward - torch.tensor([0.0, gap], dtype=torch.float64)
        yield _pessimistic_case(mdp, mdp.transition, r_hat, 1, lambda h, error: error)


_COVERED = {"the bonus covers the error of the estimated model": _bonus_covers_error}
_PESSIMISM = "Y. Jin, Z. Yang, Z. Wang, ICML 2021, arXiv 2012.15085, Theorem 4.2"

register(
    Check(
        id="OFF-01a",
        title="Pessimistic value iteration does not overestimate its policy",
        claim="Q^_h = clip(r^ + P^ V^_{h+1} - Gamma_h, 0, H - h), |r^ - r| + |(P^ - P) V^_{h+1}| <= Gamma_h, pi^ "
        "greedy:  V^_h <= V_h^{pi^} for all h, s",
        source=_PESSIMISM,
        kind="inequality",
        tags=("offline",),
        cases=_pessimistic_iterations,
        measure=lambda case: case.value,
        bound=_pessimistic_policy_value,
        assumptions=_COVERED,
        mutants=(
            Mutant("three tenths of the bonus", cases=lambda draw: _pessimistic_iterations(draw, 0.3), share=0.3),
        ),
    )
)

register(
    Check(
        id="OFF-01b",
        title="Loss of pessimistic value iteration: what the optimal policy visits must be known, and nothing else",
        claim="under the same event  0 <= V*_0(s) - V_0^{pi^}(s) <= 2 sum_h E_{pi*}[Gamma_h(s_h, a_h) | s_0 = s]",
        source=_PESSIMISM,
        kind="inequality",
        tags=("offline",),
        cases=_pessimistic_iterations,
        measure=_pessimistic_loss,
        bound=_pessimistic_bound,
        assumptions=_COVERED,
        extremal=_worst_estimate,
        mutants=(
            Mutant("1 % less", bound=lambda case: 0.99 * _pessimistic_bound(case)),
            Mutant("the bonus that pi^ meets, for that of pi*", bound=lambda case: 2 * _total_bonus(case, case.action)),
        ),
    )
)

_MISS = 0.2


def _hoeffding_bonuses(draw: Draw, scale: float = 1.0) -> Iterator[Case]:
    """Independent data sets with 10 samples of each (h, s, a): whether Hoeffding's bonus misses the error anywhere."""
    runs, steps, s, a, samples = draw.number(400, 2000), 2, 2, 2, 10
    mdp = dirichlet(draw.rng, 1, s, a, 1.0, 0.0)
    reward, p = np.full((s, a), 0.5), mdp.transition[0].numpy()
    ahead, missed = np.zeros((runs, s)), np.zeros(runs, bool)
    for h in reversed(range(steps)):
        size = steps - h  # r + V^ lies in [0, H - h]: V^ was clipped
        bonus = scale * size * math.sqrt(math.log(2 * s * a * steps / _MISS) / (2 * samples))
        p_hat = draw.rng.multinomial(samples, p, (runs, s, a)) / samples
        r_hat = draw.rng.binomial(samples, reward, (runs, s, a)) / samples
        estimate, truth = r_hat + np.einsum("nsat,nt->nsa", p_hat, ahead), reward + np.einsum("sat,nt->nsa", p, ahead)
        missed |= (np.abs(estimate - truth) > bonus).any((1, 2))
        ahead = np.clip(estimate - bonus, 0, size).max(-1)
    yield Case(["two steps, two states"], missed=torch.from_numpy(missed.astype(np.float64)).unsqueeze(0))


register(
    Check(
        id="OFF-01c",
        title="Hoeffding's bonus covers the error of a counted model",
        claim="n independent samples of each (h, s, a), Gamma_h = (H - h) sqrt(log(2 S A H / delta) / (2 n)):  "
        "P(|r^ + P^ V^_{h+1} - r - P V^_{h+1}| > Gamma_h anywhere) <= delta",
        source="W. Hoeffding, JASA 1963, Theorem 2, and the union bound; V^_{h+1} is independent of the data of step h",
        kind="probability",
        tags=("offline",),
        cases=_hoeffding_bonuses,
        measure=lambda case: case.missed,
        bound=lambda case: torch.full((len(case),), _MISS, dtype=torch.float64),
        mutants=(Mutant("a third of the bonus", cases=lambda draw: _hoeffding_bonuses(draw, 1 / 3)),),
        loose="a union bound, and Hoeffding's inequality knows the range of the values only",
    )
)


# --------------------------------------------------------------------------------------------------- OFF-02 CQL

_SWEEPS = 300  # of a 0.9-contraction: 0.9^300 = 2e-14
_CONSERVATISM = 0.4


def _conservative_pairs(draw: Draw) -> Iterator[Case]:
    """The data's policy and the policy to be evaluated, in part mixtures near it."""
    for case in behaviours(draw, discounts=(0.0, 0.5, 0.9), n_states=(5,), n_actions=(3,), fast=60, full=240):
        other = random_policies(draw.rng, case.mdp)
        other[::2] = 0.7 * case.behaviour[::2] + 0.3 * other[::2]
        yield case.with_parts(policy=other)


def _same_policy(draw: Draw) -> Iterator[Case]:
    for case in behaviours(draw, discounts=(0.0, 0.5, 0.9), n_states=(4,), n_actions=(3,), fast=12, full=24):
        yield case.with_parts(policy=case.behaviour)


def conservative_q(
    mdp: TabularMDP, behaviour: Tensor, policy: Tensor, weight: float, *, pushed_up: bool = True
) -> Tensor:
    """Descend on CQL's loss of a table until nothing moves: Q, ``[B, S, A]``, for discounts up to 0.9.

    The loss is the library's ``critic_loss + weight * gap``, rows ``(s, a)`` weighted with the data's policy and
    targets ``r + gamma P E_pi Q``. All actions are "sampled", with densities ``exp(Q(s, a)) / pi(a|s)``, at which the
    soft-max in the gap has the weights pi. Without `pushed_up` the gap lacks ``- Q(s, a)``.
    """
    q = torch.zeros_like(mdp.reward)
    rows = behaviour.flatten(1)
    for _ in range(_SWEEPS):
        target = solvers.q_values(mdp, (policy * q).sum(-1))
        q = q.requires_grad_()
        density = q.detach() - policy.log()
        logged = q if pushed_up else torch.zeros_like(q)
        gap = conservative_gap(logged.mT, q.mT.unsqueeze(1), density.mT.unsqueeze(1), 1.0)  # [B, A, S]
        errors = critic_loss(q.flatten(1).unsqueeze(1), target.flatten(1), rows)
        loss = errors + weight * (rows * gap.mT.flatten(1)).mean(-1)
        (slope,) = torch.autograd.grad(loss.sum(), q)
        # Divided by the curvature 2 w / (S A): a full step, which solves for Q at these targets.
        q = (q - slope * rows.shape[1] / (2 * behaviour)).detach()
    return q


def _conservative_value(case: Case) -> Tensor:
    """``E_pi Q``, ``[B, S]``."""
    return (case.policy * conservative_q(case.mdp, case.behaviour, case.policy, _CONSERVATISM)).sum(-1)


def _conservative_closed_form(case: Case, strength: float = _CONSERVATISM / 2, *, swapped: bool = False) -> Tensor:
    """``V^pi - alpha (I - gamma P_pi)^-1 chi^2(pi || pi_b)``, ``[B, S]``; `swapped` takes chi^2(pi_b || pi)."""
    pi, pi_b = (case.behaviour, case.policy) if swapped else (case.policy, case.behaviour)
    chi = (pi.square() / pi_b).sum(-1) - 1
    return solvers.policy_value(case.mdp, case.policy) - strength * discounted(case.mdp, case.policy, chi)


def _covers(case: Case) -> Tensor:
    return ((case.behaviour > 0) | (case.policy == 0)).flatten(1).all(1)


_SUPPORT = {"the data's policy takes every action that the policy takes": _covers}
_CQL = "A. Kumar, A. Zhou, G. Tucker, S. Levine, NeurIPS 2020, arXiv 2006.04779"

register(
    Check(
        id="OFF-02a",
        title="CQL's fixed point on a table",
        claim="the minimiser of E_b (Q - r - gamma P E_pi Q)^2 + alpha_c (E_pi Q - E_b Q), targets held fixed, has  "
        "E_pi Q = V^pi - alpha (I - gamma P_pi)^-1 chi^2(pi || pi_b),  alpha = alpha_c / 2",
        source=f"{_CQL}, Theorem 3.2 without sampling error; derived here",
        kind="identity",
        tags=("offline", "offline.cql"),
        cases=_conservative_pairs,
        measure=_conservative_value,
        bound=_conservative_closed_form,
        assumptions=_SUPPORT,
        mutants=(
            Mutant(
                "alpha_c for alpha_c / 2", bound=lambda case: _conservative_closed_form(case, _CONSERVATISM), share=0.9
            ),
            Mutant("values raised", bound=lambda case: _conservative_closed_form(case, -_CONSERVATISM / 2), share=0.9),
            Mutant("chi^2(pi_b || pi)", bound=lambda case: _conservative_closed_form(case, swapped=True), share=0.9),
        ),
    )
)

register(
    Check(
        id="OFF-02b",
        title="CQL's value is a lower bound in every state",
        claim="E_pi Q(s, .) <= V^pi(s) for all s, with equality everywhere iff pi = pi_b",
        source=f"{_CQL}, Theorem 3.2 without sampling error; derived here",
        kind="inequality",
        tags=("offline", "offline.cql"),
        cases=_conservative_pairs,
        measure=_conservative_value,
        bound=lambda case: solvers.policy_value(case.mdp, case.policy),
        assumptions=_SUPPORT,
        extremal=_same_policy,
        mutants=(
            Mutant(
                "claimed of every action: Q <= Q^pi, where pi < pi_b raises them",
                measure=lambda case: conservative_q(case.mdp, case.behaviour, case.policy, _CONSERVATISM),
                bound=lambda case: solvers.policy_q(case.mdp, case.policy),
                share=0.3,
            ),
            Mutant(
                "V^pi less 0.1 %",
                bound=lambda case: 0.999 * solvers.policy_value(case.mdp, case.policy),
            ),
        ),
    )
)

register(
    Check(
        id="OFF-02c",
        title="CQL without the push up is a lower bound of every action's value",
        claim="the minimiser of E_b (Q - r - gamma P E_pi Q)^2 + alpha_c E_pi Q has  Q <= Q^pi for all (s, a)",
        source=f"{_CQL}, Theorem 3.1 without sampling error; derived here",
        kind="inequality",
        tags=("offline", "offline.cql"),
        cases=_conservative_pairs,
        measure=lambda case: conservative_q(case.mdp, case.behaviour, case.policy, _CONSERVATISM, pushed_up=False),
        bound=lambda case: solvers.policy_q(case.mdp, case.policy),
        assumptions=_SUPPORT,
        mutants=(
            Mutant(
                "with the push up",
                measure=lambda case: conservative_q(case.mdp, case.behaviour, case.policy, _CONSERVATISM),
                share=0.3,
            ),
        ),
    )
)


# ------------------------------------------------------------------------------------------- OFF-03 duality of DICE

_NEWTON = 40
_RIDGES = (1e-12, 1e-4, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e4)
Conjugate = Callable[[Tensor, Divergence], Tensor]


def _data_occupancies(draw: Draw, *, of: Conjugate = conjugate) -> Iterator[Case]:
    """Random MDPs, data that covers all pairs, both divergences, three strengths; the dual's V."""
    for f in ("chi2", "reverse_kl"):
        for strength in (0.05, 0.5, 5.0):
            for mdp in random_mdps(draw, (0.0, 0.5, 0.9), n_states=(3,), n_actions=(3,), fast=9, full=60):
                pairs = draw.rng.dirichlet(np.ones(mdp.n_states * mdp.n_actions), len(mdp)) + 0.01
                data = torch.from_numpy(pairs.reshape(mdp.reward.shape))
                case = Case(mdp.names, mdp=mdp, data=data / data.sum((1, 2), keepdim=True), f=f, strength=strength)
                yield case.with_parts(value=dual_value(case, of))


def _dual(case: Case, value: Tensor, of: Conjugate) -> Tensor:
    """``(1 - gamma) rho^T V + alpha E_D f*((r + gamma P V - V) / alpha)`` for ``V [..., B, S]``, ``[..., B]``."""
    ahead = torch.einsum("bsat,...bt->...bsa", case.mdp.transition, value)
    residual = case.mdp.reward + case.mdp.discount.view(-1, 1, 1) * ahead - value.unsqueeze(-1)
    paid = (case.data * of(residual / case.strength, case.f)).sum((-2, -1))
    return (1 - case.mdp.discount) * (case.mdp.start * value).sum(-1) + case.strength * paid


def dual_value(case: Case, of: Conjugate = conjugate) -> Tensor:
    """Minimise the dual over V, ``[B, S]``, from V*: the best Newton step of several ridges, then plain ones."""
    ridges = torch.tensor(_RIDGES, dtype=torch.float64).view(-1, 1, 1, 1) * torch.eye(case.mdp.n_states)
    value = solvers.policy_iteration(case.mdp).value
    for _ in range(_NEWTON):
        tried = torch.cat([value.unsqueeze(0), value - _newton_steps(case, value, of, ridges)])
        best = _dual(case, tried, of).nan_to_num(nan=torch.inf).argmin(0)
        value = tried[best, torch.arange(len(case))]
        if not bool(best.any()):  # no step lowers the dual any more: V is right to half of the digits
            break
    for _ in range(3):
        value = value - _newton_steps(case, value, of, ridges[:1]).squeeze(0)
    return value


def _newton_steps(case: Case, value: Tensor, of: Conjugate, ridges: Tensor) -> Tensor:
    """``(H + ridge)^-1 g`` of the dual at V for each ridge ``[n, 1, S, S]``, ``[n, B, S]``."""
    identity = torch.eye(case.mdp.n_states, dtype=torch.float64)
    moves = case.mdp.discount.view(-1, 1, 1, 1) * case.mdp.transition - identity.unsqueeze(1)  # of residuals with V
    residual = (solvers.q_values(case.mdp, value) - value.unsqueeze(-1)) / case.strength
    residual.requires_grad_()
    (first,) = torch.autograd.grad(of(residual, case.f).sum(), residual, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), residual)
    slope = (1 - case.mdp.gamma) * case.mdp.start
    slope = slope + torch.einsum("bsa,bsa,bsat->bt", case.data, first.detach(), moves)
    curvature = torch.einsum("bsa,bsau,bsat->but", case.data * second / case.strength, moves, moves)
    step: Tensor = torch.linalg.solve(curvature + ridges, slope.expand(len(ridges), -1, -1))
    return step


def _recovered(case: Case) -> Tensor:
    """Flow ``sum_a d - gamma P^T d`` of the recovered occupancy, and its worth in the primal, ``[B, S + 1]``."""
    w = _density_ratio_of(case)
    d = w * case.data
    flow = d.sum(-1) - case.mdp.gamma * torch.einsum("bsa,bsat->bt", d, case.mdp.transition)
    f = (w - 1).square() if case.f == "chi2" else torch.special.xlogy(w, w)
    worth = (d * case.mdp.reward - case.strength * case.data * f).sum((1, 2))
    return torch.cat([flow, worth.unsqueeze(1)], 1)


def _density_ratio_of(case: Case) -> Tensor:
    """``d / d_D = (f*)'``: the library's weight of the policy, ``[B, S, A]``."""
    residual = solvers.q_values(case.mdp, case.value) - case.value.unsqueeze(-1)
    return cloning_weight(residual / case.strength, case.f, "theory")


def _dual_optimum(case: Case) -> Tensor:
    """What the flow must be, and the least dual value, ``[B, S + 1]``."""
    least = _dual(case, case.value, conjugate)
    return torch.cat([(1 - case.mdp.gamma) * case.mdp.start, least.unsqueeze(1)], 1)


def _without_truncation(residual: Tensor, f: Divergence) -> Tensor:
    return (residual / 2 + 1).square() - 1 if f == "chi2" else torch.exp(residual - 1)


register(
    Check(
        id="OFF-03",
        title="Duality of distribution correction",
        claim="max over occupancies d of <d, r> - alpha E_D f(d / d_D) = min_V (1 - gamma) rho^T V + alpha E_D "
        "f*((r + gamma P V - V) / alpha),  f*(y) = max_{w >= 0} w y - f(w);  d = d_D (f*)' is an occupancy.  "
        "f = (w - 1)^2 and w log w; d_D > 0",
        source="O. Nachum, B. Dai, 2020, arXiv 2001.01866; H. Sikchi et al. (Dual RL), ICLR 2024, arXiv 2302.08560; "
        "derived here",
        kind="identity",
        tags=("offline", "offline.odice"),
        cases=_data_occupancies,
        measure=_recovered,
        bound=_dual_optimum,
        tolerance=1e-9,
        assumptions={
            "density ratios below the cap of the library's weights, 100": lambda case: (
                (_density_ratio_of(case) < WIDEST_WEIGHT).flatten(1).all(1)
            )
        },
        mutants=(
            Mutant(
                "negative ratios allowed in the conjugate",
                cases=lambda draw: _data_occupancies(draw, of=_without_truncation),
                share=0.1,
            ),
            Mutant(
                "V* for the dual's V",
                measure=lambda case: _recovered(case.with_parts(value=solvers.policy_iteration(case.mdp).value)),
                share=0.9,
            ),
        ),
    )
)


# -------------------------------------------------------------------------------------- OFF-11 values in the sample

_FLAT = 1e-14  # added to curvatures, of which some vanish where a loss is clipped
_EXPECTILES = (0.5, 0.7, 0.9, 0.99, 0.9999)


def in_sample_value(mdp: TabularMDP, behaviour: Tensor, loss: Loss, *, exponential: bool = False) -> Tensor:
    """V with ``V(s) = argmin_v E_b loss(Q(s, a) - v)`` in every state, ``Q = r + gamma P V``, ``[B, S]``.

    Newton's method on the slope of the library's loss, from the value of the data's policy. Exponential losses, clipped
    as they are, are flat far below their minimum: these come down from the best of the data's actions in small steps.
    """
    identity = torch.eye(mdp.n_states, dtype=torch.float64)
    moves = mdp.discount.view(-1, 1, 1, 1) * mdp.transition - identity.unsqueeze(1)  # of residuals with V
    rows = behaviour * mdp.n_actions  # their mean over A is the expectation
    value = supported_optimum(mdp, behaviour).value if exponential else solvers.policy_value(mdp, behaviour)
    for _ in range(600 if exponential else 60):
        residual = (solvers.q_values(mdp, value) - value.unsqueeze(-1)).requires_grad_()
        (first,) = torch.autograd.grad(loss(residual, rows).sum(), residual, create_graph=True)
        slope = first.sum(-1)
        (second,) = torch.autograd.grad(slope.sum(), residual)
        jacobian = torch.einsum("bsa,bsat->bst", second, moves)
        step = torch.linalg.solve(jacobian + _FLAT * identity, slope.detach())
        value = value - (step.clamp(-0.25, 0.25) if exponential else step)
        if bool((step.abs().amax(-1) <= 1e-13 * (1 + value.abs().amax(-1))).all()):
            break
    return value


def supported_optimum(mdp: TabularMDP, behaviour: Tensor) -> solvers.Solution:
    """The optimum over actions that the data has: others are replaced by the data's most frequent one."""
    first = behaviour.argmax(-1, keepdim=True).expand_as(behaviour)
    action = torch.where(behaviour > 0, torch.arange(mdp.n_actions).expand_as(behaviour), first)
    index = action.unsqueeze(-1).expand_as(mdp.transition)
    allowed = mdp.replace(transition=mdp.transition.gather(2, index), reward=mdp.reward.gather(2, action))
    return solvers.policy_iteration(allowed)


def _expectile_value(case: Case, expectile: float) -> Tensor:
    return in_sample_value(case.mdp, case.behaviour, lambda u, w: expectile_loss(u, expectile, w))


def _median_value(case: Case) -> Tensor:
    """Fixed point of weighted medians, by iteration, ``[B, S]``."""
    value = torch.zeros_like(case.mdp.start)
    for _ in range(300):
        q, order = solvers.q_values(case.mdp, value).sort(-1)
        rank = (case.behaviour.gather(-1, order).cumsum(-1) < 0.5).sum(-1, keepdim=True)
        value = q.gather(-1, rank.clamp(max=q.shape[-1] - 1)).squeeze(-1)
    return value


def _small(draw: Draw, *, holes: bool = False) -> Iterator[Case]:
    yield from behaviours(draw, holes=holes, n_states=(5,), n_actions=(3,), fast=60, full=240)


_IQL = "I. Kostrikov, A. Nair, S. Levine (IQL), ICLR 2022, arXiv 2110.06169"

register(
    Check(
        id="OFF-11a",
        title="IQL with the expectile 1/2 evaluates the data's policy",
        claim="V(s) = argmin_v E_b |tau - 1[Q < v]| (Q(s, a) - v)^2, Q = r + gamma P V, tau = 1/2:  V = V^{pi_b}",
        source=f"{_IQL}, section 4.4; derived here",
        kind="identity",
        tags=("offline", "offline.iql", "offline.famo2o"),
        cases=_small,
        measure=lambda case: _expectile_value(case, 0.5),
        bound=behaviour_value,
        mutants=(
            Mutant("the median for the expectile", measure=_median_value, share=0.9),
            Mutant("tau = 0.7", measure=lambda case: _expectile_value(case, 0.7), share=0.9),
        ),
    )
)


def _expectile_values(case: Case) -> Tensor:
    """V of every expectile in rising order, ``[B, n, S]``."""
    return torch.stack([_expectile_value(case, tau) for tau in _EXPECTILES], 1)


def _next_values(case: Case) -> Tensor:
    """V of the next expectile, after the last the supported optimum, ``[B, n, S]``."""
    best = supported_optimum(case.mdp, case.behaviour).value.unsqueeze(1)
    return torch.cat([_expectile_values(case)[:, 1:], best], 1)


register(
    Check(
        id="OFF-11b",
        title="IQL's value rises with the expectile, up to the best the data's actions can do",
        claim="tau <= tau' implies V_tau <= V_tau' <= V* over policies with support in pi_b's",
        source=f"{_IQL}, Lemmas 1 and 2",
        kind="inequality",
        tags=("offline", "offline.iql", "offline.famo2o"),
        cases=lambda draw: _small(draw, holes=True),
        measure=_expectile_values,
        bound=_next_values,
        mutants=(
            Mutant("falling", measure=_next_values, bound=_expectile_values, share=0.9),
            Mutant(
                "bounded by the value of the data's policy",
                bound=lambda case: behaviour_value(case).unsqueeze(1),
                share=0.9,
            ),
        ),
        not_mutants={"V* over all actions": "it is larger, so it bounds too; OFF-11c tells the two apart"},
    )
)


def _best_and_rest(draw: Draw, chance: float = 1e-3) -> Iterator[Case]:
    """One state, two actions that stay: the better one rare in the data."""
    for gamma in (0.0, 0.9):
        mdp = TabularMDP.from_arrays(torch.ones(1, 1, 2, 1), [[[1.0, 0.0]]], gamma, name=f"rare best, gamma={gamma:g}")
        yield Case(mdp.names, mdp=mdp, behaviour=torch.tensor([[[chance, 1 - chance]]], dtype=torch.float64))


_LARGE = (0.99, 0.9999, 0.9999999)


def _distance_to_optimum(case: Case, optimum: Tensor) -> Tensor:
    """``max_s V* - V_tau`` for large tau, ``[B, n]``."""
    return torch.stack([(optimum - _expectile_value(case, tau)).amax(-1) for tau in _LARGE], 1)


def _expectile_rate(case: Case) -> Tensor:
    """``(1 - tau) / tau  max_s span Q*(s, .) / pi_b(a*|s) / (1 - gamma)`` over supported actions, ``[B, n]``."""
    best = supported_optimum(case.mdp, case.behaviour)
    chance = case.behaviour.gather(-1, best.action.unsqueeze(-1)).squeeze(-1)
    span = best.q.amax(-1) - best.q.amin(-1)
    # Actions that the data lacks stand in as copies of its most frequent one: their chance is that one's.
    chance = torch.where(chance > 0, chance, case.behaviour.amax(-1))
    worst = (span / chance).amax(-1) * horizon(case.mdp).squeeze(1)
    return torch.stack([(1 - tau) / tau * worst for tau in _LARGE], 1)


register(
    Check(
        id="OFF-11c",
        title="How fast IQL's value reaches the best of the data's actions",
        claim="V* and Q* over policies with support in pi_b's, a* greedy:  V* - V_tau <= (1 - tau) / tau  max_s "
        "(max_a Q* - min_a Q*) / pi_b(a*|s) / (1 - gamma);  so V_tau -> V* as tau -> 1",
        source=f"{_IQL}, Theorem 3 (the limit); the rate is derived here from tau E(Q - V)_+ = (1 - tau) E(V - Q)_+",
        kind="inequality",
        tags=("offline", "offline.iql", "offline.famo2o"),
        cases=lambda draw: _small(draw, holes=True),
        measure=lambda case: _distance_to_optimum(case, supported_optimum(case.mdp, case.behaviour).value),
        bound=_expectile_rate,
        extremal=_best_and_rest,
        mutants=(
            Mutant(
                "V* over all actions, where the data lacks some",
                measure=lambda case: _distance_to_optimum(case, solvers.policy_iteration(case.mdp).value),
                share=0.3,
            ),
            Mutant("1 % less", bound=lambda case: 0.99 * _expectile_rate(case)),
            Mutant("no horizon", bound=lambda case: _expectile_rate(case) * (1 - case.mdp.gamma)),
        ),
    )
)

_TEMPERATURE = 0.6


def _soft_value(case: Case, temperature: float = _TEMPERATURE) -> Tensor:
    """``V = T log E_b exp(Q / T)``: the optimum of the problem that pays ``-T KL(pi || pi_b)``, ``[B, S]``."""
    return regularised_optimum(case.mdp, Regulariser(divergence=temperature, log_reference=case.behaviour.log())).value


def _gumbel_value(case: Case, temperature: float = _TEMPERATURE) -> Tensor:
    return in_sample_value(
        case.mdp, case.behaviour, lambda u, w: gumbel_loss(u, temperature, XQLConfig.clip, w), exponential=True
    )


def _exponential_value(case: Case, alpha: float = _TEMPERATURE) -> Tensor:
    return in_sample_value(case.mdp, case.behaviour, lambda u, w: exponential_value_loss(u, alpha, w), exponential=True)


def _exponents_below(case: Case, clip: float) -> Tensor:
    """Whether ``(Q - V) / T`` stays below a clip at the soft value, ``[B]``."""
    value = _soft_value(case)
    exponent = (solvers.q_values(case.mdp, value) - value.unsqueeze(-1)) / _TEMPERATURE
    return (exponent < clip).flatten(1).all(1)


register(
    Check(
        id="OFF-11d",
        title="XQL's value is the soft optimum that stays near the data's policy",
        claim="the fixed point of V(s) = argmin_v E_b [exp z - z - 1], z = (Q(s, a) - v) / T <= 7, "
        "Q = r + gamma P V, is  V = T log E_b exp(Q / T), the optimum with the reward r - T KL(pi || pi_b)",
        source="D. Garg, J. Hejna, M. Geist, S. Ermon (XQL), ICLR 2023, arXiv 2301.02328; derived here",
        kind="identity",
        tags=("offline", "offline.xql"),
        cases=_small,
        measure=_gumbel_value,
        bound=_soft_value,
        tolerance=1e-10,
        assumptions={"no exponent above the clip, 7": lambda case: _exponents_below(case, XQLConfig.clip)},
        mutants=(
            Mutant("T and 1 / T swapped", bound=lambda case: _soft_value(case, 1 / _TEMPERATURE), share=0.9),
            Mutant(
                "T so small that exponents are clipped",
                cases=lambda draw: _best_and_rest(draw, 1e-4),
                measure=lambda case: _gumbel_value(case, 0.05),
                bound=lambda case: _soft_value(case, 0.05),
                share=0.9,
            ),
        ),
    )
)


register(
    Check(
        id="OFF-11e",
        title="EQL's value is the same soft optimum",
        claim="the fixed point of V(s) = argmin_v E_b [exp z + v / alpha], z = (Q(s, a) - v) / alpha <= 5, "
        "Q = r + gamma P V, is  V = alpha log E_b exp(Q / alpha)",
        source="H. Xu et al. (SQL, EQL), ICLR 2023, arXiv 2303.15810; derived here",
        kind="identity",
        tags=("offline", "offline.eql"),
        cases=_small,
        measure=_exponential_value,
        bound=_soft_value,
        tolerance=1e-10,
        assumptions={"no exponent above the clip, 5": lambda case: _exponents_below(case, LARGEST_EXPONENT)},
        mutants=(
            Mutant("twice alpha", bound=lambda case: _soft_value(case, 2 * _TEMPERATURE), share=0.9),
            Mutant(
                "alpha so small that exponents are clipped",
                cases=_best_and_rest,
                measure=lambda case: _exponential_value(case, 0.05),
                bound=lambda case: _soft_value(case, 0.05),
                share=0.9,
            ),
        ),
    )
)


def sparse_threshold(q: Tensor, behaviour: Tensor, alpha: float) -> Tensor:
    """``lambda [..., 1]`` with ``E_b (Q - lambda)_+ = 2 alpha``, by sorting, for ``Q [..., A]``."""
    ordered, order = q.sort(-1, descending=True)
    share = behaviour.gather(-1, order)
    threshold = ((share * ordered).cumsum(-1) - 2 * alpha) / share.cumsum(-1)
    # Actions are taken up while they lie above the threshold of those before and their own.
    taken = (ordered > threshold).sum(-1, keepdim=True).clamp(min=1)
    return threshold.gather(-1, taken - 1)


def _sparse_value(case: Case, alpha: float) -> Tensor:
    """Iterate ``V = lambda + 2 alpha``, a contraction with gamma, ``[B, S]``."""
    value = torch.zeros_like(case.mdp.start)
    for _ in range(_SWEEPS):
        value = sparse_threshold(solvers.q_values(case.mdp, value), case.behaviour, alpha).squeeze(-1) + 2 * alpha
    return value


def _contracting(draw: Draw) -> Iterator[Case]:
    yield from behaviours(draw, discounts=(0.0, 0.5, 0.9), n_states=(3, 6), n_actions=(2, 4), fast=60, full=240)


register(
    Check(
        id="OFF-11f",
        title="SQL's value is the implicit value of a chi-square regularisation",
        claim="the fixed point of V(s) = argmin_v E_b [(1 + u / (2 alpha))_+^2 + v / alpha], u = Q(s, a) - v, "
        "Q = r + gamma P V, has  E_b (1 + (Q - V) / (2 alpha))_+ = 1  in every state",
        source="H. Xu et al. (SQL, EQL), ICLR 2023, arXiv 2303.15810; derived here",
        kind="identity",
        tags=("offline", "offline.sql"),
        cases=_contracting,
        measure=lambda case: in_sample_value(case.mdp, case.behaviour, lambda u, w: sparse_value_loss(u, 0.2, w)),
        bound=lambda case: _sparse_value(case, 0.2),
        tolerance=1e-10,
        mutants=(
            Mutant("alpha for 2 alpha", bound=lambda case: _sparse_value(case, 0.1), share=0.6),
            Mutant("the mean, as if no action were cut off", bound=behaviour_value, share=0.3),
        ),
    )
)


# ------------------------------------------------------------------------------------------------- OFF-12 O-DICE

_GAMMA = 0.9


def _linear_values(draw: Draw, *, table: bool = False) -> Iterator[Case]:
    """Values linear in features that states share, four transitions; with `table` one, and nothing is shared."""
    n, rows, k = draw.number(200, 2000), 1 if table else 4, 5
    shared = torch.from_numpy(draw.rng.standard_normal((n, 1, k)))
    here, ahead = (shared + torch.from_numpy(draw.rng.standard_normal((n, rows, k))) for _ in range(2))
    if table:
        state = torch.from_numpy(draw.rng.integers(k, size=(n, rows)))
        here, ahead = one_hot(state, k), one_hot((state + 1) % k, k)
    weights, reward = (torch.from_numpy(0.3 * draw.rng.standard_normal((n, m))) for m in (k, rows))
    yield Case([f"features[{i}]" for i in range(n)], here=here, ahead=ahead, weights=weights, reward=reward)


def _both_gradients(case: Case) -> tuple[Tensor, Tensor]:
    """Gradients in the weights of the forward and of the backward loss, the other end held fixed, ``[B, k]``."""
    w = case.weights.clone().requires_grad_()
    fixed, value = ((x @ w.unsqueeze(-1)).squeeze(-1) for x in (case.ahead, case.here))
    forward = conjugate(case.reward + _GAMMA * fixed.detach() - value, "chi2").mean(-1)
    backward = conjugate(case.reward + _GAMMA * fixed - value.detach(), "chi2").mean(-1)
    (g_f,) = torch.autograd.grad(forward.sum(), w)
    (g_b,) = torch.autograd.grad(backward.sum(), w)
    return g_f, g_b


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)


def _off(gradient: Tensor, direction: Tensor) -> Tensor:
    """The library's orthogonal part of one gradient, ``[B, k]``."""
    (part,), _ = orthogonal_part([gradient], [direction])
    return part


def _forward_change(case: Case, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """First-order change of the forward loss along minus the combined gradient, ``[B]``."""
    g_f, g_b = _both_gradients(case)
    return -_dot(g_f, combine(g_f, g_b))


_ODICE = "L. Mao et al. (O-DICE), ICLR 2024, arXiv 2402.00348"

register(
    Check(
        id="OFF-12a",
        title="The projected backward gradient leaves the forward step as it is",
        claim="g_b' = g_b - <g_b, g_f> / |g_f|^2 g_f:  for any eta the forward loss changes along -(g_f + eta g_b') by "
        "-|g_f|^2 to first order, as along -g_f",
        source=f"{_ODICE}, Theorem 1 [memory]; derived here",
        kind="identity",
        tags=("offline", "offline.odice"),
        cases=_linear_values,
        measure=lambda case: _forward_change(case, lambda g_f, g_b: g_f + 0.7 * _off(g_b, g_f)),
        bound=lambda case: -_both_gradients(case)[0].square().sum(-1),
        assumptions={"some forward gradient": lambda case: _both_gradients(case)[0].square().sum(-1) > 1e-9},
        mutants=(
            Mutant(
                "the plain sum", measure=lambda case: _forward_change(case, lambda g_f, g_b: g_f + 0.7 * g_b), share=0.9
            ),
            Mutant(
                "the forward gradient projected off the backward one",
                measure=lambda case: _forward_change(case, lambda g_f, g_b: _off(g_f, g_b) + 0.7 * g_b),
                share=0.9,
            ),
        ),
        not_mutants={
            "the plain sum on a table, one transition at a time": "its two gradients lie in different coordinates, so "
            "that they are orthogonal as they are: there the check would be vacuous"
        },
    )
)


def _stretched(draw: Draw) -> Iterator[Case]:
    """One transition whose successor has twice the features of the state."""
    n, k = draw.number(100, 500), 4
    here = torch.from_numpy(draw.rng.standard_normal((n, 1, k)))
    weights = torch.from_numpy(0.3 * draw.rng.standard_normal((n, k)))
    # The reward makes the residual 0, where the slope of f* is 1.
    reward = ((1 - 2 * _GAMMA) * here @ weights.unsqueeze(-1)).squeeze(-1)
    yield Case([f"stretched[{i}]" for i in range(n)], here=here, ahead=2 * here, weights=weights, reward=reward)


register(
    Check(
        id="OFF-12b",
        title="The true gradient can undo the forward step, the projected one cannot",
        claim="phi(s') = 2 phi(s), gamma > 1/2:  the forward loss rises along -(g_f + g_b) and falls along -(g_f + "
        "g_b')",
        source="derived here",
        kind="fact",
        tags=("offline", "offline.odice"),
        cases=_stretched,
        measure=lambda case: torch.stack(
            [
                _forward_change(case, lambda g_f, g_b: g_f + g_b).sign(),
                _forward_change(case, lambda g_f, g_b: g_f + _off(g_b, g_f)).sign(),
            ],
            1,
        ),
        bound=lambda case: torch.tensor([[1.0, -1.0]], dtype=torch.float64).expand(len(case), -1),
        mutants=(
            Mutant(
                "a table, where states share nothing", cases=lambda draw: _linear_values(draw, table=True), share=0.9
            ),
        ),
    )
)


def _one_transition(draw: Draw) -> Iterator[Case]:
    for case in _linear_values(draw):
        yield case.with_parts(here=case.here[:, :1], ahead=case.ahead[:, :1], reward=case.reward[:, :1])


def _cosine(case: Case) -> Tensor:
    here, ahead = case.here.squeeze(1), case.ahead.squeeze(1)
    return _dot(here, ahead) / (here.norm(dim=-1) * ahead.norm(dim=-1))


def _threshold(case: Case) -> Tensor:
    """``cos phi |grad V(s)| / (gamma sin^2 phi |grad V(s')|)``, ``[B]``."""
    cosine = _cosine(case)
    lengths = [x.squeeze(1).norm(dim=-1) for x in (case.here, case.ahead)]
    return cosine * lengths[0] / (_GAMMA * (1 - cosine.square()) * lengths[1])


def _backward_falls(case: Case, threshold: Tensor) -> Tensor:
    """Sign of the fall of the backward loss 10 % above and 10 % below a threshold of eta, ``[B, 2]``."""
    g_f, g_b = _both_gradients(case)
    steps = [g_f + (factor * threshold).unsqueeze(1) * _off(g_b, g_f) for factor in (1.1, 0.9)]
    return torch.stack([_dot(g_b, step).sign() for step in steps], 1)


register(
    Check(
        id="OFF-12c",
        title="How much of the backward gradient it takes to lower the backward loss",
        claim="one transition, residual > -2 at both ends, angle phi in (0, pi/2) between grad V(s) and grad V(s'):  "
        "the step -(g_f + eta g_b') lowers the backward loss to first order iff eta > cos phi |grad V(s)| / (gamma "
        "sin^2 phi |grad V(s')|)",
        source=f"{_ODICE}, Theorem 2 [memory]; derived here",
        kind="fact",
        tags=("offline", "offline.odice"),
        cases=_one_transition,
        measure=lambda case: _backward_falls(case, _threshold(case)),
        bound=lambda case: torch.tensor([[1.0, -1.0]], dtype=torch.float64).expand(len(case), -1),
        assumptions={
            "an acute angle": lambda case: (_cosine(case) > 1e-3) & (_cosine(case) < 1 - 1e-3),
            "a residual above -2": lambda case: _both_gradients(case)[0].square().sum(-1) > 1e-9,
        },
        mutants=(
            Mutant(
                "no sine",
                measure=lambda case: _backward_falls(case, _threshold(case) * (1 - _cosine(case).square())),
                share=0.5,
            ),
            Mutant(
                "gamma squared", measure=lambda case: _backward_falls(case, _threshold(case) / _GAMMA**2), share=0.9
            ),
        ),
    )
)

_LEVELS = (0.4, 0.5, 0.6, 0.7)


def _small_rewards(draw: Draw, scale: float = 0.03) -> Iterator[Case]:
    for case in behaviours(draw, discounts=(0.0, 0.5, 0.9), n_states=(5,), n_actions=(3,), fast=60, full=240):
        yield case.with_parts(mdp=case.mdp.replace(reward=scale * case.mdp.reward))


def _odice_value(case: Case, level: float, f: Divergence = "chi2") -> Tensor:
    # v is Q - u, of which Q is a constant.
    return in_sample_value(case.mdp, case.behaviour, lambda u, w: torch.add(*dual_terms(-u, u, level, f, w)))


def _odice_values(case: Case) -> Tensor:
    """V of every lambda for both divergences, ``[B, 2 n, S]``."""
    return torch.stack([_odice_value(case, level, f) for f in ("chi2", "reverse_kl") for level in _LEVELS], 1)


def _shift(level: float) -> float:
    return 2 * (2 * level - 1) / level


def _shifted_values(case: Case, shift: Callable[[float], float] = _shift) -> Tensor:
    steps, mean, soft = horizon(case.mdp), behaviour_value(case), _soft_value(case, 1.0)
    chi = [mean + shift(level) * steps for level in _LEVELS]
    return torch.stack(chi + [soft + (math.log(level / (1 - level)) - 1) * steps for level in _LEVELS], 1)


def _no_row_cut(case: Case) -> Tensor:
    """Whether ``Q - V >= -2`` for the largest lambda, where advantages are those of the data's policy, ``[B]``."""
    advantage = solvers.advantage(case.mdp, case.behaviour)
    return (advantage - _shift(_LEVELS[-1]) >= -2).flatten(1).all(1)


register(
    Check(
        id="OFF-12d",
        title="O-DICE's implicit value is a mean or a soft maximum, shifted by lambda",
        claim="the fixed point of V(s) = argmin_v (1 - lambda) v + lambda E_b f*(Q(s, a) - v), Q = r + gamma P V, is "
        "V^{pi_b} + 2 (2 lambda - 1) / (lambda (1 - gamma)) for chi-square if all Q - V >= -2, and the soft value at "
        "temperature 1 plus (log(lambda / (1 - lambda)) - 1) / (1 - gamma) for reverse KL",
        source="derived here",
        kind="identity",
        tags=("offline", "offline.odice"),
        cases=_small_rewards,
        measure=_odice_values,
        bound=_shifted_values,
        tolerance=1e-10,
        assumptions={"no residual below -2": _no_row_cut},
        mutants=(
            Mutant("rewards a thousand times as large", cases=lambda draw: _small_rewards(draw, 30.0), share=0.9),
            Mutant(
                "half the shift", bound=lambda case: _shifted_values(case, lambda level: _shift(level) / 2), share=0.9
            ),
        ),
    )
)


def _largest_weight(case: Case, level: float, kind: PolicyWeight = "released") -> Tensor:
    """Largest weight of a logged action that the library clones with, ``[B]``."""
    value = _odice_value(case, level)
    residual = solvers.q_values(case.mdp, value) - value.unsqueeze(-1)
    return cloning_weight(residual, "chi2", kind).amax((1, 2))


register(
    Check(
        id="OFF-12e",
        title="With lambda > 1/2 and small rewards O-DICE's released weights are all zero",
        claim="chi-square, all Q - V >= -2 and max A^{pi_b} < 2 (2 lambda - 1) / lambda:  max(Q - V, 0) = 0 for every "
        "action of the data, so the policy learns nothing",
        source="derived here",
        kind="identity",
        tags=("offline", "offline.odice"),
        cases=_small_rewards,
        measure=lambda case: _largest_weight(case, 0.6),
        bound=lambda case: torch.zeros_like(case.mdp.discount),
        assumptions={
            "no residual below -2": _no_row_cut,
            "advantages below the shift": lambda case: (
                solvers.advantage(case.mdp, case.behaviour).amax((1, 2)) < _shift(0.6)
            ),
        },
        mutants=(
            Mutant("lambda = 1/2", measure=lambda case: _largest_weight(case, 0.5), share=0.9),
            Mutant(
                "the density ratio of the dual for a weight",
                measure=lambda case: _largest_weight(case, 0.6, "theory"),
                share=0.9,
            ),
            Mutant("rewards a thousand times as large", cases=lambda draw: _small_rewards(draw, 30.0), share=0.9),
        ),
    )
)

register(
    Check(
        id="OFF-12f",
        title="O-DICE's value at lambda = 1/2 is SQL's at alpha = 1",
        claim="both solve E_b (1 + (Q - V) / 2)_+ = 1 in every state",
        source="derived here",
        kind="identity",
        tags=("offline", "offline.odice", "offline.sql"),
        cases=lambda draw: _small_rewards(draw, 5.0),
        measure=lambda case: _odice_value(case, 0.5),
        bound=lambda case: in_sample_value(case.mdp, case.behaviour, lambda u, w: sparse_value_loss(u, 1.0, w)),
        tolerance=1e-10,
        mutants=(Mutant("lambda = 0.6", measure=lambda case: _odice_value(case, 0.6), share=0.9),),
    )
)
