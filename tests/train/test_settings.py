"""Every setting of the trainer does what it says, from the command line or a config file."""

import json
import logging
import math
import re

import jax
import numpy as np
import pytest

from clipjax import open_pretrained
from clipjax.checkpoint import Checkpoints
from clipjax.component import differences
from clipjax.params import paths


def weights(path):
    return {name: np.asarray(leaf) for name, leaf in paths(open_pretrained(path).params)}


def saved_dtypes(workdir, step):
    """Path -> dtype of the saved state."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(workdir / "checkpoints" / str(step) / "state").item_metadata.tree
    return {name: leaf.dtype for name, leaf in paths(tree)}


def steps_kept(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Losses of three steps of the tiny run on one device."""
    losses = {}

    def get(clipjax, read_metrics, vary):
        if not losses:
            folder = tmp_path_factory.mktemp("plain")
            assert (
                clipjax("train", config=vary("duration=Duration(3), evals=()"), workdir=folder) == 0
            )
            losses.update(read_metrics(folder))
        return losses

    return get


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (1, "--accumulate 4 --model.image.remat activation --model.text.remat dots --pair_tile_mb 0.001"),
        (1, "--model.image.scan False --model.text.remat full --model.text.scan_unroll 2 --pair_chunk 4"),
        (8, "--mesh.group 2 --mesh.tensor 2 --sharding.fsdp --sharding.min_size 16 --accumulate 2 "
            "--pair_kernel fused --pair_precision high"),
    ],
)  # fmt: skip
def test_what_must_not_change_the_mathematics(clipjax, read_metrics, vary, plain, devices, options):
    config = vary("duration=Duration(3), evals=(), exchange=Auto()")
    expected = plain(clipjax, read_metrics, vary)
    assert clipjax("train", *options.split(), config=config, devices=devices) == 0
    got = read_metrics(clipjax.workdir)
    assert got == pytest.approx(expected, rel=1e-4)


def test_bfloat16_changes_little_and_a_seed_everything(
    clipjax, read_metrics, vary, plain, tmp_path
):
    expected = plain(clipjax, read_metrics, vary)
    config = vary("duration=Duration(3), evals=(), exchange=Ring()")
    names = ("pair_dtype", "pair_grads", "model.image.dtype", "model.text.dtype")
    low = [word for name in names for word in (f"--{name}", "bfloat16")]
    assert clipjax("train", *low, config=config, devices=2) == 0
    got = read_metrics(clipjax.workdir)
    assert got != pytest.approx(expected, rel=1e-5)
    assert got == pytest.approx(expected, rel=0.1)
    other = tmp_path / "other"
    assert clipjax("train", "--seed", 1, config=config, workdir=other) == 0
    assert read_metrics(other)[1] != pytest.approx(expected[1], rel=1e-3)


OPTIMIZERS = {
    # Name: (optimizer, duration, steps, learning rate at a 0-based step, dtype of a saved moment)
    "lion": (
        "Lion(lr=1e-3, mu_dtype='bfloat16', schedule=Linear(warmup=Duration(2), final=0.1))",
        "Duration(1.5, 'epochs')", 6,
        lambda s: 1e-3 * ((s + 1) / 2 if s < 2 else 1 - 0.9 * (s - 2) / 4), "bfloat16",
    ),
    "adamw": (
        "AdamW(lr=1e-3, mu_dtype='bfloat16', clip_norm=None, schedule=Cosine(final=0.5))",
        "Duration(80, 'examples')", 5,
        lambda s: 1e-3 * (0.5 + 0.25 * (1 + math.cos(math.pi * s / 5))), "bfloat16",
    ),
    "sgd": (
        "SGD(lr=0.02, nesterov=True, schedule=ReciprocalSqrt(warmup=Duration(16, 'examples'), "
        "timescale=Duration(4)))",
        "Duration(5)", 5, lambda s: 0.02 * (1 if s < 1 else 2 / math.sqrt(4 + s - 1)), "float32",
    ),
    "adafactor": (
        "Adafactor(lr=1e-2, schedule=WarmupStableDecay(cooldown=Duration(2), sqrt=False))",
        "Duration(5)", 5, lambda s: 1e-2 * (1 if s < 3 else 1 - (s - 3) / 2), "bfloat16",
    ),
    "muon": ("Muon(lr=3e-3, schedule=Constant())", "Duration(5)", 5, lambda s: 3e-3, "float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_schedules_and_durations(clipjax, read_metrics, vary, name):
    optimizer, duration, count, rate, dtype = OPTIMIZERS[name]
    config = vary(f"optimizer={optimizer}, duration={duration}, evals=()")
    assert clipjax("train", config=config) == 0
    loss, lr = read_metrics(clipjax.workdir), read_metrics(clipjax.workdir, "lr")
    assert sorted(loss) == list(range(1, count + 1))
    assert loss[count] < loss[1]
    for step, value in lr.items():
        assert value == pytest.approx(rate(step - 1), rel=1e-5), step
    kinds = {d for n, d in saved_dtypes(clipjax.workdir, count).items()
             if n.startswith("opt_state/") and n.endswith("fc1/kernel")}  # fmt: skip
    assert dtype in map(str, kinds)


def test_groups_freeze_scale_and_decay(clipjax, read_metrics, vary):
    """LiT, a faster head, and weight decay by itself: with lr 0 for the text tower nothing moves but by decay."""
    groups = (
        "Group('^image/', frozen=True), Group('^text/blocks/', lr=0.0), "
        "Group('^text_projection/', lr=2.0, weight_decay=0.0)"
    )
    config = vary(
        f"optimizer=Lion(lr=1e-3, weight_decay=0.0, schedule=Constant(), groups=({groups},)), "
        "duration=Duration(2), evals=(), checkpoint=Checkpointing(every=Duration(1), keep=5)"
    )
    assert clipjax("train", config=config) == 0
    first, last = (weights(clipjax.workdir / "checkpoints" / s) for s in "12")
    change = {name: np.abs(last[name] - first[name]).max() for name in first}
    assert all(change[n] == 0 for n in change if n.startswith(("image/", "text/blocks/")))
    assert not any("/image/" in n for n in saved_dtypes(clipjax.workdir, 2) if "opt_state" in n)
    # Lion moves every weight by exactly the learning rate.
    assert change["image_projection/kernel"] == pytest.approx(1e-3, rel=1e-3)
    assert change["text_projection/kernel"] == pytest.approx(2e-3, rel=1e-3)


def test_the_average_is_what_evaluators_and_users_see(clipjax, vary):
    common = "duration=Duration(2), evals=(), checkpoint=Checkpointing(every=Duration(1), keep=5)"
    config = vary(f"ema=Ema(0.5), {common}")
    assert clipjax("train", config=config) == 0
    one, two = (clipjax.workdir / "checkpoints" / s for s in "12")
    averaged = weights(two)
    # From step 1 on: decay min(0.5, 2 / 11).
    live = {s: _state(clipjax.workdir, s, "params") for s in (1, 2)}
    before = _state(clipjax.workdir, 1, "ema")
    for name, leaf in live[2].items():
        decay = (1 + 1) / (10 + 1)
        expected = decay * np.float64(before[name]) + (1 - decay) * np.float64(leaf)
        np.testing.assert_allclose(averaged[name], expected, rtol=1e-5, atol=1e-7)
    assert any(np.abs(averaged[n] - live[2][n]).max() > 1e-4 for n in averaged)
    assert weights(one).keys() == averaged.keys()


def _state(workdir, step, part):
    from flax import nnx

    from clipjax.config import load_run
    from clipjax.params import abstract

    run = load_run(workdir / "run.json")
    target = abstract(lambda: run.model.build(nnx.Rngs(0)))[1]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), target)
    restored = Checkpoints(workdir).restore(step, {part: target})[part]
    return {name: np.asarray(leaf) for name, leaf in paths(restored)}


def test_which_checkpoints_stay(clipjax, read_metrics, vary, tmp_path):
    """The latest `keep`, and the best by a figure: here one that is lowest."""
    figure = "retrieval/image_to_text/median_rank"
    config = vary(
        "evals=(replace(run.evals[0], every=Every(1, at_start=True)),), duration=Duration(6), "
        f"checkpoint=Checkpointing(every=Duration(16, 'examples'), keep=1, best={figure!r}, best_is='min')"
    )
    assert clipjax("train", config=config) == 0
    ranks = read_metrics(clipjax.workdir, figure)
    assert sorted(ranks) == list(range(7))
    saved = {step: rank for step, rank in ranks.items() if step > 0}
    best = [s for s, rank in saved.items() if rank == min(saved.values())]
    kept = steps_kept(clipjax.workdir)
    assert 6 in kept
    assert set(kept) & set(best)
    assert len(kept) <= 2
    # By the clock: every step is late.
    clock = tmp_path / "clock"
    config = vary("checkpoint=Checkpointing(every=Every(1e-9, 'minutes'), keep=2), evals=()")
    assert (
        clipjax(
            "train", "--duration.amount", 5, "--log_every.amount", 2, config=config, workdir=clock
        )
        == 0
    )
    assert steps_kept(clock) == [4, 5]
    assert sorted(read_metrics(clock)) == [1, 2, 4, 5]


def test_trackers(clipjax, read_metrics, vary, capsys, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = vary("trackers=(TensorBoard(),), evals=()")
    for amount in (2, 4):
        assert clipjax("train", "--duration.amount", amount, config=config) == 0
    events = EventAccumulator(str(clipjax.workdir / "tb")).Reload().Scalars("loss")
    expected = read_metrics(clipjax.workdir)
    assert [e.step for e in events] == [1, 2, 3, 4]
    assert [e.value for e in events] == pytest.approx(list(expected.values()))
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    capsys.readouterr()
    before = (clipjax.workdir / "run.json").read_bytes()
    config = vary("trackers=(Wandb('project'),), evals=()")
    assert clipjax("train", "--duration.amount", 6, config=config) == 2
    assert "pip install 'clipjax[tracking]'" in capsys.readouterr().err
    assert read_metrics(clipjax.workdir) == expected
    assert (clipjax.workdir / "run.json").read_bytes() == before


def test_what_pictures_and_captions_are_shown(clipjax, read_metrics, vary, monkeypatch):
    """Augmentations, choice of captions and order reach the step; a batch is made once and seen once."""
    seen = []

    def watch(batch, mesh):
        from clipjax.data.placement import to_global

        seen.append({name: rows.copy() for name, rows in batch.items()})
        return to_global(batch, mesh)

    monkeypatch.setattr("clipjax.train.loop.to_global", watch)
    fields = "evals=(), duration=Duration(4), data=replace(run.data, shuffle=False, cache=True, {})"
    assert clipjax("train", config=vary(fields.format(""))) == 0
    plain, seen[:] = list(seen), []
    assert [b["id"].tolist() for b in plain] == np.arange(64).reshape(4, 16).tolist()
    augment = (
        "augment=(RandomResizedCrop(scale=(0.3, 0.9)), Flip(1.0), ColorJitter(hue=0.1), Shift(2)), "
        "captions=CaptionChoice(pick='first'), num_threads=1, prefetch=1"
    )
    folder = clipjax.workdir.with_name("augmented")
    assert clipjax("train", config=vary(fields.format(augment)), workdir=folder) == 0
    assert all((a["text"] == b["text"]).all() for a, b in zip(plain, seen, strict=True))
    assert all((a["image"] != b["image"]).mean() > 0.3 for a, b in zip(plain, seen, strict=True))


def test_one_compilation_no_implicit_transfers_and_no_wasted_buffers(
    clipjax, vary, caplog, recwarn, monkeypatch
):
    """The loop is the same program at every step, fed by explicit transfers alone."""
    import clipjax.train.loop as loop

    real = loop.setup

    def guarded(*arguments):
        session = real(*arguments)
        compiled = session.step

        def step(state, batch):
            with jax.transfer_guard("disallow"):
                return compiled(state, batch)

        session.step = step
        return session

    monkeypatch.setattr(loop, "setup", guarded)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        assert clipjax("train", "--duration.amount", 5, config=vary("evals=(), ema=Ema(0.9)")) == 0
    compilations = re.findall(r"Finished XLA compilation of jit\(step\)", caplog.text)
    assert len(compilations) == 1
    assert not [w for w in recwarn if "donated" in str(w.message)]


def test_what_changed_is_named_as_on_the_command_line():
    before = {"seed": 0, "evals": [{"every": {"amount": 4}, "name": "a"}], "trackers": []}
    after = {"seed": 0, "evals": [{"every": {"amount": 9}, "name": "a"}], "trackers": [1]}
    assert differences(before, after) == [("evals.0.every.amount", 4, 9), ("trackers", [], [1])]


def test_config_prints_what_trains(clipjax, capsys):
    assert clipjax("config", "--optimizer.lr", "0.5", "--log_every.amount", 7) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["optimizer"]["lr"] == 0.5
    assert shown["log_every"]["amount"] == 7
    assert (
        clipjax("train", "--duration.amount", 1, "--optimizer.lr", "0.5", "--log_every.amount", 7)
        == 0
    )
    saved = json.loads((clipjax.workdir / "run.json").read_text())
    assert saved | {"duration": None} == shown | {"duration": None}
