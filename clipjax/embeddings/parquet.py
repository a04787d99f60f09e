"""Embeddings of a source in Parquet files: written shard by shard, and taken up again after a kill.

A row is a picture: `key`, `id`, `label` (where the source has them), `embedding` and, if asked for,
`caption` and `caption_embedding`. Of texts a row is `key` (the line), `text`, `embedding`.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipjax.data.sources import RandomAccess
from clipjax.embeddings.folder import Progress
from clipjax.embeddings.pictures import embed_pictures, require_finite
from clipjax.errors import ClipjaxError
from clipjax.predictor import Predictor

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = b"clipjax"


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts to embed, in order, with a key for each."""

    keys: tuple[str, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Which files hold which records: shard i has `size` of them from `i * size` on.

    The files are `out` itself where one is enough, else `out` with `-00000-of-00005` in its name.
    """

    out: Path
    total: int
    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ClipjaxError(f"shard_size={self.size} must be at least 1")
        if self.out.suffix != ".parquet":
            raise ClipjaxError(f"{str(self.out)!r} must end in .parquet")

    def __len__(self) -> int:
        return max(1, -(-self.total // self.size))

    def path(self, index: int) -> Path:
        """The file of shard `index`."""
        if len(self) == 1:
            return self.out
        return self.out.with_name(f"{self.out.stem}-{index:05}-of-{len(self):05}.parquet")

    def records(self, index: int) -> range:
        """The records of shard `index`."""
        return range(index * self.size, min((index + 1) * self.size, self.total))


def write_shards(
    predictor: Predictor,
    source: RandomAccess | Texts,
    shards: Shards,
    facts: dict[str, Any],
    progress: Progress,
    captions: bool = False,
) -> int:
    """Writes the shards that are not there yet.

    A shard gets its name once it is complete, so what has the name is finished.

    Args:
      predictor: the model.
      source: an opened source, or texts.
      shards: the files.
      facts: JSON-able; says what is embedded by what. A finished shard with other facts is refused.
      progress: told of every row, also of those of shards that are there already.
      captions: embed the first caption of each record too.

    Returns:
      How many shards were there already.

    Raises:
      ClipjaxError: a file of that name holds something else, or cannot be written.
    """
    facts = facts | {"captions": captions, "total": shards.total, "shard_size": shards.size}
    finished = [i for i in range(len(shards)) if _is_finished(shards.path(i), facts, i)]
    _refuse_others(shards)
    for index in range(len(shards)):
        if index in finished:
            progress.find(len(shards.records(index)))
            continue
        rows = shards.records(index)
        if isinstance(source, Texts):
            tables = _texts(predictor, source, rows, progress)
        else:
            tables = _pictures(predictor, source, rows, progress, captions)
        _write(shards.path(index), facts | {"shard": index}, tables)
    return len(finished)


def _texts(
    predictor: Predictor, source: Texts, rows: range, progress: Progress
) -> Iterator[pa.Table]:
    import pyarrow as pa

    for start in range(rows.start, max(rows.stop, rows.start + 1), predictor.batch_size):
        stop = min(start + predictor.batch_size, rows.stop)
        some = source.texts[start:stop]
        embedded = require_finite(predictor.encode_text(some))
        yield pa.table(
            {
                "key": pa.array(source.keys[start:stop], pa.string()),
                "text": pa.array(some, pa.string()),
                "embedding": _vectors(embedded),
            }
        )
        progress.advance(len(some))


def _pictures(
    predictor: Predictor,
    records: RandomAccess,
    rows: range,
    progress: Progress,
    captions: bool,
) -> Iterator[pa.Table]:
    empty = np.zeros((0, predictor.image_size, predictor.image_size, 3), np.uint8)
    # First a table without rows: a shard of which nothing can be read has columns, too.
    yield _table(predictor, [], predictor.encode_image(empty), captions)
    for _, some, embedded in embed_pictures(predictor, records, rows, progress.skip):
        yield _table(predictor, some, embedded, captions)
        progress.advance(len(some))


def _table(predictor: Predictor, records: list, embedded: np.ndarray, captions: bool) -> pa.Table:
    import pyarrow as pa

    columns = {
        "key": pa.array([r["key"] for r in records], pa.string()),
        "id": pa.array([r["id"] for r in records], pa.int64()),
        "label": pa.array([r.get("label") for r in records], pa.int32()),
        "embedding": _vectors(embedded),
    }
    if captions:
        first = [next((c.strip() for c in r["captions"] if c.strip()), None) for r in records]
        columns["caption"] = pa.array(first, pa.string())
        missing = np.array([caption is None for caption in first], bool)
        embedded_captions = require_finite(
            predictor.encode_text([caption or "" for caption in first])
        )
        columns["caption_embedding"] = _vectors(embedded_captions, missing)
    return pa.table(columns)


def _vectors(rows: np.ndarray, missing: np.ndarray | None = None) -> pa.Array:
    import pyarrow as pa

    mask = None if missing is None else pa.array(missing)
    flat = pa.array(np.ascontiguousarray(rows, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1], mask=mask)


def _write(path: Path, facts: dict[str, Any], tables: Iterator[pa.Table]) -> None:
    import pyarrow.parquet as pq

    scratch = path.with_name(path.name + ".tmp")
    writer = None
    try:
        for table in _coalesced(tables):
            if writer is None:
                schema = table.schema.with_metadata({METADATA: json.dumps(facts).encode()})
                writer = pq.ParquetWriter(scratch, schema, compression="zstd")
            writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
        if writer is not None:
            writer.close()
            os.replace(scratch, path)
    except BaseException as error:
        if writer is not None:
            writer.close()
        scratch.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ClipjaxError(f"{path}: {error.strerror or error}") from error
        raise


def _coalesced(tables: Iterator[pa.Table], rows: int = 8192) -> Iterator[pa.Table]:
    """Row groups of a useful size, out of batches."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= rows:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _is_finished(path: Path, facts: dict[str, Any], shard: int) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not os.path.lexists(path):
        return False
    try:
        found = json.loads((pq.read_schema(path).metadata or {}).get(METADATA, b"null"))
    except (OSError, ValueError, pa.ArrowException):
        found = None
    if not isinstance(found, dict):
        raise ClipjaxError(
            f"{path} is there and was not written by clipjax embed: name another --out"
        )
    for name, value in (facts | {"shard": shard}).items():
        if found.get(name) != value:
            raise ClipjaxError(
                f"{path} is there with {name} {found.get(name)!r}, and now it is {value!r}: name "
                "another --out, or delete it"
            )
    return True


def _refuse_others(shards: Shards) -> None:
    """Files of the same name but another number of shards: together they would be read twice."""
    mine = {shards.path(i) for i in range(len(shards))}
    pattern = f"{glob.escape(shards.out.stem)}-[0-9][0-9][0-9][0-9][0-9]-of-*.parquet"
    others = [p for p in shards.out.parent.glob(pattern) if p not in mine]
    others += [shards.out] if shards.out not in mine and shards.out.exists() else []
    if others:
        raise ClipjaxError(
            f"{others[0]} is there, of another division into shards: name another --out, or delete it"
        )
