# Each target sets up its own part of .venv from a bare clone; a second run finds it done.
PYTHON ?= python3
BIN := .venv/bin
# torch 2.13 from wherever pip finds it: the CPU build where that is what the index offers, the ordinary one elsewhere.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean

demo: .venv/.run
	$(BIN)/swiftsure demo --out runs/demo

test: .venv/.test
	$(BIN)/python -m pytest

lint: .venv/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable .
	@touch $@

.venv/.test: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[test]'
	@touch $@ .venv/.run

.venv/.lint: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[lint]'
	@touch $@ .venv/.run

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
