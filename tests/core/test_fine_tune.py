"""Offline to online: nothing is lost on the switch, the mix of rows is exact, a stopped run goes on to the bit."""

import functools
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from corollary.core import checkpoint
from corollary.core.collect import collect
from corollary.core.dataset import Dataset
from corollary.core.errors import CheckpointError, ConfigError, CorollaryError, EnvironmentMismatchError
from corollary.core.offline_agent import OfflineAgent
from corollary.core.runs import group_runs, read_runs
from corollary.offline import IQL, PRDC, TD3BC

ENV = "Reacher-v5"
SMALL: dict[str, Any] = {"hidden": (16, 16), "batch_size": 8}
SEEDS = [11, 3]

Agent = OfflineAgent[Any]


@pytest.fixture(scope="module")
def reacher() -> Dataset:
    return collect(ENV, n_steps=300, seed=0, progress=False)


def state_of(agent: Agent, folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(agent.save(folder / f"state of {id(agent)}"))[1]


def learnt(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("extra/")}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name].nan_to_num(-1e9), b[name].nan_to_num(-1e9)) for name in a)


# -- The switch


def test_a_policy_whose_step_size_fell_to_zero_learns_online(reacher) -> None:
    agent = IQL(1, **SMALL, actor_lr_decay_steps=5).fit(reacher, 6)
    before = [parameter.clone() for parameter in agent.actor.parameters()]
    agent.fit(reacher, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.actor.parameters(), strict=True))
    agent.learn(ENV, 2)
    assert not any(torch.equal(a, b) for a, b in zip(before, agent.actor.parameters(), strict=True))


def test_the_transforms_keep_their_constants(reacher) -> None:
    agent = IQL(SEEDS, state_transform="standardize", **SMALL).fit(reacher, 3)
    before = {name: agent.description()[name] for name in ("state_transform", "reward_transform", "config", "problem")}
    agent.learn(ENV, 60)
    assert {name: agent.description()[name] for name in before} == before


def test_phases_can_alternate(reacher) -> None:
    agent = TD3BC(SEEDS, **SMALL).fit(reacher, 3)
    assert not agent.online_phase
    agent.learn(ENV, 4)
    assert agent.online_phase
    agent.fit(reacher, 2)
    assert not agent.online_phase
    assert (agent.step, agent.clock) == (9, 9)
    agent.learn(ENV, 4, gradient_steps=3)
    assert (agent.step, agent.clock) == (21, 8)


# -- What is remembered


class Corridor(gymnasium.Env[Any, Any]):
    """Position t = 0, 1, ...; reward 10 t; terminates at t = 3 in even episodes, is cut there in odd ones."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,))
    action_space = spaces.Box(-2.0, 2.0, (1,))

    def __init__(self) -> None:
        self.episode = -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return np.array([0.0], np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        ended, even = self.t == 3, self.episode % 2 == 0
        return np.array([self.t], np.float32), 10.0 * self.t, ended and even, ended and not even, {}


def corridor_data(low: float = -2.0, high: float = 2.0) -> Dataset:
    """Observations with mean 2 and standard deviation 1, returns 0 and 500: rewards are halved... times 2."""
    n = 40
    ends = np.ones(n, dtype=bool)
    obs = np.tile([1.0, 3.0], n // 2)
    return Dataset.from_arrays(
        obs[:, None],
        np.random.default_rng(0).uniform(low, high, (n, 1)),
        np.where(np.arange(n) % 2 == 0, 0.0, 500.0),
        ends,
        ~ends,
        action_low=low,
        action_high=high,
    )


def test_experience_is_stored_in_the_coordinates_of_the_data() -> None:
    agent = IQL(1, state_transform="standardize", **SMALL).fit(corridor_data(), 1)
    agent.learn(Corridor, 7, offline_share=0.5)
    assert agent.experience is not None
    rows = agent.experience.replay.gather(torch.arange(7)[None])
    t = torch.tensor([0, 1, 2, 0, 1, 2, 0.0])
    torch.testing.assert_close(rows.obs[0, :, 0], (t - 2) / 1.001)  # std + 1e-3
    torch.testing.assert_close(rows.next_obs[0, :, 0], (t + 1 - 2) / 1.001)  # the true successor, at the ends too
    torch.testing.assert_close(rows.reward[0], 10 * (t + 1) * 1000 / 500)  # return_range: 1000 / (500 - 0)
    assert rows.terminated[0].tolist() == [0, 0, 1, 0, 0, 0, 0]  # the second episode was cut, which ends nothing
    assert list(agent.recent_returns[0]) == [10 + 20 + 30, 60]


def rows_by_origin(agent: Agent, n_batches: int) -> torch.Tensor:
    """Which rows of `n_batches` batches are logged, ``[n_batches, S, B]``."""
    assert agent.experience is not None
    return torch.stack([agent.experience.batch(1000 + i).index >= 0 for i in range(n_batches)])


@pytest.mark.parametrize(("share", "logged"), [(0.0, 0), (0.25, 2), (0.5, 4), (0.8, 6), (1.0, 8)])
def test_the_share_of_logged_rows_is_exact(reacher, share, logged) -> None:
    agent = TD3BC(SEEDS, **SMALL).fit(reacher, 1).learn(ENV, 5, offline_share=share)
    assert (rows_by_origin(agent, 20).sum(-1) == logged).all()  # round(0.8 * 8) = 6


def test_without_a_share_every_row_ever_seen_is_as_likely() -> None:
    # 40 logged rows and 10 experienced ones: 4/5 of the rows drawn are logged. 3 sigma of 2 x 500 x 8 draws: 0.0134.
    agent = TD3BC(SEEDS, **SMALL).fit(corridor_data(), 1).learn(Corridor, 10)
    assert rows_by_origin(agent, 500).double().mean().item() == pytest.approx(0.8, abs=0.0134)


def test_rows_are_what_their_index_says(reacher) -> None:
    agent = TD3BC(SEEDS, **SMALL).fit(reacher, 1).learn(ENV, 5, offline_share=0.5)
    assert agent.experience is not None
    assert agent.data is not None
    batch = agent.experience.batch(77)
    rows = agent.data.gather(batch.index[:, :4])
    for name in ("obs", "action", "reward", "next_obs", "terminated", "next_action", "next_action_valid"):
        assert torch.equal(getattr(batch, name)[:, :4], getattr(rows, name)), name
    assert (batch.index[:, 4:] == -1).all()
    assert not batch.next_action_valid[:, 4:].any()
    lived = agent.experience.replay.gather(torch.arange(5).expand(2, -1))
    for seed in range(2):  # every experienced row of the batch is one of the five
        equal = (batch.obs[seed, 4:, None] == lived.obs[seed]).all(-1) & (
            batch.action[seed, 4:, None] == lived.action[seed]
        ).all(-1)
        assert (equal.sum(1) == 1).all()


# -- Exploration


def test_a_deterministic_policy_explores_by_noise_and_a_stochastic_one_samples(reacher) -> None:
    def actions(agent: Agent, **options: Any) -> torch.Tensor:
        agent.fit(reacher, 1)
        with pytest.warns(UserWarning, match="ends at step 40, before the first gradient step"):
            agent.learn(ENV, 40, learning_starts=100, **options)
        assert agent.experience is not None
        lived = agent.experience.replay.gather(torch.arange(40)[None])
        with torch.no_grad():
            return lived.action - agent.box.clip(agent.policy(lived.obs, None))  # beside the deterministic action

    assert actions(TD3BC(1, **SMALL), exploration_noise=0.0).abs().max() < 1e-6
    # Half-range 1; few actions of an untrained policy are clipped. 40 x 2 numbers: sigma is known to about 8 %.
    assert actions(TD3BC(1, **SMALL), exploration_noise=0.05).std().item() == pytest.approx(0.05, rel=0.25)
    assert actions(IQL(1, **SMALL), exploration_noise=0.0).std() > 0.3  # log_std is 0 at the start: clipped N(m, 1)


# -- Exact state


@pytest.mark.parametrize("kind", [IQL, PRDC])
@pytest.mark.parametrize("share", [None, 0.5])
def test_stopped_and_resumed_is_never_stopped(kind, share, reacher, tmp_path) -> None:
    options = {"offline_share": share, "buffer_size": 20}  # the ring is full after 20 steps
    whole = kind(SEEDS, **SMALL).fit(reacher, 5).learn(ENV, 70, **options)  # episodes have 50 steps
    half = kind(SEEDS, **SMALL).fit(reacher, 5).learn(ENV, 30, **options)
    again = kind.load(half.save(tmp_path / "half")).learn(ENV, 40, dataset=reacher, **options)
    assert same_bits(state_of(again, tmp_path), state_of(whole, tmp_path))
    assert not same_bits(state_of(half, tmp_path), state_of(whole, tmp_path))
    assert len(whole.recent_returns[0]) == 1


def test_a_run_directory_resumes(reacher, tmp_path) -> None:
    def begun() -> Agent:
        return TD3BC(SEEDS, **SMALL).fit(reacher, 5)

    options: dict[str, Any] = {"run_dir": tmp_path / "run", "save_every": 10, "log_every": 10}
    whole = begun().learn(ENV, 60)
    begun().learn(ENV, 30, **options)
    resumed = begun().learn(ENV, 60, resume=True, **options)
    assert (resumed.clock, resumed.step) == (60, 65)
    assert same_bits(state_of(resumed, tmp_path), state_of(whole, tmp_path))


def test_a_seed_alone_is_the_same_run_as_among_others(reacher, tmp_path) -> None:
    options = SMALL | {"precision": "float64"}
    together = IQL(SEEDS, **options).fit(reacher, 5).learn(ENV, 20).select(1)
    alone = IQL([SEEDS[1]], **options).fit(reacher, 5).learn(ENV, 20)
    a, b = state_of(together, tmp_path), state_of(alone, tmp_path)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-7, atol=1e-7, equal_nan=True)


def test_learning_again_goes_on_in_the_same_episode(reacher, tmp_path) -> None:
    once = TD3BC(SEEDS, **SMALL).fit(reacher, 5).learn(ENV, 30)
    twice = TD3BC(SEEDS, **SMALL).fit(reacher, 5).learn(ENV, 12).learn(ENV, 18)
    assert same_bits(state_of(once, tmp_path), state_of(twice, tmp_path))


def test_another_number_of_environments_begins_new_episodes(reacher) -> None:
    agent = TD3BC(1, **SMALL).fit(reacher, 2).learn(ENV, 7).learn(ENV, 8, n_envs=2)
    assert (agent.clock, agent.experience.replay.sizes.tolist()) == (15, [15])


@pytest.mark.parametrize(
    ("option", "value"), [("buffer_size", 10), ("offline_share", 0.5), ("gradient_steps", 2), ("n_envs", 2)]
)
def test_a_run_is_resumed_with_its_own_settings_alone(option, value, reacher, tmp_path) -> None:
    TD3BC(1, **SMALL).fit(reacher, 2).learn(ENV, 5, run_dir=tmp_path / "run", buffer_size=100)
    resumed = TD3BC(1, **SMALL).fit(reacher, 2)
    with pytest.raises(CheckpointError, match=f"another run: its {option} is .*, here it is {value}"):
        resumed.learn(ENV, 8, run_dir=tmp_path / "run", resume=True, **{"buffer_size": 100, option: value})
    assert TD3BC.load(tmp_path / "run" / "checkpoint").clock == 5  # the checkpoint is as it was


def test_the_card_tells_fine_tunings_apart_and_pools_repetitions(reacher, tmp_path) -> None:
    def run(name: str, seed: int, offline_steps: int, **options: Any) -> None:
        agent = TD3BC([seed], **SMALL).fit(reacher, offline_steps)
        agent.learn(ENV, 3, run_dir=tmp_path / name, eval_env=ENV, eval_episodes=1, **options)

    run("one", 0, 2)
    run("again", 1, 2)
    run("longer", 0, 3)
    run("other", 0, 2, gradient_steps=2)
    TD3BC([0], **SMALL).fit(reacher, 3, run_dir=tmp_path / "fit", eval_env=ENV, eval_episodes=1)
    runs, damaged = read_runs(tmp_path)
    assert not damaged
    groups = [sorted(run.path.name for run in group.runs) for group in group_runs(runs)]
    assert sorted(groups) == [["again", "one"], ["fit"], ["longer"], ["other"]]


# -- Bad input


def test_a_run_of_fit_is_not_resumed_by_learn(reacher, tmp_path) -> None:
    TD3BC(1, **SMALL).fit(reacher, 2, run_dir=tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a run of fit"):
        TD3BC(1, **SMALL).fit(reacher, 2).learn(ENV, 5, run_dir=tmp_path / "run", resume=True)


def test_a_run_of_learn_is_not_resumed_by_fit(reacher, tmp_path) -> None:
    TD3BC(1, **SMALL).fit(reacher, 2).learn(ENV, 2, run_dir=tmp_path / "run")
    agent = TD3BC(1, **SMALL).fit(reacher, 2)
    before = state_of(agent, tmp_path)
    with pytest.raises(CheckpointError, match="holds a run of learn, which fit cannot resume"):
        agent.fit(reacher, 9, run_dir=tmp_path / "run", resume=True)
    assert same_bits(state_of(agent, tmp_path), before)


@pytest.mark.parametrize("learnt", [False, True])
def test_resuming_what_is_not_there_is_refused_where_no_step_is_left(reacher, tmp_path, learnt) -> None:
    agent = TD3BC(1, **SMALL).fit(reacher, 5)
    go_on = functools.partial(agent.fit, reacher)
    if learnt:
        agent.learn(ENV, 5)
        go_on = functools.partial(agent.learn, ENV)
    said = r"new holds no run to continue, and this agent has taken 5 steps: .* Leave out resume to take \d more\."
    for n_steps in (3, 5):
        with pytest.raises(ConfigError, match=said):
            go_on(n_steps, run_dir=tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    go_on(6, run_dir=tmp_path / "new", resume=True)
    assert agent.clock == 6


def test_a_run_of_learn_is_not_resumed_with_other_data(reacher, tmp_path) -> None:
    """Neither where the data's own scales differ, which would mix two coordinate systems, nor where they do not."""

    def other(scale: float) -> Dataset:
        parts = (reacher.observations[:200], reacher.actions[:200], scale * reacher.rewards[:200])
        return Dataset.from_arrays(*parts, np.zeros(200, bool), np.arange(200) % 50 == 49)

    IQL(1, **SMALL).fit(reacher, 2).learn(ENV, 3, run_dir=tmp_path / "run")
    with pytest.raises(CheckpointError, match="has other reward or state transforms than the data of this agent"):
        IQL(1, **SMALL).fit(other(10), 2).learn(ENV, 5, run_dir=tmp_path / "run", resume=True)
    plain = SMALL | {"state_transform": "none"}
    TD3BC(1, **plain).fit(reacher, 2).learn(ENV, 3, run_dir=tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"is another run: its dataset\.fingerprint"):
        TD3BC(1, **plain).fit(other(1), 2).learn(ENV, 5, run_dir=tmp_path / "plain", resume=True)
    TD3BC(1, **plain).fit(reacher, 2).learn(ENV, 5, run_dir=tmp_path / "plain", resume=True)


def test_a_refused_environment_leaves_nothing_behind(reacher) -> None:
    agent = TD3BC(1, **SMALL).fit(reacher, 1)
    with pytest.raises(EnvironmentMismatchError):
        agent.learn("Pendulum-v1", 1, buffer_size=10)
    assert agent.experience is None
    agent.learn(ENV, 1, buffer_size=1000)
    # Nor does it change what there is: the episodes, the environments, the settings.
    lived, before, environments = agent.experience, agent.description(), agent.environments
    for source, options, error in (
        ("Pendulum-v1", {"buffer_size": 1000, "gradient_steps": 3, "n_envs": 2}, EnvironmentMismatchError),
        (ENV, {"buffer_size": 10, "n_envs": 2}, ConfigError),
    ):
        with pytest.raises(error):
            agent.learn(source, 1, **options)
        assert agent.experience is lived
        assert agent.environments is environments
        assert agent.description() == before


def test_a_refused_call_of_learn_leaves_nothing_behind(reacher, tmp_path) -> None:
    agent = TD3BC(1, **SMALL).fit(reacher, 5)
    before = agent.description()
    for arguments, error in (
        ({"n_steps": 0}, ConfigError),
        ({"n_steps": 5, "eval_env": "Pendulum-v1"}, EnvironmentMismatchError),
    ):
        with pytest.raises(error):
            agent.learn(ENV, **arguments)
        assert agent.experience is None
        assert agent.description() == before
    agent.fit(reacher, 2, run_dir=tmp_path / "run")
    agent.fit(reacher, 2).learn(ENV, 1)
    before = agent.description()
    with pytest.raises(CheckpointError, match="holds a run of fit"):
        agent.learn(ENV, 5, run_dir=tmp_path / "run", resume=True)
    assert agent.description() == before
    assert agent.step == 10


class Counted(gymnasium.Wrapper[Any, Any, Any, Any]):
    """The environment of the tests; it counts how many of its kind are open."""

    open = 0

    def __init__(self) -> None:
        super().__init__(gymnasium.make(ENV))
        Counted.open += 1

    def close(self) -> None:
        super().close()
        Counted.open -= 1


@pytest.mark.parametrize("has_learnt", [False, True])
def test_a_call_of_learn_refused_after_it_entered_leaves_nothing_behind(reacher, tmp_path, has_learnt) -> None:
    plain = SMALL | {"state_transform": "none", "k": 5}
    other, few = (collect(ENV, n_steps=n, seed=1, progress=False) for n in (100, 4))
    PRDC(1, **plain).fit(other, 3).learn(ENV, 3, run_dir=tmp_path / "other")
    agent = PRDC(1, **plain).fit(reacher, 2)
    if has_learnt:
        agent.learn(Counted, 2)
    before, description = state_of(agent, tmp_path), agent.description()
    bound = agent.data, agent.dataset_card, agent.sampler, agent.experience, agent._neighbours
    n_open = Counted.open
    for arguments, error, said in (
        ({"run_dir": tmp_path / "other"}, ConfigError, "already holds a run"),
        ({"run_dir": tmp_path / "other", "resume": True}, ConfigError, r"its dataset\.fingerprint"),
        ({"dataset": few}, ConfigError, "k must be at most the number of rows, 4"),
        ({"dataset": other, "run_dir": tmp_path / "other"}, ConfigError, "already holds a run"),
    ):
        with pytest.raises(error, match=said):
            agent.learn(Counted, 9, **arguments)
        assert Counted.open == n_open
        assert agent.description() == description
        assert same_bits(state_of(agent, tmp_path), before)
        now = agent.data, agent.dataset_card, agent.sampler, agent.experience, agent._neighbours
        assert all(a is b for a, b in zip(now, bound, strict=True))
    agent.learn(Counted, 1)
    assert Counted.open == 1
    agent.experience.leave()
    assert Counted.open == 0


def test_mistakes_are_named(reacher, tmp_path) -> None:
    with pytest.raises(CorollaryError, match="TD3BC has not learnt yet: call fit"):
        TD3BC(1, **SMALL).learn(ENV, 1)
    agent = TD3BC(1, **SMALL).fit(reacher, 1)
    with pytest.raises(CorollaryError, match="has seen no environment yet: call learn"):
        _ = agent.recent_returns
    for name, value, allowed in (
        ("offline_share", 1.5, r"in \[0, 1\], or None"),
        ("gradient_steps", 0, "at least 1"),
        ("n_envs", 0, "at least 1"),
        ("buffer_size", 0, "at least 1"),
        ("learning_starts", -1, ">= 0"),
        ("exploration_noise", -0.1, ">= 0"),
        ("exploration_noise", float("inf"), "of type float, finite"),
        ("gradient_steps", 1.5, "of type int"),
        ("n_envs", 1.0, "of type int"),
        ("buffer_size", 1e4, "of type int"),
        ("learning_starts", 2.5, "of type int"),
    ):
        with pytest.raises(ConfigError, match=rf"{name} must be {allowed}; got {value}"):
            agent.learn(ENV, 1, **{name: value})
    with pytest.raises(EnvironmentMismatchError, match="Pendulum-v1 has observation space"):
        agent.learn("Pendulum-v1", 1)
    agent.learn(ENV, 2)
    with pytest.raises(ConfigError, match=r"buffer_size was 1000000 .* cannot become 7"):
        agent.learn(ENV, 1, buffer_size=7)
    loaded = TD3BC.load(agent.save(tmp_path / "agent"))
    with pytest.raises(ConfigError, match="does not hold its dataset: pass learn"):
        loaded.learn(ENV, 1)
    loaded.learn(ENV, 1, offline_share=0.0)
