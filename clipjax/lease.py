"""Keeping others out of a folder where the operating system has no lock: in a bucket, or on some network file systems.

A lease is an object that its holder writes again and again. It is numbered: whoever makes the next number, which only
one can, has it. One that has not changed for its whole term has no holder any more; nobody's clock matters for that,
since whoever wants it watches it for so long.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from clipjax.errors import EXIT_UNAVAILABLE
from clipjax.processes import seconds_of
from clipjax.stores import client, is_remote, persistent

log = logging.getLogger(__name__)
FOLDER = ".lease"
LEASE_SECONDS = "CLIPJAX_LEASE_SECONDS"
"""Environment variable: the term; a run whose machine was lost is taken over after it. Default 90."""


@contextlib.contextmanager
def leased(folder: Path) -> Iterator[str]:
    """Holds the lease of a folder; gives a word for its holder. A process that loses it ends at once.

    Raises:
      BlockingIOError: another process has it.
    """
    lease = Lease(folder)
    lease.take()
    try:
        yield lease.holder
    finally:
        lease.release()


class Lease:
    """The lease of one folder."""

    def __init__(self, folder: Path):
        self._folder = folder / FOLDER
        self._term = seconds_of(os.environ, LEASE_SECONDS, 90)
        self._over = threading.Event()
        self._number, self._beat = 0, 0
        self._renewing = threading.Thread(target=self._renew, daemon=True, name="lease")
        self.holder = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"

    def take(self) -> None:
        """Takes the lease, once its last holder has let go of it or been silent for the whole term.

        Raises:
          BlockingIOError: another process has it.
        """
        if not is_remote(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        number = max(self._numbers(), default=0)
        if number:
            self._wait_for_silence(number)
        if not self._create(number + 1):
            raise BlockingIOError("another process was faster")
        self._number = number + 1
        for old in self._numbers():
            if old < self._number:
                self._remove(old)
        self._renewing.start()

    def release(self) -> None:
        """Lets go of it."""
        self._over.set()
        self._renewing.join(self._term / 5)  # a beat under way would make the object again
        self._remove(self._number)

    def _wait_for_silence(self, number: int) -> None:
        before, began = self._read(number), time.monotonic()
        if before is None:
            return
        who = before.split('"')[3]
        log.info("%s is held by %s; listening %d s", self._folder.parent, who, self._term)
        while time.monotonic() - began < self._term:
            time.sleep(self._term / 20)
            now = self._read(number)
            if now is None:
                return
            if now != before or max(self._numbers(), default=0) > number:
                raise BlockingIOError(f"held by {now}")

    def _renew(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._term / 5):
            try:
                if max(self._numbers(), default=0) > self._number:
                    self._end("another process has taken it over")
                self._beat += 1
                self._write(self._number)
                last = time.monotonic()
            except Exception as error:
                log.warning("the lease of %s could not be renewed: %s", self._folder.parent, error)
            if time.monotonic() - last > self._term * 0.9:
                self._end(f"the store has not answered for {time.monotonic() - last:.0f} s")

    def _end(self, why: str) -> None:
        if self._over.is_set():
            return
        with contextlib.suppress(OSError, ValueError):
            print(
                f"clipjax: the lease of {self._folder.parent} is lost ({why}): this process must not write there any "
                f"more and ends; what was saved is safe. {LEASE_SECONDS} sets the term",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        os._exit(EXIT_UNAVAILABLE)

    def _content(self) -> bytes:
        return json.dumps({"holder": self.holder, "beat": self._beat}).encode()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}"

    def _numbers(self) -> list[int]:
        def numbers() -> list[int]:
            return [int(p.name) for p in self._folder.iterdir() if p.name.isdigit()]

        try:
            return persistent(f"looking into {self._folder}", numbers)
        except FileNotFoundError:
            return []

    def _read(self, number: int) -> str | None:
        try:
            return persistent(f"reading {self._path(number)}", self._path(number).read_text)
        except FileNotFoundError:
            return None

    def _create(self, number: int) -> bool:
        """Makes the object of this number, which only one process can."""
        path, content = self._path(number), self._content()

        def create() -> None:
            if is_remote(path):
                client(path).pipe_file(os.fspath(path), content, mode="create")
            else:
                with path.open("xb") as file:
                    file.write(content)

        with contextlib.suppress(FileExistsError):
            persistent(f"writing {path}", create)
        # What was there already may be ours: the answer to our own first attempt may have been lost.
        return self._read(number) == content.decode()

    def _write(self, number: int) -> None:
        path = self._path(number)
        if is_remote(path):
            content = self._content()
            persistent(f"writing {path}", lambda: client(path).pipe_file(os.fspath(path), content))
        else:
            path.write_bytes(self._content())

    def _remove(self, number: int) -> None:
        path = self._path(number)

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

        with contextlib.suppress(Exception):  # it runs out by itself
            persistent(f"removing {path}", remove)
