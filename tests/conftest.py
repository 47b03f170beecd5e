"""What every test runs under: the same random numbers in every run, figures without a display, a cache of its own."""

import os

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")  # read when matplotlib is first imported, which is after this file

# No deadline: the first call of a kernel compiles or loads something.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def one_global_stream():
    """Show tests that draw from PyTorch's global stream, themselves or in a peer, the same numbers in any order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """Keep what the library caches out of the user's folders (child processes inherit the variable)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COROLLARY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
