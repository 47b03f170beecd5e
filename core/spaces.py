"""Gymnasium's spaces as the library sees them: an observation is a float32 vector, an action a row of numbers.

A composite observation is flattened in the order of :func:`gymnasium.spaces.flatten`: the entries of a Dict in the
order of ``space.spaces``, arrays row by row, a Discrete value as a one-hot vector. An action is a row of ``d_a``
numbers: floats for a continuous space, category indices from 0 for a discrete one. Both are translated here, once,
so that nothing else knows of ``Discrete.start``, of clipping to the action box, or of dtypes.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from .errors import CheckpointError, DataError, EnvironmentMismatchError


class Observations:
    """The map from observations of one environment to vectors ``[d]``.

    Args:
        space: the environment's observation space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these.
        env_name: what error messages call the environment.

    Attributes:
        dim: width d of the vector.

    Raises:
        EnvironmentMismatchError: another space, an image (uint8 with three axes or more), or one without entries.
    """

    def __init__(self, space: gymnasium.Space[Any], env_name: str) -> None:
        _require_vector_form(space, env_name)
        self.space = space
        self.env_name = env_name
        self.dim = spaces.flatdim(space)
        if self.dim == 0:
            raise EnvironmentMismatchError(
                f"{env_name} has the empty observation space {space}: wrap it so that it shows at least a constant."
            )
        self._box_shape = space.shape if isinstance(space, spaces.Box) else None
        self._parts = (
            [(key, Observations(part, env_name)) for key, part in space.spaces.items() if spaces.flatdim(part)]
            if isinstance(space, spaces.Dict)
            else []
        )

    def encode(self, obs: Any) -> NDArray[np.float32]:
        """Return one observation as a vector ``[d]``; where nothing had to be converted it shares `obs`'s memory.

        Raises:
            EnvironmentMismatchError: if `obs` does not fit the space.
        """
        try:
            return self._vector(obs)
        except KeyError as error:
            raise self._misfit(f"no entry {error}") from error
        except (TypeError, ValueError, IndexError) as error:
            raise self._misfit(str(error)) from error

    def _vector(self, obs: Any) -> NDArray[np.float32]:
        if self._box_shape is not None:
            row: NDArray[np.float32] = np.asarray(obs, np.float32)
            if row.shape != self._box_shape:
                raise DataError(f"shape {row.shape}")
            return row if row.ndim == 1 else row.reshape(-1)
        if self._parts:
            return np.concatenate([part._vector(obs[key]) for key, part in self._parts])
        if isinstance(self.space, spaces.Discrete):  # what follows would do, in five times the time
            index = operator.index(obs) - int(self.space.start)
            if not 0 <= index < self.dim:
                raise DataError(f"value {obs}")
            one_hot = np.zeros(self.dim, np.float32)
            one_hot[index] = 1
            return one_hot
        vector: NDArray[np.float32] = np.asarray(flatten_steps(self.space, np.asarray(obs)[None]), np.float32)[0]
        if len(vector) != self.dim:
            raise DataError(f"shape {np.shape(obs)}")
        return vector

    def encode_batch(self, obs: Any) -> NDArray[np.float32]:
        """Return n observations as ``[n, d]``.

        Args:
            obs: the layout of vector environments: arrays with a leading axis n, inside dicts where the space has a
                Dict.

        Raises:
            EnvironmentMismatchError: if `obs` does not fit the space.
        """
        try:
            rows = np.asarray(flatten_steps(self.space, obs), np.float32)
        except (TypeError, ValueError, IndexError) as error:
            raise self._misfit(str(error)) from error
        if rows.shape[1:] != ((self.dim,) if self._box_shape is None else self._box_shape):
            raise self._misfit(f"shape {rows.shape}, the first axis counting observations")
        return rows.reshape(-1, self.dim)

    def is_single(self, obs: Any) -> bool:
        """Whether `obs` is one observation rather than a batch: the number of its axes decides.

        Raises:
            EnvironmentMismatchError: if it has the axes of neither.
        """
        if self._parts:
            key, part = self._parts[0]
            if not isinstance(obs, dict) or key not in obs:
                raise self._misfit(f"no entry {key!r}")
            return part.is_single(obs[key])
        axes, expected = np.ndim(obs), len(self.space.shape or ())
        if axes not in (expected, expected + 1):
            raise EnvironmentMismatchError(
                f"One observation of {self.env_name}, or a batch of them, is needed; its observation space is "
                f"{self.space}, and the shape given {np.shape(obs)}."
            )
        return axes == expected

    def _misfit(self, what: str) -> EnvironmentMismatchError:
        return EnvironmentMismatchError(
            f"An observation is outside the observation space {self.space} of {self.env_name} ({what}): mend the "
            "environment or the space that it declares, or give predict what that environment shows."
        )


class Actions:
    """The map from rows of ``d_a`` numbers to the actions of one environment.

    Args:
        space: the environment's action space: Box of floats with one axis, Discrete, or MultiDiscrete with one axis.
        env_name: what error messages call the environment.

    Attributes:
        kind: ``"continuous"`` or ``"discrete"``.
        dim: number of components ``d_a``; 1 for Discrete.
        sizes: number of categories of each component; empty for a continuous space.
        start: number of the first category of each component; empty for a continuous space.
        low: lower bounds ``[d_a]``, -inf where there is none; ``[0]`` for a discrete space.
        high: upper bounds, likewise.

    Raises:
        EnvironmentMismatchError: another space, or one without components.
    """

    def __init__(self, space: gymnasium.Space[Any], env_name: str) -> None:
        self.space = space
        self.env_name = env_name
        self.kind: Literal["continuous", "discrete"] = "discrete"
        self.sizes: tuple[int, ...] = ()
        self.start: tuple[int, ...] = ()
        self.low = self.high = np.empty(0, np.float32)
        if isinstance(space, spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f":
            self.kind = "continuous"
            with np.errstate(over="ignore"):  # the largest float64, a common way to say "unbounded", becomes inf
                self.low, self.high = space.low.astype(np.float32), space.high.astype(np.float32)
        elif isinstance(space, spaces.Discrete):
            self.sizes, self.start = (int(space.n),), (int(space.start),)
        elif isinstance(space, spaces.MultiDiscrete) and len(space.shape) == 1:
            self.sizes, self.start = tuple(space.nvec.tolist()), tuple(space.start.tolist())
        else:
            raise EnvironmentMismatchError(
                f"{env_name} has the action space {space}, but actions must be Discrete, or Box of floats or "
                "MultiDiscrete with one axis: wrap it in gymnasium.wrappers.TransformAction with such a space."
            )
        self.dim = len(self.sizes) or len(self.low)
        if self.dim == 0:
            raise EnvironmentMismatchError(f"{env_name} has the empty action space {space}: there is nothing to learn.")

    def to_env(self, rows: NDArray[Any]) -> Sequence[Any]:
        """Translate R rows ``[R, d_a]`` into R actions, each as the environment's ``step`` expects it.

        Continuous actions are clipped to the box; categories are counted from the space's ``start``.
        """
        batch = self.to_env_batch(rows)
        actions: list[Any] = batch.tolist() if isinstance(self.space, spaces.Discrete) else list(batch)
        return actions

    def to_env_batch(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Translate R rows ``[R, d_a]`` into the array that a vector environment expects, ``[R]`` for Discrete.

        Continuous actions are clipped to the box; categories are counted from the space's ``start``.
        """
        if isinstance(self.space, spaces.Box):
            clipped: NDArray[Any] = np.clip(rows.astype(self.space.dtype), self.space.low, self.space.high)
            return clipped
        assert isinstance(self.space, spaces.Discrete | spaces.MultiDiscrete)
        indices = rows[:, 0] if isinstance(self.space, spaces.Discrete) else rows
        actions: NDArray[Any] = (indices + self.space.start).astype(self.space.dtype)
        return actions


def _require_vector_form(space: gymnasium.Space[Any], env_name: str) -> None:
    if isinstance(space, spaces.Dict):
        for part in space.spaces.values():
            _require_vector_form(part, env_name)
    elif isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) >= 3:
        raise EnvironmentMismatchError(
            f"{env_name} shows images, observation space {space}, and the networks take vectors: use features, or wrap "
            "it in gymnasium.wrappers.FlattenObservation to learn from the pixels as numbers."
        )
    elif not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise EnvironmentMismatchError(
            f"{env_name} has the observation space {space}, but observations must be Box, Discrete, MultiDiscrete, "
            "MultiBinary or a Dict of these: wrap it in gymnasium.wrappers.FlattenObservation, or where that is "
            "refused in a gymnasium.ObservationWrapper that returns a vector."
        )


# ------------------------------------------------------------------------------------------------------- flattening


def flatten_steps(space: gymnasium.Space[Any] | None, steps: Any) -> ArrayLike:
    """Flatten T values of `space` as `gymnasium.spaces.flatten` does each one.

    Args:
        space: Box, MultiBinary, Discrete, MultiDiscrete, or a Dict or Tuple of these; None takes arrays as
            they are.
        steps: the values in the layout of vector environments and of Minari: arrays with a leading axis T, inside
            dicts and tuples as in `space`.

    Returns:
        ``[T, d]``, or the array itself, ``[T, *shape]``, where the whole space is a Box or None.

    Raises:
        DataError: a space without a fixed-size vector form, or values that do not fit it.
    """
    if space is None or isinstance(space, spaces.Box):
        if isinstance(steps, dict | tuple):
            raise DataError("observations are dicts or tuples, but the dataset has no such observation_space")
        return np.asarray(steps)
    return _flat(space, steps)


def _flat(space: gymnasium.Space[Any], steps: Any) -> NDArray[Any]:
    if isinstance(space, spaces.Dict):
        missing = [key for key in space.spaces if not isinstance(steps, dict) or key not in steps]
        if missing:
            raise DataError(f"observations lack the entry {missing[0]!r} of their Dict space")
        return np.concatenate([_flat(part, steps[key]) for key, part in space.spaces.items()], axis=1)
    if isinstance(space, spaces.Tuple):
        if len(steps) != len(space.spaces):
            raise DataError(f"observations have {len(steps)} entries, their Tuple space {len(space.spaces)}")
        return np.concatenate([_flat(part, step) for part, step in zip(space.spaces, steps, strict=True)], axis=1)
    array = np.asarray(steps)
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return array.reshape(len(array), -1)
    if isinstance(space, spaces.Discrete):
        return _one_hot(array.reshape(-1) - space.start, int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        values = (array - space.start).reshape(len(array), -1)
        return np.concatenate([_one_hot(v, int(n)) for v, n in zip(values.T, space.nvec.ravel(), strict=True)], axis=1)
    raise DataError(f"observations of {type(space).__name__} spaces have no fixed-size vector form")


def _one_hot(values: NDArray[Any], n: int) -> NDArray[np.float32]:
    if ((values < 0) | (values >= n)).any():
        raise DataError(f"observations hold a discrete value outside its {n} possible ones")
    encoded = np.zeros((len(values), n), np.float32)
    encoded[np.arange(len(values)), values] = 1
    return encoded


# ------------------------------------------------------------------------------------------------------------- JSON


def space_to_json(space: gymnasium.Space[Any]) -> dict[str, Any]:
    """Return `space` as strict JSON (infinite bounds as strings); :func:`space_from_json` inverts it exactly.

    Raises:
        EnvironmentMismatchError: a space other than Box, Discrete, MultiDiscrete, MultiBinary and Dict of these.
    """
    if isinstance(space, spaces.Box):
        bounds = {"low": _numbers(space.low), "high": _numbers(space.high)}
        return {"type": "Box", "shape": list(space.shape), "dtype": space.dtype.name, **bounds}
    if isinstance(space, spaces.Discrete):
        json = {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
        # The argument dtype is younger than the oldest supported gymnasium, so the default is left unsaid.
        return json if space.dtype == np.int64 else {**json, "dtype": space.dtype.name}
    if isinstance(space, spaces.MultiDiscrete):
        counts = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
        return {"type": "MultiDiscrete", "dtype": space.dtype.name, **counts}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.n)}
    if isinstance(space, spaces.Dict):  # pairs, not an object: the order of the entries is the order of the vector
        return {"type": "Dict", "spaces": [[key, space_to_json(part)] for key, part in space.spaces.items()]}
    raise EnvironmentMismatchError(
        f"The space {space} cannot be stored; Box, Discrete, MultiDiscrete, MultiBinary and Dict of these can."
    )


def space_from_json(json: Mapping[str, Any]) -> gymnasium.Space[Any]:
    """Rebuild a space from what :func:`space_to_json` returned.

    Raises:
        CheckpointError: if `json` describes no space.
    """
    try:
        kind, arguments = json["type"], {key: value for key, value in json.items() if key != "type"}
        if kind == "Box":
            shape, dtype = tuple(arguments["shape"]), np.dtype(arguments["dtype"])
            low, high = (np.array(arguments[bound], dtype).reshape(shape) for bound in ("low", "high"))
            return spaces.Box(low, high, shape, dtype=dtype.type)
        if kind == "Discrete":
            return spaces.Discrete(**arguments)
        if kind == "MultiDiscrete":
            return spaces.MultiDiscrete(**arguments)
        if kind == "MultiBinary":
            return spaces.MultiBinary(**arguments)
        if kind == "Dict":
            return spaces.Dict([(key, space_from_json(part)) for key, part in arguments["spaces"]])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{json} does not describe a space ({error}): restore the checkpoint.") from error
    raise CheckpointError(f"{json} describes no space that this version knows: it needs a newer one.")


def _numbers(bounds: NDArray[Any]) -> list[Any]:
    return [number if np.isfinite(number) else str(number) for number in bounds.ravel().tolist()]
