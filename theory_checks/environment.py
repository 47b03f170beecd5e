"""A finite MDP as a gymnasium environment, so that a deep agent runs on the very problem that the checks solve."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from .mdp import ModelError, TabularMDP


class TabularEnv(gymnasium.Env[Any, Any]):
    """One instance of a model: observations are states (one-hot, or their number), actions are numbers.

    Args:
        mdp: a model with one instance.
        one_hot: observe a float vector with a 1 at the state; else the state's number (a Discrete space).
        horizon: steps after which an episode is cut (truncated); ``None`` never cuts.
        absorbing: states in which an episode ends (terminated) on arrival; by default those that pay nothing and that
            no action leaves.

    Raises:
        ModelError: several instances, a horizon below 1, or an absorbing state that is none.
        gymnasium.error.ResetNeeded: a step before the first reset or after an episode's end.
        gymnasium.error.InvalidAction: an action that is none of the A.

    Attributes:
        P: the table in the form of gymnasium's toy-text environments.
    """

    def __init__(
        self,
        mdp: TabularMDP,
        *,
        one_hot: bool = True,
        horizon: int | None = None,
        absorbing: tuple[int, ...] | None = None,
    ) -> None:
        if len(mdp) != 1:
            raise ModelError(f"An environment is made of one instance, not of {len(mdp)}: give mdp[i].")
        if horizon is not None and horizon < 1:
            raise ModelError(f"horizon must be at least 1 step, or None for no cut; got {horizon}.")
        strange = [state for state in absorbing or () if not 0 <= state < mdp.n_states]
        if strange:
            raise ModelError(f"absorbing state {strange[0]} is none of the {mdp.n_states} states.")
        self.mdp, self.one_hot, self.horizon = mdp, one_hot, horizon
        self._p, self._r = mdp.transition[0].numpy(), mdp.reward[0].numpy()
        n = mdp.n_states
        if absorbing is None:
            stays = self._p[range(n), :, range(n)] == 1
            absorbing = tuple(np.flatnonzero(stays.all(1) & (self._r == 0).all(1)).tolist())
        self._absorbing = frozenset(absorbing)
        self.observation_space: spaces.Space[Any]
        self.observation_space = spaces.Box(0.0, 1.0, (n,), np.float32) if one_hot else spaces.Discrete(n)
        self.action_space = spaces.Discrete(mdp.n_actions)
        self.P = {
            s: {
                a: [
                    (float(self._p[s, a, t]), int(t), float(self._r[s, a]), int(t) in self._absorbing)
                    for t in np.flatnonzero(self._p[s, a])
                ]
                for a in range(mdp.n_actions)
            }
            for s in range(n)
        }
        self._state = self._steps = 0
        self._running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin in a state drawn from the model's start."""
        super().reset(seed=seed)
        self._state, self._steps = self._drawn(self.mdp.start[0].numpy()), 0
        self._running = True
        return self._observed(), {"state": self._state}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take action number `action`; the reward is the model's expected reward."""
        if not self._running:
            raise gymnasium.error.ResetNeeded("The episode has not begun or is over: call reset() before step().")
        if not self.action_space.contains(np.int64(action)):
            raise gymnasium.error.InvalidAction(f"action {action} is none of the {self.mdp.n_actions}, counted from 0.")
        reward = float(self._r[self._state, int(action)])
        self._state = self._drawn(self._p[self._state, int(action)])
        self._steps += 1
        terminated = self._state in self._absorbing
        truncated = not terminated and self.horizon is not None and self._steps >= self.horizon
        self._running = not (terminated or truncated)
        return self._observed(), reward, terminated, truncated, {"state": self._state}

    def _drawn(self, law: "np.ndarray[Any, np.dtype[np.float64]]") -> int:
        # The last entry of the running sum may miss 1 by a rounding, so the draw is a share of it.
        cumulative = law.cumsum()
        return int(np.searchsorted(cumulative, self.np_random.random() * cumulative[-1], side="right"))

    def _observed(self) -> Any:
        if not self.one_hot:
            return self._state
        return np.eye(self.mdp.n_states, dtype=np.float32)[self._state]
