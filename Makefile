# Needs Python 3.12 only; uv is used where it runs.
PYTHON ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
OPENPI_CLIENT := openpi-client==0.1.2 typing_extensions
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test lint bench clean

quickstart: $(VENV)/.ready-test
	$(BIN)/python -m examples.quickstart

test: $(VENV)/.ready-test $(VENV)/openpi-client/.ready lint
	$(BIN)/python -m pytest

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks.speed.latency --json outputs/bench/latency.json
	$(BIN)/python -m benchmarks.speed.training --json outputs/bench/training.json
	$(BIN)/python -m benchmarks.speed.control --json outputs/bench/control.json

# One environment for both commands, made once and again when what it holds changes.
$(VENV)/.ready-test: pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" .ci/environment $(VENV) -c constraints.txt -e ".[dev]"
	@touch $@

# openpi's client wants numpy below 2, so it lives beside the environment it is tested against.
$(VENV)/openpi-client/.ready: $(VENV)/.ready-test
	@PYTHON="$(PYTHON)" .ci/environment $(@D) $(OPENPI_CLIENT)
	@touch $@

clean:
	rm -rf $(VENV) outputs build dist
