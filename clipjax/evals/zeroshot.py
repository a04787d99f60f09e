"""Zero-shot classification: the class whose name, put into prompts, is nearest to the picture."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from clipjax.data import EvalSet, Source, load_eval
from clipjax.errors import ClipjaxError
from clipjax.evals import metrics
from clipjax.evals.base import Evaluator, Runner
from clipjax.predictor import Predictor, mean_direction

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ZeroShot(Evaluator):
    """Classification by prompts, as in CLIP (arXiv:2103.00020, section 3.1).

    A class is the mean of the embeddings of its name in each template, normalized again. Figures:
    `{name}/top1`, `{name}/top5`, `{name}/mean_per_class` (top-1 averaged within each class, then
    over the classes that occur). Names in several languages give these in the first of them, and
    `{name}/zh/top1` and so on for each.
    """

    source: Source
    """Split to classify."""
    name: str = "zeroshot"
    """First part of the figures' names."""
    classes: Literal["label", "caption"] = "label"
    """What a picture is classified as: its label, or (each distinct one a class) its caption."""
    class_names: Names | dict[str, Names] = ()
    """For labels: the names in the order of the labels, or such names by language code; () takes
    the names that the data set declares."""
    templates: Names | dict[str, Names] = ("{}",)
    """Prompts, "{}" standing for the name, or such prompts by language code."""
    languages: tuple[str, ...] = ()
    """For captions: codes of the languages to report, the first for the main figures; () takes all
    there are."""
    limit: int | None = None
    """Most records to use; None: all."""

    def __post_init__(self):
        if self.classes not in ("label", "caption"):
            raise ClipjaxError(f"{self.name}: classes={self.classes!r}: choose label or caption")
        if self.classes == "caption" and self.class_names:
            raise ClipjaxError(
                f"{self.name}: class_names is for classes='label'; with classes='caption' the "
                "captions are the names"
            )
        if self.limit is not None and self.limit < 1:
            raise ClipjaxError(f"{self.name}: limit={self.limit} must be at least 1")
        by_language = self.templates if isinstance(self.templates, dict) else {"": self.templates}
        for templates in by_language.values():
            if not templates or any("{}" not in template for template in templates):
                raise ClipjaxError(
                    f"{self.name}: templates={templates}: give at least one, each with {{}} where "
                    "the class name goes"
                )

    def run(self, predictor: Predictor) -> dict[str, float]:
        return self.build()(predictor)

    def build(self) -> ZeroShotRunner:
        return ZeroShotRunner(self)


@dataclasses.dataclass(frozen=True)
class _Task:
    """One classification: pictures, their classes, and the prompts of each class."""

    language: str
    images: np.ndarray  # [n], rows of the runner's pictures
    label: np.ndarray  # [n], in [0, C)
    tokens: np.ndarray  # int32 [C * templates, L], a class's prompts in a row
    num_classes: int


class ZeroShotRunner(Runner):
    """`ZeroShot` at work: keeps pictures and tokens between evaluations."""

    evaluator: ZeroShot

    def __init__(self, evaluator: ZeroShot):
        super().__init__(evaluator)
        self._tasks: list[_Task] = []
        self._loaded_for: tuple[int, int] | None = None

    def load(self, predictor: Predictor) -> None:
        needed = (predictor.image_size, predictor.context_length)
        if self._loaded_for == needed:
            return
        config = self.evaluator
        data = load_eval(config.source, predictor.image_size, config.limit, predictor.resize)
        self._images = data.images
        self._tasks = []
        by_label = config.classes == "label"
        for language, (images, label, names) in (
            _by_label(config, data) if by_label else _by_caption(config, data)
        ).items():
            prompts = [t.replace("{}", n) for n in names for t in _templates(config, language)]
            tokens = predictor.tokenize(prompts)
            self._tasks.append(_Task(language, images, label, tokens, len(names)))
        self._loaded_for = needed

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        image = predictor.encode_image(self._images)
        results: dict[str, float] = {}
        for task in self._tasks:
            prompts = predictor.encode_text(task.tokens)
            classes = mean_direction(prompts.reshape(task.num_classes, -1, prompts.shape[1]))
            ranks = metrics.class_ranks(image[task.images], classes, task.label)
            figures = {
                "top1": metrics.recall_at(ranks, 1),
                "top5": metrics.recall_at(ranks, 5),
                "mean_per_class": metrics.mean_per_class_accuracy(ranks, task.label),
            }
            for prefix in self._prefixes(task):
                results |= {f"{prefix}/{key}": value for key, value in figures.items()}
        return results

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


def _templates(config: ZeroShot, language: str) -> Names:
    if not isinstance(config.templates, dict):
        return config.templates
    if language not in config.templates:
        raise ClipjaxError(
            f"templates has none for the language {language!r}: there are those for "
            + ", ".join(map(repr, config.templates))
        )
    return config.templates[language]


_Classified = dict[str, tuple[np.ndarray, np.ndarray, Names]]
"""By language: rows of the pictures, their class indices, and the names of the classes."""


def _by_label(config: ZeroShot, data: EvalSet) -> _Classified:
    if data.labels is None:
        raise ClipjaxError(
            f"{config.source} has no labels: name the feature that holds them (label_key of a "
            "Tfds source), or classify by captions with classes='caption'"
        )
    names = config.class_names or data.class_names
    if not names:
        raise ClipjaxError(
            f"{config.source} does not say what its classes are called: set class_names"
        )
    images = np.flatnonzero(data.labels >= 0)
    label = data.labels[images]
    by_language = names if isinstance(names, dict) else {"": names}
    for language, of_language in by_language.items():
        if label.max() >= len(of_language):
            raise ClipjaxError(
                f"class_names{f'[{language!r}]' if language else ''} has {len(of_language)} names, "
                f"but {config.source} has a label {label.max()}"
            )
    return {language: (images, label, tuple(n)) for language, n in by_language.items()}


def _by_caption(config: ZeroShot, data: EvalSet) -> _Classified:
    """The first caption in each language is the class; of pictures with equal ids, one counts."""
    unique = np.sort(np.unique(data.ids, return_index=True)[1]).tolist()
    first: dict[str, dict[int, str]] = {}
    for row in unique:
        codes = data.languages[row] or ("",) * len(data.captions[row])
        for code, caption in zip(codes, data.captions[row], strict=True):
            first.setdefault(code, {}).setdefault(row, caption)
    languages = config.languages or tuple(first)
    result: _Classified = {}
    for code in languages:
        if code not in first:
            raise ClipjaxError(
                f"languages={languages}: no caption of {config.source} is in {code!r}; there are "
                + (", ".join(filter(None, first)) or "captions without languages")
            )
        names = tuple(dict.fromkeys(first[code].values()))
        index = {name: i for i, name in enumerate(names)}
        label = np.array([index[caption] for caption in first[code].values()], np.int64)
        result[code] = (np.array(list(first[code])), label, names)
    if not result:
        raise ClipjaxError(f"{config.source} has no captions to classify by")
    return result
