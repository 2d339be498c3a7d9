# Each command sets up what it needs: a virtual environment in VENV, with the package in it.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
SEED ?= 0
BIN = $(VENV)/bin

.PHONY: demo test lint torture bench clean

demo: $(VENV)/ready
	$(BIN)/relssl pretrain digits --seed $(SEED) --out $(OUT)

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

torture: $(VENV)/ready-dev
	$(BIN)/python -m pytest -m torture -s

bench: $(VENV)/ready
	$(BIN)/python benchmarks/small_images.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist
