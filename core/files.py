"""Files that are replaced whole: whoever opens one, at whatever moment, finds the old content or the new."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file that the body writes there then takes the place of `path`.

    The new file is flushed to disk before it is moved. If the body, the flush or the move fails, or is interrupted,
    the temporary file is removed, the error goes on, and `path` is as it was. A kill may leave the temporary file,
    ``.<name>.<process>.tmp``, behind.
    """
    path = path.absolute()  # "." has no name
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Wait until the disk holds what was written to a file, or which names a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
