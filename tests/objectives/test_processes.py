"""Two real processes of two devices each give what one process gives, and what one device gives."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import process
from jax import jit
from linear import assert_close, one_step

from clipjax.objectives import Sigmoid, Softmax


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    running = [
        subprocess.Popen(
            [sys.executable, process.__file__, str(folder / str(i))],
            env=env | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=120)[0] for p in running]
    finally:
        for p in running:
            p.kill()
    assert [p.returncode for p in running] == [0, 0], outputs
    return [pickle.loads((folder / str(i)).read_bytes()) for i in range(2)]


def test_loss_gradients_and_next_parameters(two_processes):
    first, second = two_processes
    one_process = process.results()
    one_device = one_step({"softmax": Softmax(), "sigmoid": Sigmoid()}, jit)
    for case, results in one_process.items():
        assert_close(first[case], results, 1e-6)
        assert_close(first[case], {name: one_device[name] for name in results})
        assert_close(second[case], first[case], 1e-12)
