"""Choosing among a source's records without rewriting its files: by lists of keys, by scores, by balance.

A chosen source is a source: it can be trained on, evaluated, mixed and streamed like the one it chooses from.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.component import to_json
from clipjax.data.fields import entry
from clipjax.data.folder import table_rows
from clipjax.data.pieces import edges_of, read_run
from clipjax.data.reading import retried
from clipjax.data.sources import RandomAccess, Record, Source, UnreadableRecord
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.files import replace_file
from clipjax.plain_text import read_lines

logger = logging.getLogger(__name__)

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "!=": lambda a, b: a != b,
    "==": lambda a, b: a == b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}
OF_PICTURES = ("image.width", "image.height")
"""Names of what a picture's header says."""
THREADS = 16
"""That look at records."""
BLOCK = 1 << 16
"""Records that wait for them at a time."""


@dataclasses.dataclass(frozen=True)
class Chosen(Source):
    """Some of the records of a source. A class of one's own says which: `passes(key, record)`."""

    source: Source
    """What to choose from."""
    remember: str | None = None
    """A file (.npz) that keeps which records were chosen, made when the source is first opened. Without,
    each process looks at all records, or at all keys, whenever it opens the source."""

    @property
    def reads(self) -> bool:
        """Whether `passes` looks at more than keys."""
        return True

    @property
    def looks(self) -> bool:
        """Whether `passes` looks at pictures, too."""
        return False

    def prepared(self) -> Callable[[str, Callable[[], Record]], bool]:
        """Opens what is needed to choose, and gives `passes(key, record)`: whether a record is chosen.

        `record()` reads it, without its picture where the source can leave it. Called from several threads.

        Raises:
          ClipjaxError: a file is not there or not what it should be.
        """
        raise NotImplementedError

    def why(self, records: RandomAccess) -> str:
        """What may be wrong where no record was chosen, to end a message with."""
        return ""

    def files(self) -> tuple[str, ...]:
        """What the choice depends on besides the fields and the source."""
        return ()

    def open(self) -> RandomAccess:
        return self.choose(self.source.open())

    def choose(self, records: RandomAccess) -> RandomAccess:
        """The chosen of the source's records, which are open already.

        Raises:
          ClipjaxError: they are none, or a condition names what no record has.
        """
        chosen = self._remembered(records)
        if chosen is None:
            chosen = self._choose(records)
            if self.remember is not None:
                self._keep(records, chosen)
        if not len(chosen):
            raise ClipjaxError(
                f"{type(self).__name__} leaves none of {len(records):,} records{self.why(records)}"
            )
        logger.info("%s: %d of %d records", type(self).__name__, len(chosen), len(records))
        return _OpenChosen(records, chosen)

    def _choose(self, records: RandomAccess) -> np.ndarray:
        passes = self.prepared()
        read: Any = records.__getitem__
        if not self.looks:
            read = getattr(records, "facts", read)
        own = getattr(records, "keys", None)
        keys = list(own()) if callable(own) else None

        def passed(index: int) -> bool:
            kept: list[Record] = []

            def record() -> Record:
                if not kept:
                    kept.append(retried(functools.partial(read, index), f"record {index}"))
                return kept[0]

            try:
                return passes(keys[index] if keys is not None else record()["key"], record)
            except UnreadableRecord:
                return False  # it would be replaced anyway

        count = len(records)
        if keys is not None and not self.reads:
            found = [passed(i) for i in range(count)]
        else:
            found = []
            with ThreadPoolExecutor(THREADS, "clipjax-choose") as pool:
                for first in range(0, count, BLOCK):
                    found += pool.map(passed, range(first, min(first + BLOCK, count)))
        return np.flatnonzero(np.fromiter(found, bool, count))

    def _mark(self, records: RandomAccess) -> str:
        """Another when the records or the choice are."""
        known = getattr(records, "fingerprint", None)
        if known is None:
            ends = []
            for index in sorted({i * (len(records) - 1) // 7 for i in range(8)}):
                try:
                    ends.append(records[index]["key"])
                except UnreadableRecord as failure:
                    ends.append(str(failure))
            known = json.dumps([len(records), ends])
        states = [_state(file) for file in self.files()]
        fields = to_json(dataclasses.replace(self, remember=None))
        text = json.dumps([str(known), states, fields], sort_keys=True)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]

    def _remembered(self, records: RandomAccess) -> np.ndarray | None:
        if self.remember is None or not os.path.isfile(self.remember):
            return None
        try:
            with np.load(self.remember, allow_pickle=False) as file:
                mark, bits = str(file["mark"]), file["bits"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ClipjaxError(
                f"{self.remember!r} is not what Chosen.remember wrote ({error}): remove it"
            ) from error
        if mark != self._mark(records):
            logger.warning("%s is of other records or another choice: made anew", self.remember)
            return None
        return np.flatnonzero(np.unpackbits(bits, count=len(records)))

    def _keep(self, records: RandomAccess, chosen: np.ndarray) -> None:
        bits = np.zeros(len(records), bool)
        bits[chosen] = True
        buffer = io.BytesIO()
        np.savez(buffer, mark=np.array(self._mark(records)), bits=np.packbits(bits))
        try:
            replace_file(str(self.remember), buffer.getvalue())
        except OSError as error:
            raise ClipjaxError(f"{self.remember}: {error.strerror or error}") from error


def _state(file: str) -> tuple[str, int, int]:
    try:
        found = os.stat(os.path.expanduser(file))
    except OSError as error:
        raise ClipjaxError(f"{file!r}: {error.strerror or error}") from error
    return file, found.st_mtime_ns, found.st_size


class _OpenChosen(Sequence):
    def __init__(self, records: RandomAccess, chosen: np.ndarray):
        self._records = records
        small = len(records) <= np.iinfo(np.uint32).max
        self._chosen = chosen.astype(np.uint32 if small else np.int64)
        self.class_names = getattr(records, "class_names", None)
        if callable(own := getattr(records, "keys", None)):
            self.keys = lambda: [key for key, use in zip(own(), self._bits(), strict=True) if use]
        if callable(facts := getattr(records, "facts", None)):
            self.facts = lambda index: facts(int(self._chosen[index]))

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._records[int(self._chosen[index])]

    def runs(self, size: int) -> np.ndarray:
        """The chosen of each run of the records, as edges."""
        edges = np.searchsorted(self._chosen, edges_of(self._records, size))
        return np.unique(np.append(edges, [0, len(self)])).astype(np.int64)

    def read_run(self, first: int, stop: int) -> list[Record | UnreadableRecord]:
        """Reads what is between them, too: it lies on the way."""
        places = self._chosen[first:stop].astype(np.int64)
        found = read_run(self._records, int(places[0]), int(places[-1]) + 1)
        return [found[place - places[0]] for place in places]

    def _bits(self) -> np.ndarray:
        bits = np.zeros(len(self._records), bool)
        bits[self._chosen] = True
        return bits


@dataclasses.dataclass(frozen=True)
class Filtered(Chosen):
    """The records that are in a list, not in another, and meet conditions."""

    keep: str | None = None
    """File with the keys of the records to keep: one a line (.txt), or a table (.parquet, .csv, .tsv,
    .jsonl) with a column `key`."""
    drop: str | None = None
    """File with the keys of records to leave out, alike."""
    where: tuple[str, ...] = ()
    """Conditions that must all be met: "json:similarity >= 0.28", "width >= 200", "language in en,fr". A name
    is a column of `table`, or an entry of the record, as of an `Array`; without it a record does not pass.
    `image.width` and `image.height` are the picture's own, from its header."""
    table: str | None = None
    """Side table of scores (.parquet, .csv, .tsv, .jsonl) with a column `key`; a record that is not in it has
    none of its columns."""

    def __post_init__(self):
        if not (self.keep or self.drop or self.where):
            raise ClipjaxError("Filtered: give keep, drop or where")
        for condition in self.where:
            Condition.parse(condition)

    @property
    def reads(self):
        return bool(self.where)

    @property
    def looks(self):
        return any(Condition.parse(text).name in OF_PICTURES for text in self.where)

    def files(self):
        return tuple(file for file in (self.keep, self.drop, self.table) if file)

    def prepared(self):
        keep = read_keys(self.keep) if self.keep else None
        drop = read_keys(self.drop) if self.drop else frozenset()
        conditions = [Condition.parse(text) for text in self.where]
        columns, rows = self._columns(conditions)

        def passes(key: str, record: Callable[[], Record]) -> bool:
            if key in drop or (keep is not None and key not in keep):
                return False
            own = rows.get(key, ())
            for condition in conditions:
                if condition.name not in columns:
                    value = value_of(record(), condition.name)
                elif own:
                    value = own[columns[condition.name]]
                else:
                    return False
                if not condition.met_by(value):
                    return False
            return True

        return passes

    def why(self, records):
        conditions = [Condition.parse(text) for text in self.where]
        columns = self._columns(conditions)[0]
        read = getattr(records, "facts", records.__getitem__)
        first: list[Record] = []
        for index in range(min(len(records), 8)):
            try:
                first.append(read(index))
            except UnreadableRecord:
                continue
        for name in (condition.name for condition in conditions):
            if name in columns or name in OF_PICTURES or not first:
                continue
            if all(entry(record, name, None) is None for record in first):
                known = sorted({str(key) for record in first for key in record} | {*OF_PICTURES})
                return f": none of the first has an entry {name!r}{did_you_mean(name, known)}"
        return ""

    def _columns(
        self, conditions: list[Condition]
    ) -> tuple[dict[str, int], dict[str, tuple[Any, ...]]]:
        """(Place of each column that a condition names, their values by key)."""
        if self.table is None:
            return {}, {}
        wanted = list(dict.fromkeys(condition.name for condition in conditions))
        rows: dict[str, tuple[Any, ...]] = {}
        there: set[str] = set()  # not every line of a .jsonl has every column
        for row in _table_rows(self.table):
            there.update(name for name in wanted if name in row)
            rows[str(row["key"])] = tuple(row.get(name) for name in wanted)
        found = {name: i for i, name in enumerate(wanted) if name in there}
        if not found:
            raise ClipjaxError(
                f"Filtered: {self.table!r} has none of the columns that the conditions name "
                f"({', '.join(wanted) or 'there is no condition'})"
            )
        return found, rows


@dataclasses.dataclass(frozen=True)
class Condition:
    """A comparison of something of a record with what is written.

    Attributes:
      name: of an entry, or a column.
      operator: one of `OPERATORS`, or "in".
      values: what is compared with; several with "in" alone.
    """

    name: str
    operator: str
    values: tuple[float | str, ...]

    @classmethod
    def parse(cls, text: str) -> Condition:
        """`"json:similarity >= 0.28"`.

        Raises:
          ClipjaxError: it is no such comparison.
        """
        match = re.fullmatch(r"\s*(\S+?)\s*(>=|<=|!=|==|>|<|\sin\s)\s*(.+?)\s*", text)
        if match is None:
            raise ClipjaxError(
                f'{text!r} is no condition: write NAME, one of {", ".join(OPERATORS)} or "in", and a value'
            )
        name, operator, right = match[1], match[2].strip(), match[3]
        parts = right.split(",") if operator == "in" else [right]
        return cls(name, operator, tuple(_number(part.strip()) for part in parts))

    def met_by(self, value: Any) -> bool:
        """Whether a value meets it; of several, whether one does. None never does."""
        if isinstance(value, (list, tuple, np.ndarray)):
            return any(self.met_by(one) for one in value)
        if value is None:
            return False
        return any(self._compared(value, right) for right in self.values)

    def _compared(self, value: Any, right: float | str) -> bool:
        compare = OPERATORS["==" if self.operator == "in" else self.operator]
        if isinstance(right, float):
            left = _number(value)
            if isinstance(left, str):
                return self.operator == "!="
            return left == left and compare(left, right)  # NaN meets nothing
        text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        return compare(text.strip(), right)


def value_of(record: Any, name: str) -> Any:
    """An entry of a record, or of its picture; None where it is not there."""
    if name in OF_PICTURES:
        width, height = picture_size(record["image"], record["key"])
        return width if name == "image.width" else height
    return entry(record, name, None)


def picture_size(image: Any, name: str) -> tuple[int, int]:
    """(Width, height) of a picture as stored, from its header.

    Raises:
      UnreadableRecord: there is none, or it is no picture.
    """
    from PIL import Image

    from clipjax.data.images import FORMATS

    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    try:
        with Image.open(
            io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS
        ) as picture:
            return picture.size
    except Exception as error:  # Pillow's plugins raise almost anything
        raise UnreadableRecord(f"{name}: not an image in a known format") from error


def read_keys(file: str) -> frozenset[str]:
    """The keys in a file: one a line, or a table's column `key`.

    Raises:
      ClipjaxError: it cannot be read, or holds none.
    """
    if Path(file).suffix in (".parquet", ".csv", ".tsv", ".jsonl"):
        keys = frozenset(str(row["key"]) for row in _table_rows(file, ["key"]))
    else:
        keys = frozenset(read_lines(file, "the list of keys"))
    if not keys:
        raise ClipjaxError(f"{file!r} has no key in it")
    return keys


def _table_rows(file: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(file).expanduser()
    if not path.is_file():
        raise ClipjaxError(f"there is no file {file!r}")
    if path.suffix != ".parquet":
        for line, row in table_rows(path):
            if "key" not in row:
                raise ClipjaxError(
                    f"{file!r}, line {line}, has no column 'key'{did_you_mean('key', map(str, row))}"
                )
            yield row
        return
    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            if "key" not in names:
                raise ClipjaxError(f"{file!r} has no column 'key'{did_you_mean('key', names)}")
            # Vectors beside the scores are no scores.
            plain = [n for n in names if not pa.types.is_nested(parquet.schema_arrow.field(n).type)]
            for batch in parquet.iter_batches(8192, columns=columns or plain):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ClipjaxError(f"{file!r} cannot be read ({error})") from error


def _number(value: Any) -> float | str:
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)
