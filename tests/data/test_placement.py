"""Global batches on two real processes with two devices each."""

import os
import socket
import subprocess
import sys

SCRIPT = """
import sys
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
port, process = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)

from jax.experimental import multihost_utils
from jax.sharding import Mesh
from clipjax.data.placement import process_rows, to_global
from clipjax.errors import ClipjaxError

images = np.arange(48, dtype=np.uint8).reshape(8, 2, 3)
whole = {"id": np.arange(8, dtype=np.int32), "image": images}
devices = np.array(jax.devices()).reshape(2, 2)  # [process, device]
cases = {
    "data": (devices.reshape(1, 4, 1), (process, 2)),
    "group": (devices.reshape(2, 2, 1), (process, 2)),
    "tensor inside": (devices.reshape(1, 2, 2), (process, 2)),
    "tensor across": (devices.T.reshape(1, 2, 2), (0, 1)),
}
for name, (grid, expected) in cases.items():
    mesh = Mesh(grid, ("group", "data", "tensor"))
    index, count = process_rows(mesh)
    assert (index, count) == expected, (name, index, count)
    b = 8 // count
    arrays = to_global({k: v[index * b : (index + 1) * b] for k, v in whole.items()}, mesh)
    for key, array in arrays.items():
        found = multihost_utils.process_allgather(array, tiled=True)
        np.testing.assert_array_equal(found, whole[key], err_msg=name)
# A mesh along a torus may deal the devices of two processes in turn: their rows do not lie together then.
mesh = Mesh(devices.T.reshape(1, 4, 1), ("group", "data", "tensor"))
assert process_rows(mesh) == (process, 2)
mine = {k: v[process * 4 : process * 4 + 4] for k, v in whole.items()}
found = multihost_utils.process_allgather(to_global(mine, mesh)["id"], tiled=True)
assert found.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
try:
    process_rows(Mesh(devices.ravel()[[0, 1, 2]].reshape(1, 3, 1), ("group", "data", "tensor")))
except ClipjaxError as error:
    assert "overlap or are of different sizes" in str(error)
    print("all good")
"""


def test_two_processes_make_one_batch():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, port, str(i)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    results = [p.communicate(timeout=120) for p in processes]
    for out, err in results:
        assert out.strip().endswith("all good"), err
