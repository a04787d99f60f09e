"""`clipjax eval RUN_OR_MODEL... [--dataset D] [--task T]`: figures of models, on any data set.

Without --dataset and --evals, a run's own evaluators.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipjax.cli.arguments import import_files, model_path, new_parser
from clipjax.cli.figures import print_figures
from clipjax.cli.models import about
from clipjax.cli.tasks import (
    TASKS,
    add_options,
    build,
    evaluator_class,
    is_by_folder,
    of_entries,
    options_of,
    reads_entries,
    task_of_entries,
    wants_training,
)
from clipjax.errors import ClipjaxError, did_you_mean

if TYPE_CHECKING:
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
    for path in options.models:
        predictor, runners = open_model(path, evaluators, options.batch_size)
        results[str(path)] = {}
        with about(path):
            for _, runner in runners:
                results[str(path)] |= runner(predictor) | runner.figures
    import jax

    if jax.process_index() == 0:
        print_figures(results, steps, options.table, options.bootstrap, options.json)
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
        help="also 95 %% intervals of figures, from N resamples of the pictures or texts; with several "
        "models, also what each has more than the first on the same examples, with tests of it")  # fmt: skip
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
        help="a TFDS data set; a folder of classes or with a captions table, .tar or Parquet files, ...; of "
        "compositional, winoground and winogavil, a file of entries; repeatable")  # fmt: skip
    add("--task", action="append", default=[], metavar="TASK",
        help=f"{', '.join(TASKS)}, or the class of an evaluator of your own from --imports; repeatable "
        "(default: zeroshot, retrieval, or that of the entries, as fits)")  # fmt: skip
    add("--train-dataset", metavar="NAME[:SPLIT] | PATH",
        help="what linear_probe, knn, few_shot and linear_segmentation learn from (default: the split train of "
        "the data set); what captioning takes its baseline from")  # fmt: skip
    for key, what in _KEYS.items():
        add(f"--{key.replace('_', '-')}", help=what)
    add(
        "--templates",
        metavar="FILE",
        help="zeroshot, segmentation: prompts, one a line, a JSON list, or of CLIP_benchmark's files",
    )
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
        rest = ("dataset", "task", "evals", "table", "batch_size", "bootstrap", "watch", "poll")
        if useless := given((*rest, *_KEYS, *owners)):
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
    spoken = any(map(_is_crossmodal, options.dataset))  # --images has its pictures
    for name, needed in owners.items():
        if given([name]) and not chosen & set(needed) and not (name == "images" and spoken):
            raise ClipjaxError(f"{given([name])[0]} is for --task {' or '.join(needed)}")
    of_files = sorted(task for task in chosen if reads_entries(task))
    if of_files and set(of_files) != chosen:
        raise ClipjaxError(f"--task {of_files[0]} reads files of entries: evaluate it by itself")
    if of_files and not options.images:
        raise ClipjaxError(f"--task {of_files[0]} needs --images, the folder of the pictures")


def _owners(tasks: list[str]) -> dict[str, list[str]]:
    """By option, the tasks that it says something to."""
    found: dict[str, list[str]] = {"confusion": ["zeroshot"], "train_dataset": [], "templates": []}
    for task in tasks:
        if any(each.name == "templates" for each in dataclasses.fields(evaluator_class(task))):
            found["templates"].append(task)
        for name in options_of(evaluator_class(task)):
            found.setdefault(name, []).append(task)
        if wants_training(task):
            found["train_dataset"].append(task)
    return found


def _evaluators(options: argparse.Namespace, tasks: list[str]) -> tuple[Evaluator, ...]:
    """What the options ask for; none for the run's own."""
    if options.evals:
        return _from_file(options.evals)
    found = []
    names = _short_names(options.dataset)
    asked = {name: options.task or [_default_task(options, name)] for name in options.dataset}
    chosen = dict.fromkeys(task for tasks in asked.values() for task in tasks)
    if any(map(reads_entries, chosen)):
        of_task = {task: [name for name in asked if task in asked[name]] for task in chosen}
        return tuple(of_entries(task, files, options) for task, files in of_task.items())
    for dataset in options.dataset:
        for task in dict.fromkeys(asked[dataset]):
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
    from clipjax.data.published import published

    if options.images and not _is_crossmodal(dataset):
        return task_of_entries(dataset)
    known = published(dataset)
    if known is not None:
        return "retrieval" if known.retrieval else "zeroshot"
    named = options.prompts or _shipped(dataset) or is_by_folder(dataset)
    return "zeroshot" if named else "retrieval"


def _is_crossmodal(dataset: str) -> bool:
    """Whether a data set is a file of captions by language."""
    from clipjax.data import Crossmodal, found_source

    if not dataset.endswith(".jsonl") or not Path(dataset).expanduser().is_file():
        return False
    try:
        return isinstance(found_source(dataset, captions=True), Crossmodal)
    except ClipjaxError:  # a table of another kind, or entries
        return False


_SAME_CLASSES = {
    "imagenet2012": "imagenet", "imagenet_v2": "imagenet", "imagenet_sketch": "imagenet",
    "imagenet2012_corrupted": "imagenet", "cifar10_corrupted": "cifar10", "cifar10_1": "cifar10",
}  # fmt: skip


def _shipped(dataset: str) -> str | None:
    """The class names that lie beside a data set, or come with clipjax for one of TFDS."""
    from clipjax.data.published import published
    from clipjax.evals.prompts import shipped_classes

    known = published(dataset)
    if known is not None:
        return known.names

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
    from clipjax.data import Crossmodal, WebDataset
    from clipjax.data.named import named_source, with_keys
    from clipjax.data.published import published

    keys = {key: getattr(options, key) for key in _KEYS}
    known = published(name)
    if known is not None:
        source: Source = with_keys(known.source, name, keys)
    else:
        source = named_source(name, **keys)
    if isinstance(source, WebDataset) and source.label_key is None:
        source = dataclasses.replace(source, label_key="cls")
    if isinstance(source, Crossmodal) and options.images:
        source = dataclasses.replace(source, images=str(Path(options.images).resolve()))
    return source


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
