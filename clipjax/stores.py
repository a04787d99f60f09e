"""Where a run's files live: on disk, or on a store that is not one.

A place is a `pathlib.Path` on disk. What looks like an address (`scheme://...`) and is none that is known is
refused before anything is made: as a path it would become a local folder of that name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from clipjax.errors import ClipjaxError, did_you_mean

SCHEMES: dict[str, str] = {}
"""Scheme of an address -> the extra of clipjax that brings its client."""


def place(path: str | os.PathLike[str]) -> Path:
    """What a user's path means.

    Args:
      path: a path on disk, or an address. `pathlib` turns `a://b` into `a:/b`; both are read alike.

    Raises:
      ClipjaxError: an address of an unknown scheme.
    """
    text = os.fspath(path)
    address = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
    if address is None:
        return Path(text)
    scheme = address[1].lower()
    raise ClipjaxError(
        f"{text}: there is no store {scheme}:// here; give a path on disk"
        + did_you_mean(scheme, SCHEMES)
    )
