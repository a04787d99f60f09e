"""Where a run ran: versions, devices, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

PACKAGES = (
    "clipjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "tokenizers",
    "numpy",
)


def environment() -> dict[str, Any]:
    """What is needed to tell two runs' surroundings apart, as JSON-able data.

    Returns:
      `versions` (of Python and packages), `devices` (kind, count, backend, processes), `machine`
      (system, processor, CPU cores), and `commit` of the current folder's git repository, with
      "+changes" where files differ from it, or None.
    """
    import jax

    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | _versions(),
        "devices": {
            "kind": device.device_kind,
            "count": jax.device_count(),
            "backend": jax.default_backend(),
            "processes": jax.process_count(),
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "processor": platform.processor() or platform.machine(),
            "cpu_cores": os.cpu_count(),
        },
        "commit": _commit(),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
