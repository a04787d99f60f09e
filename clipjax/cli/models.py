"""What the verbs that use a model share: which model, the kept compilations, names for refusals."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipjax.cli.arguments import import_files, model_path
from clipjax.errors import ClipjaxError

if TYPE_CHECKING:
    import numpy as np

    from clipjax.predictor import Predictor
    from clipjax.pretrained import Pretrained

RUNS = Path("runs")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, which `open_model` opens."""
    parser.add_argument(
        "--model", type=model_path, metavar="PATH",
        help="a run's folder, one of its checkpoints/<step>, a model's folder, or hf://owner/name; default: the "
        "only run in runs/",
    )  # fmt: skip


def open_model(namespace: argparse.Namespace) -> tuple[Path, Pretrained]:
    """The model that the user named, or the only one there is, with its path."""
    path = namespace.model or only_run(RUNS)
    if not path.exists():
        raise ClipjaxError(f"--model {path}: there is no such file or folder")
    keep_compilations()
    import_files(namespace.imports)
    from clipjax.restore import open_pretrained

    return path, open_pretrained(path)


def only_run(folder: Path) -> Path:
    """The run or model in `folder`, if there is exactly one.

    Raises:
      ClipjaxError: there is none, or there are several, which are named.
    """
    marks = ("run.json", "model.json")
    found = (
        sorted(p for p in folder.iterdir() if any((p / mark).is_file() for mark in marks))
        if folder.is_dir()
        else []
    )
    if not found:
        raise ClipjaxError(f"name a model with --model PATH: there is no run in {folder}/")
    if len(found) > 1:
        raise ClipjaxError(
            f"{folder}/ holds {len(found)} runs: name one with --model, of "
            + ", ".join(map(str, found))
        )
    return found[0]


def keep_compilations() -> None:
    """Lets jax keep compiled programs between commands, so that only the first one waits for them.

    They go to `clipjax/xla` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache, or
    ~/Library/Caches). JAX_COMPILATION_CACHE_DIR names another folder, or, empty, none.
    Must run before anything is compiled.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # jax has read it
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written: compile each time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def cache_folder() -> Path:
    """Where compiled programs are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        base = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(base).expanduser() / "clipjax" / "xla"


def read_pictures(
    predictor: Predictor, files: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(the pictures that can be read, why the others cannot), by file; each of those is named on stderr.

    Raises:
      ClipjaxError: none can be read.
    """
    from clipjax.data.sources import UnreadableRecord

    pictures: dict[str, np.ndarray] = {}
    skipped: dict[str, str] = {}
    for file in files:
        try:
            pictures[file] = predictor.read(file, file)
        except UnreadableRecord as failure:
            skipped[file] = str(failure)
            say(f"skipped: {failure}")
    if not pictures:
        raise ClipjaxError(f"not one of {len(skipped)} pictures can be read")
    return pictures, skipped


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Puts the model that the user named before what is said against it."""
    try:
        yield
    except ClipjaxError as error:
        raise type(error)(f"{path}: {error}") from error


def say(text: str) -> None:
    """One line on stderr."""
    print(f"clipjax: {text}", file=sys.stderr)
