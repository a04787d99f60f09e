"""Balancing as MetaCLIP does (Xu et al., arXiv:2309.16671): texts on what everybody writes about are thinned out.

An *entry* is a word or a few of them. Each text is matched with the entries it holds; an entry with `count`
matches in all of the data asks for its texts with probability min(1, limit / count), and a record is kept
if any entry of its captions asks for it. So an entry keeps about `limit` texts, and rare ones all of theirs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from clipjax.data.filters import Chosen
from clipjax.data.folder import table_rows
from clipjax.errors import ClipjaxError
from clipjax.plain_text import read_lines

LONGEST = 10
"""Words of an entry, at most."""
WORD = re.compile(r"\w+")


class Entries:
    """Entries, to be found in texts: by whole words, whatever their case and what stands between them."""

    def __init__(self, entries: Iterable[str]):
        self._by_words: dict[tuple[str, ...], str] = {}
        self._lengths: list[int] = []
        for entry in entries:
            words = words_of(entry)
            if 0 < len(words) <= LONGEST:
                self._by_words.setdefault(words, entry)
        self._lengths = sorted({len(words) for words in self._by_words})

    def __len__(self) -> int:
        return len(self._by_words)

    def found(self, texts: Iterable[str]) -> set[str]:
        """The entries that some texts hold, each once."""
        hits = set()
        for text in texts:
            words = words_of(text)
            for length in self._lengths:
                for start in range(len(words) - length + 1):
                    entry = self._by_words.get(words[start : start + length])
                    if entry is not None:
                        hits.add(entry)
        return hits


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text, in one case."""
    return tuple(WORD.findall(text.casefold()))


@dataclasses.dataclass(frozen=True)
class Balanced(Chosen):
    """The records that balancing keeps, by the counts in a side table (`clipjax data count` writes one)."""

    counts: str = ""
    """Table (.csv, .tsv, .jsonl) with the columns `entry` and `count`."""
    limit: int = 20_000
    """Texts of an entry above which they are thinned out; MetaCLIP took 20,000 of 400 million."""
    seed: int = 0
    """Another number keeps other records of the frequent entries."""
    unmatched: bool = False
    """Whether records that hold no entry are kept; MetaCLIP leaves them out."""

    def __post_init__(self):
        if not self.counts:
            raise ClipjaxError("Balanced: give counts, a table that clipjax data count writes")
        if self.limit < 1:
            raise ClipjaxError(f"Balanced: limit={self.limit} must be >= 1")

    def files(self):
        return (self.counts,)

    def prepared(self):
        counts = read_counts(self.counts)
        entries = Entries(counts)

        def passes(key, record):
            found = entries.found(record()["captions"])
            if not found:
                return self.unmatched
            return draw(self.seed, key) < chance(found, counts, self.limit)

        return passes


def chance(found: Iterable[str], counts: Mapping[str, int], limit: int) -> float:
    """Probability that any of the entries found asks for a text."""
    return 1 - math.prod(1 - min(1.0, limit / max(counts[entry], 1)) for entry in found)


def draw(seed: int, key: str) -> float:
    """A number in [0, 1) that a key has, whatever the order in which records are looked at."""
    digest = hashlib.blake2b(f"{seed} {key}".encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2**64


def count_entries(texts: Iterable[Iterable[str]], entries: Iterable[str]) -> Counter[str]:
    """How many records hold each entry; with 0 for those that none does.

    Args:
      texts: of each record, its captions.
      entries: what to look for.

    Raises:
      ClipjaxError: there is no entry.
    """
    known = list(dict.fromkeys(entries))
    matcher = Entries(known)
    if not len(matcher):
        raise ClipjaxError(f"no entry of at most {LONGEST} words to count")
    counts = Counter(dict.fromkeys(known, 0))
    for captions in texts:
        counts.update(matcher.found(captions))
    return counts


def read_counts(file: str) -> dict[str, int]:
    """The counts of a table with the columns `entry` and `count`.

    Raises:
      ClipjaxError: it is no such table.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ClipjaxError(f"there is no file {file!r}")
    counts: dict[str, int] = {}
    for line, row in table_rows(path):
        try:
            counts[str(row["entry"])] = int(row["count"])
        except (KeyError, TypeError, ValueError) as error:
            raise ClipjaxError(
                f"{file!r}, line {line}: wants the columns 'entry' and 'count', a whole number"
            ) from error
    return counts


def read_entries(file: str) -> Iterator[str]:
    """The entries of a file, one a line."""
    yield from read_lines(file, "the list of entries")
