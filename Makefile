# Everything that one does with a checkout. `make demo` and `make test` need nothing but Python.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: help install check test build clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,text,toy,pytorchvideo]"
	touch $@

install: $(VENV)/.installed  ## make .venv with everything that demo and tests need

check: install  ## ruff, mypy, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

test: install  ## the whole test suite
	$(BIN)/python -m pytest -q

build: install  ## a wheel, and a smoke test of it outside the checkout
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## what was built here, not what was installed
	rm -rf build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache
