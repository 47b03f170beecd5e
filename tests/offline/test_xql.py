"""XQL: losses by hand, limits, gradient stops, XQL-1 (one state), whole updates."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corollary.core.errors import ConfigError
from corollary.offline import EQL, XQL
from corollary.offline.in_sample import shifted_exponents
from corollary.offline.xql import gumbel_loss

from .plain import HIGH, LOW
from .plain_in_sample import PlainInSample, difference
from .tabular import gradients, soft_value


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(values: Tensor, at: float, weight: Tensor | None = None, *, temperature: float, clip: float = 1e9) -> float:
    """Derivative of the Gumbel loss of ``values - v`` in v."""
    v = f64(at)[0].requires_grad_()
    return float(torch.autograd.grad(gumbel_loss(values - v, temperature, clip, weight), v)[0])


# ------------------------------------------------------------------------------------------------ hand numbers


@pytest.mark.rung(1, "offline.xql")
def test_gumbel_loss_by_hand() -> None:
    # T = 2: z = 2 and -1, m = 2, so (e^0 - 3 e^-2 + e^-3 - 0 e^-2) / 2.
    torch.testing.assert_close(gumbel_loss(f64(4, -2), 2.0, 7.0), f64((1 - 3 * math.exp(-2) + math.exp(-3)) / 2)[0])
    # No z above -1, so m = -1: z = -2 gives e^{-2 + 1} - (-2 + 1) e = 1 / e + e.
    torch.testing.assert_close(gumbel_loss(f64(-2), 1.0, 7.0), f64(math.exp(-1) + math.e)[0])
    # Clipped at 1: z = 1 (not 2) and 0, m = 1, so (1 - 2 / e + 1 / e - 1 / e) / 2.
    torch.testing.assert_close(gumbel_loss(f64(2, 0), 1.0, 1.0), f64((1 - 2 / math.e) / 2)[0])


def test_gradient_of_the_gumbel_loss_by_hand() -> None:
    # d/du (e^{z - m} - z e^{-m}) / B = (e^{z - m} - e^{-m}) / (B T): m is a constant, and a clipped row has none.
    residual = f64(4, -2, 30).requires_grad_()
    (gradient,) = torch.autograd.grad(gumbel_loss(residual, 2.0, 3.0), residual)
    torch.testing.assert_close(
        gradient, f64(math.exp(2 - 3) - math.exp(-3), math.exp(-1 - 3) - math.exp(-3), 0) / (3 * 2)
    )


def test_rows_of_weight_zero_have_no_part_in_the_scale() -> None:
    # z = 1 with weight 2 and z = 500 with weight 0: m = 1, and nothing overflows.
    residual = f64(1, 500).requires_grad_()
    loss = gumbel_loss(residual, 1.0, 1e9, f64(2, 0))
    torch.testing.assert_close(loss, f64(1 - 2 / math.e)[0])
    (gradient,) = torch.autograd.grad(loss, residual)
    torch.testing.assert_close(gradient, f64(1 - 1 / math.e, 0))
    assert shifted_exponents(f64(1, 500))[1] == pytest.approx(math.exp(-500))  # control: with weight it has


def test_critic_loss_by_hand() -> None:
    # Huber with delta 20: errors 10 and -30 cost 10^2 / 2 and 20^2 / 2 + 20 * 10; critics are added, rows averaged.
    agent = XQL()
    q, target = f64(10, -30, 0, 0).view(1, 2, 2), f64(0, 0)[None]
    torch.testing.assert_close(agent.critic_loss(q, target, None), f64((50 + 400) / 2))
    torch.testing.assert_close(agent.critic_loss(q, target, f64(2, 0)[None]), f64(50))
    torch.testing.assert_close(XQL(huber=5.0).critic_loss(q, target, None), f64((12.5 + 25 + 12.5 + 125) / 2))


def test_policy_weight_by_hand() -> None:
    assert XQL(beta=3.0).policy_weight(f64(0, -1, 2)).tolist() == pytest.approx([1, math.exp(-3), 100])


OUT_OF_RANGE = {"temperature": 0.0, "clip": 0.0, "huber": -1.0, "beta": -0.1, "num_value_updates": 0}
OUT_OF_RANGE |= {"sample_random_times": -1, "action_noise": -0.1}


@pytest.mark.parametrize(("option", "value"), OUT_OF_RANGE.items())
def test_settings_out_of_range_are_named(option, value) -> None:
    with pytest.raises(ConfigError, match=rf"XQLConfig\.{option} must be"):
        XQL(**{option: value})


# ----------------------------------------------------------------------------------------- limits and derivations


@given(st.integers(1, 3), st.integers(1, 8), st.floats(0.1, 10))
def test_gumbel_loss_axes_and_quadratic_limit(n_seeds, n_rows, temperature) -> None:
    residual = normal(n_seeds, n_rows, seed=n_rows)
    stacked = gumbel_loss(residual, temperature, 7.0)
    torch.testing.assert_close(stacked, torch.stack([gumbel_loss(u, temperature, 7.0) for u in residual]))
    ones = torch.ones_like(residual)
    torch.testing.assert_close(gumbel_loss(residual, temperature, 7.0, ones), stacked)
    # e^z - z - 1 = z^2 / 2 + O(z^3): for a large T the loss, times e^m -> 1, is mean u^2 / (2 T^2).
    large = 1e4
    torch.testing.assert_close(
        gumbel_loss(residual, large, 7.0) * 2 * large**2, residual.square().mean(-1), rtol=2e-3, atol=1e-6
    )


@pytest.mark.rung(6, "offline.xql")
@pytest.mark.theory
@given(st.integers(0, 10**6), st.floats(0.2, 20))
def test_xql_1_minimiser_is_the_soft_maximum(seed, temperature) -> None:
    # XQL-1: V = T log E e^{Q / T}, here with unequal probabilities as row weights of mean 1.
    values = 3 * normal(6, seed=seed)
    p = torch.softmax(normal(6, seed=seed + 1), 0)
    best = float(temperature * torch.logsumexp(values / temperature + p.log(), 0))
    tolerance = 1e-13 / temperature
    assert abs(slope(values, best, 6 * p, temperature=temperature)) < tolerance
    # The scale e^-m is at least e^-(max Q - V) / T; with it the slope shows V from below and above.
    assert slope(values, best - 0.1, 6 * p, temperature=temperature) < -tolerance
    assert slope(values, best + 0.1, 6 * p, temperature=temperature) > tolerance


@pytest.mark.rung(6, "offline.xql")
@pytest.mark.theory
def test_xql_1_controls() -> None:
    values = f64(-1, 0, 2)
    for temperature, other in ((2.0, 1 / 3), (1 / 3, 2.0)):  # V's temperature swapped with the policy's, 1 / beta
        right = float(temperature * torch.logsumexp(values / temperature - math.log(3), 0))
        wrong = float(other * torch.logsumexp(values / other - math.log(3), 0))
        assert abs(slope(values, right, temperature=temperature)) < 1e-13
        assert abs(slope(values, wrong, temperature=temperature)) > 1e-2
    # The sum instead of the mean over actions, that is an entropy bonus.
    assert abs(slope(values, float(torch.logsumexp(values, 0)), temperature=1.0)) > 1e-1
    # Clipping matters where the best action's probability, 1/3 here, is below e^-clip: not for 2, but for 0.5.
    right = float(0.01 * torch.logsumexp(values / 0.01 - math.log(3), 0))
    assert abs(slope(values, right, temperature=0.01, clip=2.0)) < 1e-10
    assert abs(slope(values, right, temperature=0.01, clip=0.5)) > 1e-2


@pytest.mark.theory
def test_value_falls_with_the_temperature_from_the_best_to_the_mean() -> None:
    values = normal(7, seed=3)
    temperatures = np.geomspace(1e-3, 1e4, 40)
    soft = [float(t * torch.logsumexp(values / t - math.log(7), 0)) for t in temperatures]
    for t, v in zip(temperatures, soft, strict=True):
        assert abs(slope(values, v, temperature=t)) * t < 1e-10  # the library's minimiser
    assert all(after < before for before, after in itertools.pairwise(soft))
    # max - T log 7 <= V <= max, and V - mean = Var / (2 T) + O(1 / T^2).
    assert float(values.max()) - temperatures[0] * math.log(7) - 1e-12 <= soft[0] <= float(values.max())
    excess = soft[-1] - float(values.mean())
    assert excess == pytest.approx(float(values.var(correction=0)) / (2 * temperatures[-1]), rel=1e-3)


@pytest.mark.theory
def test_exponential_of_the_plug_in_estimate_is_unbiased() -> None:
    # All 3^4 batches of 4 draws from 3 values: the mean of e^{V^ / T} is E e^{Q / T} exactly. V^ itself is biased.
    values, p, temperature = f64(-1, 0, 2), f64(0.5, 0.3, 0.2), 0.7
    mean_exponential = mean_estimate = 0.0
    for draw in itertools.product(range(3), repeat=4):
        batch = values[list(draw)]
        estimate = float(temperature * torch.logsumexp(batch / temperature - math.log(4), 0))
        assert abs(slope(batch, estimate, temperature=temperature)) < 1e-13
        chance = float(p[list(draw)].prod())
        mean_exponential += chance * math.exp(estimate / temperature)
        mean_estimate += chance * estimate
    exact = float((p * (values / temperature).exp()).sum())
    assert mean_exponential == pytest.approx(exact, rel=1e-12)
    assert mean_estimate < temperature * math.log(exact) - 0.05  # control: Jensen's inequality


# ----------------------------------------------------------------------------------------------- exact twin


@pytest.mark.theory
def test_fixed_point_lies_between_behaviour_and_the_best_in_the_data(finite_mdp) -> None:
    mdp = finite_mdp(1)
    values = [soft_value(mdp, temperature) for temperature in (1e-3, 0.1, 1.0, 10.0, 1e4)]
    assert all((after < before).all() for before, after in itertools.pairwise(values))
    np.testing.assert_allclose(values[0], mdp.best_value(mdp.behaviour_SA > 0), rtol=0, atol=0.02)
    np.testing.assert_allclose(values[-1], mdp.policy_value(mdp.behaviour_SA), rtol=0, atol=0.01)


def test_clipped_rows_teach_the_value_nothing_where_eql_lowers_it(finite_mdp) -> None:
    # All of Q lies far above V: XQL's V has no gradient at all, EQL's is pushed down, away from Q.
    mdp = finite_mdp(0)
    far = np.full(6, -1e3)
    for agent, stays in ((XQL(), True), (EQL(), False)):
        value_gradient, _ = gradients(agent, mdp, far, np.zeros((6, 4)))
        assert (value_gradient == 0).all() == stays
        assert (value_gradient >= 0).all()


# ------------------------------------------------------------------------- what V is fitted to, and how often


def prepared(dataset, **options: object):
    agent = XQL(seeds=2, hidden=(8,), precision="float64", reward_transform="none", **options)
    data = agent.prepare(dataset)
    return agent, data.gather(torch.arange(32).reshape(2, 16))


def test_random_actions_are_uniform_in_the_box_and_carry_their_rows_weight(random_dataset) -> None:
    agent, batch = prepared(random_dataset(low=LOW, high=HIGH), sample_random_times=3)
    weight = torch.linspace(0, 2, 16, dtype=torch.float64).expand(2, -1)
    asked: list[tuple[Tensor, Tensor]] = []
    original = agent.critic_target.forward
    agent.critic_target.forward = lambda obs, action: asked.append((obs, action)) or original(obs, action)
    rows, q = agent._with_more_actions(batch._replace(weight=weight), torch.zeros(2, 16, dtype=torch.float64))
    ((obs, action),) = asked
    assert rows.obs.shape == (2, 64, 3)
    torch.testing.assert_close(rows.obs, batch.obs.repeat(1, 4, 1))
    torch.testing.assert_close(rows.obs[:, 16:], obs)
    torch.testing.assert_close(rows.weight, weight.repeat(1, 4))
    torch.testing.assert_close(q[:, 16:], original(obs, action).amin(1).detach())
    assert (q[:, :16] == 0).all()  # the logged rows' values are not computed again
    # 192 numbers: within the box, mean 1 to 4 standard errors of 3 / sqrt(12 * 192) = 0.0625, and near both ends.
    assert LOW <= action.min() < LOW + 0.1
    assert HIGH - 0.1 < action.max() <= HIGH
    assert abs(float(action.mean()) - 1) < 4 * 0.0625


def test_noise_on_logged_actions_is_clipped_and_stays_in_the_box(random_dataset) -> None:
    agent, batch = prepared(random_dataset(low=LOW, high=HIGH), action_noise=0.4)
    asked: list[Tensor] = []
    original = agent.critic_target.forward
    agent.critic_target.forward = lambda obs, action: asked.append(action) or original(obs, action)
    rows, q = agent._with_more_actions(batch, torch.zeros(2, 16, dtype=torch.float64))
    moved = asked[0] - batch.action
    assert asked[0].min() >= LOW
    assert asked[0].max() <= HIGH
    # At most 0.5 half-ranges of 1.5, reached by the share 2 P(N > 0.5 / 0.4) = 21 %; the standard deviation is a little
    # below 0.4 half-ranges.
    assert moved.abs().max() == pytest.approx(0.75, abs=1e-12)
    assert 0.3 < float(moved.std()) < 0.6
    torch.testing.assert_close(rows.obs, batch.obs)
    torch.testing.assert_close(q, original(batch.obs, asked[0]).amin(1).detach())


def test_only_the_value_sees_noise_and_random_actions(random_dataset) -> None:
    # The critics' and the policy's step follow from V, so with a V that does not move they must be the same.
    dataset = random_dataset()
    states = []
    for options in ({}, {"sample_random_times": 2, "action_noise": 0.3, "num_value_updates": 3}):
        agent, batch = prepared(dataset, value_lr=1e-300, **options)
        agent.update(batch)
        states.append({n: p for n, p in agent.networks.state_dict().items() if not n.startswith("value")})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# --------------------------------------------------------------------------------------- plain implementation


class PlainXQL(PlainInSample):
    def __init__(self, agent: XQL, data, seed: int, wrong: str = "") -> None:
        super().__init__(agent, data, seed, self.gumbel, self.exponential, self.huber, wrong)

    def gumbel(self, q: Tensor, v: Tensor) -> Tensor:
        z = torch.clamp((q - v) / self.config.temperature, max=self.config.clip)
        m = torch.clamp(z.max(), min=-1.0)
        if self.wrong == "no scale":
            m = torch.zeros(())
        elif self.wrong != "scale attached":
            m = torch.tensor(m.item(), dtype=torch.float64)
        return sum(torch.exp(x - m) - x * torch.exp(-m) - torch.exp(-m) for x in z) / len(z)

    def exponential(self, u: Tensor) -> Tensor:
        return torch.clamp(torch.exp(self.config.beta * u), max=100.0)

    def huber(self, error: Tensor) -> Tensor:
        delta = self.config.huber
        linear = delta * (error.abs() - delta / 2)
        squares = error**2 if self.wrong == "not half the square" else error**2 / 2
        return torch.where(error.abs() <= delta, squares, linear)

    def value_steps(self) -> int:
        return self.config.num_value_updates

    def value_rows(self, t: int, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        cfg, half = self.config, (HIGH - LOW) / 2
        fitted = action
        if cfg.action_noise:
            noise = self.agent.stream("value action noise").normal(t, action.shape)[self.seed]
            fitted = action + half * torch.clamp(cfg.action_noise * noise, -0.5, 0.5)
            fitted = fitted if self.wrong == "noise leaves the box" else torch.clamp(fitted, LOW, HIGH)
        if cfg.sample_random_times:
            shape = (cfg.sample_random_times * len(obs), action.shape[1])
            u = self.agent.stream("random actions").uniform(t, shape)[self.seed]
            u = u / 2 if self.wrong == "half of the box" else u
            obs, fitted = torch.cat([obs] * (1 + cfg.sample_random_times)), torch.cat([fitted, LOW + (HIGH - LOW) * u])
        return obs, self.target_q(obs, fitted)


ALL = {"sample_random_times": 2, "action_noise": 0.3, "num_value_updates": 2}


def xql_difference(dataset, wrong: str = "", **options: object) -> float:
    return difference(XQL, dataset, lambda *args: PlainXQL(*args, wrong), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        ALL,
        {"value_dropout": 0.25, "sample_random_times": 1},
        {"value_layer_norm": False, "init": "torch"},
        {"temperature": 0.05, "clip": 2.0, "huber": 0.1},  # clipped rows, linear errors
    ],
)
def test_xql_equals_the_plain_implementation(random_dataset, options) -> None:
    assert xql_difference(random_dataset(low=LOW, high=HIGH), **options) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        "scale attached",
        "no scale",
        "not half the square",
        "noise leaves the box",
        "half of the box",
        "old V in the weights",
        "old V in the targets",
        "online critics",
    ],
)
def test_xql_controls(random_dataset, wrong) -> None:
    assert xql_difference(random_dataset(low=LOW, high=HIGH), wrong, **ALL) > 1e-7


def test_the_code_s_presets_are_those_of_its_scripts() -> None:
    # Read off Div99/XQL, offline/reproduce: temp, max_clip (7 where not given), batch_size (1024), v updates, random.
    table = {
        "halfcheetah-medium": (1, 7, 1024, 1, 0),
        "halfcheetah-medium-replay": (1, 5, 256, 1, 0),
        "halfcheetah-medium-expert": (1, 5, 1024, 1, 0),
        "hopper-medium": (5, 7, 1024, 1, 0),
        "hopper-medium-replay": (2, 7, 256, 1, 0),
        "hopper-medium-expert": (2, 7, 1024, 1, 1),
        "walker2d-medium": (10, 7, 1024, 1, 0),
        "walker2d-medium-replay": (5, 5, 1024, 1, 0),
        "walker2d-medium-expert": (2, 5, 256, 1, 0),
        "antmaze-umaze": (2, 7, 256, 1, 0),
        "antmaze-umaze-diverse": (5, 7, 256, 1, 1),
        "antmaze-medium-play": (0.8, 5, 256, 1, 0),
        "antmaze-medium-diverse": (0.6, 7, 256, 4, 0),
        "antmaze-large-play": (0.6, 5, 1024, 1, 0),
        "antmaze-large-diverse": (0.55, 5, 1024, 1, 0),
        "kitchen-complete": (2, 7, 1024, 1, 0),
        "kitchen-partial": (5, 7, 1024, 1, 0),
        "kitchen-mixed": (8, 7, 1024, 1, 0),
        "consistent": (2, 7, 256, 1, 0),
        "consistent-antmaze": (0.6, 7, 256, 1, 0),
        "consistent-kitchen": (5, 7, 256, 1, 0),
        "consistent-adroit": (5, 7, 256, 1, 0),
    }
    fields = ("temperature", "clip", "batch_size", "num_value_updates", "sample_random_times")
    configs = {name: dataclasses.asdict(XQL(preset=name).config) for name in XQL.presets}
    assert {name: tuple(config[field] for field in fields) for name, config in configs.items()} == table
    assert {name for name, config in configs.items() if config["action_noise"]} == {"halfcheetah-medium"}
    for name, config in configs.items():
        family = "antmaze" if "antmaze" in name else "kitchen" if "kitchen" in name or "adroit" in name else "mujoco"
        assert config["beta"] == {"mujoco": 3, "antmaze": 10, "kitchen": 0.5}[family]
        assert (config["actor_lr_decay_steps"] is None) == (family == "antmaze")
        assert config["dropout"] == (0.1 if family == "kitchen" else 0)
        assert config["value_layer_norm"]
