"""Optimizer state that waits in the host's memory between steps: the same numbers, and a run that goes on."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from clipjax import Sharding
from clipjax.cli import main
from clipjax.errors import ClipjaxError
from clipjax.mesh import AXES
from clipjax.sharding import on_host

TINY = Path(__file__).parent / "tiny.py"


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_with_its_optimizer_on_the_host(tmp_path):
    def train(name, steps, *options):
        settings = ["--duration.amount", str(steps), "--sharding.min_size", "64", *options]
        assert main(["train", str(TINY), "--workdir", str(tmp_path / name), *settings]) == 0

    offloaded = "--sharding.offload", "^opt_state/"
    train("plain", 4)
    train("host", 3, *offloaded)
    train("host", 4, *offloaded)
    np.testing.assert_allclose(losses(tmp_path / "host"), losses(tmp_path / "plain"), rtol=1e-6)


def test_what_waits_on_the_host():
    tree = {
        "opt_state": {"mu": jax.ShapeDtypeStruct((64, 64), "float32"), "count": jax.ShapeDtypeStruct((), "int32")},
        "params": {"kernel": jax.ShapeDtypeStruct((64, 64), "float32")},
    }  # fmt: skip
    mesh = AbstractMesh((1, 4, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    found = Sharding(fsdp=True, offload="^opt_state/").apply(tree, mesh)
    assert on_host(found["opt_state"]["mu"]) and "data" in found["opt_state"]["mu"].spec
    assert not on_host(found["opt_state"]["count"])  # small
    assert not on_host(found["params"]["kernel"])
    with pytest.raises(ClipjaxError, match="sharding.offload='\\(' is no regular expression"):
        Sharding(offload="(")
