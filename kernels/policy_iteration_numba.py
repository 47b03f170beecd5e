r"""Policy iteration for many small dense MDPs, compiled by Numba: each is solved from first sweep to last in the cache.

PyTorch's products walk through all instances again for every sweep, and each call costs as much as solving a small
instance; here an instance is read from memory once. The functions release Python's lock, so that threads can share
the instances. Needs the extra ``compiled``; :func:`corollary.theory_checks.solvers.policy_iteration` calls it for
``backend="numba"``, and is what it is tested against. What was compiled is not kept on disk: Numba would keep pickles.

A policy's equations ``(I - gamma P_pi) V = r_pi`` are solved by elimination without a search for pivots. Every row's
diagonal entry exceeds the sum of the others' sizes by ``1 - gamma``, and for matrices with dominant diagonals no entry
grows to more than twice the largest (N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002,
Theorem 9.9).
"""

# Numba's decorators carry no types that mypy reads.
# mypy: disable-error-code="untyped-decorator"

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MOST_SWEEPS = 10
# Sums may be taken in any order, as in BLAS; what is not finite keeps its meaning.
_compiled: Any = numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})


@_compiled
def policy_iteration(
    transition: Floats,
    reward: Floats,
    discount: Floats,
    improvement: float,
    most: int,
    promising: bool,
    action: NDArray[np.int64],
    value: Floats,
    q: Floats,
    iterations: NDArray[np.int64],
    converged: NDArray[np.bool_],
) -> None:
    """Evaluate exactly and improve, instance by instance, until no action is better by more than rounding.

    Args:
        transition: P, ``[B, S, A, S]``.
        reward: r, ``[B, S, A]``.
        discount: gamma, ``[B]``.
        improvement: an action is better if by more than this times ``1 + max |Q|``.
        most: evaluations after which to give up.
        promising: begin with the greedy actions of a few sweeps of value iteration, and not with `action`.
        action: ``[B, S]``, the first policy; receives the last.
        value: ``[B, S]``, receives V of the policy evaluated last.
        q: ``[B, S, A]``, receives ``r + gamma P V``.
        iterations: ``[B]``, receives the number of evaluations.
        converged: ``[B]``, receives whether the last policy was not improved.
    """
    n_states = reward.shape[1]
    matrix = np.empty((n_states, n_states))
    for b in range(len(reward)):
        if promising:
            _sweep_to_promising(transition[b], reward[b], discount[b], action[b], q[b])
        for _ in range(most):
            _evaluate(transition[b], reward[b], discount[b], action[b], matrix, value[b])
            _look_ahead(transition[b], reward[b], discount[b], value[b], q[b])
            iterations[b] += 1
            converged[b] = not _improve(q[b], improvement, action[b])
            if converged[b]:
                break


@_compiled
def _look_ahead(transition: Floats, reward: Floats, discount: float, value: Floats, q: Floats) -> None:
    """Set ``q = r + gamma P V``."""
    n_states, n_actions = reward.shape
    for s in range(n_states):
        for a in range(n_actions):
            expected = 0.0
            for t in range(n_states):
                expected += transition[s, a, t] * value[t]
            q[s, a] = reward[s, a] + discount * expected


@_compiled
def _sweep_to_promising(
    transition: Floats, reward: Floats, discount: float, action: NDArray[np.int64], q: Floats
) -> None:
    """Sweep from 0 until the greedy actions stay as they are, and leave them in `action`."""
    value = np.zeros(len(action))
    action[:] = -1
    q[:] = reward
    for _ in range(_MOST_SWEEPS):
        settled = True
        for s in range(len(action)):
            best = q[s].argmax()
            settled &= action[s] == best
            action[s] = best
            value[s] = q[s, best]
        if settled:
            return
        _look_ahead(transition, reward, discount, value, q)


@_compiled
def _improve(q: Floats, improvement: float, action: NDArray[np.int64]) -> bool:
    """Take better actions where there are some, the first among equals; return whether there were."""
    threshold = improvement * (1 + np.abs(q).max())
    improved = False
    for s in range(len(action)):
        best = q[s].argmax()
        if q[s, best] > q[s, action[s]] + threshold:
            action[s] = best
            improved = True
    return improved


@_compiled
def _evaluate(
    transition: Floats, reward: Floats, discount: float, action: NDArray[np.int64], m: Floats, value: Floats
) -> None:
    """Solve ``(I - gamma P_pi) V = r_pi``; `m` is room for the matrix."""
    n = len(action)
    for s in range(n):
        a = action[s]
        for t in range(n):
            m[s, t] = -discount * transition[s, a, t]
        m[s, s] += 1.0
        value[s] = reward[s, a]
    done = n - n % 4
    for k in range(0, done, 4):  # four columns at a time: the rest of the matrix is read and written a quarter as often
        for c in range(k, k + 3):
            for i in range(c + 1, k + 4):
                _subtract(m, value, i, c)
        for i in range(k + 4, n):
            f0 = m[i, k] / m[k, k]
            f1 = (m[i, k + 1] - f0 * m[k, k + 1]) / m[k + 1, k + 1]
            f2 = (m[i, k + 2] - f0 * m[k, k + 2] - f1 * m[k + 1, k + 2]) / m[k + 2, k + 2]
            f3 = m[i, k + 3] - f0 * m[k, k + 3] - f1 * m[k + 1, k + 3] - f2 * m[k + 2, k + 3]
            f3 /= m[k + 3, k + 3]
            for j in range(k + 4, n):
                m[i, j] -= f0 * m[k, j] + f1 * m[k + 1, j] + f2 * m[k + 2, j] + f3 * m[k + 3, j]
            value[i] -= f0 * value[k] + f1 * value[k + 1] + f2 * value[k + 2] + f3 * value[k + 3]
    for k in range(done, n - 1):
        for i in range(k + 1, n):
            _subtract(m, value, i, k)
    for k in range(n - 1, -1, -1):
        rest = value[k]
        for j in range(k + 1, n):
            rest -= m[k, j] * value[j]
        value[k] = rest / m[k, k]


@_compiled
def _subtract(m: Floats, value: Floats, i: int, k: int) -> None:
    """Eliminate column k of row i by row k."""
    factor = m[i, k] / m[k, k]
    for j in range(k + 1, len(value)):
        m[i, j] -= factor * m[k, j]
    value[i] -= factor * value[k]
