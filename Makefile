# make demo and make test do all the set-up on a bare machine with Python 3.11 or newer.
#   make demo                    CPU build of torch, where the package index offers one under this version
#   make demo TORCH=torch        the index's newest torch: on Linux the CUDA build (several gigabytes)
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint structure bench docs clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/grace-opt demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist worksteal --durations=10

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --hypothesis-profile=explore -n 2 --dist worksteal

# Circles of imports (none), imports upwards (none), the longest files.
structure: $(VENV)/.installed
	$(BIN)/python -m tests.support.structure

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/first_path.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/solvers.py

docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) demo dist build
