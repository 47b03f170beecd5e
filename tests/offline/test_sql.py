"""SQL: losses by hand, limits, SQL-1 (one state), optimal weights, updates."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corollary.core.errors import ConfigError
from corollary.offline import SQL
from corollary.offline.sql import density_ratio, sparse_value_loss

from .plain import HIGH, LOW
from .plain_in_sample import PlainInSample, difference
from .tabular import root_of_density, sparse_value


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(values: Tensor, at: float, alpha: float, weight: Tensor | None = None) -> float:
    """Derivative of the loss of ``values - v`` in v."""
    v = f64(at)[0].requires_grad_()
    return float(torch.autograd.grad(sparse_value_loss(values - v, alpha, weight), v)[0])


def solved(values: Tensor, alpha: float, probability: Tensor) -> float:
    """The v with ``sum_a p max(0, 1 + (Q - v) / (2 alpha)) = 1``."""
    return float(root_of_density(values.numpy(), probability.numpy(), 2 * alpha, 1.0))


# ------------------------------------------------------------------------------------------------ hand numbers


@pytest.mark.rung(1, "offline.sql")
def test_value_loss_by_hand() -> None:
    # alpha = 1/2: w = 1 + u = 3, 0.5, 0 for u = 2, -0.5, -4; w^2 - 2 u = 9 - 4, 0.25 + 1, 0 + 8.
    torch.testing.assert_close(density_ratio(f64(2, -0.5, -4), 0.5), f64(3, 0.5, 0))
    torch.testing.assert_close(sparse_value_loss(f64(2, -0.5, -4), 0.5), f64((5 + 1.25 + 8) / 3)[0])
    torch.testing.assert_close(sparse_value_loss(f64(2, -0.5, -4), 0.5, f64(3, 0, 0)), f64(5)[0])


def test_gradient_is_that_of_the_code_s_loss() -> None:
    # The code's loss has V / alpha where this one has -u / alpha: in v the two have the same derivative.
    q, alpha = normal(9), 0.3
    v = normal(9, seed=1).requires_grad_()
    half = (q - v) / (2 * alpha) + 1
    written = (torch.where(half > 0, half**2, 0) + v / alpha).mean()
    ours = sparse_value_loss(q - v, alpha)
    torch.testing.assert_close(torch.autograd.grad(ours, v), torch.autograd.grad(written, v))


def test_policy_weights_by_hand() -> None:
    u = f64(-3, -1, 0, 2, 500)
    assert SQL().policy_weight(u).tolist() == [0, 0, 0, 2, 100]
    assert SQL(policy_weight="theory", alpha=1.0).policy_weight(u).tolist() == [0, 0.5, 1, 2, 100]
    assert SQL(policy_weight="theory", alpha=0.5).policy_weight(u).tolist() == [0, 0, 1, 3, 100]


def test_settings_out_of_range_are_named() -> None:
    for options in ({"alpha": 0.0}, {"policy_weight": "theoretical"}):
        with pytest.raises(ConfigError, match=rf"SQLConfig\.{next(iter(options))} must be"):
            SQL(**options)


# ----------------------------------------------------------------------------------------- limits and derivations


@given(st.integers(1, 3), st.integers(1, 8), st.floats(0.1, 10))
def test_leading_axes_are_seeds(n_seeds, n_rows, alpha) -> None:
    residual = normal(n_seeds, n_rows, seed=n_rows)
    stacked = sparse_value_loss(residual, alpha)
    torch.testing.assert_close(stacked, torch.stack([sparse_value_loss(u, alpha) for u in residual]))
    torch.testing.assert_close(sparse_value_loss(residual, alpha, torch.ones_like(residual)), stacked)


@pytest.mark.rung(6, "offline.sql")
@pytest.mark.theory
@given(st.integers(0, 10**6), st.floats(0.05, 20))
def test_sql_1_density_ratio_averages_to_one(seed, alpha) -> None:
    # SQL-1: V solves E max(0, 1 + (Q - V) / (2 alpha)) = 1, with unequal probabilities as row weights of mean 1.
    values, p = 3 * normal(6, seed=seed), torch.softmax(normal(6, seed=seed + 1), 0)
    best = solved(values, alpha, p)
    assert float((p * density_ratio(values - best, alpha)).sum()) == pytest.approx(1, abs=1e-12)
    assert abs(slope(values, best, alpha, 6 * p)) < 1e-11 / alpha
    assert slope(values, best - 0.01, alpha, 6 * p) < 0 < slope(values, best + 0.01, alpha, 6 * p)
    # While no ratio is zero, V is the mean.
    mean = float((p * values).sum())
    if values.min() - mean >= -2 * alpha:
        assert best == pytest.approx(mean, abs=1e-11)
    assert best >= mean - 1e-11  # E max(0, x) >= max(0, E x)


@pytest.mark.rung(6, "offline.sql")
@pytest.mark.theory
def test_sql_1_controls() -> None:
    values, p = f64(-1, 0, 2), torch.full((3,), 1 / 3, dtype=torch.float64)
    for alpha, other in ((0.3, 0.1), (0.1, 0.3)):
        assert abs(slope(values, solved(values, alpha, p), alpha)) < 1e-13
        assert abs(slope(values, solved(values, other, p), alpha)) > 1e-2
    # Without the truncation V would be the mean whatever alpha.
    assert abs(slope(values, 1 / 3, 0.1)) > 1e-2
    # EQL's temperature alpha gives EQL's value, the soft maximum.
    assert abs(slope(values, float(torch.logsumexp(values, 0) - np.log(3)), 1.0)) > 1e-2


@pytest.mark.theory
def test_value_falls_with_alpha_from_the_best_to_the_mean() -> None:
    values, p = normal(7, seed=3), torch.full((7,), 1 / 7, dtype=torch.float64)
    solutions = [solved(values, alpha, p) for alpha in np.geomspace(1e-4, 10, 30)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(solutions))
    # For alpha -> 0 only the best action, of probability p, is active: p (1 + (max - V) / (2 alpha)) = 1.
    assert solutions[0] == pytest.approx(float(values.max()) - 2e-4 * (7 - 1), abs=1e-12)
    assert solutions[-1] == pytest.approx(float(values.mean()), abs=1e-12)


@pytest.mark.theory
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_theory_s_weight_solves_the_regularised_problem(alpha) -> None:
    # max_pi E_pi Q - alpha E_pi[pi / mu - 1] over distributions pi, mu the data's: pi = mu w, w the density ratio.
    values, mu = normal(5, seed=8), torch.softmax(normal(5, seed=9), 0)

    def objective(pi: Tensor) -> Tensor:
        return (pi * values).sum(-1) - alpha * (pi * (pi / mu - 1)).sum(-1)

    advantage = values - solved(values, alpha, mu)
    theory = mu * SQL(alpha=alpha, policy_weight="theory").policy_weight(advantage)
    assert float(theory.sum()) == pytest.approx(1, abs=1e-12)
    others = torch.softmax(3 * normal(2000, 5, seed=10), -1)
    nearby = 0.99 * theory + 0.01 * others
    assert (objective(torch.cat([others, nearby])) <= objective(theory) + 1e-12).all()
    # Control: the released weight, normalised, is another policy, and a worse one here.
    released = mu * SQL(alpha=alpha).policy_weight(advantage)
    assert objective(released / released.sum()) < objective(theory) - 1e-4


# ----------------------------------------------------------------------------------------------- exact twin


@pytest.mark.theory
def test_fixed_point_lies_between_behaviour_and_the_best_in_the_data(finite_mdp) -> None:
    mdp = finite_mdp(1)
    values = [sparse_value(mdp, alpha) for alpha in (1e-4, 0.05, 0.2, 0.5, 10.0)]
    assert all((after <= before + 1e-12).all() for before, after in itertools.pairwise(values))
    np.testing.assert_allclose(values[0], mdp.best_value(mdp.behaviour_SA > 0), rtol=0, atol=0.01)
    np.testing.assert_allclose(values[-1], mdp.policy_value(mdp.behaviour_SA), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------- plain implementation


class PlainSQL(PlainInSample):
    def __init__(self, agent: SQL, data, seed: int, wrong: str = "") -> None:
        super().__init__(agent, data, seed, self.sparse, self.truncated, self.square, wrong)

    def sparse(self, q: Tensor, v: Tensor) -> Tensor:
        term = (q - v) / (2 * self.config.alpha) + 1
        on = torch.ones_like(term) if self.wrong == "no truncation" else (term > 0).double()
        alpha = 2 * self.config.alpha if self.wrong == "V over 2 alpha" else self.config.alpha
        return (on * term**2 + v / alpha).mean()

    def truncated(self, u: Tensor) -> Tensor:
        if self.config.policy_weight == "theory":
            u = 1 + u / (2 * self.config.alpha)
        return torch.clamp(u, max=100.0) if self.wrong == "negative weights" else torch.clamp(u, 0.0, 100.0)

    def square(self, error: Tensor) -> Tensor:
        return error**2


def sql_difference(dataset, wrong: str = "", **options: object) -> float:
    return difference(SQL, dataset, lambda *args: PlainSQL(*args, wrong), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.1},
        {"alpha": 0.1, "policy_weight": "theory"},
        {"alpha": 1e-3, "policy_weight": "theory"},  # capped weights
        {"value_dropout": 0.25},
        {"value_layer_norm": False, "init": "torch"},
    ],
)
def test_sql_equals_the_plain_implementation(random_dataset, options) -> None:
    assert sql_difference(random_dataset(low=LOW, high=HIGH), **options) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        "no truncation",
        "V over 2 alpha",
        "negative weights",
        "old V in the weights",
        "old V in the targets",
        "online critics",
    ],
)
def test_sql_controls(random_dataset, wrong) -> None:
    assert sql_difference(random_dataset(low=LOW, high=HIGH), wrong, alpha=0.1) > 1e-7


def test_the_code_s_presets_are_those_of_its_scripts() -> None:
    # Read off ryanxhr/IVR, run_*.sh and configs: alpha, the three learning rates, actor dropout.
    configs = {name: SQL(preset=name).config for name in SQL.presets}
    assert {name: (c.alpha, c.actor_lr, c.critic_lr, c.value_lr, c.dropout) for name, c in configs.items()} == {
        "locomotion": (1.0, 3e-4, 3e-4, 3e-4, 0),
        "antmaze": (0.1, 2e-4, 2e-4, 2e-4, 0),
        "antmaze-umaze-diverse": (3.0, 2e-4, 2e-4, 2e-4, 0),
        "kitchen": (0.5, 3e-4, 3e-4, 3e-4, 0.1),
    }
    assert all(c.value_layer_norm for c in configs.values())
