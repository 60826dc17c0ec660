# Needs Python 3.12 only; uv is used where it runs.
PYTHON ?= python3.12
# With LEROBOT=<a checkout of LeRobot> the tests run on that one, in an environment of their own, and with
# WITH="'transformers==5.22.*'" or the like on other versions than it asks for.
LEROBOT ?=
WITH ?=
VENV ?= $(if $(LEROBOT),outputs/lerobot-env,.venv)
BIN := $(VENV)/bin
# In the order of their names: files of few tests hold the longest, and would all come last.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
OPENPI_CLIENT := openpi-client==0.1.2 typing_extensions
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Where it is set, every process compiles all that it imports again, which takes longer than most tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-fast lint docs wheel bench clean

quickstart: $(VENV)/.ready-test
	$(BIN)/python -m examples.quickstart

# Documents quote settings of the LeRobot in constraints.txt, so they are not checked on another one.
test: $(VENV)/.ready-test $(VENV)/openpi-client/.ready lint $(if $(LEROBOT),,docs)
	@echo "All tests: about 16 minutes on 2 cores, after lint and documents. make test-fast takes under 3."
	$(BIN)/python -m pytest $(PARALLEL)

# Without whole commands, LeRobot's scripts and simulators.
test-fast: $(VENV)/.ready-test
	@echo "The fast tests: under 3 minutes on 2 cores."
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tables as their JSON and settings say, no broken link; the site lies in outputs/site.
docs: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks.tables --check
	$(BIN)/mkdocs build --strict

# The wheel alone in an empty environment: 5 GB beside this one, then removed.
wheel: $(VENV)/.ready-test
	PYTHON="$(PYTHON)" .ci/wheel $(VENV)

bench: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks.speed.latency --json outputs/bench/latency.json
	$(BIN)/python -m benchmarks.speed.training --json outputs/bench/training.json
	$(BIN)/python -m benchmarks.speed.control --json outputs/bench/control.json

# One environment for both commands, made once and again when what it holds changes.
$(VENV)/.ready-test: pyproject.toml constraints.txt
	@if [ -n "$(LEROBOT)" ]; then \
	  bash tests/lerobot_environment.sh $(VENV) "$(LEROBOT)" $(WITH); \
	else \
	  PYTHON="$(PYTHON)" .ci/environment $(VENV) -c constraints.txt -e ".[dev]"; \
	fi
	@touch $@

# openpi's client wants numpy below 2, so it lives beside the environment it is tested against.
$(VENV)/openpi-client/.ready: $(VENV)/.ready-test
	@PYTHON="$(PYTHON)" .ci/environment $(@D) $(OPENPI_CLIENT)
	@touch $@

clean:
	rm -rf $(VENV) outputs build dist
