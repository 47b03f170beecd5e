"""Downloads that survive a cut connection, and D4RL's files in D4RL's own cache folder."""

import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import Self

import h5py
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from .d4rl import BASE_ADDRESS, cache_folder, d4rl_entry
from .errors import DataError

D4RL_ADDRESS_VARIABLE = "COROLLARY_D4RL_URL"
"""Environment variable with the address of a mirror of D4RL's files."""

_CHUNK = 1 << 18  # bytes
_TRIES = 5
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that another try may change


def download(
    address: str,
    path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    progress: bool | None = None,
    timeout: float = 30.0,
    retry_wait: float = 1.0,
) -> Path:
    """Fetch `address` into the file `path` and return it.

    The body goes to ``<path>.part``, is checked, and is then renamed, so `path` is never half a file. A
    download that was cut, by the network or by a kill, continues where it stopped, in this call or in a
    later one, provided the server can say that its file is still the same (a strong ETag or a modification
    date, kept in ``<path>.part.json``) or `sha256` will show it. Otherwise, and where the server ignores
    ranges, it starts again from the first byte. A cut connection, a timeout or an overloaded server is tried
    again; after 5 tries in a row that brought no byte the call gives up, and the partial file stays for the
    next call. An existing `path` is not fetched again.

    Args:
        address: an http or https address.
        path: the file to write; missing parent folders are made.
        sha256: expected digest in hex. A body (or existing file) with another digest is an error; the body is
            removed, since continuing it could not mend it.
        progress: show a progress bar; None shows it when standard error is a terminal.
        timeout: seconds of silence after which a connection counts as cut.
        retry_wait: seconds before the second try; doubled each time.

    Raises:
        DataError: another scheme; an address that the server does not have (404) or refuses; a server that
            stays out of reach; a wrong checksum, with both digests.
        OSError: the file cannot be written (a full disk; the partial file stays).
    """
    path = Path(path)
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise DataError(f"cannot download {address!r}: only http and https addresses are supported")
    if path.exists():
        if sha256 is not None and (found := file_sha256(path)) != sha256.lower():
            raise DataError(f"{path} has SHA-256 {found}, expected {sha256.lower()}: delete it to download it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _Partial(path)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not (sys.stderr.isatty() if progress is None else progress),
    )
    with bar:
        task = bar.add_task(path.name, total=None)
        failures = 0
        while True:
            received = part.size()
            try:
                for done, total in _fetch(address, part, timeout, unidentified=sha256 is not None):
                    bar.update(task, completed=done, total=total)
                break
            except _CutError as cut:
                failures = 1 if part.size() > received else failures + 1
                if failures == _TRIES:
                    raise DataError(
                        f"cannot download {address}: {cut}, {_TRIES} times in a row; call again to continue"
                    ) from cut
            time.sleep(retry_wait * 2 ** (failures - 1))
    if sha256 is not None and (found := file_sha256(part.path)) != sha256.lower():
        part.discard()
        raise DataError(
            f"{address} has SHA-256 {found}, expected {sha256.lower()}: what was downloaded is removed, "
            "and the server does not hold the file asked for"
        )
    os.replace(part.path, path)
    part.discard()
    return path


def get_d4rl(
    name: str,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    base_address: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Fetch the file of a D4RL dataset into D4RL's cache folder, if it is not there, and return its path.

    D4RL published no checksums. The first call that sees the file writes its SHA-256 beside it, to
    ``<file>.sha256`` (the format of ``sha256sum``); later calls verify the file against it, and a file
    fetched again must have the same digest. So a later change or a damaged disk is noticed, a wrong first
    download only as far as it is not HDF5.

    Args:
        name: a D4RL name such as ``hopper-medium-v2``.
        cache_dir: the folder; by default ``$D4RL_DATASET_DIR``, else ``~/.d4rl/datasets``.
        base_address: address of a mirror with D4RL's folders below it; by default ``$COROLLARY_D4RL_URL``,
            else D4RL's own server.
        progress: as in `download`.

    Raises:
        DataError: an unknown name, whatever `download` raises, a body that is not HDF5, or a file that
            differs from its recorded digest.
    """
    entry = d4rl_entry(name)
    path = (cache_folder() if cache_dir is None else Path(cache_dir)) / entry.file_name
    if not path.exists():
        base = base_address or os.environ.get(D4RL_ADDRESS_VARIABLE) or BASE_ADDRESS
        address = f"{base.rstrip('/')}/{entry.address}"
        download(address, path, sha256=recorded_sha256(path), progress=progress)
        if not h5py.is_hdf5(path):
            path.unlink()
            raise DataError(f"{address} is not an HDF5 file (a server's error page?); it is removed")
    recorded, found = recorded_sha256(path), file_sha256(path)
    if recorded is None:
        _sidecar(path).write_text(f"{found}  {path.name}\n")
    elif recorded != found:
        raise DataError(
            f"{path} has SHA-256 {found}, but {_sidecar(path).name} recorded {recorded} at first sight: "
            "delete the file to download it again, or the record to accept it"
        )
    return path


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded_sha256(path: str | os.PathLike[str]) -> str | None:
    """Return the digest that ``<path>.sha256`` records, None where there is no such file.

    Raises:
        DataError: the record is not a SHA-256.
    """
    sidecar = _sidecar(Path(path))
    if not sidecar.exists():
        return None
    digest = sidecar.read_text().partition(" ")[0].strip().lower()
    if re.fullmatch("[0-9a-f]{64}", digest) is None:
        raise DataError(f"{sidecar} does not begin with a SHA-256 in hex: delete it to record the digest again")
    return digest


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


# ------------------------------------------------------------------------------------------------------------
# One request
# ------------------------------------------------------------------------------------------------------------


class _CutError(Exception):
    """The transfer stopped early for a reason that may pass."""


@dataclass(frozen=True)
class _Identity:
    """Which version of which file a partial body belongs to, as the server described it."""

    address: str
    etag: str | None
    last_modified: str | None
    length: int | None  # bytes of the whole body

    @classmethod
    def of(cls, address: str, headers: Message, length: int | None) -> Self:
        etag = headers.get("ETag")
        # A weak ETag promises an equivalent body, not the same bytes, so it cannot vouch for a continuation.
        strong = etag if etag and not etag.startswith("W/") else None
        return cls(address, strong, headers.get("Last-Modified"), length)

    @property
    def validator(self) -> str | None:
        return self.etag or self.last_modified


class _Partial:
    """The partial file ``<path>.part`` and what ``<path>.part.json`` says about it."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + ".part")
        self._record = path.with_name(path.name + ".part.json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def identity(self, address: str) -> _Identity:
        """Return what is recorded for `address`; without a sound record of it, nothing is known."""
        try:
            recorded = _Identity(**json.loads(self._record.read_text()))
        except (OSError, ValueError, TypeError):
            recorded = None
        return recorded if recorded and recorded.address == address else _Identity(address, None, None, None)

    def restart(self, identity: _Identity) -> None:
        """Empty the file; the record is written first, so it never describes another body's bytes."""
        self.path.unlink(missing_ok=True)
        self._record.write_text(json.dumps(asdict(identity)))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)


def _fetch(address: str, part: _Partial, timeout: float, *, unidentified: bool) -> Iterator[tuple[int, int | None]]:
    """Append to `part` what is missing, yielding (bytes so far, bytes in all or None).

    Args:
        address: where from.
        part: what there is; emptied when it cannot be continued.
        timeout: seconds of silence.
        unidentified: continue a body that the server cannot identify.

    Raises:
        DataError: a refusal that another try would not change.
        _CutError: anything that it might.
    """
    known, offset = part.identity(address), part.size()
    if offset and offset == known.length:
        return
    headers = {}
    if offset and (known.validator or unidentified):
        headers["Range"] = f"bytes={offset}-"
        if known.validator:
            headers["If-Range"] = known.validator
    try:
        response = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and headers:  # the server's file is no longer than ours: not the same file
            part.discard()
            yield from _fetch(address, part, timeout, unidentified=unidentified)
            return
        if error.code in _PASSING:
            raise _CutError(f"the server answered {error.code} {error.reason}") from error
        raise DataError(f"cannot download {address}: the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(f"no connection ({getattr(error, 'reason', None) or error})") from error
    with response:
        if response.status == 206:
            if not _continues(response.headers, known, offset):
                part.discard()
                yield from _fetch(address, part, timeout, unidentified=unidentified)
                return
            total = _total(response.headers)
        else:
            offset, length = 0, response.headers.get("Content-Length")
            total = None if length is None else int(length)
            part.restart(_Identity.of(address, response.headers, total))
        with part.path.open("ab") as file:
            while chunk := _read(response):
                file.write(chunk)
                offset += len(chunk)
                yield offset, total
    if total is not None and offset < total:
        raise _CutError(f"the connection was cut after {offset} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(f"the connection was cut ({error or type(error).__name__})") from error


def _continues(headers: Message, known: _Identity, offset: int) -> bool:
    """Say whether a partial answer (206) begins at `offset` of the file that `known` describes."""
    total = _total(headers)
    answer = _Identity.of(known.address, headers, total)
    return (
        headers.get("Content-Range", "").startswith(f"bytes {offset}-")
        and (known.length is None or total == known.length)
        and (known.etag is None or answer.etag in (None, known.etag))
    )


def _total(headers: Message) -> int | None:
    """Return the whole file's length from ``Content-Range: bytes first-last/length``; None for ``*``."""
    length = headers.get("Content-Range", "").rpartition("/")[2]
    return int(length) if length.isdigit() else None
