"""How far a long command is: a bar on a terminal, else a line every so often; always on stderr."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from clipjax.data.sources import UnreadableRecord

SECONDS_BETWEEN_LINES = 10.0


class Counting:
    """Counts rows done and skipped, and tells rows per second and the time left.

    Use as a context manager. Each skipped record is named at once.
    """

    def __init__(self, total: int, what: str, console: Console | None = None):
        """Nothing is shown before `__enter__`.

        Args:
          total: rows to be done.
          what: their name, such as "pictures".
          console: default: stderr.
        """
        from rich.console import Console

        self.total, self.what = total, what
        self.done = self.skipped = self.found = 0
        self._console = console or Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._start = self._line = time.monotonic()

    def __enter__(self) -> Counting:
        self._start = self._line = time.monotonic()
        if self._console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            bar = Progress(
                TextColumn("{task.completed:,}/{task.total:,} " + self.what),
                BarColumn(),
                TextColumn("{task.fields[pace]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = bar.add_task("", total=self.total, pace="")
            bar.start()
            self._bar = bar
        return self

    def __exit__(self, *exc_info) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, rows: int) -> None:
        """So many more are done."""
        self.done += rows
        self._show()

    def find(self, rows: int) -> None:
        """So many are there already: they count as done, but not as fast."""
        self.found += rows
        self._show()

    def skip(self, failure: UnreadableRecord) -> None:
        """One is left out; the message names it."""
        self.skipped += 1
        self._say(f"skipped: {failure}")
        self._show()

    @property
    def pace(self) -> str:
        """Rows per second since the start, as text."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        return f"{(self.done + self.skipped) / seconds:,.1f} {self.what}/s"

    def summary(self) -> str:
        """What was done, in a line."""
        seconds = time.monotonic() - self._start
        already = f", {self.found:,} were there already" if self.found else ""
        return f"{self.done:,} {self.what} embedded in {seconds:.1f} s ({self.pace}), {self.skipped:,} skipped{already}"

    def _show(self) -> None:
        at = self.done + self.skipped + self.found
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=at, pace=self.pace)
        elif now - self._line >= SECONDS_BETWEEN_LINES:
            self._line = now
            self._say(f"{at:,}/{self.total:,} {self.what}  {self.pace}")

    def _say(self, text: str) -> None:
        from rich.text import Text  # as it is: no markup in brackets, no emoji for :names:

        self._console.print(Text(text), soft_wrap=True)
