"""Offline to online, what it is for: a policy finds in the environment what its data do not hold.

One decision: the return of action a is 1 - |a - 1/2|, and the data end at a = 1/5, where it still grows: what they say
of larger actions is wrong from 1/2 on. The control takes as many gradient steps on logged rows alone.
"""

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from corollary.core.agent import algorithms
from corollary.core.dataset import Dataset

BEST = 0.5
STEP_SIZES = ("actor_lr", "critic_lr", "value_lr")
# Of these the policy imitates what it is shown, its own steps too: it can become no better than that.
IMITATING = {"offline.bc", "offline.cdsa"}
# They are made to distrust actions that are not in the data, and their policies begin wide.
OPTIONS: dict[str, dict[str, Any]] = {
    "offline.cql": {"conservative_weight": 0.01, "entropy_coef": 0.01, "n_actions": 3, "initial_log_std": -1.5}
}
OPTIONS["offline.famo2o_cql"] = OPTIONS["offline.cql"]


class Decision(gymnasium.Env[np.ndarray, np.ndarray]):
    """Episodes of one step."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,))
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Show the only state."""
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Pay for the action."""
        return np.zeros(1, np.float32), float(1 - abs(action[0] - BEST)), True, False, {}


def logged() -> Dataset:
    action = np.random.default_rng(0).uniform(-1, 0.2, (400, 1))
    ends = np.ones(400, bool)
    reward = 1 - np.abs(action[:, 0] - BEST)
    return Dataset.from_arrays(np.zeros((400, 1)), action, reward, ends, ~ends, action_low=-1, action_high=1)


def distance_to_the_best(name: str, offline_share: float) -> float:
    """Mean over two seeds of |pi - 1/2|, after 100 gradient steps offline and 100 or 200 in the environment."""
    kind = algorithms("offline")[name]
    fields = {f.name for f in dataclasses.fields(kind.config_type)}
    options = {field: (32, 32) for field in fields if field.endswith("hidden")}
    options |= {field: 5e-3 for field in STEP_SIZES if field in fields} | ({"tau": 0.05} if "tau" in fields else {})
    options |= {"batch_size": 64, "reward_transform": "none", "state_transform": "none"} | OPTIONS.get(name, {})
    agent = kind(2, **options).fit(logged(), 100)
    agent.learn(
        Decision, 200 if name in OPTIONS else 100, offline_share=offline_share, gradient_steps=2, exploration_noise=0.5
    )
    return float((agent.act(torch.zeros(2, 1, 1)) - BEST).abs().mean())


@pytest.mark.parametrize("name", sorted(algorithms("offline").keys() - IMITATING))
def test_an_action_that_is_not_in_the_data_is_found_in_the_environment(name) -> None:
    with_environment, data_alone = distance_to_the_best(name, 0.5), distance_to_the_best(name, 1.0)
    assert with_environment < data_alone - 0.05
