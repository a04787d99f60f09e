"""`clipjax eval RUN --watch`: a run's checkpoints evaluated as they come, beside the run."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from clipjax.cli.models import about, say
from clipjax.errors import ClipjaxError
from clipjax.files import append_line
from clipjax.stores import read_bytes

if TYPE_CHECKING:
    from clipjax.evals import Evaluator, Runner

FILE = "watched.jsonl"
"""In the run's folder: a line a checkpoint, its step and its figures."""


def watch(options: argparse.Namespace, evaluators: tuple[Evaluator, ...]) -> int:
    """Evaluates each checkpoint that has no line in the file yet; returns once the run has ended.

    It may be started before the run: it waits for the run's folder, and says so. Checkpoints that the
    run deletes before their turn are left out, with a note.
    """
    from clipjax.checkpoint import FOLDER, complete_steps
    from clipjax.evals import build_runners
    from clipjax.pretrained import is_pretrained
    from clipjax.restore import open_pretrained, open_run
    from clipjax.tracking import print_results

    folder: Path = options.models[0]
    if folder.is_file() or is_pretrained(folder):
        raise ClipjaxError(f"--watch {folder}: this is no run, whose checkpoints could come")
    poll = 30.0 if options.poll is None else options.poll
    if not complete_steps(folder):
        there = "has no checkpoint" if folder.is_dir() else "is not there"
        say(f"--watch {folder}: it {there} yet; waiting for the first one")
    done = _watched(folder / FILE)
    runners: list[tuple[Evaluator, Runner]] = build_runners(evaluators)
    while True:
        ended = (folder / "results.json").is_file()  # before looking, so that the last one is seen
        new = [step for step in complete_steps(folder) if step not in done]
        for step in new:
            done.add(step)
            try:
                path = folder / FOLDER / str(step)
                if not runners:
                    runners = open_run(path, batch_size=options.batch_size).runners
                predictor = open_pretrained(path).predictor(batch_size=options.batch_size)
            except (ClipjaxError, OSError) as error:
                if (folder / FOLDER / str(step)).is_dir():
                    raise
                say(f"step {step} is gone before it could be read: {error}")
                continue
            if not runners:
                raise ClipjaxError(
                    f"{folder} has no evaluators of its own: give --dataset or --evals"
                )
            figures: dict[str, float] = {}
            with about(path):
                for _, runner in runners:
                    figures |= runner(predictor)
            print_results(f"{folder} at step {step}", figures)
            line = json.dumps({"step": step} | figures)
            append_line(folder / FILE, line)
            if options.json:
                print(line, flush=True)
        if ended and not new:
            return 0
        if not new:
            time.sleep(poll)


def _watched(file: Path) -> set[int]:
    """The steps that have a line; one that a kill cut short is written again."""
    if not file.is_file():
        return set()
    found = set()
    for line in read_bytes(file).decode().splitlines():
        try:
            found.add(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found
