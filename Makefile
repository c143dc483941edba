# `make help` lists what can be done. Needed: Python 3.11 or newer, pip, make.

# How the environment is made. All can be given on the command line: make setup DEVICE=cuda PYTHON=/usr/bin/python3.12
VENV   := .venv
# cpu or cuda; what was chosen once is kept for the calls that follow.
ifndef DEVICE
  DEVICE := $(shell cat $(VENV)/.device 2>/dev/null || echo cpu)
endif
# Python 3.11 is what the pins are tested with, so it is looked for first.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Processes that tests run in; 0 for this one alone, as debuggers like it.
JOBS ?= logical

CONSTRAINTS := requirements/constraints.txt
pinned       = $(1)==$(shell sed -n 's/^$(1)==//p' $(CONSTRAINTS))

# PyPI's torch for Linux is the CUDA build, so the CPU build is named by its full version: first where pip looks anyway
# (a mirror, PIP_FIND_LINKS), then in PyTorch's own index, which is asked for torch alone.
ifeq ($(DEVICE),cuda)
  TORCH       ?= $(subst ==,===,$(call pinned,torch))
  TORCH_INDEX ?= https://pypi.org/simple
  EXTRAS      := torchrec-cuda,bench,serve,dev
else
  TORCH       ?= $(call pinned,torch)$(if $(filter Linux,$(shell uname -s)),+cpu)
  TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
  EXTRAS      := torchrec,bench,serve,dev
endif

PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip --disable-pip-version-check -qq
READY  = $(VENV)/.ready-$(DEVICE)

# The data sets of a neighbouring folder, where there is one and nothing else was said.
ifndef EMBCOMP_DATA
  ifneq ($(wildcard ../shared/data/.),)
    export EMBCOMP_DATA := $(abspath ../shared/data)
  endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup test check format bench speed docs clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with pinned versions; DEVICE=cuda for the CUDA builds (default: cpu)

test: $(READY) ## run all tests, JOBS at a time (default: one per core, 8 at most); ARGS='-k hash -x' goes to pytest
	$(PY) -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal $(ARGS)

check: $(READY) ## lint, formatting and types, changing nothing
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(READY) ## fix what ruff can fix, and format
	$(PY) -m ruff check --fix-only
	$(PY) -m ruff format

bench: $(READY) ## run the default sweep and write its report; ARGS go to the benchmark
	$(PY) -m benchmarks.bench $(ARGS)

speed: $(READY) ## measure the speed of lookups, training steps and scores
	$(PY) -m benchmarks.speed $(ARGS)

docs: $(READY) ## generate the pages of docs/strategies from the code
	$(PY) -m embcomp.docs

clean: ## remove caches and build products; the environment and results stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV)

# .device is written first and .ready-<device> last. The former without the latter is what an interrupted setup leaves,
# or another device: both begin anew. A changed pyproject.toml or pin only brings the environment up to date.
$(READY): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "setup: Python 3.11 or newer is needed, and '$(or $(PYTHON),python3)' is not one." >&2; \
	  echo "setup: install it, or say where it is: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@case $(DEVICE) in cpu|cuda) ;; *) echo "setup: DEVICE is cpu or cuda, not '$(DEVICE)'" >&2; exit 1;; esac
	@if test -e $(VENV)/.device -a ! -e $@; then echo "setup: starting anew"; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && echo $(DEVICE) >$(VENV)/.device && rm -f $@
	@echo "setup: $(VENV) with $$($(PYTHON) --version), for $(DEVICE); the first time takes minutes"
	@$(PYTHON) -m venv $(VENV) >/dev/null || { \
	  echo "setup: no ensurepip (Debian: python3-venv), so pip comes from outside"; \
	  $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip -q --python $(PY) install pip; }
	@echo "setup: $(TORCH)"
	@$(PIP) install --no-deps '$(TORCH)' 2>/dev/null || \
	  $(PIP) install --no-deps --retries 1 --index-url $(TORCH_INDEX) '$(TORCH)' || { \
	  echo "setup: found no $(TORCH), neither where pip looks nor in $(TORCH_INDEX). Ways out:" >&2; \
	  echo "  make setup TORCH_INDEX=<a mirror of that index>" >&2; \
	  echo "  PIP_FIND_LINKS=<folder with the wheel> make setup" >&2; \
	  echo "  make setup TORCH=$(call pinned,torch)    PyPI's build: on Linux with CUDA, several GB" >&2; exit 1; }
	@echo "setup: the other packages, at the versions of $(CONSTRAINTS)"
	@PIP_CONSTRAINT=$(CONSTRAINTS) $(PIP) install --no-warn-conflicts -e '.[$(EXTRAS)]'
	@$(PIP) install --no-deps '$(call pinned,torchrec); sys_platform == "linux"'
	@$(PY) -c 'import torch, sys; sys.platform == "linux" and __import__("torchrec")'
	@touch $@ && echo "setup: done"
