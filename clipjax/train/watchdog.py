"""A thread that ends a run which no longer moves, and says where it stands and whom it waits for.

A collective waits for ever for a process that is stopped, swapped out or lost in a read. Somebody has to notice:
after so long without a sign of life the stacks of all threads are printed, the processes that are silent are
named, and this process ends with a code of its own, so that a launcher can start the run again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from typing import Any

import jax

from clipjax.errors import EXIT_STALLED

FOLDER = "clipjax/alive/"
ANSWER = 10.0
"""Seconds that the process where all meet has for an answer."""
PARTING = 5.0
"""Seconds that it stays after its own words: jax ends all others when it goes, before they have said theirs."""
MEETING_PLACE = "process 0, where all meet, does not answer"


class Watchdog:
    """Started by entering it; `beat` is a sign of life. Without a limit it does nothing."""

    def __init__(self, seconds: float | None):
        self._limit = seconds
        self._doing, self._patience = "starting", 4.0
        self._last = time.monotonic()
        self._over = threading.Event()
        self._beats = 0
        # Signs of life to the other processes: often enough to tell who is silent within half the limit.
        self._period = min(15.0, (seconds or 60) / 8)

    def beat(self, doing: str, patience: float = 1.0) -> None:
        """Something was finished, and `doing` comes next.

        Args:
          doing: for the message, such as "step 12".
          patience: how many times the limit it may take.
        """
        self._doing, self._patience, self._last = doing, patience, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._limit is not None:
            # Apart, since process 0 may not answer, and since all listen to each other when no step ends.
            for name, work in (("watchdog", self._watch), ("signs of life", self._live)):
                threading.Thread(target=work, daemon=True, name=name).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        assert self._limit is not None
        while not self._over.wait(min(self._period, 1.0, self._limit / 4)):
            now = time.monotonic()
            if now - self._last > self._limit * self._patience:
                self._end(now - self._last)

    def _live(self) -> None:
        self._publish()
        while not self._over.wait(self._period):
            self._publish()

    def _end(self, seconds: float) -> None:
        doing, last = self._doing, self._last
        silent = self._silent()
        if self._over.is_set() or self._last != last:  # it moved while we asked
            return
        with contextlib.suppress(OSError, ValueError):
            print(
                f"clipjax: {doing} has not ended in {seconds:.0f} s{silent}. The stacks of all threads "
                f"follow; this process ends with code {EXIT_STALLED}, and the same command continues "
                "(stall_minutes is the limit)",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if _client() and jax.process_count() > 1 and jax.process_index() == 0:
            time.sleep(PARTING)
        os._exit(EXIT_STALLED)

    def _publish(self) -> None:
        """Tells the other processes that this one lives."""
        if client := _client():
            self._beats += 1
            word = f"{self._beats} {socket.gethostname()} {self._doing}"
            with contextlib.suppress(Exception):  # nobody there to hear it
                client.key_value_set(f"{FOLDER}{jax.process_index()}", word, allow_overwrite=True)

    def _silent(self) -> str:
        """Which processes have given no sign of life for two periods, in words; nothing in a single process."""
        client = _client()
        if client is None or jax.process_count() == 1:
            return ""
        before = _ask(client)
        self._over.wait(2.5 * self._period)
        after = _ask(client)
        if before is None or after is None:
            return "; " + MEETING_PLACE
        words = []
        for process in range(jax.process_count()):
            old, new = before.get(process), after.get(process)
            if new is None:
                words.append(f"process {process} was never heard of")
            elif old == new:
                _, host, doing = new.split(" ", 2)
                words.append(f"process {process} on {host} is silent (it was at: {doing})")
        return "; " + "; ".join(words) if words else "; all processes are alive"


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _ask(client: Any) -> dict[int, str] | None:
    """Process -> its last sign of life; None if there is no answer in time."""
    found: list[dict[int, str]] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            entries = client.key_value_dir_get(FOLDER)
            found.append({int(key.rsplit("/", 1)[-1]): value for key, value in entries})

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER)
    return found[0] if found else None
