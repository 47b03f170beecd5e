"""Every check of the library passes on its fast set, and every one of its mutants is caught."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import corollary
from corollary.core.agent import algorithms
from corollary.theory_checks import check as checks
from corollary.theory_checks.run import numbered, run_check

ROOT = Path(corollary.__file__).parent
ALL = checks.all_checks()


@pytest.mark.theory
@pytest.mark.parametrize(("check", "number"), [pytest.param(*pair, id=pair[0].id) for pair in numbered(ALL.values())])
def test_the_claim_holds_and_every_mutant_is_caught(check, number) -> None:
    result = run_check(check, number=number)
    missed = [killed.what for killed in result.mutants if not killed.caught]
    assert not missed, f"not caught: {missed}"
    assert result.passed, (result.verdict, result.note, [p for p in result.points if not p.holds][:3])


def test_ids_are_well_formed_and_sources_given() -> None:
    for name, check in ALL.items():
        assert re.fullmatch(r"[A-Z]+\d*-\d+[a-z]?\d?", name), name
        assert check.source
        assert check.claim
        assert check.tags


def test_tags_that_look_like_algorithms_are_algorithms() -> None:
    known = algorithms()
    for check in ALL.values():
        for tag in check.tags:
            assert "." not in tag or tag in known, (check.id, tag)


def test_the_example_of_the_guide_runs() -> None:
    guide = (ROOT / "docs" / "add_a_check.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(example.splitlines()) <= 40
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PASS"), done.stdout  # which it is only where the mutant was caught


def test_every_class_lists_its_checks() -> None:
    for name, kind in algorithms().items():
        assert list(kind.claims) == [check.id for check in ALL.values() if name in check.tags], name
