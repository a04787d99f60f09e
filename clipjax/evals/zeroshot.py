"""Zero-shot classification: the class whose name, put into prompts, is nearest to the picture."""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

import numpy as np

from clipjax.data import EvalSet, Source
from clipjax.errors import ClipjaxError
from clipjax.evals import metrics
from clipjax.evals.base import Evaluator, Runner, require_at_least
from clipjax.evals.calibration import calibration
from clipjax.evals.features import class_figures
from clipjax.evals.figure import Figure
from clipjax.evals.groups import by_group, groups_of, macro_f1
from clipjax.evals.prompts import Names, label_map, read_class_map, read_classes
from clipjax.predictor import Predictor, mean_direction
from clipjax.report.contents import Confusion

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ZeroShot(Evaluator):
    """Classification by prompts, as in CLIP (arXiv:2103.00020, section 3.1).

    A class is the mean of the embeddings of its name in each template, normalized again. Figures:
    `{name}/top1`, `{name}/top5`, `{name}/mean_per_class` (top-1 averaged within each class, then
    over the classes that occur). Names in several languages give these in the first of them, and
    `{name}/zh/top1` and so on for each.

    Images whose class has no name here (ImageNet-R among 200 of ImageNet's classes, say) take no
    part. With `calibration` there are also `{name}/ece` and others, see `calibration.calibration`;
    with `groups_key`, `{name}/group/{value}/top1`, `{name}/worst_group/top1` and
    `{name}/group_gap/top1` (best less worst), and the same of top5.
    """

    source: Source
    """Split to classify."""
    name: str = "zeroshot"
    """First part of the figures' names."""
    classes: Literal["label", "caption"] = "label"
    """What a picture is classified as: its label, or (each distinct one a class) its caption."""
    prompts: str | None = None
    """For labels: class names and templates of a well-known data set ("imagenet", "cifar10", ...;
    `prompts.shipped_classes()`), or the path of such a file."""
    class_names: Names | dict[str, Names] = ()
    """For labels: the names in the order of the labels, or such names by language code; () takes
    those of `prompts`, else the names that the data set declares."""
    templates: Names | dict[str, Names] = ()
    """Prompts, "{}" standing for the name, or such prompts by language code; () takes those of
    `prompts`, else the bare name."""
    class_map: str | None = None
    """With `prompts`: a JSON file from the data set's classes to those of `prompts`; a class scores
    as the best of those it stands for (see `prompts.read_class_map`)."""
    groups_key: str | None = None
    """Entry of the records that says what group a picture is of (a column, a feature, in tars
    "json:region", or "npy[2]" for a number of an array): figures of each group, of the worst, and how far
    they are apart."""
    macro_f1: bool = False
    """Also the F1 of each class that occurs, averaged over classes."""
    calibration: bool = False
    """Also how far the probabilities can be trusted."""
    languages: tuple[str, ...] = ()
    """For captions: codes of the languages to report, the first for the main figures; () takes all
    there are."""
    ties: Literal["against", "first"] = "against"
    """What classes of the same score count as: against the model, or in order of the labels, as an
    argmax has it. Classes of one name are merged with "against", and kept apart with "first"."""
    limit: int | None = None
    """Most records to use; None: all."""

    def __post_init__(self):
        metrics.require_ties(self.ties)
        if self.classes not in ("label", "caption"):
            raise ClipjaxError(f"{self.name}: classes={self.classes!r}: choose label or caption")
        if self.classes == "caption" and self.class_names:
            raise ClipjaxError(
                f"{self.name}: class_names is for classes='label'; with classes='caption' the "
                "captions are the names"
            )
        require_at_least(self, 1, "limit")
        if self.prompts and (self.classes == "caption" or self.class_names):
            raise ClipjaxError(
                f"{self.name}: prompts={self.prompts!r} names the classes: leave class_names empty, "
                "and classes='label'"
            )
        if self.class_map and not self.prompts:
            raise ClipjaxError(
                f"{self.name}: class_map={self.class_map!r} needs prompts, whose classes it maps to"
            )
        by_language = self.templates if isinstance(self.templates, dict) else {"": self.templates}
        for templates in by_language.values():
            if any("{}" not in template for template in templates):
                raise ClipjaxError(
                    f"{self.name}: templates={templates}: each needs a {{}} where the class "
                    "name goes"
                )

    def build(self) -> ZeroShotRunner:
        return ZeroShotRunner(self)


@dataclasses.dataclass(frozen=True)
class _Task:
    """One classification: pictures, their classes, and the prompts of each class.

    A class may have several rows of prompts (several classes of another data set): `group` says
    whose each row is, and None that there is one row a class.
    """

    language: str
    images: np.ndarray  # [n], rows of the data set's pictures
    label: np.ndarray  # [n], in [0, C)
    names: Names  # C names
    tokens: np.ndarray  # int32 [rows * templates, L], a row's prompts one after the other
    num_rows: int
    group: np.ndarray | None

    @property
    def num_classes(self) -> int:
        return len(self.names)


class ZeroShotRunner(Runner):
    """`ZeroShot` at work: keeps tokens, and the pictures of a small split, between evaluations."""

    evaluator: ZeroShot

    def __init__(self, evaluator: ZeroShot):
        super().__init__(evaluator)
        self._tasks: list[_Task] = []
        self._confusion: Confusion | None = None

    def load(self, predictor: Predictor) -> None:
        config = self.evaluator
        data = self._data = self.once.split(config.source, predictor, config.limit)
        if config.groups_key:
            self._groups = groups_of(data, config.groups_key)
        find = _by_caption if config.classes == "caption" else _by_label
        self._tasks = []
        for language, found in find(config, data).items():
            if config.ties == "against":
                found = _merged(found, config.name)
            prompts = [t.replace("{}", n) for n in found.asked for t in found.templates]
            task = _Task(
                language, found.images, found.label, found.names,
                predictor.tokenize(prompts), len(found.asked), found.group,
            )  # fmt: skip
            self._tasks.append(task)

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        image = self.once.images(predictor, self._data)
        results: dict[str, float] = {}
        for task in self._tasks:
            prompts = self.once.texts(predictor, task.tokens)
            classes = mean_direction(prompts.reshape(task.num_rows, -1, prompts.shape[1]))
            seen = ~self._data.images.unreadable[task.images]
            rows, label = task.images[seen], task.label[seen]
            ties = self.evaluator.ties
            ranks, predicted = metrics.classified(
                image[rows], classes, label, group=task.group, ties=ties
            )
            figures = class_figures(ranks, label)
            if self.evaluator.macro_f1:
                figures["macro_f1"] = Figure(np.stack([predicted, label], axis=1), macro_f1)
            if self.evaluator.groups_key:
                figures |= by_group(ranks, [self._groups[row] for row in rows])
            if task is self._tasks[0]:
                counts = metrics.confusion_matrix(predicted, label, task.num_classes)
                self._confusion = Confusion(self.evaluator.name, task.names, counts)
            if self.evaluator.calibration:
                score = metrics.class_scores(image[rows], classes, group=task.group)
                figures |= calibration(predictor.logit_scale * score, label)
            for prefix in self._prefixes(task):
                results |= {f"{prefix}/{key}": value for key, value in figures.items()}
        return results

    def confusion(self) -> Confusion | None:
        """What was taken for what in the last evaluation (first language); None before it."""
        return self._confusion

    def chance(self) -> dict[str, float]:
        """What a random order would score, for each top-k that `evaluate` gives; once loaded."""
        return {
            f"{prefix}/top{k}": metrics.recall_by_chance(k, task.num_classes)
            for task in self._tasks
            for prefix in self._prefixes(task)
            for k in (1, 5)
        }

    def _prefixes(self, task: _Task) -> list[str]:
        name = self.evaluator.name
        main = [name] if task is self._tasks[0] else []
        return main + ([f"{name}/{task.language}"] if len(self._tasks) > 1 else [])


@dataclasses.dataclass(frozen=True)
class _Classified:
    """Pictures with their classes, and what to ask for each class."""

    images: np.ndarray  # [n] rows
    label: np.ndarray  # [n], in [0, C)
    names: Names  # C
    asked: Names  # what goes into the prompts: the names, or those behind each class
    group: np.ndarray | None  # by entry of `asked`, its class
    templates: Names


def _merged(found: _Classified, name: str) -> _Classified:
    """Classes of one name as one class: no model could tell them apart by it."""
    if found.group is not None or len(set(found.names)) == len(found.names):
        return found
    names = tuple(dict.fromkeys(found.names))
    twice = [each for each in names if found.names.count(each) > 1]
    logger.warning(
        "%s: %d names stand for several classes each (such as %r), which are merged: %d classes are "
        "left of %d. ties='first' keeps them apart, as an argmax over published names does",
        name, len(twice), twice[0], len(names), len(found.names),
    )  # fmt: skip
    place = np.array([names.index(each) for each in found.names])
    return dataclasses.replace(found, label=place[found.label], names=names, asked=names)


def _templates(config: ZeroShot, language: str, default: Names = ()) -> Names:
    if not isinstance(config.templates, dict):
        return config.templates or default or ("{}",)
    if language not in config.templates:
        raise ClipjaxError(
            f"templates has none for the language {language!r}: there are those for "
            + ", ".join(map(repr, config.templates))
        )
    return config.templates[language] or ("{}",)


def _by_label(config: ZeroShot, data: EvalSet) -> dict[str, _Classified]:
    if data.labels is None:
        raise ClipjaxError(
            f"{config.source} has no labels: name the feature that holds them (label_key of a "
            "Tfds source), or classify by captions with classes='caption'"
        )
    if config.prompts:
        return {"": _by_prompts(config, config.prompts, data)}
    # Names as a source declares them (folders, features) have underscores for spaces.
    declared = tuple(name.replace("_", " ") for name in data.class_names or ())
    names = config.class_names or declared
    if not names:
        raise ClipjaxError(
            f"{config.source} does not say what its classes are called: set class_names or prompts"
        )
    images = np.flatnonzero(data.labels >= 0)
    label = data.labels[images]
    by_language = names if isinstance(names, dict) else {"": names}
    result = {}
    for language, of_language in by_language.items():
        if label.max() >= len(of_language):
            raise ClipjaxError(
                f"class_names{f'[{language!r}]' if language else ''} has {len(of_language)} names, "
                f"but {config.source} has a label {label.max()}"
            )
        named = tuple(of_language)
        templates = _templates(config, language)
        result[language] = _Classified(images, label, named, named, None, templates)
    return result


def _by_prompts(config: ZeroShot, prompts: str, data: EvalSet) -> _Classified:
    """The classes of a well-known data set, or a map from this one's to them."""
    classes = read_classes(prompts)
    templates = _templates(config, "", classes.templates)
    assert data.labels is not None
    if config.class_map is None:
        place = label_map(classes, data.class_names, data.labels)
        label = np.where(data.labels >= 0, place[data.labels], -1)
        images = np.flatnonzero(label >= 0)
        asked, group, names = classes.names, None, classes.names
    else:
        mapped = read_class_map(config.class_map, classes, data.class_names)
        index = {label: i for i, label in enumerate(mapped)}
        label = np.array([index.get(label, -1) for label in data.labels.tolist()])
        images = np.flatnonzero(label >= 0)
        asked = tuple(classes.names[i] for indices in mapped.values() for i in indices)
        group = np.repeat(np.arange(len(mapped)), [len(indices) for indices in mapped.values()])
        declared = data.class_names or ()
        names = tuple(declared[i] if declared else str(i) for i in mapped)
    if not len(images):
        raise ClipjaxError(f"no picture of {config.source} has a class that {prompts!r} names")
    return _Classified(images, label[images], names, asked, group, templates)


def _by_caption(config: ZeroShot, data: EvalSet) -> dict[str, _Classified]:
    """The first caption in each language is the class; of pictures with equal ids, one counts."""
    unique = np.sort(np.unique(data.ids, return_index=True)[1]).tolist()
    first: dict[str, dict[int, str]] = {}
    for row in unique:
        codes = data.languages[row] or ("",) * len(data.captions[row])
        for code, caption in zip(codes, data.captions[row], strict=True):
            first.setdefault(code, {}).setdefault(row, caption)
    languages = config.languages or tuple(first)
    result = {}
    for code in languages:
        if code not in first:
            raise ClipjaxError(
                f"languages={languages}: no caption of {config.source} is in {code!r}; there are "
                + (", ".join(filter(None, first)) or "captions without languages")
            )
        names = tuple(dict.fromkeys(first[code].values()))
        index = {name: i for i, name in enumerate(names)}
        label = np.array([index[caption] for caption in first[code].values()], np.int64)
        images = np.array(list(first[code]))
        result[code] = _Classified(images, label, names, names, None, _templates(config, code))
    if not result:
        raise ClipjaxError(f"{config.source} has no captions to classify by")
    return result
