"""Input columns of a dataset: what comes from outside is checked here for dtype, rank, length and values.

Numbers of any real dtype become float32, rounded to nearest as ``astype`` does. Nothing else is converted:
what cannot be stored as it is raises a `DataError` naming the column and the row.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import DataError

_FLAGS = ("terminated", "truncated", "terminals", "timeouts")


def is_whole(number: object) -> bool:
    """Whether it is an integer of Python or NumPy, and no bool."""
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def checked_columns(raw: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
    """Turn named per-row columns into arrays of the stored dtypes.

    Known names: observations and next_observations (float32 ``[N, *obs]``), actions (float32 ``[N, d_a]``, or
    int64 ``[N]`` for a discrete space), rewards (float32 ``[N]``), and the flags terminated, truncated,
    terminals and timeouts (bool ``[N]``).

    Raises:
        DataError: a column of another dtype or rank, columns of different lengths or without rows, or an
            entry that is not finite in float32.
    """
    columns = {key: _column(key, value) for key, value in raw.items()}
    lengths = {key: len(value) for key, value in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise DataError(f"every column needs the same number of rows, but {listed}")
    if 0 in lengths.values():
        raise DataError("the set is empty: its columns have no rows")
    for key, column in columns.items():
        check_finite(key, column)
    return columns


def _column(key: str, value: ArrayLike) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError:  # numpy's word for nested sequences of unequal length
        raise DataError(f"{key} is ragged: its rows have different lengths") from None
    shape = list(array.shape)
    if key in _FLAGS:
        return as_flags(key, array)
    if array.dtype.kind not in "fiu":
        raise DataError(f"{key} must hold real numbers; got dtype {array.dtype}")
    if key == "actions":
        if array.ndim == 1 and array.dtype.kind in "iu":
            return array.astype(np.int64)
        if array.ndim != 2 or array.dtype.kind != "f":
            raise DataError(
                "actions must be floats of shape [N, d_a], or integers of shape [N] for a discrete space; "
                f"got {array.dtype} of shape {shape}"
            )
    elif key == "rewards" and array.ndim != 1:
        raise DataError(f"rewards must have shape [N]; got {shape}")
    elif key != "rewards" and array.ndim < 2:
        raise DataError(f"{key} must have shape [N, d_s]; got {shape}")
    # A float64 beyond the float32 range becomes inf here and is reported by the check for finite values.
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32, copy=False)


def as_flags(key: str, array: NDArray[Any]) -> NDArray[np.bool_]:
    """Return a column of flags, ``[N]``, given as booleans or as the numbers 0 and 1.

    Raises:
        DataError: another rank or dtype, or another number.
    """
    if array.ndim != 1 or array.dtype.kind not in "bfiu":
        raise DataError(f"{key} must be booleans of shape [N]; got {array.dtype} of shape {list(array.shape)}")
    odd = np.flatnonzero((array != 0) & (array != 1))
    if odd.size:
        raise DataError(f"{key} must hold booleans (or 0 and 1); row {odd[0]} is {array[odd[0]]}")
    return array.astype(np.bool_, copy=False)


def check_finite(key: str, column: NDArray[Any]) -> None:
    """Check that every entry of ``[N, ...]`` is finite.

    Raises:
        DataError: naming the first offending row and dimension.
    """
    finite = np.isfinite(column)
    if not finite.all():
        row, *dimensions = (int(axis[0]) for axis in np.nonzero(~finite))
        place = f"row {row}" + "".join(f", dimension {dimension}" for dimension in dimensions)
        raise DataError(f"{key} holds {column[(row, *dimensions)]} at {place}; every entry must be finite in float32")


def check_successors(
    observations: NDArray[np.float32], next_observations: NDArray[np.float32], ended: NDArray[np.bool_]
) -> None:
    """Check that next_observations repeats the next row's observation wherever no episode ends.

    They agree if they differ by at most 1e-6 + 1e-5 times the observation.

    Raises:
        DataError: another shape, or a row that contradicts the following one.
    """
    if next_observations.shape != observations.shape:
        raise DataError(
            f"next_observations has shape {list(next_observations.shape)}, but observations {list(observations.shape)}"
        )
    following = observations[1:]
    differs = np.abs(next_observations[:-1] - following) > 1e-6 + 1e-5 * np.abs(following)
    contradicted = np.flatnonzero(differs.any(axis=tuple(range(1, differs.ndim))) & ~ended[:-1])
    if contradicted.size:
        row = int(contradicted[0])
        raise DataError(
            f"next_observations at row {row} contradicts observations at row {row + 1} of the same episode; "
            f"if the recording was cut after row {row}, mark that row as truncated (a timeout)"
        )


def interleave(
    observations: NDArray[np.float32],
    episode_starts: NDArray[np.int64],
    final_observations: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Put each episode's final observation after its last row.

    Args:
        observations: ``[N, *obs]``, one per row.
        episode_starts: ``[E]``, first row of each episode.
        final_observations: ``[E, *obs]``.

    Returns:
        ``[N+E, *obs]``.
    """
    n, n_episodes = len(observations), len(episode_starts)
    merged = np.empty((n + n_episodes, *observations.shape[1:]), dtype=np.float32)
    lengths = np.diff(episode_starts, append=n)
    merged[np.arange(n) + np.repeat(np.arange(n_episodes), lengths)] = observations
    merged[episode_starts + lengths + np.arange(n_episodes)] = final_observations
    return merged


def action_fields(
    actions: NDArray[Any], low: ArrayLike | float, high: ArrayLike | float, n_actions: int | None
) -> dict[str, Any]:
    """Return the action fields of `Dataset`: actions, action_low, action_high and n_actions.

    Bounds become ``[d_a]`` for continuous actions; for discrete ones n_actions defaults to the largest plus
    one.

    Raises:
        DataError: bounds of another shape, n_actions for continuous actions, or one that is not whole.
    """
    if n_actions is not None and not is_whole(n_actions):
        raise DataError(f"n_actions must be a whole number; got {n_actions!r}")
    if actions.dtype.kind == "i":
        count = int(actions.max()) + 1 if n_actions is None else int(n_actions)
        return {"actions": actions, "action_low": None, "action_high": None, "n_actions": count}
    if n_actions is not None:
        raise DataError("n_actions is for discrete actions (integers of shape [N]), but these are floats")
    d_a = actions.shape[1]
    try:
        bounds = [np.array(np.broadcast_to(bound, (d_a,)), dtype=np.float32) for bound in (low, high)]
    except ValueError:
        raise DataError(f"action_low and action_high must be numbers or have shape [{d_a}]") from None
    return {"actions": actions, "action_low": bounds[0], "action_high": bounds[1], "n_actions": None}
