"""Pictures in columns: Parquet files, and Hugging Face data sets saved to disk (Arrow)."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipjax.data.captions import as_texts
from clipjax.data.folder import stays_inside
from clipjax.data.reading import as_os_errors, is_address, retried, store
from clipjax.data.shards import Opened
from clipjax.data.sources import Place, RandomAccess, Record, Shard, Source, UnreadableRecord
from clipjax.data.webdataset import expand
from clipjax.errors import ClipjaxError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "texts", "sentences", "title")
FEW = 256
"""Files that a stream opens all before it begins, at most: then epochs are known, and rows dealt more finely."""
KEPT_GROUPS = 4
"""Row groups that are kept in memory for records read one by one."""


@dataclasses.dataclass(frozen=True)
class Columns(Source):
    """What Parquet files and saved data sets have in common: which column is what.

    All other columns are entries of the record, under their own names.
    """

    image_column: str | None = None
    """Column with the pictures: their bytes, paths relative to `root`, or Hugging Face's bytes and path;
    default: the first of image, jpg, jpeg, png, webp, image_bytes, bytes, img."""
    caption_columns: tuple[str, ...] | None = None
    """Columns with captions, or lists of them; default: the first of caption, captions, text, txt, texts,
    sentences, title. () is none."""
    languages: tuple[str, ...] = ()
    """Language code of each caption column, where known."""
    label_column: str | None = None
    """Column with the class, a number; default: label, if it holds whole numbers."""
    id_column: str | None = None
    """Column with the picture's identity, a number; default: the row."""
    key_column: str | None = None
    """Column with the record's name; default: key if there, else the file and the row."""
    root: str | None = None
    """Folder that paths are relative to; default: the files'."""

    def __post_init__(self):
        if self.languages and len(self.languages) != len(self.caption_columns or ()):
            raise ClipjaxError(
                f"{type(self).__name__}: {len(self.languages)} languages for "
                f"{len(self.caption_columns or ())} caption_columns; name both"
            )


@dataclasses.dataclass(frozen=True)
class Parquet(Columns):
    """Parquet files, such as img2dataset's and Hugging Face's.

    A file is read by row groups: a run that draws single records from all over reads one for each of
    them, so train with `Data.stream`, whose runs are the row groups whatever its `run` says. It deals more than
    256 files as such, and opens each when its turn comes.
    """

    files: str = ""
    """A file, or a pattern of several: "data/*.parquet"."""

    def open(self) -> RandomAccess:
        groups: list[_Group] = []
        schema: Any = None
        files = self._found()
        if not files:
            raise ClipjaxError(f"Parquet: there is no file {self.files!r}")
        for file in files:
            own, found = _row_groups(file)
            schema = schema or own
            missing = set(schema.names) - set(own.names)
            if missing:
                raise ClipjaxError(f"Parquet: {file} lacks the columns {sorted(missing)}")
            groups += found
        root = self.root or os.path.dirname(files[0])
        return _OpenColumns(self, schema, groups, root, keep=KEPT_GROUPS)

    def listed(self, least: int) -> list[str] | None:
        files = self._found()
        return files if len(files) > max(least - 1, FEW) else None

    def open_shard(self, file: Place) -> Shard:
        schema, groups = _row_groups(file.path)
        root = self.root or os.path.dirname(file.path)
        return Opened(_OpenColumns(self, schema, groups, root, KEPT_GROUPS, file.number), file)

    def _found(self) -> list[str]:
        return [file for file in expand(self.files) if is_address(file) or os.path.isfile(file)]


@dataclasses.dataclass(frozen=True)
class SavedDataset(Columns):
    """A Hugging Face data set that `save_to_disk` wrote; its library is not needed."""

    folder: str = ""
    """The folder."""
    split: str | None = None
    """Which split, where the folder holds several."""

    def open(self) -> RandomAccess:
        import pyarrow as pa

        folder = Path(self.folder).expanduser()
        several = _json(folder / "dataset_dict.json")
        if several is not None:
            splits = several.get("splits", [])
            if self.split not in splits:
                raise ClipjaxError(
                    f"SavedDataset: {self.folder!r} has no split {self.split!r}"
                    + did_you_mean(str(self.split), splits)
                )
            folder = folder / str(self.split)
        elif self.split is not None:
            raise ClipjaxError(
                f"SavedDataset: {self.folder!r} is a single split; leave split empty"
            )
        state = _json(folder / "state.json")
        if state is None:
            raise ClipjaxError(f"SavedDataset: {str(folder)!r} holds no data set of save_to_disk")
        if state.get("_indices_data_files"):
            raise ClipjaxError(
                f"SavedDataset: {str(folder)!r} is a selection of rows that was saved as such: write it "
                "with flatten_indices() first"
            )
        groups: list[_Group] = []
        schema: Any = None
        for entry in state["_data_files"]:
            file = str(folder / entry["filename"])
            try:
                # Mapped into memory: rows that nobody asks for are never read.
                table = pa.ipc.open_stream(pa.memory_map(file)).read_all()
            except (OSError, ValueError, pa.ArrowException) as error:
                raise ClipjaxError(f"{file} is no Arrow file ({error})") from error
            schema = schema or table.schema
            groups.append(_Group(file, len(table), 0, _given(table)))
        if schema is None:
            raise ClipjaxError(f"SavedDataset: {str(folder)!r} is empty")
        return _OpenColumns(self, schema, groups, self.root or str(folder), keep=len(groups))


@dataclasses.dataclass(frozen=True)
class _Group:
    """Rows of one file: how many, from which row on, and what reads some columns of them."""

    file: str
    count: int
    first: int
    read: Any


class _OpenColumns:
    def __init__(
        self,
        config: Columns,
        schema: pa.Schema,
        groups: list[_Group],
        root: str,
        keep: int,
        number: Callable[[int], int] = int,
    ):
        self._number = number
        self._config, self._groups, self._root = config, groups, os.path.realpath(root)
        self._ends = np.cumsum([group.count for group in groups], dtype=np.int64)
        names = schema.names
        self._image = _column(config, names, "image_column", config.image_column, IMAGE_COLUMNS)
        if config.caption_columns is None:
            found = [name for name in CAPTION_COLUMNS if name in names]
            self._captions = tuple(found[:1])
        else:
            for name in config.caption_columns:
                _column(config, names, "caption_columns", name, ())
            self._captions = config.caption_columns
        label = config.label_column or ("label" if _whole_numbers(schema, "label") else None)
        self._label = label and _column(config, names, "label_column", label, ())
        if self._label and not _whole_numbers(schema, self._label):
            raise ClipjaxError(
                f"{type(config).__name__}: label_column={self._label!r} holds "
                f"{schema.field(self._label).type}: a class is a whole number here"
            )
        self._id = config.id_column and _column(config, names, "id_column", config.id_column, ())
        key = config.key_column or ("key" if "key" in names else None)
        self._key = key and _column(config, names, "key_column", key, ())
        self._names = names
        self.class_names = _class_names(schema, self._label)
        self._kept: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._keep, self._lock = keep, threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        return self._at(index, self._names)

    def facts(self, index: int) -> Record:
        """The record without its picture, of which nothing is read."""
        return self._at(index, [name for name in self._names if name != self._image])

    def file_of(self, index: int) -> str:
        """The Parquet or Arrow file that holds the row."""
        return self._groups[int(np.searchsorted(self._ends, index, side="right"))].file

    def runs(self, size: int) -> np.ndarray:
        """Edges of the row groups; of an Arrow file, of runs of at most `size` rows."""
        edges = [0, *self._ends.tolist()]
        if isinstance(self._config, Parquet):
            return np.array(sorted(set(edges)), np.int64)
        from clipjax.data.pieces import edges_within

        return edges_within(edges[:-1], edges[-1], size)

    def read_run(self, first: int, stop: int) -> list[Record | UnreadableRecord]:
        """The records of one row group."""
        number = int(np.searchsorted(self._ends, first, side="right"))
        group = self._groups[number]
        start = int(self._ends[number]) - group.count
        try:
            table = group.read(self._names)
        except UnreadableRecord as failure:
            return [failure] * (stop - first)
        found: list[Record | UnreadableRecord] = []
        for index in range(first, stop):
            try:
                found.append(self._record(table, index - start, index, group))
            except UnreadableRecord as failure:
                found.append(failure)
        return found

    def _at(self, index: int, names: list[str]) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        group = self._groups[number]
        row = index - (int(self._ends[number]) - group.count)
        return self._record(self._table(number, names), row, index, group)

    def _table(self, number: int, names: list[str]) -> pa.Table:
        mark = (number, len(names))
        with self._lock:
            if mark in self._kept:
                self._kept.move_to_end(mark)
                return self._kept[mark]
        table = self._groups[number].read(names)
        with self._lock:
            self._kept[mark] = table
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return table

    def _record(self, table: pa.Table, row: int, index: int, group: _Group) -> Record:
        key = f"{os.path.basename(group.file)}:{group.first + row}"
        try:
            values = {name: _value(table.column(name)[row]) for name in table.column_names}
        except (ValueError, IndexError) as error:  # Arrow's own errors of contents are ValueErrors
            raise UnreadableRecord(f"{key}: the row cannot be read ({error})") from error
        if self._key and values.get(self._key) is not None:
            key = str(values[self._key])
        captions: list[str] = []
        languages: list[str] = []
        for i, name in enumerate(self._captions):
            value = values.pop(name)
            value = value.tolist() if isinstance(value, np.ndarray) else value
            texts = as_texts(value, f"{key}: the column {name!r}")
            captions += texts
            languages += [self._config.languages[i]] * len(texts) if self._config.languages else []
        number = self._number(index)
        identity = values.get(self._id) if self._id else number
        image = b""
        if self._image in values:
            image = self._picture(values.pop(self._image), key)
        record = Record(
            image=image,
            captions=tuple(captions),
            languages=tuple(languages),
            id=identity if isinstance(identity, int) else number,
            key=key,
        )
        if self._label:
            label = values.get(self._label)
            record["label"] = label if isinstance(label, int) and label >= 0 else -1
        return values | record  # type: ignore[return-value]

    def _picture(self, value: Any, key: str) -> Any:
        if isinstance(value, dict):  # as Hugging Face's Image feature
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise UnreadableRecord(f"{key}: the column {self._image!r} holds no picture")
        if not stays_inside(self._root, value):
            raise UnreadableRecord(
                f"{key}: {value!r} leads out of the folder {self._root!r}; set root to one that holds "
                "all pictures"
            )
        return os.path.join(self._root, value)


def _row_groups(file: str) -> tuple[Any, list[_Group]]:
    """(the columns, the row groups) of a Parquet file, from its last bytes.

    Raises:
      ClipjaxError: it is none, or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read() -> Any:
        try:
            with _opened(file) as opened, pq.ParquetFile(opened) as parquet:
                return parquet.schema_arrow, parquet.metadata
        except (OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, OSError) and (error.errno is not None or is_address(file)):
                raise
            raise ClipjaxError(f"{file} is no Parquet file ({error})") from error

    schema, metadata = retried(read, file)
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    firsts = [0, *itertools.accumulate(counts)]
    return schema, [
        _Group(file, n, firsts[i], functools.partial(_row_group, file, i))
        for i, n in enumerate(counts)
    ]


def _row_group(file: str, number: int, names: list[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read() -> pa.Table:
        try:
            with _opened(file) as opened, pq.ParquetFile(opened) as parquet:
                return parquet.read_row_group(number, columns=names)
        except (OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, OSError) and (error.errno is not None or is_address(file)):
                raise  # of the system or a store, and not what Arrow says of damaged contents
            raise UnreadableRecord(f"{file}: row group {number} is damaged ({error})") from error

    return retried(read, f"{file}: row group {number}")


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Any]:
    """What Arrow reads: the path of a file on disk, or a file at an address, opened."""
    if not is_address(file):
        yield file
        return
    fs, inner = store(file)
    with as_os_errors(file), fs.open(inner, "rb") as opened:
        yield opened


def _given(table: pa.Table) -> Any:
    return lambda names: table.select(names)


def _column(
    config: Columns, names: list[str], field: str, asked: str | None, defaults: tuple[str, ...]
) -> str:
    if asked is not None:
        if asked not in names:
            raise ClipjaxError(
                f"{type(config).__name__}: {field}={asked!r} is no column{did_you_mean(asked, names)}"
            )
        return asked
    for name in defaults:
        if name in names:
            return name
    raise ClipjaxError(
        f"{type(config).__name__}: none of the columns is called {', '.join(defaults)}: set {field} to "
        f"one of {', '.join(names)}"
    )


def _value(scalar: Any) -> Any:
    """A cell as Python has it; a list of numbers as an array."""
    import pyarrow as pa

    kind = scalar.type
    if scalar.is_valid and (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
        inner = kind.value_type
        if pa.types.is_integer(inner) or pa.types.is_floating(inner):
            return scalar.values.to_numpy(zero_copy_only=False)
    return scalar.as_py()


def _whole_numbers(schema: Any, name: str) -> bool:
    import pyarrow as pa

    if name not in schema.names:
        return False
    kind = schema.field(name).type
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """The names behind a label, where Hugging Face's description of the columns has them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, ValueError, TypeError):
        return None


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise ClipjaxError(f"{file} is not JSON ({error})") from error
