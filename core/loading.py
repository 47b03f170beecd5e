"""One door to every dataset: `load_dataset` takes a file, a shipped name, a D4RL name, or ``minari:ID``."""

import os
from pathlib import Path

from .d4rl import D4RL_DATASETS, cache_folder, load_d4rl
from .dataset import FORMAT_ATTRIBUTE, Dataset, open_hdf5
from .errors import DataError, suggest
from .minari import load_minari

SHIPPED_FOLDER = Path(__file__).parent / "shipped"
"""Folder of the small datasets that come with the package, one HDF5 file each."""


def shipped_datasets() -> dict[str, Path]:
    """Return the datasets that come with the package: name (the file's stem) to path."""
    return {path.stem: path for path in sorted(SHIPPED_FOLDER.glob("*.hdf5"))}


def load_dataset(path_or_name: str | os.PathLike[str]) -> Dataset:
    """Load a dataset.

    Tried in this order:

    1. ``minari:ID``: a dataset of the local Minari store;
    2. an existing file: our own HDF5 or a D4RL-style one, told apart by content;
    3. the name of a dataset shipped with the package (`shipped_datasets`);
    4. a D4RL name such as ``hopper-medium-v2``: the file in D4RL's cache folder (``$D4RL_DATASET_DIR``, else
       ``~/.d4rl/datasets``).

    Nothing is downloaded. For other options of a D4RL-style file see `corollary.core.d4rl.load_d4rl`.

    Raises:
        DataError: nothing there, or nothing usable; says what to do.
    """
    if not isinstance(path_or_name, str | os.PathLike):
        raise DataError(
            f"load_dataset takes a file or a name, not {type(path_or_name).__name__}: corollary.core.minari's "
            "from_minari takes a Minari dataset, Dataset.from_arrays arrays."
        )
    name = os.fspath(path_or_name)
    if name.startswith("minari:"):
        return load_minari(name.removeprefix("minari:"))
    if Path(name).is_file():
        return load_file(name)
    shipped = shipped_datasets()
    if name in shipped:
        return load_file(shipped[name])
    if name in D4RL_DATASETS:
        cached = cache_folder() / D4RL_DATASETS[name].file_name
        if not cached.exists():
            raise DataError(f"{name} is not in {cached.parent}; fetch it with: corollary data get {name}")
        return load_d4rl(cached, name)
    if Path(name).is_dir():
        raise DataError(f"{name} is not an HDF5 file but a folder: give a file in it")
    if os.sep in name or Path(name).suffix:
        raise DataError(f"{name}: there is no such file")
    raise DataError(
        f"{name!r} is neither a file nor a known dataset; `corollary data list` shows the names."
        f"{suggest(name, [*shipped, *D4RL_DATASETS])}"
    )


def load_file(path: str | os.PathLike[str]) -> Dataset:
    """Load an HDF5 file: our own layout if it says so, else D4RL's.

    Raises:
        DataError: a file that is not HDF5, is damaged, or holds no usable dataset.
    """
    with open_hdf5(path) as file:
        own = FORMAT_ATTRIBUTE in file.attrs
    return Dataset.load(path) if own else load_d4rl(path)
