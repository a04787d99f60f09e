"""Text files as people write them: UTF-8, with or without a byte-order mark, a line a line feed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipjax.errors import ClipjaxError


def read_text(path: str | Path, what: str = "the file") -> str:
    """A file's text.

    Args:
      path: the file.
      what: how the message calls it.

    Raises:
      ClipjaxError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ClipjaxError(
            f"{what} {str(path)!r} is not readable: {error.strerror or error}"
        ) from error
    except ValueError as error:
        raise ClipjaxError(
            f"{what} {str(path)!r} is not readable as UTF-8 text ({error})"
        ) from error


def lines(text: str) -> list[str]:
    """The lines of a text, without white space around them; empty ones are kept as "".

    Only line feeds (after a carriage return or not) end a line: what else Unicode calls a line break
    may stand within a caption.
    """
    return [line.strip() for line in text.split("\n")]


def read_lines(path: str | Path, what: str = "the file") -> list[str]:
    """The lines of a file that are not empty.

    Raises:
      ClipjaxError: the file cannot be read, or has none.
    """
    found = [line for line in lines(read_text(path, what)) if line]
    if not found:
        raise ClipjaxError(f"{what} {str(path)!r} is empty")
    return found


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
      ClipjaxError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ClipjaxError(f"{path} is not JSON ({error})") from error
