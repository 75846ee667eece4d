# Everything goes through .venv; torch is pinned because an unpinned one pulls gigabytes.
PYTHON ?= python3
BIN := .venv/bin
DEVICES := "laptop=cpu:12MiB@0.5, desk=cpu:13MiB, old=cpu:9MiB@0.3"

.PHONY: run test test-nightly check clean

run: .venv/run.stamp
	$(BIN)/apportion run demo "ROMEO:" --devices $(DEVICES) --max-tokens 150 --temperature 0.8 --seed 3

test: .venv/test.stamp
	$(BIN)/pytest

test-nightly: .venv/test.stamp
	$(BIN)/python scripts/nightly.py

check: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

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
