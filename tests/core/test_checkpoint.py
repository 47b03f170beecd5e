"""Checkpoints: bits survive, and a whole checkpoint survives kills, a refusing disk, damage and misuse."""

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from corollary.core import checkpoint
from corollary.core.errors import CheckpointError

NAN_PAYLOAD = torch.tensor([0x7FC00123], dtype=torch.int32).view(torch.float32)


def version(number: int) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    return {"version": number}, {"a": torch.full((3, 2), float(number)), "b": torch.full((5,), number)}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that also tells apart the signs of zeros and the payloads of nans."""
    flat = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*flat)


def version_at(path: Path) -> int:
    """Read a checkpoint, check that it is whole, and return which one it is."""
    config, tensors = checkpoint.read(path)
    expected = version(config["version"])[1]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    return config["version"]


# -- Round trip


def test_bits_shapes_dtypes_and_config_survive(tmp_path) -> None:
    tensors = {
        "float32": torch.tensor([[0.1, -0.0, torch.inf, 1e-45]]),
        "nan": NAN_PAYLOAD,
        "float64": torch.tensor([0.1 + 0.2], dtype=torch.float64),
        "scalar": torch.tensor(3.0),
        "bfloat16": torch.tensor([1.5], dtype=torch.bfloat16),
        "int64": torch.tensor([2**62 + 1]),
        "empty": torch.zeros(0, 3),
        "a view/with a path": torch.arange(6.0).view(2, 3).T,
    }
    config = {"text": "café", "number": 0.1 + 0.2, "list": [1, None, True], "nested": {"deep": "x"}}
    path = tmp_path / "new" / "folders" / "checkpoint"
    assert checkpoint.write(path, config, tensors) == path
    read_config, read_tensors = checkpoint.read(path)
    assert {key: read_config[key] for key in config} == config
    assert read_tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(read_tensors[name], tensor), name
    assert sorted(os.listdir(path)) == ["config.json", "state.safetensors"]


def test_rewriting_leaves_one_checkpoint_and_no_debris(tmp_path) -> None:
    path = tmp_path / "checkpoint"
    assert not checkpoint.exists(path)
    for number in (1, 2, 3):
        checkpoint.write(path, *version(number))
        assert checkpoint.exists(path)
        assert version_at(path) == number
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_what_was_read_can_be_written_again(tmp_path) -> None:
    """The entries that describe the old state do not stick to the new one."""
    config, tensors = checkpoint.read(checkpoint.write(tmp_path / "checkpoint", *version(1)))
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    checkpoint.write(tmp_path / "checkpoint", config | {"version": 2}, changed)
    assert version_at(tmp_path / "checkpoint") == 2


def test_nothing_is_unpickled(tmp_path, monkeypatch) -> None:
    path = checkpoint.write(tmp_path / "checkpoint", *version(1))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was loaded")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert version_at(path) == 1


# -- Kills

# Run in a process of its own, which forks one child per moment of death: each is killed just before its n-th call into
# the file system, or half-way through writing a file. The last child of a case survives and ends it.
KILLED_WRITERS = """
import itertools, os, shutil, signal, sys
from pathlib import Path

import torch
from corollary.core import checkpoint


def version(number):
    return {"version": number}, {"a": torch.full((3, 2), float(number)), "b": torch.full((5,), number)}


def write_in_place(path, config, tensors):
    # The control: what `write` does, but straight into the folder.
    blob = checkpoint.safetensors.torch.save(tensors)
    digest = checkpoint.hashlib.sha256(blob).hexdigest()
    described = {"format": checkpoint.FORMAT, "state_sha256": digest, **config}
    path.mkdir(exist_ok=True)
    checkpoint._write_file(path / checkpoint.STATE, blob)
    checkpoint._write_file(path / checkpoint.CONFIG, checkpoint.json.dumps(described).encode())


def die_at(n):
    moments = itertools.count()

    def die_if_due():
        if next(moments) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(function):
        def wrapper(*args, **kwargs):
            die_if_due()
            return function(*args, **kwargs)
        return wrapper

    def write_file(path, content):
        die_if_due()
        path.write_bytes(content[: len(content) // 2])
        die_if_due()
        whole(path, content)

    whole, checkpoint._write_file = checkpoint._write_file, write_file
    for owner, name in ((os, "fsync"), (shutil, "rmtree"), (Path, "rename"), (Path, "mkdir")):
        setattr(owner, name, deadly(getattr(owner, name)))


for case, write in (("replaced", checkpoint.write), ("first", checkpoint.write), ("in place", write_in_place)):
    for n in itertools.count():
        path = Path(sys.argv[1]) / case / f"{n:02}" / "checkpoint"
        path.parent.mkdir(parents=True)
        if case != "first":
            checkpoint.write(path, *version(1))
        child = os.fork()
        if child == 0:
            die_at(n)
            write(path, *version(2))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
"""

MISSING, DAMAGED = "missing", "damaged"


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder per case, in it one per moment of death, in it what the killed writer of version 2 left behind."""
    root = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, "-c", KILLED_WRITERS, str(root)], check=True)
    return root


def found_in(case: Path) -> dict[Path, int | str]:
    found: dict[Path, int | str] = {}
    for folder in sorted(case.iterdir()):
        path = folder / "checkpoint"
        try:
            found[path] = version_at(path)
        except CheckpointError as error:
            found[path] = DAMAGED if "damaged" in str(error) else MISSING
    return found


@pytest.mark.parametrize(("case", "before"), [("replaced", 1), ("first", MISSING)])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(killed, case, before) -> None:
    found = found_in(killed / case)
    outcomes = list(found.values())
    n_before = outcomes.count(before)
    assert n_before >= 10  # the moments of death were really tried
    assert outcomes == [before] * n_before + [2] * (len(outcomes) - n_before)
    assert len(outcomes) - n_before >= 2  # killed after the swap, and not killed
    for path, outcome in found.items():
        assert checkpoint.exists(path) == (outcome != MISSING)
        checkpoint.write(path, *version(3))  # whatever was left behind, the next write works and cleans up
        assert version_at(path) == 3
        assert os.listdir(path.parent) == ["checkpoint"]


def test_a_writer_without_the_swap_is_caught_by_the_same_kills(killed) -> None:
    assert DAMAGED in found_in(killed / "in place").values()


def test_between_the_two_renames_reading_changes_nothing(tmp_path) -> None:
    """So that a reader never takes the place that a writer is about to fill."""
    path = checkpoint.write(tmp_path / "checkpoint", *version(1))
    path.rename(tmp_path / ".checkpoint.old")
    assert checkpoint.exists(path)
    assert version_at(path) == 1
    assert os.listdir(tmp_path) == [".checkpoint.old"]


# -- A disk that refuses


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Let the operating system refuse files longer than this: a real failing write, part of it already on disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_refused_write_keeps_the_previous_checkpoint(tmp_path) -> None:
    path = checkpoint.write(tmp_path / "checkpoint", *version(1))
    large = {"a": torch.zeros(100_000)}
    with file_size_limit(50_000), pytest.raises(CheckpointError, match=r"Could not write .*\(File too large\)"):
        checkpoint.write(path, {"version": 2}, large)
    assert version_at(path) == 1
    assert os.listdir(tmp_path) == ["checkpoint"]
    checkpoint.write(path, {"version": 2}, large)  # control: without the limit it fits


@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "rename to old", "rename to new"])
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, call) -> None:
    path = checkpoint.write(tmp_path / "checkpoint", *version(1))
    renames = iter(["rename to old", "rename to new"])
    rename = Path.rename

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rename_until_full(source: Path, target: Path) -> Path:
        return full() if next(renames) == call else rename(source, target)

    with monkeypatch.context() as patch:
        if call in ("mkdir", "open"):
            patch.setattr(Path, call, full)
        elif call == "fsync":
            patch.setattr(os, call, full)
        else:
            patch.setattr(Path, "rename", rename_until_full)
        with pytest.raises(CheckpointError, match=r"\(No space left on device\).*earlier .* untouched"):
            checkpoint.write(path, *version(2))
    assert version_at(path) == 1
    checkpoint.write(path, *version(2))
    assert version_at(path) == 2
    assert os.listdir(tmp_path) == ["checkpoint"]


# -- Damage and misuse


def test_the_current_folder_may_be_a_checkpoint(tmp_path, monkeypatch) -> None:
    checkpoint.write(tmp_path / "agent", {"a": 1}, {"t": torch.ones(2)})
    monkeypatch.chdir(tmp_path / "agent")
    assert checkpoint.exists(".")
    assert checkpoint.read(".")[0]["a"] == 1
    assert not checkpoint.exists("..")


def test_a_missing_checkpoint_is_named(tmp_path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match=r"No checkpoint at .*: it has no config\.json"):
            checkpoint.read(path)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("state.safetensors", lambda b: b[:-1], r"state\.safetensors \(\d+ bytes\) is .* altered"),
        ("state.safetensors", lambda b: b"", r"\(0 bytes\) is .* altered"),
        ("state.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), r"is .* altered"),
        ("state.safetensors", None, "is damaged"),
        ("config.json", lambda b: b[: len(b) // 2], "is damaged"),
        ("config.json", lambda b: b"", "is damaged"),
        ("config.json", lambda b: b"\xff\xfe\x00", "is damaged"),
        ("config.json", lambda b: b"[1, 2]", "has format None; this version reads format 1"),
        ("config.json", lambda b: b.replace(b'"format": 1', b'"format": 99'), "has format 99; this version"),
    ],
)
def test_damage_is_found_and_named(tmp_path, file, damage, message) -> None:
    path = checkpoint.write(tmp_path / "checkpoint", *version(1))
    target = path / file
    if damage is None:
        target.unlink()
    else:
        target.write_bytes(damage(target.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(path)


def test_a_state_that_is_no_safetensors_is_named(tmp_path) -> None:
    """Even if whoever altered it also made the digest fit."""
    path = checkpoint.write(tmp_path / "checkpoint", *version(1))
    forged = pickle.dumps("not tensors")
    (path / "state.safetensors").write_bytes(forged)
    config = json.loads((path / "config.json").read_text())
    config["state_sha256"] = checkpoint.hashlib.sha256(forged).hexdigest()
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read(path)


@pytest.mark.parametrize("kind", ["file", "folder", "folder with a config.json of its own"])
def test_what_is_no_checkpoint_is_not_overwritten(tmp_path, kind) -> None:
    path = tmp_path / "mine"
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
        (path / "thesis.tex").write_text("precious")
        if kind != "folder":
            (path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"mine exists and is not a checkpoint.*choose another path"):
        checkpoint.write(path, *version(1))
    assert (path if kind == "file" else path / "thesis.tex").read_text() == "precious"


def test_an_empty_folder_may_become_a_checkpoint(tmp_path) -> None:
    checkpoint.write(tmp_path, *version(1))
    assert version_at(tmp_path) == 1
