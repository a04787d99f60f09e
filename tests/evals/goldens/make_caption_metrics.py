"""Writes caption_metrics.json: captions drawn from a small grammar, and what pycocoevalcap makes of them.

Run with a Python that has pycocoevalcap (its BLEU, ROUGE and CIDEr need no Java):
    python tests/evals/goldens/make_caption_metrics.py
"""

import contextlib
import io
import json
import random
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

SETS = 240
NOUNS = [
    "dog",
    "cat",
    "man",
    "woman",
    "child",
    "horse",
    "train",
    "bus",
    "pizza",
    "table",
    "ball",
    "frisbee",
    "kite",
    "bird",
    "boat",
    "山",
    "狗",
    "café",
]
WHAT = ["red", "small", "old", "two", "wooden", "happy", "striped", "very", "large"]
DOES = [
    "sits",
    "stands",
    "runs",
    "on",
    "on",
    "in",
    "near",
    "under",
    "with",
    "holding",
    "next",
    "to",
    "looking",
    "at",
]


def phrase(rng):
    return (
        ["a"] * (rng.random() < 0.8)
        + rng.sample(WHAT, rng.choice((0, 0, 1, 2)))
        + [rng.choice(NOUNS)]
    )


def caption(rng):
    words = phrase(rng)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        words += [rng.choice(DOES), *phrase(rng)]
    return words


def noisy(rng, words):
    """The caption with words dropped, repeated, swapped or replaced."""
    words = list(words)
    for _ in range(rng.choice((0, 1, 2, 4, 9))):
        i = rng.randrange(len(words))
        change = rng.choice(("drop", "repeat", "swap", "replace", "cut"))
        if change == "drop" and len(words) > 1:
            del words[i]
        elif change == "repeat":
            words.insert(i, words[i])
        elif change == "swap":
            j = rng.randrange(len(words))
            words[i], words[j] = words[j], words[i]
        elif change == "replace":
            words[i] = rng.choice(NOUNS)
        elif change == "cut" and i:
            words = words[:i]
    return words


def main():
    rng = random.Random(0)
    references, candidates = [], []
    for _ in range(SETS):
        first = caption(rng)
        own = [
            first,
            *(
                noisy(rng, first) if rng.random() < 0.5 else caption(rng)
                for _ in range(rng.randrange(5))
            ),
        ]
        candidates.append(noisy(rng, rng.choice(own)) if rng.random() < 0.9 else caption(rng))
        references.append(own)
    gts = {i: [" ".join(r) for r in own] for i, own in enumerate(references)}
    res = {i: [" ".join(c)] for i, c in enumerate(candidates)}
    with contextlib.redirect_stdout(io.StringIO()):
        corpus, by_set = Bleu(4).compute_score(gts, res)
    golden = {
        "candidates": [" ".join(c) for c in candidates],
        "references": [[" ".join(r) for r in own] for own in references],
        "bleu": list(map(float, corpus)),
        "bleu_by_set": [list(map(float, scores)) for scores in zip(*by_set, strict=True)],
        "rouge_l": [float(x) for x in Rouge().compute_score(gts, res)[1]],
        "cider_d": [float(x) for x in Cider().compute_score(gts, res)[1]],
    }
    path = Path(__file__).with_name("caption_metrics.json")
    path.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
