"""Policy objectives: worked numbers, autograd against every gradient coefficient, limits, optima, extremes, errors."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from corollary.core.actor_critic import sac_policy_loss
from corollary.core.distributions import DiagonalGaussian, kl
from corollary.online.objectives import (
    SURROGATES,
    adaptive_kl_coefficient,
    bpo_loss,
    bpo_median_loss,
    bpo_target_ratio,
    clipped_value_loss,
    dpo_loss,
    explained_variance,
    fixpo_multiplier_loss,
    group_advantage,
    ipo_loss,
    kl_estimate,
    kl_penalised_loss,
    mdpo_off_policy_loss,
    optimal_value_loss,
    policy_gradient_coefficient,
    policy_gradient_loss,
    ppo_clip_coefficient,
    ppo_clip_loss,
    probability_ratio,
    props_coefficient,
    props_loss,
    ratio_diagnostics,
    reward_difference_loss,
    soft_value,
    spo_coefficient,
    spo_loss,
    tsallis_log,
    value_loss,
)


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.sum(), inputs)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------- worked numbers
# Reference card online.md, section 1.8: five ratios, five advantages, widths 0.2 (PPO, SPO) and 0.3 (PROPS, BPO).
# For example SPO's last sample: 2 * 0.5^2 / 0.4 + 1.5 * 2 = 4.25, its slope 2 * 0.5 / 0.2 + 2 = 7.

RATIO = f64(0.5, 0.9, 1, 1.1, 1.5)
ADVANTAGE = f64(1, -1, 2, 1, -2)
OLD = f64(-3, 0.5, -1, 2, -0.2)  # any old log-probabilities
NEW = OLD + RATIO.log()


def test_ppo_worked_numbers() -> None:
    close(ppo_clip_loss(NEW, OLD, ADVANTAGE), f64(-0.5, 0.9, -2, -1.1, 3))
    # At the first sample r is outside the interval but on the wrong side: the minimum keeps its gradient.
    close(ppo_clip_coefficient(NEW, OLD, ADVANTAGE), RATIO * f64(-1, 1, -2, -1, 2))


def test_spo_worked_numbers() -> None:
    close(spo_loss(NEW, OLD, ADVANTAGE), f64(0.125, 0.925, -2, -1.075, 4.25))
    close(spo_coefficient(NEW, OLD, ADVANTAGE), RATIO * f64(-3.5, 0.5, -2, -0.5, 7))


def test_props_worked_numbers() -> None:
    close(props_loss(NEW, OLD), f64(0.7, 0.9, 1, 1.1, 1.5))
    close(props_coefficient(NEW, OLD), RATIO * f64(0, 1, 1, 1, 1))


@pytest.mark.parametrize(
    ("temperature", "target", "mean"),
    [(1.0, f64(1.07348, 0.80946, 1.19054, 1.07348, 0.74551), 0.516121), (0.0, f64(1.3, 0.7, 1.3, 1.3, 0.7), 0.68)],
)
def test_bpo_worked_numbers(temperature, target, mean) -> None:
    actual = bpo_target_ratio(ADVANTAGE, torch.full_like(ADVANTAGE, 0.5), epsilon=0.3, temperature=temperature)
    close(actual, target, 5e-6)  # the card's five decimals
    assert bpo_loss(NEW, OLD, ADVANTAGE, actual).mean().item() == pytest.approx(mean, abs=1e-6)


def test_unclipped_surrogate_by_hand() -> None:
    close(policy_gradient_loss(NEW, OLD, ADVANTAGE), f64(-0.5, 0.9, -2, -1.1, 3))
    close(probability_ratio(NEW, OLD), RATIO)


@pytest.mark.parametrize(("estimator", "mean"), [("k1", 0.0595465), ("k2", 0.0665040), ("k3", 0.0595465)])
def test_kl_estimates_of_the_worked_ratios(estimator, mean) -> None:
    """Reference card online.md 1.3; k1 and k3 agree only because these ratios average to 1."""
    assert kl_estimate(OLD, NEW, estimator).mean().item() == pytest.approx(mean, abs=5e-8)


@pytest.mark.parametrize(
    ("index", "expected"), [(1.0, 0.693147), (1.2, 0.743492), (1.4, 0.798770), (2.0, 1.0), (1 + 1e-9, math.log(2))]
)
def test_tsallis_logarithm_of_two(index, expected) -> None:
    assert tsallis_log(f64(math.log(2)), index).item() == pytest.approx(expected, abs=5e-7)


def test_value_losses_by_hand() -> None:
    value, old, target = f64(1, 2, 3), f64(0.5, 2.5, 3), f64(2, 1, 3.5)
    # Clipped values 0.7, 2.3, 3: halves of max(1, 1.69), max(1, 1.69), 0.25; the mean is the card's 0.605.
    close(clipped_value_loss(value, old, target), f64(0.845, 0.845, 0.125))
    close(value_loss(value, target), f64(0.5, 0.5, 0.125))
    close(clipped_value_loss(value, old, target, clip=math.inf), value_loss(value, target))


@pytest.mark.parametrize("loss", [value_loss, clipped_value_loss, bpo_median_loss])
def test_targets_are_constants(loss) -> None:
    tensors = [normal(5, seed=i).requires_grad_() for i in range(3 if loss is clipped_value_loss else 2)]
    of_value, *others = torch.autograd.grad(loss(*tensors).sum(), tensors, allow_unused=True)
    assert (of_value != 0).any()
    assert others == [None] * len(others)


def test_diagnostics_of_the_worked_ratios() -> None:
    found = ratio_diagnostics(NEW.clone().requires_grad_(), OLD, clip=0.2)
    assert not any(tensor.requires_grad for tensor in found.values())
    close(found["kl_k1"], kl_estimate(OLD, NEW, "k1"))
    close(found["kl_k3"], kl_estimate(OLD, NEW, "k3"))
    close(found["ratio_deviation"], f64(0.5, 0.1, 0, 0.1, 0.5))
    close(found["clip_fraction"], f64(1, 0, 0, 0, 1))
    close(ratio_diagnostics(NEW, OLD, clip=(0.05, 0.6))["clip_fraction"], f64(1, 1, 0, 0, 0))


def test_explained_variance_by_hand() -> None:
    # Var(1, 2, 4) = 14/9; the residuals 0, 0, 1 have variance 2/9; a constant error changes nothing.
    target, value = f64(1, 2, 4), f64(1, 2, 3)
    values = torch.stack([value, value + 10, target, torch.full_like(target, 5)])
    close(explained_variance(values, target.expand(4, -1)), f64(6 / 7, 6 / 7, 1, 0))
    more, weight = torch.cat([values, values + 9], 1), torch.cat([torch.ones_like(values), torch.zeros_like(values)], 1)
    close(explained_variance(more, target.repeat(4, 2), weight), f64(6 / 7, 6 / 7, 1, 0))  # of those with weight


def test_adaptive_penalty_by_hand() -> None:
    # Target 0.03: halved below 0.02, doubled above 0.045, each seed for itself.
    found = adaptive_kl_coefficient(f64(1, 1, 3, 3), f64(0.019, 0.021, 0.044, 0.046), 0.03)
    close(found, f64(0.5, 1, 3, 6))


def test_fixpo_multiplier_rises_exactly_where_the_margin_is_exceeded() -> None:
    multiplier, max_kl = f64(1, 2, 3).requires_grad_(), f64(0, 0.5 / 3, 0.5).requires_grad_()
    loss = fixpo_multiplier_loss(multiplier, max_kl, bound=0.5, margin=3.0)
    slope, of_kl = torch.autograd.grad(loss.sum(), (multiplier, max_kl), allow_unused=True)
    close(slope, f64(0.5, 0, -1))  # descent: falls, stays, rises
    assert of_kl is None


# -------------------------------------------------------------------------------- one autograd test for all of them

CASES = [
    ("policy_gradient", {}),
    ("ppo_clip", {}),
    ("ppo_clip", {"clip": (0.1, 0.28)}),
    ("ppo_clip", {"dual_clip": 1.7}),
    ("ppo_clip", {"clip": (1.5, math.inf)}),
    ("spo", {}),
    ("spo", {"epsilon": 0.5}),
    ("bpo", {}),
    ("props", {}),
    ("props", {"clip": 0.1}),
    ("kl_k1", {}),
    ("kl_k2", {}),
    ("kl_k3", {}),
]


def arguments(name: str, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Random arguments of a surrogate: log-probabilities, then advantages and, for BPO, targets in [0.7, 1.3]."""
    count = 2 if name == "props" or name.startswith("kl") else 3
    drawn = [normal(*shape, seed=seed + i) for i in range(count)]
    return [*drawn, 0.7 + 0.6 * torch.sigmoid(normal(*shape, seed=seed + 3))] if name == "bpo" else drawn


def test_every_surrogate_is_a_case() -> None:
    assert {name for name, _ in CASES} == set(SURROGATES)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_autograd_equals_the_gradient_coefficient(name, options) -> None:
    surrogate = SURROGATES[name]
    log_prob, *rest = arguments(name, (4, 200))
    log_prob[0] += 25  # beyond the cap of the log-ratio as well
    log_prob.requires_grad_()
    (found,) = gradient(surrogate.loss(log_prob, *rest, **options), log_prob)
    coefficient = surrogate.coefficient(log_prob, *rest, **options)
    close(found, coefficient)
    assert not coefficient.requires_grad
    assert not torch.allclose(found, -coefficient)  # control: the other sign


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if not case[0].startswith("kl")])
def test_everything_but_the_new_log_probability_is_constant(name, options) -> None:
    tensors = [tensor.requires_grad_() for tensor in arguments(name, (7,))]
    loss = SURROGATES[name].loss(*tensors, **options).sum()
    first, *others = torch.autograd.grad(loss, tensors, allow_unused=True)
    assert first is not None
    assert others == [None] * len(others)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_differentiate_in_both_arguments(estimator) -> None:
    log_p, log_q = normal(9).requires_grad_(), normal(9, seed=1).requires_grad_()
    of_p, of_q = gradient(kl_estimate(log_p, log_q, estimator), log_p, log_q)
    close(of_p, -of_q)


@given(st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99), st.sampled_from(CASES))
def test_any_shape_element_by_element(shape, seed, case) -> None:
    name, options = case
    tensors = arguments(name, tuple(shape), seed)
    for function in (SURROGATES[name].loss, SURROGATES[name].coefficient):
        whole = function(*tensors, **options)
        assert whole.shape == tuple(shape)
        for index in np.ndindex(*shape):
            close(whole[index], function(*(tensor[index] for tensor in tensors), **options))


# ------------------------------------------------------------------------------------------------------ ratio rules


@pytest.mark.parametrize("name", ["policy_gradient", "ppo_clip", "spo"])
def test_on_policy_every_surrogate_has_the_policy_gradient(name) -> None:
    log_prob, advantage = normal(9), normal(9, seed=1)
    close(SURROGATES[name].coefficient(log_prob, log_prob, advantage), -advantage)
    leaf = log_prob.clone().requires_grad_()
    close(gradient(SURROGATES[name].loss(leaf, log_prob, advantage), leaf)[0], -advantage)


@given(st.integers(0, 999), st.floats(0.0, 0.9), st.floats(0.0, 0.9), st.floats(0.01, 5) | st.none())
def test_ppo_is_the_published_formula(seed, low, high, excess) -> None:
    new, old, advantage = arguments("ppo_clip", (64,), seed)
    dual_clip = None if excess is None else 1 + high + excess
    ratio = (new - old).exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    if dual_clip is not None:
        objective = torch.where(advantage < 0, torch.maximum(objective, dual_clip * advantage), objective)
    close(ppo_clip_loss(new, old, advantage, clip=(low, high), dual_clip=dual_clip), -objective)


def test_ppo_gradient_is_exactly_zero_where_the_ratio_has_moved_far_enough() -> None:
    ratio, advantage = f64(1.3, 0.5, 4, 1.3, 0.5, 4), f64(1, -1, -1, -1, 1, 1)
    log_ratio, old = ratio.log().requires_grad_(), torch.zeros(6, dtype=torch.float64)
    (plain,) = gradient(ppo_clip_loss(log_ratio, old, advantage), log_ratio)
    close(plain, f64(0, 0, 4, 1.3, -0.5, 0))
    (dual,) = gradient(ppo_clip_loss(log_ratio, old, advantage, dual_clip=3.0), log_ratio)
    close(dual, f64(0, 0, 0, 1.3, -0.5, 0))
    assert plain[[0, 1, 5]].tolist() == dual[[0, 1, 5]].tolist() == [0, 0, 0]
    assert dual[2] == 0
    assert ppo_clip_loss(log_ratio, old, advantage, dual_clip=3.0)[2].item() == pytest.approx(3)


def test_limits_of_the_interval() -> None:
    new, old, advantage = arguments("ppo_clip", (200,))
    unclipped = policy_gradient_loss(new, old, advantage)
    close(ppo_clip_loss(new, old, advantage, clip=math.inf), unclipped)
    close(spo_loss(new, old, advantage, epsilon=math.inf), unclipped)
    close(props_loss(new, old, clip=1.0), probability_ratio(new, old))
    # Width 0: only samples that have moved against their advantage keep a gradient, the unclipped one.
    wrong_way = (new - old) * advantage < 0
    coefficient = policy_gradient_coefficient(new, old, advantage)
    close(ppo_clip_coefficient(new, old, advantage, clip=0.0), torch.where(wrong_way, coefficient, 0.0))
    assert 0 < wrong_way.sum() < 200
    # SPO with a vanishing interval is dominated by the pull to r = 1: epsilon L -> |A| (r - 1)^2 / 2.
    limit = 0.5 * advantage.abs() * (probability_ratio(new, old) - 1).square()
    close(1e-9 * spo_loss(new, old, advantage, epsilon=1e-9), limit, 1e-7)


@given(st.floats(0.01, 0.9), st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3))
def test_spo_is_least_on_the_boundary(epsilon, advantage) -> None:
    def loss(ratio: float) -> float:
        return spo_loss(f64(math.log(ratio)), f64(0), f64(advantage), epsilon=epsilon).item()

    best = minimize_scalar(loss, bounds=(1e-3, 3), method="bounded", options={"xatol": 1e-9}).x
    assert best == pytest.approx(1 + math.copysign(epsilon, advantage), abs=1e-6)


def test_spo_is_a_squared_distance_up_to_a_constant() -> None:
    new, old, advantage = arguments("spo", (50,))
    distance = (probability_ratio(new, old) - 1 - 0.2 * advantage.sign()).square() * advantage.abs() / 0.4
    constant = spo_loss(new, old, advantage, epsilon=0.2) - distance
    close(constant, -advantage - 0.1 * advantage.abs(), 1e-10)  # from expanding the square by hand


def test_props_is_ppo_with_advantage_minus_one() -> None:
    new, old, _ = arguments("ppo_clip", (100,))
    close(props_loss(new, old, clip=0.3), ppo_clip_loss(new, old, -torch.ones_like(new), clip=0.3))


# -------------------------------------------------------------------------------------------------------------- BPO


def bandit(seed: int, n_actions: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A random old policy and skewed action values."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(n_actions)), rng.exponential(2.0, n_actions)


def soft_median(policy: np.ndarray, q: np.ndarray, temperature: float) -> float:
    """Solve E sigma((q - u) / T) = 1/2 by bisection, with a sigmoid of its own."""
    return brentq(lambda u: policy @ (1 + np.tanh((q - u) / (2 * temperature))) / 2 - 0.5, q.min(), q.max(), xtol=1e-14)


@given(st.integers(0, 9999), st.floats(0.05, 0.9), st.floats(0.05, 5))
def test_bpo_target_averages_to_one_at_the_soft_median(seed, epsilon, temperature) -> None:
    policy, q = bandit(seed)

    def mean_target(u: float) -> float:
        values = torch.from_numpy(q)
        target = bpo_target_ratio(values, torch.full_like(values, u), epsilon=epsilon, temperature=temperature)
        return float(torch.from_numpy(policy) @ target)

    median = soft_median(policy, q, temperature)
    assert mean_target(median) == pytest.approx(1, abs=1e-10)
    assert abs(mean_target(q.max() + temperature) - 1) > 0.01  # control: an offset that is no median


def test_bpo_target_with_the_mean_for_the_median_breaks_the_constraint() -> None:
    policy, q = np.array([0.5, 0.4, 0.1]), np.array([0.0, 1.0, 20.0])
    values = torch.from_numpy(q)
    target = bpo_target_ratio(values, torch.full_like(values, policy @ q), epsilon=0.3, temperature=0.1)
    assert float(torch.from_numpy(policy) @ target) < 0.8


@given(st.integers(0, 9999), st.floats(0.1, 3))
def test_bpo_target_maximises_the_regularised_problem(seed, temperature) -> None:
    # Given u as the multiplier of E r = 1, each ratio maximises r (q - u) + 2 epsilon T H(y), r = 1 - epsilon + 2
    # epsilon y: the problem from which the target is derived, solved by a numerical optimiser.
    policy, q = bandit(seed)
    u, epsilon = soft_median(policy, q, temperature), 0.3

    def negative(y: float, gap: float) -> float:
        entropy = -y * math.log(y) - (1 - y) * math.log1p(-y)
        return -2 * epsilon * (y * gap + temperature * entropy)

    best = [
        minimize_scalar(negative, bounds=(1e-12, 1 - 1e-12), args=(x - u,), method="bounded", options={"xatol": 1e-10})
        for x in q
    ]
    values = torch.from_numpy(q)
    target = bpo_target_ratio(values, torch.full_like(values, u), epsilon=epsilon, temperature=temperature)
    close(target, f64(*(1 - epsilon + 2 * epsilon * b.x for b in best)), 1e-5)


def median_slope(policy: np.ndarray, q: np.ndarray, at: float, temperature: float) -> float:
    u = torch.full((len(q),), at, dtype=torch.float64, requires_grad=True)
    loss = bpo_median_loss(u, torch.from_numpy(q), temperature=temperature)
    return float(torch.from_numpy(policy) @ gradient(loss, u)[0])


@given(st.integers(0, 9999), st.floats(0.05, 3))
def test_bpo_median_loss_is_least_at_the_soft_median(seed, temperature) -> None:
    policy, q = bandit(seed)
    assert abs(median_slope(policy, q, soft_median(policy, q, temperature), temperature)) < 1e-11
    assert median_slope(policy, q, q.min() - 0.1, temperature) < 0 < median_slope(policy, q, q.max() + 0.1, temperature)


def test_bpo_median_of_another_temperature_breaks_the_constraint() -> None:
    # The released code trains u at temperature 1 whatever the target's. Values 0 (weight 0.6) and 10 (0.4).
    policy, q = np.array([0.6, 0.4]), np.array([0.0, 10.0])
    u = soft_median(policy, q, 1.0)
    assert abs(median_slope(policy, q, u, 1.0)) < 1e-11
    target = bpo_target_ratio(torch.from_numpy(q), f64(u, u), epsilon=0.3, temperature=4.0)
    assert abs(float(torch.from_numpy(policy) @ target) - 1) > 0.01


def test_bpo_median_loss_by_hand_and_its_limit() -> None:
    # softplus(x) - x / 2 = log(2 cosh(x / 2)), which is |x| / 2 far away.
    q, u = f64(-3, 0, 1, 4), torch.ones(4, dtype=torch.float64)
    close(bpo_median_loss(u, q), (2 * ((q - u) / 2).cosh()).log())
    close(bpo_median_loss(u, q, temperature=1e-9), f64(2, 0.5, 0, 1.5), 1e-8)
    close(bpo_median_loss(f64(0, 0), f64(-1e4, 1e4)), f64(5e3, 5e3))


def test_bpo_target_limits() -> None:
    q, u = f64(-1, 0, 1e-12, 2), torch.zeros(4, dtype=torch.float64)
    close(bpo_target_ratio(q, u, epsilon=0.3, temperature=0.0), f64(0.7, 1, 1.3, 1.3))
    close(bpo_target_ratio(q, u, epsilon=(0.1, 0.5), temperature=0.0), f64(0.9, 1.2, 1.5, 1.5))
    close(bpo_target_ratio(q, u, epsilon=0.3, temperature=math.inf), torch.ones_like(q))
    assert torch.equal(bpo_target_ratio(q.float(), u.float(), temperature=0.0), f64(0.7, 1, 1.3, 1.3).float())
    assert not bpo_target_ratio(q.requires_grad_(), u.requires_grad_()).requires_grad


# ------------------------------------------------------------------------------------------ divergences and penalties


def categorical(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of one random policy as a leaf, and the log-probabilities of another."""
    return normal(5, seed=seed).requires_grad_(), torch.log_softmax(normal(5, seed=seed + 1), -1)


def test_kl_estimates_average_to_the_divergence() -> None:
    # Exact expectations over five actions. Control: k2 is biased, and the other order is another number.
    logits, log_q = categorical(0)
    log_p = torch.log_softmax(logits, -1).detach()
    exact = (log_p.exp() * (log_p - log_q)).sum()
    mean = {k: (log_p.exp() * kl_estimate(log_p, log_q, k)).sum() for k in ("k1", "k2", "k3")}
    close(mean["k1"], exact)
    close(mean["k3"], exact)
    assert (kl_estimate(log_p, log_q, "k3") >= 0).all()
    assert abs(mean["k2"] - exact) > 0.01
    assert abs((log_q.exp() * kl_estimate(log_q, log_p, "k1")).sum() - exact) > 0.01


def test_gradients_of_kl_estimates_as_losses() -> None:
    # With samples of p held fixed: k1 has mean gradient 0, k2 that of KL(p || q), k3 that of KL(q || p).
    logits, log_q = categorical(2)

    def mean_gradient(estimator: str) -> Tensor:
        log_p = torch.log_softmax(logits, -1)
        return gradient(log_p.detach().exp() * kl_estimate(log_p, log_q, estimator), logits)[0]

    log_p = torch.log_softmax(logits, -1)
    (reverse,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), logits)
    close(mean_gradient("k1"), torch.zeros_like(reverse))
    close(mean_gradient("k2"), reverse)
    close(mean_gradient("k3"), forward)
    assert (reverse - forward).abs().max() > 0.01


def test_k3_keeps_its_digits_in_float32() -> None:
    x = torch.full((1,), 1e-4)
    truth = x.double().expm1() - x.double()
    assert abs(kl_estimate(torch.zeros(1), x) / truth - 1) < 0.01
    assert abs(ratio_diagnostics(x, torch.zeros(1))["kl_k3"] / truth - 1) < 0.01
    assert abs((x.exp() - 1 - x) / truth - 1) > 1  # control: the formula as written


def test_first_step_of_a_penalised_loss_is_the_policy_gradient() -> None:
    """Reference card online.md 4.7: at the old policy the divergence has no gradient, in either direction."""
    mean, log_std = normal(3, 2, seed=4), normal(2, seed=5)
    action, advantage = normal(3, 2, seed=6), normal(3, seed=7)
    old = DiagonalGaussian(mean, log_std)

    def step(weight: float, shift: float, direction: Callable[..., Tensor]) -> Tensor:
        leaf = (mean + shift).requires_grad_()
        new = DiagonalGaussian(leaf, log_std)
        log_probs = new.log_prob(action), old.log_prob(action)
        return gradient(kl_penalised_loss(*log_probs, advantage, direction(new, old), weight), leaf)[0]

    for direction in (kl, lambda new, old: kl(old, new)):
        close(step(100.0, 0.0, direction), step(0.0, 0.0, direction))
        assert (step(100.0, 0.1, direction) - step(0.0, 0.1, direction)).abs().max() > 1  # control: one step on


@given(st.integers(0, 999), st.floats(0.1, 2))
def test_mdpo_inner_optimum(seed, step_size) -> None:
    # All actions weighted by the old policy: stationary exactly at pi_old exp(t A) / Z. Control: KL(old || new).
    _, log_old = categorical(seed)
    advantage = normal(5, seed=seed + 2)
    logits = (log_old + step_size * advantage).requires_grad_()
    log_new = torch.log_softmax(logits, -1)

    def slope(divergence: Tensor) -> Tensor:
        loss = kl_penalised_loss(log_new, log_old, advantage, divergence.expand(5), 1 / step_size)
        return torch.autograd.grad((log_old.exp() * loss).sum(), logits, retain_graph=True)[0].abs().max()

    assert slope((log_new.exp() * (log_new - log_old)).sum()) < 1e-12
    assert slope((log_old.exp() * (log_old - log_new)).sum()) > 1e-6


def test_penalty_weight_is_a_constant_per_seed() -> None:
    new, old, advantage = (normal(2, 3, seed=i) for i in range(3))
    divergence, weight = normal(2, 3, seed=3).square(), f64(0.5, 4).requires_grad_()
    loss = kl_penalised_loss(new, old, advantage, divergence, weight.unsqueeze(-1))
    close(loss - policy_gradient_loss(new, old, advantage), divergence * f64(0.5, 4).unsqueeze(-1))
    assert not loss.requires_grad
    with pytest.raises(ValueError, match=r"shape \[2\].*same number of axes"):
        kl_penalised_loss(new, old, advantage, divergence, weight)


# ---------------------------------------------------------------------------------------------------------- off-policy


def test_off_policy_mdpo_by_hand_and_its_gradients() -> None:
    # 2 * 0.5 + 1.5 * (0.2 - 2) * (-1) - 3 = 0.7.
    tensors = [f64(x).requires_grad_() for x in (0.5, -1, 3)]
    loss = mdpo_off_policy_loss(*tensors, kl_coefficient=2.0, entropy_coefficient=0.2, index=1.5)
    assert loss.item() == pytest.approx(0.7)
    assert [g.item() for g in gradient(loss, *tensors)] == pytest.approx([2, -2.7, -1])


def test_off_policy_mdpo_with_equal_coefficients_is_sac() -> None:
    new, old, q = (normal(4, seed=i) for i in range(3))
    alike = mdpo_off_policy_loss(new, old, q, kl_coefficient=0.2, entropy_coefficient=0.2)
    close(alike, sac_policy_loss(new, q, 0.2))
    close(alike, 0.2 * new - q)
    other = mdpo_off_policy_loss(new, old, q, kl_coefficient=1.0, entropy_coefficient=0.2)
    assert (other - alike).abs().max() > 0.1  # control


@given(st.integers(0, 999), st.floats(0.3, 3), st.floats(0, 1))
def test_off_policy_mdpo_optimum(seed, kl_coefficient, entropy_coefficient) -> None:
    # E_pi of the loss is stationary at pi_old^(1 - t lambda) exp(t Q) / Z with t = 1 / c, and not at half that step.
    _, log_old = categorical(seed)
    q = normal(5, seed=seed + 2)

    def slope(step_size: float) -> Tensor:
        logits = ((1 - step_size * entropy_coefficient) * log_old + step_size * q).requires_grad_()
        log_new = torch.log_softmax(logits, -1)
        coefficients = {"kl_coefficient": kl_coefficient, "entropy_coefficient": entropy_coefficient}
        return (
            gradient(log_new.exp() * mdpo_off_policy_loss(log_new, log_old, q, **coefficients), logits)[0].abs().max()
        )

    assert slope(1 / kl_coefficient) < 1e-12
    assert slope(0.5 / kl_coefficient) > 1e-6


def test_sac_by_hand_with_a_learnt_coefficient() -> None:
    log_prob, q, alpha = f64(-1).requires_grad_(), f64(2).requires_grad_(), f64(0.5).requires_grad_()
    loss = sac_policy_loss(log_prob, q, alpha)
    assert loss.item() == -2.5
    of_log_prob, of_q, of_alpha = torch.autograd.grad(loss, (log_prob, q, alpha), allow_unused=True)
    assert (of_log_prob.item(), of_q.item(), of_alpha) == (0.5, -1, None)


def test_tsallis_logarithm_derivative_and_extremes() -> None:
    # d log_q(x) / d log x = x^(q-1): 0 for vanishing densities, where log itself keeps slope 1.
    log_density = f64(-1e4, -1, 0, 2).requires_grad_()
    for index in (1.0, 1.3, 2.0):
        close(gradient(tsallis_log(log_density, index), log_density)[0], ((index - 1) * log_density.detach()).exp())
    assert tsallis_log(torch.tensor([-1e4]), 2.0).item() == -1


# --------------------------------------------------------------------------------------------------- extremes, errors


@pytest.mark.parametrize(("name", "options"), CASES)
def test_float32_stays_finite_at_any_ratio(name, options) -> None:
    log_ratio = torch.tensor([-1e4, -100, -20.5, -19.5, 0, 19.5, 20.5, 89, 1e4]).repeat(3, 1)
    advantage = torch.tensor([[3.0], [0.0], [-3.0]]).expand_as(log_ratio)
    log_prob, old = (log_ratio - 7).requires_grad_(), torch.full_like(log_ratio, -7)
    extra = {2: [], 3: [advantage], 4: [advantage, torch.ones_like(advantage)]}[len(arguments(name, ()))]
    loss = SURROGATES[name].loss(log_prob, old, *extra, **options)
    assert loss.isfinite().all()
    assert gradient(loss, log_prob)[0].isfinite().all()
    assert SURROGATES[name].coefficient(log_prob, old, *extra, **options).isfinite().all()


def test_textbook_ppo_does_not_stay_finite() -> None:
    """The control of the test above: the gradient should be 0 and is 0 * inf."""
    log_ratio = torch.tensor([100.0], requires_grad=True)
    ratio = log_ratio.exp()
    assert gradient(-torch.minimum(ratio, ratio.clamp(0.8, 1.2)), log_ratio)[0].isnan()


def test_the_cap_leaves_smaller_ratios_alone() -> None:
    log_prob = torch.tensor([19.9, 20.1], requires_grad=True)
    loss = policy_gradient_loss(log_prob, torch.zeros(2), -torch.ones(2))
    torch.testing.assert_close(loss, torch.tensor([math.exp(19.9), math.exp(20)]))
    torch.testing.assert_close(gradient(loss, log_prob)[0], torch.tensor([math.exp(19.9), 0]))


# ----------------------------------------------------------------------------------------------- responses as a whole
# Log-ratios log 2 and log(1/2), so a margin of log 4; beta = 1/2 makes it log 2.

H, OTHER = f64(2.0).log(), f64(0.5).log()


def test_preference_losses_by_hand() -> None:
    # -log sigma(log 2) = log(3/2), and in the other order log 3; (log 4 - 1)^2 for 1 / (2 beta) = 1.
    close(dpo_loss(H, OTHER, beta=0.5), f64(1.5).log())
    close(dpo_loss(OTHER, H, beta=0.5), f64(3.0).log())
    close(ipo_loss(H, OTHER, beta=0.5), (f64(4.0).log() - 1).square())


def test_regressions_by_hand_and_where_they_vanish() -> None:
    # (log 2 - (1 - 0.25))^2 and (log(2) / 2 - (1 - 0.25))^2.
    close(reward_difference_loss(H, OTHER, f64(1), f64(0.25), beta=0.5), (f64(2.0).log() - 0.75).square())
    close(optimal_value_loss(H, f64(1), f64(0.25), beta=0.5), (f64(2.0).log() / 2 - 0.75).square())
    # Of ratios exp(R / beta) / Z both are 0.
    reward = normal(5)
    value = soft_value(reward, beta=0.7)
    ratio = (reward - value) / 0.7
    close(optimal_value_loss(ratio, reward, value.expand_as(reward), beta=0.7), torch.zeros_like(reward))
    flipped = (ratio.flip(0), reward, reward.flip(0))
    close(reward_difference_loss(ratio, *flipped, beta=0.7), torch.zeros_like(reward))


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_preference_losses_differentiate_in_both_ratios(loss) -> None:
    h, other = H.clone().requires_grad_(), OTHER.clone().requires_grad_()
    slopes = gradient(loss(h, other, beta=0.5), h, other)
    # -beta sigma(-beta margin) = -1/6, and 2 (log 4 - 1).
    close(slopes[0], f64(-1 / 6) if loss is dpo_loss else 2 * (f64(4.0).log() - 1))
    close(slopes[1], -slopes[0])


def test_rewards_and_values_are_constants_of_the_regressions() -> None:
    h, other, reward, value = (normal(3, seed=i).requires_grad_() for i in range(4))
    pairwise = reward_difference_loss(h, other, reward, value, beta=0.5).sum()
    single = optimal_value_loss(h, reward, value, beta=0.5).sum()
    assert torch.autograd.grad(pairwise, [reward, value], allow_unused=True) == (None, None)
    assert torch.autograd.grad(single, [reward, value], allow_unused=True) == (None, None)


def test_dpo_stays_finite_at_any_margin() -> None:
    h = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = dpo_loss(h, torch.zeros(2), beta=1.0)
    torch.testing.assert_close(loss, torch.tensor([1e4, 0.0]))
    torch.testing.assert_close(gradient(loss, h)[0], torch.tensor([-1.0, 0.0]))


def test_soft_value_by_hand_and_its_limits() -> None:
    # log((1 + 3) / 2) at beta = 1; the mean for large beta, the largest for small.
    close(soft_value(f64(0, math.log(3)), beta=1.0), f64(2.0).log().squeeze())
    reward = normal(4, 6)
    close(soft_value(reward, beta=1e6), reward.mean(-1), 1e-5)
    close(soft_value(reward, beta=1e-6), reward.amax(-1), 1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"baseline": "none"}, (0, 0, 1, 3)),
        ({}, (-1, -1, 0, 2)),
        ({"baseline": "leave_one_out"}, (-4 / 3, -4 / 3, 0, 8 / 3)),
        ({"scale": "population_std"}, (-((2 / 3) ** 0.5), -((2 / 3) ** 0.5), 0, 2 * (2 / 3) ** 0.5)),
        ({"scale": "sample_std", "epsilon": 0.5}, (-1 / (2**0.5 + 0.5), -1 / (2**0.5 + 0.5), 0, 2 / (2**0.5 + 0.5))),
        ({"baseline": "none", "scale": "sample_std"}, (0, 0, 0.5**0.5, 3 * 0.5**0.5)),
    ],
)
def test_group_advantages_by_hand(options, expected) -> None:
    # Mean 1, squared deviations 1, 1, 0, 4: variance 6/4, with G - 1 it is 2.
    close(group_advantage(f64(0, 0, 1, 3), **options), f64(*expected))


@pytest.mark.parametrize("scale", ["none", "sample_std", "population_std"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_a_group_of_equal_rewards_has_no_advantage(baseline, scale) -> None:
    # The mean of these is not 0.1 in float32, and what rounding leaves is not to be divided by its own size.
    groups = torch.stack([torch.full((7,), 0.1), torch.arange(7.0)])
    advantage = group_advantage(groups, baseline=baseline, scale=scale)
    assert advantage[0].tolist() == [0.0] * 7
    assert (advantage[1] != 0).sum() == 6


BATCH = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (probability_ratio, "log_prob old_log_prob"),
        (policy_gradient_loss, "log_prob old_log_prob advantage"),
        (ppo_clip_loss, "log_prob old_log_prob advantage"),
        (spo_loss, "log_prob old_log_prob advantage"),
        (bpo_loss, "log_prob old_log_prob advantage target_ratio"),
        (bpo_target_ratio, "q median"),
        (bpo_median_loss, "median q"),
        (props_loss, "log_prob old_log_prob"),
        (kl_estimate, "log_p log_q"),
        (lambda *tensors: kl_penalised_loss(*tensors, 1.0), "log_prob old_log_prob advantage divergence"),
        (lambda *tensors: adaptive_kl_coefficient(*tensors, 0.01), "coefficient divergence"),
        (lambda *tensors: fixpo_multiplier_loss(*tensors, bound=0.5), "multiplier max_kl"),
        (lambda *tensors: sac_policy_loss(*tensors, 0.2), "log_prob q"),
        (mdpo_off_policy_loss, "log_prob old_log_prob q"),
        (lambda *tensors: dpo_loss(*tensors, beta=0.1), "log_ratio other_log_ratio"),
        (lambda *tensors: ipo_loss(*tensors, beta=0.1), "log_ratio other_log_ratio"),
        (
            lambda *tensors: reward_difference_loss(*tensors, beta=0.1),
            "log_ratio other_log_ratio reward other_reward",
        ),
        (lambda *tensors: optimal_value_loss(*tensors, beta=0.1), "log_ratio reward value"),
        (value_loss, "value target"),
        (clipped_value_loss, "value old_value target"),
        (ratio_diagnostics, "log_prob old_log_prob"),
        (explained_variance, "value target"),
    ],
)
def test_shapes_must_agree_exactly(function, names) -> None:
    names = names.split()
    function(*[BATCH] * len(names))
    for i in range(1, len(names)):
        # A column would broadcast silently, and a number too.
        for wrong, message in ((BATCH[:, :1], f"{names[i]} has shape"), (1.0, f"{names[i]} is a float")):
            with pytest.raises(ValueError, match=message):
                function(*[wrong if j == i else BATCH for j in range(len(names))])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ppo_clip_loss(BATCH, BATCH, BATCH, clip=-0.1), "clip is -0.1"),
        (lambda: ppo_clip_loss(BATCH, BATCH, BATCH, clip=(0.2, math.nan)), "clip is"),
        (lambda: ppo_clip_loss(BATCH, BATCH, BATCH, clip=0.2, dual_clip=1.1), "dual_clip is 1.1; .* 1.2"),
        (lambda: spo_loss(BATCH, BATCH, BATCH, epsilon=0.0), "epsilon is 0.0"),
        (lambda: props_loss(BATCH, BATCH, clip=-1.0), "clip is -1.0"),
        (lambda: bpo_target_ratio(BATCH, BATCH, temperature=-1.0), "temperature is -1.0"),
        (lambda: bpo_target_ratio(BATCH, BATCH, epsilon=(-1, 1)), "epsilon is"),
        (lambda: bpo_median_loss(BATCH, BATCH, temperature=0.0), "temperature is 0.0"),
        (lambda: clipped_value_loss(BATCH, BATCH, BATCH, clip=0.0), "clip is 0.0"),
        (lambda: kl_estimate(BATCH, BATCH, "k4"), "estimator is 'k4'"),
        (lambda: dpo_loss(BATCH, BATCH, beta=0.0), "beta is 0.0"),
        (lambda: ipo_loss(BATCH, BATCH, beta=-1.0), "beta is -1.0"),
        (lambda: reward_difference_loss(BATCH, BATCH, BATCH, BATCH, beta=0.0), "beta is 0.0"),
        (lambda: optimal_value_loss(BATCH, BATCH, BATCH, beta=0.0), "beta is 0.0"),
        (lambda: soft_value(BATCH, beta=math.nan), "beta is nan"),
        (lambda: group_advantage(BATCH, baseline="median"), "baseline is 'median'"),
        (lambda: group_advantage(BATCH, scale="std"), "scale 'std'"),
        (lambda: group_advantage(BATCH, epsilon=-1.0), "epsilon is -1.0"),
        (lambda: group_advantage(BATCH[:, :1]), "1 response; .* at least 2"),
        (lambda: probability_ratio([0.0], BATCH), "log_prob is a list"),
    ],
)
def test_options_out_of_range(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
