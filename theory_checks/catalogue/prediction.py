"""Prediction: the bias of advantage estimates with a wrong critic, and temporal differences with linear features."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ...kernels.scans import backward_recursion, gae
from .. import solvers
from ..check import Case, Check, Draw, Mutant, register
from ..families import baird, dirichlet, garnet, random_mdps, random_policies, tsitsiklis_van_roy
from ..mdp import TabularMDP, concatenate

_TAGS = ("foundations",)


def _model(mdp: TabularMDP, **parts: Any) -> Case:
    return Case(mdp.names, mdp=mdp, **parts)


def _eye(mdp: TabularMDP) -> Tensor:
    return torch.eye(mdp.n_states, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------- FND-07 GAE's bias

_TRACES = (0.0, 0.5, 0.95, 1.0)
_LAYERS, _WIDTH, _ACTIONS = 4, 2, 2


def _wrong_critics(draw: Draw) -> Iterator[Case]:
    """A policy and the error of its critic; in every fourth problem the same error everywhere."""
    for mdp in random_mdps(draw, discounts=(0.0, 0.5, 0.9, 0.95)):
        error = torch.from_numpy(draw.rng.standard_normal((len(mdp), mdp.n_states)))
        error[::4] = error[::4, :1]
        yield _model(mdp, policy=random_policies(draw.rng, mdp), error=error)


def _layered(draw: Draw) -> Iterator[Case]:
    """Problems of four layers with two states each and an end that pays nothing, where the critic is right."""
    end = _LAYERS * _WIDTH
    for gamma in (0.0, 0.5, 0.9, 0.99):
        n = draw.number(10, 60)
        p = np.zeros((n, end + 1, _ACTIONS, end + 1))
        p[:, -_WIDTH - 1 :, :, end] = 1
        for layer in range(_LAYERS - 1):
            here, there = layer * _WIDTH, (layer + 1) * _WIDTH
            ahead = draw.rng.dirichlet(np.ones(_WIDTH), (n, _WIDTH, _ACTIONS))
            p[:, here : here + _WIDTH, :, there : there + _WIDTH] = ahead
        r = draw.rng.random((n, end + 1, _ACTIONS))
        r[:, end] = 0
        mdp = TabularMDP.from_arrays(p, r, gamma, name=f"layered(gamma={gamma:g})")
        error = torch.from_numpy(draw.rng.standard_normal((n, end + 1)))
        error[:, end] = 0
        yield _model(mdp, policy=random_policies(draw.rng, mdp), error=error, discount=gamma)


def _biased_advantage(case: Case, own: float = 1.0, damped: bool = True) -> Tensor:
    """``A(s, a) - e(s) + gamma (1 - l) P_sa (I - gamma l P_pi)^-1 e`` for every trace, ``[B, traces, S, A]``."""
    mdp = case.mdp
    p, _ = solvers.dynamics(mdp, case.policy)
    gamma = mdp.discount.view(-1, 1, 1)
    true = solvers.advantage(mdp, case.policy)
    rows = []
    for trace in _TRACES:
        spread = torch.linalg.solve(_eye(mdp) - gamma * trace * p, case.error)
        later = gamma * torch.einsum("bsat,bt->bsa", mdp.transition, spread)
        rows.append(true - own * case.error.unsqueeze(-1) + ((1 - trace) if damped else 1.0) * later)
    return torch.stack(rows, 1)


def _recursion(case: Case) -> Tensor:
    """Expected TD errors summed by the kernel with weights ``(gamma lambda)^l``, ``[B, traces, S, A]``."""
    mdp = case.mdp
    p, _ = solvers.dynamics(mdp, case.policy)
    critic = solvers.policy_value(mdp, case.policy) + case.error
    now = solvers.q_values(mdp, critic) - critic.unsqueeze(-1)
    expected, ahead = [now], (case.policy * now).sum(-1)
    # The sum is cut where the weights are below 1e-14.
    for _ in range(int(np.log(1e-14) / np.log(max(0.5, float(mdp.discount.max()))))):
        expected.append(torch.einsum("bsat,bt->bsa", mdp.transition, ahead))
        ahead = torch.einsum("bst,bt->bs", p, ahead)
    errors = torch.stack(expected)
    weights = (mdp.discount.view(-1, 1, 1) * trace for trace in _TRACES)
    return torch.stack([backward_recursion(errors, weight.expand_as(errors).contiguous())[0] for weight in weights], 1)


def _enumerated(case: Case, terminates: bool = True, trace_of: tuple[float, ...] = _TRACES) -> Tensor:
    """Means of the kernel's GAE over all trajectories from the first layer, ``[B, traces, states x actions]``."""
    mdp = case.mdp
    path = torch.cartesian_prod(*[torch.arange(2)] * (2 * _LAYERS)).view(-1, _LAYERS, 2)
    state = path[..., 0].T + _WIDTH * torch.arange(_LAYERS).unsqueeze(1)
    action = path[..., 1].T
    following = torch.cat([state[1:], torch.full_like(state[:1], _LAYERS * _WIDTH)])
    steps = (mdp.transition[:, state, action, following].prod(1), case.policy[:, state[1:], action[1:]].prod(1))
    probability = steps[0] * steps[1]  # of what follows the first state and action
    critic = solvers.policy_value(mdp, case.policy) + case.error
    if not terminates:  # what a batch that forgets the flag sees: the first state of the next episode
        following = torch.cat([following[:-1], torch.zeros_like(following[:1])])
    rewards, values, ahead = (
        rows.movedim(1, 0).contiguous()
        for rows in (mdp.reward[:, state, action], critic[:, state], critic[:, following])
    )
    ended = torch.zeros_like(rewards, dtype=torch.bool)
    ended[-1] = terminates
    cut = torch.zeros_like(ended)
    rows = []
    for trace in trace_of:
        estimates, _ = gae(rewards, values, ahead, ended, cut, discount=case.discount, trace_decay=trace)
        rows.append((probability * estimates[0]).view(len(case), _WIDTH * _ACTIONS, -1).sum(-1))
    return torch.stack(rows, 1)


def _first_layer(rows: Tensor) -> Tensor:
    """The rows of the first layer's states, ``[B, traces, states x actions]``."""
    return rows[:, :, :_WIDTH].flatten(2)


_GAE_CLAIM = (
    "critic V^pi + e:  E[GAE(gamma, lambda) | s, a] = A^pi(s, a) - e(s) + gamma (1 - lambda) P_sa "
    "(I - gamma lambda P_pi)^-1 e; so lambda = 1 has a bias that no action changes"
)
_GAE_SOURCE = "J. Schulman et al., ICLR 2016, arXiv 1506.02438, equation 16; the formula derived here"
_ON_POLICY = ("online.ppo", "online.trpo", "online.spo", "online.fixpo", "online.bpo", "online.props")

register(
    Check(
        id="FND-07a",
        title="GAE's bias with a wrong critic, over all trajectories",
        claim=f"{_GAE_CLAIM}; the kernel's GAE, averaged over every trajectory of problems of four steps",
        source=_GAE_SOURCE,
        kind="identity",
        tags=(*_TAGS, *_ON_POLICY),
        cases=_layered,
        measure=_enumerated,
        bound=lambda case: _first_layer(_biased_advantage(case)),
        mutants=(
            Mutant(
                "without the factor 1 - lambda", bound=lambda case: _first_layer(_biased_advantage(case, damped=False))
            ),
            Mutant("without -e(s)", bound=lambda case: _first_layer(_biased_advantage(case, own=0.0))),
            Mutant("the last step bootstraps", measure=lambda case: _enumerated(case, terminates=False), share=0.7),
            Mutant("1 - lambda for lambda", measure=lambda case: _enumerated(case, trace_of=(1.0, 0.5, 0.05, 0.0))),
        ),
    )
)

register(
    Check(
        id="FND-07b",
        title="GAE's bias with a wrong critic, in expectation",
        claim=f"{_GAE_CLAIM}; expected TD errors summed by the kernel's recursion",
        source=_GAE_SOURCE,
        kind="identity",
        tags=(*_TAGS, *_ON_POLICY),
        cases=_wrong_critics,
        measure=_recursion,
        bound=_biased_advantage,
        mutants=(
            Mutant(
                "without the factor 1 - lambda", bound=lambda case: _biased_advantage(case, damped=False), share=0.5
            ),
            Mutant("without -e(s)", bound=lambda case: _biased_advantage(case, own=0.0), share=0.5),
        ),
    )
)


# ------------------------------------------------------------------------------- FND-12 and OFF-04 linear TD, on policy


def _chains(draw: Draw) -> Iterator[Case]:
    """Markov chains that reach all states, random features; d is the stationary law, `weights` are others."""
    for gamma in (0.0, 0.5, 0.9, 0.95, 0.99):
        for size, dim in ((4, 1), (6, 2), (8, 3)):
            n = draw.number(6, 40)
            jumps = dirichlet(draw.rng, n, size, 1, 1.0, gamma)
            sparse = garnet(draw.rng, n, size, 1, 2, gamma)
            ring = sparse.transition.roll(1, 1) * 0.1 + 0.9 * _eye(sparse).roll(1, 1).unsqueeze(1)
            mdp = concatenate([jumps, sparse.replace(transition=ring)])
            yield _with_features(draw, mdp, dim)


def _rotations(draw: Draw) -> Iterator[Case]:
    """Cycles of N states at gamma = cos(2 pi / N) with a cosine for feature and the sine for value: TD(0) at its worst.

    With c the feature's correlation with its successor, TD's squared error is 1 + gamma^2 (1 - c^2) / (1 - gamma c)^2
    times the projection's, which is greatest, 1 / (1 - gamma^2), for c = gamma.
    """
    for size in (6, 12, 40):
        angle = 2 * torch.pi / size * torch.arange(size, dtype=torch.float64)
        gamma = float(angle[1].cos())
        p = torch.eye(size, dtype=torch.float64).roll(1, 1)
        value = angle.sin()
        mdp = TabularMDP.from_arrays(p.unsqueeze(1), value - gamma * p @ value, gamma, name=f"rotation({size})")
        yield _model(
            mdp,
            policy=torch.ones(1, size, 1, dtype=torch.float64),
            features=angle.cos().view(1, size, 1),
            stationary=torch.full((1, size), 1 / size, dtype=torch.float64),
        )


def _with_features(draw: Draw, mdp: TabularMDP, dim: int) -> Case:
    policy = torch.ones(len(mdp), mdp.n_states, 1, dtype=torch.float64)
    features = torch.from_numpy(draw.rng.standard_normal((len(mdp), mdp.n_states, dim)))
    return _model(
        mdp,
        policy=policy,
        features=features,
        first=torch.from_numpy(draw.rng.standard_normal((len(mdp), dim))),
        stationary=solvers.average_reward(mdp, policy).stationary,
        weights=torch.from_numpy(draw.rng.dirichlet(np.full(mdp.n_states, 0.5), len(mdp)) + 1e-3),
    )


def _off_policy(case: Case) -> Case:
    """The same problems with states weighted by something else than the stationary law."""
    return case.with_parts(stationary=case.weights / case.weights.sum(-1, keepdim=True))


def _other_weights(draw: Draw) -> Iterator[Case]:
    return (_off_policy(case) for case in _chains(draw))


def _td_system(case: Case, trace: float = 0.0) -> tuple[Tensor, Tensor]:
    """``A = F^T D (I - gamma l P)^-1 (I - gamma P) F`` and ``b = F^T D (I - gamma l P)^-1 r`` of TD(l)."""
    p, r = solvers.dynamics(case.mdp, case.policy)
    eye, gamma = _eye(case.mdp), case.mdp.discount.view(-1, 1, 1)
    right = torch.cat([(eye - gamma * p) @ case.features, r.unsqueeze(-1)], -1)
    traced = torch.linalg.solve(eye - gamma * trace * p, right)
    system = (case.features * case.stationary.unsqueeze(-1)).mT @ traced
    return system[..., :-1], system[..., -1]


def _norm(case: Case, value: Tensor) -> Tensor:
    """``(sum_s d(s) v(s)^2)^(1/2)``, ``[B]``."""
    return (case.stationary * value.square()).sum(-1).sqrt()


def _td_error(case: Case, trace: float = 0.0) -> Tensor:
    """``|F theta - V|_d`` of TD's fixed point, ``[B]``."""
    theta = torch.linalg.solve(*_td_system(case, trace))
    return _norm(case, torch.einsum("bsk,bk->bs", case.features, theta) - _true_value(case))


def _true_value(case: Case) -> Tensor:
    return solvers.policy_value(case.mdp, case.policy)


def _projection_error(case: Case) -> Tensor:
    """``|V - Pi V|_d``, Pi the projection on the features' span in the norm of d, by least squares: ``[B]``."""
    root = case.stationary.sqrt()
    value = root * _true_value(case)
    basis, _ = torch.linalg.qr(root.unsqueeze(-1) * case.features)
    return (value - torch.einsum("bsk,btk,bt->bs", basis, basis, value)).norm(dim=-1)


def _td_bound(case: Case, damped: bool = True) -> Tensor:
    """``(1 - beta^2)^(-1/2) |V - Pi V|_d``, beta = gamma (1 - l) / (1 - gamma l), ``[B, traces]``."""
    rows = []
    for trace in _TD_TRACES:
        beta = case.mdp.discount * (1 - trace)
        if damped:
            beta = beta / (1 - case.mdp.discount * trace)
        rows.append(_projection_error(case) / (1 - beta.square()).sqrt())
    return torch.stack(rows, 1)


_TD_TRACES = (0.0, 0.5, 0.9)


def _td_errors(case: Case) -> Tensor:
    return torch.stack([_td_error(case, trace) for trace in _TD_TRACES], 1)


register(
    Check(
        id="FND-12a",
        title="Error of TD(lambda) with linear features, on policy",
        claim="d stationary:  |F theta_l - V|_d <= (1 - beta^2)^(-1/2) |Pi V - V|_d,  beta = gamma (1 - lambda) / "
        "(1 - gamma lambda)",
        source="J. Tsitsiklis, B. Van Roy, IEEE TAC 1997, Theorem 1, with the sharper constant derived here",
        kind="inequality",
        tags=_TAGS,
        cases=_chains,
        extremal=_rotations,
        measure=_td_errors,
        bound=_td_bound,
        mutants=(
            Mutant("beta = gamma (1 - lambda)", bound=lambda case: _td_bound(case, damped=False)),
            Mutant("weights that are not the stationary law", cases=_other_weights),
            Mutant("1 % less", bound=lambda case: 0.99 * _td_bound(case)),
        ),
    )
)


register(
    Check(
        id="FND-12b",
        title="TD(1) with linear features projects",
        claim="d stationary:  |F theta_1 - V|_d = |Pi V - V|_d",
        source="J. Tsitsiklis, B. Van Roy, IEEE TAC 1997, Theorem 1",
        kind="identity",
        tags=_TAGS,
        cases=_chains,
        measure=lambda case: _td_error(case, 1.0),
        bound=_projection_error,
        mutants=(Mutant("TD(0.9)", measure=lambda case: _td_error(case, 0.9), share=0.5),),
    )
)


def _least_curvature(case: Case) -> Tensor:
    """The least x^T A x over x^T F^T D F x, ``[B]``."""
    system, _ = _td_system(case)
    gram = (case.features * case.stationary.unsqueeze(-1)).mT @ case.features
    lower = torch.linalg.cholesky(gram)
    half = torch.linalg.solve_triangular(lower, (system + system.mT) / 2, upper=False)
    white = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    return torch.linalg.eigvalsh((white + white.mT) / 2).amin(-1)


register(
    Check(
        id="OFF-04a",
        title="On policy the matrix of TD(0) is positive definite",
        claim="d stationary, A = F^T D (I - gamma P) F:  x^T A x >= (1 - gamma) x^T F^T D F x for all x",
        source="J. Tsitsiklis, B. Van Roy, IEEE TAC 1997; from |P v|_d <= |v|_d",
        kind="inequality",
        tags=_TAGS,
        cases=_chains,
        measure=lambda case: 1 - case.mdp.discount,
        bound=_least_curvature,
        tolerance=1e-9,
        mutants=(Mutant("weights that are not the stationary law", cases=_other_weights),),
    )
)

register(
    Check(
        id="OFF-04b",
        title="Error of TD(0) with linear features, on policy",
        claim="d stationary:  |F theta - V|_d <= (1 - gamma^2)^(-1/2) |Pi V - V|_d",
        source="J. Tsitsiklis, B. Van Roy, IEEE TAC 1997, Theorem 1; the problems that attain it derived here",
        kind="inequality",
        tags=_TAGS,
        cases=_chains,
        extremal=_rotations,
        measure=_td_error,
        bound=lambda case: _projection_error(case) / (1 - case.mdp.discount.square()).sqrt(),
        mutants=(
            Mutant("weights that are not the stationary law", cases=_other_weights),
            Mutant(
                "(1 - gamma^2)^(-1/4)",
                bound=lambda case: _projection_error(case) / (1 - case.mdp.discount.square()).pow(0.25),
            ),
        ),
    )
)


# ----------------------------------------------------------------------------------------- OFF-04 linear TD, off policy


def _oblique(case: Case) -> Tensor:
    """``I - F A^-1 F^T D (I - gamma P)``, the projection that TD's fixed point makes, ``[B, S, S]``."""
    p, _ = solvers.dynamics(case.mdp, case.policy)
    system, _ = _td_system(case)
    eye = _eye(case.mdp)
    rest = (case.features * case.stationary.unsqueeze(-1)).mT @ (eye - case.mdp.discount.view(-1, 1, 1) * p)
    return eye - case.features @ torch.linalg.solve(system, rest)


def _regular(case: Case) -> Tensor:
    """Whether A is far enough from singular for 9 digits, ``[B]``."""
    return torch.linalg.cond(_td_system(case)[0]) < 1e6


def _residual_value(case: Case) -> Tensor:
    theta = torch.linalg.solve(*_td_system(case))
    return _true_value(case) - torch.einsum("bsk,bk->bs", case.features, theta)


def _obliquely_projected(case: Case, oblique: Tensor) -> Tensor:
    start = _true_value(case) - torch.einsum("bsk,bk->bs", case.features, case.first)
    return torch.einsum("bst,bt->bs", oblique, start)


def _orthogonal(case: Case) -> Tensor:
    """``I - Pi``, ``[B, S, S]``."""
    weighted = case.features.mT * case.stationary.unsqueeze(1)
    return _eye(case.mdp) - case.features @ torch.linalg.solve(weighted @ case.features, weighted)


register(
    Check(
        id="OFF-04c",
        title="TD(0)'s fixed point is an oblique projection",
        claim="any D with A invertible, any theta_0:  V - F theta = (I - F A^-1 F^T D (I - gamma P)) (V - F theta_0)",
        source="B. Scherrer, ICML 2010, arXiv 1011.4362; derived here",
        kind="identity",
        tags=_TAGS,
        cases=_other_weights,
        assumptions={"A is invertible": _regular},
        measure=_residual_value,
        bound=lambda case: _obliquely_projected(case, _oblique(case)),
        tolerance=1e-7,
        mutants=(
            Mutant(
                "the orthogonal projection",
                bound=lambda case: _obliquely_projected(case, _orthogonal(case)),
                share=0.5,
            ),
        ),
    )
)


def _spectral_norm(case: Case) -> Tensor:
    """The norm of the oblique projection in L2(D), ``[B]``."""
    root = case.stationary.sqrt()
    return torch.linalg.matrix_norm(root.unsqueeze(-1) * _oblique(case) / root.unsqueeze(1), 2)


def _worst_rewards(draw: Draw) -> Iterator[Case]:
    """Rewards that make V the direction which the oblique projection stretches most."""
    for case in _other_weights(draw):
        root = case.stationary.sqrt()
        _, _, right = torch.linalg.svd(root.unsqueeze(-1) * _oblique(case) / root.unsqueeze(1))
        value = right[:, 0] / root
        p, _ = solvers.dynamics(case.mdp, case.policy)
        reward = value - case.mdp.gamma * torch.einsum("bst,bt->bs", p, value)
        yield case.with_parts(mdp=case.mdp.replace(reward=reward.unsqueeze(-1)))


register(
    Check(
        id="OFF-04d",
        title="Error of TD(0) with linear features, off policy",
        claim="any D with A invertible:  |F theta - V|_D <= sigma |Pi V - V|_D,  sigma the norm of the oblique "
        "projection in L2(D)",
        source="B. Scherrer, ICML 2010, arXiv 1011.4362",
        kind="inequality",
        tags=_TAGS,
        cases=_other_weights,
        extremal=_worst_rewards,
        assumptions={"A is invertible": _regular},
        measure=_td_error,
        bound=lambda case: _spectral_norm(case) * _projection_error(case),
        tolerance=1e-7,
        mutants=(
            Mutant("1 % less", bound=lambda case: 0.99 * _spectral_norm(case) * _projection_error(case)),
            Mutant(
                "the constant of on-policy weights",
                bound=lambda case: _projection_error(case) / (1 - case.mdp.discount.square()).sqrt(),
            ),
        ),
    )
)


def _one_feature(draw: Draw) -> Iterator[Case]:
    """Chains with one feature, and as `weights` nearly all weight on the state whose term in A is least."""
    for n in (3, 6):
        case = _with_features(draw, dirichlet(draw.rng, draw.number(100, 400), n, 1, 0.5, 0.9), 1)
        worst = one_hot(_terms(case).argmin(-1), n).double()
        yield case.with_parts(weights=worst + 1e-3)


def _terms(case: Case) -> Tensor:
    """``F_s ((I - gamma P) F)_s``, whose mean over the weights is A where there is one feature, ``[B, S]``."""
    p, _ = solvers.dynamics(case.mdp, case.policy)
    return (case.features * (case.features - case.mdp.gamma.unsqueeze(-1) * p @ case.features)).squeeze(-1)


def _can_be_negative(case: Case) -> Tensor:
    return (_off_policy(case).stationary * _terms(case)).sum(-1) < 0


def _nearly_singular(case: Case) -> Case:
    """Weights between the stationary ones, where A > 0, and others, where A < 0: a billionth before A = 0."""
    terms, on, off = _terms(case), case.stationary, _off_policy(case).stationary
    above, below = ((weights * terms).sum(-1, keepdim=True) for weights in (on, off))
    return case.with_parts(stationary=on + (1 - 1e-9) * above / (above - below) * (off - on))


def _exceeds(case: Case) -> Tensor:
    """1 where the error is more than a thousand times what it could be on policy, ``[B]``."""
    on_policy = _projection_error(case) / (1 - case.mdp.discount.square()).sqrt()
    return (_td_error(case) > 1e3 * on_policy).double()


register(
    Check(
        id="OFF-04e",
        title="Off policy there is no bound without the projection's norm",
        claim="where some weights make A negative, others make |F theta - V|_D / |Pi V - V|_D exceed "
        "1000 (1 - gamma^2)^(-1/2)",
        source="J. Kolter, NeurIPS 2011; B. Scherrer, ICML 2010; the weights derived here",
        kind="fact",
        tags=_TAGS,
        cases=_one_feature,
        assumptions={"A can be negative": _can_be_negative},
        measure=lambda case: _exceeds(_nearly_singular(case)),
        bound=lambda case: torch.ones(len(case), dtype=torch.float64),
        mutants=(Mutant("stationary weights", measure=_exceeds, share=1.0),),
    )
)


def _divergent(draw: Draw) -> Iterator[Case]:
    """The two classic counterexamples with their critical discounts."""
    for name, (p, features, weights), threshold in (
        ("baird", baird(), 15 / 17),
        ("tsitsiklis_van_roy", tsitsiklis_van_roy(), 5 / 6),
    ):
        yield Case([name], p=p, features=features, weights=weights, threshold=threshold)


def _grows(case: Case, shift: float = 0.0) -> Tensor:
    """Whether the values of expected TD(0) grow, 0.01 below and above the threshold (moved by `shift`): ``[1, 2]``."""
    found = []
    for gamma in (case.threshold + shift - 0.01, case.threshold + shift + 0.01):
        eye = torch.eye(len(case.p), dtype=torch.float64)
        matrix = (case.features * case.weights.unsqueeze(-1)).T @ (eye - gamma * case.p) @ case.features
        step = torch.eye(len(matrix), dtype=torch.float64) - 0.05 * matrix
        theta = torch.ones(len(matrix), dtype=torch.float64)
        theta[-1] = 10.0
        later = torch.linalg.matrix_power(step, 30_000) @ theta
        found.append(float((case.features @ later).norm() > (case.features @ theta).norm()))
    return torch.tensor([found], dtype=torch.float64)


register(
    Check(
        id="OFF-04f",
        title="Where off-policy TD(0) diverges",
        claim="expected TD(0) on Baird's star diverges exactly for gamma > 15/17, on Tsitsiklis and Van Roy's two "
        "states for gamma > 5/6 (tried 0.01 to either side)",
        source="L. Baird, ICML 1995; J. Tsitsiklis, B. Van Roy, 1996; the threshold 15/17 derived here",
        kind="fact",
        tags=_TAGS,
        cases=_divergent,
        measure=_grows,
        bound=lambda case: torch.tensor([[0.0, 1.0]], dtype=torch.float64),
        mutants=(
            Mutant("a threshold 0.02 higher", measure=lambda case: _grows(case, 0.02), share=1.0),
            Mutant("a threshold 0.02 lower", measure=lambda case: _grows(case, -0.02), share=1.0),
        ),
    )
)
