"""SIGTERM, SIGHUP and Ctrl-C become a polite request to stop, wherever the run is.

Before the first step there is nothing to save: the request ends the process at once, in the middle of a long
`open()` or of a compilation. After it, the step under way is finished and saved; an evaluation is cut short.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

from clipjax.errors import EXIT_PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 3.0
"""Seconds for Python to end by itself; then a compiler that does not let go of the main thread is left alone."""


class Interrupted(BaseException):
    """Raised by a signal where nothing would be lost; no `except Exception` may swallow it.

    Attributes:
      name: of the signal.
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class StopRequest:
    """While entered, the first signal asks for a stop; a second one acts as it always does.

    Attributes:
      number: the signal that asked, 0 for none. Known to this process alone: `train/votes.py` tells the others.
    """

    def __init__(self) -> None:
        self.number = 0
        self._at_once = True  # raise in the main thread
        self._may_exit = True  # and end the process where that is not enough
        self._previous: dict[int, object] = {}
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._previous_wakeup = -1

    def wait_for_steps(self) -> None:
        """From here on a signal waits for the step under way."""
        self._at_once = self._may_exit = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """In here a signal raises `Interrupted`, and so does one that came before."""
        if self.number:
            raise Interrupted(name_of(self.number))
        before, self._at_once = self._at_once, True
        try:
            yield
        finally:
            self._at_once = before

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # the embedding program handles signals
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._receive)
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._wakeup = ours, theirs
        self._previous_wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(ours,), daemon=True, name="signals").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        self._may_exit = False
        if self._wakeup:
            signal.set_wakeup_fd(self._previous_wakeup)
            self._wakeup[1].close()  # the thread reads the end, and goes
            self._wakeup = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        if self._at_once:
            raise Interrupted(name_of(number))

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None: not set from Python (jax.distributed has a SIGTERM handler of its own).
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous = {}

    def _watch(self, wakeup: socket.socket) -> None:
        """A thread: signals reach it also while a compiler holds the main thread."""
        number = 0
        try:
            while not number and (received := wakeup.recv(64)):
                number = next((n for n in received if n in SIGNALS), 0)
        except OSError:  # closed: the run is over
            return
        if not number:
            return
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            if not self._may_exit:
                return
            time.sleep(0.05)
        if self._may_exit:
            with contextlib.suppress(OSError, ValueError):
                print(f"clipjax: {nothing_lost(name_of(number))}", file=sys.stderr, flush=True)
            os._exit(EXIT_PREEMPTED)


def name_of(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name


def nothing_lost(name: str) -> str:
    """The message of a run that was stopped before it had anything to save."""
    return f"stopped by {name} before the first step, so there was nothing to save: the same command continues"
