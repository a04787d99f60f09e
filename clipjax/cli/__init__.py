"""The command line: one command per verb, each in the file of its name.

Exit codes: 0 done; 1 the run failed; 2 bad input, nothing was started; 69 not to be had now; 75 stopped by a
signal after saving; 76 stalled.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from clipjax.errors import Absent, ClipjaxError, did_you_mean

VERBS = {
    "train": "train CONFIG --workdir DIR, or continue what DIR holds",
    "eval": "run a run's evaluators on one of its checkpoints",
    "classify": "say which of some labels pictures show, with probabilities",
    "search": "rank the pictures of a folder, tars, Parquet files, ... by words",
    "embed": "write the embeddings of pictures or texts to Parquet files",
    "caption": "write captions of pictures with a run's or a model's decoder",
    "data": "prepare data for training: index, look, tokenizer, keep, near, count",
    "report": "write a run's report.html again",
    "average": "mean of the weights of several models (WiSE-FT, soups)",
    "config": "print the resolved configuration of a config file or a run",
    "methods": "list the published methods that are here, with their papers",
    "import": "turn weights of OpenAI, OpenCLIP, Hugging Face or big_vision into a model folder",
    "export": "write a run or model as other libraries load it",
    "plan": "say what a run would hold, send and take on TPUs or GPUs that are not here",
    "bench": "measure what the documentation claims",
}
"""Name -> summary. A verb's module, `clipjax.cli.<name>`, has `main(arguments) -> exit code`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; errors meant for the user become one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _unbreakable_stderr():
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    handler = _Stderr()
    handler.setFormatter(
        _Lines("%(where)s%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    )
    handler.addFilter(_first_process_alone)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Orbax logs the traceback of what it also raises.
    logging.getLogger("absl").setLevel(logging.ERROR if debug else logging.CRITICAL)
    logging.getLogger("clipjax").setLevel(logging.INFO)
    try:
        return _dispatch(arguments)
    except ClipjaxError as error:
        if debug:
            raise
        print(f"clipjax: {error}", file=sys.stderr)
        if isinstance(error, Absent):  # an orderly end would wait for the absent
            sys.stderr.flush()
            os._exit(error.exit_code)
        return error.exit_code
    except BrokenPipeError:  # `clipjax config ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left has no reader
        return 0


class _Unbreakable:
    """A stream that nobody may be listening to any more: a lost terminal ends no run."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.broken = False

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except (OSError, ValueError):  # broken pipe, hung-up terminal, full disk, closed file
            self.broken = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _unbreakable_stderr() -> Iterator[None]:
    before = sys.stderr
    stream = _Unbreakable(before)
    sys.stderr = stream  # type: ignore[assignment]
    try:
        yield
    finally:
        if not stream.broken:  # else Python would fail, at its end, to write out what is left
            sys.stderr = before


def _process() -> int | None:
    """Which of several processes this is; None while it is alone, or does not know yet."""
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed  # jax.process_index() would start the devices

    state = distributed.global_state
    return state.process_id if state.client is not None and (state.num_processes or 1) > 1 else None


def _first_process_alone(record: logging.LogRecord) -> bool:
    """What is not worth a warning is the same in all processes: one says it."""
    return record.levelno >= logging.WARNING or not _process()


class _Lines(logging.Formatter):
    """Lines with the time, and with the process where there are several: `[p3] 12:01:07 INFO ...`."""

    def format(self, record: logging.LogRecord) -> str:
        process = _process()
        record.where = "" if process is None else f"[p{process}] "
        return super().format(record)


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the moment: a live display replaces it, so as not to be torn apart."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, value):
        pass


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"clipjax {version('clipjax')}")
        return 0
    if not arguments or arguments[0] in ("--help", "-h"):
        print(_help())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise ClipjaxError(f"no command {verb!r}{did_you_mean(verb, VERBS)}")
    # With an underscore where the name is a word of Python's own: `import` is in import_.py.
    module = importlib.import_module(f"clipjax.cli.{'import_' if verb == 'import' else verb}")
    return module.main(rest)


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: clipjax COMMAND [OPTIONS]\n",
            *lines,
            "\nclipjax COMMAND --help lists a command's options; --debug shows an error's traceback.",
            "Exit codes: 0 done; 1 the run failed; 2 bad input; and, to be started again: 69 not to be had now;",
            "75 stopped by a signal after saving; 76 no step ended in time.",
        ]
    )
