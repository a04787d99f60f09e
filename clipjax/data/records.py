"""Records in TFRecord and ArrayRecord files: `tf.train.Example`s, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import os
import struct
import threading
from typing import Any

import numpy as np

from clipjax.data.captions import as_texts
from clipjax.data.columns import CAPTION_COLUMNS, FEW, IMAGE_COLUMNS
from clipjax.data.pieces import attempt
from clipjax.data.reading import (
    MAX_BYTES,
    SCAN_BLOCK,
    Files,
    Window,
    is_address,
    retried,
    state_of,
)
from clipjax.data.shards import Opened, Sequential
from clipjax.data.sources import (
    Place,
    RandomAccess,
    Record,
    Shard,
    Source,
    UnreadableRecord,
)
from clipjax.data.webdataset import expand
from clipjax.errors import ClipjaxError

HEAD = struct.Struct("<QI")
"""Of a record in a TFRecord file: its length and that number's checksum; its bytes and theirs follow."""
HOP = 1 << 15
KEYS = ("key", "__key__", "image/filename", "file_name")
LABELS = ("label", "cls")


@dataclasses.dataclass(frozen=True)
class Examples(Source):
    """What files of `tf.train.Example`s have in common: which feature is what.

    All other features are entries of the record, under their own names: one value as such, several as an array.
    """

    files: str = ""
    """A file, or a pattern of several: "gs://bucket/train-{00000..01023}.tfrecord"."""
    image_key: str | None = None
    """Feature with the picture's bytes; default: the first of image, jpg, jpeg, png, webp, image_bytes, bytes,
    img, image/encoded."""
    caption_keys: tuple[str, ...] | None = None
    """Features with captions; default: the first of caption, captions, text, txt, texts, sentences, title. () is
    none."""
    languages: tuple[str, ...] = ()
    """Language code of each of caption_keys, where known."""
    label_key: str | None = None
    """Feature with the class, a number; default: label or cls, if it is one."""
    id_key: str | None = None
    """Feature with the picture's identity, a number; default: the record's place."""
    key_key: str | None = None
    """Feature with the record's name; default: key, __key__, image/filename or file_name if there, else the file
    and the place."""

    def __post_init__(self):
        if self.languages and len(self.languages) != len(self.caption_keys or ()):
            raise ClipjaxError(
                f"{type(self).__name__}: {len(self.languages)} languages for "
                f"{len(self.caption_keys or ())} caption_keys; name both"
            )

    def listed(self, least: int) -> list[str] | None:
        paths = self._found()
        return paths if len(paths) >= least else None

    def _found(self) -> list[str]:
        _example()  # by the thread that opens, in most cases
        paths = expand(self.files)
        if not paths:
            raise ClipjaxError(f"{type(self).__name__}: no file matches files={self.files!r}")
        return paths

    def record(self, content: bytes, number: int, name: str) -> Record:
        """The record of a serialized Example.

        Args:
          content: its bytes.
          number: its index in the source.
          name: for messages, and its key where it has none.

        Raises:
          UnreadableRecord: it is no Example, or lacks what is asked for.
        """
        features = _features(content, name)
        key = self.key_key or next((k for k in KEYS if k in features), None)
        if key is not None and isinstance(features.get(key), (bytes, str)):
            name = _text(features[key], name)
        image = self.image_key or next(
            (k for k in (*IMAGE_COLUMNS, "image/encoded") if k in features), None
        )
        if image is not None and not isinstance(features.get(image), bytes):
            raise UnreadableRecord(f"{name}: the feature {image!r} is no picture")
        captions: list[str] = []
        languages: list[str] = []
        asked = self.caption_keys
        if asked is None:
            asked = tuple(k for k in CAPTION_COLUMNS if k in features)[:1]
        for i, caption in enumerate(asked):
            value = features.get(caption)
            texts = value if isinstance(value, list) else [] if value is None else [value]
            found = as_texts([_text(text, name) for text in texts], f"{name}: {caption!r}")
            captions += found
            languages += [self.languages[i]] * len(found) if self.languages else []
        identity = features.get(self.id_key) if self.id_key else None
        record = Record(
            image=features.pop(image) if image is not None else b"",
            captions=tuple(captions),
            languages=tuple(languages),
            id=identity if isinstance(identity, int) else number,
            key=name,
        )
        label = self.label_key or next((k for k in LABELS if k in features), None)
        if label is not None:
            value = features.get(label)
            record["label"] = value if isinstance(value, int) and value >= 0 else -1
        return features | record  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class TFRecord(Examples):
    """TFRecord files of `tf.train.Example`s, such as img2dataset's and TensorFlow Datasets'.

    Made to be read from end to end: train with `Data.stream`. Opened with random access, the files are gone
    through once to find where records begin.
    """

    def open(self) -> RandomAccess:
        return _OpenTFRecord(self, self._found())

    def open_shard(self, file: Place) -> Shard:
        return _TFRecordShard(self, file)


@dataclasses.dataclass(frozen=True)
class ArrayRecord(Examples):
    """ArrayRecord files of `tf.train.Example`s; with random access as Grain has it, on disk alone.

    A stream deals more than 256 files as such. Those at addresses are copied to disk one after another
    (`Stream.cache_dir`).
    """

    def listed(self, least: int) -> list[str] | None:
        paths = super().listed(least)
        few = paths is not None and len(paths) <= FEW
        return None if few and not any(map(is_address, paths or ())) else paths

    @property
    def on_disk(self) -> bool:
        return True

    def open(self) -> RandomAccess:
        return _OpenArrayRecord(self, self._found())

    def open_shard(self, file: Place) -> Shard:
        return Opened(_OpenArrayRecord(self, [file.path], file.number), file)


class _OpenTFRecord:
    def __init__(self, config: TFRecord, paths: list[str]):
        self._config, self._paths, self._files = config, paths, Files()
        offsets, counts = [], []
        for path in paths:
            length = state_of(path).size
            window = Window(self._files, path, length, SCAN_BLOCK if is_address(path) else HOP)
            found, at = [], 0
            while at < length:
                found.append(at)
                at = _after(window, at, length, path)
            offsets.append(np.array([*found, length], np.int64))
            counts.append(len(found))
        self._offsets = offsets
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self._ends, index, side="right"))
        place = index - (int(self._ends[file - 1]) if file else 0)
        begin, end = self._offsets[file][place : place + 2].tolist()
        name = f"{os.path.basename(self._paths[file])}:{place}"
        content = self._files.read(self._paths[file], begin, end - begin, name)
        return self._config.record(_checked(content, name), index, name)

    def file_of(self, index: int) -> str:
        """The file that holds the record."""
        return self._paths[int(np.searchsorted(self._ends, index, side="right"))]


class _TFRecordShard(Sequential):
    def __init__(self, config: TFRecord, place: Place):
        super().__init__(place)
        self._config, self._files = config, Files()
        self._length = state_of(place.path).size
        self._expected = SCAN_BLOCK

    def take(self, offset: int, first: int, keep: bool) -> tuple[list[Any], int | None]:
        path = self.place.path
        ahead = SCAN_BLOCK // 4 if is_address(path) else HOP
        window = Window(self._files, path, self._length, ahead, self._expected if keep else ahead)
        found: list[Any] = []
        at = offset
        try:
            while at < self._length and len(found) < self.place.run:
                end = _after(window, at, self._length, path)
                number = first + len(found)
                found.append(self._record(window, at, end, number) if keep else None)
                at = end
        except ClipjaxError as error:
            self.failed = True
            return [*found, self.lost(error, first + len(found))], None
        self._expected = at - offset + HOP
        return found, at if at < self._length else None

    def _record(self, window: Window, begin: int, end: int, place: int) -> Any:
        name = f"{self.place.name}:{place}"
        try:
            if end - begin > MAX_BYTES:
                raise UnreadableRecord(f"{name} has {end - begin:,} bytes, above {MAX_BYTES:,}")
            content = _checked(window(begin, end - begin), name)
            return self._config.record(content, self.place.number(place), name)
        except UnreadableRecord as failure:
            return failure


class _OpenArrayRecord:
    def __init__(self, config: ArrayRecord, paths: list[str], number: Any = int):
        import grain

        for path in paths:
            if is_address(path):
                raise ClipjaxError(
                    f"ArrayRecord: {path!r} is not on disk: train with Data.stream, which copies it, or copy it"
                )
            if not os.path.isfile(path):
                raise ClipjaxError(f"there is no file {path!r}")
        self._config, self._paths, self._number = config, paths, number
        try:
            self._records = grain.sources.ArrayRecordDataSource(paths)
            self._count = len(self._records)
        except (ValueError, RuntimeError, OSError) as error:
            raise ClipjaxError(f"{paths[0]} is no ArrayRecord file ({error})") from error

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._count:
            raise IndexError(index)
        name = f"{os.path.basename(self._paths[0])}:{index}"
        try:
            content = retried(functools.partial(self._records.__getitem__, index), name)
        except (ValueError, RuntimeError) as error:
            raise UnreadableRecord(f"{name}: the record is damaged ({error})") from error
        return self._config.record(content, self._number(index), name)

    def file_of(self, index: int) -> str:
        """The file that holds the record; "" of several files, whose ends Grain keeps to itself."""
        return self._paths[0] if len(self._paths) == 1 else ""

    def read_run(self, first: int, stop: int) -> list[Record | UnreadableRecord]:
        """The records from `first` to `stop`, read together."""
        indices = range(first, stop)
        try:
            contents = self._records.__getitems__(list(indices))
        except (
            ValueError,
            RuntimeError,
            IndexError,
        ):  # one by one: what can be read of them counts
            return [attempt(self, index) for index in indices]
        found: list[Record | UnreadableRecord] = []
        for index, content in zip(indices, contents, strict=True):
            name = f"{os.path.basename(self._paths[0])}:{index}"
            try:
                found.append(self._config.record(content, self._number(index), name))
            except UnreadableRecord as failure:
                found.append(failure)
        return found


def _after(window: Window, at: int, length: int, path: str) -> int:
    """Where the record after the one at a byte begins.

    Raises:
      ClipjaxError: there is none, or it is cut short.
    """
    head = window(at, HEAD.size)
    if len(head) == HEAD.size:
        size, mark = HEAD.unpack(head)
        if mark != _masked(head[:8]):
            what = "is no TFRecord file" if at == 0 else f"is damaged at byte {at:,}"
            raise ClipjaxError(f"{path!r} {what}: the length of a record has another checksum")
        if at + HEAD.size + size + 4 <= length:
            return at + HEAD.size + size + 4
    raise ClipjaxError(f"{path!r} is cut short in the record at byte {at:,}")


def _checked(content: bytes, name: str) -> bytes:
    """What a record of a TFRecord file holds."""
    inner = content[HEAD.size : -4]
    if struct.unpack("<I", content[-4:])[0] != _masked(inner):
        raise UnreadableRecord(f"{name}: the record has another checksum than it says")
    return inner


def _masked(content: bytes) -> int:
    """The checksum of a TFRecord file: CRC-32C, turned and shifted by a constant."""
    import google_crc32c

    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


_IMPORTING = threading.Lock()
"""Threads that import TFDS at once can wait for each other for ever."""


@functools.cache
def _example() -> tuple[Any, type[Exception]]:
    """tf.train.Example, and what it raises at bytes that are none."""
    with _IMPORTING:
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        return tf_example_pb2.Example, DecodeError


def _features(content: bytes, name: str) -> dict[str, Any]:
    """The features of a serialized Example: bytes, ints, lists of bytes, arrays of numbers."""
    example, broken = _example()
    try:
        features = example.FromString(content).features.feature
    except broken as error:
        raise UnreadableRecord(f"{name} is no tf.train.Example ({error})") from error
    return {key: _value(feature) for key, feature in features.items()}


def _value(feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    if kind is None:
        return None
    values = getattr(feature, kind).value
    if kind == "bytes_list":
        return values[0] if len(values) == 1 else list(values)
    if len(values) == 1:
        return values[0]
    return np.array(values, np.int64 if kind == "int64_list" else np.float32)


def _text(value: Any, name: str) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise UnreadableRecord(f"{name}: a text is not UTF-8 ({error})") from error
