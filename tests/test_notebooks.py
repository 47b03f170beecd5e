"""The notebooks: each script runs and its claim holds in fast mode, and the .ipynb beside it is the same notebook."""

import json
import os
import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

import corollary

NOTEBOOKS = Path(corollary.__file__).parent / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("[!_]*.py"))
CELL = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def cells_of_script(text: str) -> list[tuple[str, str]]:
    """Kind and source of each cell of a percent script."""
    _, *parts = CELL.split(text)
    cells = []
    for marker, source in zip(parts[::2], parts[1::2], strict=True):
        kind = "markdown" if marker else "code"
        if marker:
            commented = takewhile(lambda line: line.startswith("#"), source.splitlines())
            source = "\n".join(line.removeprefix("#").removeprefix(" ") for line in commented)
        cells.append((kind, source.strip()))
    return cells


def cells_of_notebook(notebook: dict) -> list[tuple[str, str]]:
    return [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]


def by_name(path: Path) -> str:
    return path.stem


def test_there_is_an_ipynb_and_a_row_of_the_readme_for_every_script_and_no_other() -> None:
    names = [path.stem for path in SCRIPTS]
    assert len(names) >= 3
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == names
    rows = re.findall(r"^\| \[`(\w+)`\]\(\w+\.ipynb\)", (NOTEBOOKS / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == names


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_the_claim_holds_in_fast_mode(script, tmp_path) -> None:
    env = os.environ | {"COROLLARY_FAST": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_the_ipynb_is_in_step(script) -> None:
    notebook = json.loads(script.with_suffix(".ipynb").read_text())
    assert cells_of_notebook(notebook) == cells_of_script(script.read_text()), "run `make notebooks`"


def test_a_changed_line_or_a_missing_cell_is_noticed() -> None:
    script = SCRIPTS[0].read_text()
    found = cells_of_notebook(json.loads(SCRIPTS[0].with_suffix(".ipynb").read_text()))
    assert {kind for kind, _ in found} == {"code", "markdown"}
    assert found != cells_of_script(script.replace("import os", "import sys", 1))
    assert found != cells_of_script(script.replace("**Claim.**", "**Guess.**", 1))
    assert found[:-1] != cells_of_script(script)


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_the_ipynb_holds_the_outputs_of_one_whole_run_and_nothing_of_the_machine(script) -> None:
    path = script.with_suffix(".ipynb")
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}  # no error
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)  # no warning
    assert not any(cell["metadata"] for cell in code)  # no times
    assert set(notebook["metadata"]) == {"jupytext", "kernelspec", "language_info"}
    assert not re.search(r"/(home|work|tmp|root|Users|opt)/", re.sub(r'"image/png": ".*"', "", path.read_text()))
    assert path.stat().st_size < 300_000
