"""What the tests of several offline algorithms share: a small random dataset, and a finite MDP solved by numpy."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from corollary.core.dataset import Dataset

Array = NDArray[np.float64]
DatasetFactory = Callable[..., Dataset]


@pytest.fixture
def random_dataset() -> DatasetFactory:
    """Return a maker of a dataset with random content: 6 episodes, alternately terminated and truncated."""

    def make(seed: int = 0, d_s: int = 3, d_a: int = 2, low: float = -1.0, high: float = 1.0) -> Dataset:
        rng = np.random.default_rng(seed)
        n, length = 48, 8
        terminated = np.zeros(n, dtype=bool)
        truncated = np.zeros(n, dtype=bool)
        terminated[length - 1 :: 2 * length] = True
        truncated[2 * length - 1 :: 2 * length] = True
        observations = rng.normal(size=(n, d_s))
        successors = np.roll(observations, -1, axis=0)
        successors[terminated | truncated] = rng.normal(size=((terminated | truncated).sum(), d_s))
        return Dataset.from_arrays(
            observations,
            rng.uniform(low, high, size=(n, d_a)),
            rng.normal(size=n),
            terminated,
            truncated,
            successors,
            action_low=low,
            action_high=high,
        )

    return make


@dataclass(frozen=True)
class FiniteMDP:
    """A finite MDP as rows (s, a, r, d, s') whose plain mean over rows is the exact expectation.

    Every state has the same number of rows; behaviour and transition probabilities are multiples of 1/8 and 1/4, so
    repeating rows represents them without error. Some actions are never taken (`behaviour` 0). The methods solve the
    MDP with numpy from probabilities alone; they share nothing with the library.
    """

    reward_SA: Array
    transition_SAS: Array  # probability of going on to s'; the rest of a row's mass is termination
    behaviour_SA: Array
    discount: float
    state: Tensor  # [N] int64
    action: Tensor  # [N] int64
    reward: Tensor  # [N]
    terminated: Tensor  # [N] 0 or 1
    next_state: Tensor  # [N] int64, arbitrary where terminated

    def q_of(self, value_S: Array) -> Array:
        """``r(s, a) + gamma sum_s' P(s'|s, a) v(s')``, ``[S, A]``."""
        return self.reward_SA + self.discount * self.transition_SAS @ value_S

    def policy_value(self, policy_SA: Array) -> Array:
        """V of a policy: the solution of the linear system ``(I - gamma P_pi) v = r_pi``, ``[S]``."""
        dynamics = np.einsum("sa,sat->st", policy_SA, self.transition_SAS)
        rewards = (policy_SA * self.reward_SA).sum(1)
        return np.linalg.solve(np.eye(len(rewards)) - self.discount * dynamics, rewards)

    def best_value(self, allowed_SA: NDArray[np.bool_]) -> Array:
        """V of the best policy among those that use only allowed actions, by policy iteration, ``[S]``."""
        policy = np.eye(allowed_SA.shape[1])[allowed_SA.argmax(1)]
        while True:
            value = self.policy_value(policy)
            greedy = np.eye(allowed_SA.shape[1])[np.where(allowed_SA, self.q_of(value), -np.inf).argmax(1)]
            if np.allclose(self.policy_value(greedy), value, rtol=0, atol=1e-13):
                return value
            policy = greedy


@pytest.fixture
def finite_mdp() -> Callable[[int], FiniteMDP]:
    """Return a maker of random MDPs with 6 states, 4 actions, terminations, and actions without data."""

    def make(seed: int) -> FiniteMDP:
        rng = np.random.default_rng(seed)
        n_states, n_actions, action_parts, successor_parts = 6, 4, 8, 4
        reward = rng.normal(size=(n_states, n_actions))
        taken = np.zeros((n_states, n_actions), dtype=int)
        for counts in taken:  # three actions in the data, the fourth never taken
            counts[rng.permutation(n_actions)[:3]] = 1 + rng.multinomial(action_parts - 3, np.ones(3) / 3)
        # The last successor, number S, is termination.
        reached = rng.multinomial(successor_parts, np.ones(n_states + 1) / (n_states + 1), size=(n_states, n_actions))
        rows = [
            (s, a, t)
            for (s, a, t) in np.ndindex(n_states, n_actions, n_states + 1)
            for _ in range(taken[s, a] * reached[s, a, t])
        ]
        state, action, successor = torch.tensor(rows).unbind(1)
        ended = successor == n_states
        return FiniteMDP(
            reward_SA=reward,
            transition_SAS=reached[:, :, :n_states] / successor_parts,
            behaviour_SA=taken / action_parts,
            discount=0.8,
            state=state,
            action=action,
            reward=torch.from_numpy(reward)[state, action],
            terminated=ended.double(),
            next_state=torch.where(ended, 0, successor),
        )

    return make
