"""What becomes a text: strings as scraped, lists of them, values that are none."""

from __future__ import annotations

import math
from typing import Any

from clipjax.data.sources import UnreadableRecord


def encodable(text: str) -> str:
    """A text without lone surrogates, which no encoding has: halves of a pair are joined, others become U+FFFD.

    JSON brings them (`"\\ud83d"`), and names of files and arguments that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def as_texts(value: Any, what: str) -> tuple[str, ...]:
    """The texts of a table's or a JSON file's value: one, several in a list, or none (null, NaN).

    Raises:
      UnreadableRecord: it is something else; the message begins with `what`.
    """
    if isinstance(value, list):
        return tuple(text for item in value for text in _as_text(item, what))
    return _as_text(value, what)


def at_path(value: Any, path: str) -> Any:
    """What a path such as "scores.clip" leads to in nested dicts; None where it leads nowhere.

    Raises:
      TypeError: the value is no dict.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} is no JSON object")
    if path in value:
        return value[path]
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _as_text(value: Any, what: str) -> tuple[str, ...]:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, str):
        return (encodable(value),)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (str(value),)
    raise UnreadableRecord(f"{what} is {type(value).__name__}, neither a text nor a list of texts")
