PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := demo-out

.PHONY: setup demo test lint bench matrix matrix-check

setup: $(VENV)/.ready

# torch first and by its exact version: a range would take a build with gigabytes of CUDA.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py $(OUT)

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

matrix: setup
	$(BIN)/python scripts/support_matrix.py

matrix-check: setup
	$(BIN)/python scripts/support_matrix.py --check

bench: setup
	$(BIN)/python scripts/bench_merge.py
