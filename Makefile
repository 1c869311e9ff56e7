# All targets set up what they need: a virtual environment in .venv, with the versions of constraints.txt.
#   make compare                    trains and scores all objectives on the demo, in about 40 minutes on two cores
#   PYTHON=python3.12 make test     takes another interpreter (3.10 or newer)

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable

.PHONY: demo compare lint check test docs

demo: $(INSTALLED)
	$(VENV)/bin/python launchers/demo/run.py

compare: $(INSTALLED)
	$(VENV)/bin/python tools/compare_objectives.py

# Lint, format and types: what both sets of tests begin with.
lint: $(TESTABLE)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# The quick tests: no launches, nothing of more than about five seconds.
check: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadgroup -m "not (slow or launch or grid or real_size or compiles)"

# Two workers, since much of the suite is waiting for launches; tests of a file share what it launched, and stay together.
test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadgroup

# The guides, the configuration and the Python API as one site: build/docs/index.html.
docs: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(VENV)/bin/python -m sphinx -q -W --keep-going -c tools/docs . build/docs

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[shard,eval]'
	touch $@

# Triton is most of this, and only the tests of the kernels need it where PyTorch does not bring its own.
$(TESTABLE): $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[shard,eval,dev]'
	touch $@
