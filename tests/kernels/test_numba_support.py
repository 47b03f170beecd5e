"""Numba as it is: installed and working, absent, or refusing this NumPy."""

import importlib
from types import ModuleType

import pytest

from corollary.kernels import numba_support


@pytest.fixture(autouse=True)
def _ask_again():
    numba_support.has_numba.cache_clear()
    yield
    numba_support.has_numba.cache_clear()


def test_numba_of_the_test_environment_works() -> None:
    assert numba_support.has_numba()


def test_absent(monkeypatch) -> None:
    monkeypatch.setattr(numba_support, "find_spec", lambda name: None)
    assert not numba_support.has_numba()


def test_one_that_refuses_this_numpy_is_named_and_not_used(monkeypatch) -> None:
    def refuse(name: str) -> ModuleType:
        raise ImportError("Numba needs NumPy 2.0 or less")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.warns(UserWarning, match=r"Numba is installed but cannot be used \(Numba needs NumPy 2\.0 or less\)"):
        assert not numba_support.has_numba()
