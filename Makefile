# README says what to run; each target here says what it needs.
SHELL = /bin/sh
PYTHON = .venv/bin/python
ARGS =

# Under sudo, what needs no root runs as the owner of this folder.
OWNER := $(shell if [ "$$(id -u)" = 0 ] && [ "$$(stat -c %u .)" != 0 ]; then \
	echo setpriv --reuid=$$(stat -c %u .) --regid=$$(stat -c %g .) --clear-groups; fi)

# What root's tests remember must not be in the owner's way.
PYTEST_ROOT = HYPOTHESIS_STORAGE_DIRECTORY=/tmp/lbagent-hypothesis $(PYTHON) -B -m pytest -p no:cacheprovider

.PHONY: check demo test bench setup venv fmt lint type test-unit test-kernel test-e2e clean

check: lint type test-unit  # no root, under a minute

demo: setup  # root; ARGS=--once: assert every claim, then end
	@$(PYTHON) -B -m tests.demo $(ARGS)

test: setup check test-kernel test-e2e  # root

bench: setup  # root; one JSON object a line
	@$(PYTHON) -B -m tests.bench $(ARGS)

setup:
	@contrib/setup.sh

venv:
	@contrib/setup.sh check

fmt: venv
	$(OWNER) $(PYTHON) -m ruff format lbagent tests setup.py
	$(OWNER) $(PYTHON) -m ruff check --fix lbagent tests setup.py

lint: venv
	$(OWNER) $(PYTHON) -m ruff format --check lbagent tests setup.py
	$(OWNER) $(PYTHON) -m ruff check lbagent tests setup.py
	$(OWNER) .venv/bin/lint-imports --no-logo

type: venv
	$(OWNER) $(PYTHON) -m mypy

test-unit: venv
	$(OWNER) $(PYTHON) -m pytest tests/unit tests/contract -m "not kernel" -n auto --dist worksteal --cov $(ARGS)

test-kernel: setup  # root
	$(PYTEST_ROOT) tests/contract tests/kernel -m kernel $(ARGS)

test-e2e: setup  # root
	$(PYTEST_ROOT) tests/e2e $(ARGS)

clean:
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage
	rm -f lbagent/core/_ring*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
