# make test: the fast tests.  make lint: a linter and the type checker.  make demo: the demo world, searched, and
# the page that shows it.
# make docs: the documentation's site, in site/.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: test test-slow lint docs demo
.DEFAULT_GOAL := test

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile -m 'not slow'

test-slow: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile --durations 10 -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/zensical build --strict --clean

demo: .venv/installed
	$(BIN)/python benchmarks/demo_table.py
	$(BIN)/mergekit-align-report demo-world/evaluation.json --chosen ours --output demo-world/report.html
