"""A run's folder: whose it is, what may be in it, and the files that say so.

A kill at any moment leaves a folder that the same command continues. `run.json` is the first file in it, every
file comes into being in one rename, and Orbax commits a checkpoint the same way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipjax.checkpoint import latest_step, unpack_tokenizer
from clipjax.component import to_json
from clipjax.config import Run
from clipjax.errors import ClipjaxError

log = logging.getLogger(__name__)
RUN_FILE = "run.json"
TOKENIZER_FOLDER = "tokenizer"
LOCK_FILE = ".lock"


def claim(run: Run, workdir: Path) -> None:
    """Makes sure that `workdir` is free or holds a run, and says what has changed since it was started.

    Raises:
      ClipjaxError: the folder holds something else.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ClipjaxError(f"{workdir} is a file: --workdir names a folder for the run")
    # What a run killed before it wrote anything may have left.
    remnants = {LOCK_FILE, RUN_FILE + ".tmp"}
    if not workdir.is_dir() or all(p.name in remnants for p in workdir.iterdir()):
        return
    saved = workdir / RUN_FILE
    if not saved.is_file():
        raise ClipjaxError(
            f"{workdir} is not empty and holds no clipjax run (no {RUN_FILE}): give another --workdir"
        )
    try:
        before = json.loads(saved.read_text())
    except (OSError, ValueError) as error:
        raise ClipjaxError(
            f"{saved} cannot be read ({error}): restore it, or give another --workdir"
        ) from error
    for path, old, new in changes(before, to_json(run)):
        log.warning("continuing %s with %s = %s (was %s)", workdir, path, new, old)


def changes(before: Any, after: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) for everything that differs between two runs as JSON."""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    if isinstance(before, dict) and isinstance(after, dict):
        names = list(dict.fromkeys([*before, *after]))
        return [
            c
            for n in names
            for c in changes(before.get(n), after.get(n), f"{path}.{n}".lstrip("."))
        ]
    return [] if before == after else [(path, before, after)]


@contextlib.contextmanager
def hold(workdir: Path, start: int | None) -> Iterator[None]:
    """Creates the folder if need be and keeps other trainers out of it until the context ends.

    The lock is the operating system's, so a killed process leaves none behind. All processes of a run take part;
    the first one holds it.

    Args:
      workdir: the run's folder.
      start: the newest checkpoint as it was when the run was set up.

    Raises:
      ClipjaxError: another process trains there, or it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(workdir / LOCK_FILE))
                if latest_step(workdir) != start:
                    refusal = f"{workdir}: another process has trained here just now; start again"
            except BlockingIOError:
                refusal = (
                    f"another process is training in {workdir}: wait for it, stop it, or give "
                    "another --workdir"
                )
            except OSError as error:
                refusal = f"{workdir} cannot be written to ({error}): give another --workdir"
        if jax.process_count() > 1:
            refused = multihost_utils.broadcast_one_to_all(np.asarray(refusal is not None))
            if refused and refusal is None:
                refusal = f"process 0 cannot use {workdir}; its own message says why"
        if refusal:
            raise ClipjaxError(refusal)
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # some network file systems have no locks
            log.info("%s cannot be locked (%s): two runs in it would go unnoticed", path, error)
        yield


def write_run_files(workdir: Path, meta: dict[str, Any]) -> None:
    """`run.json` and `tokenizer/`, in process 0.

    Args:
      workdir: the run's folder.
      meta: what checkpoints hold beside the state.
    """
    if jax.process_index() != 0:
        return
    replace_file(workdir / RUN_FILE, json.dumps(meta["run"], indent=2, ensure_ascii=False))
    tokenizer = workdir / TOKENIZER_FOLDER
    temporary = workdir / (TOKENIZER_FOLDER + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    unpack_tokenizer(meta["tokenizer"], temporary)
    shutil.rmtree(tokenizer, ignore_errors=True)
    temporary.rename(tokenizer)


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one rename, so that a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
