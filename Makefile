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

bench: .venv/test
	$(BIN)/python bench/embed.py
	$(BIN)/python bench/t5_encoder.py
	$(BIN)/python bench/complete.py
	$(BIN)/python bench/igbert.py
	$(BIN)/python bench/generate.py
	$(BIN)/python bench/variants.py

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
