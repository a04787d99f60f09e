"""ConVIRT: contrast of pictures and sentences, judged by the precision of retrieval within classes.

Zhang et al. 2020, "Contrastive Learning of Medical Visual Representations from Paired Images and Text" (arXiv
2010.00747). Status: second hand; the protocol of evaluation is from the authors' description, the loss as remembered.

Loss: `Softmax(image_weight=0.75)` with a fixed temperature of 0.1 and projections with a hidden layer; the text is one
sentence of several, drawn anew each time (`CaptionChoice`, where a record's captions are its sentences). These are
all in the core: see `configs/methods/convirt.py`.

Protocol (CheXpert 8x200): each class has a few queries, pictures and texts, and 200 candidate pictures. All candidates
of all classes are ranked for each query; precision at k is the share of the first k that are of the query's class,
a mean over queries.

What differs here: text queries are the captions of the query pictures, where the authors had them written; queries and
candidates are the first records of each class in a split, disjoint.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from clipjax.data import Source, load_eval
from clipjax.errors import ClipjaxError
from clipjax.evals import Evaluator
from clipjax.evals.base import require_at_least
from clipjax.evals.embed import embed_images
from clipjax.methods.registry import Method

METHOD = Method(
    id="convirt",
    title="Contrastive Learning of Medical Visual Representations from Paired Images and Text",
    arxiv="2010.00747",
    status="second hand",
    summary="precision at k of pictures of the query's class, for pictures and texts as queries",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassPrecision(Evaluator):
    """Precision at k among candidates of all classes: `{name}/image_to_image/P@5`, `{name}/text_to_image/P@5`."""

    source: Source
    """Labeled split that queries and candidates are taken from."""
    name: str = "class_precision"
    """First part of the figures' names."""
    queries: int = 10
    """Queries of each kind, a class."""
    candidates: int = 200
    """Candidates of a class; what it has, if fewer."""
    ks: tuple[int, ...] = (5, 10, 100)
    """How many of the first are looked at."""
    limit: int | None = None
    """Most records to use; None: all."""

    def __post_init__(self):
        require_at_least(self, 1, "queries", "candidates", "limit")
        if not self.ks or min(self.ks) < 1:
            raise ClipjaxError(f"{self.name}: ks={self.ks}: give numbers from 1")

    def run(self, predictor):
        data = load_eval(self.source, predictor.image_size, self.limit, predictor.resize)
        if data.labels is None:
            raise ClipjaxError(f"{self.source} has no labels, which {self.name} asks for")
        image = embed_images(predictor, data.images)
        usable = ~data.images.unreadable & np.array([bool(texts) for texts in data.captions])
        labels = np.where(usable, data.labels, -1)
        queries, candidates = split_classes(labels, self.queries, self.candidates)
        if not len(candidates):
            raise ClipjaxError(
                f"{self.name}: no class of {self.source} has more than {self.queries} records, so "
                "no candidates are left: lower queries"
            )
        text = predictor.encode_text([data.captions[i][0] for i in queries])
        figures: dict[str, float] = {}
        for kind, query in (("image", image[queries]), ("text", text)):
            found = class_precision(
                query, labels[queries], image[candidates], labels[candidates], self.ks
            )
            figures |= {f"{self.name}/{kind}_to_image/P@{k}": v for k, v in found.items()}
        return figures


def split_classes(
    labels: np.ndarray, queries: int, candidates: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of queries and of candidates, the first ones of each class; a class of -1 is none.

    Classes with no more than `queries` records have neither.
    """
    asked, offered = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        if len(rows) > queries:
            asked.append(rows[:queries])
            offered.append(rows[queries : queries + candidates])
    return np.concatenate(asked), np.concatenate(offered)


def class_precision(
    query: np.ndarray,
    query_label: np.ndarray,
    candidates: np.ndarray,
    label: np.ndarray,
    ks: tuple[int, ...],
) -> dict[int, float]:
    """Precision at each k of unit vectors [n, E] among candidates [m, E]; of equal ones the first is nearer.

    Where k is above m, the share of all m.
    """
    ranking = np.argsort(-(query @ candidates.T), axis=1, kind="stable")
    hits = label[ranking] == query_label[:, None]
    return {k: float(hits[:, :k].mean()) for k in ks}
