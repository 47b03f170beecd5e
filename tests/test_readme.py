"""The README: its examples run, and its table of algorithms says what the tests say."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import corollary
from corollary.core.agent import algorithms
from corollary.theory_checks.check import all_checks

ROOT = Path(corollary.__file__).parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# The ladder of tests that an algorithm climbs; its status is the word of the highest rung below which none is missing.
STATUS = ("planned", "pieces tested", "learns", "exact twin", "contract", "verified", "claims checked", "reproduced")


def rungs_of_algorithms() -> dict[str, set[int]]:
    """Which rungs each algorithm stands on, by the marks of tests.

    ``rung(n, "offline.x", ...)`` names algorithms, ``rung(n)`` stands for all of the room that the folder mirrors.
    """
    rungs: dict[str, set[int]] = defaultdict(set)
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.rung":
                number, *names = (ast.literal_eval(argument) for argument in node.args)
                for name in names or algorithms(path.parent.name):
                    rungs[name].add(number)
    for name, ids in claims_of_algorithms().items():
        if ids:  # tests/theory_checks/test_catalogue.py runs every check, with its mutants
            rungs[name].add(6)
    return rungs


def claims_of_algorithms() -> dict[str, list[str]]:
    """The theory checks that name an algorithm."""
    return {name: [c.id for c in all_checks().values() if name in c.tags] for name in algorithms()}


def table() -> str:
    rungs, claims = rungs_of_algorithms(), claims_of_algorithms()
    lines = ["| algorithm | class | source | status | theory checks |", "|---|---|---|---|---|"]
    for name, kind in algorithms().items():
        module = sys.modules[kind.__module__]
        title, _, _ = (module.__doc__ or "").partition("\n")
        source = re.search(r"arXiv\s+(\d{4}\.\d{5})", module.__doc__ or "")
        link = f"[arXiv {source[1]}](https://arxiv.org/abs/{source[1]})" if source else ""
        height = 0
        while height + 1 in rungs[name]:
            height += 1
        room, _, file = name.partition(".")
        lines.append(
            f"| [{title.rstrip('.')}]({room}/{file}.py) | `corollary.{room}.{kind.__name__}` | {link} "
            f"| {STATUS[height]} (rung {height} of 7) | {_linked(claims[name])} |"
        )
    return "\n".join(lines)


def _linked(ids: list[str]) -> str:
    """Ids of checks as links to the modules they are in, those of one number together: PO-01a, PO-01b as PO-01."""
    modules = {}
    for path in sorted((ROOT / "theory_checks" / "catalogue").glob("[!_]*.py")):
        for name in re.findall(r'id="([^"]+)"', path.read_text()):
            modules[name] = path.name
    families = dict.fromkeys((re.match(r".*-\d+", name)[0], modules[name]) for name in ids)
    return ", ".join(f"[{family}](theory_checks/catalogue/{file})" for family, file in families)


def test_the_table_of_algorithms_is_what_the_tests_say():
    assert table() in README, f"README.md needs this table of algorithms:\n\n{table()}"


def test_a_rung_without_the_one_below_does_not_count(monkeypatch):
    monkeypatch.setitem(globals(), "rungs_of_algorithms", lambda: {name: {1, 3} for name in algorithms()})
    assert "(rung 1 of 7)" in table()
    assert "(rung 3 of 7)" not in table()


def test_readme_has_three_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, tmp_path):
    done = subprocess.run([sys.executable, "-c", EXAMPLES[number]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout or any(tmp_path.iterdir())
    bound = re.search(r"measured / bound: at most ([\d.]+)", done.stdout)
    assert bool(bound) == ("measured / bound" in EXAMPLES[number])
    if bound:
        assert 0.99 < float(bound[1]) <= 1
