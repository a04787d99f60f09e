"""Segmentation: what is where? Of patches, by the names of classes, or by a linear classifier."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipjax.data import EvalSet, Source
from clipjax.errors import ClipjaxError
from clipjax.evals import masks
from clipjax.evals.base import Evaluator, Runner, require_at_least
from clipjax.evals.logistic import ROUGH, Examples, fit
from clipjax.evals.prompts import Names, read_classes
from clipjax.predictor import Predictor, mean_direction


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedEvaluator(Evaluator):
    """Base of the evaluators of pictures with masks.

    Figures: `{name}/mIoU`, over the classes that occur or are taken; `{name}/pixel_accuracy`;
    `{name}/mean_accuracy`, over the classes that occur. Pictures and masks are taken as the model sees
    them, at its size: published figures are mostly of larger pictures, seen in windows.
    """

    source: Source
    """Split to segment."""
    masks: str | None = None
    """Folder of masks named as the pictures are; None: they are in the records."""
    mask_key: str = "mask"
    """The records' entry with the mask (a column, a feature, in tars an extension such as "mask.png")."""
    ignore: int = 255
    """Number of the pixels that do not count."""
    zero_is_ignored: bool = False
    """Whether 0 does not count either, and the classes begin at 1 (as in ADE20K's files)."""
    limit: int | None = None
    """Most records of each split to use; None: all."""

    def __post_init__(self):
        require_at_least(self, 1, "limit")

    def found(self, data: EvalSet, folder: str | None) -> masks.Masks:
        """The masks of a split."""
        return masks.Masks(data, folder, self.mask_key, self.ignore, self.zero_is_ignored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(MaskedEvaluator):
    """Zero-shot segmentation: each patch is of the class whose name is nearest to it.

    A patch is embedded as if it were the only one: pooled alone (attention pooling gives its value, as
    in MaskCLIP, arXiv:2112.01071) and projected as the picture is.
    """

    name: str = "segmentation"
    """First part of the figures' names."""
    prompts: str | None = None
    """Class names and templates: the name of a shipped set or the path of a file, as for zero-shot."""
    class_names: Names = ()
    """The names in the order of the masks' numbers, in place of `prompts`."""
    templates: Names = ()
    """Prompts, "{}" standing for the name; () takes those of `prompts`, else the bare name."""

    def __post_init__(self):
        super().__post_init__()
        if bool(self.prompts) == bool(self.class_names):
            raise ClipjaxError(
                f"{self.name}: say what the classes are called: either prompts or class_names"
            )

    def build(self) -> SegmentationRunner:
        return SegmentationRunner(self)


class SegmentationRunner(Runner):
    """`Segmentation` at work."""

    evaluator: Segmentation

    def load(self, predictor: Predictor) -> None:
        config = self.evaluator
        self._data = self.once.split(config.source, predictor, config.limit)
        names, templates = config.class_names, config.templates
        if config.prompts:
            known = read_classes(config.prompts)
            names, templates = known.names, templates or known.templates
        templates = templates or ("{}",)
        self._names = names
        self._tokens = predictor.tokenize([t.replace("{}", n) for n in names for t in templates])

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        config = self.evaluator
        text = self.once.texts(predictor, self._tokens)
        classes = mean_direction(text.reshape(len(self._names), -1, text.shape[1]))
        mask_of = config.found(self._data, config.masks)
        counts = []
        for rows, values in masks.patches(predictor, self._data, "token_embeddings"):
            for row, value in zip(rows.tolist(), values, strict=True):
                mask = mask_of(row, predictor.image_size, predictor.resize)
                _require_classes(mask, len(self._names), self._data.keys[row])
                counts.append(masks.agreement(value @ classes.T, mask))
        return {f"{config.name}/{k}": v for k, v in masks.figures(np.stack(counts)).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSegmentation(MaskedEvaluator):
    """A linear classifier of frozen patches, fitted on those of a training split.

    A training patch is of the class that most of its pixels have; the scores of patches are made as fine as
    the picture by bilinear interpolation, as in DINOv2 (arXiv:2304.07193) without its batch norm.
    """

    train: Source
    """Split to learn from."""
    train_masks: str | None = None
    """Folder of its masks; None: they are in the records."""
    name: str = "linear_segmentation"
    """First part of the figures' names."""
    patches: int = 200_000
    """Patches to learn from, at most: the same number of each picture, drawn."""
    log10_c: float = 2.0
    """Power of ten of scikit-learn's C."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 1, "patches")

    def build(self) -> LinearSegmentationRunner:
        return LinearSegmentationRunner(self)


class LinearSegmentationRunner(Runner):
    """`LinearSegmentation` at work."""

    evaluator: LinearSegmentation

    def load(self, predictor: Predictor) -> None:
        config = self.evaluator
        self._train = self.once.split(config.train, predictor, config.limit)
        self._data = self.once.split(config.source, predictor, config.limit)

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        config = self.evaluator
        x, y = self._patches(predictor)
        classes = int(y.max()) + 1
        examples = Examples.place(x, y, predictor.mesh)
        classifier = fit(examples, classes, 10.0**config.log10_c, ending=ROUGH)
        mask_of = config.found(self._data, config.masks)
        counts = []
        for rows, values in masks.patches(predictor, self._data, "tokens"):
            for row, value in zip(rows.tolist(), values, strict=True):
                mask = mask_of(row, predictor.image_size, predictor.resize)
                _require_classes(mask, classes, self._data.keys[row])
                counts.append(masks.agreement(classifier(value), mask))
        return {f"{config.name}/{k}": v for k, v in masks.figures(np.stack(counts)).items()}

    def _patches(self, predictor: Predictor) -> tuple[np.ndarray, np.ndarray]:
        """([n, D], [n]) patches of the training split and their classes."""
        config = self.evaluator
        mask_of = config.found(self._train, config.train_masks)
        rng = np.random.default_rng(config.seed)
        most = max(1, config.patches // len(self._train))
        xs, ys = [], []
        for rows, values in masks.patches(predictor, self._train, "tokens"):
            for row, value in zip(rows.tolist(), values, strict=True):
                mask = mask_of(row, predictor.image_size, predictor.resize)
                label = of_patches(mask, len(value)).ravel()
                kept = rng.permutation(np.flatnonzero(label >= 0))[:most]
                xs.append(value.reshape(len(label), -1)[kept])
                ys.append(label[kept])
        x, y = np.concatenate(xs), np.concatenate(ys)
        if not len(y):
            raise ClipjaxError(f"{config.train}: no pixel of its masks counts")
        return x, y


def of_patches(mask: np.ndarray, side: int) -> np.ndarray:
    """int [side, side]: the class that most pixels of each patch have, -1 where none counts.

    Args:
      mask: int [S, S], -1 where a pixel does not count.
      side: patches in a row.
    """
    classes = int(mask.max(initial=0)) + 1
    cell = np.arange(len(mask)) * side // len(mask)
    index = (cell[:, None] * side + cell[None]) * classes + mask
    counts = np.bincount(index[mask >= 0], minlength=side * side * classes)
    counts = counts.reshape(side, side, classes)
    return np.where(counts.any(axis=-1), counts.argmax(axis=-1), -1)


def _require_classes(mask: np.ndarray, classes: int, key: str) -> None:
    if mask.max(initial=-1) >= classes:
        raise ClipjaxError(
            f"the mask of {key} has the class {mask.max()}, but there are {classes}: say with ignore and "
            "zero_is_ignored what its numbers mean"
        )
