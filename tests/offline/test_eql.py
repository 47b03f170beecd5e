"""EQL: losses by hand, limits, EQL-1 (one state), optimal weights, updates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corollary.core.errors import ConfigError
from corollary.offline import EQL
from corollary.offline.eql import exponential_value_loss
from corollary.offline.xql import gumbel_loss

from .plain import HIGH, LOW
from .plain_in_sample import PlainInSample, difference


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(values: Tensor, at: float, alpha: float, weight: Tensor | None = None) -> float:
    """Derivative of the loss of ``values - v`` in v."""
    v = f64(at)[0].requires_grad_()
    return float(torch.autograd.grad(exponential_value_loss(values - v, alpha, weight), v)[0])


def soft_maximum(values: Tensor, alpha: float, probability: Tensor) -> float:
    return float(alpha * torch.logsumexp(values / alpha + probability.log(), 0))


# ------------------------------------------------------------------------------------------------ hand numbers


@pytest.mark.rung(1, "offline.eql")
def test_value_loss_by_hand() -> None:
    # alpha = 2: z = 2 and -1, m = 2, so (e^0 - 2 e^-2 + e^-3 + e^-2) / 2.
    loss = exponential_value_loss(f64(4, -2), 2.0)
    torch.testing.assert_close(loss, f64((1 - math.exp(-2) + math.exp(-3)) / 2)[0])
    # Clipped: z = 5 (not 8) and 0, m = 5, while the linear term keeps its 8: (1 - 8 e^-5 + e^-5) / 2.
    loss = exponential_value_loss(f64(8, 0), 1.0)
    torch.testing.assert_close(loss, f64((1 - 7 * math.exp(-5)) / 2)[0])


def test_a_clipped_row_only_lowers_the_value() -> None:
    # d/du: (e^{z - m} - e^{-m}) / (alpha B) where z < 5, and -e^{-m} / (alpha B) beyond.
    residual = f64(2, -1, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(exponential_value_loss(residual, 1.0), residual)
    torch.testing.assert_close(
        gradient, f64(math.exp(2 - 5) - math.exp(-5), math.exp(-1 - 5) - math.exp(-5), -math.exp(-5)) / 3
    )


def test_gradient_is_that_of_the_code_s_loss_and_unclipped_of_xql_s() -> None:
    # The code's loss has V / alpha where this one has -u / alpha; XQL's differs by a constant only.
    q, alpha = normal(9), 0.7
    v = normal(9, seed=1).requires_grad_()
    z = (q - v) / alpha
    m = max(float(z.detach().max()), -1.0)
    written = (torch.exp(z - m) + math.exp(-m) * v / alpha).mean()
    ours = torch.autograd.grad(exponential_value_loss(q - v, alpha), v)
    torch.testing.assert_close(ours, torch.autograd.grad(written, v))
    torch.testing.assert_close(ours, torch.autograd.grad(gumbel_loss(q - v, alpha, 5.0), v))
    # Control: where z is clipped XQL's differs.
    shifted = torch.cat([q[:1] + 10, q[1:]])
    clipped = [
        torch.autograd.grad(loss, v)[0]
        for loss in (exponential_value_loss(shifted - v, alpha), gumbel_loss(shifted - v, alpha, 5.0))
    ]
    assert (clipped[0] - clipped[1]).abs().max() > 1e-4


def test_policy_weight_by_hand() -> None:
    u = f64(0, -1, 0.5, 3)
    assert EQL(alpha=2.0).policy_weight(u).tolist() == pytest.approx([1, math.exp(-5), math.exp(2.5), 100])
    assert EQL(alpha=2.0, weight_scale=1.0).policy_weight(u).tolist() == pytest.approx(
        [1, math.exp(-0.5), math.exp(0.25), math.exp(1.5)]
    )
    assert EQL(weight_scale=0.0).policy_weight(u).tolist() == [1, 1, 1, 1]


def test_settings_out_of_range_are_named() -> None:
    for options in ({"alpha": 0.0}, {"weight_scale": -1.0}):
        with pytest.raises(ConfigError, match=rf"EQLConfig\.{next(iter(options))} must be"):
            EQL(**options)


# ----------------------------------------------------------------------------------------- limits and derivations


@given(st.integers(1, 3), st.integers(1, 8), st.floats(0.1, 10))
def test_leading_axes_are_seeds(n_seeds, n_rows, alpha) -> None:
    residual = normal(n_seeds, n_rows, seed=n_rows)
    stacked = exponential_value_loss(residual, alpha)
    torch.testing.assert_close(stacked, torch.stack([exponential_value_loss(u, alpha) for u in residual]))
    torch.testing.assert_close(exponential_value_loss(residual, alpha, torch.ones_like(residual)), stacked)


@pytest.mark.rung(6, "offline.eql")
@pytest.mark.theory
@given(st.integers(0, 10**6), st.floats(0.2, 20))
def test_eql_1_minimiser_is_the_soft_maximum(seed, alpha) -> None:
    # EQL-1: V = alpha log E e^{Q / alpha}, with unequal probabilities (none below e^-5) as row weights of mean 1.
    values, p = 3 * normal(6, seed=seed), torch.softmax(0.5 * normal(6, seed=seed + 1), 0)
    best = soft_maximum(values, alpha, p)
    assert abs(slope(values, best, alpha, 6 * p)) < 1e-13 / alpha
    assert slope(values, best - 0.1, alpha, 6 * p) < 0 < slope(values, best + 0.1, alpha, 6 * p)


@pytest.mark.rung(6, "offline.eql")
@pytest.mark.theory
def test_eql_1_controls() -> None:
    values, p = f64(-1, 0, 2), torch.full((3,), 1 / 3, dtype=torch.float64)
    for alpha, other in ((2.0, 0.2), (0.2, 2.0)):  # V's alpha swapped with the weights' alpha / 10
        assert abs(slope(values, soft_maximum(values, alpha, p), alpha)) < 1e-13
        assert abs(slope(values, soft_maximum(values, other, p), alpha)) > 1e-2
    # An action rarer than e^-5 is clipped: the closed form no longer holds, and the minimiser is lower.
    rare = f64(0.999, 0.0005, 0.0005)
    assert slope(values, soft_maximum(values, 0.1, rare), 0.1, 3 * rare) > 1e-4


@pytest.mark.theory
def test_unscaled_weight_solves_the_regularised_problem() -> None:
    # max_pi E_pi Q - alpha KL(pi || mu) is attained by pi = mu e^{(Q - V) / alpha}, and its value is V itself.
    values, mu, alpha = normal(5, seed=8), torch.softmax(normal(5, seed=9), 0), 0.7

    def objective(pi: Tensor) -> Tensor:
        return (pi * values).sum(-1) - alpha * (pi * (pi / mu).log()).sum(-1)

    value = soft_maximum(values, alpha, mu)
    theory = mu * EQL(alpha=alpha, weight_scale=1.0).policy_weight(values - value)
    assert float(theory.sum()) == pytest.approx(1, abs=1e-12)
    assert float(objective(theory)) == pytest.approx(value, abs=1e-12)
    assert (objective(torch.softmax(3 * normal(2000, 5, seed=10), -1)) <= value).all()
    # Control: the code's factor 10 gives another policy, and a worse one here.
    released = mu * EQL(alpha=alpha).policy_weight(values - value)
    assert objective(released / released.sum()) < value - 1e-2


# --------------------------------------------------------------------------------------- plain implementation


class PlainEQL(PlainInSample):
    def __init__(self, agent: EQL, data, seed: int, wrong: str = "") -> None:
        super().__init__(agent, data, seed, self.exponential, self.weights, self.square, wrong)

    def exponential(self, q: Tensor, v: Tensor) -> Tensor:
        z = torch.clamp((q - v) / self.config.alpha, max=5.0)
        m = torch.clamp(z.max(), min=-1.0)
        if self.wrong == "no scale":
            m = torch.zeros(())
        elif self.wrong != "scale attached":
            m = torch.tensor(m.item(), dtype=torch.float64)
        linear = -z if self.wrong == "linear term clipped" else v / self.config.alpha
        return (torch.exp(z - m) + torch.exp(-m) * linear).mean()

    def weights(self, u: Tensor) -> Tensor:
        scale = 1.0 if self.wrong == "no factor" else self.config.weight_scale
        return torch.clamp(torch.exp(scale * u / self.config.alpha), 0.0, 100.0)

    def square(self, error: Tensor) -> Tensor:
        return error**2


def eql_difference(dataset, wrong: str = "", **options: object) -> float:
    return difference(EQL, dataset, lambda *args: PlainEQL(*args, wrong), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.1},  # clipped exponents, capped weights
        {"alpha": 0.5, "weight_scale": 1.0, "value_dropout": 0.25},
        {"value_layer_norm": False, "init": "torch"},
    ],
)
def test_eql_equals_the_plain_implementation(random_dataset, options) -> None:
    assert eql_difference(random_dataset(low=LOW, high=HIGH), **options) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        "no scale",
        "scale attached",
        "linear term clipped",
        "no factor",
        "old V in the weights",
        "old V in the targets",
        "online critics",
    ],
)
def test_eql_controls(random_dataset, wrong) -> None:
    assert eql_difference(random_dataset(low=LOW, high=HIGH), wrong, alpha=0.1) > 1e-7


def test_the_code_s_presets_are_those_of_its_scripts() -> None:
    # Read off ryanxhr/IVR, run_*.sh and configs: alpha, the three learning rates, actor dropout.
    configs = {name: EQL(preset=name).config for name in EQL.presets}
    assert {name: (c.alpha, c.actor_lr, c.critic_lr, c.value_lr, c.dropout) for name, c in configs.items()} == {
        "locomotion": (2.0, 3e-4, 3e-4, 3e-4, 0),
        "antmaze": (0.5, 2e-4, 2e-4, 2e-4, 0),
        "antmaze-umaze-diverse": (5.0, 2e-4, 2e-4, 2e-4, 0),
        "kitchen": (2.0, 3e-4, 3e-4, 3e-4, 0.1),
    }
    assert all(c.value_layer_norm and c.weight_scale == 10 for c in configs.values())
