"""Where samples are in tar files: found once, 12 bytes each, kept in one file that is mapped into memory.

The members of a sample share a stem and follow each other (`0007.jpg`, `0007.txt`). A tar that is
damaged, cut short, or two in one file is refused by name and byte, never taken for a shorter one.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import os
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipjax.data.reading import SCAN_BLOCK, Files, Window, is_address, state_of
from clipjax.errors import ClipjaxError

logger = logging.getLogger(__name__)

BLOCK = 512
MAGIC = b"clipjax tars 1\n"
MAX_HEADER = 1 << 20
"""Bytes of a long name or of a header's extension, at most."""
DAMAGED = -1
"""In place of how many samples of a tar have no picture."""
SCANNERS = 16  # threads: on a network's disk a scan waits more than it computes
MAX_PADDING = 1 << 20
"""Bytes of zeros at a tar's end, at most; usual are up to 10,240."""
HOP = 1 << 15
"""Bytes of a tar on disk that are read at once to find its headers."""
_PLAIN = struct.Struct("100s24x12s12x8s189x155s12x")
_DATALESS = b"123456"  # links, devices, folders, pipes: whatever their header says of a size


class Damaged(ClipjaxError):
    """A tar that does not hold what its headers say."""


class Member(NamedTuple):
    """A file in a tar: its name, where its first header, its data and the next header are, in bytes."""

    name: str
    start: int
    data: int
    size: int
    end: int


class Places(NamedTuple):
    """Where samples are: byte offsets, uint64 [n], and numbers of 512-byte blocks, uint32 [n]."""

    starts: np.ndarray
    blocks: np.ndarray


def stem_and_extension(name: str) -> tuple[str, str] | None:
    """`"a/b.seg.PNG"` -> (`"a/b"`, `"seg.png"`); None for what belongs to no sample (hidden files)."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or "__MACOSX" in folder.split("/"):
        return None
    while folder.startswith("./"):
        folder = folder[2:]
    return f"{'' if folder == '.' else folder}/{stem}".strip("/"), extension.lower()


def members(
    read: Callable[[int, int], bytes], length: int, path: str, whole: bool, begin: int = 0
) -> Iterator[Member]:
    """The regular files of a tar, or of a run of its blocks that begins with a header.

    Args:
      read: `read(offset, size)`, fewer bytes at the end.
      length: bytes there are.
      path: the tar's name, for errors.
      whole: whether the tar's end mark must follow, and nothing after that.
      begin: byte of the first header.

    Raises:
      Damaged: a header is not one, or says what cannot be.
    """
    offset, first, name, size_of = begin, begin, "", None
    sparse = False
    while offset < length:
        block = read(offset, BLOCK)
        try:
            header = _header(block)
        except tarfile.HeaderError as error:
            if not block.strip(b"\0") and len(block) == BLOCK:
                if whole:
                    _check_end(read, offset, length, path)
                return
            if offset == 0:
                raise ClipjaxError(f"{path!r} is not an uncompressed tar file ({error})") from error
            what = "is cut short" if len(block) < BLOCK else "is damaged"
            raise Damaged(f"the tar {path!r} {what} at byte {offset:,} ({error})") from error
        kind = header.kind
        size = header.size if size_of is None else size_of
        if size < 0:  # the next header would lie before this one, for ever
            raise Damaged(f"the tar {path!r} gives {header.name!r} a negative size")
        data = offset + BLOCK
        while kind == tarfile.GNUTYPE_SPARSE and block[482 if data == offset + BLOCK else 504]:
            block, data = read(data, BLOCK), data + BLOCK
            if len(block) < BLOCK:
                raise Damaged(f"the tar {path!r} is cut short at byte {data:,}")
        if kind in _DATALESS:
            size = 0
        after = data + -(-size // BLOCK) * BLOCK
        if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if size > MAX_HEADER:
                raise Damaged(f"the tar {path!r} has a name of {size:,} bytes at byte {offset:,}")
            content = read(data, size)
            if kind == tarfile.GNUTYPE_LONGNAME:
                name = content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            else:
                facts = _extension(content, path, offset)
                name = facts.get("path", name)
                size_of = int(facts["size"]) if facts.get("size", "").isdigit() else None
                sparse = any(key.startswith("GNU.sparse") for key in facts)
        elif kind not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            if kind in tarfile.REGULAR_TYPES and kind != tarfile.GNUTYPE_SPARSE and not sparse:
                yield Member(name or header.name, first, data, size, after)
            first, name, size_of, sparse = after, "", None, False
        offset = after
    if whole and not length:
        raise ClipjaxError(f"{path!r} is not an uncompressed tar file (it is empty)")
    if whole:
        raise Damaged(
            f"the tar {path!r} has no end mark: it seems to be cut short at byte {length:,}"
        )


class _Header(NamedTuple):
    name: str
    kind: bytes
    size: int


def _header(block: bytes) -> _Header:
    """What a header says: of a plain file at once, of all others as `tarfile` reads them."""
    if len(block) == BLOCK and block[257:263] == b"ustar\0" and block[156] in b"0\0":
        name, size, mark, prefix = _PLAIN.unpack(block)
        try:
            if int(mark[:6], 8) == sum(block) - sum(mark) + 256 and not prefix[:1].strip(b"\0"):
                return _Header(
                    name.split(b"\0", 1)[0].decode("utf-8", "surrogateescape"),
                    b"0",
                    int(size.rstrip(b"\0 "), 8),
                )
        except ValueError:
            pass
    found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    return _Header(found.name, found.type, found.size)


def _check_end(read: Callable[[int, int], bytes], offset: int, length: int, path: str) -> None:
    """Refuses a tar in which anything but a few zeros follows its end mark."""
    mark = offset
    while offset < length:
        part = read(offset, 1 << 16)
        if not part or part.strip(b"\0"):
            at = offset + len(part) - len(part.lstrip(b"\0"))
            raise Damaged(
                f"the tar {path!r} goes on at byte {at:,} after its end at byte {mark:,}: is it more "
                "than one tar in a file?"
            )
        offset += len(part)
        if offset - mark > MAX_PADDING:
            raise Damaged(
                f"the tar {path!r} has nothing but zeros from byte {mark:,} on, more than pad a tar"
            )


def _extension(content: bytes, path: str, offset: int) -> dict[str, str]:
    """The records of a POSIX header extension, each `length key=value` and a line break."""
    facts, at = {}, 0
    while at < len(content) and content[at : at + 1] != b"\0":
        digits, _, _ = content[at:].partition(b" ")
        try:
            length = int(digits)
            key, _, value = content[at + len(digits) + 1 : at + length - 1].partition(b"=")
        except ValueError:
            length = 0
        if length <= len(digits) or at + length > len(content):
            raise Damaged(f"the tar {path!r} has a damaged extension at byte {offset:,}")
        facts[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += length
    return facts


def scan(path: str, image_keys: tuple[str, ...]) -> tuple[Places, int]:
    """(where the samples with a picture are, how many samples have none) in one tar.

    Raises:
      Damaged: it is not whole.
      ClipjaxError: it cannot be read, is no tar, or the members of a sample do not follow each other.
    """
    length = state_of(path).size
    window = Window(Files(), path, length, SCAN_BLOCK if is_address(path) else HOP)
    return _scan(window, path, length, image_keys)


def _scan(
    read: Callable[[int, int], bytes], path: str, length: int, image_keys: tuple[str, ...]
) -> tuple[Places, int]:
    starts: list[int] = []
    ends: list[int] = []
    seen: set[str] = set()
    extensions: set[str] = set()
    current: str | None = None
    without = outside = 0

    def finish() -> None:
        nonlocal without
        if current is not None and not any(key in extensions for key in image_keys):
            without += 1
            starts.pop(), ends.pop()

    for member in members(read, length, path, whole=True):
        if member.data + member.size > length:
            raise Damaged(f"the tar {path!r} is cut short in {member.name!r}")
        if member.name.startswith("/") or ".." in member.name.split("/"):
            # Nothing is ever extracted, but names travel on, to where somebody may.
            if not outside:
                logger.warning("%s: left out %r, outside of the tar", path, member.name)
            outside += 1
            continue
        parts = stem_and_extension(member.name)
        if parts is None:
            continue
        stem, extension = parts
        if stem != current:
            finish()
            if stem in seen:
                raise ClipjaxError(
                    f"the tar {path!r}: the files of the sample {stem!r} do not follow each other; "
                    "pack it again with its names in order (tar --sort=name)"
                )
            seen.add(stem)
            current = stem
            extensions.clear()
            starts.append(member.start)
            ends.append(member.end)
        elif extension in extensions:
            raise ClipjaxError(f"the tar {path!r} has {member.name!r} more than once")
        extensions.add(extension)
        ends[-1] = member.end
    finish()
    if outside > 1:
        logger.warning("%s: left out %d files with names like that", path, outside)
    first = np.array(starts, np.uint64)
    blocks = (np.array(ends, np.uint64) - first) // np.uint64(BLOCK)
    return Places(first, blocks.astype(np.uint32)), without


class Index:
    """Where the samples of many tars are.

    Attributes:
      paths: the tars.
      ends: int64 [tars], how many samples there are up to and with each tar.
      places: of all samples, in order; mapped into memory where the index is kept in a file.
      without_picture: samples that were left out, since they have none.
    """

    def __init__(self, paths: list[str], counts: list[int], places: Places, without: int):
        self.paths, self.places, self.without_picture = paths, places, without
        self.ends = np.cumsum(np.array(counts, np.int64))

    def __len__(self) -> int:
        return len(self.places.starts)

    def __getitem__(self, index: int) -> tuple[str, int, int]:
        """(tar, offset, size in bytes) of a sample."""
        tar = int(np.searchsorted(self.ends, index, side="right"))
        return (
            self.paths[tar],
            int(self.places.starts[index]),
            int(self.places.blocks[index]) * BLOCK,
        )


def index_tars(
    paths: list[str],
    image_keys: tuple[str, ...],
    kept: Path | None,
    skip_damaged: bool,
    executor: concurrent.futures.Executor | None = None,
) -> Index:
    """The index of some tars: what is kept of it is used, and the rest made anew.

    Args:
      paths: the tars.
      image_keys: extensions of pictures.
      kept: file to keep it in; None keeps nothing.
      skip_damaged: leave damaged tars out, with a warning, in place of refusing them.
      executor: what scans; None is threads.

    Raises:
      ClipjaxError: a tar cannot be read, is damaged, or is not in order.
    """
    with concurrent.futures.ThreadPoolExecutor(SCANNERS) as asking:
        states = list(asking.map(state_of, paths))
    marks = [[path, *state] for path, state in zip(paths, states, strict=True)]
    old = _load(kept) if kept is not None else None
    known: dict[tuple, int] = {}
    if old is not None:
        # A damaged tar that was left out is looked at again by whoever does not leave it out.
        rows = [i for i, n in enumerate(old.without) if skip_damaged or n != DAMAGED]
        known = {tuple(old.marks[i]): i for i in rows}
        if [known.get(tuple(mark)) for mark in marks] == list(range(len(old.marks))):
            return Index(paths, old.counts, old.places, _total(old.without))
    missing = [path for path, mark in zip(paths, marks, strict=True) if tuple(mark) not in known]
    own = executor or concurrent.futures.ThreadPoolExecutor(min(SCANNERS, max(len(missing), 1)))
    try:
        jobs = {path: own.submit(scan, path, image_keys) for path in missing}
        found: list[tuple[Places, int]] = []
        for path, mark in zip(paths, marks, strict=True):
            row = known.get(tuple(mark))
            if row is not None:
                assert old is not None
                found.append((old.of(row), old.without[row]))
                continue
            try:
                found.append(jobs[path].result())
            except Damaged as error:
                if not skip_damaged:
                    raise
                logger.warning("left out: %s", error)
                found.append((Places(np.zeros(0, np.uint64), np.zeros(0, np.uint32)), DAMAGED))
    finally:
        if executor is None:
            own.shutdown(cancel_futures=True)
    places = Places(
        np.concatenate([p.starts for p, _ in found]), np.concatenate([p.blocks for p, _ in found])
    )
    counts, without = [len(p.starts) for p, _ in found], [n for _, n in found]
    if kept is not None:
        _save(kept, _Kept(marks, counts, without, places))
        loaded = _load(kept)
        places = loaded.places if loaded is not None else places
    return Index(paths, counts, places, _total(without))


def _total(without: list[int]) -> int:
    return sum(n for n in without if n != DAMAGED)


def kept_file(index_dir: str, shards: str, image_keys: tuple[str, ...]) -> Path:
    """The file in `index_dir` that holds the index of a pattern of tars."""
    where = shards if is_address(shards) else os.path.abspath(os.path.expanduser(shards))
    mark = f"{where} {' '.join(image_keys)}"
    name = hashlib.blake2b(mark.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return Path(index_dir).expanduser() / f"{name}.tars"


class _Kept(NamedTuple):
    """An index with its tars' marks (path, size, time), as one file holds it."""

    marks: list[list]
    counts: list[int]
    without: list[int]
    places: Places

    def of(self, row: int) -> Places:
        end = sum(self.counts[: row + 1])
        part = slice(end - self.counts[row], end)
        return Places(self.places.starts[part], self.places.blocks[part])


def _save(file: Path, kept: _Kept) -> None:
    """Writes an index whole or not at all, also where several processes do so at once."""
    facts = json.dumps(
        {"tars": kept.marks, "counts": kept.counts, "without": kept.without}
    ).encode()
    head = MAGIC + len(facts).to_bytes(8, "little") + facts
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(head + b"\0" * (-len(head) % 8))
                kept.places.starts.astype("<u8").tofile(out)
                kept.places.blocks.astype("<u4").tofile(out)
            os.chmod(scratch, 0o644)
            os.replace(scratch, file)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError as error:
        raise ClipjaxError(f"the index {file} cannot be written: {error.strerror}") from error


def _load(file: Path) -> _Kept | None:
    """A kept index, its places mapped into memory; None where there is none, or it is damaged."""
    try:
        with file.open("rb") as opened:
            if opened.read(len(MAGIC)) != MAGIC:
                raise ValueError("it is none")
            size = int.from_bytes(opened.read(8), "little")
            if size > os.fstat(opened.fileno()).st_size:
                raise ValueError("it is cut short")
            facts = json.loads(opened.read(size))
            total = sum(facts["counts"])
            offset = -(-(len(MAGIC) + 8 + size) // 8) * 8
            if os.fstat(opened.fileno()).st_size != offset + 12 * total:
                raise ValueError("it has another length than it says")
            if not total:
                places = Places(np.zeros(0, np.uint64), np.zeros(0, np.uint32))
            else:  # of the file that was looked at: another may have its name by now
                places = Places(
                    np.memmap(opened, "<u8", "r", offset, (total,)),
                    np.memmap(opened, "<u4", "r", offset + 8 * total, (total,)),
                )
        return _Kept(facts["tars"], facts["counts"], facts["without"], places)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the index %s is damaged (%s): scanning the tars again", file, error)
        return None
