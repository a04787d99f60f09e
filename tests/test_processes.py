"""Start-up of several processes: what the surroundings say, and what is made of it."""

import io
import socket
import subprocess
import sys

import jax
import pytest

from clipjax import processes
from clipjax.cli import main
from clipjax.errors import ClipjaxError
from clipjax.processes import start_processes

NAMES = (
    "SLURM_",
    "OMPI_",
    "PMI_",
    "TPU_",
    "MEGASCALE_",
    "KUBERNETES_",
    "JOB_",
    "JAX_COORD",
    "JAX_NUM_P",
    "JAX_PROCESS",
)


@pytest.fixture
def start(monkeypatch):
    """`start({...})`: start-up in these surroundings; what jax was initialized with, None if it was not."""

    def run(env, metadata=None, tpu=False, platforms=""):
        calls = []
        with monkeypatch.context() as patch:
            for name in list(processes.os.environ):
                if name.startswith(NAMES):
                    patch.delenv(name)
            patch.setenv("JAX_PLATFORMS", platforms)
            if not platforms:
                patch.delenv("JAX_PLATFORMS")
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(processes, "_has_tpu", lambda: tpu)

            def urlopen(request, timeout):
                key = request.full_url.rsplit("/", 1)[1]
                assert request.headers == {"Metadata-flavor": "Google"}
                if metadata is None or key not in metadata:
                    raise processes.urllib.error.URLError("nobody there")
                return io.BytesIO(metadata[key].encode())

            patch.setattr(processes.urllib.request, "urlopen", urlopen)
            patch.setattr(jax.distributed, "initialize", lambda **known: calls.append(known))
            start_processes()
        return calls[0] if calls else None

    return run


ALONE = {"initialization_timeout": 360, "heartbeat_timeout_seconds": 100}
SLURM = {"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}


def test_a_single_process_joins_nobody(start):
    assert start({}) is None
    assert start({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}) is None
    assert start({"TPU_WORKER_HOSTNAMES": "localhost"}, tpu=True) is None
    assert start({}, {"worker-network-endpoints": "a:1:10.0.0.1", "tpu-env": ""}, tpu=True) is None
    assert (
        start({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"})
        is None
    )


@pytest.mark.parametrize(
    "env",
    [
        {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "0"},
        {"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_ID": "0"},
        {
            "TPU_WORKER_HOSTNAMES": "localhost",
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_COORDINATOR_ADDRESS": "x",
        },
        SLURM | {"SLURM_STEP_NODELIST": "node[01-02]"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1"},
    ],
    ids=["hostnames", "addresses", "slices", "slurm", "mpi"],
)  # fmt: skip
def test_variables_of_several_processes_join_them(start, env):
    assert start(env) == ALONE


def test_a_tpu_vm_asks_compute_engine(start):
    hosts = {"worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2", "agent-worker-number": "1"}
    assert start({}, hosts, tpu=True) == ALONE
    one_host_a_slice = {
        "worker-network-endpoints": "a",
        "tpu-env": "TYPE: 'V5E'\nMEGASCALE_NUM_SLICES: '2'\n",
    }
    assert start({}, one_host_a_slice, tpu=True) == ALONE
    assert start({}, hosts, tpu=False) is None
    assert start({"TPU_SKIP_MDS_QUERY": "1"}, hosts, tpu=True) is None
    assert start({}, hosts, tpu=True, platforms="cpu") is None
    assert start({}, None, tpu=True) is None  # no metadata server: not on Compute Engine


@pytest.mark.parametrize(
    ("env", "rank"),
    [
        ({"JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "3"}, (3, 8)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, (1, 4)),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, (2, 4)),
        ({"JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}, (2, 4)),
    ],
)
def test_an_address_is_completed_by_whatever_numbers_the_processes(start, env, rank):
    got = start(env | {"JAX_COORDINATOR_ADDRESS": "host:1"})
    assert got == ALONE | dict(
        coordinator_address="host:1", process_id=rank[0], num_processes=rank[1]
    )


def test_what_is_incomplete_is_refused(start):
    with pytest.raises(ClipjaxError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        start({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_PROCESS_ID": "1"})
    with pytest.raises(ClipjaxError, match="one of 4 ranks of an Open MPI that names no host"):
        start({"OMPI_COMM_WORLD_SIZE": "4"})
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    with pytest.raises(ClipjaxError, match="pod 1 of an indexed Kubernetes Job"):
        start(pod)
    assert start(pod | {"JOB_COMPLETION_INDEX": "0"}) is None


def test_a_task_that_srun_did_not_start_runs_alone(start, caplog):
    assert start(SLURM) is None
    assert "was not started by srun" in caplog.text


def test_time_outs_can_be_set(start):
    env = SLURM | {
        "SLURM_STEP_NODELIST": "a",
        processes.START_SECONDS: "7",
        processes.HEARTBEAT_SECONDS: "30",
    }
    assert start(env) == {"initialization_timeout": 67, "heartbeat_timeout_seconds": 30}
    with pytest.raises(ClipjaxError, match="CLIPJAX_START_SECONDS='soon'"):
        start({processes.START_SECONDS: "soon"})


def test_devices_of_others_without_a_client_are_refused(start, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(
        ClipjaxError, match="devices of 4 processes here, which have not been joined"
    ):
        start({})


def test_a_process_that_never_comes_is_not_waited_for_for_ever(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    tiny = __file__.replace("test_processes.py", "train/tiny.py")
    done = subprocess.run(
        [sys.executable, "-m", "clipjax.cli", "train", tiny, "--workdir", str(tmp_path / "run")],
        env=processes.os.environ
        | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
        | {processes.START_SECONDS: "3"},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 69
    assert f"process 0 of 2, process 0 at {address}" in done.stderr
    assert "did not find each other within 3 s" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_coordinator_needs_all_three_variables(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    tiny = __file__.replace("test_processes.py", "train/tiny.py")
    assert main(["train", tiny, "--workdir", str(tmp_path / "run")]) == 2
    assert "JAX_NUM_PROCESSES" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
