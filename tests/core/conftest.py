"""What several tests of the shared machinery need: a small real dataset."""

import pytest

from corollary.core.collect import collect
from corollary.core.dataset import Dataset


@pytest.fixture(scope="session")
def pendulum() -> Dataset:
    """600 random steps of Pendulum, whose action box is -2..2 and whose episodes end by their time limit."""
    return collect("Pendulum-v1", n_steps=600, seed=0, progress=False)
