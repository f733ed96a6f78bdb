# Two commands to start with:
#   make demo   install what it needs and show two regimes: the paper's, and a service at its memory limit
#   make test   install everything a developer needs and run ruff, mypy and the fast tests
#
# and, with a CPU build of vLLM in an environment of its own, the newest or another (VLLM=0.28.0):
#   make test-vllm            the simulator against vLLM's scheduler, no difference allowed; engines; servers under a policy
#   make test-vllm-equality   of these the comparisons with vLLM's scheduler alone
#
# and at both ends of what pyproject.toml admits (PYTHON_LOWEST and PYTHON_HIGHEST, each the oldest or newest found):
#   make test-versions   the fast tests with the lowest and with the newest versions
#
# With the raw data of other simulators and of recorded runs (LLMSCHED_CALIBRATION, LLMSCHED_PEERS, LLMSCHED_TRACES):
#   make fidelity    measure the simulator against them and write docs/fidelity.md
#
#   make docs   build the site into site/, where a warning is an error
#   make test-tools   every example in examples/ with the library it is for, each in an environment of its own (Python 3.11)
#
#   make benchmark   speed, each figure beside its yardstick: docs/performance.md
#   make reproduction   the paper's results on this engine, under an hour on 2 cores: docs/reproduction.md
#
# PIP_FLAGS goes to every pip install; with PyTorch's own index the smaller CPU build of torch is taken:
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

VENV ?= .venv
PIP_FLAGS ?=
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
HOUSE := pyproject.toml constraints.txt
DEMO_OUT ?= results/demo

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-all test-tools test-versions test-lowest test-highest benchmark reproduction test-vllm test-vllm-equality setup-vllm fidelity lint clean distclean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: installing again is only needed when the project's requirements change.
$(VENV)/.demo: $(HOUSE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[cli]"
	@touch $@

$(VENV)/.dev: $(HOUSE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[agents,minari,cli,render,calibrate,cluster,ray,docs,dev]"
	@touch $(VENV)/.demo $@

demo: $(VENV)/.demo
	$(BIN)/llmsched demo --out $(DEMO_OUT) --overwrite

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Each library in an environment of its own, where the tests of the others are skipped.
TOOLS := torchrl tianshou zoo rllib
.venv-%/.tools: pyproject.toml requirements/tools-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet $(PIP_FLAGS) -r requirements/tools-$*.txt
	.venv-$*/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps -e .
	@touch $@

test-tools: $(VENV)/.dev $(TOOLS:%=.venv-%/.tools)
	for v in $(VENV) $(TOOLS:%=.venv-%); do NUMBA_CACHE_DIR=$$PWD/$$v/compiled $$v/bin/python -m pytest tests/test_examples.py || exit 1; done

# One environment for each end of the ranges. No torch: what trains agents is tested by `make test`. An old numpy that has no
# wheel for this Python is an error, not an hour of compiling. datasketches has none for Python 3.14.
found_python = $(shell for v in $(1); do \
	python3.$$v -c 'import sys; sys.exit(sys.version_info[:2] != (3, '$$v'))' 2>/dev/null && echo python3.$$v && break; done)
PYTHON_LOWEST ?= $(call found_python,11 12 13 14)
PYTHON_HIGHEST ?= $(call found_python,14 13 12 11)
.venv-lowest/.installed: END_PYTHON = $(PYTHON_LOWEST)
.venv-highest/.installed: END_PYTHON = $(PYTHON_HIGHEST)

.venv-lowest/.installed .venv-highest/.installed: .venv-%/.installed: pyproject.toml requirements/%.txt
	@test -n "$(END_PYTHON)" || { echo "error: Python 3.11 or newer is needed" >&2; exit 1; }
	$(END_PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet $(PIP_FLAGS) --only-binary numpy,scipy -c requirements/$*.txt \
		-e ".[cli,render,calibrate]" pytest hypothesis build "datasketches; python_version < '3.14'"
	@touch $@

test-versions: test-lowest test-highest

test-lowest test-highest: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest -m "not slow" --ignore tests/real_vllm

$(VENV)/.fidelity: $(HOUSE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[cli,calibrate]"
	@touch $(VENV)/.demo $@

fidelity: $(VENV)/.fidelity
	$(BIN)/python scripts/fidelity.py --out docs/fidelity.md

benchmark: $(VENV)/.dev
	$(BIN)/python scripts/benchmark.py --json results/benchmark.json --out docs/performance.md

# vLLM's CPU builds go up to 0.32; of 0.33 the scheduler alone can be driven without a GPU (scripts/vllm_environment.py).
VLLM ?= 0.32.0
VLLM_VENV ?= .venv-vllm-$(VLLM)
VLLM_BIN := $(VLLM_VENV)/bin

$(VLLM_VENV)/.installed: pyproject.toml scripts/vllm_environment.py
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed" >&2; exit 1; }
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python scripts/vllm_environment.py $(VLLM) $(PIP_FLAGS)
	$(VLLM_BIN)/python -m pip install --quiet $(PIP_FLAGS) -e ".[cli]" "pytest>=8.3,<10" "hypothesis>=6.100,<7"
	@touch $@

setup-vllm: $(VLLM_VENV)/.installed

# One thread: two on a shared machine slow each other down. A CUDA build on a machine without a GPU is told to do without.
# vLLM's own warnings are not ours to turn into errors.
VLLM_PYTEST = OMP_NUM_THREADS=1 VLLM_TARGET_DEVICE=cpu $(VLLM_BIN)/python -m pytest -s -o filterwarnings=default

test-vllm: setup-vllm
	$(VLLM_PYTEST) -m "not slow" tests/real_vllm

test-vllm-equality: setup-vllm
	$(VLLM_PYTEST) $(wildcard tests/real_vllm/test_*equality.py)

reproduction: $(VENV)/.demo
	$(BIN)/python scripts/reproduce.py --resume

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis $(DEMO_OUT)
	find llmsched_env baselines agents hardware scripts tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venv-lowest .venv-highest $(TOOLS:%=.venv-%) site
