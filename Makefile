# make install | test | lint | demo: each does all its own set-up in .venv; a second run takes seconds.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
ARGS ?=

export MUJOCO_GL ?= egl
export PYTHON

.PHONY: help install lint format test demo clean
help:
	@echo "make install   make $(VENV) with everything (Python 3.10 to 3.12)"
	@echo "make demo      run the demonstration and say where its videos are"
	@echo "make test      linters, types, layers and the whole test suite"
	@echo "make lint      linters, types and layers only"
	@echo "make format    format the code"
	@echo "make clean     remove $(VENV) and the caches"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/install.sh
	@tools/install.sh $(VENV)
	@touch $@

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

demo: install
	$(BIN)/hma-gym demo $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
