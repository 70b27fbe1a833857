# make demo · make test · make lint · make bench: each makes .venv first if it is missing.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint bench clean

demo: .venv/demo
	$(BIN)/python examples/demo.py --output demo

test: lint
	$(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# `make bench BENCH="--only W1 --resume"` hands flags on; bench/README.md says what they do.
bench: .venv/test .venv/esm-cpp
	$(BIN)/python bench/suite.py $(BENCH)

# esm-cpp wants numpy below 2. A machine for which it has no build is a machine without it, and the table says so.
.venv/esm-cpp: .venv/torch
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet 'esm-cpp==0.2.1' 'numpy<2' || rm -rf $@

# torch first and alone: the pinned build is the CPU one, and nothing after it may replace it.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[plot]'
	touch $@

.venv/test: .venv/torch pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo
