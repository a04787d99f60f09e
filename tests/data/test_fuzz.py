"""A small share of what `fuzz.py` tries."""

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused(tmp_path):
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    found = fuzz.run(0, 400, tmp_path)
    assert sum(found.values()) == 400
    for kind in fuzz.KINDS:
        assert found[kind, "read"] + found[kind, "refused"] > 0
