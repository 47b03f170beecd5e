"""The canonical store and its flat transitions, against a set small enough to check by hand."""

import dataclasses
import json
import os
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corollary.core.dataset import (
    ACTION_TOLERANCE,
    Dataset,
    DatasetInfo,
    Episode,
)
from corollary.core.errors import ConfigError, DataError
from corollary.core.scores import REFERENCE_RETURNS

INFO = DatasetInfo(
    "tiny",
    env_id="Tiny-v0",
    ref_min_score=-10.0,
    ref_max_score=30.0,
    score_source="by hand",
    description="θ = ½",
    provenance={"seed": 3, "fraction": 0.1, "maker": "test"},
    horizon=3,
)


def columns() -> dict[str, np.ndarray]:
    """Two episodes: three steps to a termination, then two steps cut by a time limit."""
    return {
        "observations": np.array([[0, 0], [1, 10], [2, 20], [5, 50], [6, 60]], dtype=np.float32),
        "actions": np.array([[0.0], [0.1], [0.2], [0.5], [0.6]], dtype=np.float32),
        "rewards": np.array([1, 2, 3, 4, 5], dtype=np.float32),
        "terminated": np.array([0, 0, 1, 0, 0], dtype=bool),
        "truncated": np.array([0, 0, 0, 0, 1], dtype=bool),
        "next_observations": np.array([[1, 10], [2, 20], [3, 30], [6, 60], [7, 70]], dtype=np.float32),
    }


def tiny(**changes: object) -> Dataset:
    return Dataset.from_arrays(**{**columns(), "info": INFO, **changes})  # type: ignore[arg-type]


# -- the views -----------------------------------------------------------------------------------------------


def test_episodes_keep_one_observation_more_than_rewards() -> None:
    dataset = tiny()
    assert (len(dataset), dataset.n_episodes, dataset.observation_dim, dataset.action_dim) == (5, 2, 2, 1)
    np.testing.assert_array_equal(dataset.observations[:, 0], [0, 1, 2, 3, 5, 6, 7])
    np.testing.assert_array_equal(dataset.episode_starts, [0, 3])
    np.testing.assert_array_equal(dataset.episode_lengths, [3, 2])
    np.testing.assert_array_equal(dataset.episode_of_row, [0, 0, 0, 1, 1])
    assert repr(dataset) == "Dataset('tiny': 5 rows, 2 episodes, observation 2, action 1)"


def test_full_view_by_hand() -> None:
    t = tiny().transitions()
    assert t.obs[:, 0].tolist() == [0, 1, 2, 5, 6]
    assert t.next_obs[:, 1].tolist() == [10, 20, 30, 60, 70]
    assert t.terminated.tolist() == [0, 0, 1, 0, 0]
    assert t.truncated.tolist() == [0, 0, 0, 0, 1]
    torch.testing.assert_close(t.next_action[:, 0], torch.tensor([0.1, 0.2, 0.2, 0.6, 0.6]))
    assert t.next_action_valid.tolist() == [1, 1, 0, 1, 0]
    assert t.episode.tolist() == [0, 0, 0, 1, 1]


def test_a_truncated_row_needs_its_successor() -> None:
    dataset = tiny(next_observations=None)
    assert dataset.final_obs_known.tolist() == [False, False]
    t = dataset.transitions()
    assert t.reward.tolist() == [1, 2, 3, 4]  # row 4 was cut and nobody knows what came next
    assert t.terminated.tolist() == [0, 0, 1, 0]  # row 2 terminated: its successor is masked, so it stays
    assert t.next_obs[2].tolist() == [2, 20]  # the last known observation, repeated
    # The row before the dropped one still knows the action taken after it.
    assert t.next_action[3].item() == pytest.approx(0.6)
    assert t.next_action_valid[3] == 1


def test_d4rl_view_of_other_sources_treats_them_as_a_d4rl_file() -> None:
    t = tiny().transitions("d4rl_qlearning")
    assert t.reward.tolist() == [1, 2, 3, 4]
    assert t.next_obs[:, 0].tolist() == [1, 2, 5, 6]  # after the terminal: the next episode's first one
    ends_with_termination = tiny(truncated=np.array([0, 0, 1, 0, 0]), terminated=np.array([0, 0, 0, 0, 1]))
    assert ends_with_termination.transitions("d4rl_qlearning").reward.tolist() == [1, 2, 4]
    assert ends_with_termination.transitions("full").reward.tolist() == [1, 2, 3, 4, 5]


def test_a_view_without_rows_is_an_error() -> None:
    only_row = {key: value[:1] for key, value in columns().items()} | {"truncated": [True]}
    with pytest.raises(DataError, match="'d4rl_qlearning' keeps none of its 1 rows"):
        tiny(**only_row).transitions("d4rl_qlearning")
    with pytest.raises(ConfigError, match=r"no view 'ful'.*Did you mean 'full'\?"):
        tiny().transitions("ful")  # type: ignore[arg-type]


def test_images_are_flattened_and_discrete_actions_become_their_index() -> None:
    dataset = tiny(
        observations=np.arange(20, dtype=np.uint8).reshape(5, 2, 2),
        next_observations=None,
        actions=np.array([0, 2, 1, 0, 2]),
    )
    assert (dataset.observation_dim, dataset.action_dim, dataset.n_actions) == (4, 3, 3)
    assert dataset.action_low is None
    assert dataset.actions.dtype == np.int64
    t = dataset.transitions()
    assert t.obs[1].tolist() == [4, 5, 6, 7]
    assert t.action.tolist() == [[0], [2], [1], [0]]


@st.composite
def episode_lists(draw: st.DrawFn) -> list[Episode]:
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    d_s, d_a = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    endings = [bool(rng.integers(2)) for _ in lengths]
    return [
        Episode(
            rng.standard_normal((length + 1, d_s)),
            rng.uniform(-1, 1, (length, d_a)),
            rng.standard_normal(length),
            ending,
            not ending,
        )
        for length, ending in zip(lengths, endings, strict=True)
    ]


@given(episode_lists())
def test_every_row_of_recorded_episodes_has_its_true_successor(episodes: list[Episode]) -> None:
    t = Dataset.from_episodes(episodes).transitions()
    expected_obs = np.concatenate([np.asarray(e.observations)[:-1] for e in episodes])
    expected_next = np.concatenate([np.asarray(e.observations)[1:] for e in episodes])
    np.testing.assert_array_equal(t.obs.numpy(), expected_obs.astype(np.float32))
    np.testing.assert_array_equal(t.next_obs.numpy(), expected_next.astype(np.float32))
    assert ((t.terminated + t.truncated) == 1 - t.next_action_valid).all()


@given(episode_lists())
def test_arrays_and_episodes_make_the_same_dataset(episodes: list[Episode]) -> None:
    def flat(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(values)

    last = [np.arange(len(np.asarray(e.rewards))) == len(np.asarray(e.rewards)) - 1 for e in episodes]
    from_arrays = Dataset.from_arrays(
        flat([np.asarray(e.observations)[:-1] for e in episodes]),
        flat([np.asarray(e.actions) for e in episodes]),
        flat([np.asarray(e.rewards) for e in episodes]),
        flat([end & e.terminated for end, e in zip(last, episodes, strict=True)]),
        flat([end & e.truncated for end, e in zip(last, episodes, strict=True)]),
        flat([np.asarray(e.observations)[1:] for e in episodes]),
        info=INFO,
    )
    assert from_arrays.fingerprint == Dataset.from_episodes(episodes, info=INFO).fingerprint


# -- transitions ---------------------------------------------------------------------------------------------


@given(shape=st.lists(st.integers(0, 4), max_size=3), seed=st.integers(0, 1000))
def test_gather_equals_plain_indexing(shape: list[int], seed: int) -> None:
    t = tiny().transitions()
    index = torch.randint(len(t), shape, generator=torch.Generator().manual_seed(seed))
    batch = t.gather(index)
    for key in ("obs", "action", "reward", "next_obs", "terminated", "next_action", "next_action_valid"):
        torch.testing.assert_close(getattr(batch, key), getattr(t, key)[index], rtol=0, atol=0)
    assert batch.index is index


def test_transitions_hold_their_data_once() -> None:
    t = tiny().transitions()
    assert t.obs.untyped_storage().data_ptr() == t.next_action.untyped_storage().data_ptr()
    assert t._rows.is_contiguous()


def test_replacing_a_field_reaches_the_batches() -> None:
    t = tiny().transitions()
    changed = dataclasses.replace(t, reward=10 * t.reward)
    assert changed.gather(torch.tensor([1, 4])).reward.tolist() == [20, 50]
    assert t.gather(torch.tensor([1, 4])).reward.tolist() == [2, 5]
    assert changed.fingerprint != t.fingerprint


def test_moving_transitions() -> None:
    t = tiny().transitions()
    assert t.to() is t
    assert t.to("cpu", torch.float32) is t
    double = t.to(dtype=torch.float64)
    assert double.obs.dtype == double.truncated.dtype == torch.float64
    assert double.episode.dtype == torch.int64
    assert t.to(dtype=torch.float64).fingerprint == double.fingerprint != t.fingerprint


def test_transitions_of_unequal_shapes_are_refused() -> None:
    t = tiny().transitions()
    with pytest.raises(DataError, match=re.escape("reward must have shape [5]; got [4]")):
        dataclasses.replace(t, reward=t.reward[:4])
    with pytest.raises(DataError, match="obs and action must be matrices"):
        dataclasses.replace(t, obs=t.reward)


# -- immutability --------------------------------------------------------------------------------------------


def test_a_dataset_is_read_only_and_shares_nothing_with_its_source() -> None:
    source = columns()
    dataset = Dataset.from_arrays(**source, info=INFO)
    before = dataset.fingerprint
    for array in dataset._arrays().values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.rewards = source["rewards"]  # type: ignore[misc]
    for array in source.values():
        array[...] = 0  # the caller's arrays stay the caller's
    assert dataclasses.replace(dataset).fingerprint == before


def test_transitions_do_not_share_memory_with_the_dataset() -> None:
    dataset = tiny()
    dataset.transitions().reward.zero_()
    assert dataset.rewards.tolist() == [1, 2, 3, 4, 5]


# -- returns and scores --------------------------------------------------------------------------------------


def test_episode_returns_by_hand() -> None:
    np.testing.assert_allclose(tiny().episode_returns(), [6, 9])
    np.testing.assert_allclose(tiny().episode_returns(0.5), [1 + 1 + 0.75, 4 + 2.5])
    np.testing.assert_allclose(tiny().episode_returns(0.0), [1, 4])


def test_normalized_score_by_hand() -> None:
    np.testing.assert_allclose(tiny().normalized_score([-10, 10, 30, 70]), [0, 50, 100, 200])
    no_reference = tiny(info=DatasetInfo("mine"))
    with pytest.raises(DataError, match=r"mine has no reference returns.*ref_min_score.*ref_max_score"):
        no_reference.normalized_score(1.0)


def test_numbers_of_numpy_are_kept_as_python_s() -> None:
    info = DatasetInfo("mine", horizon=np.int64(5), ref_max_score=np.float32(2))
    assert (type(info.horizon), type(info.ref_max_score)) == (int, float)
    assert DatasetInfo.from_json(info.to_json()) == info
    with pytest.raises(DataError, match=r"n_actions must be a whole number; got 2\.5"):
        Dataset.from_arrays(np.zeros((2, 1)), np.array([0, 1]), np.zeros(2), [False] * 2, [False, True], n_actions=2.5)


def test_references_must_differ() -> None:
    with pytest.raises(DataError, match=r"ref_min_score and ref_max_score are both 5\.0; they must differ"):
        DatasetInfo("mine", ref_min_score=5.0, ref_max_score=5.0)


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "registering.module:HalfCheetah-v5"])
def test_known_references_are_filled_in_where_none_are_given(env_id: str, tmp_path: Path) -> None:
    reference = REFERENCE_RETURNS["HalfCheetah-v5"]
    info = DatasetInfo("mine", env_id=env_id)
    filled = dataclasses.replace(
        info, ref_min_score=reference.min, ref_max_score=reference.max, score_source=reference.source
    )
    episode = Episode([[0.0], [1.0]], [[0.0]], [1.0], True, False)
    for dataset in (tiny(info=info), Dataset.from_episodes([episode], info=info)):
        assert dataset.info == filled
        assert dataset.normalized_score(reference.max) == pytest.approx(100)
        again = Dataset.load(dataset.save(tmp_path / "set.hdf5"))
        assert (again.info, again.fingerprint) == (filled, dataset.fingerprint)
    assert tiny(info=info).fingerprint == tiny(info=filled).fingerprint
    without = dataclasses.replace(tiny(info=info), info=info)  # what is stored without them stays so
    assert Dataset.load(without.save(tmp_path / "set.hdf5")).info == info


@pytest.mark.parametrize(
    "info",
    [
        DatasetInfo("mine"),
        DatasetInfo("mine", env_id="HalfCheetah-v4"),
        DatasetInfo("mine", env_id="HalfCheetah-v5", ref_min_score=0.0, ref_max_score=1.0, score_source="by hand"),
        DatasetInfo("mine", env_id="HalfCheetah-v5", ref_min_score=0.0),
    ],
)
def test_references_are_neither_replaced_nor_taken_from_another_version(info: DatasetInfo) -> None:
    assert tiny(info=info).info == info


def ranked(returns: list[float]) -> Dataset:
    return Dataset.from_episodes([Episode([[r], [r]], [[0.0]], [r], True, False) for r in returns], info=INFO)


def test_top_fraction_keeps_the_best_in_their_order() -> None:
    kept = ranked([3, 9, 1, 7, 5]).top_fraction(0.4)
    assert kept.rewards.tolist() == [9, 7]
    assert kept.info.provenance["top_fraction"] == 0.4
    assert ranked([5, 5, 5]).top_fraction(0.1).n_episodes == 1  # never none
    assert ranked([1, 5, 5]).top_fraction(0.34).observations.tolist() == [[5], [5]]
    assert ranked([3, 9]).top_fraction(1.0).rewards.tolist() == [3, 9]
    # Of equal returns the earlier episodes win.
    numbered = Dataset.from_episodes(
        Episode([[i], [i]], [[0.0]], [i % 2], True, False) for i in range(100)
    ).top_fraction(0.1)
    assert numbered.observations[::2, 0].tolist() == list(range(1, 20, 2))
    assert ranked(list(range(100))).top_fraction(0.29).n_episodes == 29  # 0.29 * 100 < 29 in floating point


def test_top_fraction_ranks_by_discounted_return() -> None:
    early = Episode([[0.0]] * 3, [[0.0]] * 2, [2.0, 0.0], True, False)
    late = Episode([[1.0]] * 3, [[0.0]] * 2, [0.0, 3.0], False, True)
    dataset = Dataset.from_episodes([early, late])
    assert dataset.top_fraction(0.5, discount=0.5).rewards.tolist() == [2, 0]  # 2 > 1.5
    assert dataset.top_fraction(0.5, discount=1.0).rewards.tolist() == [0, 3]  # 2 < 3
    assert dataset.top_fraction(0.5, discount=1.0).transitions().truncated.tolist() == [0, 1]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_top_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"fraction must be in \(0, 1\]"):
        tiny().top_fraction(fraction)


def test_one_episode_by_its_number() -> None:
    kept = tiny().episode(1)
    assert kept.rewards.tolist() == [4, 5]
    assert kept.transitions().obs.tolist() == tiny().transitions().obs[3:].tolist()
    assert (kept.n_episodes, kept.info.provenance["episode"]) == (1, 1)
    assert kept.info.name == f"{tiny().info.name}-episode1"
    for number in (-1, 2):
        with pytest.raises(ConfigError, match=f"has 2 episodes, from 0 on; there is no {number}"):
            tiny().episode(number)


def test_summary_by_hand() -> None:
    dataset = tiny(actions=np.array([[-1.0], [0.1], [0.985], [0.5], [0.6]]), next_observations=None)
    summary = dataset.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["rows"], summary["episodes"], summary["terminals"], summary["timeouts"]) == (5, 2, 1, 1)
    assert summary["return"] == {"mean": 7.5, "min": 6, "25%": 6.75, "50%": 7.5, "75%": 8.25, "max": 9}
    assert summary["length"]["mean"] == 2.5
    assert summary["rows_dropped"] == {"full": 1, "d4rl_qlearning": 1}
    assert summary["reward"] == {"min": 1, "max": 5}
    assert summary["action_saturation"] == pytest.approx(2 / 5)
    std = np.std([0, 1, 2, 5, 6])  # final observations are no rows
    assert summary["state_std"] == pytest.approx({"min": std, "max": 10 * std})
    assert summary["score"] == pytest.approx(100 * 17.5 / 40)
    assert tiny(info=DatasetInfo("mine")).summary()["score"] is None


# -- files ---------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(episode_lists())
def test_save_and_load_are_lossless(tmp_path_factory: pytest.TempPathFactory, episodes: list[Episode]) -> None:
    path = tmp_path_factory.mktemp("saved") / "set.hdf5"
    dataset = Dataset.from_episodes(episodes, info=INFO)
    loaded = Dataset.load(dataset.save(path))
    assert loaded.info == dataset.info
    assert loaded.fingerprint == dataset.fingerprint
    arrays, again = dataset._arrays(), loaded._arrays()
    assert arrays.keys() == again.keys()
    for key, array in arrays.items():
        assert array.dtype == again[key].dtype
        np.testing.assert_array_equal(array, again[key])


def test_discrete_sets_survive_saving(tmp_path: Path) -> None:
    dataset = tiny(actions=np.array([0, 2, 1, 0, 2]), n_actions=7)
    loaded = Dataset.load(dataset.save(tmp_path / "discrete.hdf5"))
    assert (loaded.n_actions, loaded.fingerprint) == (7, dataset.fingerprint)


def test_fingerprint_covers_arrays_and_info() -> None:
    base = tiny().fingerprint
    assert tiny().fingerprint == base
    assert tiny(rewards=[1, 2, 3, 4, 6]).fingerprint != base
    assert tiny(action_high=1.5).fingerprint != base
    assert tiny(info=dataclasses.replace(INFO, ref_max_score=31.0)).fingerprint != base


def change_reward(file: h5py.File) -> None:
    file["rewards"][0] += 1


def change_info(file: h5py.File) -> None:
    file.attrs["info"] = file.attrs["info"].replace("30.0", "40.0")


def break_info(file: h5py.File) -> None:
    file.attrs["info"] = "{"


def drop_array(file: h5py.File) -> None:
    del file["episode_starts"]


@pytest.mark.parametrize("damage", [change_reward, change_info, break_info, drop_array])
def test_a_damaged_file_says_so(tmp_path: Path, damage: object) -> None:
    path = tiny().save(tmp_path / "set.hdf5")
    with h5py.File(path, "r+") as file:
        damage(file)  # type: ignore[operator]
    with pytest.raises(DataError, match=r"set\.hdf5: is damaged"):
        Dataset.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.hdf5"
    with pytest.raises(DataError, match=r"x\.hdf5: there is no such file"):
        Dataset.load(path)
    path.write_text("s,a,r\n")
    with pytest.raises(DataError, match=r"x\.hdf5: is not an HDF5 file"):
        Dataset.load(path)
    with h5py.File(path, "w") as file:
        file["rewards"] = [0.0]
    with pytest.raises(DataError, match="was not saved by corollary"):
        Dataset.load(path)
    tiny().save(path)
    with h5py.File(path, "r+") as file:
        file.attrs["corollary_dataset_version"] = 99
    with pytest.raises(DataError, match="dataset format 99; this version reads format 1"):
        Dataset.load(path)
    tiny().save(path)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(DataError, match="damaged or cut short"):
        Dataset.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny().save(tmp_path / "set.hdf5")
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    changed = tiny(rewards=[9, 9, 9, 9, 9])
    for where, name in ((h5py.Group, "create_dataset"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, lambda *args, **kwargs: full_disk())
            with pytest.raises(OSError, match="No space left"):
                changed.save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["set.hdf5"]
    assert Dataset.load(changed.save(path)).rewards[0] == 9  # the control: without the fault it is replaced


# -- bad input -----------------------------------------------------------------------------------------------


def with_entry(key: str, place: tuple[int, ...], value: float) -> dict[str, np.ndarray]:
    array = columns()[key].astype(np.float64)
    array[place] = value
    return {key: array}


def no_rows() -> dict[str, np.ndarray]:
    return {key: value[:0] for key, value in columns().items()}


BAD = {
    "nan observation": (
        with_entry("observations", (3, 1), np.nan),
        "observations holds nan at row 3, dimension 1",
    ),
    "infinite reward": (with_entry("rewards", (2,), np.inf), "rewards holds inf at row 2; every entry"),
    "beyond float32": (with_entry("rewards", (2,), 1e300), "rewards holds inf at row 2"),
    "nan action": (with_entry("actions", (4, 0), np.nan), "actions holds nan at row 4, dimension 0"),
    "nan successor": (
        with_entry("next_observations", (1, 0), np.nan),
        "next_observations holds nan at row 1, dimension 0",
    ),
    "unequal lengths": (
        {"rewards": np.zeros(4)},
        "observations has 5, actions has 5, rewards has 4, terminated has 5",
    ),
    "ragged rows": ({"observations": [[0, 0], [1], [2, 2], [3, 3], [4, 4]]}, "observations is ragged"),
    "flat observations": ({"observations": np.zeros(5)}, "observations must have shape [N, d_s]; got [5]"),
    "reward matrix": ({"rewards": np.zeros((5, 1))}, "rewards must have shape [N]; got [5, 1]"),
    "flat float actions": ({"actions": np.zeros(5)}, "actions must be floats of shape [N, d_a], or integers"),
    "integer action matrix": ({"actions": np.zeros((5, 1), dtype=int)}, "got int64 of shape [5, 1]"),
    "text rewards": ({"rewards": np.array(list("abcde"))}, "rewards must hold real numbers; got dtype <U1"),
    "complex observations": ({"observations": np.zeros((5, 2), dtype=complex)}, "got dtype complex128"),
    "object observations": ({"observations": np.zeros((5, 2), dtype=object)}, "got dtype object"),
    "boolean rewards": ({"rewards": np.zeros(5, dtype=bool)}, "rewards must hold real numbers"),
    "flag of 2": ({"terminated": [0, 0, 2, 0, 0]}, "terminated must hold booleans (or 0 and 1); row 2 is 2"),
    "flag matrix": ({"truncated": np.zeros((5, 1))}, "truncated must be booleans of shape [N]"),
    "text flags": ({"terminated": np.array(list("abcde"))}, "terminated must be booleans of shape [N]"),
    "action outside": (
        with_entry("actions", (3, 0), -1.5),
        "actions holds -1.5 at row 3 (episode 1, step 0), dimension 0, outside its bounds [-1.0, 1.0]",
    ),
    "no rows": (no_rows(), "the set is empty"),
    "no end": (
        {"truncated": np.zeros(5, dtype=bool)},
        "the flags end no episode at the last row, 4: if recording stopped there, set its truncated to True, "
        "and pass next_observations",
    ),
    "both flags": (
        {"truncated": [0, 0, 1, 0, 1]},
        "row 2 is both terminated and truncated: keep terminated if the task ended there",
    ),
    "contradicted successor": (
        with_entry("next_observations", (0, 1), 10.01),
        "next_observations at row 0 contradicts observations at row 1 of the same episode",
    ),
    "successors of another shape": (
        {"next_observations": np.zeros((5, 3))},
        "next_observations has shape [5, 3], but observations [5, 2]",
    ),
    "no observation entries": (
        {"observations": np.zeros((5, 0)), "next_observations": None},
        "observations must have shape [N+E, d_s], d_s > 0",
    ),
    "no action entries": ({"actions": np.zeros((5, 0))}, "actions must have shape [N, d_a], d_a > 0"),
    "inverted bounds": ({"action_low": 1.0, "action_high": -1.0}, "must be finite with low < high"),
    "unbounded actions": ({"action_high": np.inf}, "action bounds must be finite"),
    "bounds of another size": ({"action_low": [-1.0, -1.0]}, "must be numbers or have shape [1]"),
    "n_actions for floats": ({"n_actions": 3}, "n_actions is for discrete actions"),
    "discrete action outside": (
        {"actions": np.array([0, 1, 2, 3, 0]), "n_actions": 3},
        "actions holds 3 at row 3 (episode 1, step 0), outside the 3 discrete actions",
    ),
    "negative discrete action": ({"actions": np.array([0, -1, 2, 3, 0])}, "actions holds -1 at row 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays(name: str) -> None:
    tiny()  # the control: the unchanged columns make a dataset
    changes, message = BAD[name]
    with pytest.raises(DataError, match=re.escape(message)):
        tiny(**changes)  # type: ignore[arg-type]


def test_what_is_accepted() -> None:
    slack = 2.0 * ACTION_TOLERANCE  # of a box of width 2
    tiny(actions=np.array([[1 + 0.5 * slack], [0], [0], [0], [-1 - 0.5 * slack]]))
    with pytest.raises(DataError, match="outside its bounds"):
        tiny(actions=np.array([[1 + 2 * slack], [0], [0], [0], [0]]))
    assert tiny(rewards=[1, 2, 3, 4, 5]).rewards.dtype == np.float32
    assert tiny(observations=columns()["observations"].astype(int)).observations.dtype == np.float32
    assert tiny(terminated=[0.0, 0.0, 1.0, 0.0, 0.0]).terminated.dtype == np.bool_
    assert tiny(rewards=torch.arange(1, 6)).fingerprint == tiny().fingerprint
    third = tiny(rewards=np.full(5, 1 / 3)).rewards  # float64 is rounded to the nearest float32
    assert third[0] == np.float32(1 / 3)


def episode(**changes: object) -> Episode:
    return Episode([[0.0], [1.0], [2.0]], [[0.0], [0.0]], [1.0, 2.0], True, False)._replace(**changes)


def test_bad_episodes() -> None:
    Dataset.from_episodes([episode()])
    for bad, message in [
        (episode(observations=[[0.0], [1.0]]), "episode 1: 2 steps need 3 observations; got 2"),
        (episode(rewards=[1.0, np.nan]), "episode 1: rewards holds nan at row 1"),
        (episode(observations=[[0.0], [1.0], [np.inf]]), "episode 1: observations holds inf at row 2"),
        (
            episode(actions=[[0.0]]),
            "episode 1: every column needs the same number of rows, but actions has 1",
        ),
        (
            episode(observations=np.zeros((3, 2))),
            "episode 1: observations are float32 of shape [2] per row, but",
        ),
        (
            episode(actions=[0, 1]),
            "episode 1: actions are int64 of shape [] per row, but float32 of shape [1]",
        ),
        (
            episode(terminated=[True, False]),
            "terminated is set at row 2 (episode 1, step 0), yet the episode goes on",
        ),
        (episode(terminated=False), "the flags end no episode at row 3 (episode 1, step 1)"),
        (episode(truncated=True), "row 3 is both terminated and truncated"),
    ]:
        with pytest.raises(DataError, match=re.escape(message)):
            Dataset.from_episodes([episode(), bad])
    with pytest.raises(DataError, match="it has no episodes"):
        Dataset.from_episodes([])


def test_the_constructor_checks_too() -> None:
    dataset = tiny()
    for changes, message in (
        ({"rewards": dataset.rewards.astype(np.float64)}, "rewards must be float32 of shape [5]"),
        ({"observations": dataset.observations[:-1]}, "observations must be float32 of shape [7, 2]"),
        (
            {"episode_starts": np.array([0, 4])},
            "terminated is set at row 2 (episode 0, step 2), yet the episode",
        ),
        ({"episode_starts": np.array([1, 3])}, "episode_starts must begin with 0"),
        ({"episode_starts": np.array([0, 0])}, "episode_starts must begin with 0"),
        ({"action_low": None}, "give action_low and action_high for continuous actions"),
        ({"rewards": dataset.rewards * np.float32(np.nan)}, "rewards holds nan at row 0"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            dataclasses.replace(dataset, **changes)


@pytest.mark.parametrize("value", [np.nan, np.inf, None, [1], np.int64(3)])
def test_provenance_holds_plain_data(value: object) -> None:
    with pytest.raises(DataError, match="only text and finite numbers"):
        DatasetInfo("x", provenance={"key": value})  # type: ignore[dict-item]
    with pytest.raises(DataError, match="ref_max_score is"):
        DatasetInfo("x", ref_max_score=float("nan"))
