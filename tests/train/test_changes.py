"""Settings that may change while a run goes on, and what stays true when they do."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from clipjax import open_pretrained
from clipjax.checkpoint import Checkpoints
from clipjax.meta import Meta
from clipjax.optim import AdamW, Cosine, Duration, Group, Scale
from clipjax.params import paths
from clipjax.train.resume import _place


@pytest.fixture
def shown(monkeypatch):
    """The `id`s of every batch that the loop feeds, in order."""
    from clipjax.data.placement import to_global

    seen = []

    def watch(batch, mesh):
        placed = to_global(batch, mesh)
        seen.append(np.array(placed["id"]))
        return placed

    monkeypatch.setattr("clipjax.train.loop.to_global", watch)
    return seen


def state(workdir, step):
    """Path -> array of a saved state, read by Orbax alone."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return {
            n: np.asarray(x)
            for n, x in paths(reader.restore(workdir / f"checkpoints/{step}/state"))
        }


def test_another_batch_size_loses_and_repeats_nothing(clipjax, read_metrics, vary, shown, caplog):
    """Four epochs of 64: 5 steps of 16, then 8 of 24: F12's run, which ended two epochs early."""
    config = vary(
        "evals=(), optimizer=AdamW(lr=1.0, schedule=Cosine()), checkpoint=Checkpointing(every=None)"
    )
    length = ("--duration.unit", "epochs", "--duration.amount")
    assert clipjax("train", *length, 1.25, config=config) == 0
    assert clipjax("train", *length, 4, "--data.batch_size", 24, config=config) == 0
    ids = np.concatenate(shown)
    assert [len(batch) for batch in shown] == [16] * 5 + [24] * 7
    assert len(ids) == 248  # 256, to the nearest whole step
    for epoch in range(3):
        assert sorted(ids[epoch * 64 : (epoch + 1) * 64]) == list(range(64))
    assert len(set(ids[192:])) == 56
    # The schedule is a function of the share of the examples that were seen.
    rates = read_metrics(clipjax.workdir, "lr")
    total = 12 + (80 - 5 * 24) / 24
    for step in range(6, 13):
        progress = min((80 + 24 * (step - 6)) / 24 / round(total), 1)
        assert rates[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * progress)), abs=1e-6)
    meta = Checkpoints(clipjax.workdir).meta(12)
    assert (meta.step, meta.examples_seen, meta.num_examples) == (12, 248, 64)
    # And on: the same command, then another size once more.
    del shown[:]
    assert clipjax("train", *length, 5, "--data.batch_size", 8, config=config) == 0
    assert sorted(np.concatenate(shown)[8:]) == list(range(64))
    assert set(np.concatenate(shown)[:8]) == set(range(64)) - set(ids[192:])


def test_durations_after_a_change():
    scale = Scale(batch_size=8, num_examples=10, shift=20 - 5 * 8)
    assert Duration(4, "epochs").last_step(scale) == 8  # 5 steps of 4, then 3 of 8
    assert Duration(40, "examples").last_step(scale) == 8
    assert Duration(9).last_step(scale) == 9
    assert Duration(1, "epochs").steps(Scale(4, 10)) == 3  # 2.5: a half counts as one
    for batch in (3, 4, 7):
        for start in range(4):  # a run that goes on unchanged ends where it would have ended
            same = Scale(batch, 10, shift=0)
            assert Duration(3, "epochs").last_step(same) == Duration(3, "epochs").steps(same), start


def test_four_restarts_that_change_the_optimizer_the_average_and_the_mesh(
    clipjax, read_metrics, vary, shown, caplog
):
    """clip_norm, EMA, a group's start, batch size and mesh, one after the other: the run goes on, and sees every
    example once an epoch."""
    base = "evals=(), checkpoint=Checkpointing(every=None, keep=9), "
    held = "groups=(Group('^text/', starts=Duration(9)),)"
    plain = vary(base + "optimizer=AdamW(lr=1e-2, schedule=Constant(), clip_norm=None)")
    clipped = vary(base + "optimizer=AdamW(lr=1e-2, schedule=Constant(), clip_norm=1e-3)")
    averaged = vary(base + f"ema=Ema(0.5), optimizer=AdamW(lr=1e-2, schedule=Constant(), {held})")
    wider = ("--data.batch_size", 32, "--sharding.fsdp", "--sharding.min_size", 16)
    assert clipjax("train", "--duration.amount", 2, config=plain) == 0
    assert clipjax("train", "--duration.amount", 4, config=clipped) == 0
    assert clipjax("train", "--duration.amount", 6, config=averaged) == 0
    two, four, six = (state(clipjax.workdir, step) for step in (2, 4, 6))
    counts = {n for n in two if n.startswith("opt_state") and n.endswith("count")}
    assert counts == {f"opt_state/{stage}/count" for stage in ("rule", "hold", "lr")}
    assert [int(s["opt_state/rule/count"]) for s in (two, four, six)] == [2, 4, 6]
    # A new average begins as the weights were: decay min(0.5, (1 + step) / (10 + step)) twice.
    name = "image_projection/kernel"
    assert clipjax("train", "--duration.amount", 5, "--from-step", 4, config=averaged) == 0
    five = state(clipjax.workdir, 5)
    decay = 5 / 14
    expected = decay * four[f"params/{name}"] + (1 - decay) * five[f"params/{name}"]
    np.testing.assert_allclose(five[f"ema/{name}"], expected, rtol=1e-5, atol=1e-7)
    # The group stands still until step 9 although it moved before.
    moved = {n: np.abs(five[n] - four[n]).max() for n in four if n.startswith("params/")}
    assert all((moved[n] == 0) == n.startswith("params/text/") for n in moved)
    length = ("--duration.unit", "examples", "--duration.amount", 5 * 16 + 5 * 32)
    assert clipjax("train", *length, *wider, config=clipped, devices=4) == 0
    assert [len(batch) for batch in shown] == [16] * 7 + [32] * 5
    ids = np.concatenate(shown[:4] + shown[6:])  # steps 5 and 6 were gone back behind
    for epoch in range(3):
        assert sorted(ids[epoch * 64 : (epoch + 1) * 64]) == list(range(64))
    assert len(set(ids[192:])) == 48
    assert sorted(read_metrics(clipjax.workdir)) == list(range(1, 11))
    assert not any(n.startswith("ema/") for n in state(clipjax.workdir, 10))
    assert "no longer used: ema" in caplog.text
    meta = Checkpoints(clipjax.workdir).meta(10)
    assert meta.examples_seen == 5 * 16 + 5 * 32


def test_checkpoints_of_format_1_open(clipjax, read_metrics, vary, capfd):
    """The optimizer's stages by position, no checksums, no count of examples: what was written before."""
    config = vary(
        "evals=(), optimizer=AdamW(lr=1e-2, groups=(Group('^text/', starts=Duration(1)),)), "
        "checkpoint=Checkpointing(every=Every(2), keep=9)"
    )
    assert clipjax("train", "--duration.amount", 4, config=config) == 0
    expected = read_metrics(clipjax.workdir)
    checkpoints = clipjax.workdir / "checkpoints"
    new = Checkpoints(clipjax.workdir)
    meta, leaves = new.meta(2), state(clipjax.workdir, 2)
    new.close()
    for folder in list(checkpoints.iterdir()):
        folder.rename(clipjax.workdir.with_name(f"new_{folder.name}"))
    order = ["clip", "rule", "decay", "scale", "hold", "lr"]
    tree = {}
    for name, leaf in leaves.items():
        parts = name.split("/")
        if parts[0] != "opt_state":
            node = tree
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = jnp.asarray(leaf)
    stages_of = [{} for _ in order]
    for name, leaf in leaves.items():
        parts = name.split("/")
        if parts[0] == "opt_state" and parts[1] in order:
            node = stages_of[order.index(parts[1])]
            for part in parts[2:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = jnp.asarray(leaf)
    tree["opt_state"] = tuple(stages_of)
    old = {"format": 1, "run": json.loads(json.dumps(meta.run)), "tokenizer": meta.tokenizer}
    with ocp.CheckpointManager(checkpoints) as manager:
        manager.save(
            2,
            args=ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(old)),
        )
    assert Meta.from_json(old, "here").examples(2) == 32
    opened = dict(paths(open_pretrained(clipjax.workdir).params))
    np.testing.assert_array_equal(
        opened["text_projection/kernel"], leaves["params/text_projection/kernel"]
    )
    assert clipjax("train", "--duration.amount", 4, config=config) == 0
    assert read_metrics(clipjax.workdir) == expected
    capfd.readouterr()
    lion = vary("evals=(), optimizer=Lion(schedule=Constant())")
    assert clipjax("train", "--duration.amount", 5, config=lion) == 2
    assert "AdamW there and Lion here" in capfd.readouterr().err
    # Without clipping or held groups, the stages stood elsewhere.
    bare = dataclasses.replace(Meta.from_json(old, "here"), run={"optimizer": {"clip_norm": None}})
    saved = {"opt_state/0/mu/x", "opt_state/3/count"}
    assert _place("opt_state/rule/mu/x", bare, saved) == "opt_state/0/mu/x"
    assert _place("opt_state/lr/count", bare, saved) == "opt_state/3/count"
    assert _place("opt_state/hold/count", bare, saved) not in saved


def test_schedules_and_holds_go_by_examples_after_a_change():
    """Against the closed form: half of a cosine over 100 examples, and a group that starts after 40."""
    scale = Scale(batch_size=10, num_examples=100, shift=-20)
    optimizer = AdamW(
        lr=1.0, schedule=Cosine(), groups=(Group("a", starts=Duration(40, "examples")),)
    )
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    transform, rate = optimizer.build(params, 12, scale)
    assert float(rate(7)) == pytest.approx(0.5)  # 7 steps of 10, less 20: half of the way
    opt_state = transform.init(params)
    moved = []
    for _ in range(8):
        updates, opt_state = transform.update(params, opt_state, params)
        moved.append(bool(np.any(updates["a"])))
    assert moved == [False] * 6 + [True] * 2  # 40 examples after 6 steps
