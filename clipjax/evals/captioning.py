"""Captioning: how close to people's captions are the model's?"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from clipjax.data import Source, UnreadableRecord
from clipjax.errors import ClipjaxError
from clipjax.evals import caption_metrics, java_metrics
from clipjax.evals.base import Evaluator, Runner, require_at_least
from clipjax.evals.figure import Figure
from clipjax.evals.metrics import top_k
from clipjax.evals.retrieval import merge_equal, spaced
from clipjax.generation import Greedy, Strategy
from clipjax.predictor import Predictor
from clipjax.report.contents import CaptionExample, ScoredCaption

Reference = tuple[str, str]
"""A caption and its language ("" where unknown). One that two people wrote stands twice: CIDEr-D is a
mean over references."""
_QUERIES = 256  # pictures that look for a training caption at once


@dataclasses.dataclass(frozen=True)
class Captioning(Evaluator):
    """Captions a split and compares with its own captions, the references.

    Figures are named `{name}/BLEU-1` to `BLEU-4`, `{name}/ROUGE-L`, `{name}/CIDEr-D` (from 0 to 10)
    and, by the model's own embeddings, `{name}/CLIPScore` and `{name}/RefCLIPScore`; with several
    languages, `{name}/zh/CIDEr-D` and so on besides. `{name}/retrieved/CIDEr-D` and its like are
    what the nearest training caption scores, which a captioner should beat.

    Pictures with equal ids are one picture, whose references are the captions of all of them.
    """

    source: Source
    """Split to caption."""
    name: str = "captioning"
    """First part of the figures' names."""
    strategy: Strategy = Greedy()
    """How tokens are chosen."""
    prompt: str = ""
    """What every caption begins with; it counts as a part of it."""
    seed: int = 0
    """For strategies that draw at random."""
    languages: tuple[str, ...] = ()
    """Codes of the references' languages, the first for the main figures; (): all captions alike."""
    limit: int | None = None
    """Most records to use; None: all."""
    prefix: str = "A photo depicts "
    """What CLIPScore and RefCLIPScore put before captions and references: the paper's."""
    embeddings: bool = True
    """Whether to take CLIPScore and RefCLIPScore; False for a model that does not embed texts."""
    training: Source | None = None
    """Where the baseline takes captions from: for each picture the nearest; None: no baseline."""
    training_limit: int | None = None
    """Most records of `training` to use; None: all."""
    split_unspaced: bool = True
    """Whether to compare Chinese, Japanese, Thai, ... by character instead of by phrase."""
    meteor: bool = False
    """Also METEOR (English; needs Java and the extra `captioning`)."""
    spice: bool = False
    """Also SPICE (English; needs Java and the extra `captioning`, and fetches models when first used)."""

    def __post_init__(self):
        require_at_least(self, 1, "limit", "training_limit")
        if self.training is not None and not self.embeddings:
            raise ClipjaxError(
                f"{self.name}: the baseline finds training captions by embeddings, and "
                "embeddings=False says that there are none: leave training out"
            )

    def build(self) -> CaptioningRunner:
        return CaptioningRunner(self)


class CaptioningRunner(Runner):
    """`Captioning` at work: keeps pictures, references and training captions between evaluations."""

    evaluator: Captioning

    def load(self, predictor: Predictor) -> None:
        config = self.evaluator
        predictor.require_decoder()
        java_metrics.require(self._java())
        data = self._data = self.once.split(config.source, predictor, config.limit)
        rows, owners = merge_equal(data.ids)
        references: list[list[Reference]] = [[] for _ in rows]
        for owner, captions, languages in zip(owners, data.captions, data.languages, strict=True):
            for i, text in enumerate(captions):
                language = languages[i] if languages else ""
                if not config.languages or language in config.languages:
                    references[owner].append((text, language))
        kept = [i for i, own in enumerate(references) if own]
        self._images, self._rows = data.images, rows[kept]
        self._references = [references[i] for i in kept]
        self._check_languages(data.languages)
        self._training = self._training_captions() if config.training is not None else []

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        config = self.evaluator
        image = self.once.images(predictor, self._data, self._rows)
        kept = np.flatnonzero(~self._images.unreadable[self._rows])
        image, references = image[kept], [self._references[i] for i in kept]
        sets = {"": self._caption(predictor, self._rows[kept])}
        if config.training is not None:
            sets["retrieved/"] = self._nearest(predictor, image)
        main, *others = config.languages or (None,)
        results: dict[str, float] = {}
        for kind, captions in sets.items():
            figures = self._figures(captions, references, main)
            if config.embeddings:
                figures |= self._clip_scores(predictor, image, captions, references, main)
            for language in (main, *others) if others else ():
                in_language = self._figures(captions, references, language)
                figures |= {f"{language}/{name}": value for name, value in in_language.items()}
            results |= {f"{config.name}/{kind}{name}": value for name, value in figures.items()}
        return results

    def examples(self, predictor: Predictor, count: int = 24) -> list[CaptionExample]:
        """Pictures with their generated captions, not picked by how well that went.

        Args:
          predictor: the model.
          count: pictures, evenly spaced over the split.
        """
        self.prepare(predictor)
        chosen = spaced(len(self._rows), count)
        images = self._images[self._rows[chosen]]
        texts = [list(dict.fromkeys(text for text, _ in self._references[i])) for i in chosen]
        references = [tuple(own[:3]) for own in texts]
        captions = self._caption(predictor, self._rows[chosen])
        image = predictor.encode_image(images) if self.evaluator.embeddings else None
        nearest = self._nearest(predictor, image) if self._training and image is not None else None

        def scored(texts: list[str], owner: np.ndarray) -> list[ScoredCaption]:
            if image is None:
                return [ScoredCaption(text, None) for text in texts]
            cosine = np.einsum("ne,ne->n", image[owner], predictor.encode_text(texts))
            return [ScoredCaption(t, float(c)) for t, c in zip(texts, cosine, strict=True)]

        owner = np.repeat(np.arange(len(chosen)), [len(own) for own in references])
        own_scored = scored([text for own in references for text in own], owner)
        everyone = np.arange(len(chosen))
        retrieved = None if nearest is None else scored(nearest, everyone)
        return [
            CaptionExample(
                image=images[i],
                caption=caption,
                references=tuple(own_scored[j] for j in np.flatnonzero(owner == i)),
                retrieved=None if retrieved is None else retrieved[i],
                right=self._tokens(caption.text) in [self._tokens(r) for r in references[i]],
            )
            for i, caption in enumerate(scored(captions, everyone))
        ]

    def _caption(self, predictor: Predictor, rows: np.ndarray) -> list[str]:
        config = self.evaluator
        return predictor.caption_rows(
            lambda index: self._images[rows[index]],
            len(rows),
            config.strategy,
            config.prompt,
            config.seed,
        )

    def _figures(
        self, captions: list[str], references: list[list[Reference]], language: str | None
    ) -> dict[str, float]:
        """Figures of captions as text, against the references in a language (None: in all)."""
        rows, texts = _spoken(references, language)
        candidates = [self._tokens(captions[i]) for i in rows]
        wanted = [[self._tokens(text) for text in own] for own in texts]
        counts = caption_metrics.bleu_counts(candidates, wanted)
        figures: dict[str, float] = {
            f"BLEU-{n}": Figure(counts, functools.partial(_bleu, n=n)) for n in range(1, 5)
        }
        figures["ROUGE-L"] = Figure(caption_metrics.rouge_l(candidates, wanted))
        figures["CIDEr-D"] = Figure(caption_metrics.cider_d(candidates, wanted))
        return figures | java_metrics.score(self._java(), candidates, wanted)

    def _clip_scores(
        self,
        predictor: Predictor,
        image: np.ndarray,
        captions: list[str],
        references: list[list[Reference]],
        language: str | None,
    ) -> dict[str, float]:
        """Figures of captions by the model's own embeddings."""
        rows, texts = _spoken(references, language)
        prefix = self.evaluator.prefix
        caption = predictor.encode_text([prefix + captions[i] for i in rows])
        image = image[rows]
        owner = np.repeat(np.arange(len(rows)), [len(own) for own in texts])
        reference = predictor.encode_text([prefix + text for own in texts for text in own])
        with_references = caption_metrics.ref_clip_score(image, caption, reference, owner)
        return {
            "CLIPScore": Figure(caption_metrics.clip_score(image, caption)),
            "RefCLIPScore": Figure(with_references),
        }

    def _java(self) -> list[str]:
        config = self.evaluator
        return ["METEOR"] * config.meteor + ["SPICE"] * config.spice

    def _tokens(self, text: str) -> list[str]:
        return caption_metrics.tokenize(text, self.evaluator.split_unspaced)

    def _nearest(self, predictor: Predictor, image: np.ndarray) -> list[str]:
        """For each picture the training caption with the greatest cosine similarity."""
        text = predictor.encode_text(self._training)
        nearest: list[str] = []
        for start in range(0, len(image), _QUERIES):
            index, _ = top_k(image[start : start + _QUERIES], text, 1)
            nearest += [self._training[i] for i in index[:, 0]]
        return nearest

    def _training_captions(self) -> list[str]:
        """Different captions of the training source, in the languages of the references."""
        config = self.evaluator
        assert config.training is not None
        opened = config.training.open()
        size = len(opened)
        found: dict[str, None] = {}
        for i in range(size if config.training_limit is None else min(config.training_limit, size)):
            try:
                record = opened[i]
            except UnreadableRecord:
                continue
            languages = record.get("languages", ()) or ("",) * len(record["captions"])
            for text, language in zip(record["captions"], languages, strict=True):
                if text.strip() and (not config.languages or language in config.languages):
                    found[text.strip()] = None
        if not found:
            raise ClipjaxError(f"{config.training} has no captions to retrieve")
        return list(found)

    def _check_languages(self, languages: tuple[tuple[str, ...], ...]) -> None:
        config = self.evaluator
        known = tuple(dict.fromkeys(code for codes in languages for code in codes))
        for code in config.languages:
            if code not in known:
                raise ClipjaxError(
                    f"languages={config.languages}: no caption of {config.source} is in {code!r}; "
                    f"there are {', '.join(known) or 'captions without languages'}"
                )
        if not self._references:
            raise ClipjaxError(f"{config.source} has no captions to compare with")


def _bleu(counts: np.ndarray, weights: np.ndarray | None, n: int) -> float:
    """BLEU-n of a corpus whose captions count so often."""
    summed = counts.sum(axis=0) if weights is None else weights @ counts
    return caption_metrics.bleu_of(summed)[n - 1]


def _spoken(
    references: list[list[Reference]], language: str | None
) -> tuple[list[int], list[list[str]]]:
    """(pictures with references in a language, those references); None: in any."""
    texts = [[t for t, spoken in own if language in (None, spoken)] for own in references]
    rows = [i for i, own in enumerate(texts) if own]
    return rows, [texts[i] for i in rows]
