# Three commands for a fresh clone: `make quickstart`, `make test`, `make docs`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?= -n 2

.PHONY: quickstart test docs clean
# What `make quickstart` changes of the quickstart's settings, for a shorter one: QUICKSTART_ARGS="--rounds 2"
QUICKSTART_ARGS ?=
OUT ?= runs/quickstart-$$(date +%Y%m%d-%H%M%S)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# A stamp for each set of extras, made anew when pyproject.toml changes.
$(VENV)/.quickstart: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[quickstart]"
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@ $(VENV)/.quickstart

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	@touch $@

quickstart: $(VENV)/.quickstart  ## finetune MiniLM with spry_plus, then its head alone at its own rate, and compare
	@out=$(OUT); set -e; \
	$(BIN)/spryfl run --out $$out --name spry-plus $(QUICKSTART_ARGS); \
	$(BIN)/spryfl run --out $$out --name head-alone --set method.assignment.kind=nobody \
		--set method.server_optimizer.lr=3e-2 $(QUICKSTART_ARGS); \
	$(BIN)/spryfl report $$out/spry-plus $$out/head-alone

test: $(VENV)/.test  ## the whole suite, with lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST_ARGS)

docs: $(VENV)/.docs  ## the documentation site in build/site, warnings as errors
	$(BIN)/python docs/build_site.py

clean:  ## what the commands above made, but not runs/
	rm -rf $(VENV) .venv-wheel build dist .pytest_cache .mypy_cache .ruff_cache
