"""Environments of online agents: true successors through every path, exact resume, and what is refused."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, TransformReward
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from corollary.core.environments import Environments, Step, _ActionLog, episode_seed, make_environments
from corollary.core.errors import CheckpointError, ConfigError, CorollaryError, EnvironmentMismatchError
from corollary.core.evaluation import FIRST_EPISODE_SEED
from corollary.core.spaces import Actions


class Counting(gymnasium.Env[Any, Any]):
    """Shows (step index, length of this episode), pays step index + action, and ends after 2 to 5 steps.

    Even lengths end by termination, odd ones by truncation. The length is drawn from the environment's generator.
    """

    observation_space: spaces.Space[Any] = spaces.Box(0, 9, (2,))
    action_space: spaces.Space[Any] = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self) -> None:
        self.steps = -1
        self.seeds: list[int | None] = []
        self.closed = False

    def show(self) -> Any:
        return np.array([self.steps, self.length], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.steps, self.length = 0, int(self.np_random.integers(2, 6))
        return self.show(), {}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        assert 0 <= self.steps < self.length, "stepped outside an episode"
        self.steps += 1
        ended = self.steps == self.length
        reward = self.steps + float(action[0])
        return self.show(), reward, ended and self.length % 2 == 0, ended and self.length % 2 == 1, {}

    def close(self) -> None:
        self.closed = True


class CountingDict(Counting):
    """The same observation as a Dict, whose vector has the entries in the order of the keys."""

    observation_space = spaces.Dict({"a": spaces.Box(0, 9, (1,)), "b": spaces.Box(0, 9, (1,), np.float64)})

    def show(self) -> Any:
        return {"a": np.array([self.steps], np.float32), "b": np.array([self.length], np.float64)}


def sync_vector(env: Callable[[], Counting], mode: AutoresetMode) -> SyncVectorEnv:
    return SyncVectorEnv([env] * 3, autoreset_mode=mode)


def async_vector(env: Callable[[], Counting], mode: AutoresetMode) -> AsyncVectorEnv:
    return AsyncVectorEnv([env] * 3, autoreset_mode=mode)


NEXT, SAME = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP
PATHS: dict[str, Callable[[Callable[[], Counting]], Environments]] = {
    "sync": lambda env: make_environments(env, (4, 9), 3),
    "async": lambda env: make_environments(env, (4, 9), 3, vectorization="async"),
    "sync vector, next step": lambda env: make_environments(lambda: sync_vector(env, NEXT), (4, 9), 3),
    "sync vector, same step": lambda env: make_environments(lambda: sync_vector(env, SAME), (4, 9), 3),
    "async vector, next step": lambda env: make_environments(lambda: async_vector(env, NEXT), (4, 9), 3),
    "async vector, same step": lambda env: make_environments(lambda: async_vector(env, SAME), (4, 9), 3),
}


def follow(environments: Any, n_steps: int = 40) -> int:
    """Keep the books of six rows of Counting by hand and compare; return how many reset rows there were."""
    rng = np.random.default_rng(0)
    obs = environments.reset()
    assert (obs[:, 0] == 0).all()
    at, length, total = np.zeros(6), obs[:, 1].copy(), np.zeros(6)
    resetting, n_resets, finished = np.zeros(6, bool), 0, []
    for _ in range(n_steps):
        actions = rng.uniform(-1, 1, (6, 1)).astype(np.float32)
        step = environments.step(actions)
        assert step.obs.dtype == step.next_obs.dtype == np.float32
        assert step.reward.dtype == np.float64
        for row in range(6):
            if resetting[row]:
                assert not any((step.valid[row], step.terminated[row], step.truncated[row]))
                assert step.reward[row] == 0
                assert step.obs[row, 0] == step.next_obs[row, 0] == 0
                at[row], length[row], total[row], resetting[row] = 0, step.obs[row, 1], 0, False
                n_resets += 1
                continue
            at[row] += 1
            ended = at[row] == length[row]
            reward = at[row] + float(actions[row, 0])
            total[row] += reward
            assert step.valid[row]
            assert step.reward[row] == reward
            assert step.next_obs[row].tolist() == [at[row], length[row]]  # the true successor, at the end too
            assert step.terminated[row] == (ended and length[row] % 2 == 0)
            assert step.truncated[row] == (ended and length[row] % 2 == 1)
            if not ended:
                assert step.obs[row].tolist() == [at[row], length[row]]
                continue
            finished.append((row // 3, total[row], int(length[row])))
            if step.obs[row, 0] == 0:
                at[row], length[row], total[row] = 0, step.obs[row, 1], 0
            else:
                resetting[row] = True
        obs = step.obs
    assert {ends for *_, ends in finished} == {2, 3, 4, 5}  # both kinds of ending were met
    assert environments.finished() == finished
    assert environments.finished() == []
    return n_resets


@pytest.mark.parametrize("env", [Counting, CountingDict])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_gives_true_successors_and_both_flags(path: str, env: type[Counting]) -> None:
    with PATHS[path](env) as environments:
        assert (environments.seeds, environments.n_envs, environments.n_rows) == ((4, 9), 3, 6)
        assert environments.exact_resume == ("vector" not in path)
        assert (follow(environments) > 0) == ("next step" in path)


class Spoilt:
    """Environments whose steps pass through a mistake."""

    def __init__(self, environments: Environments, mistake: Callable[[Step], Step]) -> None:
        self.reset, self.finished = environments.reset, environments.finished
        self.step = lambda actions: mistake(environments.step(actions))


def test_a_reset_between_an_end_and_its_reset_row_makes_that_row_a_step() -> None:
    environments = make_environments(sync_vector(Counting, NEXT), (0,), 3)
    environments.reset()
    while not environments.step(np.zeros((3, 1), np.float32)).terminated.any():
        pass
    environments.reset()
    assert environments.step(np.zeros((3, 1), np.float32)).valid.all()


def test_what_a_reset_row_pays_does_not_count() -> None:
    class Talkative(SyncVectorEnv):
        def step(self, actions: Any) -> Any:
            resetting = self._autoreset_envs.copy()
            obs, reward, terminated, truncated, infos = super().step(actions)
            return obs, reward + 5.0 * resetting, terminated | resetting, truncated | resetting, infos

    assert follow(make_environments(lambda: Talkative([Counting] * 3), (4, 9), 3)) > 0


@pytest.mark.parametrize(
    ("path", "mistake"),
    [
        ("sync", lambda step: step._replace(terminated=step.terminated | step.truncated)),
        ("sync", lambda step: step._replace(truncated=step.terminated | step.truncated)),
        ("sync", lambda step: step._replace(next_obs=step.obs)),
        ("sync", lambda step: step._replace(obs=step.next_obs)),
        ("sync vector, same step", lambda step: step._replace(next_obs=step.obs)),
        ("sync vector, next step", lambda step: step._replace(valid=np.ones(6, bool))),
    ],
)
def test_control_each_mistake_is_caught(path: str, mistake: Callable[[Step], Step]) -> None:
    with PATHS[path](Counting) as environments, pytest.raises(AssertionError):
        follow(Spoilt(environments, mistake))


def test_obs_is_next_obs_itself_unless_an_episode_began() -> None:
    environments = make_environments(Counting, (0,), 3)
    environments.reset()
    for _ in range(20):
        step = environments.step(np.zeros((3, 1), np.float32))
        assert (step.obs is step.next_obs) == (not (step.terminated | step.truncated).any())


def test_environments_may_reuse_their_memory() -> None:
    class InPlace(Counting):
        def show(self) -> Any:
            self.shown = getattr(self, "shown", np.zeros(2, np.float32))
            self.shown[:] = self.steps, self.length
            return self.shown

    class Reusing(SyncVectorEnv):
        def step(self, actions: Any) -> Any:
            obs, *rest = super().step(actions)
            self.buffer = getattr(self, "buffer", np.zeros((6, 2), np.float32))
            self.buffer[:] = obs
            return self.buffer, *rest

    for source in (InPlace, lambda: Reusing([Counting] * 6)):
        environments = make_environments(source, (0,), 6)
        first = environments.reset()
        kept, copies = [first], [first.copy()]
        for _ in range(12):
            step = environments.step(np.zeros((6, 1), np.float32))
            kept += [step.obs, step.next_obs]
            copies += [step.obs.copy(), step.next_obs.copy()]
        for array, copy in zip(kept, copies, strict=True):
            np.testing.assert_array_equal(array, copy)


def test_actions_arrive_clipped_and_as_the_space_wants_them() -> None:
    received = []

    class Discrete(Counting):
        action_space = spaces.Discrete(3, start=5)

        def step(self, action: Any) -> Any:
            received.append(action)
            return super().step([0.0])

    environments = make_environments(Discrete, (0,), 2)
    environments.reset()
    environments.step(np.array([[2], [0]]))
    assert received == [7, 5]

    environments = make_environments(Counting, (0,), 2)
    environments.reset()
    assert environments.step(np.array([[3.0], [-3.0]])).reward.tolist() == [2.0, 0.0]


# -- seeds


def test_every_episode_has_its_own_seed() -> None:
    made: list[Counting] = []

    def make() -> Counting:
        made.append(Counting())
        return made[-1]

    environments = make_environments(make, (4, 9), 2)
    environments.reset()
    for _ in range(20):
        environments.step(np.zeros((4, 1), np.float32))
    for row, env in enumerate(made):
        assert len(env.seeds) >= 4
        assert env.seeds == [episode_seed((4, 9)[row // 2], row % 2, k) for k in range(len(env.seeds))]


def test_episode_seeds_are_a_fixed_function() -> None:
    """`printf 7/2/31 | sha256sum` begins with the bytes 11 c1 86 33, little-endian 0x3386c111."""
    assert episode_seed(7, 2, 31) == 2**30 + 0x3386C111 % 2**30
    seeds = {episode_seed(*each) for each in itertools.product(range(10), range(10), range(10))}
    assert len(seeds) == 1000
    assert min(seeds) >= 2**30 > FIRST_EPISODE_SEED + 10**9  # never an evaluation's episode
    assert max(seeds) < 2**31


def play(environments: Environments, actions: Any) -> list[Step]:
    return [environments.step(each) for each in actions]


def assert_equal_steps(ours: list[Step], theirs: list[Step], rows: Any = slice(None), of: Any = slice(None)) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for field, a, b in zip(Step._fields, mine, other, strict=True):
            np.testing.assert_array_equal(a[rows], b[of], err_msg=field)


def random_actions(environments: Environments, n_steps: int, seed: int = 0) -> NDArray[Any]:
    rng, shape = np.random.default_rng(seed), (n_steps, environments.n_rows, environments.actions.dim)
    if environments.actions.kind == "discrete":
        return rng.integers(0, environments.actions.sizes, shape)
    return rng.uniform(-1, 1, shape).astype(np.float32)


def test_a_seed_gives_the_same_run_alone_and_among_others() -> None:
    among, alone = make_environments("CartPole-v1", (3, 7, 1), 2), make_environments("CartPole-v1", (7,), 1)
    actions = random_actions(among, 60)
    np.testing.assert_array_equal(among.reset()[2:3], alone.reset())
    assert_equal_steps(play(among, actions), play(alone, actions[:, 2:3]), rows=slice(2, 3))


def test_processes_give_the_same_run() -> None:
    here = make_environments("CartPole-v1", (3, 7), 1)
    actions = random_actions(here, 60)
    with make_environments("CartPole-v1", (3, 7), 1, vectorization="async") as processes:
        np.testing.assert_array_equal(here.reset(), processes.reset())
        assert_equal_steps(play(here, actions), play(processes, actions))
        np.testing.assert_array_equal(here.reset(), processes.reset())
        assert here.finished() == processes.finished() != []


# -- exact resume


def stored(environments: Environments) -> dict[str, NDArray[Any]]:
    """The state after it went through a checkpoint's file format."""
    return load(save(environments.state()))


def assert_equal_states(ours: dict[str, NDArray[Any]], theirs: dict[str, NDArray[Any]]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], strict=True)


@pytest.mark.parametrize(
    ("env_id", "steps", "vectorization"),
    [
        ("CartPole-v1", 75, "sync"),
        ("CartPole-v1", 75, "async"),
        ("Pendulum-v1", 230, "sync"),  # in the second episode: the first ends after 200 steps
        ("Hopper-v5", 75, "sync"),
    ],
)
def test_a_restored_run_goes_on_exactly(env_id: str, steps: int, vectorization: Any) -> None:
    whole = make_environments(env_id, (3, 7), 2)
    actions = random_actions(whole, steps + 60)
    whole.reset()
    play(whole, actions[:steps])
    arrays = stored(whole)
    with make_environments(env_id, (3, 7), 2, vectorization=vectorization) as resumed:
        obs = resumed.restore(arrays)
        np.testing.assert_array_equal(obs, arrays["obs"].reshape(obs.shape))
        assert_equal_states(resumed.state(), arrays)  # and can be stored again
        assert_equal_steps(play(whole, actions[steps:]), play(resumed, actions[steps:]))
        assert_equal_states(resumed.state(), whole.state())


def test_a_state_right_after_the_reset_can_be_restored() -> None:
    first, second = (make_environments("Pendulum-v1", (1,), 2) for _ in range(2))
    obs = first.reset()
    np.testing.assert_array_equal(second.restore(stored(first)), obs)


def test_state_is_not_changed_by_later_steps() -> None:
    environments = make_environments(Counting, (0,), 2)
    environments.reset()
    environments.step(np.full((2, 1), 0.5, np.float32))
    arrays = environments.state()
    before = {name: array.copy() for name, array in arrays.items()}
    play(environments, np.zeros((100, 2, 1), np.float32))
    assert_equal_states(arrays, before)


def test_control_a_changed_action_is_noticed() -> None:
    whole, resumed = (make_environments("Pendulum-v1", (0,), 3) for _ in range(2))
    whole.reset()
    play(whole, random_actions(whole, 20))
    arrays = whole.state()
    arrays["actions"][0, 1, 5] += 0.25
    with pytest.warns(UserWarning, match=r"^Pendulum-v1, rows \[1\]: .* not exactly resumable .* new episodes begin"):
        obs = resumed.restore(arrays)
    np.testing.assert_array_equal(obs[[0, 2]], arrays["obs"][0, [0, 2]])
    fresh, _ = gymnasium.make("Pendulum-v1").reset(seed=episode_seed(0, 1, 1))
    np.testing.assert_array_equal(obs[1], fresh)
    arrays = resumed.state()
    assert arrays["episodes"].tolist() == [[0, 1, 0]]
    assert arrays["lengths"].tolist() == [[20, 0, 20]]
    assert arrays["returns"][0, 1] == 0


def test_a_replay_that_ends_early_gives_a_warning() -> None:
    class Longer(Counting):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.length = 9
            return self.show(), {}

    whole, resumed = make_environments(Longer, (0,), 2), make_environments(Counting, (0,), 2)
    whole.reset()
    play(whole, np.zeros((7, 2, 1), np.float32))
    with pytest.warns(UserWarning, match=r"rows \[0, 1\]: .* not exactly resumable"):
        resumed.restore(stored(whole))


GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("source", "vectorization"),
    [
        (lambda: NormalizeObservation(gymnasium.make("Pendulum-v1")), "sync"),
        (lambda: NormalizeObservation(gymnasium.make("Pendulum-v1")), "async"),
        (lambda: NormalizeReward(gymnasium.make("Pendulum-v1")), "sync"),  # only the return tells
        (lambda: TransformReward(gymnasium.make("Pendulum-v1"), lambda r: r + GENERATOR.normal()), "sync"),
    ],
)
def test_state_across_episodes_gives_a_warning(source: Any, vectorization: Any) -> None:
    whole = make_environments(source, (0,), 2)
    whole.reset()
    play(whole, np.zeros((201, 2, 1), np.float32))
    with make_environments(source, (0,), 2, vectorization=vectorization) as resumed:
        with pytest.warns(UserWarning, match=r"rows \[0, 1\]: .* not exactly resumable"):
            resumed.restore(stored(whole))
        assert resumed.state()["episodes"].tolist() == [[2, 2]]
        assert np.isfinite(resumed.step(np.zeros((2, 1), np.float32)).obs).all()


def test_vector_environments_begin_other_episodes_when_restored() -> None:
    made: list[Counting] = []

    def make() -> Counting:
        made.append(Counting())
        return made[-1]

    def vector() -> SyncVectorEnv:
        return SyncVectorEnv([make] * 2)

    whole = make_environments(vector, (4,), 2)
    whole.reset()
    play(whole, np.zeros((7, 2, 1), np.float32))
    arrays = stored(whole)
    resumed = make_environments(vector, (4,), 2)
    with pytest.warns(UserWarning, match="resets itself: its episodes cannot be resumed, new ones begin"):
        obs = resumed.restore(arrays)
    assert (obs[:, 0] == 0).all()
    # SyncVectorEnv gives environment i the seed plus i; later episodes have none.
    first = [env.seeds[0] for env in made]
    assert first == [episode_seed(4, 0, 0), episode_seed(4, 0, 0) + 1, episode_seed(4, 0, 1), episode_seed(4, 0, 1) + 1]


def test_a_state_of_other_environments_is_refused() -> None:
    one = make_environments(Counting, (0,), 1)
    with pytest.raises(CorollaryError, match=r"no state before their first episode: call reset\(\) first"):
        one.state()
    one.reset()
    with pytest.raises(CheckpointError, match="restore it with the environment, seeds and n_envs"):
        make_environments(Counting, (0,), 2).restore(stored(one))
    vector = make_environments(lambda: SyncVectorEnv([Counting]), (0,), 1)
    with pytest.raises(CheckpointError, match="reset themselves"):
        one.restore(stored(vector))
    with pytest.raises(CheckpointError, match="stepped one by one"):
        vector.restore(stored(one))


@given(ends=st.lists(st.tuples(*[st.integers(0, 9)] * 3), max_size=400))
def test_the_log_keeps_each_rows_actions_since_its_reset(ends: list[tuple[int, ...]]) -> None:
    log, expected = _ActionLog(3, Actions(spaces.Discrete(1000), "test")), [[], [], []]
    for time, numbers in enumerate(ends):
        assert log.append(np.full((3, 1), time)).tolist() == [[time]] * 3
        for row, number in enumerate(numbers):
            expected[row].append(time)
            if number < (1, 0, 2)[row]:  # row 1 never ends, so the log must grow
                expected[row].clear()
                log.begin(row)
    assert [actions[:, 0].tolist() for actions in log.since_reset()] == expected


def test_the_logs_memory_follows_the_longest_running_episode() -> None:
    log = _ActionLog(2, Actions(spaces.Discrete(2), "test"))
    for _ in range(1000):
        for _ in range(40):
            log.append(np.zeros((2, 1)))
        for row in range(2):
            log.begin(row)
    assert len(log._taken) <= 128  # 40 000 steps were noted


# -- what is refused


class Box3(Counting):
    observation_space = spaces.Box(0, 1, (3,))


class Half(Counting):
    action_space = spaces.Box(-0.5, 0.5, (1,))


def alternating(*kinds: Callable[[], Any]) -> Callable[[], Any]:
    turns: Iterator[Callable[[], Any]] = itertools.cycle(kinds)
    return lambda: next(turns)()


SHARED = Counting()
REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ("NoSuchEnv-v0", {}, EnvironmentMismatchError, "The environment 'NoSuchEnv-v0' cannot be made: .*doesn't exist"),
    ("no_such_module:Env-v0", {}, EnvironmentMismatchError, "cannot be made: .*no_such_module"),
    (lambda: None, {}, EnvironmentMismatchError, "A builtins.NoneType is no gymnasium environment: pass"),
    (object(), {}, EnvironmentMismatchError, "A builtins.object is no gymnasium environment: pass"),
    (alternating(Counting, Box3), {}, EnvironmentMismatchError, r"different observation spaces, .* number 1 Box\(0"),
    (alternating(Counting, Half), {}, EnvironmentMismatchError, "different action spaces"),
    (alternating(Half, Counting), {"vectorization": "async"}, EnvironmentMismatchError, "the same spaces"),
    (lambda: SHARED, {}, ConfigError, "returned the same environment twice"),
    (SHARED, {}, ConfigError, "One environment serves one seed with n_envs=1 .*got 1 seeds, n_envs=2"),
    (SHARED, {"n_envs": 1, "seeds": (0, 1)}, ConfigError, "One environment serves one seed"),
    (SHARED, {"n_envs": 1, "vectorization": "async"}, ConfigError, "One environment serves one seed"),
    (SyncVectorEnv([Counting]), {"seeds": (0, 1)}, ConfigError, "One vector environment serves one seed, not 2"),
    (Counting, {"vectorization": "envpool"}, ConfigError, "needs the id of one of EnvPool's environments"),
    (Counting, {"vectorization": "asynk"}, ConfigError, "must be one of sync, async, envpool; .*Did you mean 'async'"),
    (Counting, {"n_envs": 0}, ConfigError, "At least one seed and one environment"),
    (Counting, {"seeds": ()}, ConfigError, "At least one seed and one environment"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "options", "error", "message"), REFUSED)
def test_what_cannot_be_stepped_is_refused(
    source: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_environments(source, **{"seeds": (0,), "n_envs": 2} | options)


def test_spaces_without_a_vector_are_refused_by_name() -> None:
    class Texts(Counting):
        observation_space = spaces.Text(3)

    for source in (Texts, lambda: SyncVectorEnv([Texts])):
        with pytest.raises(EnvironmentMismatchError, match="has the observation space Text"):
            make_environments(source, (0,), 1)


def test_vector_environments_that_do_not_reset_themselves_are_refused() -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"DISABLED.* must reset itself: make it with AutoresetMode"):
        make_environments(SyncVectorEnv([Counting], autoreset_mode=AutoresetMode.DISABLED), (0,), 1)
    silent = SyncVectorEnv([Counting])
    silent.metadata = {}
    with pytest.raises(EnvironmentMismatchError, match=r"metadata\['autoreset_mode'\]=None"):
        make_environments(silent, (0,), 1)


@pytest.mark.parametrize(("mode", "claimed"), [(NEXT, SAME), (SAME, NEXT)])
def test_a_vector_environment_with_the_wrong_mode_in_its_metadata_is_caught(mode: Any, claimed: Any) -> None:
    vector = SyncVectorEnv([Counting], autoreset_mode=mode)
    vector.metadata = {"autoreset_mode": claimed}
    environments = make_environments(vector, (0,), 1)
    environments.reset()
    with pytest.raises(EnvironmentMismatchError, match=r"infos\['final_obs'\], against its metadata"):
        play(environments, np.zeros((6, 1, 1), np.float32))


def test_vector_environments_of_different_sizes_or_modes_are_refused() -> None:
    sizes = alternating(lambda: SyncVectorEnv([Counting] * 2), lambda: SyncVectorEnv([Counting] * 3))
    with pytest.raises(EnvironmentMismatchError, match="different sizes or autoreset modes"):
        make_environments(sizes, (0, 1), 2)
    modes = alternating(lambda: sync_vector(Counting, NEXT), lambda: sync_vector(Counting, SAME))
    with pytest.raises(EnvironmentMismatchError, match="different sizes or autoreset modes"):
        make_environments(modes, (0, 1), 2)


def test_a_vector_environment_whose_spec_is_not_gymnasiums_goes_by_its_class() -> None:
    env = gymnasium.make_vec("CartPole-v1", 2)
    env.spec = object()  # type: ignore[assignment]
    environments = make_environments(env, (0,), 1)
    assert (environments.env_id, environments.name) == (None, type(env.unwrapped).__name__)
    env.close()


def test_the_size_of_a_vector_environment_wins() -> None:
    assert make_environments(SyncVectorEnv([Counting] * 3), (0,), 1).n_envs == 3


# -- what an environment may do wrong


class Faulty(Counting):
    """Does something wrong at its third step."""

    def __init__(self, fault: Any) -> None:
        super().__init__()
        self.fault = fault

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        shown = super().reset(seed=seed)
        self.length = 9
        return shown

    def step(self, action: Any) -> Any:
        step = super().step(action)
        return self.fault(*step) if self.steps == 3 else step


def raises(*_: Any) -> Any:
    raise ZeroDivisionError("no wheel")


FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "raises": (raises, CorollaryError, "the environment raised ZeroDivisionError in step: no wheel"),
    "old step": (lambda o, r, e, c, i: (o, r, e, i), CorollaryError, "raised ValueError in step: not enough values"),
    "reward None": (lambda o, r, e, c, i: (o, None, e, c, i), CorollaryError, "raised TypeError in step|holds nan"),
    "reward nan": (lambda o, r, e, c, i: (o, np.nan, e, c, i), CorollaryError, "the reward holds nan"),
    "reward inf": (lambda o, r, e, c, i: (o, -np.inf, e, c, i), CorollaryError, "the reward holds -inf"),
    "obs nan": (lambda o, *rest: (o * np.float32("nan"), *rest), CorollaryError, "the observation holds nan"),
    "shape": (lambda o, *rest: (np.zeros(5, np.float32), *rest), EnvironmentMismatchError, r"Counting \(shape \(5,\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_with_row_and_step(fault: str) -> None:
    does, error, message = FAULTS[fault]
    environments = make_environments(alternating(Counting, lambda: Faulty(does)), (4, 9), 1)
    environments.reset()
    with pytest.raises(error, match=rf"^Counting, row 1 \(seed 9, environment 0\), step 3 of its episode: .*{message}"):
        play(environments, np.zeros((3, 2, 1), np.float32))


def test_large_finite_numbers_are_no_fault() -> None:
    environments = make_environments(lambda: TransformReward(Counting(), lambda r: 1e200 * r), (0,), 2)
    environments.reset()
    assert (environments.step(np.zeros((2, 1), np.float32)).reward == 1e200).all()


def test_what_an_environment_raised_is_the_cause() -> None:
    environments = make_environments(lambda: Faulty(raises), (0,), 1)
    environments.reset()
    with pytest.raises(CorollaryError) as caught:
        play(environments, np.zeros((3, 1, 1), np.float32))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_faults_in_reset_are_named() -> None:
    class Unready(Counting):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            if len(self.seeds) == 1:
                raise OSError("no power")
            return super().reset(seed=seed)

    class Blank(Counting):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return np.full(2, np.inf, np.float32), {}

    environments = make_environments(Unready, (0,), 1)
    environments.reset()
    with pytest.raises(CorollaryError, match=r"Unready, row 0 .*step 0 .* raised OSError in reset: no power"):
        play(environments, np.zeros((6, 1, 1), np.float32))
    with pytest.raises(CorollaryError, match=r"Blank, row 0 .*step 0 .*: the observation holds inf"):
        make_environments(Blank, (0,), 1).reset()


@pytest.mark.filterwarnings("ignore:.*ERROR:UserWarning")  # gymnasium shows what a process raised
@pytest.mark.parametrize("fault", ["raises", "obs nan", "reward inf"])
@pytest.mark.parametrize("path", ["async", "sync vector, next step", "sync vector, same step"])
def test_faults_in_vector_environments_are_named(path: str, fault: str) -> None:
    does, error, message = FAULTS[fault]
    with PATHS[path](lambda: Faulty(does)) as environments:
        environments.reset()
        with pytest.raises(error, match=message) as caught:
            play(environments, np.zeros((3, 6, 1), np.float32))
        assert (type(caught.value.__cause__) is ZeroDivisionError) == (fault == "raises")


# -- closing


def test_what_was_made_here_is_closed_and_what_was_given_is_left_open() -> None:
    made: list[Counting] = []

    def make() -> Counting:
        made.append(Counting())
        return made[-1]

    with make_environments(make, (0,), 2):
        pass
    assert [env.closed for env in made] == [True, True]
    given_env = Counting()
    make_environments(given_env, (0,), 1).close()
    assert not given_env.closed
    vector = SyncVectorEnv([make])
    make_environments(vector, (0,), 1).close()
    assert not vector.closed
    with pytest.raises(EnvironmentMismatchError):
        make_environments(alternating(make, Box3), (0,), 2)
    assert made[-1].closed


# -- EnvPool


def test_without_envpool_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "envpool", None)
    with pytest.raises(ConfigError, match="needs the package envpool: pip install envpool"):
        make_environments("CartPole-v1", (0,), 1, vectorization="envpool")


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")
def test_envpool_resets_at_the_next_step() -> None:
    pytest.importorskip("envpool")
    with make_environments("CartPole-v1", (4, 9), 3, vectorization="envpool") as environments:
        obs = environments.reset()
        first, n_invalid, lengths = obs, 0, np.zeros(6, int)
        for actions in random_actions(environments, 100):
            step = environments.step(actions)
            lengths += step.valid
            done = step.terminated | step.truncated
            assert (np.abs(step.obs[~step.valid]) <= 0.05).all()  # CartPole begins within 0.05 of the origin
            # An end is where the pole or the cart leaves its bounds, and the true last observation shows it.
            outside = (np.abs(step.next_obs[:, 0]) > 2.4) | (np.abs(step.next_obs[:, 2]) > 12 * np.pi / 180)
            np.testing.assert_array_equal(outside, done)
            n_invalid += int((~step.valid).sum())
        assert len(environments.finished()) > 6
        assert n_invalid > 6
        with make_environments("CartPole-v1", (9,), 3, vectorization="envpool") as alone:
            np.testing.assert_array_equal(alone.reset(), first[3:])
            assert not (alone.restore(stored(environments)) == first[3:]).any()
        with pytest.raises(EnvironmentMismatchError, match="EnvPool cannot make 'NoSuchEnv-v0'"):
            make_environments("NoSuchEnv-v0", (0,), 1, vectorization="envpool")
