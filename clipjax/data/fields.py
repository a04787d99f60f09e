"""Fields: what a batch holds. `Data.fields` lists them; the loader adds `id` and `sample`.

A field makes its row from one record and a generator of its own, so a row is a function of the seed
and the position, and adding a field changes no other. A field of one's own is short:

    @dataclasses.dataclass(frozen=True)
    class Brightness(Field):
        name: str = "brightness"

        def spec(self, data):
            return {self.name: Spec((), "float32")}

        def read(self, example):
            return example.picture().mean()
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from clipjax.component import Component
from clipjax.data.augment import Augmentation, CaptionChoice, Shown, augmented, augmented_jpeg
from clipjax.data.captions import at_path, encodable
from clipjax.data.images import Jpeg, decode
from clipjax.data.reading import read_file
from clipjax.data.sources import RandomAccess, UnreadableRecord
from clipjax.errors import ClipjaxError, did_you_mean

if TYPE_CHECKING:
    from clipjax.data.loader import Data
    from clipjax.data.tokenizers import TokenizerModel

DTYPES = ("float32", "float16", "int32", "int16", "int8", "uint8", "bool")
"""What an array of a batch may be: 64 bits do not reach the devices."""
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row of an array of the batch; `jax.eval_shape` takes it for an array."""

    shape: tuple[int, ...]
    dtype: str


class Draws:
    """The generators of one position: one a field, none of which another's draws can move.

    The fields `text` and `image` share the generator that a batch had before there were fields:
    the choice among `Data.captions` comes first, and the picture's augmentation goes on from there,
    whether or not the text is in the batch.
    """

    def __init__(self, seed: int, position: int, record: Any, captions: CaptionChoice):
        self._key, self._record, self._captions = [seed, position], record, captions

    @functools.cached_property
    def _main(self) -> tuple[Shown | None, np.random.Generator]:
        key: Any = _Key(self._key)
        rng = np.random.Generator(np.random.Philox(key))
        return self._captions.choose(self._record, rng), rng

    @property
    def caption(self) -> Shown | None:
        """What `Data.captions` chose at this position; None where it found nothing."""
        return self._main[0]

    def rng(self, name: str) -> np.random.Generator:
        """The generator of the field called `name`."""
        if name == "image":
            return self._main[1]
        # Philox counts up from the low end of 256 bits: another top word is another stream.
        counter = [0, 0, 0, 0 if name == "text" else _digest(name)]
        return np.random.Generator(np.random.Philox(key=self._key, counter=counter))


class _Key(ISeedSequence):
    """The key of a Philox, which a Philox is given so, as with `key=` it asks the system for entropy too."""

    def __init__(self, key: Sequence[int]):
        self._key = key

    def generate_state(self, n_words, dtype=np.uint32):
        assert n_words == len(self._key)
        return np.array(self._key, dtype)


@functools.lru_cache(maxsize=1024)
def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


class Example:
    """What a field reads from.

    Attributes:
      record: the record, as the source gave it.
      made: by field, what the fields that this one follows have read here: a `View` of an `Image`,
        a tuple of captions of a `Text`.
      draws: the position's generators.
    """

    __slots__ = ("_decoded", "draws", "made", "name", "record")

    def __init__(
        self,
        name: str,
        record: Any,
        made: dict[str, Any],
        draws: Draws,
        decoded: dict[str, np.ndarray],
    ):
        self.name, self.record, self.made, self.draws = name, record, made, draws
        self._decoded = decoded

    @property
    def key(self) -> str:
        """The record's name, for messages."""
        return self.record["key"]

    @property
    def rng(self) -> np.random.Generator:
        """The only source of randomness: a function of the seed, the position and the field's name.

        Each use of this property begins it anew.
        """
        return self.draws.rng(self.name)

    def picture(self, key: str = "image") -> np.ndarray:
        """A picture of the record, uint8 [H, W, 3]: decoded once, whatever asks for it.

        Raises:
          UnreadableRecord: it does not decode.
        """
        if key not in self._decoded:
            self._decoded[key] = decode(entry(self.record, key), self.key)
        return self._decoded[key]


@dataclasses.dataclass(frozen=True)
class Field(Component):
    """One array of the batch, or a few that belong together."""

    name: str
    """Key in the batch."""

    @property
    def follows(self) -> tuple[str, ...]:
        """Fields to be read before, whose results `read` finds in `example.made`."""
        return ()

    @property
    def entries(self) -> tuple[str, ...]:
        """Entries that records must have beyond `image` and `captions`: a run whose first records
        all lack one is refused when it is set up."""
        return ()

    def spec(self, data: Data) -> dict[str, Spec]:
        """One row of each array that this field puts into the batch, by its key."""
        raise NotImplementedError

    def open(self, data: Data, tokenizer: TokenizerModel, records: RandomAccess) -> Any:
        """Whatever has `read` and `write`, ready to work: the field itself, unless it opens
        something or asks what the run's settings are.

        Raises:
          ClipjaxError: it cannot work with this data.
        """
        return self

    def read(self, example: Example) -> Any:
        """What one record gives: a row, a dict of rows by key, or what `write` makes rows from.

        Called from several threads at once.

        Raises:
          UnreadableRecord: the record cannot be used; another takes its place.
        """
        raise NotImplementedError

    def write(self, values: Sequence[Any], rows: dict[str, np.ndarray]) -> None:
        """Puts what `read` gave for a few examples into their rows of the batch.

        Args:
          values: n results of `read`.
          rows: by key, the array [n, ...] to fill.
        """
        for i, value in enumerate(values):
            for key, row in value.items() if isinstance(value, dict) else [(self.name, value)]:
                rows[key][i] = row


class View(NamedTuple):
    """A picture as the batch shows it.

    Attributes:
      image: uint8 [S, S, 3].
      source_size: (height, width) of the decoded picture.
      map: float64 [3, 3], from pixels of the decoded picture to pixels of `image`; None where an
        augmentation does not say.
    """

    image: np.ndarray
    source_size: tuple[int, int]
    map: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Image(Field):
    """A picture, augmented: uint8 [S, S, 3]. A second one is an independent view of the same."""

    name: str = "image"
    augment: tuple[Augmentation, ...] | None = None
    """Changes of the picture, in order; None is `Data.augment`."""
    size: int | None = None
    """Height and width in pixels; None is `Data.image_size`."""
    key: str = "image"
    """Entry of the record that holds the picture."""

    def __post_init__(self):
        if self.size is not None and self.size < 1:
            raise ClipjaxError(f"Image({self.name!r}): size={self.size} must be >= 1")

    @property
    def entries(self):
        return () if self.key == "image" else (self.key,)

    def spec(self, data):
        size = self.size or data.image_size
        return {self.name: Spec((size, size, 3), "uint8")}

    def open(self, data, tokenizer, records):
        opened = _OpenImage(self, data)
        opened.view(np.zeros((opened.size, opened.size, 3), np.uint8), np.random.default_rng(0))
        return opened


class _OpenImage:
    def __init__(self, field: Image, data: Data):
        self.name, self.key, self.size = field.name, field.key, field.size or data.image_size
        self.augment = data.augment if field.augment is None else field.augment
        self.resize = data.resize
        # What is kept in memory is kept as it is, at full size.
        self.reduced = not data.cache and any(
            type(step).window is not Augmentation.window for step in self.augment[:1]
        )

    def view(self, image: np.ndarray, rng: np.random.Generator) -> View:
        seen, moved = augmented(image, self.augment, self.resize, self.size, rng)
        return View(seen, image.shape[:2], moved)

    def read(self, example: Example) -> View:
        rng = example.rng
        encoded = entry(example.record, self.key)
        if self.reduced and not isinstance(encoded, np.ndarray):
            if isinstance(encoded, (str, os.PathLike)):
                encoded = read_file(encoded, example.key)
            jpeg = Jpeg.of(encoded) if isinstance(encoded, bytes) else None
            if jpeg is not None:
                made = augmented_jpeg(jpeg, self.augment, self.resize, self.size, rng)
                if made is not None:
                    return View(made[0], (jpeg.height, jpeg.width), made[1])
        return self.view(example.picture(self.key), rng)

    def write(self, values: Sequence[View], rows: dict[str, np.ndarray]) -> None:
        for row, view in zip(rows[self.name], values, strict=True):
            row[:] = view.image


@dataclasses.dataclass(frozen=True)
class Text(Field):
    """A text as tokens: int32 [L]; several of them with `count`: int32 [count, L].

    With `count` there is `{name}_mask`, bool [count]: the texts are different ones, and where a
    record has fewer, its own are repeated in the places left over, which the mask marks False.
    """

    name: str = "text"
    key: str | None = None
    """Entry of the record that holds the text, or a list of them; None is its captions."""
    captions: CaptionChoice | None = None
    """Which to show; None is `Data.captions`, and any of them where `key` names an entry."""
    count: int | None = None
    """How many different texts; None is one, without an axis for it."""
    context_length: int | None = None
    """Tokens per text, special tokens counted; None is `Data.context_length`."""
    language: bool = False
    """Also give `{name}_language`, int32: the place of the text's language in the choice's
    `languages`; -1 where it is not known, or nothing is there."""
    optional: bool = False
    """With `count`: a record may have no such text. Its texts are empty, its mask all False."""

    def __post_init__(self):
        for name in ("count", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ClipjaxError(f"Text({self.name!r}): {name}={value} must be >= 1")
        if self.optional and self.count is None:
            raise ClipjaxError(f"Text({self.name!r}): optional needs a count, whose mask says so")
        if self.key is not None and self.captions is not None and self.captions.languages:
            raise ClipjaxError(
                f"Text({self.name!r}): captions.languages is for captions, and {self.key!r} has none"
            )

    @property
    def entries(self):
        return () if self.key is None or self.optional else (self.key,)

    def choice(self, data: Data) -> CaptionChoice:
        """Which texts of a record are chosen from, and how."""
        if self.captions is not None:
            return self.captions
        return data.captions if self.key is None else CaptionChoice()

    def texts(self, record: Any) -> Any:
        """What the choice chooses from: the record, or its entry in the place of captions."""
        if self.key is None:
            return record
        value = entry(record, self.key, default=() if self.optional else _MISSING)
        return {"captions": _strings(value, f"{record['key']}: {self.key!r}")}

    def spec(self, data):
        several = () if self.count is None else (self.count,)
        length = self.context_length or data.context_length
        arrays = {self.name: Spec((*several, length), "int32")}
        if self.count is not None:
            arrays[f"{self.name}_mask"] = Spec(several, "bool")
        if self.language:
            arrays[f"{self.name}_language"] = Spec(several, "int32")
        return arrays

    def open(self, data, tokenizer, records):
        if self.language and not self.choice(data).languages:
            raise ClipjaxError(
                f"Text({self.name!r}): language=True numbers the languages that captions are chosen "
                "from; name them in captions.languages"
            )
        tokenizer.encode([""], self.context_length or data.context_length)  # refuses a length
        return _OpenText(self, data, tokenizer)


class _OpenText:
    def __init__(self, field: Text, data: Data, tokenizer: TokenizerModel):
        self._field, self._tokenizer = field, tokenizer
        self._choice = field.choice(data)
        self._numbers = {code: i for i, code in enumerate(self._choice.languages)}
        self._length = field.context_length or data.context_length
        self._is_main = field.name == "text" and field.key is None and field.captions is None

    def read(self, example: Example) -> tuple[Shown, ...]:
        field, record = self._field, example.record
        found: list[Shown | None]
        if field.count is not None:
            found = [*self._choice.several(field.texts(record), field.count, example.rng)]
        elif self._is_main:
            found = [example.draws.caption]
        else:
            found = [self._choice.choose(field.texts(record), example.rng)]
        shown = tuple(caption for caption in found if caption is not None)
        if not shown and not field.optional:
            raise UnreadableRecord(self._nothing(record))
        return shown

    def write(self, values: Sequence[tuple[Shown, ...]], rows: dict[str, np.ndarray]) -> None:
        name, count = self._field.name, self._field.count or 1
        nothing = (Shown("", ""),)
        texts = [
            (shown or nothing)[i % (len(shown) or 1)] for shown in values for i in range(count)
        ]
        tokens = self._tokenizer.encode([text.text for text in texts], self._length)
        rows[name][:] = tokens.reshape(rows[name].shape)
        if self._field.count is not None:
            for mask, shown in zip(rows[f"{name}_mask"], values, strict=True):
                mask[:] = np.arange(count) < len(shown)
        if self._field.language:
            numbers = [self._numbers.get(text.language, -1) for text in texts]
            languages = rows[f"{name}_language"]
            languages[:] = np.array(numbers, np.int32).reshape(languages.shape)

    def _nothing(self, record: Any) -> str:
        key, languages = record["key"], self._choice.languages
        if self._field.key is not None:
            return f"{key}: the entry {self._field.key!r} holds no text"
        if not record["captions"]:
            return f"{key}: the record has no caption"
        if any(c.strip() for c in record["captions"]):
            return f"{key}: no caption in any of the languages {', '.join(languages)}"
        return f"{key}: the caption is empty"


@dataclasses.dataclass(frozen=True)
class Rewritten(Field):
    """The caption that another text field shows, written otherwise, as tokens int32 [L].

    Say `rewrite`. Where it may find nothing to change, set `partial`: then there is `{name}_mask`, bool.
    """

    of: str = "text"
    """The text field whose caption it takes."""

    @property
    def partial(self) -> bool:
        """Whether `rewrite` may give None."""
        return False

    def rewrite(self, text: str, rng: np.random.Generator) -> str | None:
        """Another text in the place of this one, drawn with `rng` alone."""
        raise NotImplementedError

    @property
    def follows(self):
        return (self.of,)

    def spec(self, data):
        mask = {f"{self.name}_mask": Spec((), "bool")} if self.partial else {}
        return {self.name: Spec((data.context_length,), "int32")} | mask

    def open(self, data, tokenizer, records):
        return _OpenRewritten(self, data.context_length, tokenizer)


class _OpenRewritten:
    def __init__(self, field: Rewritten, length: int, tokenizer: TokenizerModel):
        self._field, self._length, self._tokenizer = field, length, tokenizer

    def read(self, example: Example) -> str | None:
        return self._field.rewrite(example.made[self._field.of][0].text, example.rng)

    def write(self, values: Sequence[str | None], rows: dict[str, np.ndarray]) -> None:
        name = self._field.name
        rows[name][:] = self._tokenizer.encode([text or "" for text in values], self._length)
        if self._field.partial:
            rows[f"{name}_mask"][:] = [text is not None for text in values]


@dataclasses.dataclass(frozen=True)
class Array(Field):
    """Numbers that the record brings: a label, a score, an embedding."""

    name: str
    key: str | None = None
    """Entry of the record; None is `name`. A slash leads into a dict: "scores/clip"."""
    shape: tuple[int, ...] = ()
    """Shape of a row; a record with another is unreadable."""
    dtype: Literal["float32", "float16", "int32", "int16", "int8", "uint8", "bool"] = "float32"
    """Of the array in the batch; numbers that it cannot hold make a record unreadable."""
    missing: float | None = None
    """What a record without the entry gets, in all places; None: such a record is unreadable."""

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ClipjaxError(f"Array({self.name!r}): dtype={self.dtype!r} cannot be in a batch")
        if any(n < 1 for n in self.shape):
            raise ClipjaxError(f"Array({self.name!r}): shape={self.shape} must be all >= 1")
        if self.missing is not None:
            as_numbers(self.missing, self.dtype, f"Array({self.name!r}): missing")

    @property
    def entries(self):
        return (self.key or self.name,) if self.missing is None else ()

    def spec(self, data):
        return {self.name: Spec(tuple(self.shape), self.dtype)}

    def read(self, example):
        key = self.key or self.name
        default = _MISSING if self.missing is None else None
        value = entry(example.record, key, default)
        if value is None and self.missing is not None:
            return np.full(self.shape, self.missing, self.dtype)
        what = f"{example.key}: the entry {key!r}"
        array = as_numbers(value, self.dtype, what)
        if array.shape != tuple(self.shape):
            raise UnreadableRecord(
                f"{what} has the shape {list(array.shape)}, and the field {self.name!r} asks for "
                f"{list(self.shape)}"
            )
        return array


def entry(record: Any, key: str, default: Any = _MISSING) -> Any:
    """An entry of a record. Where none has the whole name, slashes lead into dicts, and what follows a
    colon into JSON: "json:scores.clip".

    Raises:
      UnreadableRecord: it is not there and there is no default; the message says what is.
    """
    value = record.get(key, _MISSING)
    if value is _MISSING:
        value = record
        for part in key.split("/"):
            value = value.get(part, _MISSING) if hasattr(value, "get") else _MISSING
    name, _, path = key.partition(":")
    if value is _MISSING and path and isinstance(record.get(name), (bytes, str)):
        try:
            value = at_path(json.loads(record[name]), path)
        except (ValueError, TypeError, RecursionError) as error:
            raise UnreadableRecord(f"{record['key']}: {name!r} is no JSON object") from error
        value = _MISSING if value is None else value
    if value is not _MISSING:
        return value
    if default is not _MISSING:
        return default
    raise UnreadableRecord(
        f"{record['key']}: the record has no entry {key!r}{did_you_mean(key, map(str, record))}"
    )


def as_numbers(value: Any, dtype: str, what: str) -> np.ndarray:
    """An entry as an array: numbers, lists of them, a .npy file's bytes, or JSON text of such.

    Raises:
      UnreadableRecord: it is no numbers, or they do not fit `dtype` unchanged (rounding of floats
        aside), or are not finite.
    """
    try:
        if isinstance(value, bytes) and value.startswith(b"\x93NUMPY"):
            value = np.load(io.BytesIO(value), allow_pickle=False)
        elif isinstance(value, (bytes, str)):
            value = json.loads(value)
        found = np.asarray(value)
        if found.dtype.kind not in "biuf" and found.size:
            raise ValueError(f"{found.dtype} are no numbers")
        with np.errstate(all="ignore"):
            array = found.astype(dtype)
    except (ValueError, TypeError, EOFError) as error:
        raise UnreadableRecord(f"{what} is no array of numbers ({error})") from error
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise UnreadableRecord(f"{what} is not finite in {dtype}")
    elif not np.array_equal(array, found):
        raise UnreadableRecord(f"{what} has numbers that are no {dtype}")
    return array


def _strings(value: Any, what: str) -> tuple[str, ...]:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        return (encodable(value),)
    if value is None:
        return ()
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise UnreadableRecord(
            f"{what} is {type(value).__name__}, neither a text nor a list of them"
        )
    return tuple(text for item in value for text in _strings(item, what))
