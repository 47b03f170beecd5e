r"""Denoising of actions as CDSA does it: what its loss learns, and where its step leads, on data with second moments.

With a linear score ``f(x) = -K (x - m)`` the denoising loss depends on mean and covariance of data and noise alone, so
a few rows with these moments make its expectation exact. Loss and step are those of :mod:`corollary.offline.cdsa`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...offline.cdsa import CDSAConfig, correction, denoising_loss
from ..check import Case, Check, Draw, Mutant, register

_DIM, _STATE_DIM = 4, 2
_LEVELS = (0.05, 0.3, 1.0)


def _moments(draw: Draw) -> Iterator[Case]:
    """Means m, covariances Sigma, points x and weights w_1 for each noise level."""
    for sigma in _LEVELS:
        n = draw.number(40, 200)
        root, mean, point = (
            torch.from_numpy(draw.rng.standard_normal((n, *shape))) for shape in ((_DIM, _DIM), (_DIM,), (_DIM,))
        )
        step = torch.from_numpy(draw.rng.uniform(0.1, 3.0, n))
        level = torch.full((n,), sigma, dtype=torch.float64)
        names = [f"sigma={sigma:g} [{i}]" for i in range(n)]
        yield Case(names, root=root, mean=mean, point=point, step=step, sigma=level)


def _precision(case: Case, noise: Tensor | None = None) -> Tensor:
    """``(Sigma + sigma^2 I)^-1`` of the data with noise, ``[B, d, d]``; `noise` ``[B]`` replaces sigma^2."""
    variance = case.sigma.square() if noise is None else noise
    eye = torch.eye(_DIM, dtype=torch.float64)
    return torch.linalg.inv(case.root @ case.root.mT + variance.view(-1, 1, 1) * eye)


# ---------------------------------------------------------------------------------------------- OFF-23 the learnt score


def _rows(case: Case) -> tuple[Tensor, Tensor]:
    """Data and noise ``[B, 4 d^2, d]``, all pairs of points with the moments (m, Sigma) and (0, I)."""
    eye = _DIM**0.5 * torch.eye(_DIM, dtype=torch.float64)
    signs = torch.cat([eye, -eye])
    data = case.mean.unsqueeze(1) + signs @ case.root.mT
    return data.repeat_interleave(len(signs), 1), signs.repeat(len(signs), 1).expand(len(case), -1, -1)


def _learnt(case: Case, scaled: bool = True) -> Tensor:
    """The K and m that minimise the library's loss among linear scores, by one Newton step, ``[B, d, d + 1]``."""
    data, noise = _rows(case)
    sigma = case.sigma.view(-1, 1, 1)
    noisy = data + sigma * noise

    def loss(weights: Tensor) -> Tensor:
        features = torch.cat([noisy, torch.ones_like(noisy[..., :1])], -1)
        score = -features @ weights.mT
        level = sigma.expand(-1, noisy.shape[1], 1)
        return denoising_loss(score, noise, level if scaled else torch.ones_like(level)).sum()

    zero = torch.zeros(len(case), _DIM, _DIM + 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(zero), zero, create_graph=True)
    # The loss is quadratic, and the same in every row of the weights: one row's Hessian is all of them.
    columns = [torch.autograd.grad(gradient[:, 0, j].sum(), zero, retain_graph=True)[0][:, 0] for j in range(_DIM + 1)]
    return torch.linalg.solve(torch.stack(columns, 1), -gradient.detach().mT).mT


def _gaussian_score(case: Case, noise: Tensor | None = None) -> Tensor:
    """``K = (Sigma + sigma^2 I)^-1`` and ``-K m``: the score of N(m, Sigma + sigma^2 I), ``[B, d, d + 1]``."""
    precision = _precision(case, noise)
    return torch.cat([precision, -precision @ case.mean.unsqueeze(-1)], -1)


register(
    Check(
        id="OFF-23a",
        title="The denoising loss learns the score of the data with noise",
        claim="argmin_f E |sigma f(x + sigma eps) + eps|^2 over linear f is -(Sigma + sigma^2 I)^-1 (x - m), for any "
        "data with mean m and covariance Sigma",
        source="P. Vincent, Neural Computation 2011; for linear scores derived here",
        kind="identity",
        tags=("offline", "offline.cdsa"),
        cases=_moments,
        measure=_learnt,
        bound=_gaussian_score,
        tolerance=1e-8,
        mutants=(
            Mutant("the score of the data without noise", bound=lambda c: _gaussian_score(c, 0 * c.sigma), share=0.9),
            Mutant("variance sigma", bound=lambda c: _gaussian_score(c, c.sigma), share=0.6),
            Mutant("a loss that forgets sigma", measure=lambda c: _learnt(c, scaled=False), share=0.6),
        ),
    )
)


# ----------------------------------------------------------------------------------------------- OFF-23 the step taken


def _distances(case: Case, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """Distance of the action from the likeliest one in its state, before and after the library's step, ``[B]`` each."""
    precision = _precision(case)
    state, action = case.point.split([_STATE_DIM, _DIM - _STATE_DIM], -1)
    across, own = precision[:, _STATE_DIM:, :_STATE_DIM], precision[:, _STATE_DIM:, _STATE_DIM:]
    away = (state - case.mean[:, :_STATE_DIM]).unsqueeze(-1)
    likeliest = case.mean[:, _STATE_DIM:] - torch.linalg.solve(own, across @ away).squeeze(-1)
    moved = torch.stack([_step(case, i, state[i], action[i], sign * precision[i]) for i in range(len(case))])
    return (action - likeliest).norm(dim=-1), (action + moved - likeliest).norm(dim=-1)


def _step(case: Case, i: int, state: Tensor, action: Tensor, precision: Tensor) -> Tensor:
    settings = CDSAConfig(
        action_weight=float(case.step[i]), state_weight=0.0, sigma=float(case.sigma[i]), sigma_range=(0.01, 2.0)
    )

    def score(pairs: Tensor) -> Tensor:
        return -(pairs - case.mean[i]) @ precision.mT

    return correction(state.unsqueeze(0), action.unsqueeze(0), score, score, settings).squeeze(0)


def _contraction(case: Case, scale: Callable[[Tensor], Tensor] = torch.square) -> Tensor:
    """``max_i |1 - w_1 sigma^2 mu_i|`` over the eigenvalues of the actions' block of the precision, ``[B]``."""
    values = torch.linalg.eigvalsh(_precision(case)[:, _STATE_DIM:, _STATE_DIM:])
    return (1 - (case.step * scale(case.sigma)).unsqueeze(1) * values).abs().amax(1)


def _along_the_slowest(draw: Draw) -> Iterator[Case]:
    """Points that differ from the likeliest action along the direction which the step changes least."""
    for case in _moments(draw):
        values, vectors = torch.linalg.eigh(_precision(case)[:, _STATE_DIM:, _STATE_DIM:])
        factors = (1 - (case.step * case.sigma.square()).unsqueeze(1) * values).abs()
        worst = factors.argmax(1).view(-1, 1, 1).expand(-1, _DIM - _STATE_DIM, 1)
        away = torch.cat([torch.zeros(len(case), _STATE_DIM).double(), vectors.gather(2, worst).squeeze(2)], 1)
        yield case.with_parts(point=case.mean + away)


register(
    Check(
        id="OFF-23b",
        title="A step along the score contracts towards the likeliest action",
        claim="x ~ N(m, Sigma):  |u' - u*| <= max_i |1 - w_1 sigma^2 mu_i| |u - u*|, u* the likeliest action in the "
        "state, mu_i the eigenvalues of the actions' block of (Sigma + sigma^2 I)^-1",
        source="derived here",
        kind="inequality",
        tags=("offline", "offline.cdsa"),
        cases=_moments,
        extremal=_along_the_slowest,
        measure=lambda case: _distances(case)[1],
        bound=lambda case: _contraction(case) * _distances(case)[0],
        mutants=(
            Mutant("down the score", measure=lambda case: _distances(case, -1.0)[1], share=0.5),
            Mutant(
                "steps in units of sigma",
                bound=lambda case: _contraction(case, torch.abs) * _distances(case)[0],
                share=0.1,
            ),
            Mutant("1 % less", bound=lambda case: 0.99 * _contraction(case) * _distances(case)[0], share=0.3),
        ),
    )
)
