r"""Conjugate gradient: many symmetric positive definite systems ``A_e x_e = b_e``, each known by its products only.

For each row, from ``x = 0``, ``r = p = b``:

    alpha = r'r / p'A p,   x <- x + alpha p,   s = r - alpha A p,   p <- s + (s's / r'r) p,   r <- s.

In exact arithmetic row e is solved after as many iterations as A_e has distinct eigenvalues; stopped earlier, x is the
best point of the span of ``b, A b, A^2 b, ...`` in the norm of A. A singular A is no obstacle as long as b lies in its
range. Products keep the dtype of b and decide the accuracy; all else is float64, where the square of a small gradient
does not vanish.

Source: M. Hestenes, E. Stiefel, "Methods of conjugate gradients for solving linear systems", 1952, section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearSolution:
    """What :func:`conjugate_gradient` found, row by row.

    Attributes:
        x: the last iterate, ``[R, n]``, in the dtype of b.
        residual: ``|b - A x| / |b|`` as the recursion has it, 0 where b is 0, float64 ``[R]``.
        iterations: products that the row took part in and gained from, int64 ``[R]``.
        converged: whether the residual is at most the tolerance, bool ``[R]``.
        indefinite: whether a direction with ``p'A p > 0`` not true ended the row: A is not positive definite, or its
            product is not finite. x is the iterate before that direction. Bool ``[R]``.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor
    indefinite: Tensor


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, *, max_iterations: int, tolerance: float = 1e-5
) -> LinearSolution:
    """Solve ``A_e x_e = b_e`` for every row e.

    A row that has converged, or whose matrix turned out not to be positive definite, keeps its x while others go on,
    so it does not depend on its neighbours.

    Args:
        product: maps ``[R, n]`` to the rows ``A_e v_e``, ``[R, n]``.
        b: right-hand sides, ``[R, n]``, float32 or float64. Where b is 0 so is x.
        max_iterations: most products, >= 1.
        tolerance: residual at which a row is done, relative to ``|b|``, >= 0.

    Raises:
        ValueError: if an argument is not as above, or `product` returns another shape.
    """
    if b.ndim != 2 or not b.is_floating_point():
        raise ValueError(f"conjugate_gradient needs b [R, n] of floats; got {b.dtype} of shape {list(b.shape)}.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; it must be >= 1.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it must be >= 0.")
    r = b.detach().to(torch.float64)
    x, p = torch.zeros_like(r), r
    square = (r * r).sum(1)
    initial, goal = square, tolerance**2 * square
    active = square > goal
    indefinite = torch.zeros_like(active)
    iterations = torch.zeros_like(active, dtype=torch.int64)
    for _ in range(max_iterations):
        if not active.any():
            break
        z = product(p.to(b.dtype)).detach().to(torch.float64)
        if z.shape != p.shape:
            raise ValueError(f"product maps {list(p.shape)} to {list(z.shape)}; the shapes must be the same.")
        curvature = (p * z).sum(1)
        indefinite |= active & ~(curvature > 0)
        active = active & ~indefinite
        moving = active.unsqueeze(1)
        alpha = (square / curvature).unsqueeze(1)
        x = torch.where(moving, x + alpha * p, x)
        r = torch.where(moving, r - alpha * z, r)
        before, square = square, (r * r).sum(1)
        p = torch.where(moving, r + (square / before).unsqueeze(1) * p, p)
        iterations += active
        active = active & (square > goal)
    return LinearSolution(
        x=x.to(b.dtype),
        residual=torch.where(initial > 0, (square / initial).sqrt(), square),
        iterations=iterations,
        converged=square <= goal,
        indefinite=indefinite,
    )
