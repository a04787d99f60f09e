"""WebDataset tars with random access: an index of offsets is made once, samples are read in place.

The files of a sample share a stem and follow each other (`0007.jpg`, `0007.txt`), as in
https://github.com/webdataset/webdataset. A table of contents, kept in `index_dir`, saves scanning
the tars again.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np

from clipjax.data.sources import RandomAccess, Record, Source, UnreadableRecord
from clipjax.errors import ClipjaxError

logger = logging.getLogger(__name__)

OPEN_FILES = 32  # tars a thread keeps open
MAX_BYTES = 1 << 28
"""Files in a tar that are larger than this are refused unread: a header may claim any size."""


@dataclasses.dataclass(frozen=True)
class WebDataset(Source):
    """Samples in uncompressed tar files."""

    shards: str
    """The tars: a pattern such as "data/*.tar" or "data/{0000..0099}.tar"."""
    image_keys: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Extensions of the picture; the first that a sample has."""
    caption_keys: tuple[str, ...] = ("txt",)
    """Extensions of captions; "json:caption" is the field `caption` of a JSON file."""
    languages: tuple[str, ...] = ()
    """Language code of each of caption_keys, where known."""
    label_key: str | None = None
    """Extension of the file that holds the class index, usually "cls"."""
    index_dir: str | None = None
    """Folder to keep the tars' tables of contents in; default: they are not kept."""

    def __post_init__(self):
        if self.languages and len(self.languages) != len(self.caption_keys):
            raise ClipjaxError(
                f"WebDataset: {len(self.languages)} languages for {len(self.caption_keys)} "
                "caption_keys; give one each"
            )

    def open(self) -> RandomAccess:
        paths = expand(self.shards)
        if not paths:
            raise ClipjaxError(f"WebDataset: no file matches shards={self.shards!r}")
        for path in paths:
            if not os.path.isfile(path):
                raise ClipjaxError(f"WebDataset: there is no file {path!r}")
        return _OpenTars(self, paths)


class _OpenTars:
    def __init__(self, config: WebDataset, paths: list[str]):
        self._config, self._paths = config, paths
        extensions = [*config.image_keys, *(key.partition(":")[0] for key in config.caption_keys)]
        self._extensions = list(
            dict.fromkeys(extensions + ([config.label_key] if config.label_key else []))
        )
        columns = [self._extensions.index(e) for e in config.image_keys]
        self._tables = []
        without_picture = 0
        for path in paths:
            stems, places = _contents(path, self._extensions, config.index_dir)
            pictured = (places[:, columns, 1] >= 0).any(axis=1)
            without_picture += int((~pictured).sum())
            self._tables.append((stems[pictured], places[pictured]))
        self._ends = np.cumsum([len(stems) for stems, _ in self._tables])
        if len(self) == 0:
            raise ClipjaxError(
                f"WebDataset: no sample in {config.shards!r} has a picture "
                f"({', '.join(config.image_keys)}); set image_keys"
            )
        if without_picture:
            logger.warning("%s: %d samples have no picture", config.shards, without_picture)
        self._local = threading.local()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        tar = int(np.searchsorted(self._ends, index, side="right"))
        stems, places = self._tables[tar]
        row = index - (int(self._ends[tar - 1]) if tar else 0)
        key = f"{os.path.basename(self._paths[tar])}:{stems[row].decode(errors='replace')}"

        def read(extension: str) -> bytes | None:
            offset, size = places[row, self._extensions.index(extension)].tolist()
            if size > MAX_BYTES:
                raise UnreadableRecord(
                    f"{key}: .{extension} has {size:,} bytes, above {MAX_BYTES:,}"
                )
            return None if size < 0 else self._read(tar, offset, size)

        images = (read(extension) for extension in self._config.image_keys)
        captions = [_caption(read, spec, key) for spec in self._config.caption_keys]
        spoken = [i for i, caption in enumerate(captions) if caption is not None]
        record = Record(
            image=next(image for image in images if image is not None),
            captions=tuple(captions[i] or "" for i in spoken),
            languages=tuple(self._config.languages[i] for i in spoken)
            if self._config.languages
            else (),
            id=index,
            key=key,
        )
        if self._config.label_key:
            record["label"] = _label(read(self._config.label_key), key)
        return record

    def _read(self, tar: int, offset: int, size: int) -> bytes:
        """Bytes of one tar. Each thread has files of its own, so none is closed under another."""
        files = self._local.__dict__.setdefault("files", collections.OrderedDict())
        if tar not in files:
            if len(files) >= OPEN_FILES:
                files.popitem(last=False)[1].close()
            files[tar] = open(self._paths[tar], "rb", buffering=0)  # noqa: SIM115 (kept open)
        files.move_to_end(tar)
        return os.pread(files[tar].fileno(), size, offset)


def expand(pattern: str) -> list[str]:
    """The files of a pattern, in order: `{0000..0099}` counts, `*`, `?` and `[...]` match."""
    pattern = os.path.expanduser(pattern)
    count = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if count:
        first, last = count.groups()
        numbers = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
        parts = (pattern[: count.start()] + n + pattern[count.end() :] for n in numbers)
        return list(itertools.chain.from_iterable(expand(part) for part in parts))
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]


def _contents(
    path: str, extensions: list[str], index_dir: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Stems [n] (bytes) and places int64 [n, extensions, 2]: offset and size, -1 if missing."""
    if index_dir is None:
        return _scan(path, extensions)
    stat = os.stat(path)
    mark = f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns} {' '.join(extensions)}"
    name = f"{Path(path).stem}-{hashlib.blake2b(mark.encode(), digest_size=8).hexdigest()}.npz"
    kept = Path(index_dir).expanduser() / name
    try:
        with np.load(kept) as table:
            return table["stems"], table["places"]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged (%s): scanning the tar again", kept, error)
    stems, places = _scan(path, extensions)
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_name(f"{name}.{os.getpid()}.tmp")  # whole or absent, also under a race
    with scratch.open("wb") as file:
        np.savez(file, stems=stems, places=places)
    scratch.replace(kept)
    return stems, places


def _scan(path: str, extensions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    column = {extension: i for i, extension in enumerate(extensions)}
    length = os.path.getsize(path)
    outside = 0
    stems: list[bytes] = []
    places: list[np.ndarray] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps every header
                if member.size < 0:  # the next header would lie before this one, for ever
                    raise ClipjaxError(f"the tar {path!r} gives {member.name!r} a negative size")
                if not member.isfile() or member.issparse():
                    continue
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    # Nothing is ever extracted, but names travel on, to where somebody may.
                    if not outside:
                        logger.warning("%s: left out %r, outside of the tar", path, member.name)
                    outside += 1
                    continue
                if member.offset_data + member.size > length:
                    raise ClipjaxError(f"the tar {path!r} is cut short in {member.name!r}")
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                stem_bytes = f"{folder}/{stem}".strip("/").encode(errors="surrogateescape")
                if not stems or stems[-1] != stem_bytes:
                    stems.append(stem_bytes)
                    places.append(np.full((len(extensions), 2), -1, np.int64))
                if extension.lower() in column:
                    places[-1][column[extension.lower()]] = member.offset_data, member.size
        if outside > 1:
            logger.warning("%s: left out %d files with names like that", path, outside)
    except tarfile.TarError as error:
        raise ClipjaxError(f"{path!r} is not an uncompressed tar file ({error})") from error
    return np.array(stems, dtype=np.bytes_), np.array(places).reshape(-1, len(extensions), 2)


def _caption(read, spec: str, key: str) -> str | None:
    extension, _, field = spec.partition(":")
    content = read(extension)
    if content is None:
        return None
    try:
        if not field:
            return content.decode()
        value = json.loads(content).get(field)
    except (UnicodeDecodeError, ValueError, AttributeError) as error:
        raise UnreadableRecord(f"{key}: the file .{extension} does not parse ({error})") from error
    return None if value is None else str(value)


def _label(content: bytes | None, key: str) -> int:
    try:
        return -1 if content is None else int(content)
    except ValueError as error:
        raise UnreadableRecord(f"{key}: the class {content!r} is no number") from error
