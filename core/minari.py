"""Minari datasets, by duck type: the package is needed only to find a dataset by its id.

Minari keeps T+1 observations per episode, so every row has its true successor. Observations of composite
spaces become one vector per step in the order of `gymnasium.spaces.flatten`: the entries of a Dict in the
order of ``space.spaces`` (sorted by key unless the space was made with an order of its own), those of a Tuple
by position, arrays row by row, and a Discrete value as a one-hot vector. The environment must flatten its
observations likewise (`gymnasium.wrappers.FlattenObservation` does).
"""

import math
from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from .dataset import Dataset, DatasetInfo, Episode, prefixed
from .errors import DataError
from .spaces import flatten_steps

_RECORDED = ("minari_version", "algorithm_name", "author", "code_permalink", "num_episodes_average_score")


def load_minari(dataset_id: str) -> Dataset:
    """Load a dataset of the local Minari store by its id, such as ``D4RL/door/human-v2``.

    Nothing is downloaded; ``minari download ID`` fetches a dataset into the store.

    Raises:
        DataError: Minari is not installed, the id is not in the store, or the data is bad.
    """
    try:
        import minari
    except ImportError:
        raise DataError(
            f"minari:{dataset_id} needs the package minari: install it with pip install 'corollary[minari]'"
        ) from None
    try:
        dataset = minari.load_dataset(dataset_id)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"minari:{dataset_id} cannot be loaded ({error}); fetch it with: minari download {dataset_id}"
        ) from None
    return from_minari(dataset)


def from_minari(dataset: Any, name: str | None = None) -> Dataset:
    """Convert a Minari dataset, or anything shaped like one.

    Args:
        dataset: iterable of episodes with the attributes observations (T+1 steps: arrays, or nested dicts and
            tuples), actions, rewards, terminations and truncations (T steps). Its own attributes
            observation_space, action_space, id, env_spec and storage.metadata (with ref_min_score and
            ref_max_score) are used where present.
        name: name of the result, by default the dataset's id.

    A step with both flags set counts as terminated; how many there were is recorded in the provenance.

    Raises:
        DataError: an episode or a space that cannot be used, naming the episode and field.
    """
    if not isinstance(dataset, Iterable):
        raise DataError(f"from_minari takes a Minari dataset, an iterable of episodes; got {type(dataset).__name__}.")
    name = name or str(getattr(dataset, "id", "minari"))
    observation_space = getattr(dataset, "observation_space", None)
    action_space = getattr(dataset, "action_space", None)
    episodes, both_flags = [], 0
    with prefixed(name):
        for number, episode in enumerate(dataset):
            with prefixed(f"episode {number}"):
                observations = flatten_steps(observation_space, _attribute(episode, "observations"))
                actions = _actions(action_space, _attribute(episode, "actions"))
                terminations = np.asarray(_attribute(episode, "terminations"))
                truncations = np.asarray(_attribute(episode, "truncations"))
                if terminations.shape == truncations.shape:
                    both = (terminations != 0) & (truncations != 0)
                    both_flags += int(both.sum())
                    truncations = np.where(both, False, truncations)
                episodes.append(
                    Episode(observations, actions, _attribute(episode, "rewards"), terminations, truncations)
                )
        info = _info(dataset, name, both_flags)
        return Dataset.from_episodes(episodes, **_action_arguments(action_space), info=info)


def _actions(space: gymnasium.Space[Any] | None, actions: Any) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(actions)
    if isinstance(space, spaces.Box):
        return array.reshape(len(array), math.prod(space.shape))
    if isinstance(space, spaces.Discrete):
        indices: NDArray[Any] = array.reshape(-1) - space.start
        return indices
    if space is None:
        return array
    raise DataError(f"actions of {type(space).__name__} spaces are not supported; Box and Discrete are")


def _action_arguments(space: gymnasium.Space[Any] | None) -> dict[str, Any]:
    if isinstance(space, spaces.Box):
        return {"action_low": space.low.ravel(), "action_high": space.high.ravel()}
    if isinstance(space, spaces.Discrete):
        return {"n_actions": int(space.n)}
    return {}


def _attribute(episode: Any, key: str) -> Any:
    if not hasattr(episode, key):
        raise DataError(f"has no {key}; a Minari episode has observations, actions, rewards, terminations, truncations")
    return getattr(episode, key)


def _info(dataset: Any, name: str, both_flags: int) -> DatasetInfo:
    metadata = dict(getattr(getattr(dataset, "storage", None), "metadata", {}))
    env_spec = getattr(dataset, "env_spec", None)
    references = [metadata[key] for key in ("ref_min_score", "ref_max_score") if metadata.get(key) is not None]
    low, high = map(float, references) if len(references) == 2 else (None, None)
    return DatasetInfo(
        name=name,
        env_id=getattr(env_spec, "id", None),
        ref_min_score=low,
        ref_max_score=high,
        score_source=None if low is None else "the Minari metadata",
        description=str(metadata.get("description", "")),
        provenance={
            "format": "Minari",
            **{key: str(metadata[key]) for key in _RECORDED if metadata.get(key) is not None},
            "rows_with_both_flags": both_flags,
        },
        horizon=getattr(env_spec, "max_episode_steps", None),
    )
