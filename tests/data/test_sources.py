import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from clipjax.data import Mixture, Source, Tfds, decode
from clipjax.errors import ClipjaxError


def png(color) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with data sets of the usual shapes, made as their owners would make them."""
    import tensorflow_datasets as tfds

    data_dir = str(tmp_path_factory.mktemp("tfds"))
    text = tfds.features.Text()
    shapes = {
        "flickr_like": {"captions": tfds.features.Sequence(text)},
        "coco_like": {
            "captions": tfds.features.Sequence({"id": np.int64, "text": text}),
            "image/id": np.int64,
        },
        "class_like": {"label": tfds.features.ClassLabel(names=["cat", "dog"])},
        "nested_like": {
            "view": tfds.features.FeaturesDict({"image": tfds.features.Image()}),
            "meta": tfds.features.FeaturesDict({"title": text, "kind": np.int64}),
        },
    }
    values = {
        "flickr_like": lambda i: {"captions": [f"a {i}", f"b {i}"]},
        "coco_like": lambda i: {
            "captions": [{"id": i, "text": f"c {i}"}, {"id": -i, "text": f"d {i}"}],
            "image/id": 1000 + i,
        },
        "class_like": lambda i: {"label": i % 2},
        "nested_like": lambda i: {
            "view": {"image": png((0, i, 0))},
            "meta": {"title": f"t {i}", "kind": i},
        },
    }
    for name, features in shapes.items():
        builder = _adhoc(tfds, name, features, values[name], data_dir)
        builder.download_and_prepare()
    return data_dir


def _adhoc(tfds, dataset, features, value, data_dir):
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # noqa: RUF012

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"image": tfds.features.Image(), **features}),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(4), "validation": self._generate_examples(2)}

        def _generate_examples(self, n):
            for i in range(n):
                yield str(i), {"image": png((i, 0, 0)), **value(i)}

    return Builder(data_dir=data_dir, file_format="array_record")


def records(data_dir, name, **fields):
    """The records of a data set, in the order of their pictures' colors."""
    opened = Tfds(name, data_dir=data_dir, **fields).open()
    found = [opened[i] for i in range(len(opened))]
    return opened, sorted(found, key=lambda r: decode(r["image"])[0, 0, 0])


def test_sequence_of_captions(prepared):
    _, found = records(prepared, "flickr_like")
    assert [r["captions"] for r in found] == [(f"a {i}", f"b {i}") for i in range(4)]
    assert {r["languages"] for r in found} == {()}
    assert sorted(r["id"] for r in found) == [0, 1, 2, 3]
    assert {r["key"] for r in found} == {f"flickr_like/train[{i}]" for i in range(4)}
    assert isinstance(found[0]["image"], bytes)  # decoding is the loader's


def test_nested_captions_and_ids(prepared):
    _, found = records(prepared, "coco_like", split="validation")
    assert [r["captions"] for r in found] == [("c 0", "d 0"), ("c 1", "d 1")]
    assert [r["id"] for r in found] == [1000, 1001]


def test_labels(prepared):
    opened, found = records(prepared, "class_like")
    assert opened.class_names == ("cat", "dog")
    assert [r["label"] for r in found] == [0, 1, 0, 1]
    assert {r["captions"] for r in found} == {()}


def test_features_by_path(prepared):
    _, found = records(prepared, "nested_like", caption_key="meta/title", id_key="meta/kind")
    assert [(r["captions"], r["id"]) for r in found] == [((f"t {i}",), i) for i in range(4)]
    inside = Tfds("nested_like", data_dir=prepared, image_key="view/image").open()[0]["image"]
    assert isinstance(inside, bytes) and decode(inside).shape == (3, 4, 3)


def test_part_of_a_split_and_version(prepared):
    assert len(Tfds("flickr_like:1.0.0", "train[:50%]", prepared).open()) == 2


def test_languages_choose_and_order_captions(tfds_dir):
    opened = Tfds("twemoji", "test", tfds_dir, languages=("zh", "en")).open()
    everything = Tfds("twemoji", "test", tfds_dir).open()
    for i in range(20):
        spoken = dict(zip(everything[i]["languages"], everything[i]["captions"], strict=True))
        assert opened[i]["languages"] == ("zh", "en")
        assert opened[i]["captions"] == (spoken["zh"], spoken["en"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "flikr_like"}, r"'flikr_like' is not in .*flickr_like.*download_and_prepare"),
        ({"name": "flickr_like:2.0.0"}, r"'flickr_like:2.0.0' is not in"),
        ({"name": "flickr_like", "split": "valid"}, "no split 'valid'; did you mean 'validation'"),
        ({"name": "flickr_like", "split": "train+tset[:5]"}, "no split 'tset'"),
        ({"name": "flickr_like", "image_key": "imgae"}, "no feature 'imgae'; did you mean 'image'"),
        ({"name": "flickr_like", "caption_key": "captions/en"}, "no feature 'captions/en'"),
        ({"name": "flickr_like", "languages": ("en",)}, "says no caption's language.*language_key"),
    ],
)
def test_what_is_not_there_is_named(prepared, fields, message):
    with pytest.raises(ClipjaxError, match=message):
        Tfds(data_dir=prepared, **fields).open()


def test_missing_data_dir_is_named(tmp_path, monkeypatch):
    with pytest.raises(ClipjaxError, match=r"no such folder, or empty.*TFDS_DATA_DIR"):
        Tfds("coco", data_dir=str(tmp_path / "none")).open()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(ClipjaxError, match="elsewhere"):
        Tfds("coco").open()


def test_tfrecord_is_refused_with_the_remedy(prepared, tmp_path):
    import shutil

    shutil.copytree(f"{prepared}/class_like", tmp_path / "class_like")
    info = tmp_path / "class_like" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ClipjaxError, match=r"stored as tfrecord.*file_format='array_record'"):
        Tfds("class_like", data_dir=str(tmp_path)).open()


@dataclasses.dataclass(frozen=True)
class Letters(Source):
    text: str

    def open(self):
        return [
            {"image": b"", "captions": (letter,), "id": i, "key": letter}
            for i, letter in enumerate(self.text)
        ]


def mixed(weights, *texts) -> str:
    opened = Mixture(tuple(Letters(t) for t in texts), weights).open()
    found = [opened[i] for i in range(len(opened))]
    assert len({(r["id"], r["key"]) for r in found}) == len({r["id"] for r in found})
    assert len({r["id"] for r in found}) == len(set("".join(texts)))
    return "".join(r["key"] for r in found)


def test_mixture_without_weights_is_everything_once():
    assert mixed((), "abc", "xy") == "abcxy"


def test_mixture_repeats_what_the_weights_favor():
    assert mixed((1, 1), "abc", "xy") == "abcxyx"
    assert mixed((3, 1), "ab", "xy") == "abababxy"
    assert mixed((1, 1 / 3), "abc", "x") == "abcx"  # no record more from float error
    found = mixed((0.7, 0.3), "a" * 1, "wxyz")
    assert found.count("a") == 10 and found[10:] == "wxyz"  # 10 : 4 is the nearest to 7 : 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture(()), "sources is empty"),
        (lambda: Mixture((Letters("a"),), (1.0, 2.0)), "2 weights for 1 sources"),
        (lambda: Mixture((Letters("a"),), (0.0,)), "must all be > 0"),
        (lambda: Mixture((Letters("a"), Letters(""))).open(), "no records"),
    ],
)
def test_bad_mixtures_are_refused(make, message):
    with pytest.raises(ClipjaxError, match=message):
        make()
