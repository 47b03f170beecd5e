r"""Trust regions: what an update may promise when ratios or divergences to the old policy are small.

With ``L = J(pi) + E_{d^pi} E_{pi'} A^pi / (1 - gamma)``, the surrogate that TRPO and PPO ascend, all bounds say how far
``J(pi')`` can be from it. Divergences are the library's ``kl(p, q)``; the direction stands in each claim. Ratios,
surrogates and target ratios are those of :mod:`corollary.online.objectives`, and FixPO is the agent itself.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import optimize
from scipy.sparse import csr_matrix
from torch import Tensor

from ...online.fixpo import FixPO
from ...online.objectives import (
    bpo_median_loss,
    bpo_target_ratio,
    policy_gradient_loss,
    ppo_clip_coefficient,
    ppo_clip_loss,
    probability_ratio,
    ratio_diagnostics,
    spo_coefficient,
    spo_loss,
)
from .. import exact_batch, solvers
from ..check import Adversary, Case, Check, Draw, Mutant, register
from ..families import deterministic_policies, nearby_policies, random_mdps, random_policies
from ..mdp import TabularMDP
from ..regularised import divergence, finite_log

_LINPROG: Any = optimize.linprog  # its overloads take longer to read than the call
_RATIO_CAP = 20.0  # logarithm of the largest ratio that the library's surrogates tell from larger ones


def _horizon(case: Case) -> Tensor:
    """``1 / (1 - gamma)``, ``[B]``."""
    return 1 / (1 - case.mdp.discount)


# ---------------------------------------------------------------------------------------- PO-01 trust-region bounds


def _pairs(draw: Draw) -> Iterator[Case]:
    """Random policies and mixtures near them, on random MDPs."""
    for mdp in random_mdps(draw):
        policy = random_policies(draw.rng, mdp)
        yield Case(mdp.names, mdp=mdp, policy=policy, other=nearby_policies(draw.rng, mdp, policy))


def _two_states(name: str, gamma: float, reward: list[list[float]], policy: Any, other: Any) -> Case:
    """State 0: actions 0 and 1 stay, 2 leads to state 1, which absorbs. It begins in state 0."""
    p = torch.zeros(2, 3, 2, dtype=torch.float64)
    p[0, :2, 0] = p[0, 2, 1] = p[1, :, 1] = 1
    mdp = TabularMDP.from_arrays(p, reward, gamma, [1.0, 0.0], name=name)
    pair = (torch.tensor([each], dtype=torch.float64) for each in (policy, other))
    return Case(mdp.names, mdp=mdp, **dict(zip(("policy", "other"), pair, strict=True)))


def _attained(draw: Draw) -> Iterator[Case]:
    """The shift that the bounds fear most, an ever better one on paper: staying badly becomes leaving well.

    All advantages are +1 or -1, half and half. In state 0 the new policy moves probability `shift` from "stay, -1" to
    "leave, +1", so ``E_{pi'} A = 2 shift``; in state 1, where it now goes, it moves as much the other way. With `leave`
    the old policy's probability of leaving, ``J(pi') - L = -4 gamma shift (leave -> 0) shift / (1 - gamma)^2`` up to
    the factor ``(1 - gamma) / (1 - gamma + gamma shift)``: (a), (c) and (d) are attained as shift -> 0. Pinsker's
    inequality wants leave = 1/2; (b) is attained as gamma -> 0 too.
    """
    for gamma, shift, leave in ((0.9, 1e-4, 1e-10), (0.5, 1e-4, 1e-10), (0.01, 1e-3, 0.5)):
        reward = [[1.0, -1.0, 1.0], [1.0, -1.0, -1.0]]
        old = [[0.5 - leave, 0.5, leave], [0.5, 0.5, 0.0]]
        new = [[0.5 - leave, 0.5 - shift, leave + shift], [0.5 - shift, 0.5 + shift, 0.0]]
        yield _two_states(f"attained(gamma={gamma:g}, shift={shift:g}, leave={leave:g})", gamma, reward, old, new)
    yield _rarely_visited(0.9, 1e-5)


def _rarely_visited(gamma: float, shift: float) -> Case:
    """The old policy hardly ever sees state 1; the new one does, and has become as bad there as can be."""
    old = [[1 - 1e-6 * shift, 0.0, 1e-6 * shift], [1 - 1e-6, 1e-6, 0.0]]
    new = [[1 - shift, 0.0, shift], [1e-6, 1 - 1e-6, 0.0]]
    return _two_states(f"rarely visited(gamma={gamma:g})", gamma, [[0.0] * 3, [0.0, -1.0, 0.0]], old, new)


def _searched(numbers: Tensor) -> Case:
    """Descriptions ``[n, 39]`` to MDPs with three states, two actions and discount 0.9, and two policies."""
    n = len(numbers)
    p, start = torch.softmax(3 * numbers[:, :18].view(n, 3, 2, 3), -1), torch.softmax(3 * numbers[:, 30:33], -1)
    r = torch.sigmoid(3 * numbers[:, 33:39].view(n, 3, 2))
    mdp = TabularMDP.from_arrays(p, r, torch.full((n,), 0.9), start, name="searched")
    policy, other = (torch.softmax(3 * numbers[:, i : i + 6].view(n, 3, 2), -1) for i in (18, 24))
    return Case(mdp.names, mdp=mdp, policy=policy, other=other)


def _below_cap(case: Case) -> Tensor:
    return (finite_log(case.other) - finite_log(case.policy)).amax((-2, -1)) < _RATIO_CAP


def _surrogate_excess(case: Case) -> Tensor:
    """``L - J(pi')``: what the surrogate promised and the policy does not keep, ``[B]``; L by the library's loss."""
    advantage = solvers.advantage(case.mdp, case.policy)
    loss = policy_gradient_loss(finite_log(case.other), finite_log(case.policy), advantage)
    weights = solvers.occupancy(case.mdp, case.policy).unsqueeze(-1) * case.policy
    promised = -(weights * loss).sum((-2, -1)) * _horizon(case)
    kept = solvers.expected_return(case.mdp, case.other) - solvers.expected_return(case.mdp, case.policy)
    return promised - kept


def _total_variation(case: Case) -> Tensor:
    """TV of the two policies in each state, ``[B, S]``."""
    return (case.policy - case.other).abs().sum(-1) / 2


def _mean_variation(case: Case) -> Tensor:
    """``E_{d^pi} TV``, ``[B]``."""
    return (solvers.occupancy(case.mdp, case.policy) * _total_variation(case)).sum(-1)


def _largest_advantage(case: Case) -> Tensor:
    return solvers.advantage(case.mdp, case.policy).abs().amax((-2, -1))


def _largest_expected(case: Case) -> Tensor:
    """``max_s |E_{a ~ pi'} A^pi|``, ``[B]``."""
    return (case.other * solvers.advantage(case.mdp, case.policy)).sum(-1).abs().amax(-1)


def _trpo_bound(case: Case) -> Tensor:
    gamma, worst = case.mdp.discount, _total_variation(case).amax(-1)
    return 4 * gamma * _largest_advantage(case) * (worst * _horizon(case)).square()


def _kl_bound(case: Case) -> Tensor:
    largest = divergence(case.policy.log(), case.other.log()).amax(-1)
    return 2 * case.mdp.discount * _largest_advantage(case) * largest * _horizon(case).square()


def _ratio_bound(case: Case) -> Tensor:
    """``gamma eps' E_{d^pi, pi} |r - 1| / (1 - gamma)^2`` with the deviation that the agents log."""
    deviation = ratio_diagnostics(finite_log(case.other), finite_log(case.policy))["ratio_deviation"]
    weights = solvers.occupancy(case.mdp, case.policy).unsqueeze(-1) * case.policy
    mean = (weights * deviation).sum((-2, -1))
    return case.mdp.discount * _largest_expected(case) * mean * _horizon(case).square()


def _occupancy_shift(case: Case) -> Tensor:
    moved = solvers.occupancy(case.mdp, case.other) - solvers.occupancy(case.mdp, case.policy)
    return moved.abs().sum(-1)


_LIMIT = {"ratios below the cap of the library's surrogate, e^20": _below_cap}
_TAGS = ("policy", "online.trpo", "online.ppo", "online.spo", "online.fixpo", "online.bpo")
_SEARCH = Adversary(39, _searched)

register(
    Check(
        id="PO-01a",
        title="TRPO's bound by the largest total variation",
        claim="J(pi') >= L - 4 gamma eps alpha^2 / (1 - gamma)^2,  eps = max |A^pi|, alpha = max_s TV(pi, pi')",
        source="J. Schulman et al., ICML 2015, arXiv 1502.05477, Theorem 1; that it is attained: derived here",
        kind="inequality",
        tags=_TAGS,
        cases=_pairs,
        measure=_surrogate_excess,
        bound=_trpo_bound,
        assumptions=_LIMIT,
        extremal=_attained,
        adversary=_SEARCH,
        mutants=(
            Mutant("half the constant", bound=lambda case: 0.5 * _trpo_bound(case)),
            Mutant("1 % less", bound=lambda case: 0.99 * _trpo_bound(case)),
            Mutant(
                "the mean total variation, squared, for the largest",
                bound=lambda case: (
                    4 * case.mdp.discount * _largest_advantage(case) * (_mean_variation(case) * _horizon(case)).square()
                ),
            ),
            Mutant("one horizon", bound=lambda case: _trpo_bound(case) / _horizon(case)),
        ),
    )
)

register(
    Check(
        id="PO-01b",
        title="TRPO's bound by the largest divergence",
        claim="J(pi') >= L - 2 gamma eps max_s KL(pi || pi') / (1 - gamma)^2,  eps = max |A^pi|",
        source="J. Schulman et al., ICML 2015, arXiv 1502.05477, Theorem 1, which prints 4 for 2 (TV^2 <= KL, not "
        "Pinsker's TV^2 <= KL / 2); derived here",
        kind="inequality",
        tags=_TAGS,
        cases=_pairs,
        measure=_surrogate_excess,
        bound=_kl_bound,
        assumptions=_LIMIT,
        extremal=_attained,
        adversary=_SEARCH,
        mutants=(
            Mutant("half the constant", bound=lambda case: 0.5 * _kl_bound(case)),
            Mutant("3 % less", bound=lambda case: 0.97 * _kl_bound(case)),
        ),
        not_mutants={"KL(pi' || pi)": "Pinsker's inequality holds in both directions, so this bound holds too"},
    )
)

register(
    Check(
        id="PO-01c",
        title="Bound by the mean deviation of the ratio (Achiam's and SPO's)",
        claim="|J(pi') - L| <= gamma eps' E_{d^pi, pi}|r - 1| / (1 - gamma)^2,  eps' = max_s |E_{a ~ pi'} A^pi|, "
        "E_pi|r - 1| = 2 TV",
        source="J. Achiam, D. Held, A. Tamar, P. Abbeel, ICML 2017, arXiv 1705.10528, Corollaries 1 and 2; Z. Xie et "
        "al. (SPO), arXiv 2401.16025; derived here",
        kind="inequality",
        tags=_TAGS,
        cases=_pairs,
        measure=lambda case: _surrogate_excess(case).abs(),
        bound=_ratio_bound,
        assumptions=_LIMIT,
        extremal=_attained,
        adversary=_SEARCH,
        mutants=(
            Mutant("half the constant", bound=lambda case: 0.5 * _ratio_bound(case)),
            Mutant("1 % less", bound=lambda case: 0.99 * _ratio_bound(case)),
            Mutant("one horizon", bound=lambda case: _ratio_bound(case) / _horizon(case)),
        ),
        not_mutants={"TV without its 1/2": "twice the bound, which is weaker and holds"},
    )
)

register(
    Check(
        id="PO-01d",
        title="How far the occupancy moves",
        claim="||d^{pi'} - d^pi||_1 <= 2 gamma E_{d^pi} TV(pi, pi') / (1 - gamma)",
        source="J. Achiam et al., ICML 2017, arXiv 1705.10528, Lemma 3; derived here",
        kind="inequality",
        tags=_TAGS,
        cases=_pairs,
        measure=_occupancy_shift,
        bound=lambda case: 2 * case.mdp.discount * _horizon(case) * _mean_variation(case),
        extremal=_attained,
        adversary=_SEARCH,
        mutants=(
            Mutant("half", bound=lambda case: case.mdp.discount * _horizon(case) * _mean_variation(case)),
            Mutant("1 % less", bound=lambda case: 1.98 * case.mdp.discount * _horizon(case) * _mean_variation(case)),
            Mutant("no horizon", bound=lambda case: 2 * case.mdp.discount * _mean_variation(case)),
        ),
        not_mutants={
            "gamma left out": "as gamma only scales it, 1 / gamma more is weaker and holds",
        },
    )
)


# --------------------------------------------------------------------------------------- PO-02 bounded-ratio optimum


def bounded_ratio_optimum(policy: Tensor, q: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Maximise ``E_{pi'} q`` in every state under ``1 - low <= pi' / pi <= 1 + high``.

    The library's target ratio at temperature 0 has the ends; u is the value with mass low / (low + high) above it, the
    median for equal bounds, and its atom takes the rest that makes the probabilities sum to 1.

    Returns:
        The optimal policy ``[B, S, A]`` and u ``[B, S, 1]``.
    """
    order = q.argsort(-1, descending=True)
    above = policy.gather(-1, order).cumsum(-1)
    rank = (above < low / (low + high) - 1e-12).sum(-1, keepdim=True)
    atom = order.gather(-1, rank.clamp(max=q.shape[-1] - 1))
    threshold = q.gather(-1, atom)
    ratio = bpo_target_ratio(q, threshold.expand_as(q), epsilon=(low, high), temperature=0.0)
    moved = (policy * ratio).scatter(-1, atom, 0.0)
    return moved.scatter(-1, atom, 1 - moved.sum(-1, keepdim=True)), threshold


def _bands(draw: Draw) -> Iterator[Case]:
    """Policies with their Q on random MDPs; symmetric intervals, unequal ones, and the cross-entropy method's."""
    for low, high in ((0.1, 0.1), (0.5, 0.5), (0.2, 0.6), (1.0, 3.0)):
        for mdp in random_mdps(draw, n_states=(3, 5), fast=6, full=120):
            policy = random_policies(draw.rng, mdp)
            yield Case(mdp.names, mdp=mdp, policy=policy, low=low, high=high)


def _optimal_policy(case: Case) -> Tensor:
    q = solvers.policy_q(case.mdp, case.policy)
    return bounded_ratio_optimum(case.policy, q, case.low, case.high)[0]


def _gain_and_mass(case: Case, policy: Tensor) -> Tensor:
    """Per state ``E_{pi'} Q`` and ``sum_a pi'``, ``[B, S, 2]``."""
    q = solvers.policy_q(case.mdp, case.policy)
    return torch.stack([(policy * q).sum(-1), policy.sum(-1)], -1)


def _by_linear_program(case: Case) -> Tensor:
    """The same by HiGHS: one program for all states of an instance, variables the ratios."""
    q, policy = solvers.policy_q(case.mdp, case.policy).numpy(), case.policy.numpy()
    _, s, a = q.shape
    found = []
    for i in range(len(case)):
        rows = np.kron(np.eye(s), np.ones(a)) * policy[i].ravel()
        result = _LINPROG(
            -(policy[i] * q[i]).ravel(),
            A_eq=csr_matrix(rows),
            b_eq=np.ones(s),
            bounds=(1 - case.low, 1 + case.high),
            method="highs",
        )
        found.append((policy[i] * q[i] * result.x.reshape(s, a)).sum(-1))
    gain = torch.from_numpy(np.stack(found))
    return torch.stack([gain, torch.ones_like(gain)], -1)


def _ends(case: Case, threshold: Tensor) -> Tensor:
    """The policy with one of the two ends everywhere, no atom made to fit."""
    q = solvers.policy_q(case.mdp, case.policy)
    ratio = bpo_target_ratio(q, threshold.expand_as(q), epsilon=(case.low, case.high), temperature=0.0)
    return case.policy * ratio


def _mean_q(case: Case) -> Tensor:
    return (case.policy * solvers.policy_q(case.mdp, case.policy)).sum(-1, keepdim=True)


def _median_q(case: Case) -> Tensor:
    q = solvers.policy_q(case.mdp, case.policy)
    return bounded_ratio_optimum(case.policy, q, case.low, case.high)[1]


register(
    Check(
        id="PO-02a",
        title="Best policy with bounded ratios, in closed form",
        claim="max E_{pi'} Q under 1 - l <= pi'/pi <= 1 + h: ratio 1 + h above the value u with pi-mass l / (l + h) "
        "above it, 1 - l below, the rest on u's atom; u is the median for l = h, l = 1 the cross-entropy method",
        source="Bounded Ratio RL, arXiv 2604.18578, Theorems 4.1 and 4.2; unequal bounds derived here",
        kind="identity",
        tags=("policy", "online.bpo"),
        cases=_bands,
        measure=lambda case: _gain_and_mass(case, _optimal_policy(case)),
        bound=_by_linear_program,
        tolerance=1e-9,
        mutants=(
            Mutant(
                "mean for median",
                measure=lambda case: _gain_and_mass(case, _ends(case, _mean_q(case))),
                share=0.9,
            ),
            Mutant(
                "no rest on the atom: probabilities do not sum to 1",
                measure=lambda case: _gain_and_mass(case, _ends(case, _median_q(case))),
                share=0.9,
            ),
        ),
    )
)


def _symmetric(draw: Draw) -> Iterator[Case]:
    for epsilon in (0.1, 0.2, 0.5):
        for mdp in random_mdps(draw, fast=60, full=300):
            yield Case(mdp.names, mdp=mdp, policy=random_policies(draw.rng, mdp), low=epsilon, high=epsilon)


def _improvement(case: Case) -> Tensor:
    better = _optimal_policy(case)
    return solvers.expected_return(case.mdp, better) - solvers.expected_return(case.mdp, case.policy)


def _spread(case: Case, centre: Tensor, weights: Tensor) -> Tensor:
    """``eps E_{s ~ weights} E_pi |Q - centre|``, ``[B]``."""
    q = solvers.policy_q(case.mdp, case.policy)
    return case.low * (weights * (case.policy * (q - centre).abs()).sum(-1)).sum(-1)


register(
    Check(
        id="PO-02b",
        title="What the bounded-ratio optimum gains",
        claim="ratios in 1 -+ eps:  J(pi*) - J(pi) = eps E_{d^{pi*}} E_pi|Q^pi - med| / (1 - gamma)",
        source="Bounded Ratio RL, arXiv 2604.18578; exact constant derived here",
        kind="identity",
        tags=("policy", "online.bpo"),
        cases=_symmetric,
        measure=_improvement,
        bound=lambda case: (
            _spread(case, _median_q(case), solvers.occupancy(case.mdp, _optimal_policy(case))) * _horizon(case)
        ),
        mutants=(
            Mutant(
                "mean for median",
                bound=lambda case: (
                    _spread(case, _mean_q(case), solvers.occupancy(case.mdp, _optimal_policy(case))) * _horizon(case)
                ),
                share=0.9,
            ),
            Mutant(
                "the old policy's occupancy",
                bound=lambda case: (
                    _spread(case, _median_q(case), solvers.occupancy(case.mdp, case.policy)) * _horizon(case)
                ),
                share=0.5,
            ),
        ),
    )
)

register(
    Check(
        id="PO-02c",
        title="The bounded-ratio optimum improves in every state",
        claim="eps E_pi|Q^pi(s, .) - med| <= V^{pi*}(s) - V^pi(s) in every state; equal at gamma = 0",
        source="Bounded Ratio RL, arXiv 2604.18578; derived here",
        kind="inequality",
        tags=("policy", "online.bpo"),
        cases=_symmetric,
        measure=lambda case: (
            case.low * (case.policy * (solvers.policy_q(case.mdp, case.policy) - _median_q(case)).abs()).sum(-1)
        ),
        bound=lambda case: (
            solvers.policy_value(case.mdp, _optimal_policy(case)) - solvers.policy_value(case.mdp, case.policy)
        ),
        mutants=(
            Mutant(
                "a horizon more",
                measure=lambda case: (
                    case.low
                    * (case.policy * (solvers.policy_q(case.mdp, case.policy) - _median_q(case)).abs()).sum(-1)
                    * _horizon(case).unsqueeze(-1)
                ),
            ),
            Mutant(
                "1 % more",
                measure=lambda case: (
                    1.01
                    * case.low
                    * (case.policy * (solvers.policy_q(case.mdp, case.policy) - _median_q(case)).abs()).sum(-1)
                ),
            ),
        ),
    )
)


def _soft_targets(draw: Draw) -> Iterator[Case]:
    """One state: policies ``[B, A]``, values, and the u that solves BPO's equation at a temperature."""
    for temperature in (0.03, 0.3, 3.0):
        n, size = draw.number(60, 300), 5
        policy = torch.from_numpy(draw.rng.dirichlet(np.ones(size), n))
        q = torch.from_numpy(draw.rng.standard_normal((n, size)))
        names = [f"softened(temperature={temperature:g})[{i}]" for i in range(n)]
        yield Case(names, policy=policy, q=q, temperature=temperature, epsilon=0.3)


def _soft_median(case: Case, temperature: float) -> Tensor:
    """Solve ``E_pi sigma((q - u) / T) = 1/2`` by bisection, ``[B, A]``, the same in every column."""
    low, high = case.q.amin(-1, keepdim=True), case.q.amax(-1, keepdim=True)
    for _ in range(100):
        u = (low + high) / 2
        above = (case.policy * torch.sigmoid((case.q - u) / temperature)).sum(-1, keepdim=True) > 0.5
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    return ((low + high) / 2).expand_as(case.q)


def _softened_gain(case: Case, median: Tensor) -> Tensor:
    """``E[r* q] - E q + 2 eps lambda E H(y)`` and ``E r*``, ``[B, 2]``."""
    ratio = bpo_target_ratio(case.q, median, epsilon=case.epsilon, temperature=case.temperature)
    y = ((ratio - 1 + case.epsilon) / (2 * case.epsilon)).clamp(0, 1)
    entropy = torch.special.entr(y) + torch.special.entr(1 - y)
    gain = (case.policy * ((ratio - 1) * case.q + 2 * case.epsilon * case.temperature * entropy)).sum(-1)
    return torch.stack([gain, (case.policy * ratio).sum(-1)], -1)


def _dual_value(case: Case) -> Tensor:
    """``2 eps min_u E_pi L_u`` with the library's loss of the median, and 1."""
    median = _soft_median(case, case.temperature)
    loss = bpo_median_loss(median, case.q, temperature=case.temperature)
    value = 2 * case.epsilon * (case.policy * loss).sum(-1)
    return torch.stack([value, torch.ones_like(value)], -1)


register(
    Check(
        id="PO-02d",
        title="BPO's target ratio and its median's loss are primal and dual of one problem",
        claim="r* = 1 - eps + 2 eps sigma((q - u)/T), u least in E L_u:  E[(r* - 1) q] + 2 eps T E H(y) = "
        "2 eps min_u E L_u and E r* = 1, so r* is optimal under E r = 1",
        source="derived here: Lagrangian dual of the problem of Bounded Ratio RL, arXiv 2604.18578",
        kind="identity",
        tags=("policy", "online.bpo"),
        cases=_soft_targets,
        measure=lambda case: _softened_gain(case, _soft_median(case, case.temperature)),
        bound=_dual_value,
        tolerance=1e-9,
        mutants=(
            Mutant(
                "u of the temperature 1, whatever the target's, as in the released code",
                measure=lambda case: _softened_gain(case, _soft_median(case, 1.0)),
                share=0.9,
            ),
            Mutant(
                "u is the mean",
                measure=lambda case: _softened_gain(
                    case, (case.policy * case.q).sum(-1, keepdim=True).expand_as(case.q)
                ),
                share=0.9,
            ),
        ),
    )
)


# ---------------------------------------------------------------------------------- PO-09 conservative policy iteration


def _mixtures(draw: Draw) -> Iterator[Case]:
    """Policies, others (a third deterministic) and the share of the other in the new policy."""
    for share in (0.01, 0.1, 0.5, 1.0):
        for mdp in random_mdps(draw, fast=60, full=300):
            other = random_policies(draw.rng, mdp)
            other[::3] = deterministic_policies(draw.rng, mdp)[::3]
            shares = torch.full((len(mdp),), share, dtype=torch.float64)
            yield Case(mdp.names, mdp=mdp, policy=random_policies(draw.rng, mdp), other=other, share=shares)


def _attained_mixture(draw: Draw) -> Iterator[Case]:
    """State 0: stay for 0, or leave for 1; state 1 absorbs and pays 0 or -1. The other policy leaves and takes -1."""
    for gamma, share in ((0.5, 0.5), (0.9, 0.1), (0.99, 1.0)):
        first = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
        second = [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
        reward = [[0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]
        case = _two_states(f"leaves(gamma={gamma:g}, share={share:g})", gamma, reward, first, second)
        yield case.with_parts(share=torch.tensor([share], dtype=torch.float64))


def _mixture_deficit(case: Case) -> Tensor:
    """``alpha E_{d^pi} E_{pi'} A^pi / (1 - gamma)`` less what the mixture really gains, ``[B]``."""
    alpha = case.share.view(-1, 1, 1)
    mixed = (1 - alpha) * case.policy + alpha * case.other
    gained = solvers.expected_return(case.mdp, mixed) - solvers.expected_return(case.mdp, case.policy)
    advantage = (case.other * solvers.advantage(case.mdp, case.policy)).sum(-1)
    expected = (solvers.occupancy(case.mdp, case.policy) * advantage).sum(-1)
    return case.share * expected * _horizon(case) - gained


def _mixture_bound(case: Case) -> Tensor:
    gamma, alpha = case.mdp.discount, case.share
    return 2 * alpha.square() * gamma * _largest_expected(case) * _horizon(case) / (1 - gamma * (1 - alpha))


register(
    Check(
        id="PO-09a",
        title="What a mixture of policies gains at least",
        claim="pi_new = (1 - a) pi + a pi':  J(pi_new) - J(pi) >= a (A' - 2 a gamma eps' / (1 - gamma (1 - a))) / "
        "(1 - gamma),  A' = E_{d^pi} E_{pi'} A^pi, eps' = max_s |E_{pi'} A^pi|",
        source="S. Kakade, J. Langford, ICML 2002, Theorem 4.1 (values not normalised here); attained: derived here",
        kind="inequality",
        tags=("policy",),
        cases=_mixtures,
        measure=_mixture_deficit,
        bound=_mixture_bound,
        extremal=_attained_mixture,
        mutants=(
            Mutant("no penalty", bound=lambda case: torch.zeros_like(case.share)),
            Mutant("1 % less", bound=lambda case: 0.99 * _mixture_bound(case)),
            Mutant("1 for 2", bound=lambda case: 0.5 * _mixture_bound(case)),
        ),
    )
)

_ACCURACY = 0.5  # epsilon of the runs of conservative policy iteration


def _conservative_runs(draw: Draw) -> Iterator[Case]:
    """Runs from the worst policy, in normalised values, until the greedy policy's advantage is at most ``eps / H``.

    The step is ``alpha = A' / (4 H)``. A run that stops leaves its policy alone while others go on.
    """
    for mdp in random_mdps(draw, (0.0, 0.5, 0.9), n_states=(5,), n_actions=(3,), fast=30, full=120):
        policy = solvers.policy_iteration(mdp.replace(reward=-mdp.reward)).policy
        updates = torch.zeros(len(mdp), dtype=torch.float64)
        least = torch.full_like(updates, torch.inf)
        scale = 1 - mdp.discount
        value = scale * solvers.expected_return(mdp, policy)
        for _ in range(2000):
            advantage = scale.view(-1, 1, 1) * solvers.advantage(mdp, policy)
            greedy = torch.nn.functional.one_hot(advantage.argmax(-1), mdp.n_actions).double()
            expected = (solvers.occupancy(mdp, policy) * (greedy * advantage).sum(-1)).sum(-1)
            goes_on = expected > _ACCURACY * scale
            if not bool(goes_on.any()):
                break
            alpha = torch.where(goes_on, expected * scale / 4, torch.zeros_like(expected)).view(-1, 1, 1)
            policy = (1 - alpha) * policy + alpha * greedy
            before, value = value, scale * solvers.expected_return(mdp, policy)
            least = torch.where(goes_on, torch.minimum(least, value - before), least)
            updates += goes_on
        yield Case(mdp.names, mdp=mdp, updates=updates, least=least)


def _promised_gain(case: Case) -> Tensor:
    return _ACCURACY**2 * (1 - case.mdp.discount).square() / 8


register(
    Check(
        id="PO-09b",
        title="Conservative policy iteration: number and size of its updates",
        claim="values normalised to [0, 1], H = 1/(1 - gamma), a = A'/(4H), stop at A' <= eps/H: fewer than 8 H^2 / "
        "eps^2 updates, each of which gains more than eps^2 / (8 H^2)",
        source="S. Kakade, J. Langford, ICML 2002, Theorem 4.4; S. Kakade, thesis 2003, Theorem 7.3.2 (the 8)",
        kind="inequality",
        tags=("policy",),
        cases=_conservative_runs,
        # The least gain as a ratio, so that both entries are of the form measured <= bound.
        measure=lambda case: torch.stack([case.updates, _promised_gain(case) / case.least], -1),
        bound=lambda case: torch.stack([1 / _promised_gain(case), torch.ones_like(case.updates)], -1),
        mutants=(
            Mutant(
                "epsilon of unnormalised values: no H^2",
                bound=lambda case: torch.stack([8 / torch.full_like(case.updates, _ACCURACY) ** 2, case.updates], -1),
            ),
            Mutant(
                "each gains eps^2 / H^2",
                measure=lambda case: torch.stack([case.updates, 8 * _promised_gain(case) / case.least], -1),
            ),
        ),
        loose="the greedy policy's advantage exceeds the stopping level in most updates",
    )
)


# ------------------------------------------------------------------------------------------ PO-10 variance of ratios


def _variance_bound(case: Case) -> Tensor:
    return _variance_term(case).sqrt() * case.mdp.discount * _largest_expected(case) * _horizon(case).square()


def _variance_term(case: Case) -> Tensor:
    """``E_{d^pi} Var_pi(r)``, the chi-square divergence, ``[B]``; r is the library's."""
    ratio = probability_ratio(finite_log(case.other), finite_log(case.policy))
    weights = solvers.occupancy(case.mdp, case.policy).unsqueeze(-1) * case.policy
    return (weights * (ratio - 1).square()).sum((-2, -1))


register(
    Check(
        id="PO-10a",
        title="Bound by the variance of the ratio",
        claim="|J(pi') - L| <= gamma eps' sqrt(E_{d^pi} Var_pi(r)) / (1 - gamma)^2,  eps' = max_s |E_{pi'} A^pi|",
        source="derived here: E|r - 1| <= sqrt(Var r) in PO-01c; ratio-variance trust regions (R2VPO, M2PO)",
        kind="inequality",
        tags=("policy",),
        cases=_pairs,
        measure=lambda case: _surrogate_excess(case).abs(),
        bound=_variance_bound,
        assumptions=_LIMIT,
        extremal=_attained,
        adversary=_SEARCH,
        mutants=(
            Mutant(
                "variance for its root",
                bound=lambda case: (
                    _variance_term(case) * case.mdp.discount * _largest_expected(case) * _horizon(case).square()
                ),
            ),
            Mutant("3 % less", bound=lambda case: 0.97 * _variance_bound(case)),
        ),
    )
)


def _variance_limits(draw: Draw) -> Iterator[Case]:
    """Policies and centred advantages ``[B, 4]``, and a limit on the variance from small to larger than can be used."""
    for limit in (0.01, 0.3, 3.0, 30.0):
        n = draw.number(60, 300)
        policy = torch.from_numpy(draw.rng.dirichlet(np.ones(4), n))
        q = torch.from_numpy(draw.rng.standard_normal((n, 4)))
        advantage = q - (policy * q).sum(-1, keepdim=True)
        yield Case(
            [f"variance(limit={limit:g})[{i}]" for i in range(n)], policy=policy, advantage=advantage, limit=limit
        )


def _variance_optimum(case: Case) -> Tensor:
    """``E[r A]`` of the maximiser ``r = (a + b A)_+``: affine on the best k actions, zero on the others, ``[B]``.

    For each k the two constraints ``E r = 1`` and ``E r^2 = 1 + limit`` fix a and b; the k with r >= 0 on it and
    ``a + b A <= 0`` off it is the one. Where even the best action alone varies less than the limit, it takes all.
    """
    order = case.advantage.argsort(-1, descending=True)
    a, p = case.advantage.gather(-1, order), case.policy.gather(-1, order)
    best = a[:, 0].clone()
    for k in range(2, a.shape[-1] + 1):
        mass = p[:, :k].sum(-1)
        mean = (p[:, :k] * a[:, :k]).sum(-1) / mass
        variance = (p[:, :k] * (a[:, :k] - mean.unsqueeze(-1)).square()).sum(-1) / mass
        slope = ((mass * (1 + case.limit) - 1).clamp(min=0) / variance).sqrt()
        last, beyond = 1 + slope * (a[:, k - 1] - mean), torch.full_like(mean, -1.0)
        if k < a.shape[-1]:
            beyond = 1 + slope * (a[:, k] - mean)
        fits = (mass * (1 + case.limit) >= 1) & (last >= 0) & (beyond <= 0)
        best = torch.where(fits, mean + slope * variance, best)
    return best


def _variance_dual(case: Case) -> Tensor:
    """``min_v v + sqrt((1 + limit) E (A - v)_+^2)``, convex in v, by ternary search, ``[B]``."""

    def value(v: Tensor) -> Tensor:
        beyond = (case.advantage - v.unsqueeze(-1)).clamp(min=0)
        return v + ((1 + case.limit) * (case.policy * beyond.square()).sum(-1)).sqrt()

    high = case.advantage.amax(-1)
    low = -100 * (1 + 1 / case.limit) * case.advantage.abs().amax(-1)
    for _ in range(200):
        third = (high - low) / 3
        left, right = low + third, high - third
        worse = value(left) > value(right)
        low, high = torch.where(worse, left, low), torch.where(worse, high, right)
    return value((low + high) / 2)


register(
    Check(
        id="PO-10b",
        title="Best ratio of bounded variance",
        claim="max E_pi[r A] under E r = 1, Var r <= delta, r >= 0: r = 1 + sqrt(delta) A / sigma_A and the value "
        "sqrt(delta) sigma_A where that r is >= 0; otherwise r = (a + b A)_+",
        source="derived here; strong duality with min_v v + sqrt((1 + delta) E (A - v)_+^2)",
        kind="identity",
        tags=("policy",),
        cases=_variance_limits,
        measure=_variance_optimum,
        bound=_variance_dual,
        tolerance=1e-7,
        mutants=(
            Mutant(
                "negative ratios: sqrt(delta) sigma_A for every delta",
                measure=lambda case: (case.limit * (case.policy * case.advantage.square()).sum(-1)).sqrt(),
                share=0.4,
            ),
            Mutant(
                "delta for its root",
                measure=lambda case: case.limit * (case.policy * case.advantage.square()).sum(-1).sqrt(),
                share=0.9,
            ),
        ),
    )
)


# ---------------------------------------------------------------------------------------------- PO-11 PPO-clip and SPO

_BAND = 0.2


def _ratios(draw: Draw) -> Iterator[Case]:
    """Ratios on a grid from 0.05 to 4 for random advantages, away from the corners where the slope jumps."""
    n = draw.number(50, 500)
    ratio = torch.linspace(0.0511, 3.9987, 200, dtype=torch.float64).expand(n, -1)
    scale = 10 ** draw.rng.uniform(-3, 2, (n, 1))
    advantage = torch.from_numpy(draw.rng.standard_normal((n, 1)) * scale).expand(-1, ratio.shape[1])
    yield Case([f"advantage[{i}]" for i in range(n)], ratio=ratio, advantage=advantage)


def _log_pair(case: Case) -> tuple[Tensor, Tensor]:
    return case.ratio.log(), torch.zeros_like(case.ratio)


def _ppo_facts(case: Case) -> Tensor:
    """Slope of PPO's loss in the ratio, and by how much its gain exceeds ``r A``, each over |A|, ``[B, 2, n]``."""
    log_prob, old = _log_pair(case)
    slope = ppo_clip_coefficient(log_prob, old, case.advantage, clip=_BAND) / case.ratio
    gain = -ppo_clip_loss(log_prob, old, case.advantage, clip=_BAND)
    size = case.advantage.abs()
    return torch.stack([slope / size, (gain - case.ratio * case.advantage).clamp(min=0) / size], 1)


def _ppo_expected(case: Case) -> Tensor:
    left = torch.where(case.advantage > 0, case.ratio > 1 + _BAND, case.ratio < 1 - _BAND)
    slope = torch.where(left, 0.0, -case.advantage.sign())
    return torch.stack([slope, torch.zeros_like(slope)], 1)


register(
    Check(
        id="PO-11a",
        title="PPO's clipped surrogate: a lower bound on r A, flat once the ratio has left",
        claim="d/dr of min(r A, clip(r, 1 -+ eps) A) is 0 for A > 0, r > 1 + eps and for A < 0, r < 1 - eps, else A; "
        "the surrogate never exceeds r A",
        source="J. Schulman et al., 2017, arXiv 1707.06347, equation (7); derived here",
        kind="identity",
        tags=("policy", "online.ppo"),
        cases=_ratios,
        measure=_ppo_facts,
        bound=_ppo_expected,
        mutants=(
            Mutant(
                "clipped on both sides whatever the advantage",
                bound=lambda case: torch.stack(
                    [
                        torch.where((case.ratio - 1).abs() > _BAND, 0.0, -case.advantage.sign()),
                        torch.zeros_like(case.ratio),
                    ],
                    1,
                ),
                share=0.9,
            ),
            Mutant(
                "not clipped",
                bound=lambda case: torch.stack([-case.advantage.sign(), torch.zeros_like(case.ratio)], 1),
                share=0.9,
            ),
        ),
    )
)


def _spo_slopes(case: Case, point: Tensor) -> Tensor:
    """SPO's slope in the ratio over |A|: at `point` and at every ratio, ``[B, n + 1]``."""
    advantage = torch.cat([case.advantage[:, :1], case.advantage], 1)
    ratio = torch.cat([point, case.ratio], 1)
    slope = spo_coefficient(ratio.log(), torch.zeros_like(ratio), advantage, epsilon=_BAND) / ratio
    return slope / advantage.abs()


def _spo_expected(case: Case) -> Tensor:
    best = 1 + _BAND * case.advantage.sign()
    return torch.cat([torch.zeros_like(best[:, :1]), (case.ratio - best) / _BAND], 1)


register(
    Check(
        id="PO-11b",
        title="SPO's loss of one sample is least at the end of the interval, and pulls back from beyond",
        claim="d/dr of |A| (r - 1)^2 / (2 eps) - r A is |A| (r - r0) / eps, r0 = 1 + sign(A) eps: 0 at r0 only",
        source="Z. Xie et al. (SPO), ICML 2025, arXiv 2401.16025; derived here",
        kind="identity",
        tags=("policy", "online.spo"),
        cases=_ratios,
        measure=lambda case: _spo_slopes(case, 1 + _BAND * case.advantage[:, :1].sign()),
        bound=_spo_expected,
        mutants=(
            Mutant(
                "least at 1 + eps whatever the sign",
                measure=lambda case: _spo_slopes(case, torch.full_like(case.ratio[:, :1], 1 + _BAND)),
                share=0.3,
            ),
            Mutant(
                "flat beyond, as PPO's",
                bound=lambda case: torch.where(
                    (_spo_expected(case) > 0) == (torch.cat([case.advantage[:, :1], case.advantage], 1) > 0),
                    0.0,
                    _spo_expected(case),
                ),
                share=0.9,
            ),
        ),
    )
)


def _shared_logit(draw: Draw) -> Iterator[Case]:
    """Two states, two actions and one parameter; the old policy is uniform, the states are as likely.

    State 0 prefers action 0 by much, state 1 prefers action 1 by little, and the parameter moves state 1 thrice as far:
    until the ratios of state 0 are at the end of the interval, it pays to drag those of state 1 beyond.
    """
    n = draw.number(20, 100)
    strong = torch.from_numpy(draw.rng.uniform(1, 3, n))
    weak = torch.from_numpy(draw.rng.uniform(0.05, 0.2, n))
    advantage = torch.stack([torch.stack([strong, -strong], -1), torch.stack([-weak, weak], -1)], 1)
    yield Case([f"shared logit[{i}]" for i in range(n)], advantage=advantage)


def _deviation_at_best(case: Case, loss: Any) -> Tensor:
    """Largest |r - 1| over states and actions where a loss of the one shared logit in [0, 4] is least, ``[B]``.

    The slope of the loss is negative up to there and positive beyond, so halving the interval by its sign finds it.
    """
    features = torch.tensor([[0.5, -0.5], [1.5, -1.5]], dtype=torch.float64)
    old = torch.full((len(case), 2, 2), 0.5, dtype=torch.float64).log()
    low, high = torch.zeros(len(case), dtype=torch.float64), torch.full((len(case),), 4.0, dtype=torch.float64)
    for _ in range(60):
        z = ((low + high) / 2).requires_grad_()
        log_prob = torch.log_softmax(z.view(-1, 1, 1) * features, -1)
        (slope,) = torch.autograd.grad(loss(log_prob, old, case.advantage).sum(), z)
        middle = z.detach()
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return ((log_prob - old).exp() - 1).abs().amax((1, 2)).detach()


def _ppo_deviation(case: Case) -> Tensor:
    return _deviation_at_best(case, lambda new, old, a: ppo_clip_loss(new, old, a, clip=_BAND))


def _cubes(case: Case) -> Tensor:
    """``((1 + eps)^3 - (1 - eps)^3) / ((1 + eps)^3 + (1 - eps)^3)``, ``[B]``."""
    up, down = (1 + _BAND) ** 3, (1 - _BAND) ** 3
    return torch.full((len(case),), (up - down) / (up + down), dtype=torch.float64)


register(
    Check(
        id="PO-11c",
        title="PPO does not keep ratios in the interval",
        claim="two states, the logits of one thrice as far as the other's: the clipped surrogate is greatest where  "
        "max |r - 1| = ((1 + eps)^3 - (1 - eps)^3) / ((1 + eps)^3 + (1 - eps)^3) > eps",
        source="derived here; the observation: L. Engstrom et al., ICLR 2020, arXiv 2005.12729; Z. Xie et al. (SPO)",
        kind="identity",
        tags=("policy", "online.ppo", "online.spo"),
        cases=_shared_logit,
        measure=_ppo_deviation,
        bound=_cubes,
        mutants=(
            Mutant(
                "claimed: PPO's ratios stay within the interval",
                bound=lambda case: torch.full((len(case),), _BAND, dtype=torch.float64),
                share=1.0,
            ),
            Mutant("no clipping", measure=lambda case: _deviation_at_best(case, policy_gradient_loss), share=1.0),
            Mutant(
                "SPO's penalty for PPO's clipping",
                measure=lambda case: _deviation_at_best(case, lambda new, old, a: spo_loss(new, old, a, epsilon=_BAND)),
                share=1.0,
            ),
        ),
    )
)


def _small_policies(draw: Draw) -> Iterator[Case]:
    """Policies over four actions and centred advantages, and the built one whose rare action escapes."""
    n = draw.number(100, 300)
    policy = torch.from_numpy(draw.rng.dirichlet(np.ones(4), n))
    q = torch.from_numpy(draw.rng.standard_normal((n, 4)))
    yield Case([f"simplex[{i}]" for i in range(n)], policy=policy, advantage=q - (policy * q).sum(-1, keepdim=True))
    yield _escaping()


def _escaping() -> Case:
    policy = torch.tensor([[0.25, 0.7499, 0.0001]], dtype=torch.float64)
    advantage = torch.tensor([[3.0, -1.0, 0.001]], dtype=torch.float64)
    return Case(["built: a rare action with a small advantage"], policy=policy, advantage=advantage)


def _spo_optimum(case: Case) -> Tensor:
    """``r = (1 + eps (sign A - v / |A|))_+`` with v such that ``E r = 1``, by bisection, ``[B, A]``."""
    size = case.advantage.abs()

    def ratio(v: Tensor) -> Tensor:
        return (1 + _BAND * (case.advantage.sign() - v / size)).clamp(min=0)

    low, high = (sign * (1 + 1 / _BAND) * size.amax(-1, keepdim=True) for sign in (-1, 1))
    for _ in range(200):
        v = (low + high) / 2
        above = (case.policy * ratio(v)).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, v, low), torch.where(above, high, v)
    return ratio((low + high) / 2)


def _population_loss(case: Case, ratio: Tensor) -> Tensor:
    """``E_pi`` of the library's loss at these ratios, ``[B]``."""
    log_prob = finite_log(ratio)
    loss = spo_loss(log_prob, torch.zeros_like(log_prob), case.advantage, epsilon=_BAND)
    return (case.policy * loss).sum(-1)


def _spo_dual(case: Case) -> Tensor:
    """Least population loss over the simplex by a quadratic solver that knows nothing of the closed form, ``[B]``."""
    policy, advantage = case.policy.numpy(), case.advantage.numpy()
    found = []
    for p, a in zip(policy, advantage, strict=True):
        curvature, size = np.abs(a) / _BAND, len(a)
        # Lagrange: on the support, curvature (r - 1) - a = -v and sum p r = 1. All 2^size - 1 supports are tried.
        best = np.inf
        for support in range(1, 2**size):
            on = np.array([(support >> i) & 1 for i in range(size)], bool)
            system = np.zeros((on.sum() + 1, on.sum() + 1))
            system[:-1, :-1], system[:-1, -1], system[-1, :-1] = np.diag(curvature[on]), 1, p[on]
            solved = np.linalg.solve(system, np.append(a[on] + curvature[on], 1.0))[:-1]
            if (solved >= 0).all():
                r = np.zeros(size)
                r[on] = solved
                best = min(best, float((p * (curvature / 2 * (r - 1) ** 2 - r * a)).sum()))
        found.append(best)
    return torch.tensor(found, dtype=torch.float64)


register(
    Check(
        id="PO-11d",
        title="SPO's optimum when the probabilities must sum to 1",
        claim="min over policies of E_pi[|A| (r - 1)^2 / (2 eps) - r A] is at r = (1 + eps (sign A - v/|A|))_+ with v "
        "such that E_pi r = 1",
        source="derived here",
        kind="identity",
        tags=("policy", "online.spo"),
        cases=_small_policies,
        measure=lambda case: _population_loss(case, _spo_optimum(case)),
        bound=_spo_dual,
        tolerance=1e-9,
        mutants=(
            Mutant(
                "each sample at its own optimum 1 + sign(A) eps",
                measure=lambda case: _population_loss(case, 1 + _BAND * case.advantage.sign()),
                share=0.9,
            ),
        ),
    )
)

_V = -0.4998 / (0.25 / 3 + 0.7499 + 0.1)
_BUILT_RATIOS = torch.tensor([[1.2 - _V / 15, 0.8 - _V / 5, 1.2 - 200 * _V]], dtype=torch.float64)  # by hand

register(
    Check(
        id="PO-11e",
        title="SPO's population optimum can leave the interval",
        claim="pi = (.25, .7499, .0001), A = (3, -1, .001), eps = .2: the optimal ratios are (1.236, .907, 108.3), "
        "1 + eps (sign A - v/|A|) with v = -.4998 / (.25/3 + .7499 + .1)",
        source="derived here: nothing holds the ratio of an action whose |A| is near 0",
        kind="identity",
        tags=("policy", "online.spo"),
        cases=lambda draw: iter([_escaping()]),
        measure=_spo_optimum,
        bound=lambda case: _BUILT_RATIOS,
        mutants=(
            Mutant(
                "claimed: |r - 1| <= eps",
                bound=lambda case: _spo_optimum(case).clamp(1 - _BAND, 1 + _BAND),
            ),
        ),
    )
)


# ------------------------------------------------------------------------------------------------------ PO-12 FixPO

_LARGEST_KL = 0.02


def _fixpo_updates(draw: Draw, batch_states: int | None = None) -> Iterator[Case]:
    """One hasty update of the library's FixPO on whole MDPs, its policy linear in three features of the state.

    `batch_states` limits the batch to the first states; by default it has all of them.
    """
    n, s, a, k = draw.number(16, 64), 6, 3, 3
    for mdp in random_mdps(draw, (0.0, 0.5, 0.9), n_states=(s,), n_actions=(a,), fast=n, full=n):
        features = torch.from_numpy(draw.rng.standard_normal((len(mdp), s, k)))
        weights = torch.from_numpy(0.3 * draw.rng.standard_normal((len(mdp), a, k)))
        agent = exact_batch.exact_agent(
            FixPO,
            features,
            weights,
            kl_bound=_LARGEST_KL,
            learning_rate=0.1,
            learning_rate_decay="none",
            n_epochs=4,
            max_passes=20,
        )
        policy = exact_batch.log_policy_of(agent, features).exp()
        # Means over rows are uniform, so the exact weights of the surrogate go into the advantages.
        weight = s * a * solvers.occupancy(mdp, policy).unsqueeze(-1) * policy
        advantage = weight * solvers.advantage(mdp, policy)
        seen = slice(batch_states)
        samples = exact_batch.exact_samples(agent, features[:, seen], advantage[:, seen])
        agent.improve(samples, agent.collect())
        other = exact_batch.log_policy_of(agent, features).exp()
        yield Case(mdp.names, mdp=mdp, policy=policy, other=other)


def _kl_and_excess(case: Case) -> Tensor:
    largest = divergence(case.policy.log(), case.other.log()).amax(-1)
    return torch.stack([largest, _surrogate_excess(case)], -1)


def _fixpo_bound(case: Case) -> Tensor:
    limit = torch.full_like(case.mdp.discount, _LARGEST_KL)
    penalty = 2 * case.mdp.discount * _largest_advantage(case) * limit * _horizon(case).square()
    return torch.stack([limit, penalty], -1)


register(
    Check(
        id="PO-12",
        title="FixPO: the divergence of every state is bounded after the update, and so is the loss of return",
        claim="batch of all states: max_s KL(pi_old || pi_new) <= eps after the fix-up, hence J(pi_new) >= L - "
        "2 gamma max|A| eps / (1 - gamma)^2",
        source="K. Zentner et al., 2023, arXiv 2312.05405 (the guarantee); the bound: PO-01b, derived here",
        kind="inequality",
        tags=("policy", "online.fixpo"),
        cases=_fixpo_updates,
        measure=_kl_and_excess,
        bound=_fixpo_bound,
        tolerance=1e-9,
        mutants=(
            Mutant("a batch of half the states", cases=lambda draw: _fixpo_updates(draw, 3)),
            Mutant("a hundredth of the divergence", bound=lambda case: 0.01 * _fixpo_bound(case)),
        ),
    )
)
