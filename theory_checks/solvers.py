r"""Exact dynamic programming for many finite MDPs at once, float64.

Axes: ``B`` instances, ``S`` states, ``A`` actions. Policies are ``pi [B, S, A]``, values ``V [B, S]``, ``Q [B, S, A]``.
Evaluation, occupancies and advantages are differentiable in model and policy. Solvers say what they reached: whether
the stopping rule was met, and a certified bound on the error.

Sources: M. L. Puterman, "Markov Decision Processes", 1994, sections 6.3 to 6.5, and 6.9 for the linear programs.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy import optimize
from scipy.sparse import csr_matrix
from torch import Tensor

from ..core.errors import CorollaryError
from .mdp import TabularMDP

IMPROVEMENT = 1e-12
"""An action improves on another if it is better by more than this times ``1 + max |Q|``: rounding, nothing more."""


Backend = Literal["torch", "numba"]


class SolverError(CorollaryError):
    """A solver that was given something it cannot solve, or did not reach what was asked."""


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found.

    Attributes:
        value: V, ``[B, S]``.
        q: ``r + gamma P V``, ``[B, S, A]``.
        action: a greedy action of q, ``[B, S]``: among equals the first, but policy iteration keeps an action that no
            other one beats.
        iterations: of each instance, ``[B]``.
        converged: ``[B]``, whether the stopping rule was met.
        bound: ``[B]``, a certified bound on ``max_s |V - V*|`` up to rounding.
    """

    value: Tensor
    q: Tensor
    action: Tensor
    iterations: Tensor
    converged: Tensor
    bound: Tensor

    @property
    def policy(self) -> Tensor:
        """The greedy policy as probabilities, ``[B, S, A]``."""
        return torch.nn.functional.one_hot(self.action, self.q.shape[-1]).to(self.q)


# ---------------------------------------------------------------------------------------------------- one policy


def q_values(mdp: "_Model", value: Tensor) -> Tensor:
    """``Q = r + gamma P V`` for ``V [B, S]``, shape ``[B, S, A]``."""
    b, s, a = mdp.reward.shape
    # A row times P^T, which BLAS does several times faster than P times a column.
    expected = torch.bmm(value.unsqueeze(1), mdp.transition.reshape(b, s * a, s).mT).view(b, s, a)
    return mdp.reward + mdp.discount.view(-1, 1, 1) * expected


def dynamics(mdp: TabularMDP, policy: Tensor) -> tuple[Tensor, Tensor]:
    """``P_pi [B, S, S]`` and ``r_pi [B, S]`` of a policy."""
    return torch.einsum("bsa,bsat->bst", policy, mdp.transition), (policy * mdp.reward).sum(-1)


def policy_value(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """``V = (I - gamma P_pi)^-1 r_pi``, ``[B, S]``."""
    p, r = dynamics(mdp, policy)
    value: Tensor = torch.linalg.solve(_identity(mdp) - mdp.discount.view(-1, 1, 1) * p, r)
    return value


def policy_q(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """``Q^pi``, ``[B, S, A]``."""
    return q_values(mdp, policy_value(mdp, policy))


def advantage(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """``A^pi = Q^pi - V^pi``, ``[B, S, A]``."""
    value = policy_value(mdp, policy)
    return q_values(mdp, value) - value.unsqueeze(-1)


def occupancy(mdp: TabularMDP, policy: Tensor, start: Tensor | None = None) -> Tensor:
    """``d = (1 - gamma) rho^T (I - gamma P_pi)^-1``, ``[B, S]``, sums to 1; `start` replaces the model's rho."""
    p, _ = dynamics(mdp, policy)
    matrix = _identity(mdp) - mdp.discount.view(-1, 1, 1) * p.mT
    first = mdp.start if start is None else start
    visits: Tensor = torch.linalg.solve(matrix, first)
    return (1 - mdp.gamma) * visits


def expected_return(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """``J = rho^T V^pi``, ``[B]``."""
    return (mdp.start * policy_value(mdp, policy)).sum(-1)


def backup(mdp: TabularMDP, value: Tensor) -> Tensor:
    """The optimality operator ``(TV)(s) = max_a r + gamma P V``, ``[B, S]``."""
    return q_values(mdp, value).amax(-1)


def iterate_policy(mdp: TabularMDP, policy: Tensor, value: Tensor, times: int) -> Tensor:
    """Apply the operator of a policy, ``T_pi V = r_pi + gamma P_pi V``, so many times."""
    return _iterate(*dynamics(mdp, policy), mdp.gamma, value, times)


def _iterate(p: Tensor, r: Tensor, gamma: Tensor, value: Tensor, times: int) -> Tensor:
    for _ in range(times):
        value = r + gamma * torch.bmm(value.unsqueeze(1), p.mT).squeeze(1)
    return value


def uniform_policy(mdp: TabularMDP) -> Tensor:
    """Every action as likely, ``[B, S, A]``."""
    return torch.full_like(mdp.reward, 1 / mdp.n_actions)


def greedy_ties(q: Tensor, slack: float = 1e-9) -> Tensor:
    """Which actions are greedy up to rounding, ``[B, S, A]``: ``Q >= max_a Q - slack (1 + max |Q|)``."""
    return q >= q.amax(-1, keepdim=True) - slack * (1 + q.abs().amax((-2, -1), keepdim=True))


def adverse_greedy_policy(q: Tensor, true_q: Tensor) -> Tensor:
    """A policy greedy in `q` that takes, where several actions are greedy, the one worst in `true_q`: ``[B, S, A]``.

    A statement about "the" greedy policy has to hold for each of them.
    """
    worst = torch.where(greedy_ties(q), true_q, torch.full_like(true_q, torch.inf)).argmin(-1)
    return torch.nn.functional.one_hot(worst, q.shape[-1]).to(q)


# ------------------------------------------------------------------------------------------------------- optima


def value_iteration(
    mdp: TabularMDP, tolerance: float = 1e-8, max_iterations: int = 100_000, start: Tensor | None = None
) -> Solution:
    """Apply the optimality operator until the optimum is known within `tolerance`.

    With ``low, high`` the extremes of ``TV - V`` it lies between ``V + low / (1 - gamma)`` and
    ``V + high / (1 - gamma)`` (J. MacQueen, J. Math. Anal. Appl. 1966). Where these are close enough their middle is
    returned, elsewhere the last V.

    Args:
        mdp: the instances.
        tolerance: of the value, > 0.
        max_iterations: give up after so many; `converged` then says where.
        start: first V, ``[B, S]``; zeros by default.
    """
    return modified_policy_iteration(mdp, 0, tolerance, max_iterations, start)


def modified_policy_iteration(
    mdp: TabularMDP,
    sweeps: int = 10,
    tolerance: float = 1e-8,
    max_iterations: int = 100_000,
    start: Tensor | None = None,
) -> Solution:
    """One optimality step, then `sweeps` steps with the greedy policy; 0 sweeps are value iteration.

    The other arguments are :func:`value_iteration`'s.
    """
    if not tolerance > 0:
        raise SolverError(f"The tolerance must be > 0; got {tolerance}.")
    return _in_parts(mdp, start, lambda part, value: _modified(part, value, sweeps, tolerance, max_iterations))


def _modified(mdp: "_Model", value: Tensor | None, sweeps: int, tolerance: float, max_iterations: int) -> Solution:
    q = mdp.reward if value is None else q_values(mdp, value)
    value = torch.zeros_like(q[..., 0]) if value is None else value
    iterations = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    for _ in range(max_iterations):
        best, action = q.max(-1)
        open_ = _bounds(mdp, value, best)[1] > tolerance
        if not bool(open_.any()):
            break
        iterations += open_
        moved = _iterate(*_of_actions(mdp, action), mdp.gamma, best, sweeps) if sweeps else best
        value = torch.where(open_.unsqueeze(1), moved, value)
        q = q_values(mdp, value)
    best, action = q.max(-1)
    shift, radius = _bounds(mdp, value, best)
    converged = radius <= tolerance
    bound = torch.where(converged, radius, _residual_bound(mdp, value, best))
    shift = torch.where(converged, shift, torch.zeros_like(shift))
    q = q + (mdp.discount * shift).view(-1, 1, 1)  # rows of P sum to 1
    return Solution(value + shift.unsqueeze(1), q, action, iterations, converged, bound)


def _bounds(mdp: "_Model", value: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """How far above V the middle of MacQueen's bounds is, and the optimum's greatest distance from it, ``[B]`` each."""
    low, high = (best - value).aminmax(dim=-1)
    horizon = 1 / (1 - mdp.discount)
    return horizon * (low + high) / 2, horizon * (high - low) / 2


def _residual_bound(mdp: "_Model", value: Tensor, best: Tensor) -> Tensor:
    """``max |TV - V| / (1 - gamma)``, ``[B]``."""
    return (best - value).abs().amax(-1) / (1 - mdp.discount)


def policy_iteration(
    mdp: TabularMDP, max_iterations: int = 1000, start: Tensor | None = None, *, backend: Backend = "torch"
) -> Solution:
    """Evaluate exactly and improve until no action is better than the policy's by more than rounding.

    Args:
        mdp: the instances.
        max_iterations: improvements after which to give up; `converged` then says where.
        start: actions of the first policy, ``[B, S]``. By default those that are greedy after a few cheap sweeps of
            value iteration, which is where most instances end too, so one or two evaluations are enough.
        backend: ``"torch"``: batched products, on any device; ``"numba"``: one instance after the other on the
            processor (:mod:`corollary.kernels.policy_iteration_numba`; extra ``compiled``), several times faster up to
            some hundred states, once a first call has compiled it in a few seconds.

    Raises:
        SolverError: for another back end, `max_iterations` below 1, a start that is no action in every state, or a
            model that Numba cannot take, on another device or to be differentiated.
        ModuleNotFoundError: ``backend="numba"`` without Numba installed.
    """
    if backend not in get_args(Backend):
        raise SolverError(f"Unknown back end {backend!r}; choose one of {', '.join(get_args(Backend))}.")
    if max_iterations < 1:
        raise SolverError(f"max_iterations must be at least 1; got {max_iterations}.")
    if start is not None and (
        start.shape != mdp.start.shape or not bool(((start >= 0) & (start < mdp.n_actions)).all())
    ):
        raise SolverError(f"start must be actions below {mdp.n_actions}, of shape {list(mdp.start.shape)}.")
    solve = _by_numba if backend == "numba" else _policy_iteration
    return _in_parts(mdp, start, lambda part, action: solve(part, action, max_iterations))


def _by_numba(mdp: "_Model", action: Tensor | None, max_iterations: int) -> Solution:
    try:
        from ..kernels import policy_iteration_numba as compiled
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "backend 'numba' needs Numba; install it with: pip install 'corollary[compiled]'", name=error.name
        ) from error
    model = mdp.transition, mdp.reward, mdp.discount
    if any(each.requires_grad or each.device.type != "cpu" for each in model):
        raise SolverError(
            "backend 'numba' runs on the processor and gives no gradients: take 'torch', or detach().cpu()."
        )
    p, r, gamma = (each.contiguous().numpy() for each in model)
    b, s, _ = r.shape
    chosen = np.zeros((b, s), np.int64) if action is None else action.numpy().astype(np.int64)
    value, q, iterations, converged = np.empty((b, s)), np.empty_like(r), np.zeros(b, np.int64), np.zeros(b, np.bool_)
    compiled.policy_iteration(
        p, r, gamma, IMPROVEMENT, max_iterations, action is None, chosen, value, q, iterations, converged
    )
    v, ahead, last, counts, done = (torch.from_numpy(each) for each in (value, q, chosen, iterations, converged))
    return Solution(v, ahead, last, counts, done, _residual_bound(mdp, v, ahead.amax(-1)))


def _policy_iteration(mdp: "_Model", action: Tensor | None, max_iterations: int) -> Solution:
    chosen = _promising(mdp) if action is None else action
    all_actions, value, q = torch.empty_like(chosen), torch.empty_like(mdp.reward[..., 0]), torch.empty_like(mdp.reward)
    iterations = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    converged = torch.zeros(len(q), dtype=torch.bool, device=q.device)
    open_, part = torch.arange(len(q), device=q.device), mdp
    for _ in range(max_iterations):
        found = _evaluate(part, chosen)
        ahead = q_values(part, found)
        best, greedy = ahead.max(-1)
        own = ahead.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        better = best > own + IMPROVEMENT * (1 + ahead.abs().amax((-2, -1)).unsqueeze(1))
        chosen = torch.where(better, greedy, chosen)
        again = better.any(-1)
        all_actions[open_], value[open_], q[open_], converged[open_] = chosen, found, ahead, ~again
        iterations[open_] += 1
        if not bool(again.any()):
            break
        open_, chosen, part = open_[again], chosen[again], _Part(part, again)
    return Solution(value, q, all_actions, iterations, converged, _residual_bound(mdp, value, q.amax(-1)))


# ------------------------------------------------------------------------------------- many instances, part by part

_ENTRIES = 2**20  # of P, worked on at a time: 8 MiB, which stay in a processor's cache from first sweep to last
_MOST_SWEEPS = 10
_SETTLED = 0.95  # share of the instances whose policy a sweep left as it was


class _Part:
    """Some instances of a model, without checking them again."""

    def __init__(self, mdp: "_Model", where: slice | Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.transition: Tensor = mdp.transition[where].to(dtype)
        self.reward: Tensor = mdp.reward[where].to(dtype)
        self.discount: Tensor = mdp.discount[where].to(dtype)
        self.gamma = self.discount.unsqueeze(1)


_Model = TabularMDP | _Part


@cache
def thread_pool(threads: int) -> ThreadPoolExecutor:
    """Return the one pool of so many threads."""
    return ThreadPoolExecutor(threads)


def _in_parts(mdp: TabularMDP, start: Tensor | None, solve: Callable[[_Model, Any], Solution]) -> Solution:
    """Solve the instances part by part, from `start` if given, on all of PyTorch's threads (LAPACK would take one)."""
    size = max(1, _ENTRIES // mdp.transition[0].numel()) if mdp.transition.device.type == "cpu" else len(mdp)
    if size >= len(mdp):
        return solve(mdp, start)

    def work(first: int) -> Solution:
        where = slice(first, first + size)
        return solve(_Part(mdp, where), None if start is None else start[where])

    starts, threads = range(0, len(mdp), size), torch.get_num_threads()
    found = list(map(work, starts) if threads == 1 else thread_pool(threads).map(work, starts))
    return Solution(*(torch.cat([getattr(part, f.name) for part in found]) for f in fields(Solution)))


def _promising(mdp: _Model) -> Tensor:
    """Return the greedy actions ``[B, S]`` of a few sweeps of value iteration.

    A sweep costs a tenth of an exact evaluation or less, so sweeping pays until most policies stop changing. It walks
    through half the memory in float32, and a suggestion need not be exact: policy iteration mends what it misses.
    """
    rough = _Part(mdp, slice(None), torch.float32)
    value, action = rough.reward.max(-1)
    for _ in range(_MOST_SWEEPS):
        before = action
        value, action = q_values(rough, value).max(-1)
        if (action == before).all(-1).double().mean() > _SETTLED:
            break
    return action


def _of_actions(mdp: _Model, action: Tensor) -> tuple[Tensor, Tensor]:
    """``P_pi [B, S, S]`` and ``r_pi [B, S]`` of a deterministic policy ``[B, S]``; as `dynamics`, but only copying."""
    (b, s), a = action.shape, mdp.reward.shape[-1]
    row = action + torch.arange(0, b * s * a, a, device=action.device).view(b, s)
    p = mdp.transition.reshape(-1, s).index_select(0, row.view(-1)).view(b, s, s)
    return p, mdp.reward.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def _evaluate(mdp: _Model, action: Tensor) -> Tensor:
    """Return the values ``[B, S]`` of deterministic policies, by one linear solve each."""
    p, r = _of_actions(mdp, action)
    matrix = p.mul_(-mdp.discount.view(-1, 1, 1))
    matrix.diagonal(dim1=1, dim2=2).add_(1)
    # Factors of the transpose: LAPACK stores matrices by columns, so it finds this one as it wants it, uncopied.
    factors, pivots = torch.linalg.lu_factor(matrix.mT)
    value: Tensor = torch.linalg.lu_solve(factors, pivots, r.unsqueeze(-1), adjoint=True)
    return value.squeeze(-1)


# ----------------------------------------------------------------------------------------------- finite horizon


@dataclass(frozen=True, eq=False)
class FiniteHorizon:
    """Backward induction over H steps.

    Attributes:
        value: ``[B, H + 1, S]``; the last is 0 (or what was given).
        q: ``[B, H, S, A]``.
        action: greedy actions ``[B, H, S]``.
    """

    value: Tensor
    q: Tensor
    action: Tensor


def finite_horizon(
    mdp: TabularMDP, horizon: int, policy: Tensor | None = None, final: Tensor | None = None, discount: float = 1.0
) -> FiniteHorizon:
    """Solve the H-step problem, or evaluate a policy in it; the model's own discount plays no part.

    Args:
        mdp: the instances.
        horizon: H >= 1.
        policy: ``[B, S, A]``, or ``[B, H, S, A]`` if it depends on the step; ``None`` for the optimum.
        final: value after the last step, ``[B, S]``; 0 by default.
        discount: of a step, in [0, 1].
    """
    b, s, a = mdp.reward.shape
    values = [torch.zeros(b, s, dtype=torch.float64, device=mdp.reward.device) if final is None else final]
    qs: list[Tensor] = []
    for h in reversed(range(horizon)):
        expected = torch.bmm(mdp.transition.reshape(b, s * a, s), values[-1].unsqueeze(-1)).view(b, s, a)
        q = mdp.reward + discount * expected
        qs.append(q)
        if policy is None:
            values.append(q.amax(-1))
        else:
            values.append(((policy if policy.ndim == 3 else policy[:, h]) * q).sum(-1))
    q = torch.stack(qs[::-1], 1)
    return FiniteHorizon(torch.stack(values[::-1], 1), q, q.argmax(-1))


def state_laws(mdp: TabularMDP, policy: Tensor, horizon: int) -> Tensor:
    """Law of the state at steps 0, ..., H - 1 under a policy (``[B, S, A]`` or ``[B, H, S, A]``), ``[B, H, S]``."""
    laws = [mdp.start]
    for h in range(horizon - 1):
        p, _ = dynamics(mdp, policy if policy.ndim == 3 else policy[:, h])
        laws.append(torch.einsum("bs,bst->bt", laws[-1], p))
    return torch.stack(laws, 1)


# ----------------------------------------------------------------------------------------------- average reward


@dataclass(frozen=True, eq=False)
class AverageReward:
    """A policy's long-run average.

    Attributes:
        gain: g, ``[B]``.
        bias: h, ``[B, S]``, with ``d^T h = 0``.
        stationary: d, ``[B, S]``.
    """

    gain: Tensor
    bias: Tensor
    stationary: Tensor


def is_unichain(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """Whether the policy has one recurrent class, so that ``I - P_pi`` has one singular value 0: ``[B]`` bool."""
    p, _ = dynamics(mdp, policy)
    singular: Tensor = torch.linalg.svdvals(_identity(mdp) - p)
    return (singular < 1e-9 * singular[:, :1].clamp(min=1)).sum(-1) == 1


def average_reward(mdp: TabularMDP, policy: Tensor) -> AverageReward:
    """Gain and bias of a policy with one recurrent class: ``g + h = r_pi + P_pi h``; the discount plays no part.

    Raises:
        SolverError: if the policy has several recurrent classes in some instance: its average then depends on the
            start.
    """
    p, r = dynamics(mdp, policy)
    eye, ones = _identity(mdp), torch.ones_like(r)
    several = ~is_unichain(mdp, policy)
    if bool(several.any()):
        raise SolverError(f"{mdp.names[int(several.int().argmax())]}: the policy has several recurrent classes.")
    # d (I - P) = 0 and d 1 = 1 in one system: the columns of I - P with ones added to all of them.
    d: Tensor = torch.linalg.solve((eye - p).mT + 1.0, ones)
    gain = (d * r).sum(-1)
    bias: Tensor = torch.linalg.solve(eye - p + ones.unsqueeze(2) * d.unsqueeze(1), r - gain.unsqueeze(1))
    return AverageReward(gain, bias, d)


# --------------------------------------------------------------------------------------------- linear programs


def primal_linear_program(mdp: TabularMDP) -> Tensor:
    """``min rho^T V`` subject to ``V >= r + gamma P V``, one instance after the other: V, ``[B, S]`` (HiGHS)."""
    return _each(mdp, lambda p, r, gamma, first: _solve_primal(p, r, gamma, first))


def dual_linear_program(mdp: TabularMDP) -> Tensor:
    """``max <mu, r>`` over occupancies, ``sum_a mu = (1 - gamma) rho + gamma mu P``: mu, ``[B, S, A]`` (HiGHS)."""
    return _each(mdp, lambda p, r, gamma, first: _solve_dual(p, r, gamma, first))


_linprog: Any = optimize.linprog  # its overloads take longer to read than the call
_Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def _each(mdp: TabularMDP, solve: Callable[[_Array, _Array, float, _Array], _Array]) -> Tensor:
    parts = (mdp.transition, mdp.reward, mdp.discount, mdp.start)
    p, r, gamma, first = (part.detach().cpu().numpy() for part in parts)
    found = [solve(p[i], r[i], float(gamma[i]), first[i]) for i in range(len(mdp))]
    return torch.from_numpy(np.stack(found))


def _solve_primal(p: _Array, r: _Array, gamma: float, first: _Array) -> _Array:
    s, a = r.shape
    rows = gamma * p.reshape(s * a, s) - np.repeat(np.eye(s), a, 0)
    result = _linprog(first, A_ub=csr_matrix(rows), b_ub=-r.ravel(), bounds=(None, None), method="highs")
    return _optimum(result)


def _solve_dual(p: _Array, r: _Array, gamma: float, first: _Array) -> _Array:
    s, a = r.shape
    flow = np.repeat(np.eye(s), a, 1) - gamma * p.reshape(s * a, s).T
    result = _linprog(-r.ravel(), A_eq=csr_matrix(flow), b_eq=(1 - gamma) * first, bounds=(0, None), method="highs")
    return _optimum(result).reshape(s, a)


def _optimum(result: Any) -> _Array:
    if result.status != 0:
        raise SolverError(f"The linear program was not solved: {result.message}")
    return np.asarray(result.x)


def _identity(mdp: TabularMDP) -> Tensor:
    return torch.eye(mdp.n_states, dtype=torch.float64, device=mdp.transition.device)
