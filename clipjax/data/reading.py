"""Reading files that may fail: tried again a few times, lengths checked, then a record is skipped by name.

A path is on disk, or an address (`gs://`, `s3://`, `https://`, ...) that fsspec opens.
"""

from __future__ import annotations

import collections
import contextlib
import errno
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

CONNECT_SECONDS, SILENT_SECONDS = 10, 30
"""How long a server may take to answer at all, and between two parts of an answer."""
SCAN_BLOCK = 1 << 22
"""Bytes that are fetched at once where a file at an address is read from end to end."""

T = TypeVar("T")


class Unreachable(UnreadableRecord):
    """A record that could not be read because reading failed, not because of what it holds."""


class ShortRead(OSError):
    """An answer that ends before the bytes that were asked for."""

    def __init__(self, missing: int):
        super().__init__(f"the last {missing:,} bytes did not come")


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

    scheme = address.split("://")[0].lower()
    try:
        return fsspec.core.url_to_fs(address, **_patience(scheme))
    except (ImportError, ValueError) as error:
        extra = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "http": "http", "https": "http"}.get(scheme)
        raise ClipjaxError(
            f"{address!r} cannot be opened ({error})"
            + (f": pip install 'clipjax[{extra}]'" if extra and _lacking(error) else "")
        ) from error


def _lacking(error: Exception) -> bool:
    return isinstance(error, ImportError) or isinstance(error.__cause__, ImportError)


def _patience(scheme: str) -> dict[str, Any]:
    """What tells the client of a store how long to wait for a server that is silent."""
    if scheme == "s3":
        return {
            "config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS}
        }
    if scheme in ("http", "https"):
        import aiohttp

        return {
            "client_kwargs": {
                "timeout": aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS
                )
            }
        }
    return {}  # gcsfs has time-outs of its own


@contextlib.contextmanager
def as_os_errors(address: str) -> Iterator[None]:
    """Turns whatever a store's client raises into `OSError`, which is tried again."""
    try:
        yield
    except (OSError, ValueError, ClipjaxError):
        raise
    except Exception as error:  # each client has errors of its own
        if getattr(error, "status", None) in (401, 403):  # of aiohttp
            raise PermissionError(errno.EACCES, "the server refuses it", address) from error
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

    def ask() -> FileState:
        try:
            if not is_address(path):
                stat = os.stat(path)
                return FileState(stat.st_size, stat.st_mtime_ns)
            fs, inner = store(path)
            with as_os_errors(path):
                facts = fs.info(inner)
        except FileNotFoundError as error:
            raise ClipjaxError(f"there is no file {path!r}") from error
        names = ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime", "created")
        marks = [str(facts[name]) for name in names if facts.get(name)]
        if facts.get("size") is None:
            raise ClipjaxError(f"{path}: the server does not say how long it is")
        return FileState(int(facts["size"]), marks[0] if marks else "")

    return retried(ask, path)


def read_whole(path: str) -> bytes | None:
    """All of a small file on disk or at an address; None where there is none.

    Raises:
      UnreadableRecord: it cannot be read.
    """

    def read() -> bytes | None:
        try:
            if not is_address(path):
                with open(path, "rb") as file:
                    return file.read()
            fs, inner = store(path)
            with as_os_errors(path):
                return fs.cat_file(inner)
        except (
            FileNotFoundError,
            PermissionError,
        ):  # S3 says the latter where it may not be listed
            return None

    return retried(read, path)


class Window:
    """A file read from end to end: `window(offset, size)`, of which the next part is fetched ahead.

    Fewer bytes come at the file's end. Not for several threads.
    """

    def __init__(self, files: Files, path: str, length: int, ahead: int, first: int = 0):
        """Args:
        files: what reads.
        path: the file.
        length: its bytes (`state_of`).
        ahead: bytes that are fetched at once, at least.
        first: the same, of the first time.
        """
        self._files, self._path, self._length = files, path, length
        self._ahead, self._next = ahead, first or ahead
        self._begin, self._held = 0, memoryview(b"")

    def __call__(self, offset: int, size: int) -> bytes:
        """Some bytes.

        Raises:
          UnreadableRecord: they cannot be read, or are more than a record may have.
        """
        size = min(size, self._length - offset)
        if size > MAX_BYTES:
            raise UnreadableRecord(
                f"{os.path.basename(self._path)}: {size:,} bytes at byte {offset:,}, above {MAX_BYTES:,}"
            )
        at = offset - self._begin
        if not 0 <= at <= at + size <= len(self._held):
            wanted = min(max(size, self._next), self._length - offset)
            self._next = self._ahead
            name = f"{os.path.basename(self._path)}: from byte {offset:,} on"
            self._held = memoryview(self._files.read(self._path, offset, wanted, name))
            self._begin, at = offset, 0
        return bytes(self._held[at : at + size])


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
                found = fs.cat_file(inner, start=offset, end=offset + size)
            if len(found) > size:  # a server that knows no ranges sends all
                return found[offset : offset + size]
            if (
                len(found) < size
            ):  # a connection that was cut: each client tells in its own way, or not
                raise ShortRead(size - len(found))
            return found

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
