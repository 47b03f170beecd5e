"""Files that are replaced whole: a failure at any point, or a kill, leaves the old content."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from corollary.core.files import replacing


@pytest.mark.parametrize("before", [None, "old"])
def test_the_new_file_takes_the_place_of_the_old(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)
    with replacing(path) as unfinished:
        assert unfinished.parent == tmp_path  # a move between file systems would not be atomic
        unfinished.write_text("new")
        assert (path.read_text() if path.exists() else None) == before
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("fails", ["before writing", "while writing", "interrupt", "open", "fsync", "replace", None])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failure_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str | None, before: str | None
) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write() -> None:
        with replacing(path) as unfinished:
            if fails == "before writing":
                full()
            unfinished.write_text("new")
            if fails == "while writing":
                full()
            if fails == "interrupt":
                raise KeyboardInterrupt
            if fails in ("open", "fsync", "replace"):
                monkeypatch.setattr(os, fails, full)

    if fails is None:  # the control: the same write without a fault
        write()
        assert path.read_text() == "new"
        return
    with pytest.raises(KeyboardInterrupt if fails == "interrupt" else OSError):
        write()
    monkeypatch.undo()
    assert (path.read_text() if path.exists() else None) == before
    assert os.listdir(tmp_path) == ([] if before is None else ["file.txt"])


def test_a_body_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file.txt"):
        pass
    assert (tmp_path / "file.txt").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from corollary.core.files import replacing

with replacing(Path(sys.argv[1])) as unfinished:
    unfinished.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, path], check=False).returncode == -9
    assert path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2  # what was unfinished is still there; the next write is not disturbed by it
    with replacing(path) as unfinished:
        unfinished.write_text("new")
    assert path.read_text() == "new"


def test_what_takes_the_place_is_flushed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("fsync", "replace"):
        whole = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, whole=whole: (calls.append(name), whole(*a))[1])
    with replacing(tmp_path / "file.txt") as unfinished:
        unfinished.write_text("new")
    assert calls == ["fsync", "replace"]
