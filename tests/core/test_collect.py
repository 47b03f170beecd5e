"""Recording episodes: probe environments whose every number is known."""

import random
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from corollary.core.collect import collect
from corollary.core.errors import ConfigError, CorollaryError
from corollary.core.scores import REFERENCE_RETURNS


class Probe(gymnasium.Env[Any, Any]):
    """Observation [t, noise of the reset seed], reward 10 t + action[0]; ends as told."""

    def __init__(self, terminate_at: int | None = None, truncate_at: int | None = None, **broken: Any) -> None:
        self.terminate_at, self.truncate_at, self.broken = terminate_at, truncate_at, broken
        self.observation_space = broken.get("observation_space", spaces.Box(-np.inf, np.inf, (2,), np.float32))
        self.action_space = broken.get("action_space", spaces.Box(-1.0, 1.0, (1,), np.float32))
        self.seeds: list[int | None] = []
        self.received: list[Any] = []
        self.closed = False
        self._observation = np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.t = 0
        self._observation[:] = 0.0, self.np_random.random()
        return self.broken.get("first_observation", self._observation), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self.t == self.broken.get("raise_at"):
            raise KeyError("joint")
        self.received.append(action)
        reward = self.broken.get("reward", 10.0 * self.t + np.ravel(action)[0])
        self.t += 1
        self._observation[0] = self.t  # the same array every time, as some environments do
        observation = self.broken.get("observation", self._observation)
        return observation, reward, self.t == self.terminate_at, self.t == self.truncate_at, {}

    def close(self) -> None:
        self.closed = True


def half(_: Any) -> Any:
    return np.array([0.5])


# ------------------------------------------------------------------------------------------------------------
# What is recorded
# ------------------------------------------------------------------------------------------------------------


def test_two_episodes_by_hand() -> None:
    env = Probe(terminate_at=3)
    data = collect(env, half, n_episodes=2)
    np.testing.assert_array_equal(data.observations[:, 0], [0, 1, 2, 3, 0, 1, 2, 3])
    np.testing.assert_array_equal(data.rewards, [0.5, 10.5, 20.5] * 2)
    np.testing.assert_array_equal(data.terminated, [False, False, True] * 2)
    assert not data.truncated.any()
    assert data.final_obs_known.all()
    assert data.observations[0, 1] != data.observations[4, 1]  # another reset seed


@pytest.mark.parametrize(
    ("terminate_at", "truncate_at", "ending"),
    [(3, None, "terminated"), (None, 3, "truncated"), (3, 3, "terminated")],
)
def test_both_flags_at_once_are_a_termination(terminate_at: int | None, truncate_at: int | None, ending: str) -> None:
    data = collect(Probe(terminate_at, truncate_at), half, n_episodes=1)
    assert data.terminated[-1] == (ending == "terminated")
    assert data.truncated[-1] == (ending == "truncated")


def test_last_episode_is_cut_at_n_steps_with_its_true_successor() -> None:
    data = collect(Probe(terminate_at=3), half, n_steps=5)
    np.testing.assert_array_equal(data.episode_lengths, [3, 2])
    np.testing.assert_array_equal(data.truncated, [False, False, False, False, True])
    rows = data.transitions("full")
    assert len(rows) == 5
    np.testing.assert_array_equal(rows.next_obs[:, 0], [1, 2, 3, 1, 2])
    assert data.info.provenance["cut_episodes"] == 1


def test_episode_that_ends_exactly_at_n_steps_is_not_cut() -> None:
    data = collect(Probe(terminate_at=3), half, n_steps=6)
    np.testing.assert_array_equal(data.terminated, [False, False, True] * 2)
    assert data.info.provenance["cut_episodes"] == 0


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 7), n_steps=st.integers(1, 25), seed=st.integers(0, 2**40))
def test_row_count_is_what_was_asked_for(length: int, n_steps: int, seed: int) -> None:
    data = collect(Probe(truncate_at=length), n_steps=n_steps, seed=seed)
    assert len(data) == n_steps
    assert data.n_episodes == -(-n_steps // length)
    np.testing.assert_array_equal(data.episode_lengths[:-1], length)


def test_environment_is_stepped_with_exactly_what_is_stored() -> None:
    env = Probe(truncate_at=4, action_space=spaces.Box(-1.0, 1.0, (1,), np.float64))
    generator = np.random.default_rng(0)
    data = collect(env, lambda _: generator.uniform(-1, 1, 1), n_episodes=1)
    assert {action.dtype for action in env.received} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(np.stack(env.received), data.actions.astype(np.float64))


def test_discrete_actions_are_stored_from_zero() -> None:
    env = Probe(truncate_at=4, action_space=spaces.Discrete(3, start=5))
    data = collect(env, lambda obs: 5 + int(obs[0]) % 3, n_episodes=1)
    assert env.received == [5, 6, 7, 5]
    np.testing.assert_array_equal(data.actions, [0, 1, 2, 0])
    assert data.n_actions == 3


def test_random_actions_are_uniform_over_an_uneven_box() -> None:
    low, high = np.array([-1.0, 2.0], np.float32), np.array([3.0, 2.5], np.float32)
    env = Probe(truncate_at=50, action_space=spaces.Box(low, high))
    actions = collect(env, n_steps=4000, seed=3).actions.astype(np.float64)
    assert ((actions >= low) & (actions <= high)).all()
    unit = (actions - low) / (high - low)
    # Standard errors of mean and variance of 4000 uniforms: 0.0046 and 0.0012; five of them.
    np.testing.assert_allclose(unit.mean(0), 0.5, atol=0.023)
    np.testing.assert_allclose(unit.var(0), 1 / 12, atol=0.006)


def test_random_discrete_actions_cover_the_space() -> None:
    data = collect(Probe(truncate_at=50, action_space=spaces.Discrete(3, start=-1)), n_steps=300)
    assert set(data.actions.tolist()) == {0, 1, 2}


# ------------------------------------------------------------------------------------------------------------
# Policies
# ------------------------------------------------------------------------------------------------------------


class Recurrent:
    """Acts on how many steps it remembers; written against Stable-Baselines3's signature."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, bool, bool]] = []

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        self.calls.append((state, bool(episode_start[0]), deterministic))
        memory = 0 if episode_start[0] else state
        return np.array([memory / 10]), memory + 1


def test_predict_gets_its_state_back_within_an_episode() -> None:
    policy = Recurrent()
    data = collect(Probe(truncate_at=3), policy, n_episodes=2, deterministic=True)
    np.testing.assert_allclose(data.actions[:, 0], [0.0, 0.1, 0.2] * 2, rtol=1e-6)
    assert policy.calls == [(None, True, True), (1, False, True), (2, False, True)] * 2


def draws_from_everywhere(_: Any) -> Any:
    return np.array([(random.random() + np.random.rand() + torch.rand(()).item()) / 3])  # noqa: NPY002


@pytest.mark.parametrize("policy", [None, draws_from_everywhere])
def test_same_seed_same_data(policy: Any) -> None:
    first, again, other = (
        collect(Probe(truncate_at=7), policy, n_steps=20, seed=seed).fingerprint for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_callers_global_generators_are_left_alone() -> None:
    def state() -> tuple[Any, ...]:
        numpy_state = np.random.get_state()  # noqa: NPY002
        return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()

    before = state()
    collect(Probe(truncate_at=7), draws_from_everywhere, n_steps=20)
    assert state() == before
    draws_from_everywhere(None)
    assert state() != before  # the comparison can fail


def test_reset_seeds_do_not_depend_on_the_policy_or_the_environments_own_use() -> None:
    envs = Probe(truncate_at=3), Probe(truncate_at=3)
    collect(envs[0], half, n_episodes=4, seed=9)
    collect(envs[1], None, n_episodes=4, seed=9)
    assert envs[0].seeds == envs[1].seeds
    assert len(set(envs[0].seeds)) == 4


# ------------------------------------------------------------------------------------------------------------
# Where the environment comes from
# ------------------------------------------------------------------------------------------------------------


def test_given_environment_stays_open_and_a_made_one_is_closed() -> None:
    env, made = Probe(truncate_at=2), Probe(truncate_at=2)
    collect(env, half, n_steps=1)
    collect(lambda: made, half, n_steps=1)
    assert (env.closed, made.closed) == (False, True)


def test_info_of_a_registered_environment() -> None:
    data = collect("HalfCheetah-v5", n_steps=10, seed=4)
    reference = REFERENCE_RETURNS["HalfCheetah-v5"]
    info = data.info
    assert (info.name, info.env_id, info.horizon) == ("halfcheetah-v5-random", "HalfCheetah-v5", 1000)
    assert (info.ref_min_score, info.ref_max_score) == (reference.min, reference.max)
    assert info.provenance["seed"] == 4
    assert {"gymnasium", "mujoco"} <= set(info.provenance)
    assert data.action_low is not None
    np.testing.assert_array_equal(data.action_low, -np.ones(6))


def test_info_without_references_or_simulator() -> None:
    info = collect("Pendulum-v1", half, n_steps=10, name="mine").info
    assert (info.name, info.ref_min_score, info.horizon) == ("mine", None, 200)
    assert "mujoco" not in info.provenance


# ------------------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------------------

BOX = spaces.Box(-1.0, 1.0, (1,), np.float32)


@pytest.mark.parametrize(
    ("env", "policy", "message"),
    [
        (Probe(3, raise_at=1), half, r"Probe, episode 0 \(reset seed \d+\): .* raised KeyError in step 1"),
        (Probe(3, reward=np.nan), half, r"step 0: the reward is nan"),
        (Probe(3, reward=np.ones(2)), half, r"step 0: the reward is array"),
        (Probe(3, reward=None), half, r"step 0: the reward is None"),
        (Probe(3, observation=np.array([0.0, np.inf])), half, r"step 0: the observation holds inf"),
        (Probe(3, observation=np.array([0.0, 1e39])), half, r"step 0: the observation holds inf"),
        (Probe(3, observation=np.zeros(3)), half, r"step 0: the observation is float64 of shape \[3\]"),
        (Probe(3, first_observation=np.full(2, np.nan)), half, r"reset: the observation holds nan"),
        (Probe(3), lambda _: np.array([1.5]), r"step 0: the policy chose 1.5 in dimension 0, outside"),
        (Probe(3), lambda _: np.array([np.nan]), r"the policy chose nan in dimension 0"),
        (Probe(3), lambda _: np.zeros((1, 1)), r"the policy chose float64 of shape \[1, 1\]"),
        (Probe(3, action_space=spaces.Discrete(2)), lambda _: 2, r"the policy chose 2, outside"),
        (Probe(3, action_space=spaces.Discrete(2)), lambda _: 0.5, r"the policy chose 0.5, outside"),
        (Probe(3, action_space=spaces.MultiBinary(2)), None, r"action space MultiBinary\(2\); supported"),
        (Probe(3, action_space=spaces.Box(-1, np.inf, (1,))), None, r"unbounded action space"),
        (Probe(3, observation_space=spaces.Discrete(4)), None, r"FlattenObservation"),
        (Probe(3, observation_space=spaces.Dict({"a": BOX})), None, r"FlattenObservation"),
        ("NoSuchEnv-v0", None, r"The environment 'NoSuchEnv-v0' cannot be made"),
        (lambda: 3, None, r"A builtins.int is no gymnasium environment"),
        (3, None, r"A builtins.int is no gymnasium environment"),
        (lambda: gymnasium.make_vec("CartPole-v1", 2), None, r"vectorised"),
    ],
)
def test_trouble_is_one_sentence_that_says_where(env: Any, policy: Any, message: str) -> None:
    with pytest.raises(CorollaryError, match=message) as caught:
        collect(env, policy, n_steps=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [{}, {"n_steps": 5, "n_episodes": 5}, {"n_steps": 0}, {"n_episodes": -1}])
def test_length_must_be_given_once_and_be_positive(length: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        collect(Probe(3), half, **length)


def test_environment_that_was_made_is_closed_after_an_error() -> None:
    made = Probe(3, raise_at=1)
    with pytest.raises(CorollaryError):
        collect(lambda: made, half, n_steps=5)
    assert made.closed
