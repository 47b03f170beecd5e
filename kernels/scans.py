r"""Returns and advantages from one backward linear recursion.

Every estimator here is

.. math:: x_t = u_t + c_t\, x_{t+1}, \qquad x_T = 0,

for some increments :math:`u` and coefficients :math:`c` (:func:`backward_recursion`); the functions differ
only in how they build the two. Three rules are shared by all of them:

* ``terminated`` stops the bootstrap: nothing is worth anything after a terminal state, so ``next_values`` is
  ignored there.
* ``terminated`` or ``truncated`` cuts the trace: the next row belongs to another episode. A truncated row
  still bootstraps, from ``next_values``, which must hold the value of its *true* successor (the final
  observation, not the first one after the reset).
* ``valid=False`` marks a row that is no transition (the reset row of gymnasium's ``NEXT_STEP`` autoreset).
  Its inputs and flags are ignored, whatever they hold; its outputs are 0; and it is a wall: the row before it
  ends there as it would at the end of the batch, bootstrapping from its own ``next_values``. After an
  episode's end the flag has cut the trace already; the wall keeps padding after an unflagged stop from
  leaking as well.

After its last row the batch ends as at a truncation. Sources: Sutton and Barto, *Reinforcement Learning* (2nd
ed., 2018), section 12.1 (λ-return); Schulman et al., *High-Dimensional Continuous Control Using Generalized
Advantage Estimation* (ICLR 2016), equation 16.

Back ends (``backend=``), all tested against the first:

* ``"reference"``: a plain loop over time in torch; any device; the only one that autograd can differentiate.
* ``"cpu"``: numpy; CPU tensors; long, narrow batches are split into blocks that advance together.
* ``"triton"``: tiles with an associative scan, one launch; CUDA tensors or Triton's interpreter; extra
  ``gpu``.
* ``"auto"``: ``"reference"`` when a gradient is needed, else ``"cpu"`` on CPU, ``"triton"`` on CUDA where it
  is installed, ``"reference"`` anywhere else.

The fast forms multiply coefficients of neighbouring rows, so they are meant for :math:`|c_t| \le 1`; far
larger ones can overflow there although the recursion itself does not. ``benchmarks/scans.py`` measures which
form wins at which size.
"""

import math
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Backend = Literal["auto", "reference", "cpu", "triton"]
_Rows = npt.NDArray[np.floating[Any]]  # [T, N]

# Below this many rows, or above this many columns, one row at a time beats blocks (benchmarks/scans.py).
_BLOCKS_MIN_ROWS = 64
_BLOCKS_MAX_COLUMNS = 512


def backward_recursion(increments: Tensor, coefficients: Tensor, *, backend: Backend = "auto") -> Tensor:
    r"""Solve :math:`x_t = u_t + c_t x_{t+1}`, :math:`x_T = 0`, backwards in time.

    Args:
        increments: ``u``, ``[T, *batch]``, float32 or float64.
        coefficients: ``c``, same shape, dtype and device. The last row multiplies :math:`x_T = 0`: no effect.
        backend: see the module's table.

    Returns:
        ``x``, ``[T, *batch]``; the inputs are left as they are.

    Raises:
        ValueError: shapes, dtypes or devices differ, there is no row, or the back end cannot serve the
            tensors.
        ModuleNotFoundError: ``backend="triton"`` without Triton installed.
    """
    _check_floats(increments=increments, coefficients=coefficients)
    chosen = _resolve(backend, increments, coefficients)
    if chosen == "reference":
        return _reference(increments, coefficients)
    # Trailing batch axes are independent columns.
    shape = increments.shape
    u = increments.detach().reshape(shape[0], -1).contiguous()
    c = coefficients.detach().reshape(shape[0], -1).contiguous()
    if u.shape[1] == 0:
        return torch.empty_like(increments)
    if chosen == "cpu":
        return torch.from_numpy(_cpu(u.numpy(), c.numpy())).reshape(shape)
    try:
        # Imported here, when it is first needed: TRITON_INTERPRET is read when the kernel is defined.
        from corollary.kernels._scans_triton import scan
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "backend 'triton' needs Triton; install it with: pip install 'corollary[gpu]'", name=error.name
        ) from error
    return scan(u, c).reshape(shape)


def discounted_sums(
    rewards: Tensor,
    discount: float,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor | None = None,
    bootstrap: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""Discounted rewards to go, :math:`G_t = r_t + \gamma G_{t+1}` within an episode.

    Where an episode is cut without termination (truncation, the batch's last row, a row before an invalid
    one) :math:`G_{t+1}` is replaced by ``bootstrap``; after termination it is 0.

    Args:
        rewards: ``[T, *batch]``, float32 or float64.
        discount: :math:`\gamma` in [0, 1].
        terminated: ``[T, *batch]`` bool, the step ended in a terminal state.
        truncated: ``[T, *batch]`` bool, the episode was cut after the step for another reason.
        valid: ``[T, *batch]`` bool, False where the row is no transition; all rows count when None.
        bootstrap: ``[T, *batch]`` value of each row's true successor, read only where an episode is cut; 0
            when None.
        backend: see the module's table.

    Returns:
        ``G``, ``[T, *batch]``, 0 in invalid rows.

    Raises:
        ValueError: a shape, dtype, device or number is not as above, or the back end cannot serve the
            tensors.
        ModuleNotFoundError: ``backend="triton"`` without Triton installed.
    """
    values = torch.zeros_like(rewards) if bootstrap is None else bootstrap
    return lambda_returns(
        rewards, values, terminated, truncated, valid, discount=discount, trace_decay=1.0, backend=backend
    )


def lambda_returns(
    rewards: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor | None = None,
    *,
    discount: float,
    trace_decay: float,
    backend: Backend = "auto",
    bootstrap_on_truncation: bool = True,
) -> Tensor:
    r"""λ-returns: geometric mixtures of n-step returns.

    .. math:: R_t = r_t + \gamma (1 - \text{terminated}_t)\,[(1 - \lambda)\, V(s'_t) + \lambda R_{t+1}],

    where :math:`R_{t+1}` is :math:`V(s'_t)` if row ``t`` is the last of its episode, of the batch, or before
    an invalid row. With :math:`V(s'_t) = \max_a Q(s'_t, a)` these are the Q(λ) targets of PQN. They equal the
    returns of :func:`gae` when :math:`V(s'_t) = V(s_{t+1})` within every episode.

    Args:
        rewards: ``[T, *batch]``, float32 or float64.
        next_values: ``[T, *batch]``, value of each row's true successor; ignored in terminated rows.
        terminated: ``[T, *batch]`` bool, the step ended in a terminal state.
        truncated: ``[T, *batch]`` bool, the episode was cut after the step for another reason.
        valid: ``[T, *batch]`` bool, False where the row is no transition; all rows count when None.
        discount: :math:`\gamma` in [0, 1].
        trace_decay: :math:`\lambda` in [0, 1]: 0 is the one-step target, 1 the discounted sum.
        backend: see the module's table.
        bootstrap_on_truncation: False treats truncation as termination (biased; some published scores used
            it).

    Returns:
        ``R``, ``[T, *batch]``, 0 in invalid rows.

    Raises:
        ValueError: a shape, dtype, device or number is not as above, or the back end cannot serve the
            tensors.
        ModuleNotFoundError: ``backend="triton"`` without Triton installed.
    """
    _check_floats(rewards=rewards, next_values=next_values)
    _check_flags(rewards, terminated=terminated, truncated=truncated, valid=valid)
    _check_fractions(discount=discount, trace_decay=trace_decay)
    bootstrapped = _bootstrapped(next_values, terminated, truncated, bootstrap_on_truncation)
    continues = _continues(terminated, truncated, valid)
    coefficients = continues.to(rewards.dtype).mul_(discount * trace_decay)
    # A row that the next one continues counts 1 - λ of its own successor's value, any other row all of it.
    increments = _masked(bootstrapped.mul_(discount - coefficients).add_(rewards), valid)
    return backward_recursion(increments, coefficients, backend=backend)


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor | None = None,
    *,
    discount: float,
    trace_decay: float,
    backend: Backend = "auto",
    bootstrap_on_truncation: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimates and the matching critic targets.

    .. math::
        \delta_t &= r_t + \gamma (1 - \text{terminated}_t)\, V(s'_t) - V(s_t) \\
        \hat A_t &= \delta_t
            + \gamma \lambda (1 - \text{terminated}_t)(1 - \text{truncated}_t)\, \hat A_{t+1} \\
        R_t &= \hat A_t + V(s_t)

    with :math:`\hat A = 0` after the last row.

    Args:
        rewards: ``[T, *batch]``, float32 or float64.
        values: ``[T, *batch]``, :math:`V(s_t)`.
        next_values: ``[T, *batch]``, :math:`V(s'_t)` of the row's true successor; ignored in terminated rows.
        terminated: ``[T, *batch]`` bool, the step ended in a terminal state.
        truncated: ``[T, *batch]`` bool, the episode was cut after the step for another reason.
        valid: ``[T, *batch]`` bool, False where the row is no transition; all rows count when None.
        discount: :math:`\gamma` in [0, 1].
        trace_decay: :math:`\lambda` in [0, 1]: 0 gives :math:`\delta_t` (bias from the critic), 1 the
            discounted sum minus the baseline (variance from the rewards).
        backend: see the module's table.
        bootstrap_on_truncation: False treats truncation as termination (biased; some published scores used
            it).

    Returns:
        ``(advantages, returns)``, both ``[T, *batch]``, 0 in invalid rows.

    Raises:
        ValueError: a shape, dtype, device or number is not as above, or the back end cannot serve the
            tensors.
        ModuleNotFoundError: ``backend="triton"`` without Triton installed.
    """
    _check_floats(rewards=rewards, values=values, next_values=next_values)
    _check_flags(rewards, terminated=terminated, truncated=truncated, valid=valid)
    _check_fractions(discount=discount, trace_decay=trace_decay)
    bootstrapped = _bootstrapped(next_values, terminated, truncated, bootstrap_on_truncation)
    errors = _masked(bootstrapped.mul_(discount).add_(rewards).sub_(values), valid)
    coefficients = _continues(terminated, truncated, valid).to(rewards.dtype).mul_(discount * trace_decay)
    advantages = backward_recursion(errors, coefficients, backend=backend)
    return advantages, _masked(advantages + values, valid)


def _bootstrapped(next_values: Tensor, terminated: Tensor, truncated: Tensor, bootstrap_on_truncation: bool) -> Tensor:
    """A copy of the successors' values, 0 where nothing follows; filled, as what is ignored may be NaN."""
    ended = terminated if bootstrap_on_truncation else terminated | truncated
    return next_values.masked_fill(ended, 0.0)


def _continues(terminated: Tensor, truncated: Tensor, valid: Tensor | None) -> Tensor:
    """True where the next row is the same episode's next transition."""
    continues = (terminated | truncated).logical_not_()
    continues[-1] = False
    if valid is not None:
        continues &= valid
        continues[:-1] &= valid[1:]
    return continues


def _masked(rows: Tensor, valid: Tensor | None) -> Tensor:
    """`rows`, a fresh tensor, with 0 in the invalid ones."""
    return rows if valid is None else rows.masked_fill_(~valid, 0.0)


def _reference(increments: Tensor, coefficients: Tensor) -> Tensor:
    x = torch.zeros_like(increments[0])
    backwards = []
    for t in reversed(range(len(increments))):
        x = increments[t] + coefficients[t] * x
        backwards.append(x)
    return torch.stack(backwards[::-1])


def _cpu(u: _Rows, c: _Rows) -> _Rows:
    """The recursion over ``[T, N]`` arrays in the form that wins at this size."""
    n_rows, n_columns = u.shape
    if n_rows >= _BLOCKS_MIN_ROWS and n_columns <= _BLOCKS_MAX_COLUMNS:
        return _blocks(u, c)
    return _rows(u, c)


def _rows(u: _Rows, c: _Rows) -> _Rows:
    """One row after another, all columns at once: T short steps in Python, no extra memory traffic."""
    x = np.empty_like(u)
    x[-1] = u[-1]
    for x_t, u_t, c_t, x_next in zip(x[-2::-1], u[-2::-1], c[-2::-1], x[:0:-1], strict=True):
        np.multiply(c_t, x_next, out=x_t)
        x_t += u_t
    return x


def _blocks(u: _Rows, c: _Rows) -> _Rows:
    r"""About :math:`\sqrt T` blocks of rows advance together: 2 :math:`\sqrt T` steps in Python instead of T.

    Within a block :math:`x_t = y_t + p_t x'`, where :math:`x'` is the first row of the next block, y the
    recursion as if nothing followed the block, and p the product of the block's coefficients from t on. The
    first rows of the blocks therefore obey the same kind of recursion.
    """
    n_rows, n_columns = u.shape
    n_blocks = math.isqrt(n_rows)
    length = -(-n_rows // n_blocks)

    def split(rows: _Rows) -> _Rows:
        padded = np.zeros((n_blocks * length, n_columns), rows.dtype)
        padded[:n_rows] = rows
        return np.ascontiguousarray(padded.reshape(n_blocks, length, n_columns).swapaxes(0, 1))

    y, p = split(u), split(c)
    for (y_next, y_t), (p_next, p_t) in zip(pairwise(y[::-1]), pairwise(p[::-1]), strict=True):
        y_t += p_t * y_next
        p_t *= p_next
    x_next_block = np.zeros_like(y[0])
    x_next_block[:-1] = _rows(y[0], p[0])[1:]
    y += p * x_next_block
    return y.swapaxes(0, 1).reshape(-1, n_columns)[:n_rows]


def _resolve(backend: Backend, *inputs: Tensor) -> Backend:
    """The back end to run, after checking that it can serve these tensors."""
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    device = inputs[0].device.type
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(get_args(Backend))}.")
    if backend == "auto":
        if not needs_gradient and device == "cpu":
            return "cpu"
        if not needs_gradient and device == "cuda" and find_spec("triton") is not None:
            return "triton"
        return "reference"
    if backend != "reference" and needs_gradient:
        raise ValueError(
            f"backend {backend!r} has no gradient but an input requires one; "
            "use 'reference' or 'auto', or call it under torch.no_grad()."
        )
    if backend == "cpu" and device != "cpu":
        raise ValueError(f"backend 'cpu' got tensors on {device}; use 'auto', or move them to the CPU.")
    return backend


def _check_floats(**tensors: Tensor) -> None:
    """Same shape, dtype and device; float32 or float64; at least one row."""
    (first_name, first), *others = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; pass a torch.Tensor.")
    if first.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{first_name} has dtype {first.dtype}; convert it to float32 or float64.")
    if first.ndim == 0 or first.shape[0] == 0:
        raise ValueError(f"{first_name} has shape {list(first.shape)}; it needs a time axis with at least one row.")
    for name, tensor in others:
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(tensor, what), getattr(first, what)
            if ours != theirs:
                ours, theirs = (list(x) if what == "shape" else x for x in (ours, theirs))
                raise ValueError(f"{name} has {what} {ours} but {first_name} {theirs}; they must be the same.")


def _check_flags(rewards: Tensor, **flags: Tensor | None) -> None:
    for name, flag in flags.items():
        if flag is None:
            continue
        if not isinstance(flag, Tensor) or flag.dtype != torch.bool:
            kind = flag.dtype if isinstance(flag, Tensor) else type(flag).__name__
            raise ValueError(f"{name} is {kind}; pass a bool tensor, for example {name} > 0.5.")
        if flag.shape != rewards.shape or flag.device != rewards.device:
            raise ValueError(
                f"{name} has shape {list(flag.shape)} on {flag.device} but rewards have "
                f"{list(rewards.shape)} on {rewards.device}; they must be the same."
            )


def _check_fractions(**fractions: float) -> None:
    for name, fraction in fractions.items():
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"{name} is {fraction}; it must lie in [0, 1].")
