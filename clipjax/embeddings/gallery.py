"""Pictures found, as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.data.images import decode
from clipjax.data.sources import RandomAccess
from clipjax.embeddings.folder import Hit
from clipjax.errors import ClipjaxError

THUMBNAIL = 384
"""Greatest width and height of a picture in the gallery, in pixels."""


def write_gallery(
    out: str | Path,
    source: str,
    pictures: RandomAccess,
    words: str,
    hits: Sequence[Hit],
    model: str,
) -> Path:
    """Writes the pictures that words found, replacing the file in one go.

    Args:
      out: file to write.
      source: what was searched, as the page calls it.
      pictures: what the hits' indices are of.
      words: what was searched for.
      hits: the pictures, the best first.
      model: what to call the model.

    Raises:
      ClipjaxError: the file cannot be written.
    """
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("clipjax.embeddings", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scores = [hit.score for hit in hits]
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    page = templates.get_template("gallery.html").render(
        words=words,
        source=source,
        model=model,
        total=len(pictures),
        hits=[
            {
                "name": hit.name,
                "file": hit.file,
                "score": hit.score,
                # Cosines of a list of results differ little: the bar runs from its last to its first.
                "share": 0.08 + 0.92 * (hit.score - low) / max(high - low, 1e-9),
                "picture": _thumbnail(pictures[hit.index]["image"], hit.name),
            }
            for hit in hits
        ],
    )
    out = Path(out)
    scratch = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(page, encoding="utf-8", errors="replace")
        os.replace(scratch, out)
    except OSError as error:
        raise ClipjaxError(f"{out}: {error.strerror}") from error
    return out


def _thumbnail(image: Any, name: str) -> str:
    """A data URI. Encoded anew: nothing of the file but its pixels comes into the page."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(decode(image, name)))
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
