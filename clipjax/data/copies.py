"""Copies on disk of files at addresses: whole or absent, no more than a number of bytes, the oldest go first."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path

from clipjax.data.reading import Files, is_address, state_of
from clipjax.errors import ClipjaxError
from clipjax.files import TEMPORARY, scratch

logger = logging.getLogger(__name__)

PART = 1 << 24
"""Bytes that are fetched at once."""
SPARED = 600.0
"""Seconds since its last use before a copy may go: another process may be reading it."""


class Copies:
    """Where files are read from. The folder may be shared by any processes of a host."""

    def __init__(self, folder: str | None, gigabytes: float, needed: bool):
        """Args:
        folder: where copies are kept; None: in a folder of this process, if at all.
        gigabytes: bytes of all copies in the folder / 1e9, at most.
        needed: whether files at addresses must be copied to be read at all.
        """
        self._most = gigabytes * 1e9
        self._copying = needed or (folder is not None and gigabytes > 0)
        self._own: tempfile.TemporaryDirectory | None = None
        if folder is None and needed:
            self._own = tempfile.TemporaryDirectory(prefix="clipjax-")
            folder = self._own.name
        self._folder = Path(folder or "").expanduser()
        self._files = Files()

    def copies(self, address: str) -> bool:
        """Whether a file is read from a copy."""
        return self._copying and is_address(address)

    def there(self, address: str) -> bool:
        """Whether a file's copy is there, where it has one; then it counts as used."""
        if not self.copies(address):
            return True
        try:
            os.utime(self._place(address))
            return True
        except FileNotFoundError:
            return False

    def path(self, address: str) -> str:
        """Where to read a file from; its copy is made if it is not there.

        Raises:
          UnreadableRecord: it cannot be read.
          ClipjaxError: it is not there, or the copy cannot be written.
        """
        if not self.copies(address):
            return address
        place = self._place(address)
        if not self.there(address):
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                self._fetch(address, place)
            except OSError as error:
                raise ClipjaxError(
                    f"{address} cannot be copied to {place.parent} ({error.strerror or error}): set "
                    "Stream.cache_dir to a folder with room, and cache_gb to how much"
                ) from error
        return str(place)

    def _place(self, address: str) -> Path:
        # Of the same base name, which messages and keys have.
        mark = hashlib.sha256(address.encode(errors="replace")).hexdigest()[:16]
        return self._folder / "copies" / mark / address.rpartition("/")[2]

    def _fetch(self, address: str, place: Path) -> None:
        size = state_of(address).size
        self._make_room(size, place.parent.parent)
        temporary = scratch(place)
        try:
            with temporary.open("xb") as out:
                for offset in range(0, size, PART):
                    name = f"{place.name}: from byte {offset:,} on"
                    out.write(self._files.read(address, offset, min(PART, size - offset), name))
            os.replace(temporary, place)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _make_room(self, size: int, folder: Path) -> None:
        """Removes the copies that were not used for longest, as far as it takes."""
        there = []
        for file in folder.glob("*/*"):
            with contextlib.suppress(OSError):
                stat = file.stat()
                there.append((stat.st_mtime, stat.st_size, file))
        used = sum(found[1] for found in there)
        now = time.time()
        for when, bytes_of, file in sorted(there):
            spared = 86400.0 if file.name.endswith(TEMPORARY) else SPARED
            if used + size <= self._most or now - when < spared:
                break
            with contextlib.suppress(OSError):
                file.unlink()  # its folder stays: another thread may be about to write there
            used -= bytes_of
        if used + size > self._most:
            logger.warning(
                "the copies in %s take %.1f GB, more than cache_gb: all are in use",
                *(folder, (used + size) / 1e9),
            )
