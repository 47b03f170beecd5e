"""Writes each notebook's .ipynb with the outputs of a fresh run of its .py; arguments name some instead of all."""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def render(source: Path) -> None:
    """Run the percent script `source` as a notebook; nothing of the machine or the hour is kept beside its outputs."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.NotebookNode()
    NotebookClient(notebook, timeout=600, record_timing=False).execute(cwd=str(HERE))
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, source.with_suffix(".ipynb"))


for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(HERE.glob("[!_]*.py")):
    render(path)
    print(path.with_suffix(".ipynb"))
