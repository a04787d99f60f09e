"""What the trainer's tests share: the tiny run, started as a user would."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from clipjax.cli import main

TINY = Path(__file__).parent / "tiny.py"
VARIANT = """
import dataclasses
from pathlib import Path

from clipjax import Checkpointing, Run, load_config
from clipjax.data import *
from clipjax.evals import *
from clipjax.mesh import MeshShape
from clipjax.models import DualEncoder
from clipjax.objectives import *
from clipjax.optim import *
from clipjax.sharding import Rule, Sharding
from clipjax.tracking import *

replace = dataclasses.replace

def config():
    run = load_config(Path({tiny!r}))
    return replace(run, {change})
"""
_numbers = itertools.count()


@pytest.fixture
def read_metrics():
    return _read_metrics


def _read_metrics(workdir, name="loss"):
    """Step -> value of a metric, from `metrics.jsonl`; a step that is logged twice is an error."""
    values = {}
    for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if name in entry:
            assert entry["step"] not in values, f"step {entry['step']} is logged twice"
            values[entry["step"]] = entry[name]
    return values


@pytest.fixture
def tiny():
    """The config file of the tiny run."""
    return TINY


@pytest.fixture
def vary(tmp_path):
    """`vary("accumulate=2, ema=Ema(0.9)")`: a config file of the tiny run with fields replaced."""

    def write(change):
        path = tmp_path / f"variant_{next(_numbers)}.py"
        path.write_text(VARIANT.format(tiny=str(TINY), change=change))
        return path

    return write


@pytest.fixture
def clipjax(tmp_path, monkeypatch):
    """`clipjax("train", options...)`: the command line inside this process, on the tiny run in `tmp_path/run`.

    `devices` is how many of the simulated devices it sees.
    """
    everything = jax.devices()

    def run(verb, *options, workdir=tmp_path / "run", config=TINY, devices=1):
        monkeypatch.setattr("clipjax.mesh.jax.devices", lambda: everything[:devices])
        place = ["--workdir", str(workdir)] if verb == "train" else []
        target = str(config) if verb in ("train", "config") else str(workdir)
        return main([verb, target, *place, *map(str, options)])

    run.workdir = tmp_path / "run"
    return run


@pytest.fixture
def spawn():
    """`spawn("train", ...)`: the command line in a process of its own, for what kills it."""
    started = []

    def start(*arguments, devices=1, command=(sys.executable, "-m", "clipjax.cli"), **environment):
        flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
        process = subprocess.Popen(
            [*map(str, command), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": flags} | environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def wait_for():
    return _wait_for


def _wait_for(condition, process, seconds=300):
    """Polls until the condition holds; fails with the process's own words when it ends before that."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
