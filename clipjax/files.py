"""Files that come into being whole: a kill or a full disk leaves the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from pathlib import Path

from clipjax.stores import is_remote, persistent, place, read_bytes

TEMPORARY = ".tmp"
"""How the names of files end that are not whole yet."""


def replace_file(path: str | Path, content: str | bytes) -> None:
    """Writes a file in one rename.

    Args:
      path: its folder must exist. In a bucket it is written as one object.
      content: text is written as UTF-8.

    Raises:
      OSError: it cannot be written; what was there is as it was.
    """
    path = place(path)
    content = content.encode("utf-8", "replace") if isinstance(content, str) else content
    if is_remote(path):  # an object appears whole or not at all
        persistent(f"writing {path}", lambda: path.write_bytes(content))
        return
    temporary = scratch(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave an empty file under the new name
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def append_line(path: Path, line: str) -> None:
    """Adds a line at the end of a file that nobody else writes to; in a bucket by writing all of it again."""
    if is_remote(path):
        with contextlib.suppress(FileNotFoundError):
            line = read_bytes(path).decode() + line
        replace_file(path, line + "\n")
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def scratch(path: Path) -> Path:
    """A name beside `path` that no other writer has, also on a shared folder.

    In containers every process has the same number, so the host and a random part are in it too.
    """
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:40]
    unique = f"{host}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f"{path.name}.{unique}{TEMPORARY}")
