"""Combinations, what arithmetic says of them against what the compiler says, and a search from the command line."""

import dataclasses
import json
import sys

import jax
import pytest

from clipjax.bench.memory import MemoryBench
from clipjax.cli import main
from clipjax.objectives import AllGather, Grouped, Hierarchical, Ring, Softmax
from clipjax.plan.machines import machine
from clipjax.plan.parts import loss_bytes
from clipjax.plan.search import Candidate, candidates, expected, facts
from clipjax.plan.step import Step, described
from clipjax.plan.target import COMPILER_OPTIONS
from clipjax.towers import with_fields

BENCH = MemoryBench(image="Ti/32", text="S", dtype="float32", remat="norms", local_batch=4)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "searched_run.py"
    path.write_text(
        "from clipjax.bench.memory import MemoryBench\n\n\ndef config():\n"
        "    return MemoryBench(image='Ti/32', text='S', local_batch=2).planned(2)\n"
    )
    yield path
    sys.modules.pop("searched_run", None)


def planned(**fields):
    return dataclasses.replace(BENCH.planned(8), **fields)


def test_combinations_are_those_that_divide():
    run = planned()
    found = list(candidates(run, machine("cpux8"), [32, 48]))
    assert {c.accumulate for c in found if c.batch_size == 32} == {1, 2, 4}
    assert {c.accumulate for c in found if c.batch_size == 48} == {1, 2}
    assert {c.group for c in found} == {1, 4}
    assert {type(c.exchange) for c in found} == {AllGather, Ring, Hierarchical}
    # Hierarchical needs groups of several; without FSDP, groups are for it alone.
    assert {c.group for c in found if isinstance(c.exchange, Hierarchical)} == {4}
    assert {c.group for c in found if isinstance(c.exchange, Ring) and not c.fsdp} == {1}
    assert len(set(found)) == len(found)


def test_other_mathematics_is_left_alone():
    found = candidates(planned(exchange=Grouped()), machine("cpux8"), [32])
    assert {type(c.exchange) for c in found} == {Grouped}


def test_remat_goes_to_every_tower_that_knows_it():
    model = with_fields(BENCH.model(), remat="lean")
    assert (model.image.remat, model.text.remat) == ("lean", "lean")
    model = with_fields(MemoryBench(image="RN50", text="S").model(), remat="lean")
    assert (model.image.remat, model.text.remat) == ("none", "lean")  # a ResNet knows none and full


@pytest.mark.parametrize(
    ("exchange", "held", "sent"),
    # In units of one device's [32, 16] block: N = 256 on 8 devices, 2 groups of 4.
    [
        (AllGather(), 4 * 4 + 8 * (4 + 4), 7 * (4 + 4)),
        (Ring(), 4 * 4 + 2 * (4 + 4), 7 * 3 * 4),
        (Hierarchical(), 4 * 4 + 2 * 4 * (4 + 4), 3 * (4 + 4) + 3 * 4),
    ],
)
def test_what_the_loss_holds_and_sends(exchange, held, sent):
    run = planned(exchange=exchange, objective=Softmax())
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, batch_size=256),
        model=dataclasses.replace(run.model, embed_dim=16),
    )
    shape = (2, 4) if isinstance(exchange, Hierarchical) else (1, 8)
    assert loss_bytes(run, *shape) == (held * 32 * 16, sent * 32 * 16)


def test_arithmetic_is_near_the_compiler():
    """What it says decides only what is compiled; memory within 30 %, products within 5 %."""
    run, on = planned(), machine("cpux8")
    known = facts(run, on, 1000, ["norms"])
    candidate = Candidate(32, 1, "norms", 1, True, AllGather())
    said = expected(run, on, candidate, known)
    step = Step.of(candidate.applied(run), jax.devices(), 1000)
    traced = step.trace()
    compiled = traced.lower().compile(compiler_options=COMPILER_OPTIONS["cpu"])
    found = described(step, traced, compiled, on)
    assert said["state"] == found["state"]
    assert said["checkpoint"] == found["checkpoint"]
    assert said["temporary_parts"] == pytest.approx(found["temporary_parts"])
    assert said["forward"] == pytest.approx(found["forward"])
    assert said["flops"] == pytest.approx(found["flops"], rel=0.05)
    assert said["temporary"] == pytest.approx(found["temporary"], rel=0.3)
    assert said["sent"]["all-gather"] == pytest.approx(found["sent"]["all-gather"], rel=0.2)


def test_a_search_ranks_what_it_compiled(config, tmp_path, capsys):
    picture = tmp_path / "plan.svg"
    options = [
        "--on",
        "cpux2",
        "--search",
        "--most",
        "1",
        "--disk",
        "2",
        "--picture",
        str(picture),
        "--json",
    ]
    assert main(["plan", str(config), *options]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert found["combinations"] == found["left"] > found["compiled"] == 1
    best = found["ranked"][0]
    assert best["compiled"]["from"] == "compiler"
    assert best["estimated"]["checkpoint_seconds"] == best["compiled"]["checkpoint"] / 2e9
    assert "first: --data.batch_size 4 --accumulate 1" in printed
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch_sizes", "4"], "--batch_sizes is for --search"),
        (["--most", "3"], "--most is for --search"),
        (["--minutes", "1"], "--minutes is for --search"),
        (["--search", "--most", "0"], "--most 0 must be above 0"),
        (["--disk", "0"], "--disk 0.0 must be above 0"),
        (["--search", "--check"], "--check is for one plan"),
        (["--search", "--batch_sizes", "7"], "do not divide over 2 batch shards"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words, config, capsys):
    assert main(["plan", str(config), "--on", "cpux2", *options]) == 2
    assert words in capsys.readouterr().err
