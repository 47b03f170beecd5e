"""Minari datasets by duck type: small fake ones, and flattening against gymnasium's own."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from corollary.core.errors import DataError
from corollary.core.minari import from_minari, load_minari
from corollary.core.spaces import flatten_steps


@dataclass
class FakeEpisode:
    observations: Any
    actions: Any
    rewards: Any
    terminations: Any
    truncations: Any


@dataclass
class FakeDataset:
    episodes: list[Any]
    observation_space: Any = None
    action_space: Any = None
    id: str = "fake/tiny-v0"
    env_spec: Any = None
    storage: Any = field(default_factory=lambda: SimpleNamespace(metadata={}))

    def __iter__(self) -> Any:
        return iter(self.episodes)


def episode(**changes: Any) -> FakeEpisode:
    values = {
        "observations": np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]),
        "actions": np.array([[0.5], [-2.0]], dtype=np.float32),
        "rewards": np.array([1.0, 2.0]),
        "terminations": np.array([False, False]),
        "truncations": np.array([False, True]),
    }
    return FakeEpisode(**{**values, **changes})


BOX = spaces.Box(-2.0, 2.0, (1,))


def test_every_row_has_its_successor() -> None:
    ended = episode(terminations=np.array([False, True]), truncations=np.array([False, False]))
    dataset = from_minari(FakeDataset([episode(), ended], action_space=BOX))
    assert dataset.action_low is not None
    assert dataset.action_low.tolist() == [-2.0]
    t = dataset.transitions()
    assert t.next_obs.tolist() == [[2, 3], [4, 5], [2, 3], [4, 5]]
    assert t.terminated.tolist() == [0, 0, 0, 1]
    assert t.truncated.tolist() == [0, 1, 0, 0]
    # To D4RL's semantics by dropping the truncated row, and the last one, on purpose.
    assert dataset.summary()["rows_dropped"] == {"full": 0, "d4rl_qlearning": 2}


def test_metadata_fills_the_info() -> None:
    metadata = {
        "ref_min_score": np.float64(-1.0),
        "ref_max_score": 4,
        "description": "tiny",
        "author": {"somebody"},
        "minari_version": "0.5.3",
        "dataset_size": 12.5,
    }
    fake = FakeDataset(
        [episode()],
        action_space=BOX,
        env_spec=SimpleNamespace(id="Tiny-v1", max_episode_steps=2),
        storage=SimpleNamespace(metadata=metadata),
    )
    info = from_minari(fake).info
    assert (info.name, info.env_id, info.horizon, info.description) == ("fake/tiny-v0", "Tiny-v1", 2, "tiny")
    assert (info.ref_min_score, info.ref_max_score, info.score_source) == (-1.0, 4.0, "the Minari metadata")
    assert info.provenance["minari_version"] == "0.5.3"
    assert from_minari(fake).normalized_score(1.5) == pytest.approx(50.0)
    only_one = FakeDataset([episode()], action_space=BOX, storage=SimpleNamespace(metadata={"ref_min_score": 1.0}))
    assert from_minari(only_one, name="mine").info.ref_min_score is None
    assert from_minari(only_one, name="mine").info.name == "mine"


def test_a_step_with_both_flags_is_a_termination_and_is_counted() -> None:
    both = episode(terminations=np.array([False, True]))
    dataset = from_minari(FakeDataset([both, episode()], action_space=BOX))
    assert dataset.terminated.tolist() == [False, True, False, False]
    assert dataset.truncated.tolist() == [False, False, False, True]
    assert dataset.info.provenance["rows_with_both_flags"] == 1


SPACE = spaces.Dict(
    {
        "z": spaces.Box(-1, 1, (2, 2)),
        "a": spaces.Discrete(3, start=-1),
        "m": spaces.Tuple((spaces.MultiBinary(2), spaces.MultiDiscrete([2, 3]), spaces.Box(0, 1, (1,)))),
    }
)


def stacked(space: spaces.Space[Any], samples: list[Any]) -> Any:
    """Recorded values in Minari's layout: one array per leaf, steps along its first axis."""
    if isinstance(space, spaces.Dict):
        return {key: stacked(part, [s[key] for s in samples]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(stacked(part, [s[i] for s in samples]) for i, part in enumerate(space.spaces))
    return np.array(samples)


@pytest.mark.parametrize("space", [SPACE, *SPACE.spaces.values()], ids=lambda s: type(s).__name__)
def test_flattening_is_gymnasiums(space: spaces.Space[Any]) -> None:
    space.seed(0)
    samples = [space.sample() for _ in range(7)]
    expected = np.stack([spaces.flatten(space, sample) for sample in samples])
    flat = np.asarray(flatten_steps(space, stacked(space, samples))).reshape(7, -1)
    np.testing.assert_array_equal(flat, expected)


def test_dict_observations() -> None:
    space = spaces.Dict({"observation": spaces.Box(-9, 9, (2,)), "goal": spaces.Box(-9, 9, (1,))})
    observations = {"observation": np.array([[1.0, 2], [3, 4], [5, 6]]), "goal": np.array([[7.0], [8], [9]])}
    dataset = from_minari(FakeDataset([episode(observations=observations)], space, BOX))
    assert dataset.observations.tolist() == [[7, 1, 2], [8, 3, 4], [9, 5, 6]]  # keys sorted: goal first
    with pytest.raises(DataError, match="episode 0: observations lack the entry 'goal'"):
        from_minari(FakeDataset([episode(observations={"observation": observations["observation"]})], space, BOX))
    with pytest.raises(DataError, match="observations are dicts or tuples, but"):
        from_minari(FakeDataset([episode(observations=observations)], None, BOX))


def test_discrete_actions_start_at_zero() -> None:
    dataset = from_minari(FakeDataset([episode(actions=np.array([5, 7]))], action_space=spaces.Discrete(4, start=5)))
    assert (dataset.actions.tolist(), dataset.n_actions) == ([0, 2], 4)


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (FakeDataset([]), "fake/tiny-v0: the set is empty"),
        (FakeDataset([episode(), SimpleNamespace(rewards=[1.0])]), "fake/tiny-v0: episode 1: has no observations"),
        (
            FakeDataset([episode(observations=np.zeros((2, 2)))], action_space=BOX),
            "fake/tiny-v0: episode 0: 2 steps need 3 observations; got 2",
        ),
        (
            FakeDataset([episode(truncations=np.array([True, False]))], action_space=BOX),
            r"truncated is set at row 0 \(episode 0, step 0\), yet the episode goes on",
        ),
        (FakeDataset([episode(truncations=np.array([False]))], action_space=BOX), "truncated has 1"),
        (FakeDataset([episode()]), r"outside its bounds \[-1.0, 1.0\]"),
        (FakeDataset([episode()], action_space=spaces.Box(-np.inf, np.inf, (1,))), "bounds must be finite"),
        (FakeDataset([episode()], action_space=spaces.MultiBinary(1)), "actions of MultiBinary spaces"),
        (
            FakeDataset([episode()], observation_space=spaces.Text(3)),
            "observations of Text spaces have no fixed-size vector form",
        ),
        (
            FakeDataset([episode(observations=np.array([0, 1, 9]))], observation_space=spaces.Discrete(3)),
            "a discrete value outside its 3 possible ones",
        ),
        (
            FakeDataset([episode(observations=(np.zeros(3),))], observation_space=spaces.Tuple([BOX, BOX])),
            "observations have 1 entries, their Tuple space 2",
        ),
    ],
)
def test_bad_datasets(fake: FakeDataset, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_minari(fake)


@pytest.mark.parametrize("source", [None, 3])
def test_what_is_no_dataset_at_all_is_named(source: object) -> None:
    with pytest.raises(
        DataError, match=f"takes a Minari dataset, an iterable of episodes; got {type(source).__name__}"
    ):
        from_minari(source)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(DataError, match=r"minari:D4RL/pen/human-v2 needs.*pip install 'corollary\[minari\]'"):
        load_minari("D4RL/pen/human-v2")


def test_an_id_that_is_not_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(dataset_id: str) -> Any:
        if dataset_id == "here-v0":
            return FakeDataset([episode()], action_space=BOX)
        raise FileNotFoundError(f"Dataset {dataset_id} not found locally")

    monkeypatch.setitem(sys.modules, "minari", SimpleNamespace(load_dataset=load_dataset))
    assert len(load_minari("here-v0")) == 2
    with pytest.raises(DataError, match=r"not found locally.*minari download there-v0"):
        load_minari("there-v0")


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_a_real_minari_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write two Pendulum episodes with Minari itself; the loader must return what the environment said."""
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gymnasium.make("Pendulum-v1", max_episode_steps=5)
    buffers, recorded = [], []
    for seed in (0, 1):
        obs = [env.reset(seed=seed)[0]]
        env.action_space.seed(seed)
        actions = [env.action_space.sample() for _ in range(5)]
        steps = [env.step(action) for action in actions]
        obs += [step[0] for step in steps]
        rewards, terminations, truncations = ([step[i] for step in steps] for i in (1, 2, 3))
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                id=seed,
                observations=np.array(obs),
                actions=np.array(actions),
                rewards=rewards,
                terminations=terminations,
                truncations=truncations,
                infos={},
            )
        )
        recorded += obs
    minari.create_dataset_from_buffers("test/pendulum-v0", buffers, env=env, algorithm_name="random")
    dataset = load_minari("test/pendulum-v0")
    np.testing.assert_array_equal(dataset.observations, np.array(recorded))
    assert (len(dataset), dataset.n_episodes, dataset.truncated.sum()) == (10, 2, 2)
    assert (dataset.info.env_id, dataset.info.horizon) == ("Pendulum-v1", 5)
    assert dataset.info.provenance["algorithm_name"] == "random"
    assert len(dataset.transitions()) == 10
