"""Conjugate gradient: hand iterations, direct and SciPy's solvers, and the rows that have no solution."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg
from torch import Tensor

from corollary.kernels.conjugate_gradient import conjugate_gradient


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by(matrices: Tensor):
    """Products with ``[R, n, n]``."""
    return lambda v: torch.einsum("rij,rj->ri", matrices, v)


def positive_definite(n_rows: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random matrices with eigenvalues in [0.1, 10], and right-hand sides."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n_rows, n, n, generator=generator, dtype=torch.float64))
    eigenvalues = 0.1 * 100 ** torch.rand(n_rows, n, generator=generator, dtype=torch.float64)
    b = torch.randn(n_rows, n, generator=generator, dtype=torch.float64)
    return basis @ torch.diag_embed(eigenvalues) @ basis.mT, b


def test_two_iterations_by_hand() -> None:
    # A = diag(1, 2), b = (1, 1). First alpha = 2/3: x = (2/3, 2/3), r = (1/3, -1/3), |r|/|b| = 1/3. Then A^-1 b.
    product = by(torch.diag_embed(f64([[1, 2]])))
    first = conjugate_gradient(product, f64([[1, 1]]), max_iterations=1)
    torch.testing.assert_close(first.x, f64([[2 / 3, 2 / 3]]))
    torch.testing.assert_close(first.residual, f64([1 / 3]))
    assert (first.iterations.item(), first.converged.item(), first.indefinite.item()) == (1, False, False)
    second = conjugate_gradient(product, f64([[1, 1]]), max_iterations=9)
    torch.testing.assert_close(second.x, f64([[1, 0.5]]))
    assert (second.iterations.item(), second.converged.item(), second.indefinite.item()) == (2, True, False)


def test_many_systems_against_a_direct_solver() -> None:
    matrices, b = positive_definite(5, 12)
    found = conjugate_gradient(by(matrices), b, max_iterations=40, tolerance=1e-12)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrices, b), rtol=0, atol=1e-9)
    assert found.converged.all()
    exact = torch.linalg.vector_norm(b - by(matrices)(found.x), dim=1) / torch.linalg.vector_norm(b, dim=1)
    torch.testing.assert_close(found.residual, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n_iterations", [1, 3, 7])
def test_every_iterate_is_scipys(n_iterations) -> None:
    matrices, b = positive_definite(4, 12, seed=1)
    found = conjugate_gradient(by(matrices), b, max_iterations=n_iterations, tolerance=0.0)
    for row in range(4):
        expected, unfinished = cg(matrices[row].numpy(), b[row].numpy(), rtol=0.0, maxiter=n_iterations)
        assert unfinished
        np.testing.assert_allclose(found.x[row], expected, rtol=0, atol=1e-11)
    assert found.iterations.tolist() == [n_iterations] * 4
    assert not found.converged.any()  # stopped by the cap, and says so


def test_as_many_iterations_as_distinct_eigenvalues() -> None:
    eigenvalues = f64([[1.0] * 7 + [4.0] * 7 + [9.0] * 6])
    _, b = positive_definite(1, 20)
    found = conjugate_gradient(by(torch.diag_embed(eigenvalues)), b, max_iterations=20, tolerance=1e-10)
    assert found.iterations.item() == 3
    torch.testing.assert_close(found.x, b / eigenvalues)


def test_singular_matrix_with_the_right_side_in_its_range() -> None:
    laplacian = f64([[[1, -1, 0], [-1, 2, -1], [0, -1, 1]]])  # of a path: constants are its kernel
    b = f64([[1, 1, -2]])
    found = conjugate_gradient(by(laplacian), b, max_iterations=10, tolerance=1e-12)
    torch.testing.assert_close(found.x, (torch.linalg.pinv(laplacian) @ b.unsqueeze(-1)).squeeze(-1))
    assert found.converged.all()
    assert found.iterations.item() == 2


def test_zero_right_side_is_solved_by_zero() -> None:
    matrices, b = positive_definite(3, 6)
    b[1] = 0
    found = conjugate_gradient(by(matrices), b, max_iterations=20)
    assert torch.equal(found.x[1], torch.zeros(6, dtype=torch.float64))
    assert (found.iterations[1], found.residual[1]) == (0, 0)
    assert found.converged.all()
    nothing = conjugate_gradient(by(matrices), torch.zeros_like(b), max_iterations=1, tolerance=0.0)
    assert nothing.converged.all()


def test_direction_of_no_positive_curvature_ends_its_row_with_a_flag() -> None:
    # b = (1, 1) throughout. diag(1, -1): p'Ap = 0 at once, x stays 0. diag(2, -1): alpha = 2, x = (2, 2), r = (-3, 3),
    # p = r + 9 b = (6, 12), p'Ap = 72 - 144 < 0, x stays (2, 2). diag(2, 1) is solved. A product that is not a number.
    diagonals = f64([[1, -1], [2, -1], [2, 1], [1, torch.nan]])
    found = conjugate_gradient(lambda v: diagonals * v, torch.ones(4, 2, dtype=torch.float64), max_iterations=10)
    torch.testing.assert_close(found.x, f64([[0, 0], [2, 2], [0.5, 1], [0, 0]]))
    assert found.indefinite.tolist() == [True, True, False, True]
    assert found.converged.tolist() == [False, False, True, False]
    assert found.iterations.tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(found.residual, f64([1, 3, 0, 1]))


def test_row_does_not_depend_on_its_neighbours() -> None:
    _, b = positive_definite(3, 8)
    diagonals = torch.stack([f64([1.0] * 8), torch.linspace(1, 50, 8).double(), f64([1.0, 3.0] * 4)])
    together = conjugate_gradient(lambda v: diagonals * v, b, max_iterations=30, tolerance=1e-9)
    assert together.iterations.tolist() == [1, 8, 2]
    for row in range(3):
        one = slice(row, row + 1)
        alone = conjugate_gradient(lambda v, one=one: diagonals[one] * v, b[one], max_iterations=30, tolerance=1e-9)
        assert torch.equal(alone.x[0], together.x[row])
        assert alone.iterations[0] == together.iterations[row]


def test_small_numbers_of_single_precision_are_no_zeros() -> None:
    # |b|^2 = 2e-50 is below the smallest float32; squares are taken in float64.
    b = torch.full((1, 2), 1e-25)
    found = conjugate_gradient(lambda v: torch.tensor([[1.0, 2.0]]) * v, b, max_iterations=9)
    assert found.x.dtype == torch.float32
    torch.testing.assert_close(found.x, torch.tensor([[1e-25, 0.5e-25]]), rtol=1e-6, atol=0)
    assert (b * b).sum() == 0  # the control


@pytest.mark.parametrize(
    ("b", "options", "message"),
    [
        (torch.ones(3), {}, r"needs b \[R, n\] of floats"),
        (torch.ones(1, 3, dtype=torch.int64), {}, "of floats"),
        (torch.ones(1, 3), {"max_iterations": 0}, "max_iterations is 0"),
        (torch.ones(1, 3), {"tolerance": -1.0}, "tolerance is -1.0"),
    ],
)
def test_arguments_out_of_range(b, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(lambda v: v, b, **{"max_iterations": 3} | options)


def test_product_of_another_shape() -> None:
    with pytest.raises(ValueError, match="the shapes must be the same"):
        conjugate_gradient(lambda v: v[:, :1], torch.ones(1, 3), max_iterations=3)
