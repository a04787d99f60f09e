"""Makes goldens/clip_bpe.npz: what OpenCLIP's SimpleTokenizer makes of 2,000 strings.

Needs the `interop` and `quickstart` extras. The golden holds the strings, their ids, and of OpenAI's
merges only those that these strings use, with their ranks: leaving out the others changes nothing,
because a merge that is never applied decides nothing.
"""

import unicodedata
from pathlib import Path

import emoji
import numpy as np
from open_clip.tokenizer import SimpleTokenizer, get_pairs

LANGUAGES = ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
TRICKY = [
    "", " ", "\t\n", "a", "A photo of a CAT.", "don't, we'll, they've, I'm, he'd, you're, it's",
    "DON'T WE'LL", "l'\xe9t\xe9 n'est-ce pas", "it's 1,234.56 $ (about 12%)",
    "x\xb2+y\u2083=\xbd \u2167 \u2460", "&lt;b&gt; &amp;amp; &eacute;t&eacute; &#128512; &nbsp;x", "&amp;lt;",
    "caf\xe9 cafe\u0301", "sch\xc3\xb6n", "l\xe2\u20ac\u2122hiver", "\ufb01ne of\ufb01ce \uff21\uff22\uff23",
    "zero\u200bwidth\u200djoin\u200c", "\u202eright to left\u202c", "\ufeffbom", "soft\xadhyphen",
    "bell\x07 null\x00 escape\x1b[31m del\x7f", "unit\x1fsep group\x1d line\x85feed", "a\x0bb\x0cc\rd",
    "line\u2028sep para\u2029sep", "no\xa0break thin\u2009space ideographic\u3000space",
    "\u0130stanbul \u0131\u0131 \u1e9e \xdf \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u03a3",
    "\u017f \u212a", "'\u017f it'\u017f", "\u2018quoted\u2019 \u201cdouble\u201d \u2014 dash \u2026",
    "\u0e01\u0e33\u0e25\u0e31\u0e07", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0967\u0968\u0969",
    "\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd", "\U0001d400\U0001d401 \U0001f130",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f3fd",
    "\U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea", "1\ufe0f\u20e3 #\ufe0f\u20e3", "\ud7a3\u1112\u1161\u11ab",
    "__init__ snake_case camelCase http://x.y/z?a=b&c=d #tag @you", "<|startoftext|> <|endoftext|> </w> <b>",
    "word " * 100, 'a' * 300,
    "\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600\U0001f600",
    "...!!!???", "\xb7\u2022\u25cf",
]  # fmt: skip


def strings():
    bits = np.random.PCG64(7)
    chosen = list(TRICKY)
    entries = [e for e, facts in emoji.EMOJI_DATA.items() if facts["status"] == 2]
    for language in LANGUAGES:
        emoji.config.load_language(language)
    for i in range(1540):
        picture = entries[bits.random_raw() % len(entries)]
        name = emoji.EMOJI_DATA[picture].get(LANGUAGES[i % 14]) or emoji.EMOJI_DATA[picture]["en"]
        name = name.strip(":").replace("_", " ")
        forms = (
            name,
            f"{picture} {name}",
            f"{name}{picture}{picture}",
            name.upper(),
            f"  {name},\t2x ",
        )
        chosen.append(forms[bits.random_raw() % len(forms)])
    blocks = ((0, 0x80), (0x80, 0x250), (0x250, 0x700), (0x900, 0x1200), (0x2000, 0x2C00),
              (0x3000, 0xD7A0), (0xF900, 0x10000), (0x10000, 0x11000), (0x1F000, 0x1FB00))  # fmt: skip
    while len(chosen) < 2000:
        low, high = blocks[bits.random_raw() % len(blocks)]
        codes = low + bits.random_raw(1 + int(bits.random_raw() % 24)) % np.uint64(high - low)
        # Code points without a character yet are letters or not by the age of a library's tables.
        known = [c for c in map(chr, codes.tolist()) if unicodedata.category(c) != "Cn"]
        chosen.append("".join(known))
    return chosen


def used_merges(tokenizer, words):
    used = set()
    for token in words:
        word = (*token[:-1], token[-1] + "</w>")
        while len(word) > 1:
            pair = min(get_pairs(word), key=lambda p: tokenizer.bpe_ranks.get(p, float("inf")))
            if pair not in tokenizer.bpe_ranks:
                break
            used.add(tokenizer.bpe_ranks[pair])
            merged, i = [], 0
            while i < len(word):
                hit = word[i : i + 2] == pair
                merged.append("".join(pair) if hit else word[i])
                i += 2 if hit else 1
            word = tuple(merged)
    return sorted(used)


def main():
    tokenizer = SimpleTokenizer()
    texts = strings()
    ids = tokenizer(texts).numpy().astype(np.uint16)
    words = [w for w in tokenizer.cache if w not in ("<start_of_text>", "<end_of_text>")]
    one_letter = [w for w in words if len(w) == 1]
    ranks = used_merges(tokenizer, [w for w in words if w not in one_letter])
    pairs = {rank: pair for pair, rank in tokenizer.bpe_ranks.items()}
    lines = "\n".join(" ".join(pairs[rank]) for rank in ranks)
    raw = [t.encode("utf-8") for t in texts]
    np.savez_compressed(
        Path(__file__).parent.parent / "goldens" / "clip_bpe.npz",
        texts=np.frombuffer(b"".join(raw), np.uint8),
        lengths=np.array([len(r) for r in raw], np.uint16),
        ids=ids,
        merges=np.frombuffer(lines.encode(), np.uint8),
        ranks=np.array(ranks, np.uint16),
    )


main()
