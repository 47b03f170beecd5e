"""Offline data: episodes with T rewards and T+1 observations, and the flat transitions derived from them.

`Dataset` is the canonical store. An episode of T steps keeps T actions and rewards and **T+1 observations**,
so that the state reached by its last action is there to bootstrap from when the episode was cut by a time
limit. The flags `terminated` (the task ended: value 0 afterwards) and `truncated` (the recording was cut: the
value goes on) stay separate and are never both set. Everything is checked once, when a dataset is made, and
is read-only afterwards.

`Transitions` is what agents train on: the rows of a dataset as tensors on one device. Two views exist:

* ``"full"`` (the default): every row whose successor is known, plus every terminated row, whose successor is
  masked.
* ``"d4rl_qlearning"``: exactly the rows and successors of D4RL's ``qlearning_dataset`` (see
  `corollary.core.d4rl`), to compare with published numbers. It drops the last row and every truncated row,
  and the successor of a terminated row is the first observation of the next episode.

What comes in is checked in `corollary.core.columns`, which also says what is converted (any real dtype to
float32) and what is refused.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import h5py
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .columns import action_fields, as_flags, check_finite, check_successors, checked_columns, interleave
from .errors import ConfigError, DataError, suggest
from .files import replacing
from .scores import known_reference, normalized_score
from .transitions import Batch, Transitions

__all__ = [
    "ACTION_TOLERANCE",
    "FORMAT_ATTRIBUTE",
    "VIEWS",
    "Batch",
    "Dataset",
    "DatasetInfo",
    "Episode",
    "Transitions",
    "View",
    "open_hdf5",
    "prefixed",
]

View = Literal["full", "d4rl_qlearning"]
VIEWS: tuple[View, ...] = ("full", "d4rl_qlearning")

ACTION_TOLERANCE = 1e-5
"""Actions may leave their box by this fraction of its width: float32 rounding, nothing more."""

FORMAT_ATTRIBUTE = "corollary_dataset_version"
FORMAT_VERSION = 1


# ------------------------------------------------------------------------------------------------------------
# What a dataset says about itself
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetInfo:
    """Where a dataset comes from and what its returns are measured against; plain JSON data.

    Attributes:
        name: short name, used in messages, run directories and tables.
        env_id: Gymnasium id of the environment that produced the data, if any.
        ref_min_score: mean undiscounted return of a random policy, the 0 of the normalised score. Without this and
            the next, a dataset made from arrays or episodes takes both from `corollary.core.scores` where that has
            them for `env_id`.
        ref_max_score: mean undiscounted return of an expert, the 100 of the normalised score.
        score_source: where the two references come from; scores with different sources are not comparable.
        description: one or two sentences for people.
        provenance: facts recorded by whoever made the data: versions, seeds, file name, rows dropped on
            loading.
        horizon: steps after which an episode is truncated.
    """

    name: str
    env_id: str | None = None
    ref_min_score: float | None = None
    ref_max_score: float | None = None
    score_source: str | None = None
    description: str = ""
    provenance: Mapping[str, str | int | float] = field(default_factory=dict)
    horizon: int | None = None

    def __post_init__(self) -> None:
        """Copy `provenance` and refuse what JSON cannot hold, and references that no score can be measured with."""
        for name, value in vars(self).items():
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())
        object.__setattr__(self, "provenance", dict(self.provenance))
        references = {"ref_min_score": self.ref_min_score or 0.0, "ref_max_score": self.ref_max_score or 0.0}
        for key, value in {**references, **self.provenance}.items():
            if not (isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))):
                raise DataError(f"info: {key} is {value!r}; only text and finite numbers can be stored")
        if self.ref_min_score is not None and self.ref_min_score == self.ref_max_score:
            raise DataError(f"info: ref_min_score and ref_max_score are both {self.ref_min_score}; they must differ")

    def to_json(self) -> str:
        """Return the fields as JSON text with sorted keys; floats survive the round trip exactly."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`."""
        return cls(**json.loads(text))


class Episode(NamedTuple):
    """One episode as a collector sees it: T actions and rewards, T+1 observations.

    `terminated` and `truncated` say how it ended: one bool for the last step, or one per step, ``[T]``.
    An environment may report both at once (the task ended on its last permitted step); that is a termination,
    so pass ``truncated and not terminated``.
    """

    observations: ArrayLike  # [T+1, *obs]
    actions: ArrayLike  # [T, d_a] floats, or [T] integers
    rewards: ArrayLike  # [T]
    terminated: ArrayLike  # bool or [T] bool
    truncated: ArrayLike  # bool or [T] bool


# ------------------------------------------------------------------------------------------------------------
# The dataset
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Episodes with T rewards and T+1 observations, immutable and checked.

    Make one with `from_arrays`, `from_episodes`, `load`, `corollary.load_dataset` or
    `corollary.core.d4rl.load_d4rl`. The constructor takes the stored arrays themselves, checks every
    invariant below, and makes them read-only. Below N counts rows (steps), E episodes; row i of episode e has
    its observation at position i + e, and its successor's at i + e + 1.

    Attributes:
        observations: ``[N+E, *obs]`` float32, T+1 per episode, episodes one after another.
        actions: ``[N, d_a]`` float32 within the bounds (to `ACTION_TOLERANCE`), or ``[N]`` int64 in
            ``0..n_actions-1``.
        rewards: ``[N]`` float32.
        terminated: ``[N]`` bool, True at the last row of an episode whose task ended.
        truncated: ``[N]`` bool, True at the last row of an episode that was cut. Exactly one of the two flags
            is set at an episode's last row and none before it.
        episode_starts: ``[E]`` int64, first row of each episode.
        final_obs_known: ``[E]`` bool, False where the source holds no successor of an episode's last row. The
            final observation then repeats the last known one; no view uses it unmasked.
        action_low: ``[d_a]`` float32, None for discrete actions.
        action_high: ``[d_a]`` float32, None for discrete actions.
        n_actions: number of discrete actions, None for continuous ones.
        info: name, references, provenance.
        qlearning_kept: ``[N]`` bool, rows that D4RL's ``qlearning_dataset`` keeps of the file this set was
            read from; None for other sources, where the rule is applied to the rows as if they were such a
            file.
        qlearning_successor: ``[*obs]`` the file's observation after row N-1 where that row ends an episode
            and the file goes on with a single row, too short to be an episode; else None.

    Raises:
        DataError: any broken invariant, naming array, row, value and remedy.
    """

    observations: NDArray[np.float32]
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    episode_starts: NDArray[np.int64]
    final_obs_known: NDArray[np.bool_]
    action_low: NDArray[np.float32] | None
    action_high: NDArray[np.float32] | None
    n_actions: int | None
    info: DatasetInfo
    qlearning_kept: NDArray[np.bool_] | None = None
    qlearning_successor: NDArray[np.float32] | None = None

    # -- making ----------------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        """Check every invariant, then freeze the arrays."""
        self._check_shapes()
        self._check_flags()
        self._check_values()
        for key, array in self._arrays().items():
            frozen = array.copy() if array.flags.writeable and array.base is not None else array
            frozen.flags.writeable = False
            object.__setattr__(self, key, frozen)

    @classmethod
    def from_arrays(
        cls,
        observations: ArrayLike,
        actions: ArrayLike,
        rewards: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        next_observations: ArrayLike | None = None,
        *,
        action_low: ArrayLike | float = -1.0,
        action_high: ArrayLike | float = 1.0,
        n_actions: int | None = None,
        info: DatasetInfo | None = None,
    ) -> Self:
        """Make a dataset from one array per field, rows in time order, episodes one after another.

        Args:
            observations: ``[N, *obs]`` observation before each action.
            actions: ``[N, d_a]`` floats, or ``[N]`` integers for a discrete space.
            rewards: ``[N]``.
            terminated: ``[N]`` True where the task ended with this row.
            truncated: ``[N]`` True where the recording was cut after this row. The last row must have a flag.
            next_observations: ``[N, *obs]`` observation after each action. Inside an episode it must repeat
                the next row's observation (to 1e-6 + 1e-5 relative). Without it the successors of truncated
                rows are unknown, and the view ``"full"`` leaves those rows out.
            action_low: lower bound of continuous actions, a number or ``[d_a]``.
            action_high: upper bound, likewise.
            n_actions: number of discrete actions; by default one more than the largest that occurs.
            info: what the data is; by default only the name ``"arrays"``. Where it has no reference returns and
                `corollary.core.scores` has them for its `env_id`, they are filled in, and `score_source` says so.

        Raises:
            DataError: bad columns, flags or values, naming column and row.
        """
        raw = {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "terminated": terminated,
            "truncated": truncated,
        }
        if next_observations is not None:
            raw["next_observations"] = next_observations
        columns = checked_columns(raw)
        ended = columns["terminated"] | columns["truncated"]
        if not ended[-1]:
            raise DataError(
                f"the flags end no episode at the last row, {len(ended) - 1}: if recording stopped there, "
                "set its truncated to True, and pass next_observations so that its successor is known"
            )
        starts = np.concatenate([[0], np.flatnonzero(ended[:-1]) + 1]).astype(np.int64)
        last_rows = np.flatnonzero(ended)
        observations = columns["observations"]
        if next_observations is None:
            final_observations = observations[last_rows]
        else:
            check_successors(observations, columns["next_observations"], ended)
            final_observations = columns["next_observations"][last_rows]
        return cls(
            observations=interleave(observations, starts, final_observations),
            # Copies: a dataset never freezes or shares the caller's memory.
            rewards=columns["rewards"].copy(),
            terminated=columns["terminated"].copy(),
            truncated=columns["truncated"].copy(),
            episode_starts=starts,
            final_obs_known=np.full(len(starts), next_observations is not None),
            **action_fields(columns["actions"].copy(), action_low, action_high, n_actions),
            info=_with_references(info or DatasetInfo("arrays")),
        )

    @classmethod
    def from_episodes(
        cls,
        episodes: Iterable[Episode],
        *,
        action_low: ArrayLike | float = -1.0,
        action_high: ArrayLike | float = 1.0,
        n_actions: int | None = None,
        info: DatasetInfo | None = None,
    ) -> Self:
        """Make a dataset from episodes with T+1 observations each; see `from_arrays` for the other arguments.

        Raises:
            DataError: no episode, or a bad one, naming its number, field and step.
        """
        parts: list[dict[str, NDArray[Any]]] = []
        for number, episode in enumerate(episodes):
            with prefixed(f"episode {number}"):
                parts.append(_episode_columns(episode))
                for key in ("observations", "actions"):
                    first, here = parts[0][key], parts[-1][key]
                    if here.shape[1:] != first.shape[1:] or here.dtype != first.dtype:
                        raise DataError(
                            f"{key} are {here.dtype} of shape {list(here.shape[1:])} per row, "
                            f"but {first.dtype} of shape {list(first.shape[1:])} in episode 0"
                        )
        if not parts:
            raise DataError("the set is empty: it has no episodes")
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        lengths = np.array([len(part["rewards"]) for part in parts])
        return cls(
            observations=joined["observations"],
            rewards=joined["rewards"],
            terminated=joined["terminated"],
            truncated=joined["truncated"],
            episode_starts=(np.cumsum(lengths) - lengths).astype(np.int64),
            final_obs_known=np.ones(len(lengths), dtype=np.bool_),
            **action_fields(joined["actions"], action_low, action_high, n_actions),
            info=_with_references(info or DatasetInfo("episodes")),
        )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """Return the array fields that are present, by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {key: value for key, value in values.items() if isinstance(value, np.ndarray)}

    def _check_shapes(self) -> None:
        n, n_episodes = len(self.rewards), len(self.episode_starts)
        if n == 0 or n_episodes == 0:
            raise DataError("the set is empty: it has no rows")
        discrete = self.n_actions is not None
        expected: dict[str, tuple[type, tuple[int, ...]]] = {
            "observations": (np.float32, (n + n_episodes, *self.observations.shape[1:])),
            "actions": (np.int64, (n,)) if discrete else (np.float32, (n, *self.actions.shape[1:2])),
            "rewards": (np.float32, (n,)),
            "terminated": (np.bool_, (n,)),
            "truncated": (np.bool_, (n,)),
            "episode_starts": (np.int64, (n_episodes,)),
            "final_obs_known": (np.bool_, (n_episodes,)),
            "action_low": (np.float32, self.actions.shape[1:2]),
            "action_high": (np.float32, self.actions.shape[1:2]),
            "qlearning_kept": (np.bool_, (n,)),
            "qlearning_successor": (np.float32, self.observations.shape[1:]),
        }
        for key, array in self._arrays().items():
            dtype, shape = expected[key]
            if array.dtype != dtype or array.shape != shape:
                raise DataError(
                    f"{key} must be {np.dtype(dtype)} of shape {list(shape)} for {n} rows in {n_episodes} "
                    f"episodes; got {array.dtype} of shape {list(array.shape)}"
                )
        if self.observations.ndim < 2 or self.observation_dim == 0:
            raise DataError(f"observations must have shape [N+E, d_s], d_s > 0; got {list(self.observations.shape)}")
        if not discrete and (self.actions.ndim != 2 or self.actions.shape[1] == 0):
            raise DataError(f"actions must have shape [N, d_a], d_a > 0; got {list(self.actions.shape)}")
        if discrete != (self.action_low is None) or discrete != (self.action_high is None):
            raise DataError("give action_low and action_high for continuous actions, n_actions for discrete ones")
        if self.episode_starts[0] != 0 or (self.episode_lengths <= 0).any():
            raise DataError(f"episode_starts must begin with 0 and increase strictly below {n}")

    def _check_flags(self) -> None:
        both = np.flatnonzero(self.terminated & self.truncated)
        if both.size:
            raise DataError(
                f"row {both[0]} is both terminated and truncated: keep terminated if the task ended there, "
                "truncated if only a time limit did"
            )
        last = np.zeros(len(self), dtype=np.bool_)
        last[self._last_rows] = True
        ended = self.terminated | self.truncated
        for row in np.flatnonzero(ended != last)[:1]:
            flag, text = "terminated" if self.terminated[row] else "truncated", self._where(row)
            if ended[row]:
                raise DataError(f"{flag} is set at {text}, yet the episode goes on after it")
            raise DataError(
                f"the flags end no episode at {text}, the last of its episode: "
                "set truncated there if recording stopped at that point"
            )

    def _check_values(self) -> None:
        for key, array in self._arrays().items():
            if key not in ("action_low", "action_high"):  # they have a message of their own below
                check_finite(key, array)
        if self.n_actions is not None:
            outside = np.flatnonzero((self.actions < 0) | (self.actions >= self.n_actions))
            if outside.size:
                row = int(outside[0])
                raise DataError(
                    f"actions holds {self.actions[row]} at {self._where(row)}, outside the {self.n_actions} "
                    "discrete actions 0, 1, ...; pass the n_actions of the space the data was recorded in"
                )
            return
        assert self.action_low is not None
        assert self.action_high is not None
        finite = np.isfinite(self.action_low) & np.isfinite(self.action_high)
        if not (finite & (self.action_low < self.action_high)).all():
            raise DataError(
                f"action bounds must be finite with low < high; got {self.action_low.tolist()} and "
                f"{self.action_high.tolist()}"
            )
        slack = ACTION_TOLERANCE * (self.action_high - self.action_low)
        outside_box = (self.actions < self.action_low - slack) | (self.actions > self.action_high + slack)
        if outside_box.any():
            row, dim = (int(axis[0]) for axis in np.nonzero(outside_box))
            raise DataError(
                f"actions holds {self.actions[row, dim]} at {self._where(row)}, dimension {dim}, outside its "
                f"bounds [{self.action_low[dim]}, {self.action_high[dim]}]; pass the action_low and "
                "action_high of the space the data was recorded in"
            )

    def _where(self, row: int) -> str:
        episode = int(np.searchsorted(self.episode_starts, row, side="right")) - 1
        return f"row {row} (episode {episode}, step {row - self.episode_starts[episode]})"

    # -- size ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rewards)

    def __repr__(self) -> str:
        kind = f"{self.action_dim} discrete actions" if self.n_actions else f"action {self.action_dim}"
        return (
            f"Dataset({self.info.name!r}: {len(self)} rows, {self.n_episodes} episodes, "
            f"observation {self.observation_dim}, {kind})"
        )

    @property
    def n_episodes(self) -> int:
        """Number of episodes E."""
        return len(self.episode_starts)

    @property
    def observation_dim(self) -> int:
        """Number of entries of one observation, d_s (flattened)."""
        return int(np.prod(self.observations.shape[1:]))

    @property
    def action_dim(self) -> int:
        """Number of entries of one continuous action, d_a, or the number of discrete actions."""
        return self.n_actions or self.actions.shape[1]

    @property
    def episode_lengths(self) -> NDArray[np.int64]:
        """Rows T of each episode, ``[E]``."""
        return np.diff(self.episode_starts, append=len(self))

    @property
    def episode_of_row(self) -> NDArray[np.int64]:
        """Number of the episode that each row belongs to, ``[N]``."""
        return np.repeat(np.arange(self.n_episodes), self.episode_lengths)

    @property
    def _last_rows(self) -> NDArray[np.int64]:
        return self.episode_starts + self.episode_lengths - 1

    # -- returns ---------------------------------------------------------------------------------------------

    def episode_returns(self, discount: float = 1.0) -> NDArray[np.float64]:
        """Return Σ_t discount^t r_t of each episode, t = 0 at its first row: ``[E]``, summed in float64."""
        rewards = self.rewards.astype(np.float64)
        if discount != 1.0:
            step = np.arange(len(self)) - np.repeat(self.episode_starts, self.episode_lengths)
            rewards *= np.power(discount, step)
        return np.add.reduceat(rewards, self.episode_starts)

    def normalized_score(self, returns: ArrayLike) -> NDArray[np.float64]:
        """Return 100 (R - min) / (max - min) with this set's references, elementwise.

        R is an undiscounted return of raw environment rewards.

        Raises:
            DataError: the set has no reference returns.
        """
        if self.info.ref_min_score is None or self.info.ref_max_score is None:
            raise DataError(
                f"{self.info.name} has no reference returns, so its scores cannot be normalised: give its "
                "DatasetInfo ref_min_score (mean return of a random policy) and ref_max_score (of an expert)"
            )
        return normalized_score(returns, self.info.ref_min_score, self.info.ref_max_score)

    def top_fraction(self, fraction: float, discount: float = 0.99) -> "Dataset":
        """Keep the episodes with the highest discounted returns, in their order: the data of 10%BC.

        ``max(1, floor(fraction * E))`` episodes are kept; of equal returns the earlier episode wins;
        ``fraction=1`` keeps all. Deviation from CORL's code, which cuts D4RL's q-learning rows at terminals
        or every 1000 rows: our episodes are the recorded ones, and a trailing episode that the recording cut
        short takes part. The view ``"d4rl_qlearning"`` of the result applies its rule to the rows that are
        left.

        Args:
            fraction: share of the episodes to keep, in (0, 1].
            discount: discount of the return that ranks them; the published runs use 0.99.

        Raises:
            ConfigError: `fraction` outside (0, 1].
        """
        if not 0.0 < fraction <= 1.0:
            raise ConfigError(f"fraction must be in (0, 1]; got {fraction}")
        # The small term keeps products such as 0.29 * 100 = 28.999999999999996 from losing an episode.
        count = max(1, int(fraction * self.n_episodes + 1e-9))
        best = np.argsort(-self.episode_returns(discount), kind="stable")[:count]
        chosen = np.zeros(self.n_episodes, dtype=np.bool_)
        chosen[best] = True
        if chosen.all():
            return self
        return self._keep(chosen, f"top{fraction:g}", {"top_fraction": fraction, "top_fraction_discount": discount})

    def episode(self, number: int) -> "Dataset":
        """Return episode `number`, counted from 0, as a dataset of its own.

        Raises:
            ConfigError: if there is no such episode.
        """
        if not 0 <= number < self.n_episodes:
            raise ConfigError(f"{self.info.name} has {self.n_episodes} episodes, from 0 on; there is no {number}.")
        return self._keep(np.arange(self.n_episodes) == number, f"episode{number}", {"episode": number})

    def _keep(self, chosen: NDArray[np.bool_], suffix: str, facts: Mapping[str, str | int | float]) -> "Dataset":
        """Return the `chosen` episodes ``[E]``; the name gets `suffix`, the provenance `facts`."""
        rows = chosen[self.episode_of_row]
        lengths = self.episode_lengths[chosen]
        return Dataset(
            observations=self.observations[np.repeat(chosen, self.episode_lengths + 1)],
            actions=self.actions[rows],
            rewards=self.rewards[rows],
            terminated=self.terminated[rows],
            truncated=self.truncated[rows],
            episode_starts=np.cumsum(lengths) - lengths,
            final_obs_known=self.final_obs_known[chosen],
            action_low=self.action_low,
            action_high=self.action_high,
            n_actions=self.n_actions,
            info=dataclasses.replace(
                self.info, name=f"{self.info.name}-{suffix}", provenance={**self.info.provenance, **facts}
            ),
        )

    # -- views -----------------------------------------------------------------------------------------------

    def view_rows(self, view: View = "full") -> NDArray[np.int64]:
        """Return the rows that a view keeps, ``[M]``, increasing.

        ``"full"`` leaves out the truncated rows whose successor is unknown; ``"d4rl_qlearning"`` leaves out
        all truncated rows and the last row (or what those rules kept of the D4RL file that the set was read
        from).

        Raises:
            ConfigError: an unknown view.
        """
        if view == "full":
            unknown = self.truncated.copy()
            unknown[self._last_rows] &= ~self.final_obs_known
            return np.flatnonzero(~unknown)
        if view == "d4rl_qlearning":
            if self.qlearning_kept is not None:
                return np.flatnonzero(self.qlearning_kept)
            return np.flatnonzero(~self.truncated[:-1])
        raise ConfigError(f"there is no view {view!r}; the views are {', '.join(VIEWS)}.{suggest(view, VIEWS)}")

    def transitions(self, view: View = "full") -> Transitions:
        """Return the rows of `view` as float32 tensors on the CPU.

        Observations are flattened to ``[M, d_s]`` and a discrete action becomes its index, ``[M, 1]``.
        `next_action` is the following row's action within the episode; on an episode's last row it repeats
        the row's own action with `next_action_valid` 0.

        Raises:
            ConfigError: an unknown view.
            DataError: the view keeps no row.
        """
        rows = self.view_rows(view)
        if not rows.size:
            raise DataError(f"{self.info.name}: the view {view!r} keeps none of its {len(self)} rows")
        last = np.zeros(len(self), dtype=np.bool_)
        last[self._last_rows] = True
        observations = self.observations.reshape(len(self.observations), -1)
        actions = self.actions.astype(np.float32, copy=False).reshape(len(self), -1)
        episode = self.episode_of_row[rows]
        position = rows + episode
        following = np.where(last[rows], rows, rows + 1)
        if view == "full":
            next_obs = observations[position + 1]
        else:
            # The next row of the file: after an episode's last row, that is the next episode's first.
            next_position = position + 1 + last[rows]
            beyond = next_position == len(observations)
            next_obs = observations[next_position - beyond]
            if self.qlearning_successor is not None:
                next_obs[beyond] = self.qlearning_successor.reshape(-1)
        return Transitions(
            obs=torch.from_numpy(observations[position]),
            action=torch.from_numpy(actions[rows]),
            reward=torch.from_numpy(self.rewards[rows]),
            next_obs=torch.from_numpy(next_obs),
            terminated=torch.from_numpy(self.terminated[rows].astype(np.float32)),
            truncated=torch.from_numpy(self.truncated[rows].astype(np.float32)),
            next_action=torch.from_numpy(actions[following]),
            next_action_valid=torch.from_numpy((~last[rows]).astype(np.float32)),
            episode=torch.from_numpy(episode),
        )

    # -- identity and files ----------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every array and of `info`: equal exactly for datasets with the same content."""
        digest = hashlib.sha256()
        for key, array in self._arrays().items():
            digest.update(f"{key} {array.dtype} {array.shape};".encode())
            digest.update(np.ascontiguousarray(array).data)
        digest.update(f"n_actions {self.n_actions};{self.info.to_json()}".encode())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to an HDF5 file of our own layout and return its path.

        The file is written under a temporary name in the same folder and moved into place, so an interrupted
        or failed write (a full disk) leaves whatever was there before. Arrays are compressed without loss;
        `info` is JSON text. Missing folders are made.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, h5py.File(temporary, "w") as file:
            file.attrs[FORMAT_ATTRIBUTE] = FORMAT_VERSION
            file.attrs["fingerprint"] = self.fingerprint
            file.attrs["info"] = self.info.to_json()
            if self.n_actions is not None:
                file.attrs["n_actions"] = self.n_actions
            for key, array in self._arrays().items():
                file.create_dataset(key, data=array, compression="gzip", shuffle=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by `save` and verify its fingerprint.

        Raises:
            DataError: no such file, not HDF5, another layout or version, or a damaged file.
        """
        with open_hdf5(path) as file:
            if FORMAT_ATTRIBUTE not in file.attrs:
                raise DataError("is HDF5 but was not saved by corollary; corollary.load_dataset reads D4RL-style files")
            version = int(file.attrs[FORMAT_ATTRIBUTE])
            if version != FORMAT_VERSION:
                raise DataError(f"has dataset format {version}; this version reads format {FORMAT_VERSION}")
            attributes = dict(file.attrs)
            fields = {f.name: file[f.name][()] for f in dataclasses.fields(cls) if f.name in file}
        n_actions = attributes.get("n_actions")
        try:
            dataset = cls(
                **{"action_low": None, "action_high": None, **fields},
                n_actions=None if n_actions is None else int(n_actions),
                info=DatasetInfo.from_json(attributes["info"]),
            )
            damaged = dataset.fingerprint != attributes["fingerprint"]
        except (LookupError, TypeError, AttributeError, ValueError):
            damaged = True
        if damaged:
            raise DataError(f"{path}: is damaged: its content does not match its fingerprint; fetch or make it again")
        return dataset

    def summary(self) -> dict[str, Any]:
        """Return what `corollary data info` prints: plain numbers, JSON-able.

        ``rows_dropped`` counts rows of the set that a view leaves out; ``action_saturation`` is the share of
        action entries within 1 % of the width of their box from a bound (None for discrete actions);
        ``state_std`` is the smallest and largest standard deviation of an observation entry.
        """
        returns = self.episode_returns()
        rows = np.arange(len(self)) + self.episode_of_row
        observations = self.observations.reshape(len(self.observations), -1)
        state_std = [float(column[rows].std(dtype=np.float64)) for column in observations.T]
        saturation = None
        if self.action_low is not None and self.action_high is not None:
            margin = 0.01 * (self.action_high - self.action_low)
            saturated = (self.actions <= self.action_low + margin) | (self.actions >= self.action_high - margin)
            saturation = float(saturated.mean())
        has_references = self.info.ref_min_score is not None and self.info.ref_max_score is not None
        return {
            "name": self.info.name,
            "env_id": self.info.env_id,
            "rows": len(self),
            "episodes": self.n_episodes,
            "observation_dim": self.observation_dim,
            "action_dim": self.action_dim,
            "discrete_actions": self.n_actions is not None,
            "return": _spread(returns),
            "length": _spread(self.episode_lengths),
            "terminals": int(self.terminated.sum()),
            "timeouts": int(self.truncated.sum()),
            "rows_dropped": {view: len(self) - len(self.view_rows(view)) for view in VIEWS},
            "reward": {"min": float(self.rewards.min()), "max": float(self.rewards.max())},
            "action_saturation": saturation,
            "state_std": {"min": min(state_std), "max": max(state_std)},
            "score": float(self.normalized_score(returns.mean())) if has_references else None,
            "score_source": self.info.score_source,
            "provenance": dict(self.info.provenance),
            "fingerprint": self.fingerprint,
        }


# ------------------------------------------------------------------------------------------------------------
# Shared by the loaders
# ------------------------------------------------------------------------------------------------------------


def _with_references(info: DatasetInfo) -> DatasetInfo:
    """Fill in the reference returns of the environment where `info` has none and they are known."""
    reference = known_reference(info.env_id)
    if reference is None or (info.ref_min_score, info.ref_max_score) != (None, None):
        return info
    return dataclasses.replace(
        info, ref_min_score=reference.min, ref_max_score=reference.max, score_source=reference.source
    )


def _episode_columns(episode: Episode) -> dict[str, NDArray[Any]]:
    """Check one episode's columns and give both flags their full length."""
    flags = {}
    steps = len(np.atleast_1d(np.asarray(episode.rewards)))
    for key in ("terminated", "truncated"):
        flag = np.asarray(getattr(episode, key))
        if flag.ndim == 0:
            flag = np.append(np.zeros(max(steps - 1, 0), dtype=np.bool_), as_flags(key, flag[None]))
        flags[key] = flag
    columns = checked_columns({"actions": episode.actions, "rewards": episode.rewards, **flags})
    observations = checked_columns({"observations": episode.observations})["observations"]
    if len(observations) != steps + 1:
        raise DataError(f"{steps} steps need {steps + 1} observations; got {len(observations)}")
    return {**columns, "observations": observations}


def _spread(values: NDArray[Any]) -> dict[str, float]:
    quantiles = np.quantile(values, [0.25, 0.5, 0.75])
    return {
        "mean": float(values.mean()),
        "min": float(values.min()),
        "25%": float(quantiles[0]),
        "50%": float(quantiles[1]),
        "75%": float(quantiles[2]),
        "max": float(values.max()),
    }


@contextlib.contextmanager
def prefixed(place: str) -> Iterator[None]:
    """Put `place` (a file, an episode) in front of the message of any DataError raised inside."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


@contextlib.contextmanager
def open_hdf5(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, and for nothing else: any error inside is taken for the file's fault.

    Raises:
        DataError: no such file, a file that is not HDF5, or one that cannot be read; the message names the
            file.
    """
    path = Path(path)
    with prefixed(str(path)):
        if not path.exists():
            raise DataError("there is no such file")
        if not h5py.is_hdf5(path):
            raise DataError("is not an HDF5 file")
        try:
            with h5py.File(path, "r") as file:
                yield file
        except DataError:
            raise
        except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:  # h5py raises them all
            raise DataError(f"is damaged or cut short: {error}") from None
