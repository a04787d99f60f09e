"""`clipjax bench data`: pictures a second and core, from JPEG to the batch, beside plain Pillow."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from clipjax.component import Component
from clipjax.data.sources import Source
from clipjax.errors import ClipjaxError

ROUNDS = 9  # of which each picture's best counts: other work on the machine only ever slows down


@dataclasses.dataclass(frozen=True)
class DataBench(Component):
    """Photographs, decoded and cropped in one thread: by clipjax, and by Pillow as one would write it (open,
    convert, resize of a box, to NumPy); then a source of tiny pictures through the loader."""

    folder: str | None = None
    """A folder of pictures, which are brought to each of the sizes; default: made-up ones. How much there is
    to win depends on the pictures: the fewer bytes a pixel has, the more."""

    sizes: tuple[tuple[int, int], ...] = ((500, 375), (1024, 768), (2048, 1536))
    """Width and height of the photographs, in pixels."""
    image_size: int = 224
    """Pixels of the result."""
    scale: tuple[float, float] = (0.9, 1.0)
    """Share of the area that a crop has, as in RandomResizedCrop."""
    quality: int = 85
    """Of the JPEG files."""
    pictures: int = 8
    """Photographs of each size."""
    tiny: int = 64
    """Pixels of the pictures that go through the loader."""
    num_threads: int = 1
    """Threads of that loader."""
    num_workers: int = 2
    """Worker processes of a second one; 0 leaves it out."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self):
        for name in ("image_size", "pictures", "tiny", "num_threads"):
            if getattr(self, name) < 1:
                raise ClipjaxError(f"bench data: {name}={getattr(self, name)} must be positive")

    def run(self) -> dict[str, Any]:
        """Measures, prints and returns what the JSON object holds."""
        results: dict[str, Any] = {}
        for width, height in self.sizes:
            found = results[f"{width}x{height}"] = self._measure(width, height)
            print(
                f"{width} x {height}: {found['images_per_second']:,.0f} images/s a core, "
                f"{found['ratio']:.2f} times Pillow's {found['pillow_images_per_second']:,.0f}; mean "
                f"difference {found['mean_difference']:.2f} of 255; {found['bytes_per_pixel']:.2f} bytes a "
                "pixel"
            )
        loader = results["loader"] = {"threads": self._loader(0)}
        print(
            f"loader, {self.tiny} x {self.tiny} PNG: {loader['threads']:,.0f} samples/s with "
            f"{self.num_threads} threads"
        )
        if self.num_workers:
            loader["workers"] = self._loader(self.num_workers)
            print(f"  {loader['workers']:,.0f} with {self.num_workers} workers")
        if self.json:
            print(json.dumps(results))
        return results

    def _measure(self, width: int, height: int) -> dict[str, float]:
        from PIL import Image

        from clipjax.data.augment import RandomResizedCrop, Resize, augmented_jpeg
        from clipjax.data.images import Jpeg

        crop, size = RandomResizedCrop(self.scale), self.image_size
        files = self._files(width, height)

        def plain(content: bytes, seed: int) -> np.ndarray:
            picture = Image.open(io.BytesIO(content)).convert("RGB")
            box = crop.window(picture.height, picture.width, size, np.random.default_rng(seed))
            return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box))

        def ours(content: bytes, seed: int) -> np.ndarray:
            jpeg = Jpeg.of(content)
            if jpeg is None:
                raise ClipjaxError("bench data: simplejpeg is not installed")
            made = augmented_jpeg(jpeg, (crop,), Resize(), size, np.random.default_rng(seed))
            assert made is not None
            return made[0]

        differences = [
            np.abs(ours(content, i).astype(int) - plain(content, i)).mean()
            for i, content in enumerate(files)
        ]
        # In turns, so that what else the machine does falls on both alike.
        seconds = np.array([(_seconds(ours, files), _seconds(plain, files)) for _ in range(ROUNDS)])
        mine, pillows = seconds.min(0).mean(1).tolist()
        return {
            "images_per_second": 1 / mine,
            "pillow_images_per_second": 1 / pillows,
            "ratio": pillows / mine,
            "mean_difference": float(np.mean(differences)),
            "bytes_per_pixel": float(np.mean([len(content) for content in files]))
            / (width * height),
        }

    def _files(self, width: int, height: int) -> list[bytes]:
        from PIL import Image, ImageOps

        from clipjax.data.folder import find_pictures
        from clipjax.data.images import decode

        if self.folder is None:
            rng = np.random.default_rng(0)
            return [photograph(width, height, rng, self.quality) for _ in range(self.pictures)]
        names, _ = find_pictures(self.folder)
        if not names:
            raise ClipjaxError(f"bench data: the folder {self.folder!r} holds no picture")
        files = []
        for name in names[: self.pictures]:
            picture = Image.fromarray(decode(os.path.join(self.folder, name), name))
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
            files.append(_jpeg(picture, self.quality))
        return files

    def _loader(self, num_workers: int) -> float:
        """Samples a second."""
        from clipjax.data import BPE, Data, Flip

        data = Data(
            Tiny(self.tiny),
            image_size=self.tiny,
            batch_size=256 * max(num_workers, 1),
            context_length=32,
            augment=(Flip(),),
            num_threads=1 if num_workers else self.num_threads,
            num_workers=num_workers,
        )
        loader = data.build(BPE(300).build(["a small picture"]), seed=0)
        with contextlib.closing(loader.iterate()) as batches:
            for _ in range(data.prefetch + 2):
                next(batches)
            began, count = time.perf_counter(), 24
            for _ in range(count):
                next(batches)
            return count * data.batch_size / (time.perf_counter() - began)


def _seconds(make: Callable[[bytes, int], np.ndarray], files: list[bytes]) -> list[float]:
    """Of each file, CPU seconds of one thread."""
    times = [time.thread_time()]
    for i, content in enumerate(files):
        make(content, i)
        times.append(time.thread_time())
    return np.diff(times).tolist()


def photograph(width: int, height: int, rng: np.random.Generator, quality: int) -> bytes:
    """A JPEG file of noise whose amplitudes fall with the frequency.

    They fall a little steeper than those of photographs, which have flat places that noise has not:
    so a file has as many bytes a pixel as photographs have at the same quality (85: about 0.25).
    """
    from PIL import Image

    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falling = np.maximum(np.hypot(y, x), 1 / max(height, width)) ** -1.4
    noise = rng.standard_normal((3, *falling.shape)) + 1j * rng.standard_normal((3, *falling.shape))
    planes = np.fft.irfft2(noise * falling, (height, width))
    # Colors of a photograph mostly rise and fall together.
    planes = planes[:1] + 0.3 * planes
    planes = 128 + 50 * (planes - planes.mean()) / planes.std()
    pixels = np.moveaxis(planes, 0, -1).clip(0, 255).astype(np.uint8)
    return _jpeg(Image.fromarray(pixels), quality)


def _jpeg(picture: Any, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Tiny(Source):
    """Small PNG files with a caption."""

    size: int = 64
    """Pixels."""

    def open(self):
        from PIL import Image

        rng = np.random.default_rng(0)
        files = []
        for _ in range(64):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, (self.size, self.size, 3), np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            files.append(buffer.getvalue())
        caption = ("a small picture of noise",)
        return [
            {"image": files[i % 64], "captions": caption, "id": i, "key": str(i)}
            for i in range(4096)
        ]
