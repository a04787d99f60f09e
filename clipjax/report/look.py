"""What a run's data look like to the model: `clipjax data look`, in the terminal or as one HTML file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipjax.data import (
    Data,
    Field,
    Spec,
    Text,
    TokenizerModel,
    UnreadableRecord,
    load_tokenizer,
)
from clipjax.errors import ClipjaxError
from clipjax.report.pictures import picture_uri

SHOWN = 12
"""Numbers of an array that are shown, and reasons for skipping a kind of record."""
SIDE = 288
"""Greatest width and height of a picture in the page, in pixels."""


@dataclasses.dataclass(frozen=True)
class Seen(Field):
    """A field that sees what the others made, and numbers it in the batch."""

    name: str = "seen"
    found: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By number, what was seen."""
    numbers: Any = dataclasses.field(default_factory=itertools.count)

    @property
    def follows(self):
        return ("image",)  # so that it comes last

    def spec(self, data):
        return {self.name: Spec((), "int32")}

    def read(self, example):
        return {
            "key": example.key,
            "captions": tuple(example.record.get("captions", ())),
            "shown": {
                name: [shown.text for shown in made]
                for name, made in example.made.items()
                if isinstance(made, tuple) and made and hasattr(made[0], "text")
            },
        }

    def write(self, values, rows):
        for i, value in enumerate(values):
            number = next(self.numbers)
            self.found[number] = value
            rows[self.name][i] = number


class Skipped(NamedTuple):
    """Records that were skipped for one reason.

    Attributes:
      reason: in words, without the record's name.
      records: how many.
      examples: a few messages in full.
    """

    reason: str
    records: int
    examples: list[str]


class TextSeen(NamedTuple):
    """A text as the model sees it.

    Attributes:
      text: as it was chosen from the record; None where it is not known.
      pieces: its tokens, each decoded.
      ids: its tokens, without padding.
      cut: whether its end did not fit.
    """

    text: str | None
    pieces: list[str]
    ids: list[int]
    cut: bool


class ExampleSeen(NamedTuple):
    """A row of a batch.

    Attributes:
      key: the record's.
      captions: all that the record has.
      pictures: by field, uint8 [S, S, 3].
      texts: by field, one or several.
      others: by field, in words.
    """

    key: str
    captions: tuple[str, ...]
    pictures: dict[str, np.ndarray]
    texts: dict[str, list[TextSeen]]
    others: dict[str, str]


class Look(NamedTuple):
    """What `look` saw.

    Attributes:
      examples: the first rows of the run.
      read: records that were read.
      skipped: of these, by reason, the most frequent first.
      num_examples: records of the source; None where it is not known.
      spec: of the batch.
      vocab_size: of the tokenizer.
    """

    examples: list[ExampleSeen]
    read: int
    skipped: list[Skipped]
    num_examples: int | None
    spec: dict[str, Spec]
    vocab_size: int


def look(
    data: Data, seed: int, count: int = 64, records: int = 512, tokenizer: Path | None = None
) -> Look:
    """Makes the first batches of a run.

    Args:
      data: the run's.
      seed: the run's.
      count: examples to keep.
      records: to read, in order to see what is skipped.
      tokenizer: a folder with one; None: the data's, trained if need be.

    Raises:
      ClipjaxError: the data cannot be opened, or none of the records can be used.
    """
    if count < 1 or records < 1:
        raise ClipjaxError(f"count={count} and records={records} must be >= 1")
    model = (
        load_tokenizer(tokenizer)
        if tokenizer is not None
        else data.tokenizer.build(data.iter_captions())
    )
    spec, seen = data.spec(), Seen()
    if data.plan is None:  # which is asked for whole batches of the run
        lanes = data.stream.lanes if data.stream is not None else 1
        data = dataclasses.replace(data, batch_size=math.ceil(count / lanes) * lanes)
    data = dataclasses.replace(data, fields=(*data.fields, seen), prefetch=1, num_workers=0)
    quiet = logging.getLogger("clipjax.data.loader")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # what is skipped is said here
    try:
        loader = data.build(model, seed)
    finally:
        quiet.setLevel(level)
    examples: list[ExampleSeen] = []
    failures: list[UnreadableRecord] = []
    used = 0
    with contextlib.closing(loader.made(0)) as batches:
        for rows, failed in batches:
            failures += failed
            used += data.batch_size
            for i in range(data.batch_size):
                if len(examples) < count:
                    row = {name: array[i] for name, array in rows.items()}
                    examples.append(_example(row, seen.found[int(row["seen"])], data, model))
            seen.found.clear()
            if len(examples) >= count and used + len(failures) >= records:
                break
    return Look(
        examples,
        used + len(failures),
        _grouped(failures),
        loader.num_examples,
        spec,
        model.vocab_size,
    )


def _example(
    row: dict[str, np.ndarray], seen: dict[str, Any], data: Data, model: TokenizerModel
) -> ExampleSeen:
    texts = {field.name for field in data.fields if isinstance(field, Text)}
    pictures: dict[str, np.ndarray] = {}
    read: dict[str, list[TextSeen]] = {}
    others: dict[str, str] = {}
    for name, value in row.items():
        if name == "seen":
            continue
        if value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3:
            pictures[name] = value
        elif name in texts or name in seen["shown"]:
            words = seen["shown"].get(name, [])
            read[name] = [
                _text(ids, words[i] if i < len(words) else None, model)
                for i, ids in enumerate(value.reshape(-1, value.shape[-1]))
            ]
        else:
            others[name] = _numbers(value)
    return ExampleSeen(seen["key"], seen["captions"], pictures, read, others)


def _text(ids: np.ndarray, text: str | None, model: TokenizerModel) -> TextSeen:
    kept: list[int] = []
    for number in map(int, ids):
        kept.append(number)
        if number == model.eos_id:
            break
    inner = [i for i in kept if i not in (model.bos_id, model.eos_id)]
    pieces = [model.decode(np.array([[i]]))[0] for i in inner]
    whole = model.encode([text], 4 * len(ids) + 8)[0] if text else None
    cut = whole is not None and len(kept) == len(ids) and int(whole[len(ids) - 1]) != model.eos_id
    return TextSeen(text, pieces, kept, cut)


def _numbers(value: np.ndarray) -> str:
    flat = value.reshape(-1)
    words = ", ".join(f"{x:g}" if flat.dtype.kind == "f" else str(x) for x in flat[:SHOWN])
    shape = f" {list(value.shape)}" if value.ndim else ""
    return words + (", ..." if len(flat) > SHOWN else "") + shape


def _grouped(failures: list[UnreadableRecord]) -> list[Skipped]:
    """By what follows the record's name."""
    reasons: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for failure in map(str, failures):
        _, _, reason = failure.partition(": ")
        reason = reason or failure
        reasons[reason] += 1
        some = examples.setdefault(reason, [])
        if failure not in some and len(some) < SHOWN:
            some.append(failure)
    return [Skipped(reason, n, examples[reason]) for reason, n in reasons.most_common()]


def summary_of(seen: Look, lines: int = 8) -> str:
    """A few lines for a terminal."""
    total = "an unknown number of" if seen.num_examples is None else f"{seen.num_examples:,}"
    said = [
        f"{total} records; {seen.read:,} read, {sum(s.records for s in seen.skipped):,} skipped"
    ]
    said += [
        f"  {s.records:,}: {s.reason} (such as {s.examples[0]!r})" for s in seen.skipped[:lines]
    ]
    said.append(f"a batch has, with {seen.vocab_size:,} tokens in the vocabulary:")
    said += [f"  {name}: {spec.dtype} {list(spec.shape)}" for name, spec in seen.spec.items()]
    for example in seen.examples[:lines]:
        said.append(f"{example.key}")
        for name, texts in example.texts.items():
            for text in texts:
                cut = " (cut)" if text.cut else ""
                said.append(f"  {name}, {len(text.ids)} tokens{cut}: {'|'.join(text.pieces)}")
        others = [f"{name} {value}" for name, value in example.others.items()]
        said.append("  " + "; ".join(others))
    # Scraped texts may hold what steers a terminal.
    return "\n".join(
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        for line in said
    )


def page_of(seen: Look, title: str) -> str:
    """One HTML file that needs nothing else."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("clipjax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("look.html").render(
        title=title,
        seen=seen,
        skipped=sum(s.records for s in seen.skipped),
        examples=[
            example._asdict()
            | {"pictures": {n: picture_uri(p, SIDE) for n, p in example.pictures.items()}}
            for example in seen.examples
        ],
    )
    return page.encode("utf-8", "replace").decode()
