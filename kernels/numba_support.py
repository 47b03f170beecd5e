"""Whether kernels compiled by Numba can be used here."""

import importlib
import warnings
from functools import cache
from importlib.util import find_spec


@cache
def has_numba() -> bool:
    """Whether Numba is installed and can be imported: each of its versions refuses NumPys that are too new for it."""
    if find_spec("numba") is None:
        return False
    try:
        importlib.import_module("numba")
    except ImportError as error:
        warnings.warn(f"Numba is installed but cannot be used ({error}): slower code runs instead.", stacklevel=2)
        return False
    return True
