"""What every test runs under: the same random examples in every run, figures without a display, a cache of its own."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")  # read when matplotlib is first imported, which is after this file

# No deadline: the first call of a kernel compiles or loads something.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """Keep what the library caches out of the user's folders (child processes inherit the variable)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COROLLARY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
