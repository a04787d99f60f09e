"""Pictures inside an HTML file: data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np


def picture_uri(image: np.ndarray, side: int = 144) -> str:
    """A picture as a data URI, shrunk to at most `side` pixels; PNG when small, else JPEG.

    Args:
      image: uint8 [H, W, 3].
      side: largest height or width.
    """
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    if max(picture.size) <= 96:
        return _uri(picture, "png", optimize=True)
    return _uri(picture, "jpeg", quality=88)


def strip_uri(images: np.ndarray, side: int = 36) -> str:
    """n pictures below each other as one data URI, each `side` pixels square.

    Args:
      images: uint8 [n, H, W, 3].
      side: pixels.
    """
    from PIL import Image

    strip = Image.new("RGB", (side, side * len(images)), "white")
    for i, image in enumerate(images):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        strip.paste(small, (0, i * side))
    return _uri(strip, "jpeg", quality=88)


def heat_uri(scores: np.ndarray, low: float, high: float, color: tuple[int, int, int]) -> str:
    """A matrix as a data URI of one pixel a score: `color`, as opaque as the score is high.

    Opacity instead of a second color lets the picture lie on a light or a dark page.

    Args:
      scores: [n, m].
      low: score that is fully transparent, as all below it are.
      high: score that is opaque, as all above it are.
      color: red, green, blue.
    """
    from PIL import Image

    alpha = np.clip((scores - low) / max(high - low, 1e-9), 0.0, 1.0)
    pixels = np.empty((*scores.shape, 4), np.uint8)
    pixels[..., :3] = color
    pixels[..., 3] = np.round(255 * alpha)
    return _uri(Image.fromarray(pixels, "RGBA"), "png")


def _uri(picture, kind: str, **options) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind.upper(), **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
