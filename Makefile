# Each target does all its set-up: a virtual environment of its own, from the pinned constraints.
#   make check     linters, types, contracts, and the unit tests that run no model
#   make test      every test but those marked slow, processes, browser or gpu
#   make test-all  `make test`, then those
# In one call, as in `make lint test test-all`, nothing runs twice. With COVERAGE=1, which makes tests slower, the last one
# fails where less of the package is run than pyproject.toml asks for.

PYTHON ?= python3
DEMO := .venv-demo
TEST := .venv-test

PYTEST = $(TEST)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
MARKED := slow or processes or browser or gpu
COVER := $(if $(COVERAGE),--cov=autoquant --cov-report=)
UNIT := tests/cli tests/engines tests/report tests/store tests/tuner $(wildcard tests/test_*.py)

.PHONY: demo check test test-all lint unit docs clean

demo: $(DEMO)/installed
	$(DEMO)/bin/python demo/run.py

# Both at once, since the types are checked by one process.
check: $(TEST)/installed
	$(MAKE) --no-print-directory -j 2 lint unit

unit: $(TEST)/installed
	$(PYTEST) -m "not ($(MARKED) or models)" $(UNIT)

test: $(TEST)/installed
	$(PYTEST) $(COVER) -m "not ($(MARKED))"

test-all: test
	$(PYTEST) $(COVER) $(if $(COVERAGE),--cov-append) -m "$(MARKED)"
	$(if $(COVERAGE),$(TEST)/bin/coverage report --skip-covered)

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
