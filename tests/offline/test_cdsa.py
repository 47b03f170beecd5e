"""CDSA: score matching against analytic scores (CDSA-1), what it rests on, the correction by hand, and its base."""

import math
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from corollary.core.agent import load_agent
from corollary.core.collect import collect
from corollary.core.dataset import Dataset, Transitions
from corollary.core.errors import CheckpointError, ConfigError, CorollaryError, EnvironmentMismatchError
from corollary.core.runs import group_runs, read_runs
from corollary.offline import BC, CDSA, TD3BC, CDSAConfig
from corollary.offline.cdsa import Score, correction, denoising_loss, inverse_loss
from corollary.online import PPO, SAC

from .plain import HIGH, LOW, SEEDS, SHARED, STEPS, average, largest_difference, plain_actor, plain_mlp, rows_seen

Array = NDArray[np.float64]
TINY: dict[str, Any] = {"hidden": (16, 16), "batch_size": 8}


def f64(values: Any) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64)


class Mixture:
    """A mixture of Gaussians with diagonal covariances and equal weights: its smoothed score in closed form."""

    def __init__(self, means: list[list[float]], variances: list[list[float]]) -> None:
        self.means, self.variances = f64(means), f64(variances)  # [K, d]

    def responsibilities(self, x: Tensor, sigma: float) -> Tensor:
        """Posterior probability ``[n, K]`` of each component under noise of size sigma."""
        v = self.variances + sigma**2
        return torch.softmax(-((x[:, None] - self.means) ** 2 / v + v.log()).sum(-1) / 2, -1)

    def log_density(self, x: Tensor, sigma: float) -> Tensor:
        v = self.variances + sigma**2
        return torch.logsumexp(-((x[:, None] - self.means) ** 2 / v + v.log()).sum(-1) / 2, -1)

    def score(self, x: Tensor, sigma: float) -> Tensor:
        """``sum_k r_k(x) (-(V_k + sigma^2)^-1 (x - m_k))``, ``[n, d]``."""
        pull = -(x[:, None] - self.means) / (self.variances + sigma**2)
        return (self.responsibilities(x, sigma)[..., None] * pull).sum(1)

    def posterior_mean(self, x: Tensor, sigma: float) -> Tensor:
        """E[data | data + sigma eps = x]: each component's linear regression, weighed by its responsibility."""
        gain = self.variances / (self.variances + sigma**2)
        return (self.responsibilities(x, sigma)[..., None] * (self.means + gain * (x[:, None] - self.means))).sum(1)

    def draw(self, n: int, sigma: float, seed: int) -> Tensor:
        rng = np.random.default_rng(seed)
        k = rng.integers(len(self.means), size=n)
        return self.means[k] + (self.variances[k] + sigma**2).sqrt() * f64(rng.normal(size=(n, self.means.shape[1])))


TWO = Mixture([[-1.0, -0.4], [1.0, 0.4]], [[0.16, 0.0225], [0.16, 0.0225]])


def one_step(states: Any, actions: Any, **options: Any) -> Dataset:
    ends = np.ones(len(states), dtype=bool)
    return Dataset.from_arrays(np.asarray(states), np.asarray(actions), np.zeros(len(ends)), ends, ~ends, **options)


# ------------------------------------------------------------------------------------------------ hand numbers


@pytest.mark.rung(1, "offline.cdsa")
def test_denoising_loss_by_hand() -> None:
    # sigma f + eps: (0.5 * 2 - 1, 0.5 * 0 + 1) = (0, 1) and (2 * 1 + 0, 2 * -1 + 1) = (2, -1): squares 1 and 5.
    score = f64([[2, 0], [1, -1]]).requires_grad_()
    noise, sigma = f64([[-1, 1], [0, 1]]), f64([[0.5], [2]])
    assert denoising_loss(score, noise, sigma) == 3
    assert denoising_loss(score, noise, sigma, f64([2, 0])) == 1
    # d/df = 2 sigma (sigma f + eps) / B
    (gradient,) = torch.autograd.grad(denoising_loss(score, noise, sigma), score)
    torch.testing.assert_close(gradient, f64([[0, 0.5], [4, -2]]))
    stacked = denoising_loss(*(t.detach().expand(3, -1, -1) for t in (score, noise, sigma)))
    assert stacked.tolist() == [3, 3, 3]


@pytest.mark.rung(1, "offline.cdsa")
def test_inverse_loss_by_hand() -> None:
    # Squared errors 1, 3 over two dimensions: means 1 / 2 ... rows (1 + 1) / 2 = 1, (9 + 0) / 2 = 4.5.
    predicted, action = f64([[1, 1], [3, 0]]), f64([[0, 0], [0, 0]])
    assert inverse_loss(predicted, action, f64([0, 0])) == 2.75
    assert inverse_loss(predicted, action, f64([0, 1])) == 0.5  # a terminal row has no successor
    assert inverse_loss(predicted, action, f64([0, 0]), f64([0, 2])) == 4.5
    assert inverse_loss(predicted, action, f64([1, 0]), f64([2, 0])) == 0


@pytest.mark.rung(1, "offline.cdsa")
def test_correction_by_hand() -> None:
    # s = (1, 2), u = 3; score (10, 20, 30) at every point: sigma^2 = 0.04 gives delta = (0.4, 0.8, 1.2).
    states, action = f64([[1, 2]]), f64([[3]])
    config = CDSAConfig(action_weight=0.5, state_weight=2.0, sigma=0.2)

    def score(pair: Tensor) -> Tensor:
        assert pair.tolist() == [[1, 2, 3]]
        return f64([[10, 20, 30]])

    def inverse(pair: Tensor) -> Tensor:  # 7 + s_1 + delta_1 - delta_2^2
        return (7 + pair[:, 0] + pair[:, 2] - pair[:, 3] ** 2)[:, None]

    # 0.5 * 1.2 + 2 * ((7 + 1 + 0.4 - 0.64) - (7 + 1)) = 0.6 - 0.48
    assert correction(states, action, score, inverse, config).item() == pytest.approx(0.12)
    no_inverse = CDSAConfig(action_weight=0.5, state_weight=0.0, sigma=0.2)
    assert correction(states, action, score, inverse, no_inverse).item() == pytest.approx(0.6)


def test_a_score_network_of_zeros_is_the_score_of_standard_normal_data() -> None:
    # N(0, I) with noise has covariance (1 + sigma^2) I.
    zeros = nn.Linear(3, 2)
    nn.init.zeros_(zeros.weight)
    nn.init.zeros_(zeros.bias)
    x, sigma = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.full((5, 1), 0.5)
    torch.testing.assert_close(Score(zeros, (0.1, 1.0))(x, sigma), -x / 1.25)
    # Otherwise net / (sigma sqrt(1 + sigma^2)) is added; the level is the third input, on [-1, 1] over the range.
    nn.init.constant_(zeros.weight[:, 2:], 3.0)
    for level, place in ((0.1, -1), (1.0, 1), (0.1**0.5, 0)):
        added = Score(zeros, (0.1, 1.0)).at(level)(torch.zeros(1, 2))
        torch.testing.assert_close(
            added, torch.full((1, 2), 3.0 * place / (level * (1 + level**2) ** 0.5)), atol=1e-5, rtol=1e-5
        )


def with_zero_networks(dataset: Dataset, **options: Any) -> CDSA:
    """An agent whose score is -x / (1 + sigma^2) and whose inverse model is 0."""
    agent = CDSA(state_transform="none", **TINY, **options)
    agent.prepare(dataset)
    for parameter in agent.networks.parameters():
        nn.init.zeros_(parameter)
    return agent


@pytest.mark.parametrize(("weight", "expected"), [(0.0, [2.5, 0.1]), (1.0, None), (52.0, None), (120.0, None)])
def test_acting_by_hand_clips_after_the_correction(weight, expected) -> None:
    # Box [-0.5, 2.5]: centre 1, half-range 1.5. In its units the base plays u, corrected u (1 - w_1 0.01 / 1.01).
    dataset = one_step([[0.0]] * 4, [[2.5]] * 4, action_low=-0.5, action_high=2.5)
    agent = with_zero_networks(dataset, action_weight=weight)
    played = [2.5, 0.1]
    agent.base.act = lambda obs, noise: torch.tensor([[[a] for a in played]])
    found = agent.act(torch.zeros(1, 2, 1))[0, :, 0].tolist()
    units = [(a - 1) / 1.5 * (1 - weight * 0.01 / 1.01) for a in played]
    clipped = [min(max(1 + 1.5 * u, -0.5), 2.5) for u in units]
    assert found == pytest.approx(clipped if expected is None else expected, abs=1e-5)
    if weight == 120:  # overshoots from one bound to beyond the other
        assert found[0] == pytest.approx(1 - 1.5 * (120 * 0.01 / 1.01 - 1), abs=1e-5)


# --------------------------------------------------------------------- score matching (4.3 of the reference card)


def quadrature(mixture: Mixture, sigma: float, n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy points, their noise and weights of mean 1 such that a weighted mean over rows is the exact expectation.

    One-dimensional: Gauss-Hermite nodes of the data's and the noise's normal variable, for every component.
    """
    nodes, mass = np.polynomial.hermite_e.hermegauss(n)
    mass /= mass.sum()
    x, eps, w = [], [], []
    for mean, variance in zip(mixture.means[:, 0].tolist(), mixture.variances[:, 0].tolist(), strict=True):
        z, e = np.meshgrid(nodes, nodes)
        x.append(mean + math.sqrt(variance) * z.ravel() + sigma * e.ravel())
        eps.append(e.ravel())
        w.append(np.outer(mass, mass).ravel() / len(mixture.means))
    weight = np.concatenate(w)
    return f64(np.concatenate(x))[:, None], f64(np.concatenate(eps))[:, None], f64(weight * len(weight))


LINE = Mixture([[-0.7], [0.9]], [[0.1], [0.3]])


@pytest.mark.theory
@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_denoising_is_explicit_score_matching_up_to_a_constant(sigma) -> None:
    # L_DSM(f) - sigma^2 E|f - s*|^2 must not depend on f (Vincent, 2011).
    x, noise, weight = quadrature(LINE, sigma)
    level = torch.full_like(x, sigma)
    candidates = [torch.zeros_like(x), -x, 0.3 * x + 1, torch.tanh(2 * x), x.square() - 0.1 * x**3]

    def spread(level_in_loss: float) -> float:
        constants = []
        for f in candidates:
            explicit = sigma**2 * (weight * (f - LINE.score(x, sigma)).square().sum(-1)).mean()
            constants.append(denoising_loss(f, noise, level_in_loss * level, weight) - explicit)
        return float(torch.stack(constants).max() - torch.stack(constants).min())

    assert spread(1.0) < 1e-6
    assert spread(2.0) > 1e-2  # control: the loss believes another noise level


@pytest.mark.theory
@pytest.mark.rung(3, "offline.cdsa")
def test_over_linear_functions_the_minimiser_is_the_exact_one() -> None:
    # For Gaussian data N(m, v) the score -(x - m) / (v + sigma^2) is linear: the loss has its minimum exactly there.
    # For a mixture it is the best linear fit of the score under p_sigma: -(x - mean) / (variance + sigma^2) of the
    # whole mixture, as E[s* x] = -1 and E[s*] = 0 (integration by parts).
    sigma = 0.5
    for mixture in (Mixture([[0.4]], [[0.3]]), LINE):
        mean = mixture.means.mean()
        variance = (mixture.variances + mixture.means.square()).mean() - mean.square()
        x, noise, weight = quadrature(mixture, sigma)

        def gradient(a: Tensor, b: Tensor, x=x, noise=noise, weight=weight) -> float:
            theta = torch.stack([a, b]).requires_grad_()
            loss = denoising_loss(theta[0] * x + theta[1], noise, torch.full_like(x, sigma), weight)
            return float(torch.autograd.grad(loss, theta)[0].abs().max())

        slope = -1 / (variance + sigma**2)
        assert gradient(slope, -slope * mean) < 1e-9
        assert gradient(-1 / variance, mean / variance) > 1e-2  # control: the score of the data without noise


@pytest.mark.theory
@given(seed=st.integers(0, 2**31), sigma=st.floats(0.05, 2))
def test_scores_by_differentiation_and_tweedies_formula(seed, sigma) -> None:
    rng = np.random.default_rng(seed)
    mixture = Mixture(rng.normal(size=(3, 2)).tolist(), rng.uniform(0.05, 1, (3, 2)).tolist())
    x = f64(rng.normal(size=(6, 2))).requires_grad_()
    (by_autograd,) = torch.autograd.grad(mixture.log_density(x, sigma).sum(), x)
    x = x.detach()
    score = mixture.score(x, sigma)
    torch.testing.assert_close(score, by_autograd, rtol=1e-9, atol=1e-9)
    # E[data | x] = x + sigma^2 s*(x, sigma), and w_1 = 1 plays its action.
    torch.testing.assert_close(x + sigma**2 * score, mixture.posterior_mean(x, sigma), rtol=1e-9, atol=1e-9)
    config = CDSAConfig(action_weight=1.0, state_weight=0.0, sigma=sigma, sigma_range=(0.01, 3.0))
    moved = x[:, 1:] + correction(x[:, :1], x[:, 1:], lambda p: mixture.score(p, sigma), nn.Identity(), config)
    torch.testing.assert_close(moved, mixture.posterior_mean(x, sigma)[:, 1:], rtol=1e-9, atol=1e-9)
    off = x + (2 * sigma) ** 2 * score  # control
    assert not torch.allclose(off, mixture.posterior_mean(x, sigma), rtol=1e-6, atol=1e-6)


@pytest.mark.theory
@given(seed=st.integers(0, 2**31), d=st.integers(1, 4), sigma=st.floats(0.05, 1))
def test_a_step_on_gaussian_data_contracts_iff_it_is_below_twice_the_smallest_variance(seed, d, sigma) -> None:
    # The action's law is N(m, Sigma) whatever the state: u - m -> (I - w (Sigma + sigma^2 I)^-1) (u - m) for a step
    # w = w_1 sigma^2. All distances shrink iff 0 < w < 2 lambda_min; the worst is along that eigenvector.
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(d, d))
    covariance, mean = f64(factor @ factor.T / d + 0.01 * np.eye(d)), f64(rng.normal(size=d))
    smoothed = covariance + sigma**2 * torch.eye(d, dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh(smoothed)
    offsets = torch.cat([vectors.T, -vectors.T, f64(rng.normal(size=(20, d)))])

    def score(pair: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(pair[:, :1]), -torch.linalg.solve(smoothed, (pair[:, 1:] - mean).T).T], 1)

    def largest_growth(step: float) -> float:
        config = CDSAConfig(
            action_weight=step / sigma**2, state_weight=0.0, sigma=sigma, sigma_range=(sigma / 2, 2 * sigma)
        )
        action = mean + offsets
        moved = action + correction(torch.zeros(len(action), 1).double(), action, score, nn.Identity(), config)
        return float(((moved - mean).norm(dim=1) / offsets.norm(dim=1)).max())

    bound = 2 * float(eigenvalues[0])
    assert largest_growth(0.99 * bound) < 1
    assert largest_growth(1.01 * bound) > 1  # and not above it
    assert largest_growth(0.0) == pytest.approx(1)
    assert largest_growth(1.99 * sigma**2) < 1  # w_1 < 2, whatever the covariance


# ----------------------------------------------------------------------------------------------- inverse dynamics


@pytest.mark.theory
@given(seed=st.integers(0, 2**31), d_s=st.integers(2, 5), d_a=st.integers(1, 2))
def test_with_linear_dynamics_the_state_part_is_a_least_squares_step(seed, d_s, d_a) -> None:
    rng = np.random.default_rng(seed)
    dynamics, effect = f64(rng.normal(size=(d_s, d_s))), f64(rng.normal(size=(d_s, d_a)))
    pull = torch.linalg.pinv(effect)
    states, action = f64(rng.normal(size=(40, d_s))), f64(rng.normal(size=(40, d_a)))
    change = states @ (dynamics - torch.eye(d_s)).T + action @ effect.T

    def inverse(pair: Tensor, pull: Tensor = pull) -> Tensor:
        """``B^+ (s' - A s)``."""
        s, delta = pair.split(d_s, -1)
        return (delta - s @ (dynamics - torch.eye(d_s)).T) @ pull.T

    running = torch.zeros(40, dtype=torch.float64)
    assert inverse_loss(inverse(torch.cat([states, change], 1)), action, running) < 1e-18  # it recovers the action
    assert inverse_loss(inverse(torch.cat([states, change], 1), 1.1 * pull), action, running) > 1e-4  # control
    gradient = f64(rng.normal(size=(40, d_s + d_a)))
    config = CDSAConfig(action_weight=0.0, state_weight=1.0, sigma=0.5)
    found = correction(states, action, lambda _: gradient, inverse, config)
    wanted = 0.25 * gradient[:, :d_s]  # how the next state should change: the action's best attempt at it
    best = torch.linalg.lstsq(effect, wanted.T).solution.T
    torch.testing.assert_close(found, best, rtol=1e-8, atol=1e-10)


def moving(effect: list[list[float]], seed: int = 0) -> Dataset:
    """Truncated episodes of one step with ``s' = s + B u``, u uniform on [-1, 1]^2."""
    rng = np.random.default_rng(seed)
    states, actions = rng.normal(size=(4000, 2)), rng.uniform(-1, 1, (4000, 2))
    ends = np.ones(4000, dtype=bool)
    return Dataset.from_arrays(
        states, actions, np.zeros(4000), ~ends, ends, states + actions @ np.array(effect).T, action_low=-1
    )


@cache
def moved(identified: bool) -> CDSA:
    dataset = moving([[0.5, 0.2], [0.0, 0.5]] if identified else [[0.5, 0.5], [0.0, 0.0]])
    base = BC(**TINY).fit(dataset, 1)
    return CDSA(base=base, hidden=(32, 32), batch_size=256, learning_rate=3e-3, state_transform="none").fit(
        dataset, 600
    )


@pytest.mark.theory
def test_the_inverse_model_is_learnt_where_the_action_can_be_told() -> None:
    states, delta = torch.randn(1, 200, 2, generator=torch.Generator().manual_seed(3)), torch.zeros(1, 200, 2)
    delta[..., 0] = torch.linspace(-0.3, 0.3, 200)
    for identified, expected in (
        (True, delta @ torch.linalg.inv(torch.tensor([[0.5, 0.2], [0.0, 0.5]])).T),
        # Control: two actions with the same effect. The best prediction of each is half of their sum, delta_1 / 0.5.
        (False, delta[..., :1].expand(-1, -1, 2)),
    ):
        agent = moved(identified)
        with torch.no_grad():
            found = agent.inverse(torch.cat([states, delta], -1))
        assert (found - expected).abs().mean() < 0.05
    # Then the error that remains is the variance of half of their difference, ((2/3) / 4 = 1/6 per dimension).
    for identified, remaining in ((True, 0.0), (False, 1 / 6)):
        agent = moved(identified)
        data = agent.prepare(moving([[0.5, 0.2], [0.0, 0.5]] if identified else [[0.5, 0.5], [0.0, 0.0]]))
        with torch.no_grad():
            predicted = agent.inverse(torch.cat([data.obs, data.next_obs - data.obs], -1)[None])[0]
            loss = inverse_loss(predicted, data.action, data.terminated)
        assert loss.item() == pytest.approx(remaining, abs=0.01)


@pytest.mark.rung(5, "offline.cdsa")
def test_successors_of_cut_rows_teach_the_inverse_model_and_those_of_terminal_rows_do_not() -> None:
    rng = np.random.default_rng(0)
    states, actions, ends = rng.normal(size=(64, 1)), rng.uniform(-1, 1, (64, 1)), np.ones(64, dtype=bool)

    def learnt(cut: bool, successors: Array) -> Tensor:
        data = Dataset.from_arrays(states, actions, np.zeros(64), ends & (not cut), ends & cut, successors)
        agent = CDSA(state_transform="none", **TINY).fit(data, 5)
        return torch.cat([p.detach().flatten() for p in agent.inverse.parameters()])

    near, far = states + 0.1 * actions, states + 100.0
    assert torch.equal(learnt(False, near), learnt(False, far))
    assert not torch.equal(learnt(True, near), learnt(True, far))  # control: a cut is no termination


# --------------------------------------------------------------------------------------------- learning the score


@pytest.mark.theory
@pytest.mark.rung(6, "offline.cdsa")
def test_cdsa_1_the_learnt_score_is_the_analytic_one() -> None:
    sigma = 0.3
    pairs = TWO.draw(100_000, 0.0, seed=0).numpy()
    dataset = one_step(pairs[:, :1], pairs[:, 1:].clip(-1, 1))  # 4 standard deviations lie inside the box
    base = BC(**TINY).fit(dataset, 1)
    agent = CDSA(
        base=base,
        hidden=(64, 64),
        batch_size=512,
        learning_rate=3e-3,
        sigma=sigma,
        sigma_range=(0.15, 0.6),
        state_transform="none",
    ).fit(dataset, 1500)
    x = TWO.draw(4000, sigma, seed=1)
    # The region that holds 95 % of each component: chi^2 with two degrees of freedom below 5.99.
    inside = ((x[:, None] - TWO.means) ** 2 / (TWO.variances + sigma**2)).sum(-1).amin(1) < 5.99
    x = x[inside]
    assert inside.double().mean() > 0.95

    def error(level: float) -> float:
        with torch.no_grad():
            found = agent.score_average.at(level)(x.float()[None])[0].double()
        return float((found - TWO.score(x, sigma)).square().mean().sqrt())

    assert error(sigma) < 0.1  # the scores themselves have root mean square 2.3
    assert error(2 * sigma) > 1  # controls: the level mis-specified twofold
    assert error(sigma / 2) > 1


@cache
def probe() -> tuple[CDSA, BC]:
    """Actions around s / 2 in the data; the base has learnt them from elsewhere, 0.3 too high."""
    rng = np.random.default_rng(0)
    state = rng.choice([-1.0, 1.0], size=4000)
    logged = state / 2 + 0.1 * rng.normal(size=4000)
    ends = np.ones(4000, dtype=bool)

    def data(actions: Array) -> Dataset:
        return Dataset.from_arrays(
            state[:, None], actions[:, None], np.zeros(4000), ~ends, ends, (state + 0.1 * actions)[:, None]
        )

    base = BC(hidden=(16,), learning_rate=1e-2).fit(data(np.full(4000, 0.3) + state / 2), 300)
    return CDSA(base=base).fit(data(logged.clip(-1, 1)), 1000), base


@pytest.mark.rung(2, "offline.cdsa")
def test_the_default_moves_a_policy_towards_the_data() -> None:
    # Data N(s / 2, 0.1^2) and noise of the same size: the denoised action is half way, s / 2 + 0.15.
    agent, base = probe()
    states = np.array([[-1.0], [1.0]])
    before, after = base.predict(states)[0][:, 0], agent.predict(states)[0][:, 0]
    np.testing.assert_allclose(before, [-0.2, 0.8], atol=0.03)
    np.testing.assert_allclose(after, [-0.35, 0.65], atol=0.05)


def test_where_the_base_plays_the_data_the_default_leaves_it() -> None:
    agent, _ = probe()
    states = torch.tensor([[[-1.0], [1.0]]])
    with torch.no_grad():
        left = agent._corrected(agent.transform_states(states), states / 2)
    torch.testing.assert_close(left, states / 2, rtol=0, atol=0.05)


# ------------------------------------------------------------------------------------------------------- the base


@pytest.fixture(scope="module")
def pendulum() -> Dataset:
    return collect("Pendulum-v1", n_steps=300, seed=0, progress=False)


@pytest.fixture(scope="module")
def bases(pendulum) -> dict[str, Any]:
    online: dict[str, Any] = {"hidden": (8, 8)}
    return {
        "as many seeds": TD3BC([5, 6, 7], **TINY).fit(pendulum, 5),
        "one for all": BC(**TINY, state_transform="none").fit(pendulum, 5),
        "on-policy": PPO("Pendulum-v1", 3, n_steps=16, n_envs=2, batch_size=16, normalize_obs=True, **online).learn(64),
        "off-policy": SAC("Pendulum-v1", 1, learning_starts=20, buffer_size=50, **online).learn(30),
    }


KINDS = ["as many seeds", "one for all", "on-policy", "off-policy"]
SEEDED = [11, 3, 7]


def acted_by_base(base: Any, obs: Tensor, noise: Tensor | None) -> Tensor:
    """What the base itself plays, seed by seed where it has only one."""
    if len(base.seeds) == len(obs):
        return base.act(obs, noise)
    rows = range(len(obs))
    return torch.cat([base.act(obs[i : i + 1], None if noise is None else noise[i : i + 1]) for i in rows])


@pytest.mark.parametrize("kind", KINDS)
def test_without_weights_the_base_acts_bit_for_bit(pendulum, bases, kind) -> None:
    base = bases[kind]
    obs = torch.tensor(pendulum.observations[:40]).expand(3, -1, -1)
    noise = torch.randn(3, 40, 1, generator=torch.Generator().manual_seed(0))
    idle = CDSA(SEEDED, base=base, action_weight=0.0, state_weight=0.0, **TINY).fit(pendulum, 3)
    moving = CDSA(SEEDED, base=base, action_weight=1.0, state_weight=0.0, **TINY).fit(pendulum, 3)
    for draw in (None, noise):
        assert torch.equal(idle.act(obs, draw), acted_by_base(base, obs, draw))
        assert not torch.allclose(moving.act(obs, draw), acted_by_base(base, obs, draw), atol=1e-6)  # control
    assert idle.is_deterministic == (kind in ("as many seeds", "one for all"))
    assert idle.step == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_part_of_the_checkpoint(pendulum, bases, kind, tmp_path) -> None:
    agent = CDSA(SEEDED, base=bases[kind], **TINY).fit(pendulum, 3)
    obs = torch.tensor(pendulum.observations[:40]).expand(3, -1, -1)
    path = agent.save(tmp_path / "agent")
    loaded = load_agent(path)
    assert torch.equal(loaded.act(obs), agent.act(obs))
    assert type(loaded.base) is type(bases[kind])
    whole, again = agent.fit(pendulum, 4).state()[1], loaded.fit(pendulum, 4).state()[1]
    assert whole.keys() == again.keys()
    for name in whole:  # returns of episodes that have not been are nan
        torch.testing.assert_close(again[name], whole[name], rtol=0, atol=0, equal_nan=True)
    selected = agent.select(1)
    assert len(selected.seeds) == len(selected.base.seeds) == 1
    torch.testing.assert_close(selected.act(obs[:1]), agent.act(obs)[1:2], rtol=1e-5, atol=1e-5)
    assert torch.equal(load_agent(selected.save(tmp_path / "one")).act(obs[:1]), selected.act(obs[:1]))


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_holds_base_and_correction(pendulum, bases, kind, tmp_path) -> None:
    agent = CDSA(SEEDED, base=bases[kind], action_weight=5.0, state_weight=1.0, **TINY).fit(pendulum, 3)
    obs = pendulum.observations[:40]
    for index in (0, 2):
        path = agent.export_onnx(tmp_path / "policy.onnx", index)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"observation": obs})
        expected, _ = agent.select(index).predict(obs)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    alone = acted_by_base(bases[kind], torch.tensor(obs).expand(3, -1, -1), None)[2].numpy()
    assert np.abs(found - alone).max() > 1e-3  # control: it is not the base's action that was exported


def test_the_base_is_a_copy_and_stays_as_it_was(pendulum) -> None:
    base = TD3BC(**TINY).fit(pendulum, 5)
    agent = CDSA(base=base, **TINY).fit(pendulum, 3)
    obs = torch.tensor(pendulum.observations[:40])[None]
    before, base_before = agent.act(obs), base.act(obs)
    base.fit(pendulum, 20)
    assert not torch.equal(base.act(obs), base_before)
    assert torch.equal(agent.act(obs), before)
    agent.fit(pendulum, 20)  # and the other way round
    assert torch.equal(agent.base.act(obs), base_before)


def test_a_base_trained_along_is_behaviour_cloning_on_the_same_batches(pendulum) -> None:
    options = TINY | {"hidden": (8, 6)}
    agent, alone = CDSA(2, **options).fit(pendulum, 7), BC(2, **options).fit(pendulum, 7)
    assert agent.base.step == 7
    for ours, theirs in zip(agent.base.actor.parameters(), alone.actor.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_own_policy_is_that_of_transformed_states(pendulum) -> None:
    agent = CDSA(2, **TINY).fit(pendulum, 3)
    obs = torch.tensor(pendulum.observations[:40]).expand(2, -1, -1)
    with torch.no_grad():
        found = agent.policy(agent.transform_states(obs), None)
    torch.testing.assert_close(agent.box.clip(found), agent.act(obs), rtol=1e-4, atol=1e-4)


def test_a_run_is_not_resumed_with_another_base(pendulum, tmp_path) -> None:
    first, second = (TD3BC(**TINY).fit(pendulum, n) for n in (5, 6))
    run = tmp_path / "run"
    CDSA(base=first, **TINY).fit(pendulum, 3, run_dir=run)
    assert CDSA(base=first, **TINY).fit(pendulum, 5, run_dir=run, resume=True).step == 5
    for other in (second, None):
        with pytest.raises(CheckpointError, match=r"another run: its base is 'offline\.td3_bc"):
            CDSA(base=other, **TINY).fit(pendulum, 7, run_dir=run, resume=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_base_experienced_is_not_copied(pendulum, bases, kind) -> None:
    base = TD3BC(**TINY).fit(pendulum, 2).learn("Pendulum-v1", 30) if kind == "one for all" else bases[kind]
    agent = CDSA(SEEDED, base=base, **TINY).fit(pendulum, 1)
    held = {name: tensor.numel() for name, tensor in agent.state()[1].items() if name.startswith("base/extra/")}
    assert not any(size for name, size in held.items() if "replay" in name and "added" not in name)
    assert not any("environments" in name for name in held)
    assert kind == "as many seeds" or any("environments" in name for name in base.state()[1])  # control
    nested = CDSA(SEEDED, base=agent, **TINY).fit(pendulum, 1)
    obs = torch.tensor(pendulum.observations[:5]).expand(3, -1, -1)
    assert torch.equal(nested.base.act(obs), agent.act(obs))


def test_reports_tell_bases_apart_and_pool_their_seeds(pendulum, tmp_path) -> None:
    def run(name: str, seed: int, base: Any) -> None:
        agent = CDSA([seed], base=base, **TINY)
        agent.fit(pendulum, 1, run_dir=tmp_path / name, eval_env="Pendulum-v1", eval_episodes=1)

    run("one", 0, TD3BC([0], **TINY).fit(pendulum, 2))
    run("again", 1, TD3BC([1], **TINY).fit(pendulum, 2))
    run("other options", 0, TD3BC([0], alpha=1.0, **TINY).fit(pendulum, 2))
    run("other kind", 0, BC([0], **TINY).fit(pendulum, 2))
    run("along", 0, None)
    groups = group_runs(read_runs(tmp_path)[0])
    found = sorted(sorted(run.path.name for run in group.runs) for group in groups)
    assert found == [["again", "one"], ["along"], ["other kind"], ["other options"]]
    assert any("base=offline.td3_bc" in group.label for group in groups)


def test_bases_that_do_not_fit_are_named(pendulum, bases) -> None:
    for no_agent in ("runs/base", BC):
        with pytest.raises(ConfigError, match="base must be a trained agent, as corollary"):
            CDSA(base=no_agent)
    with pytest.raises(ConfigError, match="The base has 3 seeds and CDSA 2: give both as many, or the base one"):
        CDSA(2, base=bases["as many seeds"])
    with pytest.raises(CorollaryError, match="BC has not learnt yet"):
        CDSA(base=BC())
    discrete = PPO("CartPole-v1", n_steps=8, n_envs=1, batch_size=8, hidden=(8,))
    narrower = BC(**TINY).fit(one_step(np.zeros((4, 3)), np.zeros((4, 1))), 1)  # Pendulum's box is -2..2
    for base in (discrete, narrower):
        with pytest.raises(EnvironmentMismatchError, match=r"trained for .* observation dimensions"):
            CDSA(base=base, **TINY).fit(pendulum, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"action_weight": -0.1}, "action_weight must be >= 0"),
        ({"state_weight": -1.0}, "state_weight must be >= 0"),
        ({"sigma_range": (0.5, 0.5)}, "sigma_range must be an increasing pair"),
        ({"sigma": 0.01}, "sigma must be within sigma_range, 0.05 to 1.0; got 0.01"),
        ({"averaging": 0.0}, "averaging must be in"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
    ],
)
def test_bad_options_are_named(options, says) -> None:
    with pytest.raises(ConfigError, match=says):
        CDSA(**options)


# --------------------------------------------------------------------------------- whole updates, written plainly


class PlainCDSA:
    """One seed of CDSA with behaviour cloning, from the equations; `wrong` names the deliberate mistake."""

    def __init__(self, agent: CDSA, data: Transitions, seed: int, wrong: str) -> None:
        self.agent, self.data, self.seed, self.wrong = agent, data, seed, wrong
        self.score, self.score_average = (plain_mlp(agent.score.net, seed) for _ in range(2))
        self.inverse, self.actor = plain_mlp(agent.inverse, seed), plain_mlp(agent.base.actor.net, seed)
        self.optimizers = [
            torch.optim.Adam(self.score.parameters(), lr=1e-3),
            torch.optim.Adam(self.inverse.parameters(), lr=1e-3),
            torch.optim.Adam(self.actor.parameters(), lr=3e-4),
        ]

    def step(self, t: int) -> None:
        rows = rows_seen(self.agent, self.data, t, self.seed)
        obs, action, next_obs = self.data.obs[rows], self.data.action[rows], self.data.next_obs[rows]
        unit = action if self.wrong == "actions in their own unit" else (action - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2)
        pair = torch.cat([obs, unit], 1)
        uniform = self.agent.stream("noise level").uniform(t, (len(pair), 1))[self.seed]
        noise = self.agent.stream("denoising noise").normal(t, pair.shape)[self.seed]
        sigma = 0.05 ** (1 - uniform)  # log-uniform between 0.05 and 1
        if self.wrong == "uniform levels":
            sigma = 0.05 + 0.95 * uniform
        noisy = pair + sigma * noise
        scale = torch.sqrt(1 + sigma**2)
        level = 1 - 2 * torch.log(sigma) / math.log(0.05)  # -1 at 0.05, 1 at 1
        net = self.score(torch.cat([noisy / scale, level], 1))
        score = net / (sigma * scale) - noisy / scale**2
        if self.wrong == "no standard normal part":
            score = net / (sigma * scale)
        per_row = ((sigma * score + noise) ** 2).sum(1)
        score_loss = (per_row / sigma[:, 0] ** 2 if self.wrong == "weight 1 / sigma^2" else per_row).mean()

        change = next_obs if self.wrong == "successor for change" else next_obs - obs
        error = ((self.inverse(torch.cat([obs, change], 1)) - unit) ** 2).mean(1)
        known = 1 - self.data.terminated[rows]
        inverse_loss = (error if self.wrong == "terminal rows too" else known * error).mean()
        cloning = ((plain_actor(self.actor, obs) - action) ** 2).mean()
        for optimizer, loss in zip(self.optimizers, (score_loss, inverse_loss, cloning), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        average(self.score_average, self.score, 0.02 if self.wrong == "faster average" else 0.005)

    def difference(self) -> float:
        a = self.agent
        return max(
            largest_difference(a.score.net, self.score, self.seed),
            largest_difference(a.score_average.net, self.score_average, self.seed),
            largest_difference(a.inverse, self.inverse, self.seed),
            largest_difference(a.base.actor.net, self.actor, self.seed),
        )


def difference_after_steps(dataset: Dataset, wrong: str = "nothing") -> float:
    agent = CDSA(**SHARED)
    data = agent.prepare(dataset)
    plain = [PlainCDSA(agent, data, seed, wrong) for seed in range(len(SEEDS))]
    for t in range(STEPS):
        for each in plain:
            each.step(t)
    agent.fit(dataset, STEPS)
    return max(each.difference() for each in plain)


def test_whole_updates_agree_with_a_plain_implementation(random_dataset) -> None:
    assert difference_after_steps(random_dataset(low=LOW, high=HIGH)) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        "actions in their own unit",
        "uniform levels",
        "no standard normal part",
        "weight 1 / sigma^2",
        "successor for change",
        "terminal rows too",
        "faster average",
    ],
)
def test_the_comparison_notices(random_dataset, wrong) -> None:
    assert difference_after_steps(random_dataset(low=LOW, high=HIGH), wrong) > 1e-7
