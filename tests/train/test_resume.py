"""A run that dies resumes: killed at any moment, stopped by a signal, continued on other devices."""

import gc
import json
import resource
import signal

import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.train.folder import hold

STEPS = 24


def logged(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def saving(workdir):
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in p.name for p in folder.iterdir())


def saved(workdir):
    folder = workdir / "checkpoints"
    return [p.name for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_three_times_every_loss_is_bit_identical(
    tmp_path, spawn, wait_for, read_metrics, tiny
):
    """In the first seconds (no checkpoint yet), during a save, and in the middle of a line of the log."""

    def start(workdir, **options):
        options = {"duration.amount": STEPS, "checkpoint.every.amount": 3} | options
        flags = [text for name, value in options.items() for text in (f"--{name}", value)]
        return spawn("train", tiny, "--workdir", workdir, *flags)

    whole = start(tmp_path / "whole")
    killed = tmp_path / "killed"
    process = start(killed)
    wait_for((killed / "run.json").exists, process)
    kill(process)
    assert not any(saved(killed))

    process = start(killed)
    wait_for(lambda: logged(killed) >= 5, process)
    wait_for(lambda: saving(killed), process)
    process.send_signal(signal.SIGSTOP)  # so that the save cannot end between the look and the kill
    assert saving(killed) or saved(killed)
    kill(process)

    process = start(killed)
    wait_for(lambda: logged(killed) >= 14 and len(saved(killed)) > 0, process)
    kill(process)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')  # what a kill in the middle of a write leaves

    process = start(killed)
    assert process.wait() == 0, process.communicate()[1]
    assert whole.wait() == 0
    expected = read_metrics(tmp_path / "whole")
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert read_metrics(killed) == expected
    for name in ("retrieval/image_to_text/R@1", "retrieval/text_to_image/mean_reciprocal_rank"):
        assert read_metrics(killed, name) == read_metrics(tmp_path / "whole", name)
    assert not saving(killed)  # what the kills left is gone


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_exits_with_75(tmp_path, spawn, wait_for, read_metrics, tiny, name):
    workdir = tmp_path / "run"
    process = spawn("train", tiny, "--workdir", workdir, "--duration.amount", 100_000,
                    "--checkpoint.every.amount", 100_000)  # fmt: skip
    wait_for(lambda: logged(workdir) >= 3, process)
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 75, stderr
    assert f"stopped by {name} after step" in stderr
    assert "Traceback" not in stderr
    last = max(read_metrics(workdir))
    assert (workdir / "checkpoints" / str(last) / "state").is_dir()


def test_continues_on_four_devices_with_fsdp(clipjax, read_metrics, tmp_path, monkeypatch):
    seen = {}

    def watch(label):
        from clipjax.data.placement import to_global as real

        def to_global(batch, mesh):
            placed = real(batch, mesh)
            seen.setdefault(label, []).append(np.array(placed["id"]))
            return placed

        monkeypatch.setattr("clipjax.train.loop.to_global", to_global)

    watch("one")
    whole = tmp_path / "whole"
    assert clipjax("train", "--duration.amount", 16, workdir=whole) == 0
    watch("before")
    assert clipjax("train", "--duration.amount", 6) == 0
    watch("four")
    options = ("--duration.amount", 16, "--sharding.fsdp", "--sharding.min_size", 16)
    assert clipjax("train", *options, devices=4) == 0
    np.testing.assert_array_equal(seen["before"] + seen["four"], seen["one"])
    expected, got = read_metrics(whole), read_metrics(clipjax.workdir)
    assert sorted(got) == sorted(expected) == list(range(1, 17))
    for step in range(7, 17):
        assert got[step] == pytest.approx(expected[step], rel=1e-4)


def test_a_finished_run_is_not_trained_again(clipjax, read_metrics, tiny, capsys):
    assert clipjax("train", "--duration.amount", 3) == 0
    log = (clipjax.workdir / "metrics.jsonl").read_bytes()
    results = json.loads((clipjax.workdir / "results.json").read_text())
    for name in ("results.json", "report.html"):  # killed just before the end
        (clipjax.workdir / name).unlink()
    # From its own folder, which needs the user's file by name.
    assert clipjax("train", "--imports", tiny, config=clipjax.workdir) == 0
    assert (clipjax.workdir / "metrics.jsonl").read_bytes() == log
    again = json.loads((clipjax.workdir / "results.json").read_text())
    clock = dict.fromkeys(("seconds", "goodput", "restarts", "wall_seconds", "wall_seconds_by"), 0)
    assert again | clock == results | clock
    assert (results["restarts"], again["restarts"]) == (0, 1)
    assert (clipjax.workdir / "report.html").exists()
    capsys.readouterr()
    assert clipjax("train", "--duration.amount", 2) == 2
    assert "is at step 3 already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "remains",
    [[".lock"], [".lock", "run.json.host.7.ab.tmp"], ["run.json"], ["run.json", "tokenizer.tmp/half"],
     ["run.json", "tokenizer/half", "metrics.jsonl", "checkpoints/2.orbax-checkpoint-tmp-1/state/x"]],
)  # fmt: skip
def test_what_a_kill_in_the_first_seconds_leaves_is_continued(
    clipjax, read_metrics, remains, capsys, vary
):
    """Each is what is on the disk between two writes of a run's beginning."""
    config = vary("evals=()")
    assert clipjax("config", config=config) == 0
    run = capsys.readouterr().out
    for name in remains:
        path = clipjax.workdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run if name == "run.json" else '{"step": 2, "lo')
    assert clipjax("train", "--duration.amount", 2, config=config) == 0
    assert sorted(read_metrics(clipjax.workdir)) == [1, 2]
    names = {p.name for p in clipjax.workdir.iterdir()}
    assert names == {".lock", "run.json", "tokenizer", "checkpoints", "metrics.jsonl", "attempts.jsonl",
                     "results.json", "report.html"}  # fmt: skip
    assert [p.name for p in (clipjax.workdir / "tokenizer").iterdir()] != ["half"]
    assert [p.name for p in (clipjax.workdir / "checkpoints").iterdir()] == ["2"]


def test_two_at_once_in_one_folder_are_refused(clipjax, capsys):
    clipjax.workdir.mkdir()
    with hold(clipjax.workdir, None):
        assert clipjax("train") == 69
    assert "another process is training in" in capsys.readouterr().err
    assert [p.name for p in clipjax.workdir.iterdir()] == [".lock"]
    with pytest.raises(ClipjaxError, match="start again"), hold(clipjax.workdir, 3):
        pass


def test_folders_that_cannot_be_written(clipjax, capsys):
    assert clipjax("train", workdir="/proc/clipjax-run") == 2
    assert "/proc/clipjax-run cannot be written to" in capsys.readouterr().err


@pytest.fixture
def no_room():
    """`no_room(bytes)`: no file can grow beyond that, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_in_one_message(
    clipjax, read_metrics, no_room, capfd, monkeypatch, vary
):
    from clipjax.data.placement import to_global

    config = vary("evals=()")
    assert clipjax("train", "--duration.amount", 3, config=config) == 0
    capfd.readouterr()
    with monkeypatch.context() as patch:  # full from the first step on: the checkpoint does not fit
        patch.setattr("clipjax.train.loop.to_global", lambda *a: no_room(4096) or to_global(*a))
        code = clipjax("train", "--duration.amount", 6, config=config)
    message = capfd.readouterr().err
    assert code == 69
    assert "cannot be written to" in message
    assert f"the last good checkpoint is {clipjax.workdir}/checkpoints/3" in message
    assert "Traceback" not in message
    gc.collect()  # TensorStore's futures complain when they are collected
    no_room(resource.RLIM_INFINITY)
    # Once there is room, nothing is lost.
    assert clipjax("train", "--duration.amount", 6, config=config) == 0
    assert sorted(read_metrics(clipjax.workdir)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(clipjax, read_metrics, damage, capfd):
    options = ("--checkpoint.every.amount", 2)
    assert clipjax("train", "--duration.amount", 4, *options) == 0
    newest = clipjax.workdir / "checkpoints" / "4"
    # All that holds arrays: which of them `eval` reads (it takes the parameters alone) is Orbax's affair.
    holding = [p for p in (newest / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    assert holding
    for file in holding:
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            file.unlink()
    before = (clipjax.workdir / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    for verb, more in (("train", ("--duration.amount", 6)), ("eval", ())):
        assert clipjax(verb, *more) == 2
        message = capfd.readouterr().err
        assert f"checkpoint {newest} cannot be read" in message
        assert "step 2 is used instead" in message
        assert "Traceback" not in message
        gc.collect()  # TensorStore's futures complain when they are collected
    assert (clipjax.workdir / "metrics.jsonl").read_bytes() == before
    newest.rename(clipjax.workdir / "damaged")
    assert clipjax("train", "--duration.amount", 6, *options) == 0
    assert sorted(read_metrics(clipjax.workdir)) == [1, 2, 3, 4, 5, 6]
