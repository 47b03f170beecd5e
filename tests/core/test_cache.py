"""The folder for results that can be computed again."""

from pathlib import Path

from corollary.core.cache import computed_folder


def test_the_folder_is_chosen_by_the_first_variable_that_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("COROLLARY_CACHE", str(tmp_path / "own"))
    assert computed_folder("neighbours") == tmp_path / "own" / "neighbours"
    monkeypatch.delenv("COROLLARY_CACHE")
    assert computed_folder("neighbours") == tmp_path / "xdg" / "corollary" / "neighbours"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert computed_folder("neighbours") == Path.home() / ".cache" / "corollary" / "neighbours"
    assert not (tmp_path / "own").exists()  # nothing is made by asking
