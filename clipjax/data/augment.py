"""Augmentation on the host: uint8 in, uint8 out, every choice drawn from the generator given.

Applied in the order listed in the run, each `augmentation(image, size, rng)`. Whatever comes out
of the last one at another size than the run's is brought to it by the run's `resize`. An
augmentation that moves things also says where to (`mapped`), so that boxes stay with the picture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from clipjax.component import Component
from clipjax.data.images import Jpeg, resize, resize_fast
from clipjax.errors import ClipjaxError

LONGEST = 8
"""Longer side over shorter above which a picture is not resized as a whole before it is cropped."""


@dataclasses.dataclass(frozen=True)
class Augmentation(Component):
    """A change of the picture that keeps its meaning."""

    def __call__(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """Changes one picture.

        Args:
          image: uint8 [H, W, 3]; not written to.
          size: height and width the run asks for, in pixels.
          rng: the only source of randomness.

        Returns:
          uint8 [H', W', 3].
        """
        raise NotImplementedError

    def mapped(
        self, image: np.ndarray, size: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """What a call makes, with the same draws, and where it moves things to.

        Returns:
          (uint8 [H', W', 3], map float64 [3, 3]): `map @ (x, y, 1)` is where the point (x, y) of
          `image` is in the result, both in pixels. None in place of the map is "not said", which
          is what an augmentation without this method says: boxes cannot follow it.
        """
        return self(image, size, rng), None

    def window(
        self, height: int, width: int, size: int, rng: np.random.Generator
    ) -> tuple[float, float, float, float] | None:
        """Of an augmentation that resizes one box of the picture to `size` and does nothing else, that
        box, (left, top, right, bottom) in pixels, with the draws of a call. None, without a draw, for
        any other. Where it stands first, a picture need not be decoded larger than this asks for.
        """
        return None


@dataclasses.dataclass(frozen=True)
class Resize(Augmentation):
    """To the run's size. Draws nothing: this is also how evaluation sees pictures."""

    mode: Literal["squash", "crop"] = "squash"
    """"squash" ignores the aspect ratio; "crop" keeps it and cuts the center out, as CLIP does."""
    method: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation, antialiased."""
    half_pixel: Literal["even", "down"] = "even"
    """Where a margin to crop is half a pixel too wide: torchvision rounds to even, transformers down."""

    def __post_init__(self):
        for field, choices in (
            ("mode", ("squash", "crop")),
            ("method", ("bicubic", "bilinear")),
            ("half_pixel", ("even", "down")),
        ):
            value = getattr(self, field)
            if value not in choices:
                raise ClipjaxError(
                    f"Resize: {field}={value!r} is neither {' nor '.join(map(repr, choices))}"
                )

    def __call__(self, image, size, rng=None):
        return self.mapped(image, size, rng)[0]

    def mapped(self, image, size, rng=None):
        height, width = image.shape[:2]
        if self.mode == "squash" or height == width:
            squashed = resize(image, (size, size), method=self.method)
            return squashed, _scaling(size / width, size / height)
        short = min(height, width)
        tall, wide = size * height // short, size * width // short
        center = round if self.half_pixel == "even" else math.floor
        top, left = center((tall - size) / 2), center((wide - size) / 2)
        moved = _shifting(-left, -top) @ _scaling(wide / width, tall / height)
        if max(tall, wide) <= LONGEST * size:
            resized = resize(image, (tall, wide), method=self.method)
            return resized[top : top + size, left : left + size], moved
        # Of a thin strip, only the middle and what the kernel reaches around it: the whole would
        # have (longer / shorter side) times the size asked for.
        reach = 2 + 2 * math.ceil(max(tall / height, wide / width, 1))
        low_x, high_x = max(left - reach, 0), min(left + size + reach, wide)
        low_y, high_y = max(top - reach, 0), min(top + size + reach, tall)
        x, y = width / wide, height / tall
        box = (low_x * x, low_y * y, high_x * x, high_y * y)
        middle = resize(image, (high_y - low_y, high_x - low_x), box, self.method)
        top, left = top - low_y, left - low_x
        return middle[top : top + size, left : left + size], moved


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Augmentation):
    """A random box of random area and aspect ratio, resized to the run's size.

    Area is uniform in `scale`, log aspect uniform in `ratio`, as in Szegedy et al. 2015
    (arXiv:1409.4842); after ten boxes that do not fit, the largest centered box that does.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    """Least and greatest share of the picture's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width / height of the box."""

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ClipjaxError(
                f"RandomResizedCrop: scale={self.scale} must be 0 < low <= high <= 1"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ClipjaxError(f"RandomResizedCrop: ratio={self.ratio} must be 0 < low <= high")

    def __call__(self, image, size, rng):
        return self.mapped(image, size, rng)[0]

    def window(self, height, width, size, rng):
        return self._box(height, width, rng)

    def mapped(self, image, size, rng):
        left, top, right, bottom = box = self._box(image.shape[0], image.shape[1], rng)
        scaling = _scaling(size / (right - left), size / (bottom - top))
        return resize_fast(image, (size, size), box), scaling @ _shifting(-left, -top)

    def _box(self, height: int, width: int, rng) -> tuple[float, float, float, float]:
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = height * width * _uniform(rng, *self.scale)
            ratio = math.exp(_uniform(rng, log_low, log_high))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                left, top = _uniform(rng, 0, width - w), _uniform(rng, 0, height - h)
                return left, top, left + w, top + h
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, height * ratio), min(height, width / ratio)
        left, top = (width - w) / 2, (height - h) / 2
        return left, top, left + w, top + h


@dataclasses.dataclass(frozen=True)
class Flip(Augmentation):
    """Mirrors left and right. Wrong for captions that speak of left and right, or hold text."""

    probability: float = 0.5
    """Share of pictures that are mirrored."""

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ClipjaxError(f"Flip: probability={self.probability} must be in [0, 1]")

    def __call__(self, image, size, rng):
        return self.mapped(image, size, rng)[0]

    def mapped(self, image, size, rng):
        if rng.random() < self.probability:
            return image[:, ::-1], _shifting(image.shape[1], 0) @ _scaling(-1, 1)
        return image, np.eye(3)


@dataclasses.dataclass(frozen=True)
class Shift(Augmentation):
    """Moves the picture by a random number of pixels, up or down and left or right."""

    pixels: int = 4
    """Greatest shift in each direction, in pixels of the run's size."""
    fill: Literal["white", "edge"] = "white"
    """What comes in at the border: white, or the picture's last row and column repeated."""

    def __post_init__(self):
        if self.pixels < 0:
            raise ClipjaxError(f"Shift: pixels={self.pixels} must be >= 0")
        if self.fill not in ("white", "edge"):
            raise ClipjaxError(f"Shift: fill={self.fill!r} is neither 'white' nor 'edge'")

    def __call__(self, image, size, rng):
        return self.mapped(image, size, rng)[0]

    def mapped(self, image, size, rng):
        if self.pixels >= size:
            raise ClipjaxError(f"Shift: pixels={self.pixels} moves a picture of {size} out of view")
        height, width = image.shape[:2]
        draws = rng.integers(-self.pixels, self.pixels + 1, size=2)
        down, right = round(draws[0] * height / size), round(draws[1] * width / size)
        if self.fill == "edge":
            rows = np.clip(np.arange(height) - down, 0, height - 1)
            columns = np.clip(np.arange(width) - right, 0, width - 1)
            return image[rows[:, None], columns], _shifting(right, down)
        moved = np.full_like(image, 255)
        moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
            max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
        ]
        return moved, _shifting(right, down)


@dataclasses.dataclass(frozen=True)
class ColorJitter(Augmentation):
    """Random brightness, contrast, saturation and hue, in random order.

    A strength s blends with black, with the mean gray, with the gray picture by a factor uniform in
    [max(0, 1 - s), 1 + s]; hue turns by a share of the color circle uniform in [-hue, hue].
    """

    brightness: float = 0.2
    """Strength; 0 is off."""
    contrast: float = 0.2
    """Strength; 0 is off."""
    saturation: float = 0.2
    """Strength; 0 is off."""
    hue: float = 0.0
    """Greatest turn, in turns of the color circle, at most 0.5; 0 is off."""

    def __post_init__(self):
        for name in ("brightness", "contrast", "saturation", "hue"):
            if getattr(self, name) < 0:
                raise ClipjaxError(f"ColorJitter: {name}={getattr(self, name)} must be >= 0")
        if self.hue > 0.5:
            raise ClipjaxError(f"ColorJitter: hue={self.hue} must be <= 0.5, half a turn")

    def __call__(self, image, size, rng):
        from PIL import Image, ImageEnhance

        enhancers = {
            "brightness": ImageEnhance.Brightness,
            "contrast": ImageEnhance.Contrast,
            "saturation": ImageEnhance.Color,
        }
        picture = Image.fromarray(image)
        for name in rng.permutation(["brightness", "contrast", "saturation", "hue"]):
            strength = getattr(self, name)
            if not strength:
                continue
            if name == "hue":
                picture = _turn_hue(picture, rng.uniform(-strength, strength))
            else:
                factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
                picture = enhancers[name](picture).enhance(factor)
        return np.asarray(picture)

    def mapped(self, image, size, rng):
        return self(image, size, rng), np.eye(3)


def augmented_jpeg(
    jpeg: Jpeg,
    augmentations: Sequence[Augmentation],
    resize_to: Resize,
    size: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """`augmented` of a picture that is decoded no larger than its first augmentation asks for.

    Returns:
      As `augmented`; None, without a draw, where the first augmentation is no window, or the file is
      damaged.
    """
    state = rng.bit_generator.state
    box = augmentations[0].window(jpeg.height, jpeg.width, size, rng) if augmentations else None
    if box is None:
        return None
    left, top, right, bottom = box
    across, down = size / (right - left), size / (bottom - top)
    # Between half and all of the size there is nothing to win.
    enough = max(across, down)
    eighths = next((n for n in (1, 2, 4) if enough <= n / 8), 8)
    pixels = jpeg.decode(eighths)
    if pixels is None:
        rng.bit_generator.state = state
        return None
    scale = eighths / 8
    reduced = (left * scale, top * scale, right * scale, bottom * scale)
    image = resize_fast(pixels, (size, size), reduced)
    image, rest = augmented(image, augmentations[1:], resize_to, size, rng)
    return image, None if rest is None else rest @ _scaling(across, down) @ _shifting(-left, -top)


def augmented(
    image: np.ndarray,
    augmentations: Iterable[Augmentation],
    resize: Resize,
    size: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray | None]:
    """A picture after all augmentations, at the size asked for.

    Args:
      image: uint8 [H, W, 3].
      augmentations: in order.
      resize: what brings the last one's result to `size`.
      size: height and width of the result, in pixels.
      rng: decides all.

    Returns:
      (uint8 [size, size, 3], the map of `Augmentation.mapped` from `image` to it, or None where one
      of them does not say).
    """
    total: np.ndarray | None = np.eye(3)
    for augmentation in (*augmentations, resize):
        image, step = augmentation.mapped(image, size, rng)
        total = None if total is None or step is None else step @ total
    return image, total


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """The number that `rng.uniform` draws, without what that does for arrays."""
    return low + (high - low) * rng.random()


def _scaling(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1.0])


def _shifting(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def _turn_hue(picture, turn: float):
    from PIL import Image

    hue, saturation, value = picture.convert("HSV").split()
    offset = round(turn * 255)
    hue = hue.point([(i + offset) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


class Shown(NamedTuple):
    """A caption that may be shown.

    Attributes:
      text: without white space around it.
      language: its code, "" where it is not known.
      weight: its share among the record's.
    """

    text: str
    language: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class CaptionChoice(Component):
    """Which of a record's captions a training example shows. Empty captions never count."""

    languages: tuple[str, ...] = ()
    """Codes of the languages to choose from; () is every caption."""
    weights: tuple[float, ...] = ()
    """Share of each language, in any unit; () gives every caption the same chance."""
    pick: Literal["random", "first"] = "random"
    """"random", anew each epoch, or always the "first" in the order of `languages`."""

    def __post_init__(self):
        if self.pick not in ("random", "first"):
            raise ClipjaxError(f"CaptionChoice: pick={self.pick!r} is neither 'random' nor 'first'")
        if self.weights and self.pick == "first":
            raise ClipjaxError("CaptionChoice: weights mean nothing with pick='first'; drop one")
        if self.weights and len(self.weights) != len(self.languages):
            raise ClipjaxError(
                f"CaptionChoice: {len(self.weights)} weights for {len(self.languages)} languages; "
                "give one each"
            )
        if any(not w > 0 for w in self.weights):
            raise ClipjaxError(f"CaptionChoice: weights={self.weights} must all be > 0")

    def candidates(self, record) -> list[Shown]:
        """The captions that may be shown, the first one first."""
        captions = [caption.strip() for caption in record["captions"]]
        spoken = (*record.get("languages", ()), *[""] * len(captions))
        said = [(text, code) for text, code in zip(captions, spoken, strict=False) if text]
        if not self.languages:
            return [Shown(text, code) for text, code in said]
        found = []
        for i, language in enumerate(self.languages):
            texts = [text for text, code in said if code == language]
            weight = self.weights[i] / len(texts) if self.weights and texts else 1.0
            found += [Shown(text, language, weight) for text in texts]
        return found

    def __call__(self, record, rng: np.random.Generator) -> str | None:
        """The text of one caption, or None when the record has none to show."""
        chosen = self.choose(record, rng)
        return chosen and chosen.text

    def choose(self, record, rng: np.random.Generator) -> Shown | None:
        """One caption with its language, or None when the record has none to show."""
        found = self.candidates(record)
        if len(found) <= 1 or self.pick == "first":
            return found[0] if found else None
        return found[_drawn([caption.weight for caption in found], rng)]

    def several(self, record, count: int, rng: np.random.Generator) -> list[Shown]:
        """At most `count` different captions, drawn one after another without replacement."""
        # Two captions of one wording are one caption.
        found = list(
            {caption.text: caption for caption in reversed(self.candidates(record))}.values()
        )
        found.reverse()
        if self.pick == "first":
            return found[:count]
        chosen: list[Shown] = []
        while found and len(chosen) < count:
            chosen.append(found.pop(_drawn([caption.weight for caption in found], rng)))
        return chosen


def _drawn(weights: list[float], rng: np.random.Generator) -> int:
    edges = np.cumsum(weights)
    # Not searchsorted(edges, total): float error may leave the draw at the very end.
    chosen = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
    return min(chosen, len(weights) - 1)
