"""Problems whose answer is known, learnt with the default configuration; each failure names its cause.

Rewards are scaled by running statistics in most defaults, so values are compared in units of the scaled reward.
"""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from corollary.core.agent import algorithms
from corollary.core.normalisers import EPSILON

KINDS = algorithms("online")
ON_POLICY = {name: kind for name, kind in KINDS.items() if hasattr(kind.config_type, "n_epochs")}
STEPS = {"online.fixpo": 80_000, "online.trpo": 40_000}
"""Environment steps that the defaults need here, where 10 000 are not enough: larger batches, so fewer updates."""

every_on_policy = pytest.mark.parametrize("kind", ON_POLICY.values(), ids=ON_POLICY)


class Probe(gymnasium.Env[Any, Any]):
    """A first observation of +1 or -1, `length` steps, and a reward at the end."""

    def __init__(self, discrete: bool, length: int = 1) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,))
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-2, 2, (1,))
        self.discrete, self.length = discrete, length

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.sign, self.t = int(2 * self.np_random.integers(2) - 1), 0
        return np.array([self.sign, 0], np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        done = self.t == self.length
        return np.array([self.sign, 1], np.float32), self.reward(action) if done else 0.0, done, False, {}

    def reward(self, action: Any) -> float:
        raise NotImplementedError


class Delayed(Probe):
    """The reward is the sign shown at first, two steps later: the value is gamma sign, then sign."""

    def __init__(self) -> None:
        super().__init__(discrete=True, length=2)

    def reward(self, action: Any) -> float:
        return float(self.sign)


class Choice(Probe):
    """The best action is that of the sign: 0 or 1, or the number sign / 2."""

    def reward(self, action: Any) -> float:
        if self.discrete:
            return float(action == (self.sign + 1) // 2)
        return -float((action[0] - self.sign / 2) ** 2)


def states(agent: Any, rows: list[list[float]]) -> torch.Tensor:
    return agent.normalize(torch.tensor(rows, dtype=torch.float32).expand(len(agent.seeds), -1, -1))


def reward_scale(agent: Any) -> np.ndarray:
    """What one unit of reward was divided by, per seed."""
    normaliser = agent.reward_normaliser
    return np.ones(len(agent.seeds)) if normaliser is None else np.sqrt(normaliser.moments.var[:, 0] + EPSILON)


@pytest.mark.rung(
    2, "online.ppo", "online.trpo", "online.mdpo", "online.spo", "online.fixpo", "online.props", "online.bpo"
)
@every_on_policy
def test_values_are_discounted_and_read_from_the_observation(kind) -> None:
    agent = kind(Delayed, 2).learn(STEPS.get(kind.algorithm, 10_000))
    value = agent.critic(states(agent, [[1, 0], [1, 1], [-1, 0], [-1, 1]])).detach().numpy()
    expected = np.array([agent.config.discount, 1, -agent.config.discount, -1])
    np.testing.assert_allclose(value * reward_scale(agent)[:, None], np.tile(expected, (2, 1)), atol=0.1)


@pytest.mark.rung(
    2, "online.ppo", "online.trpo", "online.mdpo", "online.spo", "online.fixpo", "online.props", "online.bpo"
)
@every_on_policy
@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
def test_the_action_that_the_observation_asks_for_is_chosen(kind, discrete) -> None:
    agent = kind(lambda: Choice(discrete), 2).learn(STEPS.get(kind.algorithm, 10_000))
    action = agent.policy(states(agent, [[1, 0], [-1, 0]]), None).squeeze(-1).detach().numpy()
    np.testing.assert_allclose(action, np.tile([1, 0] if discrete else [0.5, -0.5], (2, 1)), atol=0.2)


@pytest.mark.rung(2, "online.sac", "online.mdpo_off")
@pytest.mark.parametrize("kind", [k for name, k in KINDS.items() if name not in ON_POLICY])
def test_methods_with_a_replay_find_the_number_that_the_observation_asks_for(kind) -> None:
    """With their defaults, but for the 10 000 random steps that come first in these."""
    agent = kind(lambda: Choice(False), learning_starts=500).learn(1500)
    action = agent.act(torch.tensor([[[1.0, 0], [-1.0, 0]]])).flatten()
    np.testing.assert_allclose(action, [0.5, -0.5], atol=0.2)


class Endless(gymnasium.Env[Any, Any]):
    """Reward 1 for ever, cut every 10 steps: the value is 1 / (1 - gamma), but 1 on average per step left if cut."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return np.ones(1, np.float32), 1.0, False, self.t == 10, {}


@pytest.mark.rung(
    5, "online.ppo", "online.trpo", "online.mdpo", "online.spo", "online.fixpo", "online.props", "online.bpo"
)
@every_on_policy
@pytest.mark.parametrize("bootstrap", [True, False])
def test_a_time_limit_does_not_end_the_value_unless_told_so(kind, bootstrap) -> None:
    options = {"normalize_reward": "none", "scale_returns": False, "value_clip": None, "discount": 0.8}
    options |= {"learning_rate": 1e-3, "learning_rate_decay": "none", "n_envs": 4, "n_steps": 256, "batch_size": 64}
    names = kind.config_type.__dataclass_fields__
    agent = kind(
        Endless,
        bootstrap_on_truncation=bootstrap,
        **{name: value for name, value in options.items() if name in names},
    ).learn(15_000)
    value = float(agent.critic(states(agent, [[1.0]])).detach())
    if bootstrap:
        assert value == pytest.approx(1 / (1 - 0.8), rel=0.05)
    else:  # one value v of ten steps: v = mean over k steps left of the lambda-return, whose last step ends it
        trace = agent.config.trace_decay
        a, b = 0.8 * trace, 0.8 * (1 - trace)
        left = np.arange(1, 11)
        rewards, values = (1 - a**left) / (1 - a), b * (1 - a ** (left - 1)) / (1 - a)
        assert value == pytest.approx(rewards.mean() / (1 - values.mean()), rel=0.05)
