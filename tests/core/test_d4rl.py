"""D4RL files: the q-learning rows against a literal loop, a file checked by hand, and the names."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corollary.core.d4rl import D4RL_DATASETS, cache_folder, d4rl_entry, horizon_cuts, load_d4rl
from corollary.core.dataset import Dataset
from corollary.core.errors import DataError
from corollary.core.scores import reference_returns

FIELDS = ("obs", "action", "next_obs", "reward", "terminated")


def literal_rows(data: dict[str, np.ndarray], max_episode_steps: int | None) -> dict[str, list[Any]]:
    """What D4RL's `qlearning_dataset` does, one row at a time."""
    out: dict[str, list[Any]] = {key: [] for key in FIELDS}
    step = 0
    for i in range(len(data["rewards"]) - 1):  # the last row is never used
        final = bool(data["timeouts"][i]) if "timeouts" in data else step == (max_episode_steps or 0) - 1
        if final:
            step = 0
            continue
        if data["terminals"][i]:
            step = 0
        out["obs"].append(data["observations"][i].astype(np.float32))
        out["next_obs"].append(data["observations"][i + 1].astype(np.float32))
        out["action"].append(data["actions"][i].astype(np.float32))
        out["reward"].append(data["rewards"][i].astype(np.float32))
        out["terminated"].append(bool(data["terminals"][i]))
        step += 1
    return out


def write(path: Path, data: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file[key] = value
    return path


# -- a file of twelve rows -----------------------------------------------------------------------------------
#
# row        0  1  2  3 | 4  5  6  7  8 | 9  10 11
# episode    A  A  A  A | B  B  B  B  B | C  C  C
# ends with    terminal | timeout       | nothing (trailing partial episode)
#
# The observation of row i is i; where next_observations exist, an episode's end leads to i + 100.5.

N = 12
TERMINAL, TIMEOUT = 3, 8


def twelve_rows(**changes: Any) -> dict[str, Any]:
    rows = np.arange(N)
    data = {
        "observations": np.stack([rows, -rows], axis=1).astype(np.float32),
        "actions": (rows[:, None] / 20).astype(np.float32),
        "rewards": (rows / 2).astype(np.float32),
        "terminals": rows == TERMINAL,
        "timeouts": rows == TIMEOUT,
        **changes,
    }
    return {key: value for key, value in data.items() if value is not None}


def true_successors() -> np.ndarray:
    following = np.arange(1, N + 1, dtype=np.float32)
    following[[TERMINAL, TIMEOUT, N - 1]] = [103.5, 108.5, 111.5]
    return np.stack([following, -following], axis=1)


@pytest.mark.parametrize("successors", [None, true_successors()], ids=["plain", "next_observations"])
def test_data_1_qlearning_view(tmp_path: Path, successors: np.ndarray | None) -> None:
    t = load_d4rl(write(tmp_path / "f.hdf5", twelve_rows(next_observations=successors))).transitions("d4rl_qlearning")
    # Without the last row eleven are left, without the timeout ten; next_observations is ignored.
    assert t.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]
    assert t.next_obs[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    assert t.terminated.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert t.next_action_valid[:9].tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1]


def test_data_1_full_view_without_next_observations(tmp_path: Path) -> None:
    dataset = load_d4rl(write(tmp_path / "f.hdf5", twelve_rows()))
    t = dataset.transitions("full")
    # Row 8 has no successor; row 11 is the final observation of episode C, which row 10 leads to.
    assert t.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]
    assert t.next_obs[:, 0].tolist() == [1, 2, 3, 3, 5, 6, 7, 8, 10, 11]  # row 3: masked, the last known one
    assert t.truncated.tolist() == [0] * 9 + [1]
    assert dataset.info.provenance["dropped_rows"] == 1
    assert dataset.summary()["rows_dropped"] == {"full": 1, "d4rl_qlearning": 1}


def test_data_1_full_view_with_next_observations(tmp_path: Path) -> None:
    dataset = load_d4rl(write(tmp_path / "f.hdf5", twelve_rows(next_observations=true_successors())))
    t = dataset.transitions("full")
    assert t.obs[:, 0].tolist() == list(range(12))
    assert t.next_obs[:, 0].tolist() == [1, 2, 3, 103.5, 5, 6, 7, 8, 108.5, 10, 11, 111.5]
    assert t.terminated.nonzero().flatten().tolist() == [3]
    assert t.truncated.nonzero().flatten().tolist() == [8, 11]
    assert dataset.info.provenance["dropped_rows"] == 0
    assert dataset.summary()["rows_dropped"] == {"full": 0, "d4rl_qlearning": 2}


def test_data_1_controls(tmp_path: Path) -> None:
    """Taking next_obs from the file, or ignoring the timeouts, is not what D4RL does."""
    right = load_d4rl(write(tmp_path / "a.hdf5", twelve_rows())).transitions("d4rl_qlearning")
    from_file = true_successors()[[0, 1, 2, 3, 4, 5, 6, 7, 9, 10]]
    assert np.flatnonzero((right.next_obs.numpy() != from_file).any(axis=1)).tolist() == [TERMINAL]
    never = np.zeros(N, dtype=bool)
    no_timeouts = load_d4rl(write(tmp_path / "b.hdf5", twelve_rows(timeouts=never))).transitions("d4rl_qlearning")
    assert len(no_timeouts) == 11 != len(right)
    assert no_timeouts.next_obs[TIMEOUT, 0] == 9  # across the cut: row 8 would lead to the next episode's start


def test_the_official_reading_of_a_file_with_next_observations(tmp_path: Path) -> None:
    path = write(tmp_path / "f.hdf5", twelve_rows(next_observations=true_successors()))
    without = load_d4rl(path, use_next_observations=False)
    plain = load_d4rl(write(tmp_path / "g.hdf5", twelve_rows()))
    assert without.transitions().fingerprint == plain.transitions().fingerprint


def test_a_single_row_after_the_last_end(tmp_path: Path) -> None:
    """A last row that begins an episode: no step, yet D4RL's successor of the terminal before it."""
    rows = np.arange(N)
    path = write(tmp_path / "f.hdf5", twelve_rows(terminals=rows == 10, timeouts=rows == 4))
    dataset = load_d4rl(path)
    assert (len(dataset), dataset.n_episodes, dataset.info.provenance["dropped_rows"]) == (11, 2, 1)
    t = dataset.transitions("d4rl_qlearning")
    assert t.next_obs[:, 0].tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert dataset.transitions("full").next_obs[-1, 0] == 10  # masked
    again = Dataset.load(dataset.save(tmp_path / "own.hdf5"))
    assert again.transitions("d4rl_qlearning").fingerprint == t.fingerprint


# -- the loop ------------------------------------------------------------------------------------------------


@st.composite
def d4rl_data(draw: st.DrawFn) -> dict[str, np.ndarray]:
    n = draw(st.integers(2, 30))
    flags = st.lists(st.integers(0, 3), min_size=n, max_size=n)  # bit 0 terminal, bit 1 timeout: both may be set
    kinds = np.array(draw(flags)) if draw(st.booleans()) else np.zeros(n, dtype=int)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    data = {
        "observations": rng.standard_normal((n, 2)).astype(dtype),
        "actions": rng.uniform(-1, 1, (n, 1)).astype(dtype),
        "rewards": rng.standard_normal(n).astype(dtype),
        "terminals": kinds % 2 == 1,
        "timeouts": kinds >= 2,
    }
    if draw(st.booleans()):
        following = np.concatenate([data["observations"][1:], rng.standard_normal((1, 2))]).astype(dtype)
        ended = kinds > 0
        following[ended] = rng.standard_normal((ended.sum(), 2))
        data["next_observations"] = following
    return data


def assert_same_rows(dataset: Dataset, expected: dict[str, list[Any]]) -> None:
    if not expected["reward"]:
        with pytest.raises(DataError, match="keeps none"):
            dataset.transitions("d4rl_qlearning")
        return
    t = dataset.transitions("d4rl_qlearning")
    for key in FIELDS:
        value = getattr(t, key).numpy()
        wanted = np.array(expected[key], dtype=np.float32)
        assert value.shape == wanted.shape
        assert value.tobytes() == wanted.tobytes()


@given(d4rl_data())
def test_qlearning_rows_with_timeouts(tmp_path_factory: pytest.TempPathFactory, data: dict[str, np.ndarray]) -> None:
    dataset = load_d4rl(write(tmp_path_factory.mktemp("d4rl") / "f.hdf5", data))
    assert_same_rows(dataset, literal_rows(data, None))
    both = data["terminals"] & data["timeouts"]
    assert dataset.info.provenance["rows_with_both_flags"] == both.sum()
    full = dataset.transitions("full") if len(dataset.view_rows("full")) else None
    if "next_observations" in data:
        assert full is not None
        assert len(full) == len(data["rewards"])
        np.testing.assert_array_equal(full.terminated.numpy(), data["terminals"])


@given(d4rl_data(), st.integers(1, 8))
def test_qlearning_rows_without_timeouts(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, np.ndarray], horizon: int
) -> None:
    del data["timeouts"]
    data.pop("next_observations", None)
    path = write(tmp_path_factory.mktemp("d4rl") / "f.hdf5", data)
    dataset = load_d4rl(path, max_episode_steps=horizon)
    assert_same_rows(dataset, literal_rows(data, horizon))
    assert dataset.episode_lengths.max() <= horizon


def test_the_step_counter_restarts_at_one_after_a_terminal(tmp_path: Path) -> None:
    """Horizon 3, terminal at row 1: the second episode is rows 2-4, yet D4RL cuts at row 3, not 4."""
    data = twelve_rows(terminals=np.arange(N) == 1, timeouts=None)
    dataset = load_d4rl(write(tmp_path / "f.hdf5", data), max_episode_steps=3)
    assert dataset.episode_starts.tolist() == [0, 2, 5, 8]
    t = dataset.transitions("d4rl_qlearning")
    assert t.obs[:, 0].tolist() == [0, 1, 2, 4, 5, 7, 8, 10]
    assert t.next_obs[:, 0].tolist() == [1, 2, 3, 5, 6, 8, 9, 11]
    # Control: counting right drops rows 4, 7 and 10 instead.
    assert dataset.transitions("full").obs[:, 0].tolist() == [0, 1, 2, 3, 5, 6, 8, 9]


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 1))
def test_horizon_cuts_against_a_counter(terminals: list[bool], horizon: int, restart: int) -> None:
    expected, count = [], 0
    for terminal in terminals:
        expected.append(count == horizon - 1)
        count = 0 if expected[-1] else restart if terminal else count + 1
    assert horizon_cuts(np.array(terminals), horizon, restart).tolist() == expected


# -- files in the wild ---------------------------------------------------------------------------------------


def test_extra_keys_go_to_the_provenance_or_are_left_alone(tmp_path: Path) -> None:
    path = write(
        tmp_path / "made-here.hdf5",
        twelve_rows(
            rewards=np.arange(N)[:, None] / 2,
            terminals=(np.arange(N) == TERMINAL)[:, None].astype(np.uint8),
        )
        | {
            "infos/qpos": np.full((N, 3), np.nan),
            "infos/version": 7,
            "metadata/algorithm": "SAC",
            "metadata/temperature": float("nan"),
            "metadata/policy/fc0/weight": np.zeros((2, 2)),
            "metadata/env_id": "Hopper-v5",
            "metadata/horizon": 5,
        },
    )
    dataset = load_d4rl(path)
    assert dataset.transitions().fingerprint == (
        load_d4rl(write(tmp_path / "plain.hdf5", twelve_rows())).transitions().fingerprint
    )
    info = dataset.info
    assert (info.name, info.env_id, info.horizon) == ("made-here", "Hopper-v5", 5)
    assert info.ref_max_score == pytest.approx(3026.72, abs=0.01)
    assert info.provenance == {
        "format": "D4RL HDF5",
        "file": "made-here.hdf5",
        "infos/version": 7,
        "metadata/algorithm": "SAC",
        "metadata/temperature": "nan",
        "metadata/env_id": "Hopper-v5",
        "metadata/horizon": 5,
        "file_rows": 12,
        "dropped_rows": 1,
        "rows_with_both_flags": 0,
    }


def test_references_of_the_file_come_first(tmp_path: Path) -> None:
    scores = {"metadata/ref_min_score": 1.0, "metadata/ref_max_score": 3.0, "metadata/env_id": "Hopper-v5"}
    info = load_d4rl(write(tmp_path / "hopper_medium-v2.hdf5", twelve_rows() | scores)).info
    assert (info.ref_min_score, info.ref_max_score, info.score_source) == (1, 3, "the file's metadata")
    assert load_d4rl(write(tmp_path / "mine.hdf5", twelve_rows())).info.ref_min_score is None


def test_a_file_of_another_environment_is_not_taken_for_d4rl_s(tmp_path: Path) -> None:
    path = write(tmp_path / "hopper_medium-v2.hdf5", twelve_rows() | {"metadata/env_id": "Hopper-v5"})
    info, ours = load_d4rl(path).info, reference_returns("Hopper-v5")
    assert (info.name, info.env_id, info.ref_min_score, info.ref_max_score) == (
        "hopper_medium-v2",
        "Hopper-v5",
        ours.min,
        ours.max,
    )
    module = {"metadata/env_id": "registering.module:Hopper-v5"}
    assert load_d4rl(write(tmp_path / "mine.hdf5", twelve_rows() | module)).info.ref_max_score == ours.max


@pytest.mark.parametrize(("name", "value"), [("horizon", "abc"), ("horizon", np.inf), ("ref_min_score", "low")])
def test_facts_that_are_no_numbers_are_named(tmp_path: Path, name: str, value: object) -> None:
    path = write(tmp_path / "mine.hdf5", twelve_rows() | {f"metadata/{name}": value})
    with pytest.raises(DataError, match=rf"mine\.hdf5: metadata/{name} is '?(abc|inf|low)'?, not a finite number"):
        load_d4rl(path)


def test_d4rl_files_are_recognised_by_their_name(tmp_path: Path) -> None:
    info = load_d4rl(write(tmp_path / "hopper_medium-v2.hdf5", twelve_rows())).info
    assert (info.name, info.env_id, info.horizon, info.ref_max_score) == (
        "hopper-medium-v2",
        "Hopper-v2",
        1000,
        3234.3,
    )
    named = load_d4rl(write(tmp_path / "x.hdf5", twelve_rows(timeouts=None)), "kitchen-mixed-v0").info
    assert (named.name, named.env_id, named.horizon, named.ref_max_score) == (
        "kitchen-mixed-v0",
        None,
        280,
        4.0,
    )


def bad(key: str, row: int, value: float) -> dict[str, Any]:
    array = twelve_rows()[key].astype(float)
    array[row] = value
    return twelve_rows(**{key: array})


BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no rewards": (
        lambda: twelve_rows(rewards=None),
        "has no rewards; a D4RL-style file needs observations, actions, rewards, terminals",
    ),
    "rewards are a group": (lambda: twelve_rows(rewards=None) | {"rewards/0": [1.0]}, "has no rewards"),
    "nan": (lambda: bad("rewards", 6, np.nan), "rewards holds nan at row 6"),
    "nan in the last row": (lambda: bad("observations", 11, np.nan), "observations holds nan at row 11"),
    "ragged": (
        lambda: twelve_rows(timeouts=np.zeros(11, dtype=bool)),
        "observations has 12, actions has 12, rewards has 12, terminals has 12, timeouts has 11",
    ),
    "action outside": (
        lambda: bad("actions", 5, 2.0),
        "actions holds 2.0 at row 5 (episode 1, step 1), dimension 0, outside its bounds [-1.0, 1.0]",
    ),
    "terminals are counts": (
        lambda: twelve_rows(terminals=np.arange(N)),
        "terminals must hold booleans (or 0 and 1); row 2 is 2",
    ),
    "text": (lambda: twelve_rows(rewards=["a"] * N), "rewards must hold real numbers"),
    "flat observations": (
        lambda: twelve_rows(observations=np.zeros(N)),
        "observations must have shape [N, d_s]",
    ),
    "no horizon": (lambda: twelve_rows(timeouts=None), "has no timeouts, so max_episode_steps is needed"),
    "contradiction": (
        lambda: twelve_rows(next_observations=true_successors(), timeouts=np.zeros(N, dtype=bool)),
        "next_observations at row 8 contradicts observations at row 9 of the same episode; if the recording "
        "was cut after row 8, mark that row as truncated (a timeout); load_d4rl(path, use_next_observations="
        "False) ignores the key",
    ),
    "one loose row": (
        lambda: {key: value[4:5] for key, value in twelve_rows().items()},
        "the set is empty: its only row ends no episode",
    ),
    "no rows": (lambda: {key: value[:0] for key, value in twelve_rows().items()}, "the set is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    path = write(tmp_path / "f.hdf5", make())
    with pytest.raises(DataError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        load_d4rl(path)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"f\.hdf5: there is no such file"):
        load_d4rl(tmp_path / "f.hdf5")
    with pytest.raises(DataError, match="is not an HDF5 file"):
        load_d4rl(tmp_path)
    path = write(tmp_path / "f.hdf5", twelve_rows())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"f\.hdf5: is damaged or cut short"):
        load_d4rl(path)
    with pytest.raises(DataError, match="max_episode_steps must be at least 1; got 0"):
        load_d4rl(write(tmp_path / "g.hdf5", twelve_rows(timeouts=None)), max_episode_steps=0)


def test_wider_action_boxes_and_discrete_actions(tmp_path: Path) -> None:
    path = write(tmp_path / "f.hdf5", bad("actions", 5, 2.0))
    assert load_d4rl(path, action_low=-2, action_high=2).action_high == [2]
    path = write(tmp_path / "g.hdf5", twelve_rows(actions=np.arange(N) % 4))
    assert load_d4rl(path).n_actions == 4
    assert load_d4rl(path, n_actions=6).n_actions == 6


# -- names ---------------------------------------------------------------------------------------------------


def test_the_table_of_names() -> None:
    assert len(D4RL_DATASETS) == 181
    assert all(name == entry.name for name, entry in D4RL_DATASETS.items())
    addresses = {}
    for entry in D4RL_DATASETS.values():  # the cache is flat, so a file name may stand for one address only
        assert addresses.setdefault(entry.file_name, entry.address) == entry.address
    base = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
    for name, address, horizon, low, high in (
        ("hopper-medium-v2", "gym_mujoco_v2/hopper_medium-v2.hdf5", 1000, -20.272305, 3234.3),
        ("walker2d-full-replay-v1", "gym_mujoco_v1/walker2d_full_replay-v1.hdf5", 1000, 1.629008, 4592.3),
        ("walker2d-medium-replay-v0", "gym_mujoco/walker_mixed.hdf5", 1000, 1.629008, 4592.3),
        (
            "antmaze-umaze-v2",
            "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
            700,
            0.0,
            1.0,
        ),
        (
            "antmaze-large-play-v0",
            "ant_maze_new/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse.hdf5",
            1000,
            0.0,
            1.0,
        ),
        ("pen-human-longhorizon-v1", "hand_dapg_v1/pen-human-v1.hdf5", 200, 96.262799, 3076.8331017826877),
        ("door-cloned-v0", "hand_dapg/door-demos-v0-bc-combined.hdf5", 200, -56.512833, 2880.5693087298737),
        ("maze2d-large-dense-v1", "maze2d/maze2d-large-dense-v1.hdf5", 800, 30.569041, 303.4857382709002),
        ("maze2d-open-v0", "maze2d/maze2d-open-sparse.hdf5", 150, 0.01, 20.66),
        ("kitchen-complete-v0", "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5", 280, 0.0, 4.0),
        ("bullet-ant-medium-replay-v0", "bullet/bullet-ant_medium_replay.hdf5", 1000, 373.705955, 2650.495),
    ):
        entry = d4rl_entry(name)
        assert (entry.url, entry.horizon) == (base + address, horizon)
        assert (entry.reference.min, entry.reference.max) == (low, high)


def test_unknown_names_suggest_a_known_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no D4RL dataset 'hoper-medium-v2'.*Did you mean 'hopper-medium-v2'\?"):
        d4rl_entry("hoper-medium-v2")
    with pytest.raises(DataError, match="no D4RL dataset 'walker2d-medium-v3'"):
        load_d4rl(tmp_path / "f.hdf5", "walker2d-medium-v3")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert cache_folder() == Path.home() / ".d4rl" / "datasets"


def test_action_bounds_come_from_the_file_unless_given(tmp_path):
    path = tmp_path / "wide.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros((3, 2), np.float32)
        file["actions"] = np.array([[-2.0], [0.0], [2.0]], np.float32)
        file["rewards"] = np.zeros(3, np.float32)
        file["terminals"] = np.array([False, False, True])
        file["timeouts"] = np.zeros(3, bool)
        file["metadata/action_low"] = np.array([-2.0], np.float32)
        file["metadata/action_high"] = np.array([2.0], np.float32)
    assert load_d4rl(path).action_high.tolist() == [2.0]
    assert load_d4rl(path, action_low=-3.0, action_high=3.0).action_low.tolist() == [-3.0]
    with pytest.raises(DataError, match="action"):  # the control: D4RL's own bounds refuse this file
        load_d4rl(path, action_low=-1.0, action_high=1.0)
