"""The tasks of `clipjax eval`: evaluators whose fields are the command's options."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipjax.cli.caption import STRATEGIES
from clipjax.errors import ClipjaxError, did_you_mean

if TYPE_CHECKING:
    from clipjax.data import Source
    from clipjax.evals import Evaluator

TASKS = {
    "zeroshot": "ZeroShot",
    "retrieval": "Retrieval",
    "linear_probe": "LinearProbe",
    "knn": "KNN",
    "few_shot": "FewShot",
    "geometry": "Geometry",
    "compositional": "Compositional",
    "captioning": "Captioning",
    "winoground": "Winoground",
    "winogavil": "WinoGAViL",
    "segmentation": "Segmentation",
    "linear_segmentation": "LinearSegmentation",
}
"""Name -> class in `clipjax.evals`. A user's own evaluator (--imports) is a task by its class's name."""

_GIVEN_OTHERWISE = ("source", "train", "training", "files", "every", "name", "templates")


def evaluator_class(task: str) -> type[Evaluator]:
    """The evaluator of a task.

    Raises:
      ClipjaxError: there is no such task.
    """
    import clipjax.evals

    if task in TASKS:
        return getattr(clipjax.evals, TASKS[task])
    own = {name: cls for cls in _own_evaluators() for name in (cls.__name__, _snake(cls.__name__))}
    if task not in own:
        raise ClipjaxError(f"--task: no task {task!r}{did_you_mean(task, [*TASKS, *own])}")
    return own[task]


def _own_evaluators() -> list[type[Evaluator]]:
    from clipjax.evals import Evaluator

    found, open_classes = [], [Evaluator]
    while open_classes:
        for cls in open_classes.pop().__subclasses__():
            open_classes.append(cls)
            if not cls.__module__.startswith("clipjax."):
                found.append(cls)
    return found


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@dataclasses.dataclass(frozen=True)
class Option:
    """A field that is an option: one value, or several with commas between them."""

    field: str
    type: Any
    help: str

    @property
    def flags(self) -> list[str]:
        """`--log10-c`, and as the field is written."""
        return list(dict.fromkeys(("--" + self.field.replace("_", "-"), "--" + self.field)))

    def add_to(self, group: Any) -> None:
        """Adds the option, None where it is not given."""
        if self.type is bool:
            group.add_argument(
                *self.flags, action=argparse.BooleanOptionalAction, default=None, help=self.help
            )
        else:
            group.add_argument(
                *self.flags, type=self.parse, metavar=self._metavar(), help=self.help
            )

    def parse(self, text: str) -> Any:
        """The value that a text means.

        Raises:
          ClipjaxError: none.
        """
        if typing.get_origin(self.type) is tuple:
            element = Option(self.field, typing.get_args(self.type)[0], "")
            return tuple(element.parse(part.strip()) for part in text.split(","))
        choices = self._choices()
        if choices and text not in choices:
            raise ClipjaxError(f"{self.flags[0]} {text}: choose of {', '.join(choices)}")
        if self.type is _strategy():
            import clipjax.generation

            return getattr(clipjax.generation, STRATEGIES[text])()
        if choices:
            return text
        try:
            return self.type(text)
        except ValueError:
            kind = {int: "whole numbers", float: "numbers"}.get(self.type, self.type.__name__)
            raise ClipjaxError(f"{self.flags[0]} {text}: {kind} are asked for") from None

    def _metavar(self) -> str:
        if typing.get_origin(self.type) is tuple:
            return f"{typing.get_args(self.type)[0].__name__.upper()},..."
        return "|".join(self._choices()) or self.type.__name__.upper()

    def _choices(self) -> tuple[str, ...]:
        if self.type is _strategy():
            return tuple(STRATEGIES)
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()


def options_of(cls: type[Evaluator]) -> dict[str, Option]:
    """The fields of an evaluator that one text can say, by name."""
    hints, documents = typing.get_type_hints(cls), _documents(cls)
    found = {}
    for field in dataclasses.fields(cls):
        kind = _plain(hints[field.name])
        if field.name not in _GIVEN_OTHERWISE and kind is not None:
            found[field.name] = Option(field.name, kind, documents.get(field.name, ""))
    return found


def _plain(hint: Any) -> Any:
    """What a type is without None, if one text can say its values; else None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return _plain(parts[0]) if len(parts) == 1 else None
    if typing.get_origin(hint) is tuple:
        return hint if _plain(typing.get_args(hint)[0]) in (int, float, str) else None
    if typing.get_origin(hint) is Literal or hint in (int, float, str, bool, _strategy()):
        return hint
    return None


def _strategy() -> type:
    """The role of how captions are chosen; an option names one, whose own fields are as they are by default."""
    from clipjax.generation import Strategy

    return Strategy


def _documents(cls: type) -> dict[str, str]:
    """By field, the text that stands under it, in one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):  # made where there is no file
            continue
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                value = after.value if isinstance(after, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[node.target.id] = " ".join(value.value.split()).replace("%", "%%")
    return found


def add_options(parser: argparse.ArgumentParser, tasks: Sequence[str]) -> None:
    """Adds the fields of all tasks, own ones included, each once; help says whose they are."""
    owners: dict[str, list[str]] = {}
    options: dict[str, Option] = {}
    for task in tasks:
        for name, option in options_of(evaluator_class(task)).items():
            owners.setdefault(name, []).append(task)
            options.setdefault(name, option)
    group = parser.add_argument_group("tasks")
    for name, option in options.items():
        whose = "" if len(owners[name]) == len(tasks) else f"{', '.join(owners[name])}: "
        dataclasses.replace(option, help=whose + option.help).add_to(group)


def build(
    task: str,
    options: argparse.Namespace,
    source: Source,
    train: Source | None,
    prompts: str | None,
) -> Evaluator:
    """The evaluator of a task on a data set.

    Args:
      task: its name.
      options: what `add_options` added, and `templates`.
      source: what to evaluate on.
      train: what to learn from, or to take captions from.
      prompts: for zero-shot, the class names that come with the data set, where none are asked for.

    Raises:
      ClipjaxError: the evaluator takes no data set, or needs one to learn from.
    """
    from clipjax.data import ClassFolder, PictureFolder

    cls = evaluator_class(task)
    fields = {field.name for field in dataclasses.fields(cls)}
    if "source" not in fields:
        raise ClipjaxError(f"--task {task}: {cls.__name__} has no field `source` for --dataset")
    values: dict[str, Any] = {"source": source} | given(options, options_of(cls))
    if "train" in fields:
        if train is None:
            raise ClipjaxError(f"--task {task}: say with --train-dataset what to learn from")
        values["train"] = train
    if "training" in fields and options.train_dataset:
        values["training"] = train
    if "masks" in fields and isinstance(source, ClassFolder):  # its folders are no classes
        values["source"] = PictureFolder(source.root)
    if "train_masks" in fields and isinstance(train, ClassFolder):
        values["train"] = PictureFolder(train.root)
    if "templates" in fields:
        from clipjax.evals.prompts import read_templates

        if not values.get("class_names"):
            values.setdefault("prompts", prompts)
        values["templates"] = read_templates(options.templates) if options.templates else ()
    return cls(**values)


def given(options: argparse.Namespace, names: Any) -> dict[str, Any]:
    """The options of these names that the user gave."""
    values = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def reads_entries(task: str) -> bool:
    """Whether a task's data sets are files of entries about pictures in a folder."""
    return any(field.name == "files" for field in dataclasses.fields(evaluator_class(task)))


def task_of_entries(file: str) -> str:
    """The task that a file of entries is for, by what its first one has.

    Raises:
      ClipjaxError: there is no such file, or it holds no entries.
    """
    from clipjax.evals.entries import read_items

    _, first = read_items(Path(file).expanduser())[0]
    marks = {getattr(evaluator_class(task), "mark", ""): task for task in TASKS}
    return next((task for mark, task in marks.items() if mark and mark in first), "compositional")


def of_entries(task: str, files: Sequence[str], options: argparse.Namespace) -> Evaluator:
    """The evaluator of a task whose data sets are files of entries."""
    cls = evaluator_class(task)
    return cls(files=tuple(files), **given(options, options_of(cls)))  # type: ignore[call-arg]


def wants_training(task: str) -> bool:
    """Whether a task learns from another split, or may take captions from one."""
    fields = {field.name for field in dataclasses.fields(evaluator_class(task))}
    return bool(fields & {"train", "training"})


def is_by_folder(dataset: str) -> bool:
    """Whether a data set is a folder with one folder a class."""
    if not Path(dataset).expanduser().is_dir():
        return False
    from clipjax.data import ClassFolder, found_source

    return isinstance(found_source(dataset, captions=True), ClassFolder)
