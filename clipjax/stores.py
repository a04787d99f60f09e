"""Where files live: on disk, or in a bucket (`gs://`, `s3://`).

A place is a `pathlib.Path` on disk, and an `etils.epath.Path` in a bucket, which has the same methods. A bucket has no
folders, no renames and no locks: an object appears whole or not at all, and whoever writes last wins.
What looks like an address and is of no store that is known is refused before anything is made: as a path it
would become a local folder of that name.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from clipjax.errors import ClipjaxError, Unavailable, did_you_mean

log = logging.getLogger(__name__)
T = TypeVar("T")
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""Scheme of an address -> (the package that speaks to the store, the extra of clipjax that brings it)."""
COMMITTED = "commit_success.txt"
"""What Orbax writes last into a checkpoint in a bucket, where nothing can be renamed."""
CLIENTS = {"aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "requests", "urllib3"}
"""Packages that speak to stores: what they raise says nothing of what is stored."""
PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ECONNRESET,
    errno.ENETUNREACH,
}
PASSING_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "Input/output error",
                 "Stale file handle", "Connection ")  # fmt: skip
TRIES = 5
SPOOL_SECONDS = 30.0
SPOOL_RATE = 1e6  # bytes per second that copying a growing file again and again may take


def place(path: str | os.PathLike[str]) -> Path:
    """What a user's path means.

    Args:
      path: a path on disk, or an address. `pathlib` turns `gs://b` into `gs:/b`; both are read alike.

    Raises:
      ClipjaxError: an address of an unknown scheme, or of one whose client is not installed.
    """
    text = os.fspath(path)
    address = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", text)
    if address is None:
        return Path(text)
    scheme, rest = address[1].lower(), text[address.end() :].strip("/")
    if is_hub(text):
        raise ClipjaxError(
            f"{text}: models are read from hf://, and nothing else is; give a path on disk, gs:// or s3://"
        )
    if scheme not in SCHEMES:
        raise ClipjaxError(
            f"{text}: there is no store {scheme}:// here; give a path on disk, gs:// or s3://"
            + (did_you_mean(scheme, SCHEMES) if len(scheme) < 5 else "")
        )
    client, extra = SCHEMES[scheme]
    if importlib.util.find_spec(client) is None:
        raise ClipjaxError(
            f"{text}: speaking to {scheme}:// takes the package {client}: pip install 'clipjax[{extra}]'"
        )
    if not rest:
        raise ClipjaxError(f"{text}: name a bucket, and a folder in it")
    _see_what_others_write()
    from etils import epath

    return cast(Path, epath.Path(f"{scheme}://{rest}"))


def is_hub(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address on the Hugging Face Hub, where models are read from (`hub.snapshot`)."""
    return os.fspath(path).lower().startswith("hf:/")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a place is in a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def absolute(path: Path) -> Path:
    """The place by its full name."""
    return path if is_remote(path) else path.absolute()


def remove_tree(path: Path) -> None:
    """Removes a folder and all that is in it, if it is there."""
    if is_remote(path):
        persistent(f"removing {path}", lambda: _remove_objects(path))
    else:
        shutil.rmtree(path, ignore_errors=True)


def move_tree(source: Path, target: Path) -> None:
    """Moves a folder; in a bucket object by object, and first what says that it is complete."""
    if not is_remote(source):
        source.rename(target)
        return
    store = client(source)
    names = [name for name in store.find(str(source)) if not name.endswith("/")]
    root = str(source).split("://")[1].rstrip("/") + "/"
    for name in names:
        goal = f"{str(target).split('://')[1]}/{name.removeprefix(root)}"
        persistent(f"copying {name}", lambda name=name, goal=goal: store.copy(name, goal))  # type: ignore[misc]
    names.sort(key=lambda name: not name.endswith("/" + COMMITTED))
    for name in names:
        # A request whose answer is lost is sent again, and then there is nothing there.
        with contextlib.suppress(FileNotFoundError):
            persistent(f"removing {name}", lambda name=name: store.rm_file(name))  # type: ignore[misc]
    store.invalidate_cache()


def _remove_objects(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        cast(Any, path).rmtree()
    if path.exists():
        raise OSError(f"{path} is still there")


def client(path: Path) -> Any:
    """The fsspec file system behind a place in a bucket."""
    return cast(Any, path)._backend.fs(os.fspath(path))


def persistent(what: str, call: Callable[[], T]) -> T:
    """Calls again, after a pause that grows, what a store may refuse once; the clients try a few times on their own.

    Raises:
      Unavailable: it was refused every time.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except (
            FileNotFoundError,
            FileExistsError,
            PermissionError,
            IsADirectoryError,
            ClipjaxError,
        ):
            raise
        except Exception as error:  # every client has its own
            if attempt == TRIES - 1:
                text = (str(error).splitlines() or [type(error).__name__])[0][:200]
                raise Unavailable(f"{what} failed {TRIES} times: {text}") from error
            log.info("%s: %s; trying again", what, type(error).__name__)
            time.sleep(0.5 * 2**attempt)
    raise AssertionError


def read_bytes(path: Path) -> bytes:
    """What a file holds.

    Raises:
      Unavailable: a store does not give it now; that is not to be taken for a file that is not there.
    """
    return persistent(f"reading {path}", path.read_bytes) if is_remote(path) else path.read_bytes()


def passes(error: BaseException) -> bool:
    """Whether an error of reading is the mood of a store or network file system rather than the file's damage."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FileNotFoundError):
        if (
            (isinstance(cause, OSError) and cause.errno in PASSING)
            or type(cause).__module__.split(".")[0] in CLIENTS
            or any(word in str(cause) for word in PASSING_WORDS)
        ):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@contextlib.contextmanager
def fetched(path: Path) -> Iterator[Path]:
    """A place as files on disk: itself, or a copy that is gone when the context ends.

    Raises:
      Unavailable: it cannot be copied.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="clipjax-") as scratch:
        copy = Path(scratch) / path.name
        store = client(path)
        if path.is_dir():
            root = str(path).split("://")[1].rstrip("/") + "/"
            for name in store.find(str(path)):
                if not name.endswith("/"):
                    _fetch(store, name, copy / name.removeprefix(root))
        elif path.exists():
            _fetch(store, str(path), copy)
        yield copy


@contextlib.contextmanager
def delivered(path: Path, last: str | None = None) -> Iterator[Path]:
    """A folder on disk to write into: the place itself, or one that is copied there when the context ends well.

    Args:
      path: where it goes.
      last: the file that says that the folder is complete.
    """
    if not is_remote(path):
        yield path
        return
    if path.exists():
        raise ClipjaxError(f"{path} exists: name a new folder")
    with tempfile.TemporaryDirectory(prefix="clipjax-") as scratch:
        folder = Path(scratch) / path.name
        yield folder
        copy_tree(folder, path, last)


def copy_tree(folder: Path, target: Path, last: str | None = None) -> None:
    """Copies a folder on disk into a bucket, the file named `last` at the end."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == last):
        _deliver(file, target / file.relative_to(folder).as_posix())


class Spool:
    """A folder whose files grow: itself on disk; for a bucket one on disk, copied there now and then.

    What is on disk only, because the machine was lost, is at most what was written since the last `flush`.
    Use as a context manager.
    """

    def __init__(self, folder: Path, names: tuple[str, ...] = ()):
        """Nothing is copied before `__enter__`.

        Args:
          folder: the place.
          names: files in it to go on with.
        """
        self._target, self._names = folder, names
        self._copied: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.folder = folder
        """Where to write: on disk."""

    def __enter__(self) -> Spool:
        if is_remote(self._target):
            self.folder = Path(tempfile.mkdtemp(prefix="clipjax-")) / self._target.name
            self.folder.mkdir()
            for name in self._names:
                source = self._target / name
                if source.exists():
                    _fetch(client(source), str(source), self.folder / name)
            self._changed()  # these are there
            threading.Thread(target=self._work, daemon=True, name="spool").start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder != self._target:
            self._over.set()
            try:
                self.flush()
            finally:
                shutil.rmtree(self.folder.parent, ignore_errors=True)

    def flush(self) -> None:
        """Copies what has changed.

        Raises:
          Unavailable: the store does not take it.
        """
        if self.folder != self._target:
            with self._lock:
                for file in self._changed():
                    _deliver(file, self._target / file.relative_to(self.folder).as_posix())

    def _changed(self) -> list[Path]:
        """The files that are other than at the last call."""
        changed = []
        for file in sorted(self.folder.rglob("*")):
            if file.is_file():
                status = file.stat()
                now = (status.st_size, status.st_mtime_ns)
                if self._copied.get(file) != now:
                    self._copied[file] = now
                    changed.append(file)
        return changed

    def _work(self) -> None:
        while not self._over.wait(
            max(SPOOL_SECONDS, sum(s for s, _ in self._copied.values()) / SPOOL_RATE)
        ):
            try:
                self.flush()
            except Exception as error:
                log.warning("%s: figures are late there (%s)", self._target, error)
                self._copied.clear()


def _fetch(store: Any, source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)

    def fetch() -> None:
        size = store.info(source)["size"]
        store.get_file(source, str(target))
        if target.stat().st_size != size:
            raise OSError(f"{source}: {target.stat().st_size} of {size} bytes came")

    persistent(f"reading {source}", fetch)


def _deliver(file: Path, target: Path) -> None:
    persistent(f"writing {target}", lambda: client(target).put_file(str(file), str(target)))


def _see_what_others_write() -> None:
    """The clients keep listings of buckets; other processes and machines write into them too."""
    from fsspec.config import conf

    for protocol in ("gs", "gcs", "s3", "s3a"):
        conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
