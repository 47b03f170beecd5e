"""AWAC: weights by hand, probes, whole updates against a plain implementation, and its policy improvement, exact."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corollary.core.actor_critic import critic_loss, td_target, weighted_mean
from corollary.core.dataset import Dataset, Transitions
from corollary.core.errors import ConfigError
from corollary.offline import AWAC
from corollary.offline.awac import softmax_weight
from corollary.offline.weighted_cloning import exponential_weight, weighted_cloning_loss

from .conftest import FiniteMDP
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
from .probes import STATE_OF_ROW, choice_probe, chosen_actions, fitted, mean_values, time_limit_probe, value_probe
from .weights import influence


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ hand numbers


@pytest.mark.rung(1, "offline.awac")
def test_softmax_weight_by_hand() -> None:
    # exp(x) = (1, 3), of mean 2. Weighted by (1/2, 3/2) the mean is (1 + 9) / 4 = 5/2.
    exponent = f64(0, math.log(3))
    torch.testing.assert_close(softmax_weight(exponent), f64(1 / 2, 3 / 2))
    row_weight = f64(1 / 2, 3 / 2)
    weight = softmax_weight(exponent, row_weight)
    torch.testing.assert_close(weight, f64(2 / 5, 6 / 5))
    assert weighted_mean(weight, row_weight) == pytest.approx(1)
    # Far beyond the range of exp; and a row of weight 0 has no say, even if its exponent is the largest.
    torch.testing.assert_close(softmax_weight(f64(1e4, 1e4 + math.log(3))), f64(1 / 2, 3 / 2))
    torch.testing.assert_close(softmax_weight(f64(0, math.log(3), 1e6), f64(1, 1, 0)), f64(1 / 2, 3 / 2, 0))
    # The weights say how rows compare: twice the row weights leave them as they are, and none at all gives 0.
    torch.testing.assert_close(softmax_weight(exponent, 2 * row_weight), weight)
    assert softmax_weight(exponent, f64(0, 0)).tolist() == [0, 0]


def test_softmax_weight_leading_axes_are_separate_problems() -> None:
    exponent = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(softmax_weight(exponent), torch.stack([softmax_weight(x) for x in exponent]))


def test_policy_weight_at_the_ends_of_the_temperature() -> None:
    advantage = f64(-1, 0, 2)
    for weights in ("exponential", "softmax"):
        cloning = AWAC(temperature=1e12, weights=weights).policy_weight(advantage, None)
        torch.testing.assert_close(cloning, f64(1, 1, 1))
    # exp(2 / 0.5) = 54.6 is below the cap, exp(2 / 0.1) is not.
    torch.testing.assert_close(AWAC(temperature=0.5).policy_weight(advantage, None)[2], f64(math.exp(4))[0])
    assert AWAC(temperature=0.1).policy_weight(advantage, None)[2] == pytest.approx(100)
    greedy = AWAC(temperature=1e-3, weights="softmax").policy_weight(advantage, None)
    torch.testing.assert_close(greedy, f64(0, 0, 3))


def test_the_authors_settings() -> None:
    """rlkit's examples/awac/mujoco/awac1.py: networks, batch, lambda, soft-max weights, penalty, tanh of the mean."""
    config = AWAC(preset="mujoco").config
    assert (config.hidden, config.actor_hidden) == ((256, 256), (256,) * 4)
    assert (config.batch_size, config.discount, config.tau) == (1024, 0.99, 0.005)
    assert (config.critic_lr, config.actor_lr, config.actor_weight_decay) == (3e-4, 3e-4, 1e-4)
    assert (config.temperature, config.weights) == (2.0, "softmax")
    assert (config.squash_mean, config.log_std_range) == (True, (-6.0, 0.0))
    assert (config.state_transform, config.reward_transform) == ("none", "none")


def test_a_policy_without_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy must be 'gaussian'"):
        AWAC(policy="deterministic")


# ------------------------------------------------------------------------------------------------------ probes


@pytest.mark.rung(2, "offline.awac")
def test_values() -> None:
    # As in test_probes: the targets move by 0.5 % at every step, so a discount step is learnt to 1 - 0.995^500.
    value, spread = mean_values(fitted(AWAC, value_probe, 500), value_probe(), STATE_OF_ROW)
    share = 1 - 0.995**500
    assert value == pytest.approx([1, -1, 1 + 0.99 * share, -0.99 * share], abs=0.08)
    assert (spread < 0.2).all()  # the action does not matter


@pytest.mark.rung(2, "offline.awac")
def test_choice_is_the_weighted_mean_of_the_data() -> None:
    # Q is r, so in each state the policy's mean is that of the logged actions under E min(exp((r - r~) / lambda), 100)
    # with r~ of the policy's own clipped action, whose deviation (one for both states) shrinks slowly from 1.
    dataset = choice_probe()
    state, action = dataset.transitions().obs[:, 0].numpy(), dataset.actions[:, 0].astype(float)
    std = fitted(AWAC, choice_probe, 500).actor.log_std.exp().item()
    assert 0.7 < std < 1
    noise = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400).numpy()  # of equal probability
    expected, without_a_cap = [], []
    for s in (-1, 1):
        a, r = action[state == s], dataset.rewards[state == s].astype(float)
        mean = 0.0
        for _ in range(50):
            own = np.clip(mean + std * noise, -1, 1)
            exponent = (r[:, None] - (1 - (own - s / 2) ** 2)) / 0.3333
            mean = np.average(a, weights=np.exp(np.minimum(exponent, np.log(100))).mean(1))
        expected.append(mean)
        without_a_cap.append(np.average(a, weights=np.exp(r / 0.3333)))
    assert expected == pytest.approx([-0.3, 0.3], abs=0.06)
    assert without_a_cap == pytest.approx([-0.41, 0.41], abs=0.05)  # a normal density cut at 1: 0.413
    assert chosen_actions(AWAC, 500) == pytest.approx(expected, abs=0.06)


@pytest.mark.rung(5, "offline.awac")
@pytest.mark.parametrize(("cut_is_termination", "expected"), [(False, 5.0), (True, 2.5)])
def test_a_time_limit_does_not_end_the_world(cut_is_termination, expected) -> None:
    dataset = time_limit_probe(cut_is_termination)
    options = {"discount": 0.8, "tau": 0.1, "critic_lr": 1e-3, "hidden": (64, 64), "batch_size": 128}
    value, _ = mean_values(AWAC(**options).fit(dataset, 500), dataset, np.zeros(400))
    assert value[0] == pytest.approx(expected, abs=0.25)


def test_rows_of_weight_zero_have_no_say_in_the_softmax(random_dataset) -> None:
    for weighted in (True, False):
        found = influence(AWAC, random_dataset(), weighted, online=False, weights="softmax", temperature=0.1)
        assert (found < 1e-12) == weighted


# --------------------------------------------------------------------------------------------------- plain twin


class PlainAWAC:
    """AWAC from the equations, one seed; `wrong` names the deliberate mistake."""

    def __init__(self, agent: AWAC, data: Transitions, seed: int, wrong: str) -> None:
        self.agent, self.data, self.seed, self.wrong = agent, data, seed, wrong
        self.actor = plain_mlp(agent.actor.net, seed)
        self.log_std = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.q = [plain_mlp(agent.critic.net, seed, member) for member in (0, 1)]
        self.q_target = [plain_mlp(agent.critic.net, seed, member) for member in (0, 1)]
        decay = agent.config.actor_weight_decay
        self.actor_optimizer = torch.optim.Adam([*self.actor.parameters(), self.log_std], lr=3e-4, weight_decay=decay)
        self.critic_optimizer = torch.optim.Adam([p for net in self.q for p in net.parameters()], lr=3e-4)

    def distribution(self, obs: Tensor) -> torch.distributions.Normal:
        mean = (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * self.actor(obs)
        return torch.distributions.Normal(mean, torch.clamp(self.log_std, *self.agent.config.log_std_range).exp())

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        distribution = self.distribution(obs)
        drawn = distribution.mean + distribution.stddev * noise
        return drawn if self.wrong == "samples outside of the box" else torch.clamp(drawn, LOW, HIGH)

    def smaller(self, nets: list[nn.Sequential], obs: Tensor, action: Tensor) -> Tensor:
        return torch.minimum(*(value_of(net, obs, action) for net in nets))

    def step(self, t: int) -> None:
        rows = rows_seen(self.agent, self.data, t, self.seed)
        obs, action, reward = self.data.obs[rows], self.data.action[rows], self.data.reward[rows]
        next_obs, terminated = self.data.next_obs[rows], self.data.terminated[rows]
        noise = self.agent.stream("actions").normal(t, (2 * len(rows), 2))[self.seed]
        if self.wrong == "truncation as termination":
            terminated = terminated + self.data.truncated[rows]
        with torch.no_grad():
            next_action = self.sample(next_obs, noise[: len(rows)])
            y = reward + 0.99 * (1 - terminated) * self.smaller(self.q_target, next_obs, next_action)
        if self.wrong == "policy before critic":
            self.policy_step(obs, action, noise[len(rows) :])
        loss = sum(nn.functional.mse_loss(value_of(net, obs, action), y) for net in self.q)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        if self.wrong != "policy before critic":
            self.policy_step(obs, action, noise[len(rows) :])
        for target, net in zip(self.q_target, self.q, strict=True):
            average(target, net, 0.005)

    def policy_step(self, obs: Tensor, action: Tensor, noise: Tensor) -> None:
        critics = self.q_target if self.wrong == "target critics in the advantage" else self.q
        with torch.no_grad():
            advantage = self.smaller(critics, obs, action) - self.smaller(critics, obs, self.sample(obs, noise))
            if self.agent.config.weights == "softmax":
                weight = len(obs) * torch.softmax(advantage / self.agent.config.temperature, 0)
            else:
                weight = torch.clamp(torch.exp(advantage / self.agent.config.temperature), max=100.0)
        loss = (weight * -self.distribution(obs).log_prob(action).sum(1)).mean()
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()

    def difference(self) -> float:
        a, s = self.agent, self.seed
        found = [
            largest_difference(a.actor.net, self.actor, s),
            float((a.actor.log_std[s] - self.log_std).detach().abs().max()),
        ]
        for member in (0, 1):
            found.append(largest_difference(a.critic.net, self.q[member], s, member))
            found.append(largest_difference(a.critic_target.net, self.q_target[member], s, member))
        return max(found)


def awac_difference(dataset: Dataset, wrong: str = "", **options: object) -> float:
    agent = AWAC(**SHARED, **options)
    data = agent.prepare(dataset)
    plain = [PlainAWAC(agent, data, seed, wrong) for seed in range(len(SEEDS))]
    agent.fit(dataset, STEPS)
    for p in plain:
        for t in range(STEPS):
            p.step(t)
    return max(p.difference() for p in plain)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "softmax", "temperature": 2.0, "log_std_range": (-6.0, 0.0), "actor_weight_decay": 1e-4},
        {"temperature": 0.01},  # capped weights
    ],
)
def test_awac_equals_the_plain_implementation(random_dataset, options) -> None:
    assert awac_difference(random_dataset(low=LOW, high=HIGH), **options) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        "policy before critic",
        "target critics in the advantage",
        "samples outside of the box",
        "truncation as termination",
    ],
)
def test_awac_controls(random_dataset, wrong) -> None:
    assert awac_difference(random_dataset(low=LOW, high=HIGH), wrong) > 1e-7


# ------------------------------------------------------------------------------------------- exact, on a finite MDP

TEMPERATURE = 0.8


def tilted(mdp: FiniteMDP, policy: np.ndarray, value: np.ndarray, temperature: float) -> np.ndarray:
    """``pi(a|s) exp(A(s, a) / lambda)``, normalised."""
    weights = policy * np.exp((mdp.q_of(value) - value[:, None]) / temperature)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.rung(3, "offline.awac")
@pytest.mark.theory
@pytest.mark.parametrize("seed", range(3))
def test_both_losses_are_stationary_at_the_exact_fixed_point(finite_mdp, seed) -> None:
    """Q is that of pi, and pi ~ pi_b exp(A / lambda), found by numpy from probabilities alone."""
    mdp = finite_mdp(seed)
    policy = mdp.behaviour_SA
    for _ in range(500):  # damped, as the map is no contraction
        value = mdp.policy_value(policy)
        policy = 0.5 * policy + 0.5 * tilted(mdp, mdp.behaviour_SA, value, TEMPERATURE)
    value = mdp.policy_value(policy)
    np.testing.assert_allclose(policy, tilted(mdp, mdp.behaviour_SA, value, TEMPERATURE), rtol=0, atol=1e-14)
    exact_q = mdp.q_of(value)

    def gradients(q_SA: np.ndarray, policy_SA: np.ndarray, temperature: float) -> tuple[float, float]:
        """The largest gradient of the critic loss in a table of Q, and of the policy loss in a table of logits."""
        table = torch.from_numpy(q_SA)[None].requires_grad_()
        logits = torch.from_numpy(policy_SA).clamp(min=1e-300).log().requires_grad_()
        next_value = (torch.from_numpy(policy_SA) * table[0].detach()).sum(1)[mdp.next_state]
        target = td_target(mdp.reward, mdp.terminated, next_value, mdp.discount)
        of_q = torch.autograd.grad(critic_loss(table[:, mdp.state, mdp.action], target).sum(), table)[0]
        advantage = torch.from_numpy(q_SA - (policy_SA * q_SA).sum(1, keepdims=True))[mdp.state, mdp.action]
        assert (advantage / temperature < math.log(100)).all()  # no weight is capped on these instances
        surprise = -torch.log_softmax(logits, -1)[mdp.state, mdp.action]
        loss = weighted_cloning_loss(exponential_weight(advantage / temperature), surprise)
        of_logits = torch.autograd.grad(loss, logits)[0]
        return float(of_q.abs().max()), float(of_logits.abs().max())

    assert max(gradients(exact_q, policy, TEMPERATURE)) < 1e-13
    # Controls: Q of the data's policy, the data's policy itself, and another temperature.
    of_data = mdp.q_of(mdp.policy_value(mdp.behaviour_SA))
    assert gradients(of_data, policy, TEMPERATURE)[0] > 1e-3
    assert gradients(exact_q, mdp.behaviour_SA, TEMPERATURE)[1] > 1e-3
    assert gradients(exact_q, policy, 2 * TEMPERATURE)[1] > 1e-3


@pytest.mark.theory
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_exact_improvement_is_monotone(finite_mdp, seed, temperature) -> None:
    """Tilting raises the mean advantage in every state, so V^(pi') >= V^pi: once over the data, or again and again."""
    mdp = finite_mdp(seed)
    policy = mdp.behaviour_SA
    best = mdp.best_value(mdp.behaviour_SA > 0)
    for _ in range(20):
        value = mdp.policy_value(policy)
        policy = tilted(mdp, policy, value, temperature)
        assert (mdp.policy_value(policy) >= value - 1e-12).all()
        assert (value <= best + 1e-12).all()
    # Control: tilted the other way the value falls.
    start = mdp.policy_value(mdp.behaviour_SA)
    assert (mdp.policy_value(tilted(mdp, mdp.behaviour_SA, start, -temperature)) < start - 1e-3).any()
