# make demo       train the embedded model for eviction, evaluate it under eviction, print the table
# make test       the tests
# make test-oldest  the heart of the tests with the oldest supported transformers, in an environment of its own
# make lint       ruff and pyright
# make tables     run the tests of the model families and write the README's tables
# make demo-real  the same method on a real pretrained model (SmolLM2-135M)
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-oldest lint tables demo-real clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'vkvtrain needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[eval,deepspeed,tensorboard,gguf,gym,dev]"
	touch $@

demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python recipes/tiny/demo.py

demo-real: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python recipes/smollm2/demo.py

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

.venv-oldest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-oldest/bin/python -m pip install --quiet "transformers==5.17.0" --editable ".[eval]" pytest pytest-xdist hypothesis
	touch $@

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 -m "not slow" $(addprefix tests/test_,$(addsuffix .py,parity families simulation cache generation compiled foresight))

tables: .venv/installed
	$(BIN)/python -m pytest tests/test_families.py --write-tables

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .venv-oldest runs
