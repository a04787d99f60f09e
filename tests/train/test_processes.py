"""Several processes on one host, as a cluster would start them: launch/local.sh."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 12


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
            devices=2, command=(LAUNCH / "local.sh", 2, os.sys.executable, "-m", "clipjax.cli"),
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


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_launchers_are_valid_shell(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_the_kubernetes_job_is_whole():
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    assert spec["subdomain"] == service["metadata"]["name"]
    env = {e["name"]: e["value"] for e in spec["containers"][0]["env"]}
    assert int(env["JAX_NUM_PROCESSES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert env["JAX_COORDINATOR_ADDRESS"].startswith(f"{job['metadata']['name']}-0.")
    rules = {
        r["onExitCodes"]["values"][0]: r["action"] for r in job["spec"]["podFailurePolicy"]["rules"]
    }
    assert rules == {75: "Ignore", 2: "FailJob"}
    command = spec["containers"][0]["command"][-1]
    assert "JAX_PROCESS_ID=$JOB_COMPLETION_INDEX" in command


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
