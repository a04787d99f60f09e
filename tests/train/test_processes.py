"""Several processes on one host, as a cluster would start them: launch/local.sh."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 12
STOPS = """
import dataclasses, os, signal, sys
from pathlib import Path
from clipjax import load_config

TINY = load_config(Path({tiny!r}))


@dataclasses.dataclass(frozen=True)
class Stops(sys.modules["tiny"].Squares):
    def open(self):
        if os.environ["JAX_PROCESS_ID"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().open()


def config():
    return dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, source=Stops()))
"""


def logged(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def children(process):
    pids = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    return [int(pid) for pid in pids]


def test_two_processes_stop_together_go_on_and_end_as_one_would(
    tmp_path, spawn, wait_for, clipjax, read_metrics, tiny
):
    """Four devices in two processes: a signal to one of them stops both after the same step; the same command goes
    on to the end; losses and figures are those of one process."""
    workdir = tmp_path / "two"
    options = ("--sharding.fsdp", "--sharding.min_size", 16, "--checkpoint.every.unit", "minutes")

    def start(steps):
        return spawn(
            "train", tiny, "--workdir", workdir, "--duration.amount", steps, *options,
            devices=2, command=(LAUNCH / "local.sh", 2, sys.executable, "-m", "clipjax.cli"),
        )  # fmt: skip

    process = start(100_000)
    wait_for(lambda: logged(workdir) >= 3, process)
    os.kill(children(process)[-1], signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 75, stderr
    stopped = max(read_metrics(workdir))
    assert stderr.count(f"after step {stopped} of 100000; saved") == 2
    assert "Traceback" not in stderr

    steps = stopped + STEPS
    process = start(steps)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert (workdir / "results.json").exists()
    assert (workdir / "report.html").exists()
    assert clipjax("train", "--duration.amount", steps, *options, devices=4) == 0
    expected, got = read_metrics(clipjax.workdir), read_metrics(workdir)
    assert got.keys() == expected.keys()
    early = range(1, min(steps, 20))  # rounding grows with the steps
    assert [got[s] for s in early] == pytest.approx([expected[s] for s in early], rel=1e-4)
    figure = "retrieval/image_to_text/mean_reciprocal_rank"
    assert read_metrics(workdir, figure).keys() == read_metrics(clipjax.workdir, figure).keys()


def test_processes_that_differ_say_so_and_end(tmp_path, spawn, tiny):
    """One has another configuration; then one sees another folder; then one does not come at all."""

    def run(words, config=tiny, **environment):
        command = ("bash", "-c", f"exec {sys.executable} -m clipjax.cli train {config} {words}")
        process = spawn(command=(LAUNCH / "local.sh", 2, *command), **environment)
        return process, *process.communicate(timeout=300)

    process, _, stderr = run(f"--workdir {tmp_path}/a --seed $JAX_PROCESS_ID")
    assert process.returncode == 2, stderr
    said = "configuration.seed is 0 in process 0 on {0} and 1 in process 1 on {0}"
    assert stderr.count("clipjax: the processes differ: " + said.format(socket.gethostname())) == 2
    assert not (tmp_path / "a").exists()

    (tmp_path / "b1/checkpoints/3").mkdir(parents=True)
    process, _, stderr = run(f"--workdir {tmp_path}/b$JAX_PROCESS_ID")
    assert process.returncode == 69, stderr
    said = "the newest checkpoint is null in process 0 on {0} and 3 in process 1 on {0}"
    assert stderr.count("clipjax: the processes differ: " + said.format(socket.gethostname())) == 2

    stops = tmp_path / "stops.py"
    stops.write_text(STOPS.format(tiny=str(tiny)))
    process, _, stderr = run(
        f"--workdir {tmp_path}/c", stops, CLIPJAX_AGREE_SECONDS="8", CLIPJAX_GRACE="1"
    )
    assert process.returncode == 69, stderr
    assert "process 1 of 2 did not finish setting the run up in 8 s" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "c").exists()


def test_local_sh_reports_the_first_failure(tmp_path):
    command = [
        str(LAUNCH / "local.sh"),
        "2",
        "bash",
        "-c",
        "[ $JAX_PROCESS_ID = 0 ] && exit 2; exec sleep 600",
    ]
    done = subprocess.run(command, timeout=100, env=os.environ | {"CLIPJAX_GRACE": "1"})
    assert done.returncode == 2
    assert subprocess.run([str(LAUNCH / "local.sh")], capture_output=True).returncode == 2
