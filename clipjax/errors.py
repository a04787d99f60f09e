"""The errors a user can mend, and the exit codes of the command line.

Every refusal of bad input raises `ClipjaxError` (or a subclass) with one message that names the
thing, the value and the remedy. The command line prints that message alone; `--debug` adds the
traceback. Any other exception is a bug and keeps its traceback.

Whoever starts a run again (a launcher, a cluster) needs one thing of a code: whether to. 1 and 2
mean never as it is; 69, 75 and 76 mean the same command again, 75 at once and the others after a
pause. docs/running.md has the table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1  # the run itself failed, and would again: it diverged, or records cannot be read
EXIT_BAD_INPUT = 2  # the command, the config or a file is wrong: nothing was started
EXIT_UNAVAILABLE = 69  # something the run needs is not to be had just now (EX_UNAVAILABLE)
EXIT_PREEMPTED = 75  # stopped by a signal after saving: start the same command again (EX_TEMPFAIL)
EXIT_STALLED = 76  # the watchdog ended it: no step was finished in time


class ClipjaxError(Exception):
    """Bad input or a failed run, with a message meant for the user."""

    exit_code = EXIT_BAD_INPUT


class RunFailed(ClipjaxError):
    """The run started and cannot go on as it is (divergence, too many unreadable records)."""

    exit_code = EXIT_FAILED


class Unavailable(ClipjaxError):
    """What the run needs is not to be had now: a folder in use, a full disk, a store that does not answer."""

    exit_code = EXIT_UNAVAILABLE


class Preempted(ClipjaxError):
    """A signal asked the run to stop; it has saved and can be started again."""

    exit_code = EXIT_PREEMPTED


class DamagedCheckpoint(ClipjaxError):
    """A checkpoint that cannot be read, or holds something else than was saved.

    Attributes:
      step: which one.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'width'?"` for the nearest of `known`, or the list of what there is."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; known: " + ", ".join(known) if known else ""
