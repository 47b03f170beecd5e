"""CQL and Cal-QL: the gap by hand, probes, whole updates against a plain implementation, and CQL-1 on finite MDPs."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import ndtri
from torch import Tensor, nn

from corollary.core.actor_critic import critic_loss, td_target
from corollary.core.dataset import Dataset, Transitions
from corollary.core.distributions import DiagonalGaussian, SquashedGaussian
from corollary.core.errors import ConfigError
from corollary.offline import CQL
from corollary.offline.cql import conservative_gap, return_to_go

from .conftest import Array
from .plain import (
    HIGH,
    LOW,
    SEEDS,
    SHARED,
    STEPS,
    average,
    largest_difference,
    plain_mlp,
    rows_seen,
    value_of,
)
from .probes import STATE_OF_ROW, choice_probe, mean_values, time_limit_probe, value_probe
from .weights import influence


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ hand numbers


@pytest.mark.rung(1, "offline.cql")
def test_gap_by_hand_and_its_gradient() -> None:
    # Two rows, two sampled actions each: x = Q - log q = (0, ln 3) and (1, 1).
    sampled = f64([[0.0, 1.0], [0.0, 1.0]]).requires_grad_()
    log_density = f64([[0.0, 0.0], [-math.log(3), 0.0]])
    q = f64([2.0, 5.0]).requires_grad_()
    gap = conservative_gap(q, sampled, log_density, 1.0)
    torch.testing.assert_close(gap, f64([math.log(4) - 2, 1 + math.log(2) - 5]))
    of_q, of_sampled = torch.autograd.grad(gap.sum(), (q, sampled))
    torch.testing.assert_close(of_q, f64([-1, -1]))
    torch.testing.assert_close(of_sampled, f64([[1 / 4, 1 / 2], [3 / 4, 1 / 2]]))  # softmax of x
    # T = 1/2: (ln(1 + 9)) / 2.
    hot = conservative_gap(q, sampled, log_density, 0.5)
    torch.testing.assert_close(hot[0], f64(math.log(10) / 2 - 2))
    # The floor replaces the second gap, -3.31, and with it its gradient.
    floored = conservative_gap(q, sampled, log_density, 1.0, floor=-1.0)
    torch.testing.assert_close(floored, f64([math.log(4) - 2, -1.0]))
    assert torch.autograd.grad(floored.sum(), q)[0].tolist() == [-1, 0]


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5))
def test_gap_limits_and_axes(n_seeds, n_sampled, n_rows) -> None:
    q, sampled = normal(n_seeds, n_rows, seed=1), normal(n_seeds, n_sampled, n_rows, seed=2)
    log_density = normal(n_seeds, n_sampled, n_rows, seed=3)
    x = sampled - log_density
    cold = conservative_gap(q, sampled, log_density, 1e-4)
    torch.testing.assert_close(cold, x.amax(1) - q, atol=1e-3, rtol=0)
    hot = conservative_gap(q, sampled, log_density, 1e6) - 1e6 * math.log(n_sampled)
    torch.testing.assert_close(hot, x.mean(1) - q, atol=1e-4, rtol=0)
    each = [conservative_gap(*parts, 1.0) for parts in zip(q, sampled, log_density, strict=True)]
    torch.testing.assert_close(conservative_gap(q, sampled, log_density, 1.0), torch.stack(each))


def episodes(*rewards_and_ends: tuple[list[float], bool]) -> Transitions:
    """One state everywhere; each episode is its rewards and whether it terminated."""
    rewards = np.concatenate([rewards for rewards, _ in rewards_and_ends])
    ends = np.concatenate([np.arange(len(rewards)) == len(rewards) - 1 for rewards, _ in rewards_and_ends])
    terminated = np.concatenate([np.full(len(rewards), ended) for rewards, ended in rewards_and_ends])
    zeros = np.zeros((len(rewards), 1))
    return Dataset.from_arrays(zeros, zeros, rewards, ends & terminated, ends & ~terminated, zeros).transitions()


def test_return_to_go_by_hand() -> None:
    data = episodes(([1, 2, 4], True), ([-1, -1], False), ([-1], True), ([-1, 0], False))
    # gamma = 1/2: 1 + 1 + 1, 2 + 2, 4; nothing after a cut: -1.5, -1; -1; -1 + 0, 0.
    expected = [3.0, 4.0, 4.0, -1.5, -1.0, -1.0, -1.0, 0.0]
    assert return_to_go(data, 0.5).tolist() == expected
    # The second episode knows only the lowest reward and never ended: -1 / (1 - 1/2) in each of its rows.
    expected[3:5] = [-2.0, -2.0]
    assert return_to_go(data, 0.5, sparse_reward=True).tolist() == expected


def test_sampled_actions_and_their_densities(random_dataset) -> None:
    """``E sum_i exp(f(a_i)) / q_i(a_i) / (3 n)`` is the integral of exp f: here of unit actions in (-1, 1)^2."""
    agent = CQL(precision="float64", n_actions=40_000)
    agent.prepare(random_dataset(low=LOW, high=HIGH))
    here = SquashedGaussian(DiagonalGaussian(f64([[[0.3, -0.2]]]), f64([[[-0.3, 0.1]]])))
    there = SquashedGaussian(DiagonalGaussian(f64([[[-0.5, 0.4]]]), f64([[[0.0, -0.2]]])))
    actions, log_density = agent.sample_actions(here, there, normal(1, 80_000, 1, 2))
    assert actions.shape == (1, 120_000, 1, 2)
    assert ((actions > LOW) & (actions < HIGH)).all()
    unit = (actions[0, :, 0] - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2)
    # exp f(u) = (1 + u_1 / 2) (1 + u_1 u_2 / 2): every term but the 1 is odd in u_1 or u_2, so the integral is 4.
    integrand = (1 + unit[:, 0] / 2) * (1 + unit[:, 0] * unit[:, 1] / 2)
    for ratios, correct in (
        (integrand * torch.exp(-log_density[0, :, 0]), True),
        (integrand, False),  # control: without the densities
    ):
        for group in ratios.split(40_000):
            standard_error = float(group.std()) / 200
            assert (abs(float(group.mean()) - 4) < 5 * standard_error) == correct
    # Each group is drawn from its own distribution: by their mean actions.
    means = [torch.tanh(d.base.mean + d.base.log_std.exp() * normal(100_000, 1, 2)).mean((0, 1)) for d in (there, here)]
    for group, mean in zip(unit.split(40_000), [f64([0, 0]), *means], strict=True):
        torch.testing.assert_close(group.mean(0), mean.flatten(), atol=0.02, rtol=0)


def test_calibration_bounds_the_policys_actions_of_logged_rows_alone(random_dataset) -> None:
    dataset = random_dataset()
    batch_rows = torch.arange(8)[None]

    def first_step(index: int | None = None, **options: object) -> dict[str, Tensor]:
        agent = CQL(precision="float64", hidden=(8,), n_actions=3, **options)
        data = agent.prepare(dataset)
        if agent.config.calibrated:
            agent._returns[:-1] = 50.0  # above all values
        batch = data.gather(batch_rows)
        return agent.update(batch if index is None else batch._replace(index=torch.full_like(batch.index, index)))

    plain, bounded, lived = first_step(), first_step(calibrated=True), first_step(calibrated=True, index=-1)
    assert bounded["bounded_fraction"] == 1
    assert bounded["gap"] > plain["gap"] + 40
    assert lived["bounded_fraction"] == 0
    assert lived["gap"] == plain["gap"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"n_actions": 0}, "n_actions must be >= 1"),
        ({"backup_entropy": True, "max_backup": "max_min"}, "backup_entropy must be False where max_backup"),
        ({"initial_multiplier": 7.0}, r"initial_multiplier must be 1\.0 unless there is a target_gap"),
        ({"gap_scale": "penalty"}, "gap_scale must be 'difference' unless there is a target_gap"),
        ({"entropy_coef": 0.1, "target_entropy": -5.0}, "target_entropy must be None where entropy_coef is fixed"),
        ({"sparse_reward": True}, "sparse_reward must be False unless calibrated"),
    ],
)
def test_impossible_settings_are_named(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        CQL(**options)


# ------------------------------------------------------------------------------------------------------ probes
#
# The default settings but for the size: they would evaluate 31 actions per row in networks three layers deep.

SMALL = {"hidden": (64, 64), "n_actions": 3}


@pytest.mark.rung(2, "offline.cql")
def test_values() -> None:
    # The logged actions are uniform, and where Q does not depend on the action the penalty then has no gradient: its
    # softmax over the box is uniform too. So Q is that of test_probes, the targets moving at every step.
    agent = CQL(**SMALL).fit(value_probe(), 700)
    value, spread = mean_values(agent, value_probe(), STATE_OF_ROW)
    share = 1 - 0.995**700
    assert value == pytest.approx([1, -1, 1 + 0.99 * share, -0.99 * share], abs=0.08)
    assert (spread < 0.5).all()  # 150 rows to a state are not quite uniform, which the penalty magnifies


GRID = (np.arange(200) + 0.5) / 100 - 1


def penalised_value(reward: Array, weight: float) -> Array:
    """Q on the grid for one-step rows with uniform actions, where the derivative of the loss in Q vanishes.

    ``2 p (Q - r) + alpha_c (exp(Q) / Z - p) = 0`` with the data's density p = 1/2 and ``Z = integral exp(Q)``.
    """
    log_z = 0.0
    for _ in range(100):
        q = reward.copy()
        for _ in range(20):  # Newton; the left side rises with Q
            softmax = np.exp(q - log_z)
            q -= (2 * 0.5 * (q - reward) + weight * (softmax - 0.5)) / (1 + weight * softmax)
        log_z = 0.5 * log_z + 0.5 * np.log(np.exp(q).sum() * 0.01)
    return q


def best_squashed_mean(q: Array, alpha: float) -> float:
    """tanh(mu) of the squashed Gaussian with the least ``E[alpha log pi(a) - Q(a)]``, for Q on the grid."""
    noise = ndtri((np.arange(400) + 0.5) / 400)  # of equal probability

    def loss(parameters: Array) -> float:
        mean, log_std = parameters
        latent = mean + np.exp(log_std) * noise
        log_prob = -0.5 * noise**2 - log_std - np.log1p(-(np.tanh(latent) ** 2) + 1e-300)
        return float(np.mean(alpha * log_prob - np.interp(np.tanh(latent), GRID, q)))

    return float(np.tanh(minimize(loss, np.zeros(2), method="Nelder-Mead").x[0]))


@pytest.mark.rung(2, "offline.cql")
def test_choice_and_its_penalised_value() -> None:
    agent = CQL(**SMALL).fit(choice_probe(), 900)
    action, _ = agent.predict(np.array([[-1.0], [1.0]]))
    alpha = agent.entropy_coefficient().item()
    assert 0.9 < alpha < 1  # it falls slowly from 1
    for state, chosen in zip((-1.0, 1.0), action[:, 0], strict=True):
        reward = 1 - (GRID - state / 2) ** 2
        expected = penalised_value(reward, agent.config.conservative_weight)
        with torch.no_grad():
            inputs = torch.full((1, 200, 1), state), torch.tensor(GRID, dtype=torch.float32).view(1, 200, 1)
            q = agent.critic(*inputs)[0].mean(0).double().numpy()
        error = np.abs(q - expected).mean()
        assert error < 0.08
        assert np.abs(q - reward).mean() > 3 * error  # control: the reward itself
        # Q is an increasing function of r, so its best action is s / 2 still; at this alpha entropy counts for more.
        assert best_squashed_mean(expected, 0.001) == pytest.approx(state / 2, abs=0.02)
        assert chosen == pytest.approx(best_squashed_mean(expected, alpha), abs=0.06)


@pytest.mark.rung(5, "offline.cql")
@pytest.mark.parametrize(("cut_is_termination", "expected"), [(False, 5.0), (True, 2.5)])
def test_a_time_limit_does_not_end_the_world(cut_is_termination, expected) -> None:
    dataset = time_limit_probe(cut_is_termination)
    options = {"discount": 0.8, "tau": 0.1, "critic_lr": 1e-3, "batch_size": 128}
    value, _ = mean_values(CQL(**SMALL, **options).fit(dataset, 500), dataset, np.zeros(400))
    assert value[0] == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize(
    "options",
    [
        {"target_gap": 0.8, "difference_floor": 3.0},
        {"calibrated": True, "max_backup": "max_min"},
        {"bc_steps": 2, "critic_layer_norm": True},
    ],
)
def test_rows_of_weight_zero_teach_nothing(random_dataset, options) -> None:
    for weighted in (True, False):
        found = influence(CQL, random_dataset(), weighted, online=False, n_actions=3, **options)
        assert (found < 1e-12) == weighted


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (288.0, 303.0), (1000.0, 1010.0)])
def test_cloning_takes_actions_on_the_bounds_of_any_box(low, high) -> None:
    rng = np.random.default_rng(0)
    never, last = np.zeros(40, bool), np.arange(40) % 10 == 9
    actions = rng.choice([low, high], size=(40, 2))
    data = Dataset.from_arrays(
        rng.normal(size=(40, 3)), actions, rng.normal(size=40), never, last, action_low=low, action_high=high
    )
    agent = CQL(**SMALL, bc_steps=3).fit(data, 3)
    assert not agent.diverged().any()


# --------------------------------------------------------------------------------------------------- plain twin


class PlainCQL:
    """CQL from the equations, one seed, one sampled action at a time; `wrong` names the deliberate mistake."""

    def __init__(self, agent: CQL, data: Transitions, seed: int, wrong: str) -> None:
        self.agent, self.data, self.seed, self.wrong = agent, data, seed, wrong
        cfg = self.config = agent.config
        self.actor = plain_mlp(agent.actor.net, seed)
        self.q = [plain_mlp(agent.critic.net, seed, member) for member in (0, 1)]
        self.q_target = [plain_mlp(agent.critic.net, seed, member) for member in (0, 1)]
        self.log_alpha = f64(0.0 if cfg.entropy_coef is None else math.log(cfg.entropy_coef)).requires_grad_()
        self.log_multiplier = f64(math.log(cfg.initial_multiplier)).requires_grad_()
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=cfg.actor_lr)
        self.critic_optimizer = torch.optim.Adam([p for net in self.q for p in net.parameters()], lr=cfg.critic_lr)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=cfg.actor_lr)
        self.multiplier_optimizer = torch.optim.Adam([self.log_multiplier], lr=cfg.critic_lr)

    def gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(obs).split(2, 1)
        return mean, log_std.clamp(*self.config.log_std_range).exp()

    def log_prob(self, mean: Tensor, std: Tensor, latent: Tensor) -> Tensor:
        density = torch.distributions.Normal(mean, std).log_prob(latent) - torch.log(1 - torch.tanh(latent) ** 2)
        return density.sum(1)

    def inputs(self, t: int, obs: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """What the policy sees at s and at s', and the factor of the value in its loss."""
        return obs, next_obs, 1.0

    def box(self, unit: Tensor) -> Tensor:
        return (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * unit

    def step(self, t: int) -> None:
        cfg = self.config
        rows = rows_seen(self.agent, self.data, t, self.seed)
        obs, reward = self.data.obs[rows], self.data.reward[rows]
        next_obs, terminated = self.data.next_obs[rows], self.data.terminated[rows]
        action = self.box(
            torch.clamp((self.data.action[rows] - 1) / 1.5, -1 + cfg.action_margin, 1 - cfg.action_margin)
        )
        if self.wrong == "truncation as termination":
            terminated = terminated + self.data.truncated[rows]
        n, n_next = cfg.n_actions, 1 if cfg.max_backup == "none" else cfg.n_actions
        noise = list(self.agent.stream("actions").normal(t, (1 + n_next + 2 * n, len(rows), 2))[self.seed])
        uniform = list(2 * self.agent.stream("uniform actions").uniform(t, (n, len(rows), 2))[self.seed] - 1)
        alpha = self.log_alpha.exp().detach()
        seen, next_seen, factor = self.inputs(t, obs, next_obs)

        def sampled(state: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
            mean, std = self.gaussian(state)
            latent = mean + std * eps
            return torch.tanh(latent), self.log_prob(mean, std, latent)

        # Targets and the penalty's actions, from the policy as it is before its step.
        with torch.no_grad():
            options = []
            for eps in noise[1 : 1 + n_next]:
                next_action, next_log_prob = sampled(next_seen, eps)
                values = [value_of(net, next_obs, self.box(next_action)) for net in self.q_target]
                options.append(torch.stack(values))
            values = torch.stack(options)  # [n, 2, B]
            if cfg.max_backup == "min_max":
                next_value = torch.minimum(values[:, 0].max(0).values, values[:, 1].max(0).values)
            else:
                next_value = torch.minimum(values[:, 0], values[:, 1]).max(0).values
            if self.wrong == "larger critic in the target":
                next_value = values[0].max(0).values
            if cfg.backup_entropy:
                next_value = next_value - alpha * next_log_prob
            y = reward + cfg.discount * (1 - terminated) * next_value
            pairs = [(u, torch.full_like(reward, 2 * math.log(1 / 2))) for u in uniform]
            pairs += [sampled(next_seen, eps) for eps in noise[1 + n_next : 1 + n_next + n]]
            pairs += [sampled(seen, eps) for eps in noise[1 + n_next + n :]]

        def policy_step() -> None:
            mean, std = self.gaussian(seen)
            latent = mean + std * noise[0]
            log_prob = self.log_prob(mean, std, latent)
            if t < cfg.bc_steps:
                gain = self.log_prob(mean, std, torch.atanh(((action - 1) / 1.5).clamp(-1 + 1e-6, 1 - 1e-6)))
            else:
                gain = factor * torch.minimum(*(value_of(net, obs, self.box(torch.tanh(latent))) for net in self.q))
            loss = (alpha * log_prob - gain).mean()
            self.actor_optimizer.zero_grad()
            loss.backward()
            self.actor_optimizer.step()
            if cfg.entropy_coef is None:
                aim = 2.0 if self.wrong == "entropy of the other sign" else -2.0
                dual = -self.log_alpha * (log_prob.detach() + aim).mean()
                self.alpha_optimizer.zero_grad()
                dual.backward()
                self.alpha_optimizer.step()

        if self.wrong != "critics before policy":
            policy_step()

        bound = return_to_go(self.data, cfg.discount, sparse_reward=cfg.sparse_reward)[rows]
        loss, gaps = f64(0.0), []
        for net in self.q:
            q = value_of(net, obs, action)
            terms = []
            for i, (unit, log_density) in enumerate(pairs):
                at = next_obs if self.wrong == "next actions at the next state" and n <= i < 2 * n else obs
                value = value_of(net, at, self.box(unit))
                if cfg.calibrated and (i >= n or self.wrong == "bound on uniform actions"):
                    value = torch.maximum(value, bound)
                weighted = self.wrong != "no densities" or i < n
                terms.append(((value - log_density if weighted else value) / cfg.temperature).exp())
            gap = cfg.temperature * torch.log(torch.stack(terms).sum(0)) - q
            if cfg.difference_floor is not None and self.wrong != "no floor":
                gap = torch.clamp(gap, min=cfg.difference_floor)
            gaps.append(gap.mean())
            loss = loss + nn.functional.mse_loss(q, y)
        if cfg.target_gap is None:
            loss = loss + cfg.conservative_weight * (gaps[0] + gaps[1])
        else:
            bounds_gap = (cfg.gap_scale == "difference") != (self.wrong == "the other scale of the gap")
            scale, tau = cfg.conservative_weight, cfg.target_gap
            excess = sum(scale * (gap - tau) if bounds_gap else scale * gap - tau for gap in gaps)
            multiplier = self.log_multiplier.exp()
            loss = loss + multiplier.detach() * excess
            dual = -0.5 * multiplier * excess.detach()
            self.multiplier_optimizer.zero_grad()
            dual.backward()
            self.multiplier_optimizer.step()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        if self.wrong == "critics before policy":
            policy_step()
        for target, net in zip(self.q_target, self.q, strict=True):
            average(target, net, cfg.tau)

    def difference(self) -> float:
        a, s = self.agent, self.seed
        found = [largest_difference(a.actor.net, self.actor, s)]
        for member in (0, 1):
            found.append(largest_difference(a.critic.net, self.q[member], s, member))
            found.append(largest_difference(a.critic_target.net, self.q_target[member], s, member))
        if self.config.entropy_coef is None:
            found.append(float((a.log_coefficient[s] - self.log_alpha).detach().abs()))
        if self.config.target_gap is not None:
            found.append(float((a.log_multiplier[s] - self.log_multiplier).detach().abs()))
        return max(found)


def cql_difference(dataset: Dataset, wrong: str = "", **options: object) -> float:
    agent = CQL(**SHARED, **({"n_actions": 3, "actor_lr": 3e-4} | options))
    data = agent.prepare(dataset)
    plain = [PlainCQL(agent, data, seed, wrong) for seed in range(len(SEEDS))]
    agent.fit(dataset, STEPS)
    for p in plain:
        for t in range(STEPS):
            p.step(t)
    return max(p.difference() for p in plain)


CALIBRATED = {"calibrated": True, "discount": 0.8}
LAGRANGE = {"target_gap": 0.8, "initial_multiplier": math.e}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "orthogonal", "initial_log_std": -1.0, "action_margin": 0.1, "state_transform": "standardize"},
        {"entropy_coef": 0.3, "backup_entropy": True, "temperature": 0.5},
        {"max_backup": "max_min", "conservative_weight": 1.0, "difference_floor": 3.6},
        {"max_backup": "min_max", "bc_steps": 3},
        LAGRANGE,
        LAGRANGE | {"gap_scale": "penalty", "actor_hidden": (5,), "actor_init": "orthogonal"},
        CALIBRATED,
        CALIBRATED | {"sparse_reward": True},
    ],
)
def test_cql_equals_the_plain_implementation(random_dataset, options) -> None:
    assert cql_difference(random_dataset(low=LOW, high=HIGH), **options) < 1e-10


@pytest.mark.parametrize(
    ("wrong", "options"),
    [
        ("critics before policy", {}),
        ("larger critic in the target", {}),
        ("next actions at the next state", {}),
        ("no densities", {}),
        ("entropy of the other sign", {}),
        ("truncation as termination", {}),
        ("the other scale of the gap", LAGRANGE),
        ("bound on uniform actions", CALIBRATED),
        ("no floor", {"difference_floor": 3.6}),
    ],
)
def test_cql_controls(random_dataset, wrong, options) -> None:
    assert cql_difference(random_dataset(low=LOW, high=HIGH), wrong, **options) > 1e-7


# ------------------------------------------------------------------------------------------ exact, on finite MDPs


@dataclass(frozen=True)
class FiniteMDPs:
    """Random MDPs, one per seed, with data in every action, and a policy near the data's: arrays ``[I, S, A, ...]``."""

    reward: Array
    transition: Array
    behaviour: Array
    policy: Array
    discount: float

    @classmethod
    def random(cls, instances: int, discount: float, nearness: float) -> "FiniteMDPs":
        """`nearness` is the share of the data's policy in the policy."""
        rng = np.random.default_rng(5)
        shape = (instances, 6, 4)
        behaviour, other = 0.05 + 0.8 * rng.dirichlet(np.ones(4), (2, *shape[:2]))  # every action, at least 5 %
        return cls(
            rng.normal(size=shape),
            rng.dirichlet(np.ones(6), shape),
            behaviour,
            nearness * behaviour + (1 - nearness) * other,
            discount,
        )

    def expected(self, q: Array) -> Array:
        """``E_pi Q``, ``[I, S]``."""
        return (self.policy * q).sum(2)

    def successors(self) -> Array:
        """The matrix of gamma P^pi over pairs (s, a), ``[I, S A, S A]``."""
        pairs = self.transition[..., None] * self.policy[:, None, None]  # [I, S, A, S', A']
        return self.discount * pairs.reshape(len(pairs), 24, 24)

    def solve(self, source: Array) -> Array:
        """``(I - gamma P^pi)^-1 source``, ``[I, S, A]``."""
        return np.linalg.solve(np.eye(24) - self.successors(), source.reshape(-1, 24, 1)).reshape(source.shape)


def fixed_point(mdps: FiniteMDPs, weight: float, temperature: float, log_density: Tensor, sign: float = 1.0) -> Array:
    """Descend the library's critic loss and gap over tables of Q until their gradient vanishes, ``[I, S, A]``.

    Exact expectations: one "row" for each pair (s, a), weighted by its share of the data; the sampled actions of a row
    are all actions, with the given log-densities ``[I, S, A]``; the target is the exact backup. The steps are Newton's
    but for the softmax, whose curvature alpha_c / (4 T) at most is added.
    """
    instances, n_states, n_actions = mdps.reward.shape
    reward, behaviour = torch.from_numpy(mdps.reward), torch.from_numpy(mdps.behaviour)
    transition, policy = torch.from_numpy(mdps.transition), torch.from_numpy(mdps.policy)
    share = behaviour * n_actions  # of each row among the S A equally weighted ones, of mean 1
    state = torch.arange(n_states).repeat_interleave(n_actions)
    q = torch.zeros(instances, n_states, n_actions, dtype=torch.float64)
    curvature = 2 * behaviour + weight / (4 * temperature)
    for _ in range(20_000):
        table = q.clone().requires_grad_()
        next_value = (transition * (policy * q).sum(2)[:, None, None]).sum(3)
        target = td_target(reward, torch.zeros_like(reward), next_value, mdps.discount).flatten(1)
        rows = table.flatten(1)
        gap = conservative_gap(rows, table[:, state].mT, log_density[:, state].mT, temperature)
        row_weight = share.flatten(1)
        loss = critic_loss(rows.unsqueeze(1), target, row_weight) + sign * weight * (row_weight * gap).mean(1)
        (gradient,) = torch.autograd.grad(loss.sum(), table)
        gradient = gradient * n_states  # each state has the share 1 / S of the rows
        if gradient.abs().max() < 1e-12:
            return q.numpy()
        q = q - gradient / curvature
    raise AssertionError(f"the gradient is still {float(gradient.abs().max())}")


@pytest.mark.rung(3, "offline.cql")
@pytest.mark.theory
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_losses_solve_the_exact_conservative_operator(temperature) -> None:
    """CQL(H): ``Q = r + gamma P^pi Q - (alpha_c / 2) (softmax(Q / T) / pi_b - 1)``, iterated by numpy."""
    mdps = FiniteMDPs.random(20, discount=0.5, nearness=0.5)
    found = fixed_point(mdps, 0.5, temperature, torch.zeros(20, 6, 4, dtype=torch.float64))

    def operator(q: Array, weight: float) -> Array:
        softmax = np.exp(q / temperature)
        softmax /= softmax.sum(2, keepdims=True)
        backup = mdps.reward + mdps.discount * (mdps.transition * mdps.expected(q)[:, None, None]).sum(3)
        return backup - weight / 2 * (softmax / mdps.behaviour - 1)

    np.testing.assert_allclose(operator(found, 0.5), found, rtol=0, atol=1e-8)
    # Controls: no penalty, and the factor 1/2 of the Bellman error in the paper's equations forgotten.
    assert np.abs(operator(found, 0.0) - found).max() > 0.1
    assert np.abs(operator(found, 1.0) - found).max() > 0.1


LINEAR = 1e7
"""A temperature at which ``T log sum_a exp((Q + T log pi) / T)`` is ``E_pi Q``: weights are pi exp(Q / T)."""


def linear_fixed_point(mdps: FiniteMDPs, weight: float, sign: float = 1.0) -> Array:
    return fixed_point(mdps, weight, LINEAR, -LINEAR * torch.from_numpy(mdps.policy).log(), sign)


@pytest.mark.theory
def test_cql_1_fixed_point_and_lower_bound() -> None:
    """Penalty ``alpha (E_pi Q - E_pi_b Q)`` beside half the Bellman error; here alpha is alpha_c / 2."""
    mdps = FiniteMDPs.random(300, discount=0.5, nearness=0.7)
    weight = 0.4
    found = linear_fixed_point(mdps, weight)
    exact_q = mdps.solve(mdps.reward)
    excess = mdps.policy / mdps.behaviour - 1
    np.testing.assert_allclose(found, exact_q - weight / 2 * mdps.solve(excess), rtol=0, atol=1e-4)
    # Control: alpha_c in the place of alpha.
    assert np.abs(found - (exact_q - weight * mdps.solve(excess))).max() > 0.1

    # E_pi[pi / pi_b - 1] = sum (pi - pi_b)^2 / pi_b >= 0, so the value is a lower bound in every state ...
    shortfall = mdps.expected(exact_q) - mdps.expected(found)
    assert (shortfall >= -1e-5).all()
    assert shortfall.min() < 1e-2 < shortfall.max()  # tight somewhere, and no constant
    # ... but Q is not, in nearly every one of these MDPs: where pi < pi_b the penalty is a bonus.
    above = (found > exact_q + 1e-3).any((1, 2))
    assert above.mean() > 0.98

    # Control: with the penalty's sign turned round the bound fails.
    flattered = linear_fixed_point(mdps, weight, sign=-1.0)
    assert (mdps.expected(flattered) > mdps.expected(exact_q) + 1e-3).any(1).all()


@pytest.mark.theory
def test_cql_1_pointwise_bound_can_hold_far_from_the_data() -> None:
    """With a long horizon and an unrelated policy the discounted chi-square outweighs the bonus in every pair."""
    mdps = FiniteMDPs.random(300, discount=0.9, nearness=0.0)
    correction = mdps.solve(mdps.policy / mdps.behaviour - 1)  # (exact_q - fixed point) / alpha, by the formula above
    assert (correction > 0).all((1, 2)).mean() > 0.98
