"""SIGTERM and Ctrl-C become a polite request to stop after the step under way."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """While entered, the first SIGTERM or SIGINT asks for a stop; a second one acts as it always does.

    With several processes, jax's own SIGTERM handler is left in place: it tells the other processes, and all agree
    on the step to stop after. Ctrl-C is passed on to it.
    """

    def __init__(self) -> None:
        self._signal_name: str | None = None
        self._previous: dict[int, object] = {}
        self._shared = jax.process_count() > 1

    def agreed(self, step: int) -> str | None:
        """What asked to stop after `step`, the same in all processes; None to go on. To be asked every step."""
        if not self._shared:
            return self._signal_name
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        return self._signal_name or "a signal to one of the processes"

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT,) if self._shared else (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread: the embedding program handles signals
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal_name = signal.Signals(number).name
        self._restore()
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
