r"""Policy gradients: the theorem, the natural gradient, and how fast softmax policies learn by exact gradients."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...online.objectives import props_loss
from ...online.trpo import TRPO
from .. import exact_batch, gradients, regularised, solvers
from ..check import Adversary, Case, Check, Draw, Mutant, register
from ..families import random_mdps, random_policies
from ..mdp import TabularMDP
from ..regularised import Regulariser

_TAGS = ("policy",)
_PG_TAGS = ("policy", "online.ppo", "online.trpo", "online.mdpo", "online.spo", "online.fixpo", "online.bpo")
_IDENTITY = 1e-9  # of gradients, relative to 1 + their size: another power of the horizon on top of rounding


# --------------------------------------------------------------------------------------- FND-03 policy-gradient theorem


def _softmax_policies(draw: Draw) -> Iterator[Case]:
    """Random logits on random MDPs, without and with an entropy bonus."""
    for mdp in random_mdps(draw):
        logits = torch.from_numpy(1.5 * draw.rng.standard_normal(tuple(mdp.reward.shape)))
        bonus = torch.from_numpy(draw.rng.uniform(0, 1, len(mdp)) * draw.rng.integers(2, size=len(mdp)))
        yield Case(mdp.names, mdp=mdp, logits=logits, bonus=bonus, policy=torch.softmax(logits, -1))


def _by_autograd(case: Case) -> Tensor:
    """Gradient of ``J_tau`` in the logits through the linear solver, ``[B, S, A]``."""
    logits = case.logits.clone().requires_grad_()
    value = regularised.policy_value(case.mdp, torch.log_softmax(logits, -1), Regulariser(case.bonus))
    (gradient,) = torch.autograd.grad((case.mdp.start * value).sum(), logits)
    return gradient


def _by_complex_step(case: Case) -> Tensor:
    bonus = case.bonus.numpy()
    return gradients.complex_step(
        lambda z: gradients.complex_return(case.mdp, gradients.complex_softmax(z), bonus), case.logits
    )


def _two_opinions(case: Case) -> Tensor:
    """Autograd's gradient and the complex step's, ``[B, 2, S, A]``."""
    return torch.stack([_by_autograd(case), _by_complex_step(case)], 1)


def _theorem(case: Case, visits: Tensor, factor: Tensor | None = None) -> Tensor:
    """``d pi A_tau / (1 - gamma)`` with other state weights, twice, ``[B, 2, S, A]``."""
    advantage = gradients.regularised_advantage(case.mdp, case.policy, case.bonus)
    horizon = 1 / (1 - case.mdp.discount) if factor is None else factor
    closed = visits.unsqueeze(-1) * case.policy * advantage * horizon.view(-1, 1, 1)
    return torch.stack([closed, closed], 1)


def _closed_form(case: Case) -> Tensor:
    closed = gradients.softmax_gradient(case.mdp, case.policy, case.bonus)
    return torch.stack([closed, closed], 1)


def _recurrent(draw: Draw) -> Iterator[Case]:
    """The same where a stationary law exists and gamma is between 0.5 and 0.9: it differs from the occupancy."""
    for case in _softmax_policies(draw):
        keep = ((case.mdp.discount >= 0.5) & (case.mdp.discount <= 0.9)).nonzero().squeeze(1)
        mdp = case.mdp[keep]
        # Every row gets a little of the uniform law: one recurrent class.
        mixed = 0.95 * mdp.transition + 0.05 / mdp.n_states
        mdp = mdp.replace(transition=mixed / mixed.sum(-1, keepdim=True))
        yield Case(mdp.names, mdp=mdp, **{name: case.parts[name][keep] for name in ("logits", "bonus", "policy")})


register(
    Check(
        id="FND-03a",
        title="Policy-gradient theorem, softmax policies",
        claim="dJ_tau/dtheta_sa = d^pi(s) pi(a|s) A_tau(s, a) / (1 - gamma),  A_tau = Q_tau - tau log pi - V_tau; "
        "autograd through the solver and the complex step agree",
        source="R. Sutton et al., NeurIPS 2000, Theorem 1; entropy-regularised form derived here",
        kind="identity",
        tags=_PG_TAGS,
        cases=_softmax_policies,
        measure=_two_opinions,
        bound=_closed_form,
        tolerance=_IDENTITY,
        mutants=(
            Mutant(
                "states weighted by the stationary law, as if gamma were 1",
                bound=lambda case: _theorem(case, solvers.average_reward(case.mdp, case.policy).stationary),
                cases=_recurrent,
                share=0.9,
            ),
            Mutant(
                "no factor 1 / (1 - gamma)",
                bound=lambda case: _theorem(
                    case, solvers.occupancy(case.mdp, case.policy), torch.ones_like(case.mdp.discount)
                ),
                cases=_recurrent,
                share=0.9,
            ),
            Mutant(
                "the entropy left out of the advantage",
                bound=lambda case: _closed_form(case.with_parts(bonus=torch.zeros_like(case.bonus))),
                share=0.3,
            ),
        ),
        not_mutants={"Q for A": "any baseline of the state leaves the gradient as it is; FND-03d checks it"},
    )
)


def _direct_opinions(case: Case) -> Tensor:
    probabilities = case.policy.clone().requires_grad_()
    value = regularised.policy_value(case.mdp, probabilities.log(), Regulariser(case.bonus))
    (automatic,) = torch.autograd.grad((case.mdp.start * value).sum(), probabilities)
    bonus = case.bonus.numpy()
    stepped = gradients.complex_step(lambda p: gradients.complex_return(case.mdp, p, bonus), case.policy)
    return torch.stack([automatic, stepped], 1)


def _direct_closed(case: Case, horizon: bool = True) -> Tensor:
    closed = gradients.direct_gradient(case.mdp, case.policy, case.bonus)
    closed = closed if horizon else closed * (1 - case.mdp.discount).view(-1, 1, 1)
    return torch.stack([closed, closed], 1)


register(
    Check(
        id="FND-03b",
        title="Policy-gradient theorem, probabilities as parameters",
        claim="dJ_tau/dpi(a|s) = d^pi(s) (Q_tau(s, a) - tau log pi(a|s) - tau) / (1 - gamma)",
        source="R. Sutton et al., NeurIPS 2000, Theorem 1; A. Agarwal et al., JMLR 2021, equation (7); derived here",
        kind="identity",
        tags=_TAGS,
        cases=_softmax_policies,
        measure=_direct_opinions,
        bound=_direct_closed,
        tolerance=_IDENTITY,
        mutants=(
            Mutant("no horizon", bound=lambda case: _direct_closed(case, horizon=False), share=0.7),
            Mutant("the softmax gradient", bound=lambda case: _closed_form(case), share=0.9),
        ),
    )
)


def _linear_policies(draw: Draw) -> Iterator[Case]:
    """Softmax policies linear in random features, fewer of them than states."""
    for mdp in random_mdps(draw):
        k = max(2, mdp.n_states // 2)
        features = torch.from_numpy(draw.rng.standard_normal((*mdp.reward.shape, k)))
        weights = torch.from_numpy(draw.rng.standard_normal((len(mdp), k)))
        policy = torch.softmax(torch.einsum("bsak,bk->bsa", features, weights), -1)
        yield Case(mdp.names, mdp=mdp, features=features, weights=weights, policy=policy)


def _linear_opinions(case: Case) -> Tensor:
    weights = case.weights.clone().requires_grad_()
    policy = torch.softmax(torch.einsum("bsak,bk->bsa", case.features, weights), -1)
    (automatic,) = torch.autograd.grad(solvers.expected_return(case.mdp, policy).sum(), weights)
    features = case.features.numpy()

    def objective(w: gradients.Complex) -> gradients.Complex:
        return gradients.complex_return(case.mdp, gradients.complex_softmax(np.einsum("bsak,bk->bsa", features, w)))

    return torch.stack([automatic, gradients.complex_step(objective, case.weights)], 1)


def _linear_closed(case: Case) -> Tensor:
    closed = gradients.linear_softmax_gradient(case.mdp, case.features, case.policy)
    return torch.stack([closed, closed], 1)


def _uncentred(case: Case) -> Tensor:
    weights = solvers.occupancy(case.mdp, case.policy).unsqueeze(-1) * case.policy
    q = solvers.policy_q(case.mdp, case.policy) / (1 - case.mdp.discount).view(-1, 1, 1)
    closed = torch.einsum("bsa,bsak->bk", weights * q, case.features)
    return torch.stack([closed, closed], 1)


register(
    Check(
        id="FND-03c",
        title="Policy-gradient theorem, softmax policies linear in features",
        claim="dJ/dw = sum d^pi pi A^pi (phi - E_pi phi) / (1 - gamma)",
        source="R. Sutton et al., NeurIPS 2000, Theorem 1",
        kind="identity",
        tags=_TAGS,
        cases=_linear_policies,
        measure=_linear_opinions,
        bound=_linear_closed,
        tolerance=_IDENTITY,
        mutants=(Mutant("Q and phi, neither centred", bound=_uncentred, share=0.9),),
    )
)


def _with_baseline(draw: Draw) -> Iterator[Case]:
    for case in _softmax_policies(draw):
        shape = case.policy.shape
        baseline = torch.from_numpy(draw.rng.standard_normal(shape) * 10)
        yield case.with_parts(baseline=baseline, bonus=torch.zeros_like(case.bonus))


def _baseline_gradient(case: Case, baseline: Tensor) -> Tensor:
    """``sum_a d pi (Q - b) (e_a - pi) / (1 - gamma)``: the expected score-function gradient, ``[B, S, A]``."""
    value = solvers.policy_q(case.mdp, case.policy) - baseline
    visits = solvers.occupancy(case.mdp, case.policy).unsqueeze(-1) / (1 - case.mdp.discount).view(-1, 1, 1)
    weighted = case.policy * value
    return visits * (weighted - case.policy * weighted.sum(-1, keepdim=True))


register(
    Check(
        id="FND-03d",
        title="A baseline of the state leaves the policy gradient as it is",
        claim="E_{d, pi}[(Q(s, a) - b(s)) grad log pi(a|s)] / (1 - gamma) = grad J for every b",
        source="R. Williams, Machine Learning 1992; R. Sutton et al., NeurIPS 2000",
        kind="identity",
        tags=_PG_TAGS,
        cases=_with_baseline,
        measure=lambda case: _baseline_gradient(case, case.baseline[..., :1]),
        bound=_by_autograd,
        tolerance=_IDENTITY,
        mutants=(
            Mutant(
                "a baseline that depends on the action",
                measure=lambda case: _baseline_gradient(case, case.baseline),
                share=0.9,
            ),
        ),
    )
)


# -------------------------------------------------------------------------------- PO-03 natural gradient, telescoping


def _interior_policies(draw: Draw) -> Iterator[Case]:
    """Policies with every probability above 1e-4, on MDPs where every state is visited."""
    for mdp in random_mdps(draw):
        policy = 0.999 * random_policies(draw.rng, mdp) + 0.001 / mdp.n_actions
        yield Case(mdp.names, mdp=mdp, policy=policy)


def _centred(table: Tensor) -> Tensor:
    return table - table.mean(-1, keepdim=True)


def _advantage_direction(case: Case) -> Tensor:
    return _centred(solvers.advantage(case.mdp, case.policy)) / (1 - case.mdp.discount).view(-1, 1, 1)


def _average_fisher(case: Case) -> Tensor:
    """The natural gradient with a Fisher matrix that weighs states alike."""
    even = torch.full_like(case.mdp.start, 1 / case.mdp.n_states)
    inverse = gradients.pseudo_inverse(gradients.fisher_blocks(even, case.policy))
    return torch.einsum("bsij,bsj->bsi", inverse, gradients.softmax_gradient(case.mdp, case.policy))


def _all_visited(case: Case) -> Tensor:
    return (solvers.occupancy(case.mdp, case.policy) > 1e-8).all(-1)


register(
    Check(
        id="PO-03a",
        title="The natural gradient of a softmax policy is the advantage",
        claim="tabular softmax, d, pi > 0:  F^+ grad J = A / (1 - gamma) + c(s)",
        source="S. Kakade, NeurIPS 2001, Theorem 1; A. Agarwal et al., JMLR 2021, arXiv 1908.00261, Lemma 5.1",
        kind="identity",
        tags=(*_TAGS, "online.trpo", "online.mdpo"),
        cases=_interior_policies,
        measure=lambda case: _centred(gradients.natural_gradient(case.mdp, case.policy)),
        bound=_advantage_direction,
        assumptions={"every state is visited": _all_visited},
        tolerance=_IDENTITY,
        mutants=(
            Mutant(
                "Fisher matrix without the occupancy", measure=lambda case: _centred(_average_fisher(case)), share=0.9
            ),
            Mutant(
                "the gradient itself",
                measure=lambda case: _centred(gradients.softmax_gradient(case.mdp, case.policy)),
                share=0.9,
            ),
        ),
    )
)


def _trpo_steps(draw: Draw) -> Iterator[Case]:
    """One step of the library's TRPO, undamped, on whole MDPs; the region is small, so that it takes the full step."""
    for case in _interior_policies(draw):
        mdp, policy = case.mdp[:: draw.number(3, 1)], case.policy[:: draw.number(3, 1)]
        features = exact_batch.one_hot_features(len(mdp), mdp.n_states)
        agent = exact_batch.exact_agent(
            TRPO, features, policy.log().mT, max_kl=1e-8, damping=0.0, cg_iterations=10 * mdp.n_states
        )
        weight = solvers.occupancy(mdp, policy).unsqueeze(-1) * policy
        samples = exact_batch.exact_samples(agent, features, solvers.advantage(mdp, policy), weight)
        agent.step_policy(samples)
        moved = exact_batch.log_policy_of(agent, features) - policy.log()
        yield Case(mdp.names, mdp=mdp, policy=policy, moved=moved)


def _fisher_unit(case: Case, table: Tensor) -> Tensor:
    """Displacements of the logits less their mean in each state, times sqrt(d pi), as a unit vector: Fisher's norm."""
    centred = table - (case.policy * table).sum(-1, keepdim=True)
    scaled = centred * (solvers.occupancy(case.mdp, case.policy).unsqueeze(-1) * case.policy).sqrt()
    return scaled / torch.linalg.vector_norm(scaled, dim=(1, 2), keepdim=True)


register(
    Check(
        id="PO-03d",
        title="TRPO's step is the advantage",
        claim="the library's TRPO, no damping, exact batch: log pi_new - log pi is a multiple of A + c(s) as the "
        "region shrinks",
        source="S. Kakade, NeurIPS 2001; J. Schulman et al., ICML 2015, arXiv 1502.05477, section 7; derived here",
        kind="identity",
        tags=(*_TAGS, "online.trpo"),
        cases=_trpo_steps,
        measure=lambda case: _fisher_unit(case, case.moved),
        bound=lambda case: _fisher_unit(case, _advantage_direction(case)),
        assumptions={"every state is visited": _all_visited},
        # Conjugate gradient stops at a relative residual of 1e-5, and the step is finite.
        tolerance=2e-3,
        mutants=(
            Mutant(
                "the gradient's direction",
                bound=lambda case: _fisher_unit(case, gradients.softmax_gradient(case.mdp, case.policy)),
                share=0.9,
            ),
        ),
    )
)


def _score_features(case: Case, features: Tensor, weights: Tensor | None = None) -> Tensor:
    """Least-squares fit w of Q by `features` under d pi (or other weights), ``[B, k]``."""
    q = solvers.policy_q(case.mdp, case.policy)
    if weights is None:
        weights = solvers.occupancy(case.mdp, case.policy).unsqueeze(-1) * case.policy
    root = weights.sqrt().flatten(1).unsqueeze(-1)
    solution = torch.linalg.lstsq(root * features.flatten(1, 2), root * q.flatten(1).unsqueeze(-1))
    fitted: Tensor = solution.solution.squeeze(-1)
    return fitted


def _compatible(case: Case, fitted: Tensor) -> Tensor:
    """``E[w^T psi psi] / (1 - gamma) = F w / (1 - gamma)``, ``[B, k]``."""
    fisher = gradients.fisher_matrix(case.features, solvers.occupancy(case.mdp, case.policy), case.policy)
    return torch.einsum("bij,bj->bi", fisher, fitted) / (1 - case.mdp.discount).unsqueeze(-1)


register(
    Check(
        id="PO-03b",
        title="Compatible features",
        claim="w* = argmin E_{d, pi}(Q - w^T psi)^2 for the scores psi:  E[w*^T psi psi] / (1 - gamma) = grad J, so "
        "w* = (1 - gamma) F^-1 grad J",
        source="R. Sutton et al., NeurIPS 2000, Theorem 2; S. Kakade, NeurIPS 2001, Theorem 1",
        kind="identity",
        tags=_TAGS,
        cases=_linear_policies,
        measure=lambda case: _compatible(case, _score_features(case, gradients.scores(case.features, case.policy))),
        bound=lambda case: _linear_opinions(case)[:, 0],
        tolerance=_IDENTITY,
        mutants=(
            Mutant(
                "all states and actions weighted alike",
                measure=lambda case: _compatible(
                    case,
                    _score_features(case, gradients.scores(case.features, case.policy), torch.ones_like(case.policy)),
                ),
                share=0.9,
            ),
            Mutant(
                "features that are not scores",
                measure=lambda case: _compatible(case, _score_features(case, case.features)),
                share=0.9,
            ),
        ),
    )
)


def _natural_steps(draw: Draw) -> Iterator[Case]:
    for size in (0.1, 1.0, 10.0):
        for case in _interior_policies(draw):
            yield case.with_parts(size=torch.full((len(case),), size, dtype=torch.float64))


def _natural_step(case: Case, horizon: bool = True) -> tuple[Tensor, Tensor]:
    """``log pi_{t+1}`` and ``log Z_t`` of ``pi_{t+1} = pi_t exp(eta A_t / (1 - gamma)) / Z_t``."""
    scale = case.size / (1 - case.mdp.discount) if horizon else case.size
    tilted = case.policy.log() + scale.view(-1, 1, 1) * solvers.advantage(case.mdp, case.policy)
    normaliser = torch.logsumexp(tilted, -1)
    return tilted - normaliser.unsqueeze(-1), normaliser


def _telescoped(case: Case, horizon: bool = True) -> Tensor:
    """Both right-hand sides, ``[B, 2]``."""
    log_new, normaliser = _natural_step(case, horizon)
    new = log_new.exp()
    best = solvers.policy_iteration(case.mdp).policy
    chosen = best.bool()
    # KL to a deterministic policy: minus the logarithm of the probability of its actions.
    fall = (log_new - case.policy.log())[chosen].view(normaliser.shape)
    first = (solvers.occupancy(case.mdp, best) * (fall + normaliser)).sum(-1)
    moved = regularised.divergence(log_new, case.policy.log())
    second = (solvers.occupancy(case.mdp, new) * (moved + normaliser)).sum(-1)
    return torch.stack([first, second], -1) / case.size.unsqueeze(-1)


def _gaps(case: Case) -> Tensor:
    """``V*(rho) - V^t(rho)`` and ``V^{t+1}(rho) - V^t(rho)``, ``[B, 2]``."""
    best = solvers.policy_iteration(case.mdp).value
    now = solvers.expected_return(case.mdp, case.policy)
    new = solvers.expected_return(case.mdp, _natural_step(case)[0].exp())
    return torch.stack([(case.mdp.start * best).sum(-1) - now, new - now], -1)


register(
    Check(
        id="PO-03c",
        title="One natural-gradient step, exactly",
        claim="pi_{t+1} = pi_t exp(eta A_t/(1 - gamma))/Z_t:  V* - V^t = E_{d*}[KL(pi*||pi_t) - KL(pi*||pi_{t+1}) + "
        "log Z_t]/eta and V^{t+1} - V^t = E_{d^{t+1}}[KL(pi_{t+1}||pi_t) + log Z_t]/eta, at rho",
        source="A. Agarwal et al., JMLR 2021, arXiv 1908.00261, Lemma 5.2 and the proof of Theorem 5.3",
        kind="identity",
        tags=(*_TAGS, "online.mdpo", "online.trpo"),
        cases=_natural_steps,
        measure=_gaps,
        bound=_telescoped,
        tolerance=_IDENTITY,
        mutants=(
            Mutant(
                "step without 1 / (1 - gamma)",
                bound=lambda case: _telescoped(case, horizon=False),
                share=0.7,
            ),
        ),
    )
)


# ------------------------------------------------------------------------------- FND-14 softmax gradients on bandits


def bandit(reward: Tensor, name: str) -> TabularMDP:
    """One state and discount 0: rewards ``[B, K]``."""
    n, k = reward.shape
    p, gamma = torch.ones(n, 1, k, 1, dtype=torch.float64), torch.zeros(n)
    return TabularMDP.from_arrays(p, reward.unsqueeze(1), gamma, torch.ones(n, 1), name=name)


def gradient_ascent(mdp: TabularMDP, logits: Tensor, step: Tensor, times: int) -> Tensor:
    """Exact gradient ascent ``theta += step grad J``: the policies before every step, ``[B, times, S, A]``."""
    policies = []
    for _ in range(times):
        policies.append(torch.softmax(logits, -1))
        logits = logits + step.view(-1, 1, 1) * gradients.softmax_gradient(mdp, policies[-1])
    return torch.stack(policies, 1)


_ARMS = 4
_BANDIT_STEP = 0.4


def _bandit_runs(draw: Draw) -> Iterator[Case]:
    """Rewards uniform on [0, 1]; half of the runs begin at the uniform policy, half anywhere."""
    n = draw.number(40, 200)
    reward = torch.from_numpy(draw.rng.random((n, _ARMS)))
    logits = torch.from_numpy(draw.rng.standard_normal((n, 1, _ARMS)) * (np.arange(n) % 2)[:, None, None])
    yield _bandit_run(reward, logits, draw.number(300, 2000), "bandit")


def _bandit_run(reward: Tensor, logits: Tensor, times: int, name: str) -> Case:
    mdp = bandit(reward, name)
    policies = gradient_ascent(mdp, logits, torch.full_like(mdp.discount, _BANDIT_STEP), times)
    return Case(mdp.names, mdp=mdp, policies=policies.squeeze(2))


def _bad_start(draw: Draw) -> Iterator[Case]:
    reward, logits = (torch.tensor([row], dtype=torch.float64) for row in ([1, 0.9, 0, 0], [-3.0, 0, 0, 0]))
    yield _bandit_run(reward, logits.unsqueeze(1), draw.number(300, 2000), "bandit(from a bad start)")


def _suboptimality(case: Case) -> Tensor:
    """``r* - <pi_t, r>`` at times 1, 2, ..., ``[B, T]``."""
    reward = case.mdp.reward
    return reward.amax((1, 2)).unsqueeze(1) - torch.einsum("btk,bk->bt", case.policies, reward.squeeze(1))


def _best_arm(case: Case) -> Tensor:
    """``pi_t(a*)``, ``[B, T]``."""
    best = case.mdp.reward.squeeze(1).argmax(-1)
    return case.policies.gather(2, best.view(-1, 1, 1).expand(-1, case.policies.shape[1], 1)).squeeze(2)


def _times(case: Case) -> Tensor:
    return torch.arange(1, case.policies.shape[1] + 1, dtype=torch.float64)


def _bandit_rate(case: Case) -> Tensor:
    return 5 / (_best_arm(case).amin(1, keepdim=True).square() * _times(case))


def _has_gap(case: Case) -> Tensor:
    top = case.mdp.reward.squeeze(1).topk(2, -1).values
    return top[:, 0] - top[:, 1] > 1e-3


register(
    Check(
        id="FND-14a",
        title="Softmax policy gradient on a bandit: sublinear rate",
        claim="r in [0, 1]^K, one best arm, step 2/5:  r* - <pi_t, r> <= 5 / (c^2 t),  c = inf_t pi_t(a*)",
        source="J. Mei, C. Xiao, C. Szepesvari, D. Schuurmans, ICML 2020, arXiv 2005.06392, Theorem 2",
        kind="inequality",
        tags=_TAGS,
        cases=_bandit_runs,
        measure=_suboptimality,
        bound=_bandit_rate,
        assumptions={"one best arm": _has_gap},
        mutants=(
            Mutant("c = 1", bound=lambda case: (5 / _times(case)).expand(len(case), -1), cases=_bad_start),
            Mutant("a tenth of it", bound=lambda case: 0.1 * _bandit_rate(case)),
        ),
        not_mutants={"larger steps": "the card reports that steps up to 60 never broke the rate from a uniform start"},
    )
)


def _uniform_runs(draw: Draw) -> Iterator[Case]:
    n = draw.number(40, 200)
    reward = torch.from_numpy(draw.rng.random((n, _ARMS)))
    start = torch.zeros(n, 1, _ARMS, dtype=torch.float64)
    yield _bandit_run(reward, start, draw.number(300, 2000), "bandit(uniform start)")


def _two_arms(draw: Draw) -> Iterator[Case]:
    """Rewards 1 and 0: the suboptimality tends to 5 / (4 t), the ratio to 4 / 30."""
    reward, logits = torch.tensor([[1.0, 0.0]]).double(), torch.zeros(1, 1, 2, dtype=torch.float64)
    yield _bandit_run(reward, logits, draw.number(300, 2000), "bandit(1, 0)")


def _smallest_gap(case: Case) -> Tensor:
    top = case.mdp.reward.squeeze(1).topk(2, -1).values
    return (top[:, :1] - top[:, 1:]).square()


def _late(table: Tensor) -> Tensor:
    """The second half of a run."""
    return table[:, table.shape[1] // 2 :]


def _natural_runs(draw: Draw) -> Iterator[Case]:
    """The same bandits by natural gradients, ``pi_t ~ exp(step r t)``, whose rate is linear."""
    for case in _uniform_runs(draw):
        logits = _BANDIT_STEP * (_times(case).view(1, -1, 1) - 1) * case.mdp.reward
        yield case.with_parts(policies=torch.softmax(logits, -1))


register(
    Check(
        id="FND-14b",
        title="Softmax policy gradient on a bandit: the rate is no better",
        claim="uniform start, step 2/5, all large t:  Delta^2 / (6 t) <= r* - <pi_t, r>,  Delta the gap to the next",
        source="J. Mei et al., ICML 2020, arXiv 2005.06392, Theorem 9",
        kind="inequality",
        tags=_TAGS,
        cases=_uniform_runs,
        measure=lambda case: _late(_smallest_gap(case) / (6 * _times(case))),
        bound=lambda case: _late(_suboptimality(case)),
        extremal=_two_arms,
        assumptions={"one best arm": _has_gap},
        mutants=(
            Mutant("the same of natural gradients", cases=_natural_runs, share=0.3),
            Mutant("ten times as much", measure=lambda case: _late(10 * _smallest_gap(case) / (6 * _times(case)))),
        ),
        loose="with two arms the suboptimality tends to 5 / (4 t) whatever the gap",
    )
)


def _random_bandits(draw: Draw) -> Iterator[Case]:
    n = draw.number(300, 2000)
    reward = torch.from_numpy(draw.rng.random((n, _ARMS)))
    yield _bandit_policies(reward, torch.from_numpy(2 * draw.rng.standard_normal((n, _ARMS))), "bandit")


def _bandit_policies(reward: Tensor, logits: Tensor, name: str) -> Case:
    mdp = bandit(reward, name)
    return Case(mdp.names, mdp=mdp, logits=logits.unsqueeze(1), policies=torch.softmax(logits, -1).unsqueeze(1))


def _gradient_norm(case: Case) -> Tensor:
    gradient = gradients.softmax_gradient(case.mdp, case.policies)
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1)


def _one_good_arm(draw: Draw) -> Iterator[Case]:
    """One arm pays, the others do not and are as likely: the ratio is sqrt(1 - 1/K) for every policy like that."""
    for arms in (2, 100):
        reward = torch.eye(1, arms, dtype=torch.float64)
        yield _bandit_policies(reward, reward.clone(), f"one of {arms} arms pays")


def _searched_bandit(numbers: Tensor) -> Case:
    """Descriptions ``[n, 8]``: rewards and logits."""
    return _bandit_policies(torch.sigmoid(3 * numbers[:, :_ARMS]), 3 * numbers[:, _ARMS:], "searched")


register(
    Check(
        id="FND-14c",
        title="Softmax policy gradient on a bandit: the gradient sees the gap (Lojasiewicz)",
        claim="pi(a*) (r* - <pi, r>) <= ||grad <pi, r>||_2",
        source="J. Mei et al., ICML 2020, arXiv 2005.06392, Lemma 3",
        kind="inequality",
        tags=_TAGS,
        cases=_random_bandits,
        measure=lambda case: (_best_arm(case) * _suboptimality(case)).squeeze(1),
        bound=_gradient_norm,
        extremal=_one_good_arm,
        adversary=Adversary(2 * _ARMS, _searched_bandit),
        mutants=(
            Mutant("without pi(a*)", measure=lambda case: _suboptimality(case).squeeze(1)),
            Mutant("1 % more", measure=lambda case: 1.01 * (_best_arm(case) * _suboptimality(case)).squeeze(1)),
        ),
    )
)


def _hessian_norm(case: Case) -> Tensor:
    """Largest absolute eigenvalue of the Hessian of J in the logits, by autograd through the solver, ``[B]``."""

    def rows(logits: Tensor) -> Tensor:
        value = solvers.expected_return(case.mdp, torch.softmax(logits, -1)).sum()
        (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
        return gradient.flatten(1)

    logits = case.logits.clone().requires_grad_()
    gradient = rows(logits)
    columns = [
        torch.autograd.grad(gradient[:, i].sum(), logits, retain_graph=True)[0].flatten(1)
        for i in range(gradient.shape[1])
    ]
    norm: Tensor = torch.linalg.eigvalsh(torch.stack(columns, 1)).abs().amax(-1)
    return norm


register(
    Check(
        id="FND-14d",
        title="Softmax policy gradient on a bandit: smoothness",
        claim="r in [0, 1]^K: every eigenvalue of the Hessian of <softmax(theta), r> is at most 5/2 in size",
        source="J. Mei et al., ICML 2020, arXiv 2005.06392, Lemma 2",
        kind="inequality",
        tags=_TAGS,
        cases=_random_bandits,
        measure=_hessian_norm,
        bound=lambda case: torch.full_like(case.mdp.discount, 2.5),
        adversary=Adversary(2 * _ARMS, _searched_bandit),
        mutants=(Mutant("1/25 of it", bound=lambda case: torch.full_like(case.mdp.discount, 0.1)),),
        loose="the constant of the proof; the largest found is in the report",
    )
)


# ------------------------------------------------------------------------------------ PO-07 softmax gradients on MDPs


def _small_problems(draw: Draw) -> Iterator[TabularMDP]:
    yield from random_mdps(draw, (0.0, 0.4, 0.8), n_states=(2, 4), n_actions=(2, 3), fast=60, full=300)


def _small_policies(draw: Draw) -> Iterator[Case]:
    for mdp in _small_problems(draw):
        logits = torch.from_numpy(1.5 * draw.rng.standard_normal(tuple(mdp.reward.shape)))
        # Where it ends up, rho, is another law than where it begins, mu.
        target = torch.from_numpy(draw.rng.dirichlet(np.ones(mdp.n_states), len(mdp)))
        yield _on_small(mdp, logits, target)


def _on_small(mdp: TabularMDP, logits: Tensor, target: Tensor) -> Case:
    best = solvers.policy_iteration(mdp)
    return Case(
        mdp.names, mdp=mdp, logits=logits, policy=torch.softmax(logits, -1), target=target,
        best=best.policy, optimum=best.value, gap=_action_gap(best.q),
    )  # fmt: skip


def _action_gap(q: Tensor) -> Tensor:
    top = q.topk(2, -1).values
    return (top[..., 0] - top[..., 1]).amin(-1)


def _searched_small(numbers: Tensor) -> Case:
    """Descriptions ``[n, 22]`` to two states, two actions, discount 0.8."""
    n = len(numbers)
    p, r = torch.softmax(3 * numbers[:, :8].view(n, 2, 2, 2), -1), torch.sigmoid(3 * numbers[:, 8:12].view(n, 2, 2))
    start, target = (torch.softmax(2 * numbers[:, i : i + 2], -1) for i in (12, 14))
    mdp = TabularMDP.from_arrays(p, r, torch.full((n,), 0.8), start, name="searched")
    return _on_small(mdp, 2 * numbers[:, 16:20].view(n, 2, 2), target)


def _mismatch(case: Case) -> Tensor:
    """``max_s d^{pi*}_rho / d^pi_mu``, ``[B]``."""
    there = solvers.occupancy(case.mdp, case.best, case.target)
    return (there / solvers.occupancy(case.mdp, case.policy)).amax(-1)


def _lojasiewicz(case: Case, mismatch: Tensor) -> Tensor:
    """``min_s pi(a*(s)|s) (V*(rho) - V(rho)) / (sqrt S mismatch)``, ``[B]``."""
    worst = (case.policy * case.best).sum(-1).amin(-1)
    gap = (case.target * (case.optimum - solvers.policy_value(case.mdp, case.policy))).sum(-1)
    return worst * gap / (math.sqrt(case.mdp.n_states) * mismatch)


_STRICT = {"a strict gap between best and second action": lambda case: case.gap > 1e-6}

register(
    Check(
        id="PO-07a",
        title="Softmax policy gradient on an MDP: the gradient sees the gap (Lojasiewicz)",
        claim="min_s pi(a*(s)|s) (V*(rho) - V^pi(rho)) / (sqrt(S) max_s d^{pi*}_rho / d^pi_mu) <= ||grad V^pi(mu)||_2",
        source="J. Mei et al., ICML 2020, arXiv 2005.06392, Lemma 8",
        kind="inequality",
        tags=_TAGS,
        cases=_small_policies,
        measure=lambda case: _lojasiewicz(case, _mismatch(case)),
        bound=lambda case: torch.linalg.vector_norm(
            gradients.softmax_gradient(case.mdp, case.policy).flatten(1), dim=1
        ),
        assumptions=_STRICT,
        adversary=Adversary(20, _searched_small),
        mutants=(
            Mutant("no mismatch", measure=lambda case: _lojasiewicz(case, torch.ones_like(case.gap))),
            Mutant(
                "the bandit's form, without sqrt(S) and with a horizon",
                measure=lambda case: (
                    _lojasiewicz(case, _mismatch(case)) * math.sqrt(case.mdp.n_states) / (1 - case.mdp.discount)
                ),
            ),
        ),
    )
)

register(
    Check(
        id="PO-07b",
        title="Softmax policy gradient on an MDP: smoothness",
        claim="r in [0, 1]: every eigenvalue of the Hessian of V^pi(rho) in the logits is at most 8 / (1 - gamma)^3 in "
        "size",
        source="A. Agarwal et al., JMLR 2021, arXiv 1908.00261, Lemma D.4; J. Mei et al., ICML 2020, Lemma 7",
        kind="inequality",
        tags=_TAGS,
        cases=_small_policies,
        measure=_hessian_norm,
        bound=lambda case: 8 / (1 - case.mdp.discount) ** 3,
        mutants=(Mutant("1/1000 of it", bound=lambda case: 0.008 / (1 - case.mdp.discount) ** 3),),
        loose="the constant of the proof, hundreds of times what random problems need",
    )
)


def _ascent_runs(draw: Draw) -> Iterator[Case]:
    """Runs with the step (1 - gamma)^3 / 8 from the uniform policy, every tenth policy kept."""
    for mdp in _small_problems(draw):
        mdp, n_times = mdp[:: draw.number(3, 1)], draw.number(200, 2000)
        policies = gradient_ascent(mdp, torch.zeros_like(mdp.reward), (1 - mdp.discount) ** 3 / 8, n_times)
        yield _ascent(mdp, policies[:, ::10], torch.arange(1, n_times + 1, 10, dtype=torch.float64))


def _ascent(mdp: TabularMDP, policies: Tensor, times: Tensor) -> Case:
    best = solvers.policy_iteration(mdp)
    parts = {"best": best.policy, "optimum": best.value, "gap": _action_gap(best.q), "policies": policies}
    return Case(mdp.names, mdp=mdp, times=times.expand(len(mdp), -1), **parts)


def _unseen_state(draw: Draw) -> Iterator[Case]:
    """The start never reaches the second state, and in the first all is learnt: the gradient is 0 at every time."""
    p = torch.zeros(2, 2, 2, dtype=torch.float64)
    p[0, :, 0] = p[1, :, 1] = 1
    mdp = TabularMDP.from_arrays(p, [[1.0, 0.0], [0.0, 1.0]], 0.5, [1.0, 0.0], name="a state that is never visited")
    policy = torch.softmax(torch.tensor([[[50.0, 0.0], [0.0, 0.0]]], dtype=torch.float64), -1)
    assert float(gradients.softmax_gradient(mdp, policy).abs().max()) < 1e-20
    yield _ascent(mdp, policy.unsqueeze(1), torch.tensor([[1e6]], dtype=torch.float64))


def _gap_in_run(case: Case) -> Tensor:
    """``max_s V* - V^{pi_t}`` at each time, the worst rho, ``[B, T]``."""
    values = [solvers.policy_value(case.mdp, case.policies[:, i]) for i in range(case.policies.shape[1])]
    return (case.optimum.unsqueeze(1) - torch.stack(values, 1)).amax(-1)


def _run_bound(case: Case) -> Tensor:
    """The rate; where mu is 0, its largest inverse and mismatch are those of the other states."""
    mdp = case.mdp
    worst = (case.policies * case.best.unsqueeze(1)).sum(-1).amin((1, 2))
    seen = mdp.start > 0
    mismatch = torch.where(seen, solvers.occupancy(mdp, case.best) / mdp.start, 0.0).amax(-1)
    least = torch.where(seen, mdp.start, 1.0).amin(-1)
    constant = 16 * mdp.n_states * mismatch.square() / (worst.square() * least * (1 - mdp.discount) ** 6)
    return constant.unsqueeze(1) / case.times


register(
    Check(
        id="PO-07c",
        title="Softmax policy gradient on an MDP: sublinear rate",
        claim="mu > 0, step (1 - gamma)^3/8, r in [0, 1], strict gap:  V*(rho) - V^t(rho) <= 16 S max(d^{pi*}_mu/mu)^2 "
        "max(1/mu) / (c^2 (1 - gamma)^6 t) for every rho,  c = inf_{s,t} pi_t(a*(s)|s)",
        source="J. Mei et al., ICML 2020, arXiv 2005.06392, Theorem 4",
        kind="inequality",
        tags=_TAGS,
        cases=_ascent_runs,
        measure=_gap_in_run,
        bound=_run_bound,
        assumptions=_STRICT | {"mu > 0": lambda case: (case.mdp.start > 0).all(-1)},
        mutants=(
            Mutant("a start that never sees a state", cases=_unseen_state),
            Mutant("the rate 1 / t alone", bound=lambda case: 1 / case.times),
        ),
        loose="a thousand times too large on random problems; PO-07a has the power",
    )
)


# ------------------------------------------------------------------------------------------ PO-15 what a buffer lacks


def _buffers(draw: Draw) -> Iterator[Case]:
    """A softmax policy in one state, and the actions of a buffer that it need not have sampled."""
    for n_actions, rows in ((2, 5), (4, 12), (6, 100)):
        n = draw.number(20, 100)
        logits = torch.from_numpy(draw.rng.standard_normal((n, n_actions)))
        action = torch.from_numpy(draw.rng.integers(n_actions, size=(n, rows)))
        yield Case([f"A={n_actions}, N={rows} [{i}]" for i in range(n)], logits=logits, action=action)


def _props_gradient(case: Case) -> Tensor:
    """Gradient in phi, at phi = theta, of the first term of the library's loss, ``[B, A]``."""
    phi = case.logits.clone().requires_grad_()
    behaviour, target = (torch.log_softmax(logits, -1).gather(1, case.action) for logits in (phi, case.logits))
    (gradient,) = torch.autograd.grad(props_loss(behaviour, target).mean(1).sum(), phi)
    return gradient


def _excess(case: Case) -> Tensor:
    """How much more often an action is in the buffer than the policy plays it, ``[B, A]``."""
    counts = torch.zeros_like(case.logits).scatter_add_(1, case.action, torch.ones_like(case.action).double())
    return counts / case.action.shape[1] - torch.softmax(case.logits, -1)


register(
    Check(
        id="PO-15",
        title="PROPS plays more often what its buffer lacks",
        claim="softmax policy, buffer with the frequencies p^:  at phi = theta the gradient of mean max(r, 1 - eps) in "
        "the logits is p^ - pi_theta, so a step makes those actions likelier that are rarer than under pi_theta",
        source="N. Corrado, J. Hanna, arXiv 2311.08290 (the idea); derived here",
        kind="identity",
        tags=(*_TAGS, "online.props"),
        cases=_buffers,
        measure=_props_gradient,
        bound=_excess,
        mutants=(
            Mutant("the sampled actions made likelier", measure=lambda case: -_props_gradient(case), share=0.9),
            Mutant("a buffer that is on-policy", bound=lambda case: torch.zeros_like(case.logits), share=0.9),
        ),
    )
)
