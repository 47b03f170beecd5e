"""BPO: a whole update against plain PyTorch, the closed form on random MDPs, the exact optimum in one state."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional as F

from corollary.core.errors import ConfigError
from corollary.online import BPO, PPO
from corollary.online.objectives import bpo_median_loss, bpo_target_ratio

from .plain import Plain, Scene, after_a_fixed_batch, probabilities, tabular

# ---------------------------------------------------------------------------------------- one update, twice

SHARED = {"seeds": [4, 9], "precision": "float64", "hidden": (8, 6), "n_envs": 2, "n_steps": 24, "batch_size": 16}


def update_difference(env: str, wrong: str = "") -> float:
    """Largest difference after one update at temperatures of the values' size, where every part matters."""
    agent = BPO(env, **SHARED, n_epochs=4, learning_rate=0.01, epsilon=0.2, temperature=0.5, median_temperature=0.7)
    rollout = agent.collect()
    samples = agent.evaluate_rollout(rollout)
    plain = [Plain(agent, seed, ("critic", "median")) for seed in range(2)]
    orders = [agent.permutation(epoch, len(samples)) for epoch in range(4)]
    agent.improve(samples, rollout)
    for p in plain:
        for order in orders:
            for batch in p.rows(samples, order, 16):
                q, v, u = batch.target, p.value(batch.obs), p.value(batch.obs, "median")
                centre = (v if wrong == "mean for the median" else u).detach()
                target = 1 - 0.2 + 2 * 0.2 * torch.sigmoid((q - centre) / 0.5)
                if wrong == "target not constant":
                    target = 1 - 0.2 + 2 * 0.2 * torch.sigmoid((q - u) / 0.5)
                weight = (q - (v if wrong == "weight not constant" else v.detach())).abs()
                if wrong == "weight of the old value":
                    weight = batch.advantage.abs()
                distance = (p.ratio(batch) - target).abs()
                policy = (weight * (distance**2 if wrong == "square" else distance)).mean()
                t = 1.0 if wrong == "median at temperature 1" else 0.7
                median = (t * F.softplus((q - u) / t) - (q - u) / 2).mean()
                value = F.mse_loss(v, q)
                p.step(policy + (0.25 if wrong == "half the value's weight" else 0.5) * value + 0.5 * median, 1.0)
    return max(p.difference() for p in plain)


@pytest.mark.rung(1, "online.bpo")
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_an_update_equals_the_plain_implementation(env) -> None:
    assert update_difference(env) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        "mean for the median",
        "target not constant",
        "weight not constant",
        "weight of the old value",
        "square",
        "median at temperature 1",
        "half the value's weight",
    ],
)
def test_update_controls(wrong) -> None:
    assert update_difference("CartPole-v1", wrong) > 1e-7


def test_a_normalised_advantage_would_be_ignored_and_is_refused() -> None:
    with pytest.raises(ConfigError, match="normalize_advantage must be 'none', as BPO weighs with q - V"):
        BPO("CartPole-v1", normalize_advantage="minibatch")


# ------------------------------------------------------------------------------------- the closed form (TC-13)

N_PROBLEMS, N_STATES, N_ACTIONS, DISCOUNT, EPSILON = 300, 4, 5, 0.9, 0.3


def problems() -> tuple[Tensor, Tensor, Tensor]:
    """Random MDPs: transitions ``[n, S, A, S]``, rewards and a policy ``[n, S, A]``."""
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(N_STATES, 0.3), (N_PROBLEMS, N_STATES, N_ACTIONS))
    policy = rng.dirichlet(np.ones(N_ACTIONS), (N_PROBLEMS, N_STATES))
    return tuple(torch.from_numpy(x) for x in (transition, rng.uniform(size=policy.shape), policy))


def values(transition: Tensor, reward: Tensor, policy: Tensor) -> Tensor:
    """``V = (I - gamma P_pi)^-1 r_pi``, ``[n, S]``."""
    kernel = (policy.unsqueeze(-1) * transition).sum(2)
    identity = torch.eye(N_STATES, dtype=torch.float64)
    return torch.linalg.solve(identity - DISCOUNT * kernel, (policy * reward).sum(-1))


def learnt_median(policy: Tensor, q: Tensor, temperature: float) -> Tensor:
    """Where the mean of the library's median loss has slope zero, by bisection; ``[n, S, 1]``."""
    low, high = q.amin(-1, keepdim=True), q.amax(-1, keepdim=True)
    for _ in range(80):
        u = ((low + high) / 2).requires_grad_()
        loss = (policy * bpo_median_loss(u.expand_as(q), q, temperature=temperature)).sum()
        (slope,) = torch.autograd.grad(loss, u)
        low, high = torch.where(slope < 0, u.detach(), low), torch.where(slope < 0, high, u.detach())
    return low


def best_ratio(policy: Tensor, q: Tensor) -> Tensor:
    """Maximise E r q under E r = 1 and |r - 1| <= eps: begin at 1 - eps, give the best actions what is left."""
    order = q.argsort(-1, descending=True)
    room = 2 * EPSILON * policy.gather(-1, order)
    spent = room.cumsum(-1) - room
    given = torch.minimum(room, (EPSILON - spent).clamp(min=0))
    mass = (1 - EPSILON) * policy.gather(-1, order) + given
    return torch.zeros_like(q).scatter(-1, order, mass) / policy


@pytest.mark.rung(6, "online.bpo")
@pytest.mark.parametrize("temperature", [1e-4, 0.1, 2.0])
def test_the_closed_form_is_a_policy_that_improves_every_state(temperature) -> None:
    transition, reward, policy = problems()
    value = values(transition, reward, policy)
    q = reward + DISCOUNT * torch.einsum("nsat,nt->nsa", transition, value)
    u = learnt_median(policy, q, temperature)
    ratio = bpo_target_ratio(q, u.expand_as(q), epsilon=EPSILON, temperature=temperature)

    assert (ratio >= 1 - EPSILON).all()
    assert (ratio <= 1 + EPSILON).all()
    torch.testing.assert_close((policy * ratio).sum(-1), torch.ones_like(value), rtol=0, atol=1e-9)
    gain = values(transition, reward, policy * ratio) - value
    assert gain.min() > -1e-12
    assert gain.mean() > 1e-3

    # Optimality up to the entropy's share, 2 eps lambda log 2 at most, by a construction without a median.
    lost = (policy * (best_ratio(policy, q) - ratio) * q).sum(-1)
    assert lost.min() > -1e-9
    assert lost.max() <= 2 * EPSILON * temperature * math.log(2) + 1e-9


def test_controls_of_the_closed_form() -> None:
    transition, reward, policy = problems()
    value = values(transition, reward, policy)
    q = reward + DISCOUNT * torch.einsum("nsat,nt->nsa", transition, value)

    def ratio(u: Tensor, q: Tensor = q) -> Tensor:
        return bpo_target_ratio(q, u.expand_as(q), epsilon=EPSILON, temperature=1e-4)

    mean = (policy * q).sum(-1, keepdim=True)  # the mean for the median: no policy
    assert ((policy * ratio(mean)).sum(-1) - 1).abs().max() > 0.2
    u = learnt_median(policy, q, 1.0)  # the median at another temperature, the released default: no policy either
    assert ((policy * ratio(u)).sum(-1) - 1).abs().max() > 0.2
    u = learnt_median(policy, -q, 1e-4)  # the other way round: worse in every state
    assert (values(transition, reward, policy * ratio(u, -q)) - value).max() < 1e-12


@pytest.mark.rung(3, "online.bpo")
def test_one_state_ends_in_the_closed_form() -> None:
    # Steps of a constant size end near, not in, the kink of an absolute value: first large, then small ones.
    pi, q = np.array([1, 2, 4, 1]) / 8, np.array([0.0, 1.0, 2.0, 5.0])
    agent = BPO(
        lambda: Scene(1, spaces.Discrete(4)),
        **{"seeds": 1, "precision": "float64", "hidden": (4,), "activation": "tanh", "n_envs": 1, "n_steps": 8},
        **{"batch_size": 8, "n_epochs": 400, "median_temperature": 1.0, "temperature": 1.0},
    )
    samples = tabular(agent, [1, 2, 4, 1], q.tolist())
    rollout = agent.collect()
    for agent.optimizer.learning_rate in (0.02, 0.001):
        agent.improve(samples, rollout)
    value, median = (float(net(samples.obs).detach()[0, 0]) for net in (agent.critic, agent.median))
    assert value == pytest.approx(pi @ q, abs=1e-3)
    assert pi @ (1 / (1 + np.exp(median - q))) == pytest.approx(0.5, abs=1e-3)
    assert abs(pi @ (1 / (1 + np.exp(value - q))) - 0.5) > 0.02  # the mean is no solution of that equation
    expected = pi * (1 - 0.3 + 0.6 / (1 + np.exp(median - q)))
    np.testing.assert_allclose(probabilities(agent)[0], expected, atol=1e-3)
    assert float(agent.diagnose(samples)["target_ratio"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("action_space", [spaces.Box(-1, 1, (2,)), spaces.Discrete(4)], ids=["box", "discrete"])
def test_no_ratio_goes_as_far_as_with_ppo(action_space) -> None:
    bpo, ppo = after_a_fixed_batch(BPO, action_space, epsilon=0.2), after_a_fixed_batch(PPO, action_space)
    assert (bpo["ratio_deviation"] < 0.2).all()
    assert (bpo["ratio_deviation"] <= 0.5 * ppo["ratio_deviation"]).all()
    assert (bpo["max_ratio_deviation"] <= 0.5 * ppo["max_ratio_deviation"]).all()
    assert (ppo["ratio_deviation"] > 0.2).all()


# ----------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.repro
def test_cartpole() -> None:
    agent = BPO("CartPole-v1", 3).learn(100_000)
    means = [np.mean(list(returns)[-20:]) for returns in agent.recent_returns]
    assert min(means) >= 450, means
