PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INTEROP := .venv-interop

.PHONY: quickstart test test-interop test-stores test-targets check lint clean

# Downloads only Python packages; the data set is made from two of them.
quickstart: $(VENV)/.installed-quickstart
	$(BIN)/clipjax train configs/quickstart.py --workdir runs/quickstart

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Files and strings through transformers, OpenCLIP, CLIP_benchmark, sentence-transformers, in an environment of its own.
test-interop: $(INTEROP)/.installed
	rm -rf $(INTEROP)/exports
	$(INTEROP)/bin/python tests/interop/reference/export_all.py $(INTEROP)/exports
	$(INTEROP)/bin/python tests/interop/reference/check_all.py $(INTEROP)/exports
	$(INTEROP)/bin/python tests/interop/reference/check_clients.py $(INTEROP)/exports

# A slice of every room, in under three minutes on two cores; `make test` is all of them.
CHECK := tests/test_component.py tests/test_sharding.py tests/test_public_names.py tests/objectives/test_identities.py \
  tests/models/test_heads.py tests/towers/test_vit.py tests/data/test_fields.py tests/data/test_loader.py \
  tests/optim/test_schedules.py tests/evals/test_metrics.py tests/generation/test_search.py tests/interop/test_clip_bpe.py \
  tests/tracking tests/train/test_step.py tests/methods/test_registry.py

check: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -x $(CHECK) --deselect tests/methods/test_registry.py::test_every_config_trains

# Against servers of S3 and Google Cloud Storage on loopback, with faults on the way.
test-stores: $(VENV)/.installed-test-stores
	$(BIN)/python -m pytest tests/stores

# Compiles small steps for TPUs and GPUs; needs neither.
test-targets: $(VENV)/.installed-test $(VENV)/.installed-plan-tpu $(VENV)/.installed-plan-gpu
	$(BIN)/python -m pytest tests/targets

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
