"""D4RL: its HDF5 files, read with its own semantics, and the table of its dataset names.

A D4RL file holds one row per step (observations, actions, rewards, terminals, usually timeouts) and no final
observations, except that the Gym-MuJoCo files of versions 1 and 2 add next_observations, which D4RL's own
loaders ignore. `load_d4rl` reads such a file into a `Dataset`, from which both views can be had:

* ``transitions("full")``: every row whose true successor the file holds. Where next_observations exist that
  is every row. Without them a row with a timeout has no successor and is left out; the last row of a trailing
  partial episode serves as its final observation and is not a row of its own
  (``provenance["dropped_rows"]``).
* ``transitions("d4rl_qlearning")``: the rows of ``d4rl.qlearning_dataset(env)``, bit for bit. For a file of n
  rows: rows ``i < n-1`` without a timeout, in order, with the file's row i+1 as successor, also across the
  end of an episode (harmless under the bootstrap mask at terminals, and the reason not to use that view with
  a dynamics model). Without the key timeouts, D4RL counts steps instead; its counter restarts at 1 after a
  terminal, so later cuts fall one row early: reproduced here, and not in the view ``"full"``.

A row with both flags is a termination on the last permitted step: terminated for us, skipped by D4RL.

Source: Fu et al. 2020, *D4RL: Datasets for Deep Data-Driven Reinforcement Learning*, arXiv 2004.07219, and
its code (``d4rl/__init__.py``, ``d4rl/offline_env.py``, ``d4rl/infos.py`` and the environment registrations).
The package itself needs gym and mujoco-py and is never imported.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .columns import action_fields, check_successors, checked_columns, interleave
from .dataset import Dataset, DatasetInfo, open_hdf5, prefixed
from .errors import DataError, suggest
from .scores import REFERENCE_RETURNS, ReferenceReturns, known_reference

BASE_ADDRESS = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
"""Address that every `D4RLEntry.address` is relative to."""

_REQUIRED = ("observations", "actions", "rewards", "terminals")
_OPTIONAL = ("timeouts", "next_observations")


# ------------------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class D4RLEntry:
    """One registered D4RL dataset.

    Attributes:
        name: the name it is known by, such as ``hopper-medium-v2``.
        environment: key of its reference returns, without the prefix ``d4rl/``.
        address: path of its file below `BASE_ADDRESS`.
        horizon: ``max_episode_steps`` of its environment.
    """

    name: str
    environment: str
    address: str
    horizon: int

    @property
    def file_name(self) -> str:
        """Name of the file in D4RL's cache folder."""
        return self.address.rsplit("/", 1)[-1]

    @property
    def url(self) -> str:
        """Full download address."""
        return BASE_ADDRESS + self.address

    @property
    def reference(self) -> ReferenceReturns:
        """Reference returns that D4RL publishes for it."""
        return REFERENCE_RETURNS[f"d4rl/{self.environment}"]

    @property
    def env_id(self) -> str | None:
        """Gym id of the simulator behind the locomotion sets; None for environments of D4RL's own."""
        return _GYM_IDS.get(self.environment)


_GYM_IDS = {
    "halfcheetah": "HalfCheetah-v2",
    "hopper": "Hopper-v2",
    "walker2d": "Walker2d-v2",
    "ant": "Ant-v2",
}


def _locomotion() -> list[D4RLEntry]:
    entries = []
    for robot in ("halfcheetah", "hopper", "walker2d", "ant"):
        for kind in ("random", "medium", "expert", "medium-replay", "medium-expert"):
            stem = f"{'walker' if robot == 'walker2d' and kind == 'medium-replay' else robot}_"
            stem += "mixed" if kind == "medium-replay" else kind.replace("-", "_")
            entries.append(D4RLEntry(f"{robot}-{kind}-v0", robot, f"gym_mujoco/{stem}.hdf5", 1000))
        for version in ("v1", "v2"):
            for kind in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
                address = f"gym_mujoco_{version}/{robot}_{kind.replace('-', '_')}-{version}.hdf5"
                entries.append(D4RLEntry(f"{robot}-{kind}-{version}", robot, address, 1000))
    entries.append(D4RLEntry("ant-random-expert-v0", "ant", "gym_mujoco/ant_random_expert.hdf5", 1000))
    return entries


def _antmaze() -> list[D4RLEntry]:
    # The file names say which starts and goals vary: (maze, kind) -> (multistart, multigoal).
    variants = {
        ("umaze", ""): (False, False),
        ("umaze", "-diverse"): (True, True),
        ("medium", "-play"): (True, False),
        ("medium", "-diverse"): (True, True),
        ("large", "-play"): (True, False),
        ("large", "-diverse"): (True, True),
    }
    eval_variants = {
        ("umaze", ""): (True, False),
        ("umaze", "-diverse"): (True, True),
        ("medium", "-play"): (True, True),
        ("medium", "-diverse"): (True, False),
        ("large", "-play"): (True, True),
        ("large", "-diverse"): (True, False),
    }
    old_words = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}
    new_words = {maze: maze for maze in old_words}
    eval_words = {maze: f"{maze}_eval" for maze in old_words}
    entries = []
    for prefix, version, folder, words, suffix, table in (
        ("antmaze", "v0", "ant_maze_new", old_words, "", variants),
        ("antmaze", "v1", "ant_maze_v1", new_words, "", variants),
        ("antmaze", "v2", "ant_maze_v2", old_words, "_fixed", variants),
        ("antmaze-eval", "v0", "ant_maze_new", eval_words, "", eval_variants),
    ):
        for (maze, kind), (starts, goals) in table.items():
            stem = f"Ant_maze_{words[maze]}_noisy_multistart_{starts}_multigoal_{goals}_sparse{suffix}"
            horizon = 700 if maze == "umaze" else 1000
            entries.append(D4RLEntry(f"{prefix}-{maze}{kind}-{version}", "antmaze", f"{folder}/{stem}.hdf5", horizon))
    return entries


def _adroit() -> list[D4RLEntry]:
    entries = []
    for task, horizon, long_horizon in (
        ("pen", 100, 200),
        ("hammer", 200, 600),
        ("relocate", 200, 500),
        ("door", 200, 300),
    ):
        old_stems = {
            "human": "v0_demos_clipped",
            "cloned": "demos-v0-bc-combined",
            "expert": "v0_expert_clipped",
        }
        for kind, stem in old_stems.items():
            for version, address in (
                ("v0", f"hand_dapg/{task}-{stem}.hdf5"),
                ("v1", f"hand_dapg_v1/{task}-{kind}-v1.hdf5"),
            ):
                entries.append(D4RLEntry(f"{task}-{kind}-{version}", task, address, horizon))
                if kind == "human":  # the same file, evaluated with more time
                    entries.append(D4RLEntry(f"{task}-human-longhorizon-{version}", task, address, long_horizon))
    return entries


def _maze2d() -> list[D4RLEntry]:
    horizons = {
        "open-v0": 150,
        "umaze-v0": 150,
        "medium-v0": 250,
        "large-v0": 600,
        **{
            f"{prefix}{maze}-v1": h
            for prefix in ("", "eval-")
            for maze, h in (("umaze", 300), ("medium", 600), ("large", 800))
        },
    }
    entries = []
    for key, horizon in horizons.items():
        maze, version = key.rsplit("-", 1)
        for reward, name in (
            ("sparse", f"maze2d-{maze}-{version}"),
            ("dense", f"maze2d-{maze}-dense-{version}"),
        ):
            ending = "" if version == "v0" else "-v1"
            entries.append(D4RLEntry(name, name, f"maze2d/maze2d-{maze}-{reward}{ending}.hdf5", horizon))
    return entries


def _others() -> list[D4RLEntry]:
    kitchen = "kitchen/{}microwave_kettle_{}-v0.hdf5"
    entries = [
        D4RLEntry("kitchen-complete-v0", "kitchen", kitchen.format("mini_kitchen_", "light_slider"), 280),
        D4RLEntry("kitchen-partial-v0", "kitchen", kitchen.format("kitchen_", "light_slider"), 280),
        D4RLEntry("kitchen-mixed-v0", "kitchen", kitchen.format("kitchen_", "bottomburner_light"), 280),
        D4RLEntry("minigrid-fourrooms-v0", "minigrid-fourrooms", "minigrid/minigrid4rooms.hdf5", 50),
        D4RLEntry("minigrid-fourrooms-random-v0", "minigrid-fourrooms", "minigrid/minigrid4rooms_random.hdf5", 50),
        D4RLEntry("flow-ring-random-v0", "flow-ring", "flow/flow-ring-v0-random.hdf5", 500),
        D4RLEntry("flow-ring-controller-v0", "flow-ring", "flow/flow-ring-v0-idm.hdf5", 500),
        D4RLEntry("flow-merge-random-v0", "flow-merge", "flow/flow-merge-v0-random.hdf5", 750),
        D4RLEntry("flow-merge-controller-v0", "flow-merge", "flow/flow-merge-v0-idm.hdf5", 750),
        D4RLEntry("carla-lane-v0", "carla-lane", "carla/carla_lane_follow_flat-v0.hdf5", 250),
        D4RLEntry("carla-town-v0", "carla-town", "carla/carla_town_subsamp_flat-v0.hdf5", 1000),
        D4RLEntry("carla-town-full-v0", "carla-town", "carla/carla_town_flat-v0.hdf5", 1000),
    ]
    for robot in ("halfcheetah", "hopper", "ant", "walker2d"):
        for kind in ("random", "medium", "expert", "medium-expert", "medium-replay"):
            address = f"bullet/bullet-{robot}_{kind.replace('-', '_')}.hdf5"
            entries.append(D4RLEntry(f"bullet-{robot}-{kind}-v0", f"bullet-{robot}", address, 1000))
    for maze, horizon in (("open", 150), ("umaze", 300), ("medium", 600), ("large", 800)):
        environment = f"bullet-maze2d-{maze}"
        entries.append(D4RLEntry(f"{environment}-v0", environment, f"bullet/{environment}-sparse.hdf5", horizon))
    return entries


D4RL_DATASETS: dict[str, D4RLEntry] = {
    entry.name: entry for entry in (*_locomotion(), *_antmaze(), *_adroit(), *_maze2d(), *_others())
}
"""Every dataset D4RL registers with flat observations, by name."""

# Several names may share a file (Adroit's long horizons); the first one is the plain one.
_BY_FILE_NAME = {entry.file_name: entry for entry in reversed(D4RL_DATASETS.values())}


def d4rl_entry(name: str) -> D4RLEntry:
    """Return the entry of a D4RL dataset name.

    Raises:
        DataError: no such name, with the nearest one.
    """
    if name not in D4RL_DATASETS:
        raise DataError(f"there is no D4RL dataset {name!r}.{suggest(name, D4RL_DATASETS)}")
    return D4RL_DATASETS[name]


def cache_folder() -> Path:
    """Return D4RL's cache folder: ``$D4RL_DATASET_DIR``, else ``~/.d4rl/datasets``. It need not exist."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def load_d4rl(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    max_episode_steps: int | None = None,
    use_next_observations: bool = True,
    action_low: ArrayLike | float | None = None,
    action_high: ArrayLike | float | None = None,
    n_actions: int | None = None,
) -> Dataset:
    """Read a D4RL-style HDF5 file.

    Arrays other than observations, actions, rewards, terminals, timeouts and next_observations are left
    unread; scalars below ``metadata`` and ``infos`` go to ``info.provenance``. Where present,
    ``metadata/env_id``, ``metadata/ref_min_score``, ``metadata/ref_max_score`` and ``metadata/horizon`` fill
    the fields of `DatasetInfo`; otherwise they come from the table of D4RL names.

    Args:
        path: the file.
        name: D4RL name; by default the one whose file has the name of `path`, if any, else the stem of
            `path`.
        max_episode_steps: horizon at which episodes were cut, for files without timeouts; by default the
            named entry's.
        use_next_observations: use the file's next_observations. False does as D4RL does, and is the way to
            load a file whose next_observations contradict its observations.
        action_low: lower bound of the actions; by default the file's ``metadata/action_low`` (`write_d4rl` stores
            it), else -1, to which D4RL's are normalised.
        action_high: upper bound; likewise, else 1.
        n_actions: number of discrete actions, by default one more than the largest that occurs.

    Raises:
        DataError: a file that is missing, not HDF5, damaged, or lacks a key; bad columns or values; an
            unknown `name`; no timeouts and no known horizon. The message names the file.
    """
    path = Path(path)
    entry = _BY_FILE_NAME.get(path.name) if name is None else d4rl_entry(name)
    with open_hdf5(path) as file:
        raw = _read_columns(file, use_next_observations)
        facts = _scalars(file)
        if entry is not None and name is None and facts.get("metadata/env_id", entry.env_id) != entry.env_id:
            entry = None  # its name is D4RL's by chance: the file says that it is of another environment
        low = _bound(file, "metadata/action_low", action_low, -1.0)
        high = _bound(file, "metadata/action_high", action_high, 1.0)
    with prefixed(str(path)):
        columns = checked_columns(raw)
        info = _info(path.name, facts, entry, max_episode_steps)
        return _build(columns, info, low, high, n_actions)


def _build(
    columns: dict[str, NDArray[Any]],
    info: DatasetInfo,
    action_low: ArrayLike | float,
    action_high: ArrayLike | float,
    n_actions: int | None,
) -> Dataset:
    """Find the episodes of a file's columns and the rows that D4RL keeps of them."""
    observations, terminals = columns["observations"], columns["terminals"]
    following = columns.get("next_observations")
    n = len(terminals)
    if "timeouts" in columns:
        cut = skipped = columns["timeouts"]
    elif info.horizon is not None:
        cut = horizon_cuts(terminals, info.horizon)
        skipped = horizon_cuts(terminals, info.horizon, count_after_terminal=1)
    else:
        raise DataError(
            "has no timeouts, so max_episode_steps is needed to know where episodes were cut; "
            "pass it, or the D4RL name of the file"
        )
    kept = ~skipped
    kept[-1] = False
    ended = terminals | cut
    # Without its successor the last row of a partial episode is no step: its observation ends the step
    # before.
    rows = n - 1 if following is None and not ended[-1] else n
    if rows == 0:
        raise DataError("the set is empty: its only row ends no episode")
    starts = np.concatenate([[0], np.flatnonzero(ended[: rows - 1]) + 1]).astype(np.int64)
    last_rows = np.append(starts[1:], rows) - 1
    successor = None
    if following is not None:
        try:
            check_successors(observations, following, ended)
        except DataError as error:
            remedy = "load_d4rl(path, use_next_observations=False) ignores the key, as D4RL does"
            raise DataError(f"{error}; {remedy}") from None
        final_observations = following[last_rows]
        known = np.ones(len(starts), dtype=np.bool_)
    else:
        final_observations = observations[last_rows]
        known = np.zeros(len(starts), dtype=np.bool_)
        if rows < n and ended[rows - 1]:
            successor = observations[-1].copy()
        elif rows < n:
            final_observations[-1] = observations[-1]
            known[-1] = True
    truncated = np.zeros(rows, dtype=np.bool_)
    truncated[last_rows] = ~terminals[last_rows]
    provenance = {
        **info.provenance,
        "file_rows": n,
        "dropped_rows": n - rows,
        "rows_with_both_flags": int((terminals & cut).sum()),
    }
    return Dataset(
        observations=interleave(observations[:rows], starts, final_observations),
        rewards=columns["rewards"][:rows],
        terminated=terminals[:rows],
        truncated=truncated,
        episode_starts=starts,
        final_obs_known=known,
        **action_fields(columns["actions"][:rows], action_low, action_high, n_actions),
        info=dataclasses.replace(info, provenance=provenance),
        qlearning_kept=kept[:rows],
        qlearning_successor=successor,
    )


def horizon_cuts(terminals: NDArray[np.bool_], horizon: int, count_after_terminal: int = 0) -> NDArray[np.bool_]:
    """Mark the rows at which a step counter reaches `horizon`: ``[N]`` to ``[N]``.

    The counter starts at 0 and goes up by one per row. A row that finds it at ``horizon - 1`` is marked, and
    the next row starts from 0; after an unmarked terminal row the next one starts from
    `count_after_terminal`: 0 counts the steps of each episode, 1 does what D4RL's ``qlearning_dataset`` does.

    Raises:
        DataError: `horizon` below 1.
    """
    if horizon < 1:
        raise DataError(f"max_episode_steps must be at least 1; got {horizon}")
    cuts = np.zeros(len(terminals), dtype=np.bool_)
    start = count = 0
    for terminal in [*np.flatnonzero(terminals).tolist(), len(terminals)]:
        cuts[start + horizon - 1 - count : terminal + 1 : horizon] = True
        start, count = terminal + 1, count_after_terminal
        if terminal < len(terminals) and cuts[terminal]:
            count = 0
    return cuts


def _read_columns(file: h5py.File, use_next_observations: bool) -> dict[str, NDArray[Any]]:
    raw = {}
    for key in _REQUIRED + _OPTIONAL:
        if not isinstance(file.get(key), h5py.Dataset):
            if key in _REQUIRED:
                raise DataError(f"has no {key}; a D4RL-style file needs {', '.join(_REQUIRED)}")
            continue
        if key == "next_observations" and not use_next_observations:
            continue
        array = file[key][()]
        column = np.ndim(array) == 2 and np.shape(array)[1] == 1
        raw[key] = array[:, 0] if column and key in ("rewards", "terminals", "timeouts") else array
    return raw


def _info(
    file_name: str,
    facts: dict[str, str | int | float],
    entry: D4RLEntry | None,
    max_episode_steps: int | None,
) -> DatasetInfo:
    env_id = facts.get("metadata/env_id", entry.env_id if entry else None)
    low, high = (_fact(facts, f"ref_{end}_score") for end in ("min", "max"))
    if low is not None and high is not None:
        reference: ReferenceReturns | None = ReferenceReturns(low, high, "the file's metadata")
    else:
        reference = entry.reference if entry else known_reference(None if env_id is None else str(env_id))
    horizon = max_episode_steps
    if horizon is None:
        recorded = _fact(facts, "horizon")
        horizon = int(recorded) if recorded is not None else entry.horizon if entry else None
    return DatasetInfo(
        name=entry.name if entry else Path(file_name).stem,
        env_id=None if env_id is None else str(env_id),
        ref_min_score=reference.min if reference else None,
        ref_max_score=reference.max if reference else None,
        score_source=reference.source if reference else None,
        description=str(facts.get("metadata/description", "")),
        provenance={"format": "D4RL HDF5", "file": file_name, **facts},
        horizon=horizon,
    )


def _fact(facts: dict[str, str | int | float], name: str) -> float | None:
    """Return a number below metadata, None if it is missing."""
    value = facts.get(f"metadata/{name}")
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"metadata/{name} is {value!r}, not a finite number")
    return number


def _bound(file: h5py.File, key: str, given: ArrayLike | float | None, default: float) -> ArrayLike | float:
    """Return the bound that was given, else the file's, else the default."""
    if given is not None:
        return given
    return file[key][()] if isinstance(file.get(key), h5py.Dataset) else default


def _scalars(file: h5py.File) -> dict[str, str | int | float]:
    """Return the scalar datasets below metadata and infos, by path."""
    found: dict[str, str | int | float] = {}

    def visit(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset) and item.shape == ():
            value = item[()]
            value = value.decode(errors="replace") if isinstance(value, bytes) else value.item()
            # A number that JSON cannot hold is kept as text.
            lost = isinstance(value, float) and not np.isfinite(value)
            found[f"{root}/{name}"] = str(value) if lost else value

    for root in ("metadata", "infos"):
        if isinstance(file.get(root), h5py.Group):  # Kitchen files have an array of that name
            file[root].visititems(visit)
    return found
