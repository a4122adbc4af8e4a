# Two commands for a fresh clone: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?= -n 2 --dist loadgroup

.PHONY: quickstart test clean

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

quickstart: $(VENV)/.quickstart  ## finetune MiniLM with Spry, then its head alone by the same settings, and compare
	@out=runs/quickstart-$$(date +%Y%m%d-%H%M%S); set -e; \
	$(BIN)/spryfl run --out $$out --name spry; \
	$(BIN)/spryfl run --out $$out --name head-alone --set method.assignment.kind=nobody; \
	$(BIN)/spryfl report $$out/spry $$out/head-alone

test: $(VENV)/.test  ## the whole suite, with lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clean:  ## what the commands above made, but not runs/
	rm -rf $(VENV) .venv-wheel build dist .pytest_cache .mypy_cache .ruff_cache
