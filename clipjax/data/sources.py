"""Sources: random access to records of pictures with captions.

A source is a component whose `open()` gives an object with `__len__` and `__getitem__`. Order,
decoding, augmentation and batching belong to the loader, so a source of one's own is short:

    @dataclasses.dataclass(frozen=True)
    class Mine(Source):
        folder: str

        def open(self):
            return [{"image": path, "captions": (name(path),), "id": i, "key": path} for ...]
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np

from clipjax.component import Component
from clipjax.errors import ClipjaxError, did_you_mean


class Record(TypedDict):
    """One picture with its captions. What else a source has of it stands beside, under its own name,
    for the fields that ask for it; the names below are never given to anything else.

    Attributes:
      image: encoded bytes, a path, or decoded pixels, uint8 [H, W, 3].
      captions: any number of captions; the first is the main one.
      languages: one code per caption (`"en"`), or empty where they are unknown.
      id: identity of the picture; records with equal ids are positives of each other.
      key: a name for messages and reports.
      label: class index, in data sets that have one; -1 is unknown.
    """

    image: bytes | str | os.PathLike[str] | np.ndarray
    captions: tuple[str, ...]
    languages: NotRequired[tuple[str, ...]]
    id: int
    key: str
    label: NotRequired[int]


class UnreadableRecord(ClipjaxError):
    """A record that cannot be used; the message names it. The loader skips, counts and logs it."""


class RandomAccess(Protocol):
    """An opened source. Called from several threads at once.

    It may also have `class_names: tuple[str, ...]`, the names behind `label`, and `keys()`, the keys
    of all records in order, where they are known without reading any, and `facts(index)`, a record
    without its picture, where that is less to read, and `file_of(index)`, the path or address of the file
    that the record is in, where there are such. For `Data.stream`: `runs(size)`, int64 [runs + 1],
    where runs of at most `size` neighboring records begin and end, and `read_run(first, stop)`, the
    records of one, an `UnreadableRecord` in the place of each that cannot be used.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record:
        """The record at `index`, or `UnreadableRecord` raised."""
        ...


@dataclasses.dataclass(frozen=True)
class Source(Component):
    """Where records come from."""

    def open(self) -> RandomAccess:
        """Opens the source.

        Raises:
          ClipjaxError: it is not there, or is not what the fields say.
        """
        raise NotImplementedError

    def listed(self, least: int) -> list[str] | None:
        """The files that `Data.stream` deals, in order, if it is to deal files; nothing of them is read.

        Args:
          least: the lanes of the stream: fewer files cannot be dealt to them.

        Returns:
          None: it deals runs of the opened source's records.
        """
        return None

    @property
    def on_disk(self) -> bool:
        """Whether `open_shard` wants a path on disk, also of a file at an address."""
        return False

    def open_shard(self, file: Place) -> Shard:
        """Opens one of `listed`, to be read from end to end.

        Raises:
          ClipjaxError: it is not there, or is not what the fields say.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Place:
    """A file of a stream, and how its records are counted."""

    path: str
    """Where it is read from: on disk, or an address."""
    run: int
    """Records of a piece, where the file does not say otherwise."""
    number: Callable[[int], int]
    """The index in the stream of the file's n-th record, from 0."""
    total: int | None = None
    """How many records it has, where that is known beforehand."""

    @property
    def name(self) -> str:
        """For messages and keys."""
        return os.path.basename(self.path)


class Shard(Protocol):
    """An opened file of a stream, in pieces of neighboring records. Called from one thread at a time."""

    edges: list[int]
    """Where the pieces begin that are known by now, and where the last of them ends, in records; [0] at first."""
    whole: bool
    """Whether these are all."""
    failed: bool
    """Whether it could not be read to its end."""

    def read(self, piece: int) -> list[Record | UnreadableRecord]:
        """The records of a piece, and in the place of those that cannot be used, why not; then `edges` has it.

        Nothing after the last, and then `whole` is True.
        """
        ...

    def count(self) -> int:
        """How many records there are; then `whole` is True."""
        ...


@dataclasses.dataclass(frozen=True)
class Tfds(Source):
    """A TensorFlow Datasets data set prepared as array_record; TensorFlow is not needed.

    The data set `twemoji` comes with clipjax and is built when it is not there yet. Any other must
    have been prepared (`download_and_prepare` with `file_format="array_record"`).
    """

    name: str
    """Data set, as in "twemoji", "my_data/my_config" or "my_data:1.0.0"."""
    split: str = "train"
    """Split, in TFDS's notation: "train", "train[:10%]", "train+test"."""
    data_dir: str | None = None
    """Folder of prepared data sets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    image_key: str = "image"
    """Feature that holds the picture."""
    caption_key: str | None = None
    """Feature that holds a caption or a sequence of them ("captions/text" for a nested one);
    default: the first of captions/text, captions, caption, text that is there."""
    language_key: str | None = None
    """Feature that holds one language code per caption; default: captions/language if there."""
    label_key: str | None = None
    """Feature that holds the class; default: label, else group, if there."""
    id_key: str | None = None
    """Feature with the picture's identity, a number; default: id or image/id, else the index."""
    languages: tuple[str, ...] = ()
    """Keep the captions in these languages, in this order; () keeps all."""

    def open(self) -> RandomAccess:
        return _OpenTfds(self)


class _OpenTfds:
    def __init__(self, config: Tfds):
        import tensorflow_datasets as tfds

        self.config = config
        builder = tfds.builder_from_directory(_prepared_folder(config))
        _check_split(builder, config)
        features = builder.info.features
        self._caption = _feature(
            features, config.caption_key, "captions/text", "captions", "caption", "text"
        )
        self._language = _feature(features, config.language_key, "captions/language")
        self._label = _feature(features, config.label_key, "label", "group")
        self._id = _feature(features, config.id_key, "id", "image/id")
        self._image = _feature(features, config.image_key)
        self._key = _feature(features, None, "key", "image/filename", "file_name")
        if config.languages and self._language is None:
            raise ClipjaxError(
                f"Tfds({config.name!r}): languages={config.languages} is set, but the data set "
                "says no caption's language; name the feature with language_key, or leave "
                "languages empty"
            )
        self.class_names = _class_names(features, self._label)
        decoders: Any = tfds.decode.SkipDecoding()  # the loader decodes
        for key in reversed(self._image or ()):
            decoders = {key: decoders}
        self._records = builder.as_data_source(config.split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        example = self._records[index]
        name = f"{self.config.name}/{self.config.split}[{index}]"
        captions, languages = self._captions(example, name)
        identity = _at(example, self._id)
        record = Record(
            image=_at(example, self._image),
            captions=captions,
            languages=languages,
            id=int(identity) if isinstance(identity, (int, np.integer)) else index,
            key=_text(_at(example, self._key), name) or name,
        )
        if self._label is not None:
            record["label"] = int(_at(example, self._label))
        # Every other feature, under its own name.
        return example | record  # type: ignore[return-value]

    def _captions(self, example, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        captions = _texts(_at(example, self._caption), name)
        languages = _texts(_at(example, self._language), name)
        wanted = self.config.languages
        if not wanted:
            return captions, languages
        pairs = [
            (text, code)
            for language in wanted
            for text, code in zip(captions, languages, strict=True)
            if code == language
        ]
        return tuple(t for t, _ in pairs), tuple(c for _, c in pairs)


def default_data_dir() -> Path:
    """Where TFDS keeps prepared data sets: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _prepared_folder(config: Tfds) -> Path:
    data_dir = Path(config.data_dir).expanduser() if config.data_dir else default_data_dir()
    name, _, version = config.name.partition(":")
    if name == "twemoji":
        from clipjax.data import twemoji

        return twemoji.prepare(data_dir)
    folder = data_dir / name
    versions = sorted(
        (p.parent for p in folder.glob("*/dataset_info.json")), key=lambda p: _version(p.name)
    )
    chosen = [p for p in versions if p.name == version] if version else versions
    if not chosen:
        there = ", ".join(sorted(p.name for p in data_dir.iterdir())) if data_dir.is_dir() else ""
        raise ClipjaxError(
            f"the data set {config.name!r} is not in {str(data_dir)!r}"
            + (f" (there: {there})" if there else " (no such folder, or empty)")
            + "; set data_dir or TFDS_DATA_DIR to where it is, or prepare it: "
            f"tfds.builder({name!r}, data_dir={str(data_dir)!r}, file_format='array_record')"
            ".download_and_prepare()"
        )
    return chosen[-1]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in text.split("."))


def _check_split(builder: Any, config: Tfds) -> None:
    known = list(builder.info.splits)
    for part in config.split.split("+"):
        name = part.split("[")[0].strip()
        if name not in known:
            raise ClipjaxError(
                f"the data set {config.name!r} has no split {name!r}{did_you_mean(name, known)}"
            )
    file_format = builder.info.file_format
    if file_format is not None and file_format.value not in ("array_record", "riegeli"):
        raise ClipjaxError(
            f"the data set {config.name!r} in {str(builder.data_path)!r} is stored as "
            f"{file_format.value}, which has no random access: prepare it again with "
            "file_format='array_record'"
        )


def _feature(features: Any, asked: str | None, *defaults: str) -> tuple[str, ...] | None:
    """The keys that lead to the feature `asked` for, which must exist, or to the first default."""
    for path in [asked] if asked else defaults:
        # Some data sets have a slash in a key (COCO: "image/id").
        for keys in ((path,), tuple(path.split("/"))):
            feature = _descend(features, keys)
            if feature is not None and not hasattr(feature, "keys"):
                return keys
    if asked:
        known = list(features.keys())
        raise ClipjaxError(f"the data set has no feature {asked!r}{did_you_mean(asked, known)}")
    return None


def _descend(features: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        if not hasattr(features, "keys") or key not in features:
            return None
        # A Sequence of a dict answers to the keys of the dict inside.
        features = getattr(features[key], "feature", features[key])
    return features


def _class_names(features: Any, keys: tuple[str, ...] | None) -> tuple[str, ...] | None:
    names = getattr(_descend(features, keys), "names", None) if keys else None
    return tuple(names) if names else None


def _at(example: Any, keys: tuple[str, ...] | None) -> Any:
    if keys is None:
        return None
    for key in keys:
        example = example[key]
    return example


def _text(value: Any, name: str) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else ("" if value is None else str(value))
    except UnicodeDecodeError as error:
        raise UnreadableRecord(f"{name}: a text is not UTF-8 ({error})") from error


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, (bytes, str)):
        return (_text(value, name),)
    return tuple(_text(v, name) for v in value)
