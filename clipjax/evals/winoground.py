"""Winoground and WinoGAViL: pictures and texts that must be told apart in both directions."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from clipjax.errors import ClipjaxError
from clipjax.evals import metrics
from clipjax.evals.compositional import by_category
from clipjax.evals.entries import EntryEvaluator, EntryRunner, required, seen_rows
from clipjax.evals.figure import Figure
from clipjax.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class Winoground(EntryEvaluator):
    """Two pictures and two captions of the same words, as in Winoground (arXiv:2204.03162).

    Each entry has `image_0`, `image_1`, `caption_0`, `caption_1` and, if it likes, a `collapsed_tag` (or
    `tag`). Figures: `{name}/text`, the share of entries where each picture prefers its caption;
    `{name}/image`, where each caption prefers its picture; `{name}/group`, where both hold, overall, by
    tag and averaged over tags. A tie counts against the model.
    """

    mark: ClassVar[str] = "caption_0"
    name: str = "winoground"
    """First part of the figures' names."""

    def build(self) -> WinogroundRunner:
        return WinogroundRunner(self)


class WinogroundRunner(EntryRunner):
    """`Winoground` at work."""

    def load(self, predictor: Predictor) -> None:
        entries = [
            (
                [str(required(where, item, f"image_{i}", f"image_{i}")) for i in (0, 1)],
                [str(required(where, item, f"caption_{i}", f"caption_{i}")) for i in (0, 1)],
                str(item.get("collapsed_tag", item.get("tag", stem))).replace("/", "_"),
            )
            for where, stem, item in self.items()
        ]
        row = self.look(predictor, ((name, None) for images, _, _ in entries for name in images))
        entries = [e for e in entries if all((name, None) in row for name in e[0])]
        self._rows = np.array([[row[name, None] for name in images] for images, _, _ in entries])
        self._tags = [tag for _, _, tag in entries]
        self._tokens = predictor.tokenize([text for _, texts, _ in entries for text in texts])

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        image = self.once.images(predictor, self._data)[self._rows]  # [n, 2, E]
        text = self.once.texts(predictor, self._tokens)
        n, _, width = image.shape
        texts = text.reshape(n, 2, width)
        pairs = [
            np.broadcast_to(x, (n, 2, 2, width)).reshape(-1, width)
            for x in (image[:, :, None], texts[:, None])
        ]
        score = metrics.pair_scores(*pairs).reshape(n, 2, 2)  # picture, caption
        own, other = np.einsum("nii->ni", score), score[:, [0, 1], [1, 0]]
        by_picture = (other < own - metrics.TIE).all(axis=1)  # each picture's other caption
        by_caption = (other[:, ::-1] < own - metrics.TIE).all(axis=1)
        seen = seen_rows(self._data, self._rows)
        tags = [tag for tag, s in zip(self._tags, seen, strict=True) if s]
        name = self.evaluator.name
        figures: dict[str, float] = {
            "text": Figure(by_picture[seen]),
            "image": Figure(by_caption[seen]),
        }
        figures |= by_category("group", (by_picture & by_caption)[seen], tags)
        return {f"{name}/{key}": value for key, value in figures.items()}

    def chance(self) -> dict[str, float]:
        """What random scores would reach, as its authors give it."""
        name = self.evaluator.name
        return {f"{name}/text": 1 / 4, f"{name}/image": 1 / 4, f"{name}/group": 1 / 6}


@dataclasses.dataclass(frozen=True)
class WinoGAViL(EntryEvaluator):
    """A cue and the pictures that people associate with it, as in WinoGAViL (arXiv:2207.12576).

    Each entry has a `cue`, `candidates`, pictures, and `associations`, those of them that belong to it.
    The model takes as many of the candidates as there are associations, those nearest to the cue.
    Figures: `{name}/jaccard`, the mean share of right pictures among those that were taken or right;
    `{name}/{n}_candidates/jaccard`, `{name}/mean_per_category` over these, and
    `{name}/10_or_more/jaccard`, what DataComp reports. At the edge a tie counts against the model.
    """

    mark: ClassVar[str] = "cue"
    name: str = "winogavil"
    """First part of the figures' names."""
    template: str = "{}"
    """The cue's prompt."""
    article: bool = False
    """Whether A or An goes before the cue, as in DataComp's figures."""

    def __post_init__(self):
        super().__post_init__()
        if "{}" not in self.template:
            raise ClipjaxError(f"{self.name}: template={self.template!r} has no {{}} for the cue")

    def build(self) -> WinoGAViLRunner:
        return WinoGAViLRunner(self)


class WinoGAViLRunner(EntryRunner):
    """`WinoGAViL` at work."""

    evaluator: WinoGAViL

    def load(self, predictor: Predictor) -> None:
        entries = []
        for where, _, item in self.items():
            cue = str(required(where, item, "cue", "cue"))
            lists = [required(where, item, key, key) for key in ("candidates", "associations")]
            candidates, associations = ([str(name) for name in each] for each in lists)
            if unknown := sorted(set(associations) - set(candidates)):
                raise ClipjaxError(f"{where}: {unknown[0]!r} is no candidate")
            entries.append((cue, candidates, np.isin(candidates, associations)))
        row = self.look(predictor, ((name, None) for _, names, _ in entries for name in names))
        entries = [e for e in entries if all((name, None) in row for name in e[1])]
        self._rows = [np.array([row[name, None] for name in names]) for _, names, _ in entries]
        self._right = [right for _, _, right in entries]
        cues = [cue for cue, _, _ in entries]
        if self.evaluator.article:
            cues = [f"A{'n' * (cue[0].lower() in 'aeiou')} {cue.lower()}" for cue in cues]
        prompts = [self.evaluator.template.replace("{}", cue) for cue in cues]
        self._tokens = predictor.tokenize(prompts)

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        image = self.once.images(predictor, self._data)
        text = self.once.texts(predictor, self._tokens)
        sizes = np.array([len(rows) for rows in self._rows])
        flat = np.concatenate(self._rows)
        scores = metrics.pair_scores(image[flat], np.repeat(text, sizes, axis=0))
        values, kinds, sizes_seen = [], [], []
        for rows, right, score in zip(
            self._rows, self._right, np.split(scores, np.cumsum(sizes)[:-1]), strict=True
        ):
            if seen_rows(self._data, rows):
                values.append(_jaccard(score, right))
                sizes_seen.append(len(rows))
                kinds.append(f"{len(rows)}_candidates")
        name = self.evaluator.name
        shares, many = np.array(values), np.array(sizes_seen) >= 10
        figures = by_category("jaccard", shares, kinds)
        if many.any():
            figures["10_or_more/jaccard"] = Figure(shares[many])
        return {f"{name}/{key}": value for key, value in figures.items()}


def _jaccard(score: np.ndarray, right: np.ndarray) -> float:
    """Of the best of [k] scores, as many as are right: how many of them or of the right are both."""
    # Among equals the wrong ones come first.
    order = np.lexsort((right, -np.round(score / metrics.TIE)))
    hits = int(right[order[: right.sum()]].sum())
    return hits / (2 * int(right.sum()) - hits)
