# make demo       train the embedded model for eviction, evaluate it under eviction, print the table
# make test       the tests
# make test-oldest  the heart of the tests with the lowest versions that pyproject.toml admits, in an environment of its own
# make test-newest  the same with the newest versions; a failure names the package
# make bounds     raise the upper bounds in pyproject.toml to the newest releases, if the heart of the tests passes with them
# make lint       ruff and pyright
# make tables     run the tests of the model families and write the README's tables
# make demo-real  the same method on a real pretrained model (SmolLM2-135M)
# make evidence   all arms of docs/evidence.md, hours; go on where it was stopped by the same command
PYTHON ?= python3
BIN := .venv/bin
HEART := $(addprefix tests/test_,$(addsuffix .py,parity families simulation cache generation compiled foresight))
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-oldest test-newest bounds lint tables demo-real evidence clean

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

evidence: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python recipes/smollm2/evidence.py

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

# uv resolves to the lowest versions that pyproject.toml admits, and to the newest
.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
		--editable ".[eval,test]"
	touch $@

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 -m "not slow" $(HEART)

.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet uv
	.venv-newest/bin/uv pip install --quiet --python .venv-newest/bin/python --editable ".[eval,test]"
	touch $@

test-newest: .venv-newest/installed
	.venv-newest/bin/python .ci/newest.py $(HEART)

bounds: .venv-newest/installed .venv/installed
	.venv-newest/bin/python .ci/newest.py --raise $(HEART)
	PYTHONPATH=tests $(BIN)/python -c "import readme_tables; readme_tables.write('versions', readme_tables.version_table())"

tables: .venv/installed
	$(BIN)/python -m pytest tests/test_families.py --write-tables

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .venv-oldest .venv-newest runs
