"""The one door: every kind of source, and what is said when there is none."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from corollary.core import loading
from corollary.core.dataset import Dataset, DatasetInfo, Episode
from corollary.core.errors import DataError
from corollary.core.loading import load_dataset, shipped_datasets


def own(path: Path, name: str = "mine") -> Path:
    return Dataset.from_episodes([Episode([[0.0], [1.0]], [[0.5]], [2.0], True, False)], info=DatasetInfo(name)).save(
        path
    )


def d4rl(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["observations"] = np.arange(3.0)[:, None]
        file["actions"] = np.zeros((3, 1))
        file["rewards"] = [1.0, 2.0, 3.0]
        file["terminals"] = [False, True, False]
        file["timeouts"] = [False, False, True]
    return path


def test_files_are_told_apart_by_content(tmp_path: Path) -> None:
    assert load_dataset(own(tmp_path / "a.data")).info.name == "mine"
    assert load_dataset(str(d4rl(tmp_path / "b.data"))).info.provenance["format"] == "D4RL HDF5"


def test_shipped_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SHIPPED_FOLDER", tmp_path)
    own(tmp_path / "tiny-set.hdf5")
    assert shipped_datasets() == {"tiny-set": tmp_path / "tiny-set.hdf5"}
    assert load_dataset("tiny-set").info.name == "mine"
    with pytest.raises(DataError, match=r"'tiny-sett' is neither.*Did you mean 'tiny-set'\?"):
        load_dataset("tiny-sett")


def test_d4rl_names_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    with pytest.raises(DataError, match="fetch it with: corollary data get pen-human-longhorizon-v0"):
        load_dataset("pen-human-longhorizon-v0")
    d4rl(tmp_path / "pen-v0_demos_clipped.hdf5")
    # Two names share this file; the one asked for decides the horizon.
    assert load_dataset("pen-human-longhorizon-v0").info.horizon == 200
    assert load_dataset("pen-human-v0").info.horizon == 100


def test_an_existing_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own(tmp_path / "hopper-medium-v2", name="local")
    assert load_dataset("hopper-medium-v2").info.name == "local"


def test_minari_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(loading, "load_minari", asked.append)
    load_dataset("minari:D4RL/pen/human-v2")
    assert asked == ["D4RL/pen/human-v2"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hopper-medum-v2", r"neither a file nor a known dataset.*Did you mean 'hopper-medium-v2'\?"),
        ("folder/set", "folder/set: there is no such file"),
        ("set.hdf5", "set.hdf5: there is no such file"),
    ],
)
def test_nothing_there(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(name)


def test_a_folder_of_a_dataset_s_name_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(loading.shipped_datasets()))
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_dataset(name).info.name == name


def test_something_else_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not an HDF5 file"):
        load_dataset(tmp_path)
    (tmp_path / "x.csv").write_text("1,2\n")
    with pytest.raises(DataError, match=r"x\.csv: is not an HDF5 file"):
        load_dataset(tmp_path / "x.csv")
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["weights"] = [1.0]
    with pytest.raises(DataError, match=r"x\.hdf5: has no observations; a D4RL-style file needs"):
        load_dataset(tmp_path / "x.hdf5")


@pytest.mark.parametrize("source", [None, [Episode([[0.0], [1.0]], [[0.5]], [2.0], True, False)]])
def test_what_is_neither_a_file_nor_a_name_is_shown_its_door(source) -> None:
    with pytest.raises(
        DataError, match=f"takes a file or a name, not {type(source).__name__}: .*from_minari.*from_arrays"
    ):
        load_dataset(source)
