# Everything goes through .venv; torch is pinned because an unpinned one pulls gigabytes.
PYTHON ?= python3
BIN := .venv/bin
DEVICES := "laptop=cpu:12MiB@0.5, desk=cpu:13MiB, old=cpu:9MiB@0.3"

.PHONY: run test test-fast test-nightly check lint format types imports clean

run: .venv/run.stamp
	$(BIN)/apportion run demo "ROMEO:" --devices $(DEVICES) --max-tokens 150 --temperature 0.8 --seed 3

test: .venv/test.stamp
	$(BIN)/python scripts/test.py

# All that only computes, without enumeration.
test-fast: .venv/test.stamp
	$(BIN)/python scripts/test.py --fast

test-nightly: .venv/test.stamp
	$(BIN)/python scripts/nightly.py

check: .venv/test.stamp
	+$(MAKE) --no-print-directory --jobs 4 --keep-going types imports lint format

types:
	$(BIN)/basedpyright --threads 2 --pythonpath $(BIN)/python

imports:
	$(BIN)/lint-imports

lint:
	$(BIN)/ruff check .

format:
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build src/*.egg-info

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/run.stamp: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[run]"
	touch $@

.venv/test.stamp: .venv/run.stamp
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@
