"""The command line: one command per verb, each in the file of its name.

Exit codes: 0 done; 1 the run failed; 2 bad input, nothing was started; 75 stopped by a signal after saving.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

from clipjax.errors import ClipjaxError, did_you_mean

VERBS = {
    "train": "train CONFIG --workdir DIR, or continue what DIR holds",
    "eval": "run a run's evaluators on one of its checkpoints",
    "classify": "say which of some labels pictures show, with probabilities",
    "search": "rank the pictures of a folder by words",
    "embed": "write the embeddings of pictures or texts to Parquet files",
    "caption": "write captions of pictures with a run's or a model's decoder",
    "data": "prepare data for training: find the samples of tars",
    "report": "write a run's report.html again",
    "average": "mean of the weights of several models (WiSE-FT, soups)",
    "config": "print the resolved configuration of a config file or a run",
    "methods": "list the published methods that are here, with their papers",
    "import": "turn weights of OpenAI, OpenCLIP, Hugging Face or big_vision into a model folder",
    "export": "write a run or model as other libraries load it",
    "bench": "measure what the documentation claims",
}
"""Name -> summary. A verb's module, `clipjax.cli.<name>`, has `main(arguments) -> exit code`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; errors meant for the user become one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", handlers=[_Stderr()]
    )
    # Orbax logs the traceback of what it also raises.
    logging.getLogger("absl").setLevel(logging.ERROR if debug else logging.CRITICAL)
    logging.getLogger("clipjax").setLevel(logging.INFO)
    try:
        return _dispatch(arguments)
    except ClipjaxError as error:
        if debug:
            raise
        print(f"clipjax: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `clipjax config ... | head`
        sys.stderr.close()
        return 0


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
            "Exit codes: 0 done; 1 the run failed; 2 bad input; 75 stopped by a signal after saving.",
        ]
    )
