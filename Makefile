PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INTEROP := .venv-interop

.PHONY: quickstart test test-interop lint clean

# Downloads only Python packages; the data set is made from two of them.
quickstart: $(VENV)/.installed-quickstart
	$(BIN)/clipjax train configs/quickstart.py --workdir runs/quickstart

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# Files and strings through transformers and OpenCLIP, in an environment of its own.
test-interop: $(INTEROP)/.installed
	rm -rf $(INTEROP)/exports
	$(INTEROP)/bin/python tests/interop/reference/export_all.py $(INTEROP)/exports
	$(INTEROP)/bin/python tests/interop/reference/check_all.py $(INTEROP)/exports

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(INTEROP) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(INTEROP)/.installed: pyproject.toml
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --editable '.[interop,test]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
