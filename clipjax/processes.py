"""Start-up of a run of several processes, wherever it is started."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import logging
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from clipjax.errors import EXIT_UNAVAILABLE, ClipjaxError

log = logging.getLogger(__name__)
START_SECONDS = "CLIPJAX_START_SECONDS"
"""Environment variable: how long to wait for the other processes at start-up; default 300."""
HEARTBEAT_SECONDS = "CLIPJAX_HEARTBEAT_SECONDS"
"""Environment variable: after how long without a sign of life a process counts as dead; default 100."""
METADATA_SECONDS = 3.0

# How launchers tell a process its number, and how many there are.
RANKS = (
    ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("JOB_COMPLETION_INDEX", "JAX_NUM_PROCESSES"),
)


def start_processes() -> None:
    """Joins the other processes of a run of several; does nothing in a single one.

    JAX_COORDINATOR_ADDRESS (host:port of process 0) comes first, with the number of processes and of this one from
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from SLURM, MPI or an indexed Kubernetes Job. Without it, jax asks
    what is there: the workers of a TPU (on Compute Engine, on GKE, of several slices), SLURM, Open MPI,
    or the Kubernetes API. Must run before anything touches a device.

    Raises:
      ClipjaxError: the variables are incomplete, the processes do not find each other in time, or there are
        devices of several processes that were not joined.
    """
    env = os.environ
    timeouts: dict[str, Any] = {
        "initialization_timeout": seconds_of(env, START_SECONDS, 300),
        "heartbeat_timeout_seconds": seconds_of(env, HEARTBEAT_SECONDS, 100),
    }
    if address := env.get("JAX_COORDINATOR_ADDRESS"):
        index, count = _rank(env, address)
        if count > 1:
            given = dict(coordinator_address=address, num_processes=count, process_id=index)
            _join(f"process {index} of {count}, process 0 at {address}", timeouts, **given)
    elif where := one_of_several(env):
        _join(where, timeouts)
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ClipjaxError(
            f"there are devices of {jax.process_count()} processes here, which have not been joined, so they could "
            "neither save nor stop together: set JAX_COORDINATOR_ADDRESS (host:port of process 0), "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID in each"
        )


def one_of_several(env: Mapping[str, str]) -> str | None:
    """What says that this is one of several processes, in words; None: it is alone.

    Raises:
      ClipjaxError: it is one of several, and nothing says of how many.
    """
    platforms = env.get("JAX_PLATFORMS", "tpu").split(",")
    if "tpu" in platforms and (where := _tpu_workers(env)):
        return where
    if _number(env, "SLURM_NTASKS") > 1:
        if "SLURM_STEP_NODELIST" in env:
            return f"task {env.get('SLURM_PROCID')} of {env['SLURM_NTASKS']} of SLURM"
        log.warning(
            "SLURM_NTASKS=%s, but this process was not started by srun: it runs alone",
            env["SLURM_NTASKS"],
        )
    if (count := _number(env, "OMPI_COMM_WORLD_SIZE")) > 1:
        if "OMPI_MCA_orte_hnp_uri" in env:
            return f"rank {env.get('OMPI_COMM_WORLD_RANK')} of {count} of Open MPI"
        raise ClipjaxError(
            f"this is one of {count} ranks of an Open MPI that names no host for process 0: "
            "set JAX_COORDINATOR_ADDRESS (its host:port) for all of them"
        )
    if "KUBERNETES_SERVICE_HOST" in env and (index := env.get("JOB_COMPLETION_INDEX")) is not None:
        if importlib.util.find_spec("kubernetes"):
            return f"pod {index} of a Kubernetes Job"
        if index != "0":
            raise ClipjaxError(
                f"this is pod {index} of an indexed Kubernetes Job, and nothing says where process 0 is: set "
                "JAX_COORDINATOR_ADDRESS (host:port) and JAX_NUM_PROCESSES in the pod template, as "
                "launch/kubernetes.yaml does, or install the package `kubernetes`"
            )
    return None


def _tpu_workers(env: Mapping[str, str]) -> str | None:
    """Whether a TPU of several hosts is attached, in words; asks the metadata server where no variable says."""
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if (count := len(env.get(name, "").split(","))) > 1:
            return f"worker {env.get('TPU_WORKER_ID')} of {count} ({name})"
    if (slices := _number(env, "MEGASCALE_NUM_SLICES")) > 1:
        return f"slice {env.get('MEGASCALE_SLICE_ID')} of {slices} (MEGASCALE_NUM_SLICES)"
    if "TPU_WORKER_HOSTNAMES" in env or "TPU_SKIP_MDS_QUERY" in env or not _has_tpu():
        return None
    hosts = (_metadata("worker-network-endpoints") or "").split(",")
    if len(hosts) > 1:
        return (
            f"worker {_metadata('agent-worker-number')} of {len(hosts)} (Compute Engine's metadata)"
        )
    for line in (_metadata("tpu-env") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "MEGASCALE_NUM_SLICES" and value.strip(" '\"") not in ("", "1"):
            return f"one of {value.strip()} slices (Compute Engine's metadata)"
    return None


def _has_tpu() -> bool:
    devices = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def _metadata(key: str) -> str | None:
    """An attribute of this Compute Engine instance; None where it has none, or this is no such instance."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None


def _rank(env: Mapping[str, str], address: str) -> tuple[int, int]:
    """(number of this process, number of processes)."""
    for index, count in RANKS:
        if index in env and count in env:
            try:
                return int(env[index]), int(env[count])
            except ValueError:
                break
    given = [f"{name}={env[name]}" for name in RANKS[0] if name in env]
    raise ClipjaxError(
        f"JAX_COORDINATOR_ADDRESS={address} needs JAX_NUM_PROCESSES and JAX_PROCESS_ID beside it, both integers"
        + (f" (there is {' and '.join(given)})" if given else "")
    )


def _join(where: str, timeouts: dict[str, Any], **known: Any) -> None:
    seconds = timeouts["initialization_timeout"]
    log.info("joining the other processes: %s; at most %d s", where, seconds)
    failure = (
        f"this is {where}, and the processes did not find each other within {seconds} s: see that all were started "
        f"and reach process 0; {START_SECONDS} sets the time"
    )
    # jax's own time-out, which comes later, is the end of the process without a word of ours.
    timeouts = timeouts | {"initialization_timeout": seconds + 60}
    try:
        with ended_after(seconds, failure):
            jax.distributed.initialize(**known, **timeouts)
    except Exception as error:  # each kind of cluster fails in its own way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClipjaxError(f"{failure} ({reason})") from error


@contextlib.contextmanager
def ended_after(seconds: float, message: str, code: int = EXIT_UNAVAILABLE) -> Iterator[None]:
    """Ends the process, with a message and an exit code, when the block takes longer.

    For calls that wait for other processes in native code, which no exception gets out of.
    """
    done = threading.Event()

    def watch() -> None:
        if not done.wait(seconds):
            with contextlib.suppress(OSError, ValueError):
                print(f"clipjax: {message}", file=sys.stderr, flush=True)
            os._exit(code)

    threading.Thread(target=watch, daemon=True, name="deadline").start()
    try:
        yield
    finally:
        done.set()


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env.get(name, 1))
    except ValueError:
        return 1


def seconds_of(env: Mapping[str, str], name: str, default: int) -> int:
    """A time that an environment variable sets."""
    text = env.get(name, str(default))
    if not text.isdigit() or int(text) < 1:
        raise ClipjaxError(f"{name}={text!r}: give whole seconds, at least 1")
    return int(text)
