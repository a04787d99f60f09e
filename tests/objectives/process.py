"""One process of `test_processes.py`: joins the others, takes the steps and writes what came out."""

import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def results():
    """{case: one_step's result} on the first four devices."""
    from jax import jit
    from linear import one_step

    from clipjax.mesh import MeshShape
    from clipjax.objectives import Hierarchical, Sigmoid, Softmax

    return {
        # blocks gathered inside a process, in a ring from process to process
        "hierarchical": one_step(
            {"softmax": Softmax()}, jit, 4, shape=MeshShape(group=2), exchange=Hierarchical()
        ),
        "accumulated": one_step({"sigmoid": Sigmoid()}, jit, 4, accumulate=2),
    }


if __name__ == "__main__":
    from clipjax.processes import start_processes

    start_processes()
    import jax

    assert (jax.process_count(), jax.local_device_count(), len(jax.devices())) == (2, 2, 4)
    Path(sys.argv[1]).write_bytes(pickle.dumps(results()))
