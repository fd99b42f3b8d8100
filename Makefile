# The commands people type. Everything happens in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

define LOCK
import sys
from pathfm.sbom import constraints
print("# Versions that work together: pip install -c constraints.txt 'pathfm[dev]' (or any other extras).")
print(f"# Made by `make constraints` with Python {sys.version_info.major}.{sys.version_info.minor} on Linux; do not edit.")
print(constraints(), end="")
endef
export LOCK

.PHONY: demo test test-long test-slurm lint format bench constraints clean

demo: $(VENV)/.with-report
	$(BIN)/pathfm demo --out demo

test: $(VENV)/.with-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2

test-long: $(VENV)/.with-dev
	OMP_WAIT_POLICY=passive $(BIN)/pytest -m "long and not slurm" --timeout 1800

test-slurm: $(VENV)/.with-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest tests/slurm -m slurm --timeout 900

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.with-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.with-dev
	$(BIN)/python -m benchmarks

constraints:
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/pip install --quiet '.[dev,umap]'
	.venv-constraints/bin/python -c "$$LOCK" > constraints.txt
	rm -rf .venv-constraints

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.with-report: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --editable '.[report]'
	touch $@

$(VENV)/.with-dev: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
