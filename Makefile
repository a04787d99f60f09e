PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-targets lint clean

# Downloads only Python packages; the data set is made from two of them.
quickstart: $(VENV)/.installed-quickstart
	$(BIN)/clipjax train configs/quickstart.py --workdir runs/quickstart

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# Compiles small steps for TPUs and GPUs; needs neither.
test-targets: $(VENV)/.installed-test $(VENV)/.installed-plan-tpu $(VENV)/.installed-plan-gpu
	$(BIN)/python -m pytest tests/targets -n 2

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
