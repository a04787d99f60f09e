"""Embeddings to search in, kept and refreshed when the pictures change: of a folder, of any collection."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from clipjax.data.folder import find_pictures
from clipjax.data.reading import is_address
from clipjax.data.sources import RandomAccess, Record, UnreadableRecord
from clipjax.embeddings.pictures import embed_pictures
from clipjax.errors import ClipjaxError
from clipjax.predictor import Predictor

logger = logging.getLogger(__name__)

FOLDER = ".clipjax"
SAVE_EVERY = 30.0
"""Least seconds between two saves while a folder is embedded: what a kill can cost."""


class Progress(Protocol):
    """What is told of work on a collection."""

    def advance(self, rows: int) -> None:
        """So many more are done."""

    def find(self, rows: int) -> None:
        """So many are there already."""

    def skip(self, failure: UnreadableRecord) -> None:
        """One cannot be read; the message names it."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A picture found.

    Attributes:
      name: its path relative to the folder; in a collection, the record's key.
      score: cosine similarity with the words.
      index: its number in the folder's or collection's list.
      file: path or address of the picture, or of the file (a tar, ...) that holds it; "" where unknown.
    """

    name: str
    score: float
    index: int
    file: str


@dataclasses.dataclass(frozen=True)
class _Known:
    """State of a file and its row in the table of embeddings."""

    size: int
    mtime_ns: int
    row: int


class Index:
    """Pictures embedded by one model, and a file that keeps the embeddings.

    The file is written whole or not at all, and one that is damaged is made anew. Where it cannot be
    written, or is a link to somewhere else, the index works without.
    """

    def __init__(
        self, what: str, names: list[str], states: list[tuple[int, int]], file: Path | None
    ):
        """Reads what is kept; embeds nothing.

        Args:
          what: what holds the pictures, for messages.
          names: one for each picture, all different.
          states: two int64 for each: when they change, it is embedded again.
          file: keeps the embeddings; None is nothing.
        """
        self._what, self._names, self._states, self._file = what, names, states, file
        self._known, self._table = self._load()
        self.stale: list[int] = []
        """Numbers of the pictures to embed."""
        self._rows: list[np.ndarray | None] = []
        for number, (name, state) in enumerate(zip(names, states, strict=True)):
            known = self._known.get(name)
            fresh = known is not None and (known.size, known.mtime_ns) == state
            self._rows.append(self._table[known.row] if known is not None and fresh else None)
            if not fresh:
                self.stale.append(number)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        """The picture of a number, or `UnreadableRecord` raised."""
        raise NotImplementedError

    def _hit(self, index: int, score: float) -> Hit:
        """A picture and its score, as `search` returns them."""
        raise NotImplementedError

    def refresh(self, predictor: Predictor, progress: Progress) -> None:
        """Embeds what is new or changed, drops what is gone, and keeps the result.

        Raises:
          ClipjaxError: not one picture of the folder can be read.
        """
        changed = bool(self.stale) or len(self._known) != len(self._names)
        saved, cost = time.monotonic(), 0.0
        try:
            for numbers, _, embeddings in embed_pictures(
                predictor, self, self.stale, progress.skip
            ):
                for number, row in zip(numbers, embeddings, strict=True):
                    self._rows[number] = row
                progress.advance(len(numbers))
                if time.monotonic() - saved > max(SAVE_EVERY, 10 * cost):
                    start = time.monotonic()
                    self._save()
                    saved = time.monotonic()
                    cost = saved - start
        finally:  # what is done is kept, whatever stops the rest
            if changed:
                self._save()
        if all(row is None for row in self._rows):
            raise ClipjaxError(f"not one of the {len(self)} pictures in {self._what!r} can be read")

    def search(self, query: np.ndarray, top: int) -> list[Hit]:
        """The pictures nearest to a query, the nearest first.

        Args:
          query: float32 [E], unit norm.
          top: most pictures to return.
        """
        numbers, table = self._embedded()
        scores = table @ query
        order = np.argsort(-scores, kind="stable")[:top]
        return [self._hit(numbers[i], float(scores[i])) for i in order]

    def _embedded(self) -> tuple[list[int], np.ndarray]:
        kept = [i for i, row in enumerate(self._rows) if row is not None]
        rows = [row for row in self._rows if row is not None]
        return kept, np.stack(rows) if rows else np.zeros((0, 0), "f4")

    def _load(self) -> tuple[dict[str, _Known], np.ndarray]:
        nothing: tuple[dict[str, _Known], np.ndarray] = {}, np.zeros((0, 0), np.float32)
        if self._file is None or not os.path.lexists(self._file):
            return nothing
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            if _is_elsewhere(self._file):
                raise ValueError("it is a link")
            kept = load(self._file.read_bytes())
            names = json.loads(kept["names"].tobytes())
            table, states = kept["embeddings"], kept["states"]
            if table.ndim != 2 or table.dtype != np.float32 or not np.isfinite(table).all():
                raise ValueError("the embeddings are no finite float32 [n, E]")
            if states.shape != (len(names), 2) or len(table) != len(names):
                raise ValueError("its parts do not fit each other")
            states = states.tolist()
            known = {
                str(name): _Known(size, mtime_ns, row)
                for row, (name, (size, mtime_ns)) in enumerate(zip(names, states, strict=True))
            }
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            logger.warning("%s cannot be used (%s): embedding the pictures anew", self._file, error)
            return nothing
        return known, table

    def _save(self) -> None:
        if self._file is None:
            return
        from safetensors.numpy import save

        numbers, table = self._embedded()
        names = [self._names[i] for i in numbers]
        content = save(
            {
                "embeddings": np.ascontiguousarray(table, np.float32),
                "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
                "states": np.array([self._states[i] for i in numbers], np.int64).reshape(-1, 2),
            }
        )
        try:
            folder = self._file.parent
            if folder.name == FOLDER:  # within the folder searched, which must be there
                folder.mkdir(exist_ok=True)
                if _is_elsewhere(folder):
                    raise OSError("it is a link")
                _replace(folder / ".gitignore", b"*\n", only_if_absent=True)
            else:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _replace(self._file, content)
        except OSError as error:
            logger.warning(
                "the embeddings are not kept: %s: %s", self._file.parent, error.strerror or error
            )
            self._file = None


class FolderIndex(Index):
    """The pictures of a folder. What is kept is in `FOLDER/.clipjax/<fingerprint>.safetensors`, one file a model.

    A picture is embedded again when its size or its time of modification changed. Where `.clipjax` is
    a link to somewhere else, nothing is kept.
    """

    def __init__(self, root: str | Path, fingerprint: str, keep: bool = True):
        """Lists the folder and reads what is kept; embeds nothing.

        Args:
          root: folder with pictures.
          fingerprint: of the model, `Pretrained.fingerprint()`.
          keep: whether to read and write the kept embeddings.

        Raises:
          ClipjaxError: there is no such folder, or no picture in it.
        """
        self._root = Path(root).expanduser()
        found, self.refused = find_pictures(root)
        if not found:
            left_out = f" ({len(self.refused)} left out)" if self.refused else ""
            raise ClipjaxError(f"the folder {str(root)!r} holds no picture{left_out}")
        names, states = [], []
        for name in found:
            try:
                stat = os.stat(self._root / name)
            except OSError:  # gone since the folder was listed
                continue
            names.append(name)
            states.append((stat.st_size, stat.st_mtime_ns))
        file = self._root / FOLDER / f"{fingerprint}.safetensors" if keep else None
        super().__init__(str(self._root), names, states, file)

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        return Record(image=self._root / name, captions=(), id=index, key=name)

    def _hit(self, index: int, score: float) -> Hit:
        name = self._names[index]
        return Hit(name, score, index, str(self._root / name))


class CollectionIndex(Index):
    """The pictures of any opened source: of tars, Parquet files, tables, at addresses.

    What is kept is in one file a source and a model, in a folder of the user's own, and made anew when a
    file of the source changes.
    """

    refused: tuple[str, ...] = ()

    def __init__(
        self, source: str, records: RandomAccess, mark: str, fingerprint: str, folder: Path | None
    ):
        """Reads what is kept; embeds nothing.

        Args:
          source: what the user calls it.
          records: the opened source.
          mark: changes when the source's files do.
          fingerprint: of the model, `Pretrained.fingerprint()`.
          folder: for the file that keeps the embeddings; None is nothing.
        """
        self._records = records
        place = source if is_address(source) else os.path.abspath(os.path.expanduser(source))
        digest = hashlib.blake2b(place.encode(errors="replace"), digest_size=8).hexdigest()
        state = np.frombuffer(hashlib.blake2b(mark.encode(), digest_size=16).digest(), "<i8")
        names = [str(number) for number in range(len(records))]
        states = [(int(state[0]), int(state[1]))] * len(names)
        file = folder / f"{fingerprint}-{digest}.safetensors" if folder else None
        super().__init__(source, names, states, file)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def _hit(self, index: int, score: float) -> Hit:
        record, file_of = self._records[index], getattr(self._records, "file_of", None)
        if isinstance(record["image"], (str, os.PathLike)):
            return Hit(record["key"], score, index, os.fspath(record["image"]))
        return Hit(record["key"], score, index, file_of(index) if file_of else "")


def _is_elsewhere(path: Path) -> bool:
    """A folder from a stranger may hold links, through which nothing is read or written."""
    return path.is_symlink() or (path.parent.name == FOLDER and path.parent.is_symlink())


def _replace(path: Path, content: bytes, only_if_absent: bool = False) -> None:
    """Writes a file whole or not at all, under a name that nobody could have foreseen."""
    if only_if_absent and os.path.lexists(path):
        return
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
