"""Checkpoints: a folder with ``config.json`` and ``state.safetensors``, written so that a kill leaves a whole one.

The new folder is completed and flushed to disk under a temporary name beside the old one, then the two are swapped by
renames. Whatever moment the process dies at, :func:`read` finds either the old checkpoint or the new one (between the
two renames, under its temporary name); after a failed write (a full disk) the old one is untouched. Reading changes
nothing on disk, so another process may read while a run writes. Plain JSON and safetensors only: nothing loaded can
execute code.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import CheckpointError
from .files import flush

T = TypeVar("T")

CONFIG = "config.json"
STATE = "state.safetensors"
FORMAT = 1


def write(path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint folder at `path`, atomically replacing a checkpoint that is there.

    Args:
        path: the folder; missing parents are made.
        config: JSON-able description, stored as given plus the format's version and the state's SHA-256.
        tensors: flat mapping of names to tensors, any device.

    Raises:
        CheckpointError: if `path` holds something that is not a checkpoint, or the disk refuses the write (the
            previous checkpoint then survives).
    """
    path = Path(path).absolute()  # "." has no name, and the folders beside it are found by theirs
    if path.exists() and not _is_checkpoint(path):
        raise CheckpointError(f"{path} exists and is not a checkpoint, so it is not overwritten: choose another path.")
    new, old = _sibling(path, "new"), _sibling(path, "old")
    blob = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    described = {**config, "format": FORMAT, "state_sha256": hashlib.sha256(blob).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        _write_file(new / STATE, blob)
        _write_file(new / CONFIG, json.dumps(described, indent=2).encode())
        flush(new)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        new.rename(path)
        flush(path.parent)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise CheckpointError(
            f"Could not write the checkpoint {path} ({error.strerror or error}); "
            "an earlier checkpoint there is untouched."
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    return path


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the checkpoint folder at `path` and return ``(config, tensors)`` (tensors on the CPU).

    Raises:
        CheckpointError: if there is none, it is damaged or truncated, or a later version of the library wrote it.
    """
    path = _current(Path(path).absolute())
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"No checkpoint at {path}: it has no {CONFIG}.")
    try:
        config = json.loads((path / CONFIG).read_text())
        blob = (path / STATE).read_bytes()
    except (OSError, ValueError) as error:  # bytes that are no text are a ValueError too
        raise CheckpointError(f"The checkpoint {path} is damaged ({error}): use an earlier one.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(
            f"The checkpoint {path} has format {config.get('format') if isinstance(config, dict) else None!r}; "
            f"this version reads format {FORMAT}."
        )
    if hashlib.sha256(blob).hexdigest() != config.get("state_sha256"):
        raise CheckpointError(
            f"The checkpoint {path} is damaged: {STATE} ({len(blob)} bytes) is cut or altered; use an earlier one."
        )
    try:
        return config, safetensors.torch.load(blob)
    except SafetensorError as error:
        raise CheckpointError(f"The checkpoint {path} is damaged ({error}): use an earlier one.") from error


def exists(path: str | Path) -> bool:
    """Whether :func:`read` would find a checkpoint at `path`."""
    return (_current(Path(path).absolute()) / CONFIG).is_file()


def _sibling(path: Path, tag: str) -> Path:
    return path.with_name(f".{path.name}.{tag}")


def _current(path: Path) -> Path:
    """`path`, or the old folder beside it if a writer is (or was killed) between its two renames."""
    old = _sibling(path, "old")
    return old if not path.exists() and (old / CONFIG).is_file() else path


def _is_checkpoint(path: Path) -> bool:
    """Whether replacing `path` loses nothing but a checkpoint: other folders have a ``config.json`` too."""
    return path.is_dir() and {entry.name for entry in path.iterdir()} <= {CONFIG, STATE}


def _write_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    flush(path)


def below(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the entries whose name begins with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
