"""Evaluation: every policy plays the same episodes, divided in advance; what is counted, closed, refused."""

from collections import Counter
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from corollary.core import evaluation
from corollary.core.dataset import Dataset, DatasetInfo
from corollary.core.errors import ConfigError, CorollaryError, EnvironmentMismatchError
from corollary.core.evaluation import FIRST_EPISODE_SEED, evaluate
from corollary.offline import BC, IQL

SMALL = {"hidden": (16, 16), "batch_size": 8}


class Uneven(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A walk pushed by the action, whose episode has 1 to 5 steps depending on the reset seed.

    Short episodes finish first: an evaluation that took whatever finishes first would count too many of them.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gymnasium.spaces.Box(np.array([-1, 0], np.float32), np.array([1, 3], np.float32))
    log: list[str | int]  # reset seeds, and "closed"

    def __init__(self, log: list[str | int] | None = None, bad_reward: float | None = None) -> None:
        self.log = [] if log is None else log
        self.bad_reward = bad_reward

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        assert seed is not None
        self.log.append(seed)
        self.length, self.step_count = 1 + seed % 5, 0
        self.position = self.np_random.normal(size=3)
        return self.position.astype(np.float32), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        assert self.step_count < self.length, "stepped after the end"
        self.step_count += 1
        self.position += self.np_random.normal(size=3) * action.sum()
        reward = float(self.position.sum())
        if self.bad_reward is not None and self.step_count == 3:
            reward = self.bad_reward
        ended = self.step_count == self.length
        return self.position.astype(np.float32), reward, ended and self.length % 2 == 0, ended, {}

    def close(self) -> None:
        self.log.append("closed")


def walks(info: DatasetInfo | None = None) -> Dataset:
    rng = np.random.default_rng(0)
    truncated = np.arange(40) % 4 == 3
    actions = rng.uniform([-1, 0], [1, 3], (40, 2))
    return Dataset.from_arrays(
        rng.normal(size=(40, 3)), actions, rng.normal(size=40), np.zeros(40, bool), truncated,
        action_low=[-1, 0], action_high=[1, 3], info=info,
    )  # fmt: skip


@pytest.fixture(scope="module")
def agent() -> BC:
    return BC(seeds=[5, 0, 2], learning_rate=0.1, **SMALL).fit(walks(), 5)


def played_alone(agent: BC, index: int, seed: int) -> tuple[float, int]:
    """One episode of one seed's policy, in the plainest way there is."""
    policy, env = agent.select(index), Uneven()
    obs, _ = env.reset(seed=seed)
    total, steps, ended = 0.0, 0, False
    while not ended:
        obs, reward, terminated, truncated, _ = env.step(policy.predict(obs)[0])
        total, steps, ended = total + reward, steps + 1, terminated or truncated
    return total, steps


@pytest.mark.parametrize("parallel", [1, 4, 16, 1000])
def test_every_policy_plays_every_episode_once(agent, parallel) -> None:
    log: list[str | int] = []
    result = evaluate(agent, lambda: Uneven(log), 7, parallel=parallel)
    assert result.env_id == "Uneven"
    assert result.episode_seeds == tuple(range(FIRST_EPISODE_SEED, FIRST_EPISODE_SEED + 7))
    assert result.returns_SE.shape == result.lengths_SE.shape == (3, 7)
    resets = Counter(entry for entry in log if entry != "closed")
    assert resets == dict.fromkeys(result.episode_seeds, 3)
    for s in range(3):
        for e, seed in enumerate(result.episode_seeds):
            total, steps = played_alone(agent, s, seed)
            assert result.lengths_SE[s, e] == steps
            assert result.returns_SE[s, e] == pytest.approx(total, rel=1e-5)
    assert len(np.unique(result.returns_SE[:, 4])) == 3  # control: the policies do differ


def test_the_first_episodes_to_finish_would_be_another_sample(agent) -> None:
    """The control of the division in advance: here the first seven to finish are shorter than the seven asked for."""
    lengths = evaluate(agent, Uneven, 7).lengths_SE[0]
    at_once = np.sort(1 + np.arange(FIRST_EPISODE_SEED, FIRST_EPISODE_SEED + 21) % 5)[:7]
    assert at_once.mean() < lengths.mean() - 1


def test_the_same_call_gives_the_same_bits_and_changes_nothing(agent) -> None:
    before = {name: tensor.clone() for name, tensor in agent.networks.state_dict().items()}
    global_state = torch.get_rng_state()
    first, second = evaluate(agent, Uneven, 6), evaluate(agent, Uneven, 6)
    assert np.array_equal(first.returns_SE, second.returns_SE)
    assert np.array_equal(first.lengths_SE, second.lengths_SE)
    assert all(torch.equal(before[name], tensor) for name, tensor in agent.networks.state_dict().items())
    assert torch.equal(global_state, torch.get_rng_state())
    other = evaluate(agent, Uneven, 6, first_seed=3)
    assert other.episode_seeds == (3, 4, 5, 6, 7, 8)
    assert not np.array_equal(other.returns_SE, first.returns_SE)


def test_sampled_actions_come_from_a_stream_of_their_own() -> None:
    agent = IQL(seeds=2, **SMALL).fit(walks(), 2)
    mean = evaluate(agent, Uneven, 5).returns_SE
    first, second = (evaluate(agent, Uneven, 5, deterministic=False).returns_SE for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, mean)


@pytest.mark.parametrize("source", ["id", "factory", "object"])
def test_environments_by_id_by_factory_and_as_an_object(pendulum, source) -> None:
    agent = BC(seeds=2, **SMALL).fit(pendulum, 2)
    sources = {
        "id": "Pendulum-v1",
        "factory": lambda: gymnasium.make("Pendulum-v1"),
        "object": gymnasium.make("Pendulum-v1"),
    }
    result = evaluate(agent, sources[source], 2)
    assert result.env_id == "Pendulum-v1"
    assert (result.lengths_SE == 200).all()
    np.testing.assert_allclose(result.returns_SE, evaluate(agent, "Pendulum-v1", 2).returns_SE, rtol=1e-5)


@pytest.mark.parametrize(("parallel", "n_made"), [(2, 2), (100, 6)])
def test_environments_made_are_closed_and_those_lent_stay_open(agent, parallel, n_made) -> None:
    log: list[str | int] = []
    evaluate(agent, lambda: Uneven(log), 2, parallel=parallel)
    assert log.count("closed") == n_made
    lent = Uneven()
    evaluate(agent, lent, 2)
    assert "closed" not in lent.log


def test_scores_need_the_references_of_the_same_environment() -> None:
    references = {"name": "walks", "ref_min_score": 10.0, "ref_max_score": 30.0, "score_source": "made up"}
    here = BC(**SMALL).fit(walks(DatasetInfo(env_id="Uneven", **references)), 1)
    elsewhere = BC(**SMALL).fit(walks(DatasetInfo(env_id="Uneven-v2", **references)), 1)
    without = BC(**SMALL).fit(walks(DatasetInfo("walks", "Uneven")), 1)
    result = evaluate(here, Uneven, 3)
    np.testing.assert_allclose(result.scores_SE, 100 * (result.returns_SE - 10) / 20)
    np.testing.assert_allclose(result.mean_score, 100 * (result.mean_return - 10) / 20)
    for agent in (elsewhere, without):
        assert evaluate(agent, Uneven, 3).scores_SE is None
        assert evaluate(agent, Uneven, 3).mean_score is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_is_named(agent, value) -> None:
    log: list[str | int] = []
    with pytest.raises(CorollaryError, match=rf"^Uneven, step 3 .* seed 100000[234]: the reward {value} is not finite"):
        evaluate(agent, lambda: Uneven(log, bad_reward=value), 5)
    assert log.count("closed") == 15


class Broken(Uneven):
    """The walk, with something wrong from the third step on."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        if self.what == "reset":
            raise RuntimeError("no memory")
        return super().reset(seed=seed)

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        if self.step_count == 3 and self.what == "step":
            raise RuntimeError("no contact")
        if self.step_count == 3 and self.what == "observation":
            obs[1] = np.nan
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("reset", r"^Broken, step 0 .* seed 1000000: the environment raised RuntimeError in reset: no memory"),
        ("step", r"^Broken, step 2 .* seed 100000\d: the environment raised RuntimeError in step: no contact"),
        ("observation", r"^Broken, step 3 .* seed 100000\d: the observation \[.* nan .*\] is not finite"),
    ],
)
def test_what_an_environment_raises_or_shows_is_one_sentence_that_says_where(agent, what, said) -> None:
    with pytest.raises(CorollaryError, match=said):
        evaluate(agent, lambda: Broken(what), 5)


@pytest.mark.parametrize("factor", [np.nan, np.inf, 1e38])  # with the last one the actions alone are not finite
def test_a_seed_that_has_diverged_is_named_and_the_others_play_on(factor) -> None:
    agent = BC(seeds=[5, 0, 2], **SMALL).fit(walks(), 1)
    expected = [evaluate(agent.select(index), Uneven, 5) for index in (0, 2)]
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter[1] *= factor  # of seed 0 alone
    assert agent.diverged().tolist() == [False, bool(factor != 1e38), False]
    log: list[str | int] = []
    said = (
        r"^offline\.bc has diverged \(seed 0\): networks or actions are not finite, so it has no returns in Uneven\. "
        r"Load an earlier checkpoint, or train anew with smaller step sizes\.$"
    )
    with pytest.warns(RuntimeWarning, match=said):
        found = evaluate(agent, lambda: Uneven(log), 5, parallel=4)
    assert np.isnan(found.returns_SE[1]).all()
    assert found.lengths_SE[[0, 2]].sum() == 30
    for row, alone in zip((0, 2), expected, strict=True):
        np.testing.assert_allclose(found.returns_SE[row], alone.returns_SE[0], rtol=1e-5)
    assert log.count("closed") == 4
    with pytest.raises(CorollaryError, match=said):
        evaluate(agent.select(1), Uneven, 5)


class Endless(Uneven):
    """The walk without an end."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        obs, info = super().reset(seed=seed)
        self.length = 10**9
        return obs, info


def test_an_episode_that_never_ends_is_an_error_and_a_time_limit_the_remedy(agent, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "LONGEST_EPISODE", 20)
    with pytest.raises(CorollaryError, match=r"^Endless, step 20 .* goes on, .*wrap it in .*TimeLimit\.$"):
        evaluate(agent, Endless, 1)
    gymnasium.register("Endless-v0", Endless)
    try:
        limited = evaluate(agent, lambda: gymnasium.make("Endless-v0", max_episode_steps=30), 1)
    finally:
        del gymnasium.registry["Endless-v0"]
    assert (limited.lengths_SE == 30).all()
    # The same remedy where there is no registration that could state the limit.
    wrapped = evaluate(agent, lambda: gymnasium.wrappers.TimeLimit(Endless(), 30), 1)
    assert np.array_equal(wrapped.returns_SE, limited.returns_SE)


def test_a_function_that_returns_one_environment_again_and_again_is_refused(agent) -> None:
    log: list[str | int] = []
    one = Uneven(log)
    with pytest.raises(ConfigError, match="returned the same environment twice"):
        evaluate(agent, lambda: one, 2)
    assert "closed" in log
    assert evaluate(agent, one, 2).lengths_SE.min() >= 1  # given itself it plays one episode after the other


def test_what_was_made_is_closed_when_the_making_fails(agent) -> None:
    logs: list[list[str | int]] = []

    def make() -> Uneven:
        if len(logs) == 3:
            raise OSError("no more licences")
        logs.append([])
        return Uneven(logs[-1])

    with pytest.raises(OSError, match="no more licences"):
        evaluate(agent, make, 4)
    assert [log[-1] for log in logs] == ["closed"] * 3
    parts = [Uneven() for _ in range(2)]
    with pytest.raises(EnvironmentMismatchError, match="vectorised"):
        evaluate(agent, lambda: gymnasium.vector.SyncVectorEnv([lambda part=part: part for part in parts]), 1)
    assert all(part.log == ["closed"] for part in parts)


class Changed(Uneven):
    """The walk with other spaces."""

    def __init__(self, **spaces: gymnasium.Space[Any]) -> None:
        super().__init__()
        self.__dict__.update(spaces)


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        (
            {"observation_space": gymnasium.spaces.Box(-1, 1, (4,))},
            r"Changed has observation space Box.*\(4,\).*'arrays' has observations of shape \(3,\)",
        ),
        (
            {"action_space": gymnasium.spaces.Box(-1, 1, (1,))},
            r"Changed has action space Box.*'arrays' has actions of shape \(2,\)",
        ),
        (
            {"action_space": gymnasium.spaces.Discrete(3)},
            r"action space Discrete\(3\).*'arrays' has actions of shape \(2,\)",
        ),
        (
            {"action_space": gymnasium.spaces.Box(-1, 1, (2,))},
            r"bounds \[-1\.0, -1\.0\]\.\.\[1\.0, 1\.0\].*'arrays' has \[-1\.0, 0\.0\]\.\.\[1\.0, 3\.0\]",
        ),
    ],
)
def test_an_environment_with_other_spaces_is_named_with_both(agent, spaces, message) -> None:
    with pytest.raises(EnvironmentMismatchError, match=message):
        evaluate(agent, lambda: Changed(**spaces), 2)


@pytest.mark.parametrize(
    "space",
    [
        gymnasium.spaces.Box(-1, 1, (3, 1)),
        gymnasium.spaces.Box(-1, 1, (1, 1, 3)),
        gymnasium.spaces.Dict({"a": gymnasium.spaces.Box(-1, 1, (1,)), "b": gymnasium.spaces.Box(-1, 1, (2,))}),
    ],
)
def test_observations_that_only_need_flattening_are_told_so(agent, space) -> None:
    with pytest.raises(
        EnvironmentMismatchError, match=r"wrap the environment in gymnasium\.wrappers\.FlattenObservation\.$"
    ):
        evaluate(agent, lambda: Changed(observation_space=space), 2)
    agent.check_environment(gymnasium.wrappers.FlattenObservation(Changed(observation_space=space)))


def test_the_environment_that_fits_is_named_where_it_is_known(pendulum) -> None:
    agent = BC(**SMALL).fit(pendulum, 1)
    with pytest.raises(EnvironmentMismatchError, match=r"the environment that the data came from \(Pendulum-v1\)"):
        evaluate(agent, Uneven, 2)


def test_other_bad_arguments_are_named(agent) -> None:
    with pytest.raises(CorollaryError, match="at least one episode, a whole number; got episodes=0"):
        evaluate(agent, Uneven, 0)
    with pytest.raises(EnvironmentMismatchError, match=r"A builtins\.str is no gymnasium environment"):
        evaluate(agent, lambda: "Pendulum-v1", 1)
    with pytest.raises(EnvironmentMismatchError, match="'NoSuchEnv-v0' cannot be made"):
        evaluate(agent, "NoSuchEnv-v0", 1)
    with pytest.raises(EnvironmentMismatchError, match="CartPole-v1 is vectorised"):
        evaluate(agent, lambda: gymnasium.make_vec("CartPole-v1", 2), 1)  # type: ignore[arg-type, return-value]
    with pytest.raises(CorollaryError, match="at least one environment; got parallel=0"):
        evaluate(agent, Uneven, 1, parallel=0)
    with pytest.raises(CorollaryError, match="has not learnt yet"):
        evaluate(BC(), Uneven, 1)
