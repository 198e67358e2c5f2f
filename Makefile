# Everything that one does with a checkout. `make demo` and `make test` need nothing but Python.
#
#   make help                     the targets
#   make demo                     the whole path on a toy world, on a CPU
#   make summary GPUS=4           the real thing: download, train, answer, review a 7B model
#   make summary DRY_RUN=1        every command line of that, without running one

PYTHON  ?= python3
VENV    ?= .venv
BIN      = $(VENV)/bin
CHATBIND = $(BIN)/chatbind
SHELL    = bash
.SHELLFLAGS = -euo pipefail -c

.PHONY: help install check test test-vllm test-harness build clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,text,serve,pytorchvideo]"
	touch $@

install: $(VENV)/.installed  ## make .venv with everything that demo and tests need

check: install  ## ruff, mypy, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# What its processes compile is kept, also where the environment (of a container) forbids it: they
# are two hundred.
test: install  ## the whole test suite
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-vllm: install  ## answers against a real vLLM: CHATBIND_VLLM=its virtual environment
	$(BIN)/python -m pytest -q -rs tests/inference/test_vllm.py

test-harness: install  ## lmms-eval on a toy world: CHATBIND_HARNESS=its virtual environment
	$(BIN)/python -m pytest -q -rs tests/harness/test_lmms_eval.py

build: install  ## a wheel, installed and started outside the checkout
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall --target dist/installed dist/*.whl
	cd dist && PYTHONPATH=installed ../$(BIN)/python -m chatbind_cli --version

clean:  ## what was built here; downloads and checkpoints stay
	rm -rf build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache

include make/demo.mk
include make/reproduce.mk
