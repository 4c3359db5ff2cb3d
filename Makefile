# `make demo` and `make test` do all their set-up: each makes its own virtual environment from the pinned constraints.

PYTHON ?= python3
DEMO := .venv-demo
TEST := .venv-test

.PHONY: demo test lint docs clean

demo: $(DEMO)/installed
	$(DEMO)/bin/python demo/run.py

test: $(TEST)/installed
	$(TEST)/bin/python -m pytest -q -n 2 --dist loadfile

lint: $(TEST)/installed
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy
	$(TEST)/bin/lint-imports

docs: $(TEST)/installed
	$(TEST)/bin/mkdocs build

$(DEMO)/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet -c constraints.txt torch
	$(DEMO)/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(TEST)/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install --quiet -c constraints.txt torch
	$(TEST)/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(DEMO) $(TEST) out
