PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
# Tests side by side, one thread each.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench compile gpu dist clean

help:  ## list the targets
	@echo "make TARGET [PYTHON=python3.12] [VENV=.venv] [JOBS=2] [ARGS='options of the command that is run']"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "  %-10s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed  ## install into .venv, then run the bundled CLIP dense and reduced
	$(BIN)/clipkernels demo $(ARGS)

test: $(VENV)/.installed-test lint  ## install into .venv, then lint, type-check and the quick tests
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.installed-test lint  ## the same with every test, slow ones included
	$(PYTEST) -m "" $(ARGS)

lint: $(VENV)/.installed-test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test  ## time the operations and the towers under pytest-benchmark
	$(BIN)/python -m pytest bench/ops.py bench/towers.py $(ARGS)

compile: $(VENV)/.installed  ## compile every kernel for every target, no GPU needed, and write the table
	$(BIN)/python tests/ops/compile_kernels.py --all --write $(ARGS)

# Without .venv, because a GPU machine has torch and triton already and may have no network.
gpu:  ## ten minutes of what needs a GPU, with PYTHON as it is; the same command goes on; OUT= for the three files
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PYTHON) -m bench.gpu.campaign $(if $(OUT),--out "$(OUT)") $(ARGS)

dist: $(VENV)/.installed-test  ## build wheel and sdist, and check their metadata
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The install is editable, so only a change of pyproject.toml calls for another.
$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	@echo "Installing clipkernels into $(VENV). torch is large: a few minutes, the first time only."
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/.created
	@echo "Installing clipkernels[test] into $(VENV). torch is large: a few minutes, the first time only."
	$(PIP) install --editable '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "clipkernels needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." \
			"Name another with: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
