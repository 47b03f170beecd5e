"""Where the library keeps what it can compute again: ``$COROLLARY_CACHE``, else ``corollary`` in the user's cache."""

import os
from pathlib import Path


def computed_folder(kind: str) -> Path:
    """Return the folder for results of one kind, for instance ``"neighbours"``; it need not exist.

    ``$COROLLARY_CACHE/kind`` where that variable is set, else ``corollary/kind`` below ``$XDG_CACHE_HOME`` or
    ``~/.cache``. Deleting it loses time, never results.
    """
    chosen = os.environ.get("COROLLARY_CACHE")
    if chosen:
        return Path(chosen) / kind
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "corollary" / kind
