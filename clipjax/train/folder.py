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
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipjax.checkpoint import FOLDER, complete_steps, latest_step, set_aside
from clipjax.component import from_json, to_json
from clipjax.config import Run
from clipjax.errors import ClipjaxError, Unavailable
from clipjax.files import TEMPORARY, replace_file
from clipjax.meta import Meta, unpack_tokenizer
from clipjax.tracking.goodput import ATTEMPTS_FILE, read_attempts

log = logging.getLogger(__name__)
RUN_FILE = "run.json"
TOKENIZER_FOLDER = "tokenizer"
LOCK_FILE = ".lock"
COMPILED_FOLDER = "xla"


def claim(run: Run, workdir: Path) -> None:
    """Makes sure that `workdir` is free or holds a run, and says what has changed since it was started.

    Raises:
      ClipjaxError: the folder holds something else.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ClipjaxError(f"{workdir} is a file: --workdir names a folder for the run")
    # What a run killed before it wrote anything may have left.
    if not workdir.is_dir() or all(
        p.name == LOCK_FILE or p.name.endswith(TEMPORARY) for p in workdir.iterdir()
    ):
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
    with contextlib.suppress(ClipjaxError):  # an earlier version's names are no change
        before = to_json(from_json(before))
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
      Unavailable: another process trains there.
      ClipjaxError: it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        refusal: ClipjaxError | None = None
        if jax.process_index() == 0:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(workdir / LOCK_FILE))
                if latest_step(workdir) != start:
                    refusal = Unavailable(
                        f"{workdir}: another process has trained here just now; start again"
                    )
            except BlockingIOError:
                refusal = Unavailable(
                    f"another process is training in {workdir}: wait for it, stop it, or give "
                    "another --workdir"
                )
            except OSError as error:
                refusal = ClipjaxError(
                    f"{workdir} cannot be written to ({error}): give another --workdir"
                )
        if jax.process_count() > 1:
            code = refusal.exit_code if refusal else 0
            told = int(multihost_utils.broadcast_one_to_all(np.asarray(code, np.int32)))
            if told and refusal is None:
                kind = Unavailable if told == Unavailable.exit_code else ClipjaxError
                refusal = kind(f"process 0 cannot use {workdir}; its own message says why")
        if refusal:
            raise refusal
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


def write_run_files(workdir: Path, meta: Meta) -> None:
    """`run.json` and `tokenizer/`, in process 0.

    Args:
      workdir: the run's folder.
      meta: what checkpoints hold beside the state.
    """
    if jax.process_index() != 0:
        return
    run = json.dumps(meta.run, indent=2, ensure_ascii=False)
    replace_file(workdir / RUN_FILE, run + "\n")
    tokenizer = workdir / TOKENIZER_FOLDER
    temporary = workdir / (TOKENIZER_FOLDER + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    unpack_tokenizer(meta.tokenizer, temporary)
    shutil.rmtree(tokenizer, ignore_errors=True)
    temporary.rename(tokenizer)


def keep_compilations(workdir: Path) -> None:
    """Lets jax keep compiled programs in the run's `xla/`, so that a restart does not compile again.

    JAX_COMPILATION_CACHE_DIR, or jax's own setting, names another folder; empty, none.
    """
    from jax.experimental.compilation_cache import compilation_cache

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / COMPILED_FOLDER))
    compilation_cache.reset_cache()  # jax looks for a cache once, and something was compiled before


def choose_start(workdir: Path, from_step: int | None, damaged: set[int]) -> int | None:
    """The checkpoint to go on from; None to begin.

    A command that goes back to a step is often started again by a launcher: it goes back once, and then goes on
    from what it has saved since, as every command does.

    Args:
      workdir: the run's folder.
      from_step: the one that the user asks for; None: the newest.
      damaged: those that turned out to be.

    Raises:
      ClipjaxError: there is no such checkpoint; those that there are get named.
    """
    there = [step for step in complete_steps(workdir) if step not in damaged]
    if from_step is None:
        return there[-1] if there else None
    attempts = read_attempts(workdir)
    if attempts and attempts[-1].get("from_step") == from_step:
        log.info("went back to step %d before: going on from the newest checkpoint", from_step)
        return there[-1] if there else None
    if from_step not in there:
        known = ", ".join(map(str, there)) or "none"
        raise ClipjaxError(f"--from-step {from_step}: {workdir / FOLDER} has the steps {known}")
    return from_step


def make_way(workdir: Path, start: int | None) -> None:
    """Moves checkpoints after `start` into `aside/`, in process 0: damaged ones, or what the user goes back behind."""
    if jax.process_index() == 0:
        for step in complete_steps(workdir):
            if start is None or step > start:
                log.warning("moved checkpoint %d to %s", step, set_aside(workdir, step))


def add_attempt(
    workdir: Path, start: int | None, from_step: int | None, began: float, log_lines: list[dict]
) -> int:
    """Writes down that the run was started; returns how many times it was before.

    Args:
      workdir: the run's folder.
      start: the step that this attempt goes on from.
      from_step: what the user asked for.
      began: when the process set out, in seconds since 1970.
      log_lines: of `metrics.jsonl`, before this attempt drops what comes after `start`.
    """
    attempts = read_attempts(workdir)
    if jax.process_index() == 0:
        last = log_lines[-1] if log_lines else {}
        new = {
            "began": round(min(began, time.time()), 3),
            "step": start or 0,
            "from_step": from_step,
            "host": socket.gethostname(),
            "processes": jax.process_count(),
            "last_step": last.get("step"),
            "last_heard": last.get("time"),
        }
        text = "".join(json.dumps(line) + "\n" for line in [*attempts, new])
        replace_file(workdir / ATTEMPTS_FILE, text)
    return len(attempts)
