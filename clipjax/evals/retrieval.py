"""Retrieval: does a picture find its captions, and a caption its picture?"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from clipjax.data import EvalSet, Source
from clipjax.errors import ClipjaxError
from clipjax.evals import metrics
from clipjax.evals.base import Evaluator, Runner, require_at_least
from clipjax.evals.figure import Figure, median
from clipjax.predictor import Predictor
from clipjax.report.contents import Example, Guess, Ranking, Similarities

ANY = "any_language"
MEAN = "mean_over_languages"


@dataclasses.dataclass(frozen=True)
class Retrieval(Evaluator):
    """Image-to-text and text-to-image retrieval over a whole split.

    Figures are named `{name}/image_to_text/R@1` (R@5, R@10, median_rank, mean_reciprocal_rank) and
    `{name}/text_to_image/...`. They are taken in the first language: on data with one caption a
    language, each picture has one right answer among as many as there are pictures. Where captions
    say no language, they are taken over all captions. With several languages there are besides

    * `{name}/en/...`, the same in each language by itself;
    * `{name}/any_language/...`, over the captions of all of them at once: a picture may find its
      caption in any language, and each caption of each language looks for its picture;
    * `{name}/mean_over_languages/...`, the mean over languages of their R@k.

    Pictures with equal ids are one picture, which owns the captions of all of them. For the
    treatment of several captions a picture and of ties, see `metrics`.
    """

    source: Source
    """Split to search in."""
    name: str = "retrieval"
    """First part of the figures' names."""
    languages: tuple[str, ...] = ()
    """Codes of the languages to report, the first for the main figures; () takes all there are."""
    ties: Literal["against", "first"] = "against"
    """What candidates of the same score count as: against the model, or in order of the split."""
    limit: int | None = None
    """Most records to use; None: all."""

    def __post_init__(self):
        metrics.require_ties(self.ties)
        require_at_least(self, 1, "limit")

    def build(self) -> RetrievalRunner:
        return RetrievalRunner(self)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Captions with their pictures: rows into the runner's pictures and captions."""

    images: np.ndarray  # [n], ascending
    captions: np.ndarray  # [m]
    owner: np.ndarray  # [m], in [0, n)


class RetrievalRunner(Runner):
    """`Retrieval` at work: keeps tokens, and the pictures of a small split, between evaluations.

    Pictures of a large split are decoded as they are embedded. So 50,000 of them with a million
    texts take, at width 512, 2 GB of embeddings, the tokens, and the tiles of `retrieval_ranks`.
    """

    evaluator: Retrieval

    def __init__(self, evaluator: Retrieval):
        super().__init__(evaluator)
        self.languages: tuple[str, ...] = ()

    def load(self, predictor: Predictor) -> None:
        config = self.evaluator
        data = self._data = self.once.split(config.source, predictor, config.limit)
        rows, owners = merge_equal(data.ids)
        self._images, self._rows = data.images, rows
        spoken = [
            (text, languages[j] if languages else "", int(owner))
            for owner, captions, languages in zip(
                owners, data.captions, data.languages, strict=True
            )
            for j, text in enumerate(captions)
        ]
        spoken = [entry for entry in dict.fromkeys(spoken) if self._wanted(entry[1])]
        self._captions = [text for text, _, _ in spoken]
        self._language = np.array([language for _, language, _ in spoken], dtype=object)
        self._owner = np.array([owner for _, _, owner in spoken], np.int64)
        self.languages = self._find_languages(data)
        self._tokens = predictor.tokenize(self._captions)

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        image = self.once.images(predictor, self._data, self._rows)
        text = self.once.texts(predictor, self._tokens)
        results: dict[str, float] = {}
        by_language: dict[str, Any] = {}
        several = self.languages if len(self.languages) > 1 else ()
        spoken = [f"{self.evaluator.name}/{code}" for code in several]
        for prefix, pairs in self._subsets().items():
            images, captions = taken(image, pairs.images), taken(text, pairs.captions)
            ranks = metrics.retrieval_ranks(images, captions, pairs.owner, ties=self.evaluator.ties)
            for direction in ("image_to_text", "text_to_image"):
                found = getattr(ranks, direction)
                summary = _summary(found)
                results |= {f"{prefix}/{direction}/{k}": v for k, v in summary.items()}
                if prefix in spoken:
                    owner = pairs.images
                    owner = owner if direction == "image_to_text" else owner[pairs.owner]
                    for k in (1, 5, 10):
                        hits = np.bincount(owner, found <= k, len(self._rows)) / len(found)
                        name = f"{self.evaluator.name}/{MEAN}/{direction}/R@{k}"
                        by_language[name] = by_language.get(name, 0.0) + hits / len(spoken)
        # Of each picture, what it adds: the languages have pictures in common, not numbers of captions.
        for name, added in by_language.items():
            results[name] = Figure(added * len(added))
        return results

    def chance(self) -> dict[str, float]:
        """What a random order would score, for each R@k that `evaluate` gives; once loaded."""
        results = {}
        for prefix, pairs in self._subsets().items():
            n, m = len(pairs.images), len(pairs.captions)
            own = np.bincount(pairs.owner)
            for k in (1, 5, 10):
                by_image = [metrics.recall_by_chance(k, m, right) for right in own.tolist()]
                results[f"{prefix}/image_to_text/R@{k}"] = float(np.mean(by_image))
                results[f"{prefix}/text_to_image/R@{k}"] = metrics.recall_by_chance(k, n)
        if len(self.languages) > 1:
            name = self.evaluator.name
            for figure in [key.removeprefix(name) for key in results if key.count("/") == 2]:
                each = [results[f"{name}/{code}{figure}"] for code in self.languages]
                results[f"{name}/{MEAN}{figure}"] = float(np.mean(each))
        return results

    def examples(
        self, predictor: Predictor, count: int = 24, k: int = 5, languages: int = 2
    ) -> list[Example]:
        """Pictures with the captions they retrieve, not picked by how well that went.

        Args:
          predictor: the model.
          count: pictures, evenly spaced over the split.
          k: captions a picture and language.
          languages: how many of the languages to search in, each by itself.
        """
        self.prepare(predictor)
        text = self.once.texts(predictor, self._tokens)
        searched = [(code, self._subset(code)) for code in self.languages[:languages]]
        searched = searched or [("", self._subset(None))]
        pairs = searched[0][1]
        chosen = pairs.images[spaced(len(pairs.images), count)]
        image = predictor.encode_image(self._pixels(chosen))
        rankings = [self._rank(code, p, chosen, image, text, k) for code, p in searched]
        first = {
            owner: caption for caption, owner in zip(*self._first_captions(pairs), strict=True)
        }
        return [
            Example(self._pixels(row), first[row], tuple(r for r in of_row if r is not None))
            for row, *of_row in zip(chosen.tolist(), *rankings, strict=True)
        ]

    def similarities(self, predictor: Predictor, count: int = 32) -> Similarities:
        """Some pictures against their main captions.

        Args:
          predictor: the model.
          count: pictures, evenly spaced over the split.
        """
        self.prepare(predictor)
        pairs = self._subset(self.languages[0] if self.languages else None)
        texts, owners = self._first_captions(pairs)
        chosen = spaced(len(owners), count)
        images = self._pixels(np.array(owners)[chosen])
        captions = tuple(texts[i] for i in chosen)
        scores = predictor.encode_image(images) @ predictor.encode_text(list(captions)).T
        return Similarities(scores, images, captions)

    def _pixels(self, pictures) -> np.ndarray:
        return self._images[self._rows[pictures]]

    def _wanted(self, language: str) -> bool:
        wanted = self.evaluator.languages
        return not wanted or language in wanted

    def _find_languages(self, data: EvalSet) -> tuple[str, ...]:
        """The languages to report, in order; () where captions say none.

        Raises:
          ClipjaxError: a language is asked for that no caption has, or there are no captions.
        """
        known = tuple(dict.fromkeys(code for codes in data.languages for code in codes))
        for code in self.evaluator.languages:
            if code not in known:
                raise ClipjaxError(
                    f"languages={self.evaluator.languages}: no caption of {self.evaluator.source} "
                    f"is in {code!r}; there are "
                    + (", ".join(known) or "captions without languages")
                )
        if not self._captions:
            raise ClipjaxError(f"{self.evaluator.source} has no captions to retrieve")
        return self.evaluator.languages or known

    def _subsets(self) -> dict[str, _Pairs]:
        """What to evaluate, by the prefix of its figures' names."""
        name, languages = self.evaluator.name, self.languages
        subsets = {name: self._subset(languages[0] if languages else None)}
        if len(languages) > 1:
            subsets |= {f"{name}/{code}": self._subset(code) for code in languages}
            subsets[f"{name}/{ANY}"] = self._subset(None)
        return subsets

    def _subset(self, language: str | None) -> _Pairs:
        """The captions in a language (None: all) and the pictures that have one and can be read."""
        spoken = self._language == language if language else np.ones(len(self._owner), bool)
        captions = np.flatnonzero(spoken & ~self._images.unreadable[self._rows[self._owner]])
        images, owner = np.unique(self._owner[captions], return_inverse=True)
        return _Pairs(images, captions, owner)

    def _first_captions(self, pairs: _Pairs) -> tuple[list[str], list[int]]:
        """(first caption of each picture, row of the picture), in the order of `pairs.images`."""
        first = np.unique(pairs.owner, return_index=True)[1]
        return [self._captions[pairs.captions[i]] for i in first], pairs.images.tolist()

    def _rank(self, language, pairs, chosen, image, text, k) -> list[Ranking | None]:
        """For each chosen picture its ranking, None where it has no caption in this language."""
        candidates = taken(text, pairs.captions)
        index, score = metrics.top_k(image, candidates, k)
        place = np.searchsorted(pairs.images, chosen)
        rankings: list[Ranking | None] = []
        for i, row in enumerate(chosen.tolist()):
            right = pairs.owner == place[i]
            if not right.any() or pairs.images[place[i]] != row:
                rankings.append(None)
                continue
            guesses = tuple(
                Guess(self._captions[pairs.captions[j]], float(s), bool(right[j]))
                for j, s in zip(index[i], score[i], strict=True)
            )
            rank = metrics.rank_of_best(image[i], candidates, right)
            rankings.append(Ranking(language, guesses, rank))
        return rankings


def _summary(ranks: np.ndarray) -> dict[str, float]:
    """`metrics.summarize_ranks`, each figure with its examples."""
    shares: dict[str, float] = {f"R@{k}": Figure(ranks <= k) for k in (1, 5, 10)}
    return shares | {
        "median_rank": Figure(ranks, median),
        "mean_reciprocal_rank": Figure(1.0 / ranks),
    }


def merge_equal(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the first of each id, in order; for each row, the place of its id among them)."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[inverse]


def taken(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`rows[index]` of distinct, ascending indices; no copy where that is all: rows may be gigabytes."""
    return rows if len(index) == len(rows) else rows[index]


def spaced(size: int, count: int) -> np.ndarray:
    """`count` of `range(size)`, evenly spaced; all of it if there are fewer."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(int))
