"""Vectors from a file, joined to the records by key: a teacher's embeddings in every batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clipjax.data.fields import Example, Field, Spec, Text
from clipjax.data.sources import RandomAccess, UnreadableRecord
from clipjax.data.webdataset import expand
from clipjax.errors import ClipjaxError, did_you_mean

if TYPE_CHECKING:
    from clipjax.data.loader import Data
    from clipjax.data.tokenizers import TokenizerModel

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Embeddings(Field):
    """Vectors that `clipjax embed` wrote, float32 [E] (with a text's `count`: [count, E]).

    Each process holds one copy of the column in memory, 4 E + 16 bytes a row, shared by all fields
    and threads.
    """

    name: str
    path: str
    """The Parquet file, or a pattern of several; "x.parquet" also means "x-00000-of-00005.parquet"
    and so on."""
    column: str = "embedding"
    """Column with the vectors; `clipjax embed --captions` writes "caption_embedding" too."""
    by: Literal["key", "text"] = "key"
    """What finds a record's vector: its key, or the very text that the batch shows of it."""
    text: str = "text"
    """With by="text": the field whose text it is."""
    key_column: str | None = None
    """Column to find it in; None: "key", and for texts "text" or "caption"."""

    def __post_init__(self):
        if self.by not in ("key", "text"):
            raise ClipjaxError(f"Embeddings({self.name!r}): by={self.by!r} is no way to find them")

    @property
    def follows(self):
        return (self.text,) if self.by == "text" else ()

    def spec(self, data):
        count = self._text(data).count if self.by == "text" else None
        width = _width(_files(self), self)
        return {self.name: Spec((width,) if count is None else (count, width), "float32")}

    def open(self, data: Data, tokenizer: TokenizerModel, records: RandomAccess) -> Any:
        files = _files(self)
        table = _table(files, _marks(files), self._key_column(files), self.column)
        count = self._text(data).count if self.by == "text" else None
        opened = _OpenEmbeddings(self, table, count)
        keys = getattr(records, "keys", None)
        if self.by == "key" and callable(keys):
            opened.check(keys(), data.max_error_rate)
        elif self.by == "key":
            opened.check_first(records)
        return opened

    def _text(self, data: Data) -> Text:
        field = next((f for f in data.fields if f.name == self.text), None)
        if not isinstance(field, Text):
            raise ClipjaxError(
                f"Embeddings({self.name!r}): text={self.text!r} is no Text in Data.fields"
                + did_you_mean(self.text, [f.name for f in data.fields if isinstance(f, Text)])
            )
        return field

    def _key_column(self, files: tuple[str, ...]) -> str:
        if self.key_column is not None:
            return self.key_column
        if self.by == "key":
            return "key"
        return "text" if "text" in _schema(files[0], self).names else "caption"


class _OpenEmbeddings:
    def __init__(self, field: Embeddings, table: _Table, count: int | None):
        self._field, self._table, self._count = field, table, count

    def read(self, example: Example) -> np.ndarray:
        if self._field.by == "key":
            return self._vector(example.key, example.key)
        shown = example.made[self._field.text]
        vectors = [self._vector(caption.text, example.key) for caption in shown]
        if self._count is None:
            return vectors[0]
        nothing = np.zeros(self._table.vectors.shape[1], np.float32)
        # As the texts themselves: the first ones again where there are too few.
        return np.stack([(vectors or [nothing])[i % (len(shown) or 1)] for i in range(self._count)])

    def write(self, values: Sequence[np.ndarray], rows: dict[str, np.ndarray]) -> None:
        rows[self._field.name][:] = values

    def check(self, keys: Iterable[str], allowed: float = 0.0) -> None:
        """Refuses a file that lacks more than a share `allowed` of the source's records."""
        keys = list(keys)
        missing = [key for key in keys if self._table.row(key) is None]
        if not missing:
            return
        message = (
            f"{self._field.path} has no vector for {len(missing):,} of the {len(keys):,} records of "
            f"the source, such as {missing[0]!r}; its first key is {self._table.first!r}"
        )
        if len(missing) > allowed * len(keys):
            raise ClipjaxError(message)
        logger.warning("%s", message)  # such as the pictures that clipjax embed could not read

    def check_first(self, records: RandomAccess, count: int = 8) -> None:
        """Refuses a file that has none of the source's first records."""
        found = []
        for index in range(min(count, len(records))):
            try:
                found.append(records[index]["key"])
            except UnreadableRecord:
                continue  # the loader counts and names it
        if found and all(self._table.row(key) is None for key in found):
            self.check(found)

    def _vector(self, key: str, name: str) -> np.ndarray:
        row = self._table.row(key)
        if row is None:
            what = "" if key == name else f" for its text {key!r}"
            raise UnreadableRecord(f"{name}: {self._field.path} has no vector{what}")
        return self._table.vectors[row]


class _Table:
    """Vectors by key. Keys are kept as digests of 64 bits: 16 bytes a row, whatever their length."""

    def __init__(self, vectors: np.ndarray, digests: np.ndarray, first: str):
        """Args: vectors float32 [n, E]; digests uint64 [n], of their keys; the first key."""
        self.vectors, self.first = vectors, first
        self._rows = np.argsort(digests, kind="stable")
        self._digests = digests[self._rows]

    def row(self, key: str) -> int | None:
        """The row of a key."""
        digest = _digest(key)
        place = int(np.searchsorted(self._digests, digest))
        found = place < len(self._digests) and self._digests[place] == digest
        return int(self._rows[place]) if found else None

    def repeated(self) -> int | None:
        """A row whose key an earlier row has."""
        again = np.flatnonzero(self._digests[1:] == self._digests[:-1])
        return int(self._rows[again[0] + 1]) if len(again) else None


@functools.lru_cache(maxsize=8)
def _table(files: tuple[str, ...], marks: tuple[int, ...], key_column: str, column: str) -> _Table:
    """The table in some files, one for all who ask; `marks` change when the files do."""
    import pyarrow.parquet as pq

    digests: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    firsts: list[str] = []
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for name in (key_column, column):
                if name not in parquet.schema_arrow.names:
                    known = parquet.schema_arrow.names
                    raise ClipjaxError(f"{file} has no column {name!r}{did_you_mean(name, known)}")
            for group in parquet.iter_batches(8192, columns=[key_column, column]):
                present = group.filter(group[column].is_valid())
                keys = [str(key) for key in present[key_column].to_pylist()]
                if not keys:
                    continue
                flat = present[column].flatten().to_numpy(zero_copy_only=False)
                rows = np.asarray(flat, np.float32).reshape(len(keys), -1)
                if not np.isfinite(rows).all():
                    bad = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
                    raise ClipjaxError(f"{file}: the vector of {keys[bad]!r} is not finite")
                firsts = firsts or keys[:1]
                vectors.append(rows)
                digests.append(np.array([_digest(key) for key in keys], np.uint64))
    if not firsts:
        raise ClipjaxError(f"{files[0]} has no vectors in its column {column!r}")
    table = _Table(np.concatenate(vectors), np.concatenate(digests), firsts[0])
    repeated = table.repeated()
    # A text may be there many times: it has one vector. A key names one record.
    if repeated is not None and key_column == "key":
        raise ClipjaxError(
            f"{_key_at(files, key_column, column, repeated)!r} is there more than once in {files[0]}"
            + (" and the others" if len(files) > 1 else "")
            + ": which vector is meant?"
        )
    return table


def read_vectors(path: str, column: str = "embedding") -> tuple[list[str], np.ndarray]:
    """(Keys, vectors float32 [n, E]) of the files that `clipjax embed` wrote, in their order.

    Args:
      path: as of `Embeddings`.
      column: with the vectors; rows without one are left out.

    Raises:
      ClipjaxError: there is no such file or column.
    """
    import pyarrow.parquet as pq

    field = Embeddings("", path, column)  # no field of a run's: messages name the file alone
    files = _files(field)
    width = _width(files, field)
    keys: list[str] = []
    vectors = []
    for file in files:
        names = _schema(file, field).names
        named = next((name for name in ("key", "text") if name in names), None)
        if named is None:
            raise ClipjaxError(f"{file} has no column 'key'{did_you_mean('key', names)}")
        with pq.ParquetFile(file) as parquet:
            for group in parquet.iter_batches(8192, columns=[named, column]):
                present = group.filter(group[column].is_valid())
                keys += map(str, present[named].to_pylist())
                flat = present[column].flatten().to_numpy(zero_copy_only=False)
                vectors.append(np.asarray(flat, np.float32).reshape(-1, width))
    return keys, np.concatenate(vectors) if vectors else np.zeros((0, width), np.float32)


def _key_at(files: tuple[str, ...], key_column: str, column: str, row: int) -> str:
    import pyarrow.parquet as pq

    for file in files:
        table = pq.read_table(file, columns=[key_column, column])
        table = table.filter(table[column].is_valid())
        if row < len(table):
            return str(table[key_column][row])
        row -= len(table)
    raise IndexError(row)


def _files(field: Embeddings) -> tuple[str, ...]:
    path = Path(field.path).expanduser()
    found = [file for file in expand(str(path)) if os.path.isfile(file)]
    if not found:
        shards = sorted(path.parent.glob(f"{path.stem}-?????-of-?????.parquet"))
        found = [str(file) for file in shards]
        counts = {int(file.stem[-5:]) for file in shards}
        if shards and counts != {len(shards)}:
            raise ClipjaxError(
                f"{_whose(field)}{len(shards)} of {max(counts)} files of "
                f"{field.path!r} are there; let clipjax embed finish"
            )
    if not found:
        raise ClipjaxError(f"{_whose(field)}there is no file {field.path!r}")
    return tuple(found)


def _whose(field: Embeddings) -> str:
    return f"Embeddings({field.name!r}): " if field.name else ""


def _marks(files: tuple[str, ...]) -> tuple[int, ...]:
    stats = [os.stat(file) for file in files]
    return tuple(itertools.chain.from_iterable((s.st_mtime_ns, s.st_size) for s in stats))


def _schema(file: str, field: Embeddings) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise ClipjaxError(f"{_whose(field)}{file} is no Parquet file ({error})") from error


def _width(files: tuple[str, ...], field: Embeddings) -> int:
    schema = _schema(files[0], field)
    if field.column not in schema.names:
        raise ClipjaxError(
            f"{_whose(field)}{files[0]} has no column {field.column!r}"
            + did_you_mean(field.column, schema.names)
        )
    kind = schema.field(field.column).type
    width = getattr(kind, "list_size", None)
    if width is None:
        raise ClipjaxError(
            f"{_whose(field)}the column {field.column!r} of {files[0]} is {kind}, not "
            "lists of one length"
        )
    return width


def _digest(key: str) -> np.uint64:
    data = key.encode(errors="surrogateescape")
    return np.uint64(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
