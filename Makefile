# The commands people type. Everything happens in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

define LOCK
import json, re, sys
from pathlib import Path
found = [item["metadata"] for item in json.loads(Path(sys.argv[1]).read_text())["install"]]
pins = {re.sub("[-_.]+", "-", one["name"]).lower(): one["version"].partition("+")[0] for one in found}
print("# Versions that work together: pip install -c constraints.txt 'pathfm[dev]' (or any other extras).")
print(f"# Made by `make constraints` with Python {sys.version_info.major}.{sys.version_info.minor} on Linux; do not edit.")
print(*(f"{name}=={version}" for name, version in sorted(pins.items()) if name != "pathfm"), sep="\n")
endef
export LOCK

.PHONY: demo test test-long test-slurm lint format bench constraints clean

demo: $(VENV)/.with-report
	$(BIN)/pathfm demo --out demo

test: $(VENV)/.with-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2

test-long: $(VENV)/.with-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist loadfile -m "long and not slurm" --timeout 1800

test-slurm: $(VENV)/.with-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest tests/slurm -m slurm --timeout 900 -rs

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.with-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.with-dev
	$(BIN)/python -m benchmarks

# Asks pip what it would install, and installs nothing. Older pips would fetch every wheel for that.
constraints:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --upgrade pip
	build/lock/bin/pip install --quiet --dry-run --ignore-installed --report build/lock/report.json '.[dev,umap]'
	build/lock/bin/python -c "$$LOCK" build/lock/report.json > build/lock/constraints.txt
	mv build/lock/constraints.txt constraints.txt
	rm -rf build/lock

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
