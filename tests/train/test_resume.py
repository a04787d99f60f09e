"""A run that dies resumes: killed at any moment, stopped by a signal, continued on other devices."""

import signal
import time

import numpy as np
import pytest

STEPS = 24


def wait_for(condition, process, seconds=120):
    """Polls until the condition holds; fails with the process's own words when it ends before that."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def logged(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def saving(workdir):
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in p.name for p in folder.iterdir())


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_three_times_every_loss_is_bit_identical(tmp_path, spawn, read_metrics, tiny):
    def start(workdir):
        return spawn(
            "train",
            tiny,
            "--workdir",
            workdir,
            "--duration.amount",
            STEPS,
            "--checkpoint.every.amount",
            2,
        )

    whole = start(tmp_path / "whole")
    killed = tmp_path / "killed"
    process = start(killed)
    wait_for(lambda: logged(killed) >= 3, process)
    kill(process)

    process = start(killed)
    wait_for(lambda: logged(killed) >= 7, process)
    wait_for(lambda: saving(killed), process)
    kill(process)
    assert saving(killed), "the save was over before the kill"

    process = start(killed)
    wait_for(lambda: logged(killed) >= 15, process)
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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_exits_with_75(tmp_path, spawn, read_metrics, tiny, name):
    workdir = tmp_path / "run"
    process = spawn("train", tiny, "--workdir", workdir, "--duration.amount", 100_000,
                    "--checkpoint.every.amount", 100_000, "--evals", "[]")  # fmt: skip
    wait_for(lambda: logged(workdir) >= 3, process)
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=60)
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
    options = ("--duration.amount", 16, "--sharding.fsdp", "True", "--sharding.min_size", 16)
    assert clipjax("train", *options, devices=4) == 0
    np.testing.assert_array_equal(seen["before"] + seen["four"], seen["one"])
    expected, got = read_metrics(whole), read_metrics(clipjax.workdir)
    assert sorted(got) == sorted(expected) == list(range(1, 17))
    for step in range(7, 17):
        assert got[step] == pytest.approx(expected[step], rel=1e-4)


def test_a_finished_run_is_not_trained_again(clipjax, read_metrics):
    assert clipjax("train", "--duration.amount", 3) == 0
    first = read_metrics(clipjax.workdir)
    results = (clipjax.workdir / "results.json").read_text()
    assert clipjax("train", "--duration.amount", 3) == 0
    assert read_metrics(clipjax.workdir) == first
    assert (
        clipjax("train", workdir=clipjax.workdir, config=clipjax.workdir) == 0
    )  # from its own run.json
    assert results
