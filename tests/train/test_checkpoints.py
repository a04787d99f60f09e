"""What is kept, what is gone back to, and what is done about damage; by the command line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import open_pretrained
from clipjax.checkpoint import Checkpointing, Checkpoints
from clipjax.checksums import checksums
from clipjax.component import from_json
from clipjax.errors import ClipjaxError, DamagedCheckpoint
from clipjax.files import replace_file, scratch
from clipjax.meta import Meta
from clipjax.optim import Duration, Every, Scale
from clipjax.train.cadence import Cadences

META = Meta(run={"data": {"batch_size": 4}}, tokenizer={})


def kept(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def flip(folder):
    """Flips one bit of the largest file that holds arrays."""
    file = max((p for p in folder.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def save(folder, config, steps):
    """Opens a run's checkpoints, saves some steps with a figure each, and closes them again."""
    checkpoints = Checkpoints(folder, config)
    for step, value, milestone in steps:
        figures = {} if value is None else {"r/x": value}
        checkpoints.save(step, {"w": jnp.full(3, step)}, META, figures, milestone)
        checkpoints.wait()
    checkpoints.close()
    return kept(folder)


def test_the_best_and_the_milestones_stay_over_restarts(tmp_path):
    config = Checkpointing(keep=1, best="r/x")
    assert save(tmp_path, config, [(1, 0.9, False), (2, 0.1, True), (3, 0.2, False)]) == [1, 2, 3]
    assert save(tmp_path, config, [(4, 0.3, False)]) == [1, 2, 4]
    assert save(tmp_path, config, [(5, None, False)]) == [1, 2, 5]
    assert save(tmp_path, config, [(6, float("nan"), False)]) == [1, 2, 6]
    checkpoints = Checkpoints(tmp_path, config)
    assert checkpoints.milestones() == [2]
    assert not checkpoints.is_best({"r/x": 0.9})
    assert checkpoints.is_best({"r/x": 0.91})
    assert not checkpoints.is_best({"r/x": float("nan")})
    assert not checkpoints.is_best({"loss": 3.0})
    checkpoints.close()
    assert save(tmp_path, config, [(7, 0.95, False)]) == [2, 7]
    assert Checkpoints(tmp_path).meta(7).figures == {"r/x": 0.95}
    lowest = Checkpointing(keep=1, best="r/x", best_is="min")
    assert save(tmp_path / "low", lowest, [(1, 0.1, False), (2, 0.2, False)]) == [1, 2]


def test_any_damaged_or_missing_file_is_told(tmp_path):
    """Each file of a checkpoint in turn, one byte flipped or gone: the state is the same, or it is named as damaged."""
    tree = {"params": {"w": jnp.arange(60.0).reshape(5, 12)}, "step": jnp.int32(7)}
    checkpoints = Checkpoints(tmp_path, Checkpointing(keep=9))
    for step in (1, 2):
        checkpoints.save(step, tree, META)
    checkpoints.close()
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    newest = tmp_path / "checkpoints/2"
    told, files = set(), [p for p in sorted(newest.rglob("*")) if p.is_file()]
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        for damage in ("flipped", "missing"):
            if damage == "missing":
                file.unlink()
            elif content:
                middle = len(content) // 2
                file.write_bytes(
                    content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
                )
            reader = Checkpoints(tmp_path)
            try:
                got = reader.restore(2, target)
                assert reader.meta(2).step == 2
                assert (got["params"]["w"] == tree["params"]["w"]).all()
                assert got["step"] == 7
            except DamagedCheckpoint as error:
                told.add((file.relative_to(newest).as_posix(), damage))
                assert f"checkpoint {newest} cannot be read" in str(error), file
                assert "With --fallback, step 1 is used instead" in str(error)
            finally:
                reader.close()
            file.write_bytes(content)
    assert ("meta/metadata", "flipped") in told
    assert ("meta/metadata", "missing") in told
    for damage in (
        "flipped",
        "missing",
    ):  # which of the files with arrays are read is Orbax's affair
        assert any("/d/" in file and how == damage for file, how in told)


def test_cadences_of_every_unit():
    """In NumPy: a cadence is due at the step in which the count of examples crosses a multiple."""
    scale = Scale(batch_size=6, num_examples=20, shift=-4)
    seen = np.arange(0, 60) * 6 - 4
    for every, each in ((Every(10, "examples"), 10), (Every(0.5, "epochs"), 10)):
        crossed = np.flatnonzero(np.diff(seen // each)) + 1
        assert [s for s in range(1, 60) if every.due(s, scale)] == crossed.tolist()
    assert [s for s in range(9) if Every(4, at_start=True).due(s)] == [0, 4, 8]
    now = [0.0]
    cadences = Cadences(scale, {"save": (Every(4), Every(2, "minutes")), "log": (Every(3),)})
    timed = cadences._timed[0]
    timed._clock, timed._last = lambda: now[0], 0.0
    due = []
    for step in range(1, 9):
        now[0] += 50.0
        cadences.tell(cadences.late())
        due.append(cadences.due("save", step))
    # Late at 150 s (step 3) and 120 s after that; step 4 and 8 are multiples.
    assert [s for s, d in enumerate(due, 1) if d] == [3, 4, 6, 8]


@pytest.mark.parametrize("bad", [(0,), (-1,), (1.5,), (float("inf"),), (0, "minutes"), (1, "days")])
def test_cadences_that_are_none(bad):
    with pytest.raises(ClipjaxError, match="Every"):
        Every(*bad)


def test_configurations_of_earlier_versions_open():
    old = {"@type": "clipjax.evals.base:Every", "steps": 4, "at_start": True}
    assert from_json(old) == Every(4, at_start=True)
    duration = {"@type": "clipjax.optim.duration:Duration", "amount": 3.0, "unit": "epochs"}
    old = {
        "@type": "clipjax.checkpoint:Checkpointing",
        "every": duration,
        "minutes": 5.0,
        "keep": 3,
    }
    new = Checkpointing(every=(Every(3.0, "epochs"), Every(5.0, "minutes")), keep=3)
    assert from_json(old) == new
    assert from_json(old | {"minutes": None}).every == Every(3.0, "epochs")
    assert from_json(old | {"every": None}).every == Every(5.0, "minutes")
    assert Checkpointing(every=Duration(7)).every == Every(7)
    assert Checkpointing(every=None).cadences == ()


def test_checksums_tell_any_changed_byte():
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(5, 7)).astype(np.float32), "b": {"c": np.arange(9, dtype=np.int32)},
            "d": rng.integers(0, 9, 11).astype(np.uint8), "e": np.array([True, False, True])}  # fmt: skip
    got = checksums({**tree, "f": jnp.asarray(tree["a"], jnp.bfloat16)})
    words = {"a": np.uint32, "b/c": np.uint32, "d": np.uint8, "e": np.uint8}
    for name, kind in words.items():
        leaf = tree["b"]["c"] if name == "b/c" else tree[name]
        assert got[name] == int(leaf.view(kind).astype(np.uint64).sum() % 2**32)
    halves = np.asarray(jnp.asarray(tree["a"], jnp.bfloat16)).view(np.uint16)
    assert got["f"] == int(halves.astype(np.uint64).sum() % 2**32)
    raw = bytearray(tree["a"].tobytes())
    for place in (0, 17, len(raw) - 1):
        raw[place] ^= 0x10
        changed = np.frombuffer(bytes(raw), np.float32).reshape(5, 7)
        assert checksums({"a": changed})["a"] != got["a"]
        raw[place] ^= 0x10


def test_files_come_into_being_whole(tmp_path):
    path = tmp_path / "a.json"
    replace_file(path, "old")
    with pytest.raises(TypeError):
        replace_file(path, 3)
    assert path.read_text() == "old"
    replace_file(path, b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert scratch(path) != scratch(path)  # also where every process has the number 1


def test_milestones_several_cadences_and_the_best_that_nobody_asked_to_save(
    clipjax, read_metrics, vary
):
    """Saves by two cadences; milestones and an evaluation that beats all others are saved by themselves."""
    figure = "retrieval/image_to_text/mean_reciprocal_rank"
    config = vary(
        "evals=(replace(run.evals[0], every=Every(3)),), duration=Duration(10), checkpoint=Checkpointing("
        f"every=(Every(7), Every(64, 'examples')), keep=1, milestones=Every(5), best={figure!r})"
    )
    assert clipjax("train", "--duration.amount", 7, config=config) == 0
    assert clipjax("train", config=config) == 0
    values = read_metrics(clipjax.workdir, figure)
    assert sorted(values) == [3, 6, 7, 9, 10]
    best = max(values, key=lambda step: (values[step], step))
    assert kept(clipjax.workdir) == sorted({5, 10, best})
    attempts = [
        json.loads(s) for s in (clipjax.workdir / "attempts.jsonl").read_text().splitlines()
    ]
    assert [(a["step"], a["last_step"]) for a in attempts] == [(0, None), (7, 7)]


def test_damage_is_named_and_fallback_goes_on_from_the_one_before(
    clipjax, read_metrics, capfd, caplog, vary, monkeypatch
):
    config = vary("evals=(), checkpoint=Checkpointing(every=Every(2), keep=3)")
    assert clipjax("train", "--duration.amount", 6, config=config) == 0
    expected = read_metrics(clipjax.workdir)
    newest = clipjax.workdir / "checkpoints" / "6"
    # Whichever array the bit below is in, those that a model is opened with are looked at too.
    with monkeypatch.context() as patch:
        patch.setattr("clipjax.checkpoint.checksums", lambda leaves: dict.fromkeys(leaves, -1))
        with pytest.raises(ClipjaxError, match="is damaged: its checksum differs"):
            open_pretrained(clipjax.workdir)
    flip(newest)
    capfd.readouterr()
    assert clipjax("train", "--duration.amount", 8, config=config) == 2
    message = capfd.readouterr().err
    assert f"checkpoint {newest} cannot be read" in message
    assert "With --fallback, step 4 is used instead" in message
    assert kept(clipjax.workdir) == [2, 4, 6]
    # One that lacks a file, and one whose facts were changed.
    meta = clipjax.workdir / "checkpoints" / "4" / "meta" / "metadata"
    meta.write_text(
        meta.read_text().replace('"step":4', '"step":5').replace('"step": 4', '"step": 5')
    )
    assert clipjax("train", "--duration.amount", 8, "--fallback", config=config) == 0
    assert "checkpoints/6 cannot be read" in caplog.text
    assert "digest differs" in caplog.text
    assert sorted(p.name for p in (clipjax.workdir / "aside").iterdir()) == ["4", "6"]
    got = read_metrics(clipjax.workdir)
    assert {s: got[s] for s in expected} == expected
    assert sorted(got) == list(range(1, 9))


def test_from_step_goes_back_once(clipjax, read_metrics, capfd, vary):
    config = vary("evals=(), checkpoint=Checkpointing(every=Every(2), keep=9)")
    assert clipjax("train", "--duration.amount", 6, config=config) == 0
    first = read_metrics(clipjax.workdir)
    capfd.readouterr()
    assert clipjax("train", "--from-step", 3, config=config) == 2
    assert "has the steps 2, 4, 6" in capfd.readouterr().err
    again = ("train", "--from-step", 2, "--optimizer.lr", "1e-4", "--duration.amount", 6)
    assert clipjax(*again, config=config) == 0
    got = read_metrics(clipjax.workdir)
    assert [got[s] == first[s] for s in range(1, 7)] == [True, True, True, False, False, False]
    assert sorted(p.name for p in (clipjax.workdir / "aside").iterdir()) == ["4", "6"]
    # A launcher starts the same command again: it goes on.
    assert clipjax(*again[:-1], 7, config=config) == 0
    now = read_metrics(clipjax.workdir)
    assert {s: now[s] for s in got} == got
    assert sorted(now) == list(range(1, 8))


def test_other_data_under_the_same_name_are_refused(clipjax, capfd, caplog, vary, monkeypatch):
    config = vary("evals=(), duration=Duration(2)")
    assert clipjax("train", config=config) == 0
    from clipjax.data.loader import Loader

    before = (clipjax.workdir / "run.json").read_bytes()
    monkeypatch.setattr(Loader, "fingerprint", lambda self: "another")
    capfd.readouterr()
    assert clipjax("train", "--duration.amount", 3, config=config) == 2
    assert "though as many" in capfd.readouterr().err
    assert (clipjax.workdir / "run.json").read_bytes() == before
    assert clipjax("train", "--duration.amount", 3, "--new-data", config=config) == 0
    # A source that the user changed says so by itself.
    grown = ("--duration.amount", 4, "--data.source.records", 96)
    assert clipjax("train", *grown, config=config) == 0
    assert "began with 64 examples, and its data hold 96 now" in caplog.text
