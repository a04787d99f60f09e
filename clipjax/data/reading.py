"""Reading files that may fail: tried again a few times, lengths checked, then a record is skipped by name.

A path is on disk, or an address (`gs://`, `s3://`, `https://`, ...) that fsspec opens.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from clipjax.data.sources import UnreadableRecord
from clipjax.errors import ClipjaxError

logger = logging.getLogger(__name__)

OPEN_FILES = 64
"""Files that one `Files` keeps open, whatever the number of threads."""
MAX_BYTES = 1 << 28
"""Files, and samples of tars, that are larger than this are refused unread: a header may claim any size."""
PAUSES = (0.1, 0.5, 2.0)
"""Seconds before each further attempt to read what failed."""
FINAL = (PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors that another attempt would not mend."""

SCAN_BLOCK = 1 << 22
"""Bytes that are fetched at once where a file at an address is read from end to end."""

T = TypeVar("T")


class Unreachable(UnreadableRecord):
    """A record that could not be read because reading failed, not because of what it holds."""


def retried(read: Callable[[], T], name: str) -> T:
    """What `read` returns, which is called again after an `OSError` that may pass.

    Raises:
      Unreachable: it failed every time; the message begins with `name`.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except FileNotFoundError as error:
            raise UnreadableRecord(
                f"{name}: there is no file {error.filename or str(error)!r}"
            ) from error
        except FINAL as error:
            raise UnreadableRecord(f"{name}: {error.strerror}: {error.filename!r}") from error
        except OSError as error:
            if pause is None:
                raise Unreachable(
                    f"{name}: reading failed {len(PAUSES) + 1} times ({error})"
                ) from error
            logger.debug("%s: %s; trying again in %g s", name, error, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def is_address(path: str) -> bool:
    """Whether a path is an address (`scheme://...`), and not one on disk."""
    return "://" in path


def store(address: str) -> tuple[Any, str]:
    """(fsspec's file system of an address, the path in it).

    Raises:
      ClipjaxError: there is no such store, or its client is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ClipjaxError(f"{address!r} cannot be opened ({error})") from error


@contextlib.contextmanager
def as_os_errors(address: str) -> Iterator[None]:
    """Turns whatever a store's client raises into `OSError`, which is tried again."""
    try:
        yield
    except (OSError, ValueError, ClipjaxError):
        raise
    except Exception as error:  # each client has errors of its own
        raise OSError(f"{address}: {type(error).__name__}: {error}") from error


class FileState(NamedTuple):
    """A file's length in bytes, and what is another when its contents are."""

    size: int
    mark: int | str


def state_of(path: str) -> FileState:
    """The state of a file.

    Raises:
      ClipjaxError: it is not there, or cannot be asked.
    """
    try:
        if not is_address(path):
            stat = os.stat(path)
            return FileState(stat.st_size, stat.st_mtime_ns)
        fs, inner = store(path)
        with as_os_errors(path):
            facts = fs.info(inner)
        names = ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime", "created")
        marks = [str(facts[name]) for name in names if facts.get(name)]
        return FileState(int(facts["size"]), marks[0] if marks else "")
    except FileNotFoundError as error:
        raise ClipjaxError(f"there is no file {path!r}") from error
    except (OSError, KeyError, TypeError) as error:
        raise ClipjaxError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def reader(path: str) -> Iterator[Callable[[int, int], bytes]]:
    """`read(offset, size)` of a file, for going through it from end to end; fewer bytes at its end.

    Raises:
      OSError: it cannot be opened or read.
    """
    if not is_address(path):
        with open(path, "rb", buffering=0) as file:
            yield lambda at, n: os.pread(file.fileno(), n, at)
        return
    fs, inner = store(path)
    with as_os_errors(path):
        opened = fs.open(inner, "rb", block_size=SCAN_BLOCK)
    with opened:

        def read(at: int, n: int) -> bytes:
            with as_os_errors(path):
                opened.seek(at)
                return opened.read(n)

        yield read


def read_file(path: str | os.PathLike[str], name: str) -> bytes:
    """All of a file.

    Raises:
      UnreadableRecord: it is not there, too large, cannot be read, or is no regular file.
    """
    text = os.fspath(path)
    if os.path.exists(text) and not os.path.isfile(text):  # a pipe would never end
        raise UnreadableRecord(f"{name}: {text!r} is no regular file")

    def read() -> bytes:
        with open(text, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise UnreadableRecord(f"{name}: {size:,} bytes, above {MAX_BYTES:,}")
            return _all_of(file.fileno(), 0, size)

    try:
        return retried(read, name)
    except ValueError as error:  # a NUL in the name
        raise UnreadableRecord(f"{name}: {text!r} is no file's name") from error


class Files:
    """Parts of files, read by any number of threads through a bounded number of descriptors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[str, _File] = collections.OrderedDict()

    def read(self, path: str, offset: int, size: int, name: str) -> bytes:
        """`size` bytes of a file from `offset` on.

        Raises:
          UnreadableRecord: they are not there, or cannot be read; the message begins with `name`.
        """

        def fetch() -> bytes:
            fs, inner = store(path)
            with as_os_errors(path):
                return fs.cat_file(inner, start=offset, end=offset + size)

        def attempt() -> bytes:
            file = self._take(path)
            try:
                return _all_of(file.descriptor, offset, size)
            except OSError:
                file.spoilt = (
                    True  # a stale handle of a network's file: the next attempt opens anew
                )
                raise
            finally:
                self._give_back(path, file)

        found = retried(fetch if is_address(path) else attempt, name)
        if len(found) < size:
            raise Unreachable(f"{name}: {path!r} ends {size - len(found):,} bytes early")
        return found

    def _take(self, path: str) -> _File:
        with self._lock:
            file = self._open.get(path)
            if file is not None:
                self._open.move_to_end(path)
                file.users += 1
                return file
        opened = _File(os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
        with self._lock:
            file = self._open.setdefault(path, opened)
            file.users += 1
            if file is not opened:  # another thread was faster
                os.close(opened.descriptor)
            idle = [p for p, f in self._open.items() if not f.users]
            for old in idle[: max(0, len(self._open) - OPEN_FILES)]:
                os.close(self._open.pop(old).descriptor)
        return file

    def _give_back(self, path: str, file: _File) -> None:
        with self._lock:
            file.users -= 1
            if file.spoilt and self._open.get(path) is file:
                del self._open[path]
            if not file.users and self._open.get(path) is not file:
                os.close(file.descriptor)

    def __del__(self) -> None:
        for file in self._open.values():
            with contextlib.suppress(OSError):
                os.close(file.descriptor)


class _File:
    """An open descriptor, how many threads read through it, and whether it failed."""

    __slots__ = ("descriptor", "spoilt", "users")

    def __init__(self, descriptor: int):
        self.descriptor, self.users, self.spoilt = descriptor, 0, False


def _all_of(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes, fewer where the file ends: one call may bring less than asked."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
