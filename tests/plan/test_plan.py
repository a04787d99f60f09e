"""Machines by name, arithmetic by hand, and a run planned from the command line."""

import dataclasses
import json
import sys

import pytest
from rich.console import Console

from clipjax.cli import main
from clipjax.config import load_config
from clipjax.errors import ClipjaxError
from clipjax.optim import Duration
from clipjax.plan.estimate import estimate
from clipjax.plan.machines import machine
from clipjax.plan.table import show
from clipjax.plan.target import devices
from clipjax.towers import with_fields

CONFIG = """
from clipjax import Run, Sharding
from clipjax.data import BPE, Data, Tfds
from clipjax.models import DualEncoder
from clipjax.objectives import Softmax
from clipjax.optim import AdamW, Duration
from clipjax.towers import TextTransformer, ViT


def config():
    tower = dict(width=32, depth=2, heads=2)
    return Run(
        model=DualEncoder(
            image=ViT(image_size=16, patch_size=4, **tower),
            text=TextTransformer(vocab_size=320, context_length=8, **tower),
            embed_dim=16,
        ),
        objective=Softmax(),
        data=Data(Tfds("none"), BPE(vocab_size=320), image_size=16, batch_size=8, context_length=8),
        optimizer=AdamW(),
        duration=Duration(1000),
        sharding=Sharding(fsdp=True, min_size=1024),
    )
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "planned_run.py"
    path.write_text(CONFIG)
    yield path
    sys.modules.pop("planned_run", None)


@pytest.mark.parametrize(
    ("name", "count", "topology"),
    [
        ("v5e-256", 256, "v5e:16x16"),
        ("v5litepod-16", 16, "v5e:4x4"),  # as the cloud calls it
        ("cpux12", 12, "1x1x12"),
        ("v6e-64", 64, "v6e:8x8"),
        ("v5p-128", 64, "v5p:4x4x4"),  # cores
        ("h100x64", 64, "1x8x8"),
        ("h200x16", 16, "1x2x8"),
        ("a100x4", 4, "1x1x4"),
    ],
)
def test_machines(name, count, topology):
    found = machine(name)
    assert (found.devices, found.topology) == (count, topology)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "no such machine.*v5e-256"),
        ("tpu-8", r"chip \(v5e, v5p, v6e, h100, h200, a100, cpu\) and a number"),
        ("cpux0", "at least one"),
        ("v5e-48", "TPU v5e slices come in sizes 1, 4, 8"),
        ("v5p-7", "slices come in sizes 8, 16"),
        ("h100x12", "whole hosts of 8"),
    ],
)
def test_what_is_no_machine_is_refused(name, words):
    with pytest.raises(ClipjaxError, match=words):
        machine(name)


def test_without_its_compiler_a_machine_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ClipjaxError, match=r"pip install 'clipjax\[plan-tpu\]'"):
        devices(machine("v5e-4"))


def test_the_roofline_by_hand(config):
    """A v5e chip makes 197e12 operations, moves 819e9 bytes and sends 200e9 bytes a second,
    half of it in a square of four, where it has two neighbors and not four."""
    found = {
        "state": {"params": 1e9, "opt_state": 2e9}, "temporary": 4e9, "arguments": 3e9,
        "sent": {"all-gather": 6e9, "all-reduce": 4e9}, "flops": 4 * 39.4e12, "forward": 4 * 9.85e12,
        "batch": 0, "checkpoint": 12e9, "temporary_parts": {"activations": 3e9, "loss": 2e9},
    }  # fmt: skip
    got = estimate(load_config(config), machine("v5e-4"), found, None)
    assert got["fits"] and got["held"] == 7e9 and got["memory"] == 16e9
    assert got["seconds"]["products"] == pytest.approx(0.2)
    assert got["seconds"]["memory"] == pytest.approx(2 * 7e9 / 819e9)
    assert got["seconds"]["ICI"] == pytest.approx(0.1)
    # 4 chips are one host, which writes 1 GB a second. Parts are no more than the compiler's sum.
    assert got["checkpoint_seconds"] == 12
    assert got["parts"]["activations"] == 3e9 and got["parts"]["loss"] == 1e9
    assert sum(got["parts"].values()) == got["held"]
    assert (got["limit"], got["step"]) == ("products", pytest.approx(0.2))
    assert got["mfu"] == pytest.approx(0.75)  # 3 x 9.85 of 39.4
    assert got["pairs_per_second"] == got["pairs_per_host"] == pytest.approx(40)
    assert got["images_per_host"] == pytest.approx(40)  # a pair has one picture
    assert (got["steps"], got["hours"]) == (1000, pytest.approx(200 / 3600))
    assert got["chip_hours"] == pytest.approx(800 / 3600)
    assert not estimate(load_config(config), machine("v5e-4"), found | {"temporary": 14e9}, 1)[
        "fits"
    ]


def test_between_hosts_bytes_take_the_network(config):
    """An H100 sends 450 GB/s over NVLink and 50 GB/s to other hosts."""
    found = {
        "state": {}, "temporary": 0, "arguments": 0, "batch": 0, "checkpoint": 0, "temporary_parts": {},
        "sent": {"all-gather": 10e9, "all-reduce": 2e9}, "network": {"all-reduce": 2e9},
        "flops": 0, "forward": 1,
    }  # fmt: skip
    got = estimate(load_config(config), machine("h100x64"), found, None)
    assert got["seconds"]["NVLink"] == pytest.approx(10 / 450)
    assert got["seconds"]["network"] == pytest.approx(2 / 50)
    assert got["limit"] == "network"
    assert "network" not in estimate(load_config(config), machine("h100x8"), found, None)["seconds"]


def test_a_run_is_planned_from_the_command_line(config, capsys):
    assert main(["plan", str(config), "--on", "cpux2", "--json", "--data.batch_size", "4"]) == 0
    printed = capsys.readouterr().out
    assert "simulated CPU devices, 4 pairs a step" in printed and "FSDP over 2 devices" in printed
    found = json.loads(printed.splitlines()[-1])["compiled"]
    assert (found["devices"], found["shards"]) == (2, 2)
    assert found["batch"] == 2 * (16 * 16 * 3 + 8 * 4 + 4 + 4)  # pixels, tokens, id, sample
    assert found["state"]["opt_state"] == pytest.approx(2 * found["state"]["params"], rel=0.01)
    # A tower's products, forward: 4 + 8 squares of the width a token and block, attention, ends.
    image, text = 17, 8
    blocks = sum(2 * (2 * 12 * 32**2 * n + 2 * 2 * n * n * 32) for n in (image, text))
    ends = 2 * 16 * 48 * 32 + 2 * 2 * 32 * 16
    assert found["forward"] == 4 * (blocks + ends)
    # Thrice, less what pixels would get, and the loss.
    assert 2.9 * found["forward"] < found["flops"] < 3.3 * found["forward"]
    assert found["temporary"] > 0 and found["sent"]
    assert found["checkpoint"] == found["state_total"]["params"] + found["state_total"]["opt_state"]
    assert found["whole"][0][0].endswith("image/positions")  # 17 x 32, below min_size
    # A block keeps 14 [N, D] and what its norms and its softmax divide by; ends besides.
    kept = 4 * 32 * 2 * sum(14 * n for n in (image, text))
    assert kept < found["temporary_parts"]["activations"] / 2 < 1.4 * kept


def test_what_a_step_takes_for_real_is_what_was_predicted(config, capsys):
    words = ["--on", "cpux2", "--check", "--json", "--data.batch_size", "1024"]
    assert main(["plan", str(config), *words]) == 0
    printed = capsys.readouterr().out
    answer = json.loads(printed.splitlines()[-1])
    found, told = answer["compiled"], 2 * answer["estimated"]["held"]
    assert found["temporary"] > 50e6  # large beside what a process needs besides
    assert told == pytest.approx(found["measured"], rel=0.1)
    assert "run for real" in printed and 0 < found["stays"] < 200e6
    # The loop has two batches waiting behind the one under way.
    assert found["waiting"] == 2 * found["batch"] == 2 * 512 * (16 * 16 * 3 + 8 * 4 + 4 + 4)
    assert answer["estimated"]["parts"]["batches waiting"] == found["waiting"]


def test_only_cpus_are_checked(config, capsys):
    assert main(["plan", str(config), "--on", "v5e-4", "--check"]) == 2
    assert "--on v5e-4 is no cpuxN" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_refused(config, capsys):
    assert main(["plan", str(config), "--on", "cpux3"]) == 2
    assert "data.batch_size=8 does not divide over 3 batch shards" in capsys.readouterr().err


def test_float32_is_slower_on_a_gpu_alone(config):
    """TensorFloat-32: 494.5 of an H100's 989e12 operations a second. TPUs round to bfloat16."""
    found = {
        "state": {}, "temporary": 0, "arguments": 0, "batch": 0, "checkpoint": 0, "temporary_parts": {},
        "sent": {}, "flops": 8 * 98.9e12, "forward": 8 * 98.9e12 / 4,
    }  # fmt: skip
    run, gpus, tpus = load_config(config), machine("h100x8"), machine("v5e-8")
    got = estimate(run, gpus, found, None)
    assert got["seconds"]["products"] == pytest.approx(0.2)
    assert got["mfu"] == pytest.approx(0.375)  # of the peak in bfloat16, as the trainer's
    half = dataclasses.replace(run, model=with_fields(run.model, dtype="bfloat16"))
    assert estimate(half, gpus, found, None)["seconds"]["products"] == pytest.approx(0.1)
    for at in (run, half):
        assert estimate(at, tpus, found, None)["seconds"]["products"] == pytest.approx(98.9 / 197)


@pytest.mark.parametrize(
    ("name", "share"),
    [("v5e-1", 1), ("v5e-4", 1 / 2), ("v5e-8", 3 / 4), ("v5e-16", 1), ("v5p-8", 1 / 3), ("v5p-128", 1)],
)  # fmt: skip
def test_a_chip_sends_to_as_many_neighbors_as_it_has(name, share):
    on = machine(name)
    assert on.link == pytest.approx(share * on.chip.link)


def test_epochs_without_examples_are_planned(config, capsys):
    epochs = ["--duration.unit", "epochs", "--duration.amount", "20"]
    command = ["plan", str(config), "--on", "cpux1", *epochs]
    assert main([*command, "--optimizer.schedule.warmup.amount", "30"]) == 0
    assert main([*command, "--examples", "-5"]) == 2
    assert "--examples -5 must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize("held", [60e9, 70e9, 90e9])
def test_what_jax_leaves_of_a_gpu_is_said(config, capsys, held):
    found = {
        "state": {}, "temporary": held, "arguments": 0, "batch": 0, "checkpoint": 0, "temporary_parts": {},
        "sent": {}, "network": {}, "flops": 1, "forward": 1, "shards": 8, "devices": 8, "on_host": 0,
        "layout": "", "whole": [],
    }  # fmt: skip
    epochs = Duration(2, "epochs")
    run, on = dataclasses.replace(load_config(config), duration=epochs), machine("h100x8")
    show(Console(width=140), run, on, found, estimate(run, on, found, None))
    told = capsys.readouterr().out
    assert "unknown: --examples" in told and "what the kinds leave" in told
    assert ("XLA_PYTHON_CLIENT_MEM_FRACTION" in told) == (held == 70e9)
    assert ("It does not fit" in told) == (held == 90e9)
