"""Reward and state transforms, by name, with their constants as data.

Published results rest on transforms that differ between codes. Each has one name here, is chosen explicitly
rather than guessed from an environment's name, and carries its constants, so that a run's card says exactly
what the learner saw. Scores are always computed from raw environment returns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .d4rl import horizon_cuts
from .dataset import Dataset, Transitions
from .errors import ConfigError, DataError, suggest

CORL_EPISODE_ROWS = 1000
"""Rows after which CORL's ``return_reward_range`` starts a new episode, whatever the horizon."""

STATE_STD_OFFSET = 1e-3
"""Added to the standard deviation by ``standardize``, as in TD3+BC's code."""

_Array = TypeVar("_Array", Tensor, NDArray[np.float64])


# ------------------------------------------------------------------------------------------------------------
# Rewards
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardTransform:
    """The affine map r -> scale * r + shift; plain data (``dataclasses.asdict`` gives JSON)."""

    name: str
    scale: float
    shift: float

    def __call__(self, reward: _Array) -> _Array:
        """Return the transformed rewards, of any shape."""
        return self.scale * reward + self.shift

    def then(self, other: "RewardTransform") -> "RewardTransform":
        """Return the map that applies `self` first and `other` to its result."""
        name = other.name if self.name == "none" else f"{self.name}+{other.name}"
        return RewardTransform(name, other.scale * self.scale, other.scale * self.shift + other.shift)


_FIXED: dict[str, tuple[float, float]] = {
    "none": (1.0, 0.0),
    "zero": (0.0, 0.0),  # O-DICE's imitation
    "antmaze_minus1": (1.0, -1.0),  # IQL, XQL, FamO2O, SQL/EQL; CORL's TD3+BC, AWAC, IQL
    "antmaze_odice": (3.0, -3.0),  # O-DICE: 0 -> -3, 1 -> 0
    "antmaze_cql": (4.0, -2.0),  # CQL: 4 (r - 0.5)
    "antmaze_cql_corl": (10.0, -5.0),  # CORL's CQL
    "antmaze_x100": (100.0, 0.0),  # ReBRAC
    "antmaze_prdc": (10000.0, -1.0),  # PRDC
}


def _recorded_episodes(dataset: Dataset) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the raw return and the length of each recorded episode, ``[E]`` each."""
    return dataset.episode_returns(), dataset.episode_lengths


def _corl_episodes(dataset: Dataset) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the same for CORL's: q-learning rows cut at terminals or every 1000, the rest left out."""
    rows = dataset.view_rows("d4rl_qlearning")
    terminals = dataset.terminated[rows]
    ends = np.flatnonzero(terminals | horizon_cuts(terminals, CORL_EPISODE_ROWS))
    if not ends.size:
        return np.empty(0), np.empty(0, dtype=np.int64)
    starts = np.append(0, ends[:-1] + 1)
    rewards = dataset.rewards[rows[: ends[-1] + 1]].astype(np.float64)
    return np.add.reduceat(rewards, starts), ends - starts + 1


_RETURN_RANGE: dict[str, Callable[[Dataset], tuple[NDArray[np.float64], NDArray[np.int64]]]] = {
    "return_range": _recorded_episodes,
    "return_range_corl": _corl_episodes,
}

REWARD_TRANSFORMS: tuple[str, ...] = (*_FIXED, *_RETURN_RANGE)
"""Names that `reward_transform` knows."""


def reward_transform(names: str | Sequence[str], dataset: Dataset) -> RewardTransform:
    """Return the named reward transform, or the composition of several, the first name applied first.

    * ``none``: r. ``zero``: 0, for imitation.
    * ``return_range``: r * 1000 / (R_max - R_min), R the undiscounted returns of the recorded episodes (IQL,
      XQL, SQL/EQL, FamO2O on locomotion). Those codes find the same episodes in D4RL's q-learning rows, where
      a timeout's own row is missing, so their returns leave out its reward: about one part in a thousand.
    * ``return_range_corl``: the same formula as CORL and O-DICE evaluate it, on the q-learning rows cut at
      terminals or every 1000 rows. A full episode has 999 such rows, so each takes rows of the next one until
      a terminal comes: wrong, deterministic, and part of the scale of their published numbers. Rows after the
      last cut do not count.
    * ``antmaze_minus1``: r - 1. ``antmaze_cql``: 4 (r - 0.5). ``antmaze_cql_corl``: 10 r - 5.
      ``antmaze_x100``: 100 r. ``antmaze_prdc``: 10000 r - 1. ``antmaze_odice``: 3 r - 3, which sends 0 to -3
      and 1 to 0 and is refused for other rewards.

    In a composition, return ranges are measured on the rewards as transformed so far. The sources are the
    papers' official codes, and CORL's where its name appears.

    Args:
        names: one name or several.
        dataset: the dataset the constants are computed from.

    Raises:
        ConfigError: an unknown name, with the nearest one.
        DataError: a return range that is zero or has no episode, or ``antmaze_odice`` on rewards other than 0
            and 1.
    """
    result = RewardTransform("none", 1.0, 0.0)
    for name in [names] if isinstance(names, str) else names:
        result = result.then(_named(name, dataset, result))
    return result


def _named(name: str, dataset: Dataset, before: RewardTransform) -> RewardTransform:
    if name in _FIXED:
        if name == "antmaze_odice" and not np.isin(before(dataset.rewards.astype(np.float64)), (0.0, 1.0)).all():
            raise DataError(f"antmaze_odice is defined for rewards 0 and 1, but {dataset.info.name} has others")
        return RewardTransform(name, *_FIXED[name])
    if name not in _RETURN_RANGE:
        raise ConfigError(
            f"there is no reward transform {name!r}; the names are {', '.join(REWARD_TRANSFORMS)}."
            f"{suggest(name, REWARD_TRANSFORMS)}"
        )
    returns, lengths = _RETURN_RANGE[name](dataset)
    if not returns.size:
        raise DataError(f"{name}: {dataset.info.name} has no complete episode, so there is no range of returns")
    returns = before.scale * returns + before.shift * lengths
    span = float(returns.max() - returns.min())
    if span == 0.0:
        raise DataError(
            f"{name}: all episodes of {dataset.info.name} have the same return, so their range is 0: "
            "take another reward_transform, for instance 'none'"
        )
    return RewardTransform(name, 1000.0 / span, 0.0)


# ------------------------------------------------------------------------------------------------------------
# States
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateTransform:
    """The map s -> (s - mean) / scale, entry by entry; plain data (``dataclasses.asdict`` gives JSON)."""

    name: str
    mean: tuple[float, ...]  # [d_s]
    scale: tuple[float, ...]  # [d_s]

    def __post_init__(self) -> None:
        """Take lists too, which is what JSON gives back."""
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "scale", tuple(self.scale))

    def __call__(self, obs: Tensor) -> Tensor:
        """Return transformed observations, ``[*batch, d_s]``."""
        return (obs - obs.new_tensor(self.mean)) / obs.new_tensor(self.scale)

    def inverse(self, obs: Tensor) -> Tensor:
        """Return raw observations for transformed ones, ``[*batch, d_s]``, up to a rounding."""
        return obs * obs.new_tensor(self.scale) + obs.new_tensor(self.mean)


STATE_TRANSFORMS: tuple[str, ...] = ("none", "standardize")
"""Names that `state_transform` knows."""


def state_transform(name: str, transitions: Transitions) -> StateTransform:
    """Return the named state transform; it also applies to next_obs and to observations at evaluation.

    * ``none``: s.
    * ``standardize``: (s - mean) / (std + 1e-3), mean and population standard deviation over
      `transitions.obs` (not next_obs), accumulated in float64. Source: TD3+BC (Fujimoto & Gu 2021, arXiv
      2106.06860) and its code; its statistics are those of D4RL's q-learning rows, view
      ``"d4rl_qlearning"``.

    Raises:
        ConfigError: an unknown name, with the nearest one.
    """
    if name == "none":
        d_s = transitions.obs.shape[1]
        return StateTransform(name, (0.0,) * d_s, (1.0,) * d_s)
    if name == "standardize":
        columns = transitions.obs.detach().cpu().numpy().T
        mean = tuple(float(column.mean(dtype=np.float64)) for column in columns)
        scale = tuple(float(column.std(dtype=np.float64)) + STATE_STD_OFFSET for column in columns)
        return StateTransform(name, mean, scale)
    raise ConfigError(
        f"there is no state transform {name!r}; the names are {', '.join(STATE_TRANSFORMS)}."
        f"{suggest(name, STATE_TRANSFORMS)}"
    )
