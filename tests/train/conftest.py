"""What the trainer's tests share: the tiny run, started as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from clipjax.cli import main

TINY = Path(__file__).parent / "tiny.py"


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

    def start(*arguments, devices=1, **environment):
        env = (
            os.environ
            | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
            | environment
        )
        command = [sys.executable, "-m", "clipjax.cli", *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )

    return start
