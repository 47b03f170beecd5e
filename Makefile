# Every target needs only Python 3.11 and make: the environment in .venv is created on first use, and brought up to
# date when pyproject.toml or constraints.txt change.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS := dev,minari,sb3,tensorboard
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help run test lint format notebooks clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

run: $(READY)  ## train BC, TD3+BC, IQL and PRDC on the shipped data; table and pictures
	$(BIN)/corollary demo

# One thread per worker: the tests' matrices are small, and two workers with two threads each would compete.
test: $(READY)  ## run the unmarked test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=auto --maxprocesses=4

lint: $(READY)  ## style, format, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)  ## apply what `make lint` asks for where it can be done automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(READY)  ## run the notebooks in full and write them with their outputs
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[notebooks]'
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/_render.py

clean:  ## remove the environment, caches and build results; runs/ is kept
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The link makes the repository's root importable as `corollary` for mypy (see [tool.mypy] in pyproject.toml).
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	mkdir -p .venv/typecheck
	ln -sfn ../.. .venv/typecheck/corollary
	touch $@
