r"""One large MDP whose transitions are mostly zero: hundreds of thousands of states on one machine.

State s and action a have row ``s A + a`` of a compressed sparse matrix ``[S A, S]``, float64. The solver is modified
policy iteration with as many sweeps as pay, and says how far it is from the truth at most.

Sources: M. L. Puterman, "Markov Decision Processes", 1994, sections 6.5 and 6.6; the bounds are J. MacQueen's, J. Math.
Anal. Appl. 1966; solving the evaluation only as well as the improvement deserves: M. Gargiani et al., "Inexact policy
iteration methods for large-scale Markov decision processes", 2024, arXiv 2404.06136.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse import linalg

from .mdp import ROW_TOLERANCE, ModelError, TabularMDP
from .solvers import SolverError, thread_pool

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
_Found = TypeVar("_Found")
Matrix = Any  # a csr_array: scipy-stubs and SciPy disagree on what its rows and products are

_FORCING = 0.1  # an evaluation is good enough when it is off by this share of what the last improvement still gained
_BLOCK = 65_536  # states worked on at a time
_MOST_SWEEPS = 1000
_SLOW = 0.9  # sweeps that leave more than this share of the error are replaced by a Krylov method
_TRIAL = 8  # sweeps after which the rate is measured


@dataclass(frozen=True, eq=False)
class SparseMDP:
    """One finite MDP.

    Attributes:
        transition: P, a ``scipy.sparse.csr_array`` ``[S A, S]`` with row ``s A + a``; every row sums to 1.
        reward: r, ``[S, A]``.
        discount: gamma in [0, 1).

    Raises:
        ModelError: naming state and action of the first row that is no distribution, or the shape that does not fit.
    """

    transition: Matrix
    reward: Array
    discount: float

    @classmethod
    def from_arrays(cls, transition: Any, reward: ArrayLike, discount: float) -> Self:
        """Make it from any sparse or dense matrix ``[S A, S]`` and rewards ``[S, A]``, ``[S A]`` or ``[S]``."""
        p = sparse.csr_array(transition, dtype=np.float64)
        r = np.asarray(reward, np.float64)
        rows, s = p.shape
        if rows == 0 or rows % s:
            raise ModelError(f"P must have shape [S A, S]; got {[rows, s]}.")
        if r.shape not in {(s, rows // s), (rows,), (s,)}:
            raise ModelError(
                f"The reward must have shape [S, A] = {[s, rows // s]}, [S A] or [S]; got {list(r.shape)}."
            )
        r = np.repeat(r, rows // s) if r.shape == (s,) and rows != s else r
        return cls(p, np.ascontiguousarray(r.reshape(s, rows // s)), float(discount))

    @classmethod
    def from_tabular(cls, mdp: TabularMDP) -> Self:
        """Take over one dense instance."""
        if len(mdp) != 1:
            raise ModelError(f"A sparse model is one instance, not {len(mdp)}: give mdp[i].")
        return cls.from_arrays(
            mdp.transition[0].reshape(-1, mdp.n_states).numpy(), mdp.reward[0].numpy(), float(mdp.discount[0])
        )

    def __post_init__(self) -> None:
        """Check every invariant."""
        if not 0 <= self.discount < 1:
            raise ModelError(f"The discount must be in [0, 1); got {self.discount}.")
        if not np.isfinite(self.reward).all():
            s, a = np.argwhere(~np.isfinite(self.reward))[0]
            raise ModelError(f"state {s}, action {a}: the reward is not a finite number.")
        total = self.transition.sum(1)
        data, where = self.transition.data, self.transition.indptr
        if data.size and not data.min() >= 0:  # written so that NaN is caught too
            row = int(np.searchsorted(where, int(np.argmin(data >= 0)), side="right")) - 1
            raise ModelError(f"{self._row(row)}: P has an entry that is negative or no number.")
        wrong = np.flatnonzero(np.abs(total - 1) > ROW_TOLERANCE)
        if wrong.size:
            raise ModelError(f"{self._row(wrong[0])}: P does not sum to 1; it misses by {total[wrong[0]] - 1:.3g}.")

    def _row(self, row: int) -> str:
        return f"state {row // self.n_actions}, action {row % self.n_actions}"

    @property
    def n_states(self) -> int:
        """S."""
        return len(self.reward)

    @property
    def n_actions(self) -> int:
        """A."""
        return self.reward.size // len(self.reward)


@dataclass(frozen=True, eq=False)
class SparseSolution:
    """What :func:`solve` found.

    Attributes:
        value: V, ``[S]``.
        action: greedy actions, ``[S]``.
        bound: certified bound on ``max_s |V - V*|``, up to rounding.
        loss_bound: certified bound on ``max_s V* - V^pi`` of the policy `action`.
        backups: optimality steps taken, each over all states and actions.
        sweeps: products with the matrix of one policy, each over all states.
        converged: whether `bound` is at most the tolerance asked for.
    """

    value: Array
    action: Integers
    bound: float
    loss_bound: float
    backups: int
    sweeps: int
    converged: bool


def solve(
    mdp: SparseMDP, tolerance: float = 1e-8, max_backups: int = 1000, start: ArrayLike | None = None
) -> SparseSolution:
    r"""Solve by modified policy iteration, on all of PyTorch's threads.

    A step is one backup TV over all actions and an evaluation of its greedy policy, by sweeps ``r_pi + gamma P_pi V``
    or, where those contract slowly, BiCGSTAB; until the policy stays it is evaluated only to a tenth of what the backup
    moved. With ``low, high`` the extremes of ``TV - V`` the optimum lies between ``TV + gamma low / (1 - gamma)`` and
    ``TV + gamma high / (1 - gamma)``; the value returned is the middle.

    Args:
        mdp: the model.
        tolerance: of the value in the maximum norm, > 0.
        max_backups: give up after so many, >= 1.
        start: first V, ``[S]``; zeros by default.

    Raises:
        SolverError: for a tolerance that is not positive, or no backup.
    """
    if not tolerance > 0:
        raise SolverError(f"The tolerance must be > 0; got {tolerance}.")
    if max_backups < 1:
        raise SolverError(f"max_backups must be at least 1; got {max_backups}.")
    horizon = mdp.discount / (1 - mdp.discount)
    value = np.zeros(mdp.n_states) if start is None else np.array(start, np.float64)
    model = _Blocks.of_model(mdp)
    action = np.full(mdp.n_states, -1)
    policy: _Blocks | None = None
    sweeps = 0
    for backups in range(1, max_backups + 1):
        best, greedy, low, high = model.backup(value)
        bound = horizon * (high - low) / 2
        if bound <= tolerance or backups == max_backups:
            break
        enough = tolerance / horizon
        if policy is None or not np.array_equal(greedy, action):
            action, policy = greedy, model.chosen(greedy)
            enough = max(_FORCING * (high - low), enough)
        value, taken = _evaluate(policy, best, enough)
        sweeps += taken
    middle = best + horizon * (low + high) / 2
    return SparseSolution(middle, greedy, bound, 2 * bound, backups, sweeps, bound <= tolerance)


class _Blocks:
    """A model cut into blocks of states, which threads work on; the blocks' results stay in their caches.

    Args:
        blocks: states of each block, P's rows for them and their actions, and r ``[states, actions]``.
        discount: gamma.
    """

    def __init__(self, blocks: list[tuple[slice, Matrix, Array]], discount: float) -> None:
        self.blocks, self.discount = blocks, discount

    @classmethod
    def of_model(cls, mdp: SparseMDP) -> Self:
        """Cut a model; the blocks share its memory."""
        p, a = mdp.transition, mdp.n_actions
        blocks = []
        for first in range(0, mdp.n_states, _BLOCK):
            states = slice(first, min(first + _BLOCK, mdp.n_states))
            where = p.indptr[first * a : states.stop * a + 1]
            entries = slice(where[0], where[-1])
            parts = (p.data[entries], p.indices[entries], where - where[0])
            rows = sparse.csr_array(parts, shape=(len(where) - 1, mdp.n_states))
            blocks.append((states, rows, mdp.reward[states]))
        return cls(blocks, mdp.discount)

    def each(self, work: Callable[[slice, Matrix, Array], _Found]) -> list[_Found]:
        """Do `work` on every block, on all threads, and return what it returns."""
        threads = torch.get_num_threads()
        if threads == 1 or len(self.blocks) == 1:
            return [work(*block) for block in self.blocks]
        return list(thread_pool(threads).map(lambda block: work(*block), self.blocks))

    def backup(self, value: Array) -> tuple[Array, Integers, float, float]:
        """Return ``TV``, its greedy actions (the first among equals), and the extremes of ``TV - V``."""
        best, action = np.empty_like(value), np.empty(len(value), np.int64)
        discounted = self.discount * value

        def work(states: slice, p: Matrix, r: Array) -> tuple[float, float]:
            q = p @ discounted
            q += r.reshape(-1)
            action[states] = which = q.reshape(r.shape).argmax(1)
            top = q[np.arange(0, q.size, r.shape[1]) + which]
            best[states] = top
            moved = top - value[states]
            return float(moved.min()), float(moved.max())

        return best, action, *_extremes(self.each(work))

    def chosen(self, action: Integers) -> "_Blocks":
        """Return the model of one policy: one row for each state."""

        def work(states: slice, p: Matrix, r: Array) -> tuple[slice, Matrix, Array]:
            rows = np.arange(0, r.size, r.shape[1]) + action[states]
            return states, p[rows], r.reshape(-1)[rows]

        return _Blocks(self.each(work), self.discount)

    def sweep(self, value: Array) -> tuple[Array, float]:
        """Return ``r_pi + gamma P_pi V`` of a policy's blocks and the spread of what it moved."""
        ahead, discounted = np.empty_like(value), self.discount * value

        def work(states: slice, p: Matrix, r: Array) -> tuple[float, float]:
            mine = np.add(p @ discounted, r, out=ahead[states])
            moved = mine - value[states]
            return float(moved.min()), float(moved.max())

        low, high = _extremes(self.each(work))
        return ahead, high - low


def _extremes(found: list[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in found), max(high for _, high in found)


def _evaluate(policy: _Blocks, value: Array, enough: float) -> tuple[Array, int]:
    """Improve `value` towards V^pi until a sweep moves all states alike, up to `enough`; return it and the sweeps."""
    first = 0.0
    for taken in range(1, _MOST_SWEEPS + 1):
        value, spread = policy.sweep(value)
        if spread <= enough:
            break
        if taken == 1:
            first = spread
        if taken == _TRIAL and spread > first * _SLOW ** (_TRIAL - 1):
            value, products = _krylov(policy, value, enough)
            return value, taken + products
    return value, taken


def _krylov(policy: _Blocks, value: Array, enough: float) -> tuple[Array, int]:
    """Solve ``(I - gamma P_pi) V = r_pi`` by BiCGSTAB from `value`; keep `value` if that made it worse."""
    products = 0

    def residual(v: Array) -> Array:
        """``r_pi + gamma P_pi v - v``."""
        nonlocal products
        products += 1
        return policy.sweep(v)[0] - v

    constant = residual(np.zeros_like(value))
    operator: Any = linalg.LinearOperator(
        (len(value), len(value)), matvec=lambda v: constant - residual(v), dtype=float
    )
    # The maximum norm is at most the Euclidean one, so the residual's spread ends up below `enough`.
    found, _ = linalg.bicgstab(operator, constant, x0=value, rtol=0.0, atol=enough / 2, maxiter=_MOST_SWEEPS // 2)
    worse = np.abs(residual(found)).max() > np.abs(residual(value)).max()
    return (value if worse else found), products


def sparse_garnet(
    rng: np.random.Generator, n_states: int, n_actions: int, branching: int, discount: float
) -> SparseMDP:
    """Make a large Garnet: each (s, a) has `branching` distinct successors; rewards are uniform on [0, 1].

    The probabilities are the gaps between sorted uniforms, as in :func:`~corollary.theory_checks.families.garnet`.
    """
    rows = n_states * n_actions
    successors = np.sort(rng.integers(n_states, size=(rows, branching), dtype=np.int32), -1)
    while (repeated := np.flatnonzero((np.diff(successors, axis=-1) == 0).any(-1))).size:
        successors[repeated] = np.sort(rng.integers(n_states, size=(repeated.size, branching), dtype=np.int32), -1)
    cuts = np.sort(rng.random((rows, branching - 1)), -1)
    gaps = np.diff(cuts, axis=-1, prepend=0.0, append=1.0)
    starts = np.arange(0, rows * branching + 1, branching, dtype=np.int32)
    p = sparse.csr_array((gaps.ravel(), successors.ravel(), starts), shape=(rows, n_states))
    return SparseMDP.from_arrays(p, rng.random((n_states, n_actions)), discount)
