"""Downloads against a local server whose every answer the test decides."""

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from corollary.core import download as module
from corollary.core.download import D4RL_ADDRESS_VARIABLE, download, get_d4rl
from corollary.core.errors import DataError

BODY = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


@dataclass
class Script:
    """What the server holds and how it misbehaves; `cuts` and `statuses` are used up, one per request."""

    files: dict[str, bytes]
    etag: str | None = '"one"'
    last_modified: str | None = None
    ranges: bool = True
    honours_if_range: bool = True
    send_length: bool = True
    content_range: str | None = None  # a wrong one to send
    cuts: list[int | None] = field(default_factory=list)  # bytes of body after which the connection closes
    statuses: list[int] = field(default_factory=list)
    requests: list[dict[str, str | None]] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    script: Script

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        script = self.script
        wanted, validator = self.headers.get("Range"), self.headers.get("If-Range")
        script.requests.append({"range": wanted, "if_range": validator, "path": self.path})
        status = script.statuses.pop(0) if script.statuses else 200
        body = script.files.get(self.path)
        if body is None or status != 200:
            self.send_error(404 if body is None else status)
            return
        start = 0
        matches = not script.honours_if_range or validator in (None, script.etag, script.last_modified)
        if wanted and script.ranges and matches:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.end_headers()
                return
            self.send_response(206)
            good = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.send_header("Content-Range", script.content_range or good)
        else:
            self.send_response(200)
        if script.etag:
            self.send_header("ETag", script.etag)
        if script.last_modified:
            self.send_header("Last-Modified", script.last_modified)
        if script.send_length:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = script.cuts.pop(0) if script.cuts else None
        self.wfile.write(body[start:] if cut is None else body[start : start + cut])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    script = Script({"/file": BODY})
    handler = type("Bound", (Handler,), {"script": script})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        script.url = f"http://127.0.0.1:{running.server_port}"
        yield script
        running.shutdown()
        thread.join()


def fetch(server: Script, path: Path, **options: Any) -> Path:
    return download(f"{server.url}/file", path, progress=False, timeout=5.0, retry_wait=0.0, **options)


def leave_part(server: Script, path: Path, size: int = 100_000) -> None:
    """Leave behind what a download killed after `size` bytes leaves."""
    path.with_name(path.name + ".part").write_bytes(BODY[:size])
    identity = {
        "address": f"{server.url}/file",
        "etag": server.etag,
        "last_modified": server.last_modified,
        "length": len(BODY),
    }
    path.with_name(path.name + ".part.json").write_text(json.dumps(identity))


def test_whole_file_arrives_and_nothing_else_stays(server: Script, tmp_path: Path) -> None:
    path = fetch(server, tmp_path / "new folder" / "file.bin", sha256=SHA.upper())
    assert path.read_bytes() == BODY
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]
    assert [request["range"] for request in server.requests] == [None]


def test_body_cut_in_the_middle_continues_in_the_same_call(server: Script, tmp_path: Path) -> None:
    server.cuts = [120_000, 50_000]
    path = fetch(server, tmp_path / "file.bin", sha256=SHA)
    assert path.read_bytes() == BODY
    assert [request["range"] for request in server.requests] == [None, "bytes=120000-", "bytes=170000-"]
    assert server.requests[1]["if_range"] == '"one"'


def test_later_call_continues_a_part_left_by_a_kill(server: Script, tmp_path: Path) -> None:
    leave_part(server, tmp_path / "file.bin")
    assert fetch(server, tmp_path / "file.bin").read_bytes() == BODY
    assert server.requests == [{"range": "bytes=100000-", "if_range": '"one"', "path": "/file"}]


def test_part_that_was_complete_needs_no_request(server: Script, tmp_path: Path) -> None:
    leave_part(server, tmp_path / "file.bin", len(BODY))
    assert fetch(server, tmp_path / "file.bin", sha256=SHA).read_bytes() == BODY
    assert not server.requests


@pytest.mark.parametrize("honours_if_range", [True, False])
@pytest.mark.parametrize("change", ["etag", "length"])
def test_file_that_changed_meanwhile_starts_again(
    server: Script, tmp_path: Path, honours_if_range: bool, change: str
) -> None:
    leave_part(server, tmp_path / "file.bin")
    new = BODY[::-1] if change == "etag" else BODY[::-1] + b"more"
    server.files["/file"], server.etag, server.honours_if_range = new, '"two"', honours_if_range
    if change == "length" and not honours_if_range:
        server.etag = None  # nothing but the length tells
    assert fetch(server, tmp_path / "file.bin").read_bytes() == new


def test_mixture_of_two_files_is_what_the_identity_check_prevents(
    server: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_continues", lambda *_: True)
    leave_part(server, tmp_path / "file.bin")
    server.files["/file"], server.etag, server.honours_if_range = BODY[::-1], '"two"', False
    assert fetch(server, tmp_path / "file.bin").read_bytes() == BODY[:100_000] + BODY[::-1][100_000:]


def test_answer_that_begins_elsewhere_is_not_appended(server: Script, tmp_path: Path) -> None:
    leave_part(server, tmp_path / "file.bin")
    server.content_range = f"bytes 99999-{len(BODY) - 1}/{len(BODY)}"
    assert fetch(server, tmp_path / "file.bin").read_bytes() == BODY
    assert [request["range"] for request in server.requests] == ["bytes=100000-", None]


def test_server_without_ranges_sends_everything_again(server: Script, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [120_000]
    assert fetch(server, tmp_path / "file.bin", sha256=SHA).read_bytes() == BODY
    assert len(server.requests) == 2


def test_part_longer_than_the_file_starts_again(server: Script, tmp_path: Path) -> None:
    leave_part(server, tmp_path / "file.bin")
    server.files["/file"], server.honours_if_range = BODY[:50_000], False
    assert fetch(server, tmp_path / "file.bin").read_bytes() == BODY[:50_000]
    assert [request["range"] for request in server.requests] == ["bytes=100000-", None]


@pytest.mark.parametrize(
    ("etag", "sha256", "resumes"), [(None, None, False), (None, SHA, True), ('W/"one"', None, False)]
)
def test_unidentified_part_is_continued_only_under_a_checksum(
    server: Script, tmp_path: Path, etag: str | None, sha256: str | None, resumes: bool
) -> None:
    server.etag = etag
    server.cuts = [120_000]
    assert fetch(server, tmp_path / "file.bin", sha256=sha256).read_bytes() == BODY
    assert server.requests[1]["range"] == ("bytes=120000-" if resumes else None)
    assert server.requests[1]["if_range"] is None


def test_modification_date_identifies_a_file_too(server: Script, tmp_path: Path) -> None:
    server.etag, server.last_modified = None, "Tue, 01 Feb 2022 00:00:00 GMT"
    server.cuts = [120_000]
    assert fetch(server, tmp_path / "file.bin").read_bytes() == BODY
    assert server.requests[1] == {
        "range": "bytes=120000-",
        "if_range": server.last_modified,
        "path": "/file",
    }


def test_record_of_another_address_is_ignored(server: Script, tmp_path: Path) -> None:
    leave_part(server, tmp_path / "file.bin")
    record = tmp_path / "file.bin.part.json"
    record.write_text(record.read_text().replace("/file", "/other"))
    assert fetch(server, tmp_path / "file.bin").read_bytes() == BODY
    assert server.requests[0]["range"] is None


def test_wrong_checksum_removes_the_download_and_names_both(server: Script, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{SHA}, expected {'0' * 64}"):
        fetch(server, tmp_path / "file.bin", sha256="0" * 64)
    assert not list(tmp_path.iterdir())


def test_existing_file_is_kept_and_verified(server: Script, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"mine")
    assert fetch(server, path).read_bytes() == b"mine"
    with pytest.raises(DataError, match="delete it to download it again"):
        fetch(server, path, sha256=SHA)
    assert not server.requests


def test_missing_address_fails_at_once(server: Script, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/nowhere: the server answered 404"):
        download(f"{server.url}/nowhere", tmp_path / "x", progress=False, retry_wait=0.0)
    assert len(server.requests) == 1
    assert not list(tmp_path.iterdir())


def test_passing_trouble_is_tried_again(server: Script, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    assert fetch(server, tmp_path / "file.bin").read_bytes() == BODY
    assert len(server.requests) == 3


def test_gives_up_after_five_tries_and_keeps_the_part(server: Script, tmp_path: Path) -> None:
    server.cuts = [10_000, 0, 0, 0, 0, 0, 0]
    with pytest.raises(DataError, match=r"cut after 10000 of 300000 bytes, 5 times in a row; call again"):
        fetch(server, tmp_path / "file.bin")
    assert len(server.requests) == 5
    assert (tmp_path / "file.bin.part").read_bytes() == BODY[:10_000]
    server.cuts = []
    assert fetch(server, tmp_path / "file.bin").read_bytes() == BODY
    assert server.requests[-1]["range"] == "bytes=10000-"


def test_waits_between_tries_double(server: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    server.statuses = [503] * 5
    with pytest.raises(DataError, match="503"):
        download(f"{server.url}/file", tmp_path / "x", progress=False, retry_wait=1.0)
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_unreachable_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        address = f"http://127.0.0.1:{closed.server_port}/file"
    with pytest.raises(DataError, match=f"{address}: no connection"):
        download(address, tmp_path / "x", progress=False, retry_wait=0.0)


def test_full_disk_is_not_taken_for_a_network_error(
    server: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.RawIOBase):
        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a, **k: Full() if p.suffix == ".part" else real(p, *a, **k))
    with pytest.raises(OSError, match="No space left"):
        fetch(server, tmp_path / "file.bin")
    assert len(server.requests) == 1


def test_length_unknown_in_advance(server: Script, tmp_path: Path) -> None:
    server.send_length = False
    assert fetch(server, tmp_path / "file.bin", sha256=SHA).read_bytes() == BODY


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://host/x", "hopper-medium-v2"])
def test_other_schemes_are_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only http and https"):
        download(address, tmp_path / "x")


# ------------------------------------------------------------------------------------------------------------
# D4RL
# ------------------------------------------------------------------------------------------------------------

NAME = "hopper-medium-v2"
FILE_NAME = "hopper_medium-v2.hdf5"


@pytest.fixture
def mirror(server: Script, monkeypatch: pytest.MonkeyPatch) -> Script:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["rewards"] = np.arange(3.0)
    server.files["/mirror/gym_mujoco_v2/hopper_medium-v2.hdf5"] = buffer.getvalue()
    monkeypatch.setenv(D4RL_ADDRESS_VARIABLE, f"{server.url}/mirror")
    return server


def test_d4rl_file_lands_in_the_cache_with_its_digest(mirror: Script, tmp_path: Path) -> None:
    path = get_d4rl(NAME, tmp_path, progress=False)
    assert path == tmp_path / FILE_NAME
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / f"{FILE_NAME}.sha256").read_text() == f"{digest}  {FILE_NAME}\n"
    assert get_d4rl(NAME, tmp_path, progress=False) == path
    assert len(mirror.requests) == 1


def test_d4rl_cache_folder_and_base_address_have_defaults_and_overrides(
    mirror: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(D4RL_ADDRESS_VARIABLE, "http://127.0.0.1:1/unused")
    path = get_d4rl(NAME, base_address=f"{mirror.url}/mirror/", progress=False)
    assert path == tmp_path / "cache" / FILE_NAME


def test_altered_d4rl_file_is_noticed(mirror: Script, tmp_path: Path) -> None:
    path = get_d4rl(NAME, tmp_path, progress=False)
    with h5py.File(path, "a") as file:
        file["rewards"][0] = 7.0
    with pytest.raises(DataError, match=r"recorded .* at first sight"):
        get_d4rl(NAME, tmp_path, progress=False)


def test_d4rl_file_fetched_again_must_have_the_recorded_digest(mirror: Script, tmp_path: Path) -> None:
    path = get_d4rl(NAME, tmp_path, progress=False)
    path.unlink()
    key = "/mirror/gym_mujoco_v2/hopper_medium-v2.hdf5"
    mirror.files[key] += b"changed"
    with pytest.raises(DataError, match="the server does not hold the file asked for"):
        get_d4rl(NAME, tmp_path, progress=False)
    (tmp_path / f"{FILE_NAME}.sha256").unlink()
    assert get_d4rl(NAME, tmp_path, progress=False).exists()


def test_error_page_in_place_of_a_d4rl_file_is_removed(mirror: Script, tmp_path: Path) -> None:
    mirror.files["/mirror/gym_mujoco_v2/hopper_medium-v2.hdf5"] = b"<html>moved</html>"
    with pytest.raises(DataError, match="not an HDF5 file"):
        get_d4rl(NAME, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_damaged_digest_record_is_named(mirror: Script, tmp_path: Path) -> None:
    get_d4rl(NAME, tmp_path, progress=False)
    (tmp_path / f"{FILE_NAME}.sha256").write_text("oops")
    with pytest.raises(DataError, match=r"sha256 does not begin with a SHA-256"):
        get_d4rl(NAME, tmp_path, progress=False)


def test_unknown_d4rl_name_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match="Did you mean 'hopper-medium-v2'"):
        get_d4rl("hoper-medium-v2")
