"""The errors a user can mend, and the exit codes of the command line.

Every refusal of bad input raises `ClipjaxError` (or a subclass) with one message that names the
thing, the value and the remedy. The command line prints that message alone; `--debug` adds the
traceback. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1  # the run itself failed: it diverged, or too many records could not be read
EXIT_BAD_INPUT = 2  # the command, the config or a file is wrong: nothing was started
EXIT_PREEMPTED = 75  # stopped by a signal after saving: start the same command again (EX_TEMPFAIL)


class ClipjaxError(Exception):
    """Bad input or a failed run, with a message meant for the user."""

    exit_code = EXIT_BAD_INPUT


class RunFailed(ClipjaxError):
    """The run started and cannot go on (divergence, too many unreadable records)."""

    exit_code = EXIT_FAILED


class Preempted(ClipjaxError):
    """A signal asked the run to stop; it has saved and can be started again."""

    exit_code = EXIT_PREEMPTED


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'width'?"` for the nearest of `known`, or the list of what there is."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; known: " + ", ".join(known) if known else ""
