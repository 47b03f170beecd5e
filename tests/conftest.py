"""What every test runs under: the same random examples in every run, and figures without a display."""

import os

from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")  # read when matplotlib is first imported, which is after this file

# No deadline: the first call of a kernel compiles or loads something.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
