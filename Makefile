# shoal: `make serve` and `make test` start from a machine that has only Python and make.
# scripts/setup.sh makes .venv and does nothing when it is already right.

MODEL ?= smollm2-135m
ARGS ?=
BIN := .venv/bin

export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup setup-serve serve test check format clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## create or update .venv for development
	@scripts/setup.sh dev

setup-serve:
	@scripts/setup.sh serve

serve: setup-serve ## set up what serving needs, then serve MODEL=smollm2-135m on 127.0.0.1:8000 (ARGS="--port 9000")
	@exec $(BIN)/shoal serve $(MODEL) $(ARGS)

test: setup ## set up, then the whole test suite, in two processes (ARGS="-k name", "-n 0")
	@$(BIN)/python -m pytest -n 2 $(ARGS)

check: setup ## format, lint, types, import rules, pure and property tests: about a minute
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q -n 2 tests/pure tests/property $(ARGS)

format: setup ## format, and mend what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## remove .venv and everything built (not the downloaded models)
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
