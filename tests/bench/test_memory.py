"""One step of ViT-B/16 with a 12-layer text tower under FSDP, compiled for 8 devices and never run."""

import json
import re

import jax
import pytest

from clipjax.bench.memory import MemoryBench, summary
from clipjax.cli import main
from clipjax.plan.machines import machine
from clipjax.plan.step import Step, described
from clipjax.plan.target import COMPILER_OPTIONS

DEVICES, LOCAL = 8, 2
ROWS = DEVICES * LOCAL


@pytest.fixture(scope="module")
def step():
    bench = MemoryBench(local_batch=LOCAL)
    step = Step.of(bench.planned(DEVICES), jax.devices(), ROWS)
    traced = step.trace()
    compiled = traced.lower().compile(compiler_options=COMPILER_OPTIONS["cpu"])
    found = described(step, traced, compiled, machine(bench.machine))
    return summary(found), compiled, step.blueprint


def test_each_device_holds_an_eighth(step):
    results, _, blueprint = step
    params = sum(leaf.size for leaf in jax.tree.leaves(blueprint.abstract.params))
    assert params == pytest.approx(149.62e6, rel=1e-3)  # CLIP ViT-B/16
    whole = 3 * 4 * params  # AdamW: two moments a parameter, all float32
    assert results["params"][1] + results["opt_state"][1] == pytest.approx(whole, rel=1e-6)
    assert whole / DEVICES <= results["held_bytes"] <= 1.05 * whole / DEVICES
    # What the compiled program takes and gives back in place is that, a few counters and the key.
    assert 0 <= results["state_bytes"] - results["held_bytes"] < 100


def test_batches_stay_split_and_only_weights_travel(step):
    """Sharded weights must not tempt the compiler to lay activations out like them."""
    results, compiled, _ = step
    text = compiled.as_text()
    for tokens in (197, 196, 77):
        assert f"[{LOCAL},{tokens}," in text
        assert not re.search(rf"\[{ROWS},{tokens}\b", text), (
            "tokens of the whole batch on one device"
        )
    # Gathered: every weight for the forward and again for the backward pass, the word table once.
    params = results["params"][1]
    table = 4 * 49408 * 512
    assert results["sent_bytes"]["all-gather"] == pytest.approx(
        7 / 8 * (2 * params - table), rel=0.02
    )
    # Summed: every gradient once. All-reduce costs twice a reduce-scatter, which CPUs do not get.
    assert results["sent_bytes"]["all-reduce"] == pytest.approx(2 * 7 / 8 * params, rel=0.02)


def test_from_the_command_line(capfd):
    options = ["--image", "S/32", "--text", "S", "--devices", "4", "--group", "2", "--tensor", "2"]
    options += ["--no_fsdp", "--local_batch", "4", "--accumulate", "2", "--dtype", "bfloat16"]
    assert main(["bench", "memory", *options, "--remat", "full", "--json"]) == 0
    results = json.loads(capfd.readouterr().out.splitlines()[-1])
    # No FSDP; over two tensor-parallel devices only the blocks' matrices are split.
    assert 0.5 < results["share"] < 1
    assert results["temp_bytes"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image", "B16"], "ViT preset 'B16'"),
        (["--text", "XL"], "TextTransformer preset 'XL'"),
        (["--devices", "0"], "devices=0 must be positive"),
        (["--image", "RN50", "--remat", "dots"], "ResNet.remat='dots'"),
    ],
)
def test_what_is_no_size_is_refused(options, words, capsys):
    assert main(["bench", "memory", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_resnet_brings_its_own_projection():
    model = MemoryBench(image="RN50").model()
    assert (model.embed_dim, model.image_projection) == (1024, "none")
