# Each command sets up what it needs: a virtual environment in VENV, with the package in it.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
SEED ?= 0
# Where other projects are installed to be compared with; it sees the packages of VENV and leaves them as they are.
PEERS ?= .venv-peers
BIN = $(VENV)/bin

.PHONY: demo test lint torture smoke docs bench bench-peers clean

demo: $(VENV)/ready
	$(BIN)/relssl pretrain digits --seed $(SEED) --out $(OUT)

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

torture: $(VENV)/ready-dev
	$(BIN)/python -m pytest -m torture -s

smoke: $(VENV)/ready
	$(BIN)/relssl reproduce $(or $(TABLE),temperature) --scale smoke --runs runs/smoke-$(or $(TABLE),temperature) --out runs/smoke

docs: $(VENV)/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html"

bench: $(VENV)/ready
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-peers: $(PEERS)/ready
	$(PEERS)/bin/python benchmarks/bench.py --only peers --out results/peers.json $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: $(VENV)/bin/python pyproject.toml
	@echo "Installing into $(VENV). PyTorch is large, and pip says nothing until it is done: minutes on a slow line."
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

$(PEERS)/ready: $(VENV)/ready
	$(PYTHON) -m venv $(PEERS)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$($(PEERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check lightly
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist
