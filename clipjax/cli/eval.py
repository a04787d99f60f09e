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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipjax.cli.arguments import import_files, new_parser
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.stores import place

if TYPE_CHECKING:
    from clipjax.data import Source
    from clipjax.evals import Evaluator, Runner
    from clipjax.predictor import Predictor

TASKS = (
    "zeroshot", "retrieval", "linear_probe", "knn", "few_shot", "geometry", "compositional",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Evaluates."""
    options = _parse(arguments)
    _check(options)
    if options.fit_scaling:
        from clipjax.cli.scaling import fit_scaling

        return fit_scaling(options)
    from clipjax.processes import start_processes

    import_files(options.imports)
    start_processes()
    evaluators = _evaluators(options)
    # All of them are looked for before the first is evaluated.
    steps = {path: _step(path, bool(evaluators)) for path in options.models}
    results: dict[str, dict[str, float]] = {}
    for path in options.models:
        predictor, runners = _open(path, evaluators, options)
        results[str(path)] = {}
        for _, runner in runners:
            results[str(path)] |= runner(predictor)
        if options.confusion:
            _draw_confusion(options, runners)
    import jax

    if jax.process_index() == 0:
        _print(results, steps, options)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "eval", "Figures of runs and models, by their own evaluators or on any data set."
    )
    add = parser.add_argument
    add("models", nargs="+", type=place, metavar="RUN_OR_MODEL",
        help="a run's folder, one of its checkpoints/<step>, a model's folder, or other people's weights")  # fmt: skip
    add("--json", action="store_true", help="end with one JSON object on the last line")
    add(
        "--table",
        choices=("md", "csv"),
        help="print a table of this form: a row a figure, a column a model",
    )
    add("--batch-size", type=int, help="pictures or texts at a time (default: 64 a device)")

    data = parser.add_argument_group("what to evaluate on (default: a run's own evaluators)")
    add = data.add_argument
    add(
        "--evals",
        type=Path,
        metavar="FILE.py",
        help="a file with `def evals() -> tuple[Evaluator, ...]`",
    )
    add("--dataset", action="append", default=[], metavar="NAME[:SPLIT] | PATH",
        help="a TFDS data set, a folder of classes or with a captions table, .tar files; repeatable")  # fmt: skip
    add("--task", action="append", default=[], metavar="TASK",
        help=f"{', '.join(TASKS)}; repeatable (default: the first two, as fits)")  # fmt: skip
    add("--train-dataset", metavar="NAME[:SPLIT] | PATH",
        help="what linear_probe, knn and few_shot learn from (default: the split train of the data set)")  # fmt: skip
    add("--limit", type=int, help="most records of a split")
    for key in ("data-dir", "image-key", "caption-key", "language-key", "label-key"):
        add(
            f"--{key}",
            help="of a TFDS data set: where it is" if key == "data-dir" else "of a TFDS data set",
        )

    tasks = parser.add_argument_group("tasks")
    add = tasks.add_argument
    add(
        "--languages",
        help="retrieval: codes of languages, comma-separated, the first for the main figures",
    )
    add("--prompts", metavar="NAME|FILE.json",
        help="zeroshot: class names and templates (default: those that come with clipjax)")  # fmt: skip
    add("--templates", metavar="FILE", help="zeroshot: prompts, one a line or a JSON list")
    add(
        "--class-map",
        metavar="FILE.json",
        help="zeroshot: from the data set's classes to those of --prompts",
    )
    add("--calibration", action="store_true", help="zeroshot: also the calibration error")
    add(
        "--confusion",
        type=Path,
        metavar="OUT.png",
        help="zeroshot: draw what was taken for what",
    )
    add(
        "--log10-c",
        type=float,
        help="linear_probe, few_shot: fix scikit-learn's C at this power of ten",
    )
    add(
        "--folds",
        type=int,
        help="linear_probe: parts of the training split to choose C on (default: 5)",
    )
    add("--k", type=int, help="knn: neighbors (default: 20)")
    add("--temperature", type=float, help="knn: of the weights (default: 0.07)")
    add("--shots", help="few_shot: pictures a class, comma-separated (default: 1,2,4,8,16)")
    add("--draws", type=int, help="few_shot: how often the pictures are drawn (default: 5)")
    add("--seed", type=int, help="linear_probe, few_shot: of what is drawn (default: 0)")
    add(
        "--images",
        metavar="FOLDER",
        help="compositional: where the pictures are; --dataset names the entries",
    )

    scaling = parser.add_argument_group("scaling law over several runs")
    add = scaling.add_argument
    add(
        "--fit-scaling",
        action="store_true",
        help="fit error = a x^-b + c to the runs' results.json",
    )
    add("--metric", help="a figure's name (default: retrieval/image_to_text/R@1)")
    add("--x", help="examples (default), params or flops")
    add("--plot", type=Path, metavar="OUT.png", help="draw the fit")
    add("--resamples", type=int, help="bootstrap fits behind the intervals (default: 200)")

    options, unknown = parser.parse_known_args(arguments)
    known = [name for action in parser._actions for name in action.option_strings]
    for name in unknown:
        raise ClipjaxError(f"eval: no option {name!r}{did_you_mean(name.split('=')[0], known)}")
    return options


_ONLY_FOR = {
    "languages": ("retrieval",),
    "prompts": ("zeroshot",), "templates": ("zeroshot",), "class_map": ("zeroshot",),
    "calibration": ("zeroshot",), "confusion": ("zeroshot",),
    "log10_c": ("linear_probe", "few_shot"), "seed": ("linear_probe", "few_shot"),
    "folds": ("linear_probe",), "k": ("knn",), "temperature": ("knn",),
    "shots": ("few_shot",), "draws": ("few_shot",), "images": ("compositional",),
    "train_dataset": ("linear_probe", "knn", "few_shot"),
}  # fmt: skip
_FOR_DATASET = ("limit", "data_dir", "image_key", "caption_key", "language_key", "label_key")
_FOR_SCALING = ("metric", "x", "plot", "resamples")


def _check(options: argparse.Namespace) -> None:
    """Refuses options that would have no effect."""

    def given(names) -> list[str]:
        return [
            "--" + n.replace("_", "-")
            for n in names
            if getattr(options, n) not in (None, False, [])
        ]

    for task in options.task:
        if task not in TASKS:
            raise ClipjaxError(f"--task: no task {task!r}{did_you_mean(task, TASKS)}")
    if options.fit_scaling:
        rest = ("dataset", "task", "evals", "table", "batch_size", *_FOR_DATASET, *_ONLY_FOR)
        if useless := given(rest):
            raise ClipjaxError(f"{useless[0]} has no effect with --fit-scaling")
        return
    if useless := given(_FOR_SCALING):
        raise ClipjaxError(f"{useless[0]} needs --fit-scaling")
    if options.dataset and options.evals:
        raise ClipjaxError("--dataset and --evals both say what to evaluate on: give one")
    if not options.dataset:
        drawing = ("confusion",)
        useless = given(("task", *_FOR_DATASET, *(n for n in _ONLY_FOR if n not in drawing)))
        if useless:
            raise ClipjaxError(f"{useless[0]} needs --dataset")
        return
    tasks = set(options.task) or {_default_task(options, name) for name in options.dataset}
    for name, needed in _ONLY_FOR.items():
        if given([name]) and not tasks & set(needed):
            raise ClipjaxError(f"{given([name])[0]} is for --task {' or '.join(needed)}")
    if options.confusion and (len(options.models) > 1 or len(options.dataset) > 1):
        raise ClipjaxError("--confusion draws one picture: give one model and one data set")
    if "compositional" in tasks and tasks != {"compositional"}:
        raise ClipjaxError("--task compositional reads files of entries: evaluate it by itself")
    if "compositional" in tasks and not options.images:
        raise ClipjaxError("--task compositional needs --images, the folder of the pictures")


def _evaluators(options: argparse.Namespace) -> tuple[Evaluator, ...]:
    """What the options ask for; none for the run's own."""
    if options.evals:
        return _from_file(options.evals)
    if options.images:
        return (_compositional(options),)
    found = []
    for dataset in options.dataset:
        tasks = options.task or [_default_task(options, dataset)]
        for task in dict.fromkeys(tasks):
            evaluator = _BUILDERS[task](options, dataset)
            if len(options.dataset) > 1:
                fields: dict[str, Any] = {"name": f"{_slug(dataset)}_{evaluator.name}"}
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
    by_folder = Path(dataset).expanduser().is_dir() and not any(
        Path(dataset).expanduser().glob("captions.*")
    )
    return "zeroshot" if options.prompts or _shipped(dataset) or by_folder else "retrieval"


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


def _slug(dataset: str) -> str:
    """What a data set is called in the names of figures."""
    path = Path(dataset).expanduser()
    return path.resolve().name if path.exists() else re.sub(r"[/:]", "_", dataset)


def _source(options: argparse.Namespace, name: str) -> Source:
    from clipjax.data.named import named_source

    keys = ("data_dir", "image_key", "caption_key", "language_key", "label_key")
    return named_source(name, **{key: getattr(options, key) for key in keys})


def _train_source(options: argparse.Namespace, dataset: str) -> Source:
    from clipjax.data import Tfds

    if options.train_dataset:
        return _source(options, options.train_dataset)
    source = _source(options, dataset)
    if not isinstance(source, Tfds) or source.split == "train":
        raise ClipjaxError(f"{dataset}: say with --train-dataset what to learn from")
    return dataclasses.replace(source, split="train")


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _zeroshot(options: argparse.Namespace, dataset: str) -> Evaluator:
    from clipjax.evals import ZeroShot
    from clipjax.evals.prompts import read_templates

    prompts = options.prompts or _shipped(dataset)
    templates = read_templates(options.templates) if options.templates else ()
    return ZeroShot(
        source=_source(options, dataset), prompts=prompts, templates=templates,
        calibration=options.calibration, **_given(options, "limit", "class_map"),
    )  # fmt: skip


def _retrieval(options: argparse.Namespace, dataset: str) -> Evaluator:
    from clipjax.evals import Retrieval

    languages = tuple(options.languages.split(",")) if options.languages else ()
    return Retrieval(
        source=_source(options, dataset), languages=languages, **_given(options, "limit")
    )


def _geometry(options: argparse.Namespace, dataset: str) -> Evaluator:
    from clipjax.evals import Geometry

    return Geometry(source=_source(options, dataset), **_given(options, "limit"))


def _linear_probe(options: argparse.Namespace, dataset: str) -> Evaluator:
    from clipjax.evals import LinearProbe

    settings = _given(options, "limit", "log10_c", "folds", "seed")
    return LinearProbe(
        train=_train_source(options, dataset), source=_source(options, dataset), **settings
    )


def _knn(options: argparse.Namespace, dataset: str) -> Evaluator:
    from clipjax.evals import KNN

    settings = _given(options, "limit", "k", "temperature")
    return KNN(train=_train_source(options, dataset), source=_source(options, dataset), **settings)


def _few_shot(options: argparse.Namespace, dataset: str) -> Evaluator:
    from clipjax.evals import FewShot

    settings = _given(options, "limit", "log10_c", "draws", "seed")
    if options.shots:
        try:
            settings["shots"] = tuple(int(n) for n in options.shots.split(","))
        except ValueError:
            raise ClipjaxError(f"--shots {options.shots}: give numbers such as 1,4,16") from None
    return FewShot(
        train=_train_source(options, dataset), source=_source(options, dataset), **settings
    )


def _compositional(options: argparse.Namespace) -> Evaluator:
    from clipjax.evals import Compositional

    return Compositional(
        files=tuple(options.dataset), images=options.images, **_given(options, "limit")
    )


_BUILDERS: dict[str, Callable[[argparse.Namespace, str], Evaluator]] = {
    "zeroshot": _zeroshot, "retrieval": _retrieval, "linear_probe": _linear_probe, "knn": _knn,
    "few_shot": _few_shot, "geometry": _geometry,
}  # fmt: skip


def _step(path: Path, has_evaluators: bool) -> int | None:
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


def _open(
    path: Path, evaluators: tuple[Evaluator, ...], options: argparse.Namespace
) -> tuple[Predictor, list[tuple[Evaluator, Runner]]]:
    """A model with runners of its own, since what they keep depends on its tokenizer."""
    from clipjax.evals import build_runners
    from clipjax.restore import open_pretrained, open_run

    if evaluators:
        predictor = open_pretrained(path).predictor(batch_size=options.batch_size)
        return predictor, build_runners(evaluators)
    opened = open_run(path, batch_size=options.batch_size)
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
    options: argparse.Namespace,
) -> None:
    if options.table:
        print_table(results, options.table)
    else:
        from clipjax.tracking import print_results

        for (path, figures), step in zip(results.items(), steps.values(), strict=True):
            print_results(path if step is None else f"{path} at step {step}", figures)
    if options.json:
        facts = {
            path: ({} if step is None else {"step": step}) | dict(figures)
            for (path, figures), step in zip(results.items(), steps.values(), strict=True)
        }
        print(json.dumps(next(iter(facts.values())) if len(facts) == 1 else facts))


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
