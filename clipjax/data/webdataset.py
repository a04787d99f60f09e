"""WebDataset tars with random access: where the samples are is found once, and each is read in place.

The files of a sample share a stem and follow each other (`0007.jpg`, `0007.txt`), as in
https://github.com/webdataset/webdataset. A table of contents, kept in `index_dir`, saves scanning
the tars again.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipjax.data.captions import as_texts, at_path, encodable
from clipjax.data.pieces import attempt, edges_within
from clipjax.data.reading import (
    MAX_BYTES,
    SCAN_BLOCK,
    Files,
    Unreachable,
    Window,
    as_os_errors,
    is_address,
    state_of,
    store,
)
from clipjax.data.shards import Sequential
from clipjax.data.sources import (
    Place,
    RandomAccess,
    Record,
    Shard,
    Source,
    UnreadableRecord,
)
from clipjax.data.tars import (
    HOP,
    Damaged,
    Index,
    Member,
    index_tars,
    kept_file,
    members,
    stem_and_extension,
)
from clipjax.errors import ClipjaxError

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 25
"""Bytes of samples that are read at once from a stream, unless one alone is larger."""


@dataclasses.dataclass(frozen=True)
class WebDataset(Source):
    """Samples in uncompressed tar files.

    Every other file of a sample is an entry of its record, by its extension ("npy"), for the fields
    of a batch; "json:scores.clip" leads into a JSON file.
    """

    shards: str
    """The tars: a pattern such as "data/*.tar", "data/{0000..0099}.tar" or "gs://bucket/*.tar"."""
    image_keys: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Extensions of the picture; the first that a sample has."""
    caption_keys: tuple[str, ...] = ("txt",)
    """Extensions of captions; "json:caption" is the field `caption` of a JSON file, and a list of
    texts there is several captions."""
    languages: tuple[str, ...] = ()
    """Language code of each of caption_keys, where known."""
    lines: bool = False
    """Whether each line of a caption's file is a caption of its own."""
    label_key: str | None = None
    """Extension of the file that holds the class index, usually "cls"."""
    index_dir: str | None = None
    """Folder to keep the tars' tables of contents in; default: they are not kept, and a stream makes none."""
    damaged: Literal["refuse", "skip"] = "refuse"
    """What happens to a tar that is damaged or not whole: the run is refused, or the tar left out. A stream
    without index_dir shows what comes before the damage, and skips the rest as one record."""

    def __post_init__(self):
        if self.languages and len(self.languages) != len(self.caption_keys):
            raise ClipjaxError(
                f"WebDataset: {len(self.languages)} languages for {len(self.caption_keys)} "
                "caption_keys; give one each"
            )
        if self.damaged not in ("refuse", "skip"):
            raise ClipjaxError(
                f"WebDataset: damaged={self.damaged!r} is neither 'refuse' nor 'skip'"
            )

    def open(self) -> RandomAccess:
        return _OpenTars(self, self.index())

    def listed(self, least: int) -> list[str] | None:
        """The tars, unless an index of theirs is kept, or they are fewer than `least`."""
        if self.index_dir is not None:
            return None
        paths = self._paths()
        return paths if len(paths) >= least else None

    def open_shard(self, file: Place) -> Shard:
        return _TarShard(self, file)

    def _paths(self) -> list[str]:
        paths = expand(self.shards)
        if not paths:
            raise ClipjaxError(f"WebDataset: no file matches shards={self.shards!r}")
        return paths

    def index_file(self) -> Path | None:
        """The file in `index_dir` that keeps where the samples are."""
        if self.index_dir is None:
            return None
        return kept_file(self.index_dir, self.shards, self.image_keys)

    def index(self, executor: Executor | None = None) -> Index:
        """Where the samples are.

        Args:
          executor: what scans the tars; None is threads.

        Raises:
          ClipjaxError: a tar is not there, or cannot be used.
        """
        paths = self._paths()
        skip = self.damaged == "skip"
        index = index_tars(paths, self.image_keys, self.index_file(), skip, executor)
        if not len(index):
            raise ClipjaxError(
                f"WebDataset: no sample in {self.shards!r} has a picture "
                f"({', '.join(self.image_keys)}); set image_keys"
            )
        if index.without_picture:
            logger.warning("%s: %d samples have no picture", self.shards, index.without_picture)
        return index


class _OpenTars:
    def __init__(self, config: WebDataset, index: Index):
        self._config, self._index, self._files = config, index, Files()
        self._maker = _Maker(config)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        path, offset, size = self._index[index]
        name = f"{os.path.basename(path)}: the sample at byte {offset:,}"
        if size > MAX_BYTES:
            raise UnreadableRecord(f"{name} has {size:,} bytes, above {MAX_BYTES:,}")
        return self._parsed(index, path, self._files.read(path, offset, size, name))

    def file_of(self, index: int) -> str:
        """The tar that holds the sample."""
        return self._index[index][0]

    def runs(self, size: int) -> np.ndarray:
        """Edges of runs of at most `size` samples of one tar."""
        starts = [0, *self._index.ends[:-1].tolist()]
        return edges_within(starts, len(self), size)

    def read_run(self, first: int, stop: int) -> list[Record | UnreadableRecord]:
        """The samples from `first` to `stop`, which are in one tar, in a few large reads."""
        found: list[Record | UnreadableRecord] = []
        path, begin, _ = self._index[first]
        while first < stop:
            after = first + 1
            while after < stop and self._end(after) - begin <= READ_BYTES:
                after += 1
            if self._end(after - 1) - begin > MAX_BYTES:
                found.append(attempt(self, first))
            else:
                found += self._read_together(first, after, path, begin)
            first = after
            begin = self._index[first][1] if first < stop else begin
        return found

    def _read_together(
        self, first: int, stop: int, path: str, begin: int
    ) -> list[Record | UnreadableRecord]:
        name = f"{os.path.basename(path)}: the samples from byte {begin:,} on"
        try:
            content = self._files.read(path, begin, self._end(stop - 1) - begin, name)
        except UnreadableRecord:  # one by one: what can be read of them counts
            return [attempt(self, index) for index in range(first, stop)]
        found: list[Record | UnreadableRecord] = []
        for index in range(first, stop):
            offset = self._index[index][1] - begin
            try:
                found.append(self._parsed(index, path, content[offset : self._end(index) - begin]))
            except UnreadableRecord as failure:
                found.append(failure)
        return found

    def _end(self, index: int) -> int:
        _, offset, size = self._index[index]
        return offset + size

    def _parsed(self, index: int, path: str, content: bytes) -> Record:
        stem, files = _files(lambda at, n: content[at : at + n], len(content), path)
        return self._maker.record(index, f"{os.path.basename(path)}:{stem}", files)

    def facts(self, index: int) -> Record:
        """The record without its picture, of which nothing is read."""
        path, offset, size = self._index[index]
        name = f"{os.path.basename(path)}: the sample at byte {offset:,}"
        stem, files = _files(
            lambda at, n: self._files.read(path, offset + at, min(n, size - at), name),
            size,
            path,
            self._config.image_keys,
        )
        return self._maker.record(index, f"{os.path.basename(path)}:{stem}", files)


class _Maker:
    """Makes records of the files of samples."""

    def __init__(self, config: WebDataset):
        self._config, self._warned = config, False

    def record(self, index: int, key: str, files: dict[str, bytes]) -> Record:
        """The record of a sample's files, by their extensions.

        Raises:
          UnreadableRecord: it has no picture, or a file of it does not parse.
        """
        config = self._config
        image = next((files[e] for e in config.image_keys if e in files), None)
        if image is None:
            raise UnreadableRecord(f"{key}: no sample with a picture is where the index says")
        captions: list[str] = []
        languages: list[str] = []
        for i, spec in enumerate(config.caption_keys):
            texts = _captions(files, spec, key, config.lines)
            captions += texts
            languages += [config.languages[i]] * len(texts) if config.languages else []
        if not config.lines and not self._warned and any("\n" in c.strip() for c in captions):
            self._warned = True
            logger.warning(
                "%s: the caption holds line breaks; WebDataset(lines=True) takes each line as a "
                "caption of its own",
                key,
            )
        record = Record(
            image=image,
            captions=tuple(captions),
            languages=tuple(languages),
            id=index,
            key=key,
        )
        if config.label_key:
            record["label"] = _label(files.get(config.label_key), key)
        others = {e: content for e, content in files.items() if e not in config.image_keys}
        return others | record  # type: ignore[return-value]


class _TarShard(Sequential):
    """The samples of one tar, one after another, without knowing where they are."""

    def __init__(self, config: WebDataset, place: Place):
        super().__init__(place)
        self._config, self._maker, self._files = config, _Maker(config), Files()
        self._length = state_of(place.path).size
        self._without = 0
        self._expected = SCAN_BLOCK  # bytes of a piece: no more is fetched than will be used

    def take(self, offset: int, first: int, keep: bool) -> tuple[list[Any], int | None]:
        found: list[Any] = []
        path = self.place.path
        ahead = SCAN_BLOCK // 4 if is_address(path) else HOP
        # What the piece before it took, and a little: then one request will mostly do.
        window = Window(self._files, path, self._length, ahead, self._expected if keep else ahead)
        seen: set[str] = set()
        try:
            for stem, held in self._samples(window, offset):
                if len(found) == self.place.run:
                    begin = next(iter(held.values()))[0].start
                    self._expected = (begin - offset) * 17 // 16 + HOP
                    return found, begin
                if not any(extension in self._config.image_keys for extension in held):
                    self._without += 1
                    continue
                if keep:
                    twice = stem in seen
                    found.append(self._record(window, stem, held, first + len(found), twice))
                else:
                    found.append(stem)
                seen.add(stem)
        except ClipjaxError as error:
            self.failed = True
            return [*found, self.lost(error, first + len(found))], None
        if self._without:
            logger.warning("%s: %d samples have no picture", path, self._without)
        return found, None

    def _samples(
        self, window: Window, offset: int
    ) -> Iterator[tuple[str, dict[str, list[Member]]]]:
        """The samples of the tar from a byte on: their stems, and their files by extension."""
        stem, held = "", dict[str, list[Member]]()
        for member in members(window, self._length, self.place.path, whole=True, begin=offset):
            if member.data + member.size > self._length:
                raise Damaged(f"the tar {self.place.path!r} is cut short in {member.name!r}")
            parts = stem_and_extension(member.name)
            if parts is None or member.name.startswith("/") or ".." in member.name.split("/"):
                continue
            if held and parts[0] != stem:
                yield stem, held
                held = {}
            stem = parts[0]
            held.setdefault(parts[1], []).append(member)
        if held:
            yield stem, held

    def _record(
        self, window: Window, stem: str, held: dict[str, list[Member]], place: int, twice: bool
    ) -> Record | UnreadableRecord:
        key = f"{self.place.name}:{stem.encode(errors='surrogateescape').decode(errors='replace')}"
        try:
            if twice:
                raise UnreadableRecord(
                    f"{key}: its files do not follow each other; pack the tar again with its names in order "
                    "(tar --sort=name)"
                )
            for extension, found in held.items():
                if len(found) > 1:
                    raise UnreadableRecord(f"{key}: the file .{extension} is there more than once")
            size = sum(found.size for (found,) in held.values())
            if size > MAX_BYTES:
                raise UnreadableRecord(f"{key} has {size:,} bytes, above {MAX_BYTES:,}")
            files = {
                extension: window(found.data, found.size) for extension, (found,) in held.items()
            }
            return self._maker.record(self.place.number(place), key, files)
        except Unreachable:
            raise
        except UnreadableRecord as failure:
            return failure


def expand(pattern: str) -> list[str]:
    """The files of a pattern, on disk or at an address, in order: `{0000..0099}` counts, `*`, `?` and `[...]` match.

    A file that is called just so is meant before what a pattern would match.
    """
    address = is_address(pattern)
    pattern = pattern if address else os.path.expanduser(pattern)
    if not address and os.path.isfile(pattern):
        return [pattern]
    count = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if count:
        first, last = count.groups()
        numbers = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
        parts = (pattern[: count.start()] + n + pattern[count.end() :] for n in numbers)
        return list(itertools.chain.from_iterable(expand(part) for part in parts))
    if not glob.has_magic(pattern):
        return [pattern]
    if not address:
        return sorted(glob.glob(pattern))
    fs, inner = store(pattern)
    try:
        with as_os_errors(pattern):
            return sorted(fs.unstrip_protocol(path) for path in fs.glob(inner))
    except OSError as error:
        raise ClipjaxError(f"{pattern!r} cannot be listed ({error})") from error


def _files(
    read: Callable[[int, int], bytes], size: int, path: str, unread: tuple[str, ...] = ()
) -> tuple[str, dict[str, bytes]]:
    """(stem, contents by extension) of the sample in the `size` bytes that `read` reads.

    The files with an extension in `unread` are empty.
    """
    stem: str | None = None
    files: dict[str, bytes] = {}
    try:
        found = list(members(read, size, path, whole=False))
    except UnreadableRecord:
        raise
    except ClipjaxError as error:  # the tar has changed since it was indexed
        raise UnreadableRecord(f"{path}: no sample is where the index says ({error})") from error
    for member in found:
        parts = stem_and_extension(member.name)
        if parts is not None and ".." not in member.name.split("/"):
            stem = parts[0] if stem is None else stem
            files[parts[1]] = b"" if parts[1] in unread else read(member.data, member.size)
    name = (stem or "").encode(errors="surrogateescape").decode(errors="replace")
    return name, files


def _captions(files: dict[str, bytes], spec: str, key: str, lines: bool) -> list[str]:
    extension, _, field = spec.partition(":")
    content = files.get(extension)
    if content is None:
        return []
    try:
        text = content.decode("utf-8-sig")
        if field:
            return list(as_texts(at_path(json.loads(text), field), f"{key}: {spec!r}"))
    except (UnicodeDecodeError, ValueError, TypeError, RecursionError) as error:
        raise UnreadableRecord(f"{key}: the file .{extension} does not parse ({error})") from error
    return [line for line in text.split("\n") if line.strip()] if lines else [encodable(text)]


def _label(content: bytes | None, key: str) -> int:
    try:
        return -1 if content is None else int(content)
    except ValueError as error:
        raise UnreadableRecord(f"{key}: the class {content!r} is no number") from error
