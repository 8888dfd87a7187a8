# make demo: from nothing to a trained classifier.  make test: what CI runs.  Both reuse .venv when it is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -q -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
RECIPE := classification/deit_tiny_mhla_mnist_cpu
SLOW := slow-attention slow-models slow-data slow-strategies slow-training slow-rest

.PHONY: demo test slow $(SLOW) gpu slurm chaos lint house docs figures notebooks wheel clean

demo: $(VENV)/.demo-installed
	@echo "make demo: trains $(RECIPE), two minutes on two cores"
	$(BIN)/lightning run $(RECIPE)

test: lint
	@echo "make test: the tests of CI in two processes, 16 to 20 minutes on two cores"
	$(PYTEST) -n 2 --dist loadfile -m "not slow and not gpu and not slurm"

# Each part is to end within 45 minutes on two cores.
slow: $(SLOW)

slow-attention: TESTS := tests/attention tests/backbones
slow-models: TESTS := tests/diffusion tests/tasks tests/inference tests/evaluation tests/conversion tests/integrations
slow-data: TESTS := tests/data
slow-strategies: TESTS := tests/strategies
slow-training: TESTS := tests/training tests/callbacks tests/checkpoints
slow-rest: TESTS := tests/analysis tests/bench tests/cli tests/cluster tests/compare tests/config tests/evidence tests/examples tests/house tests/planning tests/private_api tests/report tests/runs tests/weights

$(SLOW): $(VENV)/.dev-installed
	@echo "make $@: the slow tests of $(TESTS); the goal is 45 minutes on two cores"
	$(PYTEST) -m "slow and not gpu and not slurm" $(TESTS)

# A real SLURM of two nodes on this machine; needs root.
slurm: $(VENV)/.dev-installed
	@echo "make slurm: a SLURM of two nodes on this machine (as root; installs Debian's packages where there are none), 20 minutes on two cores"
	$(PYTEST) -m slurm tests/slurm

# Installs nothing: a machine with a GPU may have no network.
gpu:
	@echo "make gpu: tests and benches that need a CUDA device, under 10 minutes on one H100; results in gpu-report/"
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.gpu_report

# SIGKILLs over all tasks and strategies.
chaos: $(VENV)/.dev-installed
	@echo "make chaos: a hundred killed runs, half an hour on two quiet cores"
	$(BIN)/python -m tests.chaos

lint: $(VENV)/.dev-installed
	@echo "make lint: style and types, one minute"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mhla_lightning tests

house: $(VENV)/.dev-installed
	@echo "make house: layers, names and prose of the package against their bounds, half a minute"
	$(BIN)/python -m tests.house.report

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): a few minutes, most of them the download; then one minute of compiling"
	$(PIP) -e '.[demo]'
	$(BIN)/python .ci/compile.py
	@touch $@

$(VENV)/.docs-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): a few minutes, most of them the download"
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): a few minutes, most of them the download; then one minute of compiling"
	$(PIP) -e '.[demo,dev]'
	$(BIN)/python .ci/compile.py pytest xdist moto.server s3fs lm_eval
	@touch $@ $(VENV)/.demo-installed

docs: $(VENV)/.docs-installed
	@echo "make docs: builds the documentation into site/, offline, a minute; read it: $(BIN)/python -m http.server -d site"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean -q
	$(BIN)/python docs/scripts/check_links.py site

figures: $(VENV)/.demo-installed
	@echo "make figures: draws docs/images/ from runs/; trains the runs that are missing, half an hour on two cores"
	$(BIN)/python -m docs.scripts.figures

notebooks: $(VENV)/.dev-installed
	@echo "make notebooks: runs examples/notebooks/, records their outputs for the documentation and strips them, five minutes on two cores"
	$(BIN)/python -m docs.scripts.run_notebooks

wheel: $(VENV)/.dev-installed
	@echo "make wheel: builds dist/*.whl, a few seconds"
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
