# Everything a newcomer or CI needs: each target sets up .venv by itself.
# Needs: make, bash, Python >= 3.11 with venv. Nothing else: pip brings even etcd.
#
#   make demo                    a two-rank training that loses a rank and recovers
#   make test                    all tests;  make test-fast leaves the long crash loops out
#   make sim SEEDS=10000         whole clusters on virtual time, each with its own faults; prints what it met
#   make sim-planted             the same over copies of dtrain with a fault in them: all must be caught
#   make chaos MINUTES=10 SEED=7 a job on a real cluster while everything is killed, stopped and cut off;
#                                KEEP=/new/folder keeps its data; ONLY='etcd member' strikes by such faults alone
#   make demo PYTHON=python3.12  another interpreter
#   make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'   a torch without CUDA: smaller

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$p"; break; fi; done)
PIP_ARGS ?=
# As many tests at once as tests/conftest.py finds room for.
PYTEST_ARGS ?= -n auto --dist worksteal
SEEDS ?= 1000
MINUTES ?= 10
SEED ?=
KEEP ?=
ONLY ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# A virtual environment of the caller's must not leak into ours.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

.PHONY: help install demo test test-fast sim sim-planted chaos lint format proto bench bench-checkpoint bench-recovery clean

help:
	@sed -n 's/^#   //p' Makefile; echo 'make lint | format | proto | bench | bench-checkpoint | bench-recovery | clean'

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo 'dtrain needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python.' >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo 'Python cannot make virtual environments: install its venv package (Debian: apt install python3-venv).' >&2; exit 1; }

$(INSTALLED): pyproject.toml constraints.txt deploy/etcd-for-tests.sh | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,examples]'
	bash deploy/etcd-for-tests.sh $(VENV)/etcd
	touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST_ARGS)

sim: $(INSTALLED)
	$(BIN)/python -m tests.sim --seeds $(SEEDS)

sim-planted: $(INSTALLED)
	$(BIN)/python -m tests.sim.planted

chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos.runner --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(KEEP),--keep $(KEEP)) \
		$(if $(ONLY),--only '$(ONLY)')

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. dtrain/proto/agent.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. dtrain/etcd/wire.proto

bench: $(INSTALLED)
	$(BIN)/python benchmarks/startup.py

bench-checkpoint: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.checkpoint --plot docs/checkpoint.svg

bench-recovery: $(INSTALLED)
	$(BIN)/python benchmarks/recovery.py

clean:
	rm -rf $(VENV) .dtrain .dtrain-demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
