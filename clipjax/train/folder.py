"""A run's folder: whose it is, what may be in it, and the files that say so.

A kill at any moment leaves a folder that the same command continues. `run.json` is the first file in it, every
file comes into being in one rename, and Orbax commits a checkpoint the same way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from clipjax.checkpoint import FOLDER, complete_steps, latest_step, set_aside
from clipjax.component import differences, from_json, to_json
from clipjax.config import Run
from clipjax.errors import ClipjaxError, Unavailable
from clipjax.files import TEMPORARY, replace_file
from clipjax.lease import FOLDER as LEASE_FOLDER
from clipjax.lease import leased
from clipjax.meta import Meta, unpack_tokenizer
from clipjax.stores import absolute, is_remote, read_bytes, remove_tree
from clipjax.tracking.goodput import ATTEMPTS_FILE, read_attempts
from clipjax.train.agreement import decide, meeting

log = logging.getLogger(__name__)
VISIBLE_SECONDS = 60.0
"""How long a shared file system may take to show one host what another has written."""
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
        p.name in (LOCK_FILE, LEASE_FOLDER) or p.name.endswith(TEMPORARY) for p in workdir.iterdir()
    ):
        return
    saved = workdir / RUN_FILE
    if not saved.is_file():
        raise ClipjaxError(
            f"{workdir} is not empty and holds no clipjax run (no {RUN_FILE}): give another --workdir"
        )
    try:
        before = json.loads(read_bytes(saved))
    except (OSError, ValueError) as error:
        raise ClipjaxError(
            f"{saved} cannot be read ({error}): restore it, or give another --workdir"
        ) from error
    with contextlib.suppress(ClipjaxError):  # an earlier version's names are no change
        before = to_json(from_json(before))
    for path, old, new in differences(before, to_json(run)):
        log.warning("continuing %s with %s = %s (was %s)", workdir, path, new, old)


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

        def take() -> str:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                mark = stack.enter_context(_locked(workdir))
            except BlockingIOError as error:
                raise Unavailable(
                    f"another process is training in {workdir}: wait for it, stop it, or give "
                    "another --workdir"
                ) from error
            except OSError as error:
                raise ClipjaxError(
                    f"{workdir} cannot be written to ({error}): give another --workdir"
                ) from error
            if latest_step(workdir) != start:
                raise Unavailable(
                    f"{workdir}: another process has trained here just now; start again"
                )
            return mark

        mark = decide(f"whether {workdir} is free", take)
        with meeting(f"looking for {workdir}") as compare:
            if not is_remote(workdir) and not _shows(workdir / LOCK_FILE, mark):
                raise ClipjaxError(
                    f"{workdir} is not the folder that process 0 works in: give a --workdir that all hosts share"
                )
            compare({})
        yield


def _shows(path: Path, mark: str) -> bool:
    """Whether this process reads what process 0 wrote; a network file system may take its time."""
    if jax.process_index() == 0:
        return True
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == mark:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[str]:
    """Holds the folder; gives what its lock file says meanwhile."""
    if is_remote(folder):
        with leased(folder) as holder:
            yield holder
        return
    import fcntl

    with contextlib.ExitStack() as stack:
        file = stack.enter_context((folder / LOCK_FILE).open("ab"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # some network file systems have no locks
            log.info("%s cannot be locked (%s): taking a lease of it", folder, error)
            stack.enter_context(leased(folder))
        mark = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"
        file.truncate(0)
        file.write(mark.encode())
        file.flush()
        yield mark


def write_run_files(workdir: Path, meta: Meta) -> None:
    """`run.json` and `tokenizer/`, in process 0.

    Args:
      workdir: the run's folder.
      meta: what checkpoints hold beside the state.
    """
    if jax.process_index() != 0:
        return
    for left in workdir.glob(f"*{TEMPORARY}"):  # by a kill in the middle of a write
        if left.is_file():
            left.unlink(missing_ok=True)
    run = json.dumps(meta.run, indent=2, ensure_ascii=False)
    replace_file(workdir / RUN_FILE, run + "\n")
    tokenizer = workdir / TOKENIZER_FOLDER
    if is_remote(workdir):
        remove_tree(tokenizer)
        unpack_tokenizer(meta.tokenizer, tokenizer)
        return
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
    jax.config.update("jax_compilation_cache_dir", str(absolute(workdir) / COMPILED_FOLDER))
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
