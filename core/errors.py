"""The errors a user can cause: each says in one sentence what is wrong, where, and what to do."""

import difflib
import warnings
from collections.abc import Iterable


class CorollaryError(ValueError):
    """Base of every error that bad input to the library raises."""


class DataError(CorollaryError):
    """A dataset, file or array that cannot be used as it is."""


class ConfigError(CorollaryError):
    """An option that does not exist or has a value outside its range."""


class CheckpointError(CorollaryError):
    """A checkpoint that is missing, damaged, or belongs to something else."""


class EnvironmentMismatchError(CorollaryError):
    """An environment whose spaces differ from those that an agent or dataset was made for."""


class GuaranteeError(CorollaryError):
    """A bound that an algorithm promises and that a run has broken."""


def marked(seeds: Iterable[int], marks: Iterable[object]) -> str:
    """Return the seeds whose mark is true, separated by commas."""
    return ", ".join(str(seed) for seed, mark in zip(seeds, marks, strict=True) if mark)


def tell_divergence(said: str, *, of_all: bool, stacklevel: int) -> None:
    """Raise a :class:`CorollaryError` if all seeds have diverged; else warn, for the others go on."""
    if of_all:
        raise CorollaryError(said)
    warnings.warn(said, RuntimeWarning, stacklevel=stacklevel + 1)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to `name`, or ``""`` when none is near."""
    # A name without its room, "ppo" for "online.ppo", is nearer than its letters say.
    parts = {part.casefold(): each for each in known for part in (each.rpartition(".")[2], each)}
    near = difflib.get_close_matches(name.casefold(), parts, n=1)
    return f" Did you mean {parts[near[0]]!r}?" if near else ""
