"""Caption metrics: lists of tokens in, numbers out.

BLEU, ROUGE-L and CIDEr-D agree with `pycocoevalcap`, the code behind COCO's leaderboard, on the same
tokens. Its tokenizer is a Java program; `tokenize` here is not the same, so figures differ from
published ones by what tokenizers make of hyphens, apostrophes and numbers.
"""

from __future__ import annotations

import collections
import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from clipjax.errors import ClipjaxError

Tokens = Sequence[str]
Counts = collections.Counter[tuple[str, ...]]

# Scripts written without spaces between words: Han, kana, and the letters of Thai, Lao, Khmer and
# Burmese with their marks.
_UNSPACED = (
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\U00020000-\U0003ffff"
)
_PIECE = re.compile(f"[{_UNSPACED}]|[^{_UNSPACED}]+")


def tokenize(text: str, split_unspaced: bool = True) -> list[str]:
    """A caption as tokens: lower case, cut at white space, without punctuation.

    Punctuation inside a word goes without a trace (`don't` is `dont`), except for hyphens, dashes
    and slashes, which cut. Symbols stay.

    Args:
      text: a caption in any language.
      split_unspaced: whether scripts that put no spaces between words (Chinese, Japanese, Thai, Lao,
        Khmer, Burmese) are cut into code points. Otherwise a whole phrase counts as one word.
    """
    tokens: list[str] = []
    for word in _without_punctuation(unicodedata.normalize("NFKC", text).lower()).split():
        tokens += _PIECE.findall(word) if split_unspaced else [word]
    return tokens


def bleu(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], n: int = 4
) -> tuple[float, ...]:
    """BLEU-1 to BLEU-n of a corpus (Papineni et al. 2002), with the closest reference length.

    Args:
      candidates: a caption for each picture.
      references: one or more captions for each picture.
      n: longest n-gram.

    Raises:
      ClipjaxError: the lists disagree, or a picture has no reference.
    """
    return bleu_of(bleu_counts(candidates, references, n).sum(axis=0))


def bleu_counts(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], n: int = 4
) -> np.ndarray:
    """[N, 2 n + 2]: what each caption adds to a corpus' BLEU, which `bleu_of` makes of the sum.

    n-grams of length 1 to n that are right, all that there are, the caption's length, and that of
    the reference nearest to it in length.

    Args:
      candidates: a caption for each of N pictures.
      references: one or more captions for each picture.
      n: longest n-gram.

    Raises:
      ClipjaxError: as in `bleu`.
    """
    _check(candidates, references)
    counts = np.zeros((len(candidates), 2 * n + 2))
    for row, candidate, own in zip(counts, candidates, references, strict=True):
        allowed: Counts = collections.Counter()
        for reference in own:
            allowed |= _ngrams(reference, n)  # the largest count in any one reference
        for gram, count in (_ngrams(candidate, n) & allowed).items():
            row[len(gram) - 1] += count
        row[n : 2 * n] = np.maximum(len(candidate) - np.arange(n), 0)
        nearest = min((abs(len(r) - len(candidate)), len(r)) for r in own)[1]
        row[2 * n :] = len(candidate), nearest
    return counts


def bleu_of(counts: np.ndarray) -> tuple[float, ...]:
    """BLEU-1 to BLEU-n of the sum [2 n + 2] of a corpus' `bleu_counts`."""
    n = len(counts) // 2 - 1
    correct, guessed = counts[:n], counts[n : 2 * n]
    candidate_length, reference_length = counts[2 * n :]
    # These two, from pycocoevalcap, keep a corpus without a match from dividing by zero.
    precision = (correct + 1e-15) / (guessed + 1e-9)
    score = np.cumprod(precision) ** (1 / (1 + np.arange(n)))
    ratio = (candidate_length + 1e-15) / (reference_length + 1e-9)
    if ratio < 1:
        score = score * math.exp(1 - 1 / ratio)
    return tuple(score.tolist())


def rouge_l(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], beta: float = 1.2
) -> np.ndarray:
    """[n] ROUGE-L (Lin 2004) of each caption: F-measure of the longest common subsequence.

    Over several references, precision and recall are each taken at their best.

    Args:
      candidates: a caption for each picture.
      references: one or more captions for each picture.
      beta: weight of recall.

    Raises:
      ClipjaxError: as in `bleu`.
    """
    _check(candidates, references)
    return np.array([_rouge_l(c, own, beta) for c, own in zip(candidates, references, strict=True)])


def cider_d(
    candidates: Sequence[Tokens],
    references: Sequence[Sequence[Tokens]],
    n: int = 4,
    sigma: float = 6.0,
) -> np.ndarray:
    """[n] CIDEr-D (arXiv:1411.5726) of each caption, from 0 to 10.

    Document frequencies are those of the references at hand, one document a picture: figures on
    different sets of pictures do not compare, and a single picture scores 0.

    Args:
      candidates: a caption for each picture.
      references: one or more captions for each picture.
      n: longest n-gram.
      sigma: how far lengths may differ, in tokens.

    Raises:
      ClipjaxError: as in `bleu`.
    """
    _check(candidates, references)
    counted = [[_ngrams(reference, n) for reference in own] for own in references]
    document_frequency: Counts = collections.Counter()
    for own_counts in counted:
        document_frequency.update({gram for counts in own_counts for gram in counts})
    log_documents = math.log(len(references))

    def vector(counts: Counts) -> dict[tuple[str, ...], float]:
        return {
            gram: count * (log_documents - math.log(max(document_frequency[gram], 1)))
            for gram, count in counts.items()
        }

    scores = []
    for candidate, own, own_counts in zip(candidates, references, counted, strict=True):
        weights = vector(_ngrams(candidate, n))
        norm = _norms(weights, n)
        total = 0.0
        for reference, counts in zip(own, own_counts, strict=True):
            others = vector(counts)
            dot = np.zeros(n)
            for gram in weights.keys() & others.keys():
                dot[len(gram) - 1] += min(weights[gram], others[gram]) * others[gram]
            norms = norm * _norms(others, n)
            cosine = np.divide(dot, norms, out=np.zeros(n), where=norms > 0)
            # pycocoevalcap measures length in bigrams.
            apart = max(len(candidate) - 1, 0) - max(len(reference) - 1, 0)
            total += cosine.mean() * math.exp(-(apart**2) / (2 * sigma**2))
        scores.append(10 * total / len(own))
    return np.array(scores)


def clip_score(image: np.ndarray, caption: np.ndarray, w: float = 2.5) -> np.ndarray:
    """[n] CLIPScore (arXiv:2104.08718): `w * max(cos, 0)`.

    Args:
      image: [n, E] embeddings of pictures, unit norm.
      caption: [n, E] embeddings of their captions, unit norm.
      w: stretches the score; the paper's is 2.5.
    """
    cosine = np.einsum("ne,ne->n", np.asarray(image, np.float64), np.asarray(caption, np.float64))
    return w * np.maximum(cosine, 0.0)


def ref_clip_score(
    image: np.ndarray, caption: np.ndarray, reference: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    """[n] RefCLIPScore (arXiv:2104.08718): harmonic mean of CLIPScore and the best reference's cosine.

    Args:
      image: [n, E] embeddings of pictures, unit norm.
      caption: [n, E] embeddings of their captions, unit norm.
      reference: [m, E] embeddings of the references, unit norm.
      owner: int [m], the picture of each reference; every picture has one.
    """
    caption64 = np.asarray(caption, np.float64)
    cosine = np.einsum("me,me->m", np.asarray(reference, np.float64), caption64[owner])
    best = np.zeros(len(caption64))
    np.maximum.at(best, owner, cosine)
    score = clip_score(image, caption)
    both = score + best
    return np.divide(2 * score * best, both, out=np.zeros_like(both), where=both > 0)


def _without_punctuation(text: str) -> str:
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category == "Pd" or character in "/\\":
            kept.append(" ")
        elif not category.startswith("P"):
            kept.append(character)
    return "".join(kept)


def _ngrams(tokens: Tokens, n: int) -> Counts:
    """How often each n-gram of length 1 to n occurs."""
    return collections.Counter(
        tuple(tokens[i : i + k]) for k in range(1, n + 1) for i in range(len(tokens) - k + 1)
    )


def _norms(weights: dict[tuple[str, ...], float], n: int) -> np.ndarray:
    """[n]: Euclidean norms of the parts of a vector that belong to each length of n-gram."""
    squares = np.zeros(n)
    for gram, weight in weights.items():
        squares[len(gram) - 1] += weight**2
    return np.sqrt(squares)


def _rouge_l(candidate: Tokens, references: Sequence[Tokens], beta: float) -> float:
    common = [_longest_common_subsequence(candidate, reference) for reference in references]
    precision = max(common) / max(len(candidate), 1)
    recall = max(c / max(len(r), 1) for c, r in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common_subsequence(a: Tokens, b: Tokens) -> int:
    row = [0] * (len(b) + 1)
    for token in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if token == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def _check(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> None:
    if len(candidates) != len(references) or not candidates:
        raise ClipjaxError(
            f"{len(candidates)} captions and references for {len(references)} pictures: there must "
            "be one caption a picture, and at least one picture"
        )
    for i, own in enumerate(references):
        if not own:
            raise ClipjaxError(f"picture number {i} has no reference caption")
