# make demo: from nothing to a trained classifier.  make test: what CI runs.  Both reuse .venv when it is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -q -c constraints.txt
RECIPE := classification/deit_tiny_mhla_mnist_cpu

.PHONY: demo test slow gpu slurm chaos lint wheel clean

demo: $(VENV)/.demo-installed
	$(BIN)/lightning run $(RECIPE)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not slurm"

slow: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -m slow

# A real SLURM of two nodes on this machine; needs root. Installs Debian's packages where there are none; 20 minutes on two cores.
slurm: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests/slurm

gpu: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -m gpu

# A hundred SIGKILLs over all tasks and strategies; about half an hour on two quiet cores.
chaos: $(VENV)/.dev-installed
	$(BIN)/python -m tests.chaos

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mhla_lightning tests

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo,dev]'
	@touch $@ $(VENV)/.demo-installed

wheel: $(VENV)/.dev-installed
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
