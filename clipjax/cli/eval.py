"""`clipjax eval RUN_OR_MODEL... [--dataset D] [--task T]`: figures of models, on any data set.

Without --dataset and --evals, a run's own evaluators.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipjax.cli.arguments import import_files, model_path, new_parser
from clipjax.cli.tasks import (
    TASKS,
    add_options,
    build,
    compositional,
    evaluator_class,
    is_by_folder,
    options_of,
    wants_training,
)
from clipjax.errors import ClipjaxError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

    from clipjax.data import Source
    from clipjax.evals import Evaluator, Runner
    from clipjax.predictor import Predictor


def main(arguments: list[str]) -> int:
    """Evaluates."""
    options, tasks = _parse(arguments)
    if options.fit_scaling:
        from clipjax.cli.scaling import fit_scaling

        return fit_scaling(options)
    if options.watch:
        from clipjax.cli.watch import watch

        return watch(options, _evaluators(options, tasks))
    from clipjax.processes import start_processes

    start_processes()
    evaluators = _evaluators(options, tasks)
    # All of them are looked for before the first is evaluated.
    steps = {path: step_of(path, bool(evaluators)) for path in options.models}
    results: dict[str, dict[str, float]] = {}
    samples: dict[str, dict[str, np.ndarray]] = {}
    for path in options.models:
        predictor, runners = open_model(path, evaluators, options.batch_size)
        results[str(path)], samples[str(path)] = {}, {}
        for _, runner in runners:
            results[str(path)] |= runner(predictor)
            samples[str(path)] |= runner.samples
    import jax

    if jax.process_index() == 0:
        _print(results, steps, samples, options)
        if options.confusion:  # last, so that the figures are there whatever becomes of it
            _draw_confusion(options, runners)
    return 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the options, all tasks there are: those of clipjax and of the files that --imports names)."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--imports", action="append", default=[], type=Path)
    early.add_argument("--task", action="append", default=[])
    known, _ = early.parse_known_args(arguments)
    import_files(known.imports)
    tasks = list(dict.fromkeys([*TASKS, *known.task]))
    for task in tasks:
        evaluator_class(task)
    parser = _parser(tasks)
    options, unknown = parser.parse_known_args(arguments)
    flags = [name for action in parser._actions for name in action.option_strings]
    for name in unknown:
        raise ClipjaxError(f"eval: no option {name!r}{did_you_mean(name.split('=')[0], flags)}")
    _check(options, tasks)
    return options, tasks


def _parser(tasks: list[str]) -> argparse.ArgumentParser:
    parser = new_parser(
        "eval", "Figures of runs and models, by their own evaluators or on any data set."
    )
    add = parser.add_argument
    add("models", nargs="+", type=model_path, metavar="RUN_OR_MODEL",
        help="a run's folder, one of its checkpoints/<step>, a model's folder, hf://owner/name, or other "
        "people's weights")  # fmt: skip
    add("--json", action="store_true", help="end with one JSON object on the last line")
    add("--table", choices=("md", "csv"),
        help="print a table of this form: a row a figure, a column a model")  # fmt: skip
    add("--batch-size", type=int, help="pictures or texts at a time (default: 64 a device)")
    add("--bootstrap", type=int, metavar="N",
        help="also 95 %% intervals of figures that are means over pictures or texts, from N resamples; with "
        "several models, also the first one's differences from the others on the same examples")  # fmt: skip
    add("--watch", action="store_true",
        help="evaluate a run's checkpoints as they come, until it has ended; figures go to the run's "
        "watched.jsonl")  # fmt: skip
    add("--poll", type=float, metavar="SECONDS",
        help="with --watch: how often to look for a checkpoint (default: 30)")  # fmt: skip

    data = parser.add_argument_group("what to evaluate on (default: a run's own evaluators)")
    add = data.add_argument
    add("--evals", type=Path, metavar="FILE.py",
        help="a file with `def evals() -> tuple[Evaluator, ...]`")  # fmt: skip
    add("--dataset", action="append", default=[], metavar="NAME[:SPLIT] | PATH",
        help="a TFDS data set, a folder of classes or with a captions table, .tar files; repeatable")  # fmt: skip
    add("--task", action="append", default=[], metavar="TASK",
        help=f"{', '.join(TASKS)}, or the class of an evaluator of your own from --imports; repeatable "
        "(default: the first two, as fits)")  # fmt: skip
    add("--train-dataset", metavar="NAME[:SPLIT] | PATH",
        help="what linear_probe, knn and few_shot learn from (default: the split train of the data set); "
        "what captioning takes its baseline from")  # fmt: skip
    for key, what in _KEYS.items():
        add(f"--{key.replace('_', '-')}", help=what)
    add("--templates", metavar="FILE", help="zeroshot: prompts, one a line or a JSON list")
    add("--confusion", type=Path, metavar="OUT.png", help="zeroshot: draw what was taken for what")
    add_options(parser, tasks)

    scaling = parser.add_argument_group("scaling law over several runs")
    add = scaling.add_argument
    add("--fit-scaling", action="store_true",
        help="fit error = a x^-b + c to the runs' results.json")  # fmt: skip
    add("--metric", help="a figure's name (default: retrieval/image_to_text/R@1)")
    add("--x", help="examples (default), params or flops")
    add("--plot", type=Path, metavar="OUT.png", help="draw the fit")
    add("--resamples", type=int, help="bootstrap fits behind the intervals (default: 200)")
    return parser


_KEYS = {
    "data_dir": "of a TFDS data set: where it is",
    "image_key": "where pictures are: a feature (TFDS), a suffix (tars), a column (tables)",
    "caption_key": "where captions are, likewise",
    "label_key": "where labels are, likewise",
    "language_key": "of a TFDS data set: the feature with the captions' languages",
}
_FOR_SCALING = ("metric", "x", "plot", "resamples")


def _check(options: argparse.Namespace, tasks: list[str]) -> None:
    """Refuses options that would have no effect."""

    def given(names) -> list[str]:
        return [
            "--" + n.replace("_", "-")
            for n in names
            if getattr(options, n) not in (None, False, [])
        ]

    owners = _owners(tasks)
    for task in options.task:
        evaluator_class(task)
    if options.fit_scaling:
        rest = ("dataset", "task", "evals", "table", "batch_size", "bootstrap", "watch", *_KEYS)
        if useless := given((*rest, *owners)):
            raise ClipjaxError(f"{useless[0]} has no effect with --fit-scaling")
        return
    if useless := given(_FOR_SCALING):
        raise ClipjaxError(f"{useless[0]} needs --fit-scaling")
    if options.watch and (len(options.models) > 1 or given(("table", "bootstrap", "confusion"))):
        raise ClipjaxError("--watch prints the figures of one run's checkpoints, as they come")
    if options.poll is not None and not options.watch:
        raise ClipjaxError("--poll needs --watch")
    if options.confusion:
        from clipjax.report.confusion import require_drawable

        require_drawable(options.confusion)
        if len(options.models) > 1 or len(options.dataset) > 1:
            raise ClipjaxError("--confusion draws one picture: give one model and one data set")
    if options.bootstrap is not None and options.bootstrap < 100:
        raise ClipjaxError(f"--bootstrap {options.bootstrap}: an interval takes at least 100")
    if options.dataset and options.evals:
        raise ClipjaxError("--dataset and --evals both say what to evaluate on: give one")
    if not options.dataset:
        useless = given(("task", *_KEYS, *(n for n in owners if n != "confusion")))
        if useless:
            raise ClipjaxError(f"{useless[0]} needs --dataset")
        return
    chosen = set(options.task) or {_default_task(options, name) for name in options.dataset}
    for name, needed in owners.items():
        if given([name]) and not chosen & set(needed):
            raise ClipjaxError(f"{given([name])[0]} is for --task {' or '.join(needed)}")
    if "compositional" in chosen and chosen != {"compositional"}:
        raise ClipjaxError("--task compositional reads files of entries: evaluate it by itself")
    if "compositional" in chosen and not options.images:
        raise ClipjaxError("--task compositional needs --images, the folder of the pictures")


def _owners(tasks: list[str]) -> dict[str, list[str]]:
    """By option, the tasks that it says something to."""
    found = {"templates": ["zeroshot"], "confusion": ["zeroshot"], "train_dataset": []}
    for task in tasks:
        for name in options_of(evaluator_class(task)):
            found.setdefault(name, []).append(task)
        if wants_training(task):
            found["train_dataset"].append(task)
    return found


def _evaluators(options: argparse.Namespace, tasks: list[str]) -> tuple[Evaluator, ...]:
    """What the options ask for; none for the run's own."""
    if options.evals:
        return _from_file(options.evals)
    if options.images:
        return (compositional(options),)
    found = []
    names = _short_names(options.dataset)
    for dataset in options.dataset:
        asked = options.task or [_default_task(options, dataset)]
        for task in dict.fromkeys(asked):
            train = _train_source(options, dataset) if wants_training(task) else None
            evaluator = build(task, options, _source(options, dataset), train, _shipped(dataset))
            if len(options.dataset) > 1:
                fields: dict[str, Any] = {"name": f"{names[dataset]}_{evaluator.name}"}
                evaluator = dataclasses.replace(evaluator, **fields)
            found.append(evaluator)
    return tuple(found)


def _from_file(path: Path) -> tuple[Evaluator, ...]:
    from clipjax.config import load_module
    from clipjax.evals import Evaluator

    module = load_module(path)
    if not callable(getattr(module, "evals", None)):
        raise ClipjaxError(
            f"{path}: a file of evaluators defines `def evals() -> tuple[Evaluator, ...]`"
        )
    found = tuple(module.evals())
    if not found or not all(isinstance(each, Evaluator) for each in found):
        raise ClipjaxError(f"{path}: evals() must return evaluators, at least one")
    return found


def _default_task(options: argparse.Namespace, dataset: str) -> str:
    """`zeroshot` where class names are at hand, else `retrieval`."""
    if options.images:
        return "compositional"
    named = options.prompts or _shipped(dataset) or is_by_folder(dataset)
    return "zeroshot" if named else "retrieval"


_SAME_CLASSES = {
    "imagenet2012": "imagenet", "imagenet_v2": "imagenet", "imagenet_sketch": "imagenet",
    "imagenet2012_corrupted": "imagenet", "cifar10_corrupted": "cifar10", "cifar10_1": "cifar10",
}  # fmt: skip


def _shipped(dataset: str) -> str | None:
    """The class names that come with clipjax for a TFDS data set."""
    from clipjax.evals.prompts import shipped_classes

    name = dataset.split(":")[0].split("/")[0]
    name = _SAME_CLASSES.get(name, name)
    return name if name in shipped_classes() else None


def _short_names(datasets: list[str]) -> dict[str, str]:
    """What data sets are called in the names of figures: as short as tells them apart."""
    parts = {}
    for dataset in datasets:
        path = Path(dataset).expanduser()
        words = path.resolve().parts[1:] if path.exists() else (re.sub(r"[/:]", "_", dataset),)
        parts[dataset] = words[::-1]
    for length in range(1, 1 + max(map(len, parts.values()), default=0)):
        names = {dataset: "_".join(words[:length][::-1]) for dataset, words in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names if parts else {}


def _source(options: argparse.Namespace, name: str) -> Source:
    from clipjax.data.named import named_source

    return named_source(name, **{key: getattr(options, key) for key in _KEYS})


def _train_source(options: argparse.Namespace, dataset: str) -> Source | None:
    """What --train-dataset names, else the split train of a TFDS data set, if it is another one."""
    from clipjax.data import Tfds

    if options.train_dataset:
        return _source(options, options.train_dataset)
    source = _source(options, dataset)
    if not isinstance(source, Tfds) or source.split == "train":
        return None
    return dataclasses.replace(source, split="train")


def step_of(path: Path, has_evaluators: bool) -> int | None:
    """The step of a run's checkpoint, None for a model apart from a run; refuses anything else."""
    from clipjax.checkpoint import locate
    from clipjax.interop.source import is_source
    from clipjax.pretrained import is_pretrained

    if is_pretrained(path) or is_source(path):
        if not has_evaluators:
            raise ClipjaxError(
                f"{path} is a model without evaluators of its own: give --dataset or --evals"
            )
        return None
    return locate(path)[1]


def open_model(
    path: Path, evaluators: tuple[Evaluator, ...], batch_size: int | None
) -> tuple[Predictor, list[tuple[Evaluator, Runner]]]:
    """A model with runners of its own, since what they keep depends on its tokenizer."""
    from clipjax.evals import build_runners
    from clipjax.restore import open_pretrained, open_run

    if evaluators:
        predictor = open_pretrained(path).predictor(batch_size=batch_size)
        return predictor, build_runners(evaluators)
    opened = open_run(path, batch_size=batch_size)
    if not opened.runners:
        raise ClipjaxError(f"{path} has no evaluators of its own: give --dataset or --evals")
    return opened.predictor, opened.runners


def _draw_confusion(options: argparse.Namespace, runners: list[tuple[Evaluator, Runner]]) -> None:
    from clipjax.evals import ZeroShotRunner
    from clipjax.report.confusion import draw_confusion

    found = [runner.confusion() for _, runner in runners if isinstance(runner, ZeroShotRunner)]
    confusions = [confusion for confusion in found if confusion is not None]
    if len(confusions) != 1:
        raise ClipjaxError(
            f"--confusion draws one picture, and {len(confusions)} zero-shot evaluators ran: choose "
            "one with --dataset"
        )
    draw_confusion(confusions[0], options.confusion)
    print(f"wrote {options.confusion}", file=sys.stderr)


def _print(
    results: Mapping[str, Mapping[str, float]],
    steps: Mapping[Path, int | None],
    samples: Mapping[str, Mapping[str, np.ndarray]],
    options: argparse.Namespace,
) -> None:
    if options.table:
        print_table(results, options.table)
    else:
        from clipjax.tracking import print_results

        for (path, figures), step in zip(results.items(), steps.values(), strict=True):
            print_results(path if step is None else f"{path} at step {step}", figures)
    intervals, differences = _trust(samples, options.bootstrap) if options.bootstrap else ({}, {})
    if not options.json:
        return
    facts: dict[str, dict[str, Any]] = {
        path: ({} if step is None else {"step": step}) | dict(figures)
        for (path, figures), step in zip(results.items(), steps.values(), strict=True)
    }
    for path, found in intervals.items():
        facts[path]["interval_95"] = found
    for path, found in differences.items():
        facts[path]["difference"] = found
    print(json.dumps(next(iter(facts.values())) if len(facts) == 1 else facts))


def _trust(
    samples: Mapping[str, Mapping[str, np.ndarray]], resamples: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(95 % intervals by model and figure, differences from the first model likewise); prints both."""
    from clipjax.evals.intervals import difference, interval

    intervals: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, Any]] = {}
    first, *others = samples
    for path, values in samples.items():
        intervals[path] = {name: interval(x, resamples) for name, x in values.items()}
        print(f"95 % intervals of {path}, {resamples} resamples")
        for name, (low, high) in intervals[path].items():
            print(f"  {name:40} {low:.4f} to {high:.4f}")
    for path in others:
        differences[path] = {}
        print(f"{path} less {first}, on the same examples")
        for name, x in samples[path].items():
            if name in samples[first]:
                found = difference(samples[first][name], x, resamples)
                differences[path][name] = dataclasses.asdict(found)
                print(
                    f"  {name:40} {found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}), "
                    f"p = {found.p:.3g}"
                )
    return intervals, differences


def print_table(results: Mapping[str, Mapping[str, float]], kind: str) -> None:
    """Figures of several models on stdout: a row a figure, a column a model.

    Args:
      results: by model, its figures by name; what a model lacks stays empty.
      kind: "md" (four decimals) or "csv" (all digits).
    """
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    head = ["figure", *results]
    if kind == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(head)
        for name in names:
            writer.writerow([name, *(figures.get(name, "") for figures in results.values())])
        return
    rows = [
        [name, *(f"{figures[name]:.4f}" if name in figures else "" for figures in results.values())]
        for name in names
    ]
    head = [cell.replace("|", "\\|") for cell in head]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print("| " + " | ".join(cell.ljust(w) for cell, w in zip(head, widths, strict=True)) + " |")
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    print("| " + " | ".join(rule) + " |")
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [
            c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)
        ]
        print("| " + " | ".join(cells) + " |")
