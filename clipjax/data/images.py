"""Decoding: bytes, a path, a Pillow picture or pixels in; uint8 RGB out, or one error that names the record.

JPEG goes through libjpeg-turbo (simplejpeg) where it is there, without a copy and, where less is
wanted, at a fraction of the size; everything else, and whatever that cannot read, through Pillow.
What training resizes goes through cykooz_resizer where it is there: Pillow's filters, vectorized.
"""

from __future__ import annotations

import functools
import io
import math
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from clipjax.data.reading import read_file
from clipjax.data.sources import UnreadableRecord

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000
"""Pictures with more pixels than this are refused unread: a small file can hold a huge picture."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What is decoded, by content, whatever a file's name says. Pillow knows more, among them formats
that it hands to other programs (EPS to Ghostscript), which a stranger's file must not choose."""


def decode(
    image: bytes | str | os.PathLike[str] | np.ndarray | Image.Image,
    name: str = "image",
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decodes one picture to RGB.

    Transparency is composited on white, palettes and gray are expanded, CMYK is converted, and the
    EXIF orientation is applied. Of an animation, the first frame counts.

    Args:
      image: encoded bytes, a path, a Pillow picture, or pixels: uint8 [H, W], [H, W, 1], [H, W, 3]
        or [H, W, 4].
      name: what to call the picture in an error.
      max_pixels: largest width x height accepted.

    Returns:
      uint8 [H, W, 3].

    Raises:
      UnreadableRecord: it is missing, damaged, not a picture, or too large.
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        return _from_pixels(image, name)
    if isinstance(image, (str, os.PathLike)):
        image = read_file(image, name)
    file: Any = image
    if isinstance(image, bytes):
        jpeg = Jpeg.of(image, max_pixels)
        pixels = None if jpeg is None else jpeg.decode()
        if pixels is not None:
            return pixels
        file = io.BytesIO(image)
    elif not isinstance(image, Image.Image):
        raise UnreadableRecord(
            f"{name}: an image must be bytes, a path, a Pillow picture or a uint8 array, not "
            f"{type(image).__name__}"
        )
    try:
        if isinstance(file, Image.Image):
            return _checked(file, name, max_pixels)
        with Image.open(file, formats=FORMATS) as picture:
            return _checked(picture, name, max_pixels)
    except UnreadableRecord:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableRecord(f"{name}: not an image in a known format") from error
    except Image.DecompressionBombError as error:
        raise UnreadableRecord(
            f"{name}: more pixels than the limit of {max_pixels:,} ({error})"
        ) from error
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableRecord(f"{name}: the image does not decode ({reason})") from error


class Jpeg:
    """A JPEG file of which only the header has been read.

    Attributes:
      height, width: of the upright picture, in pixels.
    """

    def __init__(self, content: bytes, height: int, width: int, orientation: int):
        self._content, self._orientation = content, orientation
        self.height, self.width = (width, height) if orientation > 4 else (height, width)

    @classmethod
    def of(cls, content: bytes, max_pixels: int = MAX_PIXELS) -> Jpeg | None:
        """The picture in a file; None where it is no JPEG that libjpeg-turbo alone can decode to RGB."""
        if not content.startswith(b"\xff\xd8") or _simplejpeg() is None:
            return None
        try:
            height, width, colors, _ = _simplejpeg().decode_jpeg_header(content)
            orientation = _orientation(content)
        except Exception:  # damaged: Pillow says how
            return None
        if colors not in ("YCbCr", "RGB", "Gray") or height * width > max_pixels:
            return None
        return cls(content, height, width, orientation)

    def decode(self, eighths: int = 8) -> np.ndarray | None:
        """The pixels, uint8 [H, W, 3]; None where the file is damaged.

        Args:
          eighths: 1, 2, 4 or 8 eighths of the size, rounded up to whole pixels, are decoded. 8 is the whole
            picture, the same pixels as Pillow's. (libjpeg-turbo is slower at the others than at twice the size.)
        """
        options = {}
        if eighths < 8:
            height, width = (self.height, self.width)
            if self._orientation > 4:
                height, width = width, height
            least = (-(-height * eighths // 8), -(-width * eighths // 8))
            options = {"min_height": least[0], "min_width": least[1]}
        try:
            pixels = _simplejpeg().decode_jpeg(self._content, "RGB", strict=True, **options)
        except Exception:  # damaged, or an unusual kind: Pillow says what it is, or reads it
            return None
        return _UPRIGHT[self._orientation](pixels)


_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}
"""By EXIF orientation, how the picture is turned upright."""


def _orientation(content: bytes) -> int:
    """The EXIF orientation of a JPEG file, 1 where it has none."""
    if not any(
        segment.startswith(b"Exif\0") or b"Orientation" in segment  # in XMP
        for segment in _application_segments(content)
    ):
        return 1
    from PIL import ExifTags, Image

    with Image.open(io.BytesIO(content), formats=("JPEG", "MPO")) as picture:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in _UPRIGHT else 1


def _application_segments(content: bytes) -> Iterator[bytes]:
    """What applications wrote into a JPEG file's header: the segments APP1, which hold EXIF and XMP."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        mark = content[at + 1]
        if mark == 0xDA:  # the picture begins
            return
        if mark == 0xFF:  # filling
            at += 1
            continue
        size = int.from_bytes(content[at + 2 : at + 4])
        if mark == 0xE1:
            yield content[at + 4 : at + 2 + size]
        at += 2 + size


@functools.cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
    method: str = "bicubic",
) -> np.ndarray:
    """Antialiased resize of a picture, or of a box in it.

    Args:
      image: uint8 [H, W, 3].
      size: (height, width) of the result.
      box: (left, top, right, bottom) in pixels of `image`; None is all of it.
      method: bicubic or bilinear.

    Returns:
      uint8 [height, width, 3].
    """
    from PIL import Image

    height, width = size
    if box is None and image.shape[:2] == (height, width):
        return image
    resample = Image.Resampling[method.upper()]
    resized = Image.fromarray(image).resize((width, height), resample, box=box)
    return np.asarray(resized)


def resize_fast(
    image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]
) -> np.ndarray:
    """`resize` with the bicubic filter, several times as fast where cykooz_resizer is there.

    It rounds otherwise: 0.2 of 255 in the mean, a few of 255 at most.
    """
    library = _cykooz_resizer()
    if library is None:
        return resize(image, size, box)
    height, width = size
    left, top, right, bottom = box
    # The box, and what the filter reaches around it, is all that is copied.
    reach_x = 2 + math.ceil(2 * max((right - left) / width, 1))
    reach_y = 2 + math.ceil(2 * max((bottom - top) / height, 1))
    first_x, first_y = max(int(left) - reach_x, 0), max(int(top) - reach_y, 0)
    part = image[first_y : math.ceil(bottom) + reach_y, first_x : math.ceil(right) + reach_x]
    source = library.ImageData(part.shape[1], part.shape[0], library.PixelType.U8x3, part.tobytes())
    made = library.ImageData(width, height, library.PixelType.U8x3)
    # Rounding must not lead out of the picture.
    left, top = left - first_x, top - first_y
    crop = library.CropBox(
        left,
        top,
        min(right - first_x, part.shape[1]) - left,
        min(bottom - first_y, part.shape[0]) - top,
    )
    bicubic = library.ResizeAlg.convolution(library.FilterType.catmull_rom)
    _resizer().resize(source, made, library.ResizeOptions(bicubic, False, crop))
    return np.frombuffer(made.get_buffer(), np.uint8).reshape(height, width, 3)


@functools.cache
def _cykooz_resizer() -> Any:
    try:
        import cykooz_resizer
    except ImportError:
        return None
    return cykooz_resizer


_OF_THREAD = threading.local()


def _resizer() -> Any:
    """This thread's resizer, which keeps its memory for the next picture."""
    if not hasattr(_OF_THREAD, "resizer"):
        _OF_THREAD.resizer = _cykooz_resizer().Resizer()
    return _OF_THREAD.resizer


def _checked(picture: Image.Image, name: str, max_pixels: int) -> np.ndarray:
    if picture.width * picture.height > max_pixels:
        raise UnreadableRecord(
            f"{name}: {picture.width} x {picture.height} pixels exceed the limit of {max_pixels:,}"
        )
    return np.asarray(_to_rgb(picture))


def _to_rgb(picture: Image.Image) -> Image.Image:
    from PIL import ExifTags, Image, ImageOps

    picture.load()  # PNG's EXIF may come after the pixels
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        picture = ImageOps.exif_transpose(picture)  # which copies in any case
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I;16"):  # Pillow would clip deep gray at 255
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        return Image.fromarray(_shallow(np.asarray(picture))).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def _shallow(gray: np.ndarray) -> np.ndarray:
    """Gray of 32 bits, [H, W], as 8: integers are 16 bits deep, as Pillow reads them, or as deep as they
    need; floats are shares of white, or values up to 255 or 65535."""
    if gray.dtype.kind == "f":
        gray = np.nan_to_num(gray, nan=0.0, posinf=1.0, neginf=0.0)
    top = float(gray.max(initial=0))
    whites = (1.0, 255.0, 65535.0) if gray.dtype.kind == "f" else (65535.0,)
    white = next((white for white in whites if top <= white), top)
    return (gray.clip(0) * (255 / white) + 0.5).astype(np.uint8)


def _from_pixels(image: np.ndarray, name: str) -> np.ndarray:
    from PIL import Image

    gray = image.ndim == 2
    if image.dtype != np.uint8 or not (gray or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
        raise UnreadableRecord(
            f"{name}: pixels must be uint8 [H, W, 3] (or gray, or with alpha), not "
            f"{image.dtype} {list(image.shape)}"
        )
    if gray or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if image.shape[2] == 4:
        return np.asarray(_to_rgb(Image.fromarray(image, "RGBA")))
    return image
