"""What a batch holds: each field's rows worked out by hand, and that fields leave each other alone."""

import collections
import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipjax.component import from_json, to_json
from clipjax.data import (
    BPE,
    Array,
    Augmentation,
    Boxes,
    CaptionChoice,
    ColorJitter,
    Data,
    Embeddings,
    Field,
    Flip,
    Image,
    ImageFolder,
    RandomResizedCrop,
    Resize,
    Shift,
    Source,
    Spec,
    Text,
    Tfds,
)
from clipjax.errors import ClipjaxError, RunFailed

TOKENIZER = BPE(300).build([f"number {i} Zahl" for i in range(30)])
CAPTIONS = ("number one", "number two", "Zahl eins", "number two")
LANGUAGES = ("en", "en", "de", "en")


@dataclasses.dataclass(frozen=True)
class Toy(Source):
    """Random pictures; record i has 1 + i % 4 captions, and more."""

    n: int = 23
    bad: tuple[int, ...] = ()

    def open(self):
        return [self._record(i) for i in range(self.n)]

    def _record(self, i):
        image = np.random.default_rng(i).integers(0, 256, (8, 10, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        np.save(buffer, np.array([i, -i, 0.5], np.float64))
        return {
            "image": b"broken" if i in self.bad else image,
            "captions": CAPTIONS[: 1 + i % 4],
            "languages": LANGUAGES[: 1 + i % 4],
            "id": i // 2,
            "key": f"toy-{i}",
            "label": i % 3,
            "scores": {"clip": i / 8},
            "vector": buffer.getvalue(),
            "negatives": [f"no {j}" for j in range(i % 3)],
        }


def data(*fields, **changes):
    given = {"source": Toy(), "image_size": 8, "batch_size": 8, "context_length": 12}
    given |= {"augment": (RandomResizedCrop((0.3, 1.0)), Flip(), Shift(2)), "num_threads": 2}
    return Data(**(given | {"fields": fields or (Image(), Text())} | changes))


def batch(*fields, step=0, seed=3, **changes):
    return data(*fields, **changes).build(TOKENIZER, seed).batch(step)


def in_order(*fields, **changes):
    """The batch of records 0 to 7."""
    return batch(*fields, shuffle=False, **changes)


EVERYTHING = (
    Image("image_2", augment=(Flip(),)),
    Text("texts", count=3),
    Array("label", dtype="int32"),
    Image(),
    Text("text_2"),
    Text(),
    Text("hard", key="negatives", count=2, optional=True),
    Array("clip_score", key="scores/clip"),
)


@pytest.mark.parametrize("seed", [0, 11])
def test_the_default_batches_are_those_from_before_there_were_fields(seed):
    choice = CaptionChoice(("de", "en"), (1.0, 3.0))
    augment = (ColorJitter(), RandomResizedCrop((0.2, 1.0)), Flip(), Shift(1, "edge"))
    config = data(augment=augment, captions=choice)
    rows = config.build(TOKENIZER, seed).batch(2)
    records = Toy().open()
    for row, sample in enumerate(rows["sample"]):
        # One generator a position: the choice of a caption comes first, then the augmentations.
        rng = np.random.Generator(np.random.Philox(key=[seed, 16 + row]))
        caption = choice(records[sample], rng)
        image = records[sample]["image"]
        for step in augment:
            image = step(image, 8, rng)
        np.testing.assert_array_equal(rows["image"][row], image)
        np.testing.assert_array_equal(rows["text"][row], TOKENIZER.encode([caption], 12)[0])


def test_a_field_changes_no_other():
    together = batch(*EVERYTHING, step=2)
    assert set(together) == set(data(*EVERYTHING).spec())
    for field in EVERYTHING:
        alone = batch(field, step=2)
        for key in alone:
            np.testing.assert_array_equal(alone[key], together[key], err_msg=key)


def test_order_threads_processes_and_resuming_stay_as_they_were():
    config = data(*EVERYTHING, source=Toy(bad=(3,)), max_error_rate=1.0, batch_size=72)
    whole = config.build(TOKENIZER, 5)
    parts = [config.build(TOKENIZER, 5, p, 2) for p in range(2)]
    ahead = whole.iterate(4)
    got = next(ahead)
    ahead.close()
    rows = [part.batch(4) for part in parts]
    for key, array in whole.batch(4).items():
        np.testing.assert_array_equal(array, np.concatenate([r[key] for r in rows]))
        np.testing.assert_array_equal(array, got[key])


def test_the_spec_says_what_comes():
    config = data(*EVERYTHING)
    rows = config.build(TOKENIZER, 0).batch(0)
    assert config.spec() == {k: Spec(v.shape[1:], v.dtype.name) for k, v in rows.items()}
    assert data().spec() == {
        "id": Spec((), "int32"),
        "sample": Spec((), "int32"),
        "image": Spec((8, 8, 3), "uint8"),
        "text": Spec((12,), "int32"),
    }


def test_sample_is_the_place_in_the_source():
    rows = batch(Image(augment=()), step=3, resize=Resize("crop"))
    for sample, i, image in zip(rows["sample"], rows["id"], rows["image"], strict=True):
        assert i == sample // 2
        np.testing.assert_array_equal(image, Toy().open()[sample]["image"][:, 1:9])


def test_views_have_augmentations_sizes_and_draws_of_their_own():
    rows = batch(Image(), Image("image_2"), Image("small", augment=(), size=4))
    assert rows["small"].shape == (8, 4, 4, 3)
    assert not np.array_equal(rows["image"], rows["image_2"])
    records = Toy().open()
    for sample, image in zip(rows["sample"], rows["small"], strict=True):
        np.testing.assert_array_equal(image, Resize()(records[sample]["image"], 4))
    # Half of the flips of one view are flips of the other, as for coins thrown twice.
    flip = (Flip(),)
    many = batch(Image(augment=flip), Image("image_2", augment=flip), batch_size=2000)
    equal = (many["image"] == many["image_2"]).all((1, 2, 3)).mean()
    assert 0.45 < equal < 0.55


def test_several_captions_are_different_ones_and_repeat_where_there_are_too_few():
    rows = batch(Text("texts", count=3), batch_size=400)
    assert rows["texts"].shape == (400, 3, 12) and rows["texts_mask"].shape == (400, 3)
    first = collections.Counter()
    for sample, tokens, mask in zip(rows["sample"], rows["texts"], rows["texts_mask"], strict=True):
        own = sorted({c.lower() for c in CAPTIONS[: 1 + sample % 4]})  # the fourth repeats another
        shown = TOKENIZER.decode(tokens)
        there = min(len(own), 3)
        assert mask.tolist() == [i < there for i in range(3)]
        assert sorted(shown[:there]) == own
        assert shown == [shown[i % there] for i in range(3)]
        if there == 3:
            first[shown[0]] += 1
    assert min(first.values()) > 0.25 * sum(first.values())  # of three equally likely ones


def test_captions_by_weight_without_replacement():
    choice = CaptionChoice(("en", "de"), weights=(1.0, 3.0))
    text = Text("texts", captions=choice, count=2, language=True)
    rows = batch(text, batch_size=2000)
    rows = {key: array[rows["sample"] % 4 == 2] for key, array in rows.items()}
    # These records have two English captions of weight 1/2 each, and a German one of weight 3.
    assert rows["texts_language"][:, 0].mean() == pytest.approx(3 / 4, abs=0.05)
    # The second is German if the first was English (1/4), then 3 of 3 1/2.
    assert rows["texts_language"][:, 1].mean() == pytest.approx(1 / 4 * 3 / 3.5, abs=0.05)
    first = CaptionChoice(("de", "en"), pick="first")
    rows = in_order(Text("texts", captions=first, count=2, language=True))
    assert rows["texts_language"].tolist()[:4] == [[1, 1], [1, 1], [0, 1], [0, 1]]
    assert rows["texts_mask"].tolist()[:4] == [[True, False], [True, True], [True] * 2, [True] * 2]


def test_a_text_of_its_own_length_and_choice():
    german = Text("german", captions=CaptionChoice(("de",)), context_length=20)
    rows = batch(Text(), german, max_error_rate=1.0)
    assert rows["text"].shape == (8, 12) and rows["german"].shape == (8, 20)
    assert TOKENIZER.decode(rows["german"]) == ["zahl eins"] * 8


def test_texts_of_another_entry():
    rows = in_order(Text("hard", key="negatives", count=2, optional=True))
    assert rows["hard_mask"].tolist()[:3] == [[False, False], [True, False], [True, True]]
    assert TOKENIZER.decode(rows["hard"][0]) == ["", ""]
    assert TOKENIZER.decode(rows["hard"][1]) == ["no 0", "no 0"]
    assert sorted(TOKENIZER.decode(rows["hard"][2])) == ["no 0", "no 1"]
    with pytest.raises(RunFailed, match=r"toy-\d+: the entry 'negatives' holds no text"):
        batch(Text("hard", key="negatives"), source=Toy(n=1), max_error_rate=1.0)
    config = data(Text(), Text("hard", key="negatives"), Text("again"), source=Toy(n=3))
    expected = ["number one", "number one", "number two", "no 0"]
    assert list(config.iter_captions())[: len(expected)] == expected


def test_arrays():
    rows = in_order(
        Array("label", dtype="int32"),
        Array("score", key="scores/clip"),
        Array("vector", shape=(3,)),
        Array("absent", missing=-1, dtype="int8", shape=(2,)),
    )
    np.testing.assert_array_equal(rows["label"], np.arange(8) % 3)
    np.testing.assert_array_equal(rows["score"], np.arange(8, dtype=np.float32) / 8)
    expected = np.stack([np.arange(8), -np.arange(8), np.full(8, 0.5)], 1)
    np.testing.assert_array_equal(rows["vector"], expected)
    assert rows["absent"].dtype == np.int8 and (rows["absent"] == -1).all()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (Array("vector", shape=(4,)), r"toy-\d: the entry 'vector' has the shape \[3\].*\[4\]"),
        (Array("vector", shape=(3,), dtype="int32"), r"toy-\d: .* numbers that are no int32"),
        (Array("captions", shape=(1,)), r"toy-\d: the entry 'captions' is no array of numbers"),
        (Boxes(key="vector"), r"toy-\d: the entry 'vector' has the shape \[3\], not \[n, 4\]"),
    ],
)
def test_entries_that_do_not_fit_name_the_record(field, message):
    with pytest.raises(RunFailed, match=message):
        batch(Image(), field, max_error_rate=1.0)


@pytest.mark.parametrize("text", ["[1, NaN]", "not json", "[1, [2, 3]]"])
def test_text_that_is_no_array_of_numbers(text, tmp_path):
    write_table(tmp_path, [("a.png", "a thing", text)])
    config = data(Array("extra", shape=(2,)), source=ImageFolder(str(tmp_path)), max_error_rate=1.0)
    with pytest.raises(RunFailed, match=r"a\.png: the entry 'extra' is (no array|not finite)"):
        config.build(TOKENIZER, 0).batch(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data(Array("lable", dtype="int32")).build(TOKENIZER, 0), "did you mean 'label'"),
        (lambda: data(Text("x", key="negative")).build(TOKENIZER, 0), "did you mean 'negatives'"),
        (lambda: data(Image(), Image()), "'image', which is taken"),
        (lambda: data(Array("id")), "'id', which is taken"),
        (lambda: data(Array("a b")), "'a b', which is no name"),
        (lambda: data(Text("x", count=2), Array("x_mask")).spec(), "two fields .* 'x_mask'"),
        (lambda: Text(count=0), "count=0"),
        (lambda: Text(context_length=0), "context_length=0"),
        (lambda: Text(optional=True), "needs a count"),
        (lambda: Text(key="x", captions=CaptionChoice(("de",))), "'x' has none"),
        (lambda: data(Text(language=True)).build(TOKENIZER, 0), "captions.languages"),
        (lambda: Image(size=0), "size=0"),
        (lambda: Array("x", dtype="float64"), "float64"),
        (lambda: Array("x", shape=(0,)), r"\(0,\)"),
        (lambda: Array("x", dtype="uint8", missing=-1), "no uint8"),
        (lambda: Boxes(count=0), "count=0"),
        (lambda: Boxes(form="x"), "form='x'"),
        (lambda: Boxes(unit="x"), "unit='x'"),
        (lambda: Boxes(min_visible=2), "min_visible=2"),
        (lambda: data(Boxes(key="label")).build(TOKENIZER, 0), "'image' is no Image"),
        (lambda: Embeddings("x", "y", by="z"), "by='z'"),
        (lambda: data(Embeddings("x", "none.parquet")).spec(), "no file 'none.parquet'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ClipjaxError, match=message):
        make()


@dataclasses.dataclass(frozen=True)
class Marked(Source):
    """A white rectangle on black, with its box."""

    form: str = "xyxy"
    unit: str = "share"

    def open(self):
        return [self._record(i) for i in range(40)]

    def _record(self, i):
        rng = np.random.default_rng(i)
        height, width = (int(n) for n in rng.integers(60, 120, 2))
        (left, right), (top, bottom) = (np.sort(rng.choice(n, 2, False)) for n in (width, height))
        right, bottom = max(right, left + 8), max(bottom, top + 8)
        image = np.zeros((height, width, 3), np.uint8)
        image[top:bottom, left:right] = 255
        right, bottom = min(right, width), min(bottom, height)
        box = np.array([left, top, right, bottom], float)
        if self.unit == "share":
            box /= [width, height, width, height]
        if self.form == "xywh":
            box[2:] -= box[:2]
        if self.form == "yxyx":
            box = box[[1, 0, 3, 2]]
        record = {"image": image, "captions": ("x",), "id": i, "key": f"marked-{i}"}
        return record | {"boxes": [box.tolist()], "kinds": [i % 5]}


@pytest.mark.parametrize(
    ("augment", "resize", "form", "unit"),
    [
        ((), Resize(), "xyxy", "share"),
        ((), Resize("crop"), "xywh", "pixel"),
        ((RandomResizedCrop((0.2, 0.6)), Flip(), ColorJitter()), Resize(), "yxyx", "share"),
        ((Flip(), Shift(6), RandomResizedCrop((0.5, 1.0))), Resize(), "xyxy", "pixel"),
    ],
)
def test_boxes_are_where_their_pixels_went(augment, resize, form, unit):
    config = data(
        Image(),
        Boxes(count=2, form=form, unit=unit, label_key="kinds"),
        source=Marked(form, unit),
        augment=augment,
        resize=resize,
        image_size=64,
        batch_size=200,
    )
    if any(isinstance(step, Shift) for step in augment):
        fill = dataclasses.replace(augment[1], fill="edge")
        config = dataclasses.replace(config, augment=(augment[0], fill, augment[2]))
    rows = config.build(TOKENIZER, 0).batch(0)
    compared = 0
    for image, (box, rest), mask, labels, sample in zip(
        rows["image"],
        rows["boxes"],
        rows["boxes_mask"],
        rows["boxes_label"],
        rows["sample"],
        strict=True,
    ):
        bright = image[..., 0] > 127
        assert not mask[1] and not rest.any() and labels[1] == -1
        assert labels[0] == (sample % 5 if mask[0] else -1)
        if not mask[0]:
            assert not box.any()
            continue
        ys, xs = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        if not len(ys):
            continue  # darkened by the jitter
        found = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
        if any(isinstance(step, Shift) for step in augment) and (found % 64 == 0).any():
            continue  # a repeated edge makes the rectangle longer than its box
        np.testing.assert_allclose(box * 64, found, atol=1.0)
        compared += 1
    assert compared > 60


def test_boxes_out_of_view_are_masked():
    @dataclasses.dataclass(frozen=True)
    class LeftHalf(Augmentation):
        def __call__(self, image, size, rng):
            return image[:, : image.shape[1] // 2]

        def mapped(self, image, size, rng):
            return self(image, size, rng), np.eye(3)

    @dataclasses.dataclass(frozen=True)
    class Four(Source):
        def open(self):
            boxes = [[0, 0, 0.25, 1], [0.25, 0, 0.75, 1], [0.45, 0, 0.9, 1], [0.6, 0, 1, 1]]
            image = np.zeros((8, 8, 3), np.uint8)
            return [{"image": image, "captions": (), "id": 0, "key": "k", "boxes": boxes}]

    fields = (Image(), Boxes(count=5, min_visible=0.3))
    rows = batch(*fields, source=Four(), augment=(LeftHalf(),), batch_size=1)
    assert rows["boxes_mask"].tolist() == [[True, True, False, False, False]]
    np.testing.assert_allclose(rows["boxes"][0, :2], [[0, 0, 0.5, 1], [0.5, 0, 1, 1]])
    assert not rows["boxes"][0, 2:].any()

    @dataclasses.dataclass(frozen=True)
    class Silent(Augmentation):
        def __call__(self, image, size, rng):
            return image

    batch(Image(), source=Four(), augment=(Silent(),), batch_size=1)  # without boxes, it will do
    with pytest.raises(ClipjaxError, match=r"cannot follow Silent.*`mapped`"):
        batch(*fields, source=Four(), augment=(Silent(),), batch_size=1)


def test_a_field_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class Brightness(Field):
        name: str = "brightness"

        def spec(self, data):
            return {self.name: Spec((), "float32"), "noise": Spec((), "float32")}

        def read(self, example):
            return {self.name: example.picture().mean(), "noise": example.rng.random()}

    rows = batch(Brightness(), Image())
    records = Toy().open()
    expected = [records[i]["image"].mean() for i in rows["sample"]]
    np.testing.assert_allclose(rows["brightness"], expected, rtol=1e-6)
    assert len(set(rows["noise"].tolist())) == 8
    np.testing.assert_array_equal(rows["noise"], batch(Brightness())["noise"])


def write_table(folder, rows):
    from PIL import Image as Pillow

    lines = ["image\tcaption\textra"]
    for path, caption, extra in rows:
        Pillow.new("RGB", (8, 8), (len(path), 9, 9)).save(folder / path)
        lines.append(f"{path}\t{caption}\t{extra}")
    (folder / "captions.tsv").write_text("\n".join(lines))
    (folder / "captions.csv").write_text(
        "image,caption,extra\n" + "\n".join(f'{p},{c},"{e}"' for p, c, e in rows)
    )


def test_columns_of_a_table_are_entries(tmp_path):
    write_table(
        tmp_path,
        [
            ("a.png", "a one", "[1, 2]"),
            ("b.png", "b one", "[3, 4]"),
            ("b.png", "b two", "[3, 4]"),
            ("c.png", "c one", "first"),
            ("c.png", "c two", "second"),
        ],
    )
    records = ImageFolder(str(tmp_path), "captions.tsv").open()
    assert [r["extra"] for r in records] == ["[1, 2]", "[3, 4]", ["first", "second"]]
    assert [len(r["captions"]) for r in records] == [1, 2, 2]
    config = data(
        Text("hard", key="extra", count=2),
        source=ImageFolder(str(tmp_path), "captions.csv"),
        shuffle=False,
        batch_size=3,
    )
    rows = config.build(TOKENIZER, 0).batch(0)
    assert rows["hard_mask"].tolist() == [[True, False], [True, False], [True, True]]
    assert sorted(TOKENIZER.decode(rows["hard"][2])) == ["first", "second"]


def test_twemoji_brings_its_features(tfds_dir):
    source = Tfds("twemoji", "test[:16]", data_dir=tfds_dir)
    languages = ("en", "es", "ja", "ko", "zh")
    several = Text(
        "texts", captions=CaptionChoice(languages), count=4, language=True, context_length=40
    )
    config = data(
        Image(),
        Text(),
        several,
        Array("label", dtype="int32"),
        Text("base", key="base"),
        source=source,
    )
    rows = config.build(TOKENIZER, 0).batch(0)
    records = source.open()
    assert rows["texts_mask"].all()
    for sample, label, spoken in zip(
        rows["sample"], rows["label"], rows["texts_language"], strict=True
    ):
        record = records[sample]
        assert label == record["label"] and record["base"]
        assert len(set(spoken.tolist())) == 4 and set(spoken.tolist()) <= set(range(5))


def write_vectors(path, keys, vectors, column="embedding", key_column="key"):
    flat = pa.array(np.asarray(vectors, np.float32).reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(flat, np.shape(vectors)[1])
    pq.write_table(pa.table({key_column: keys, column: rows}), path)


def test_vectors_by_key(tmp_path):
    keys = [f"toy-{i}" for i in reversed(range(23))]
    vectors = np.arange(46).reshape(23, 2)
    for shard in range(3):
        part = slice(shard * 8, (shard + 1) * 8)
        name = tmp_path / f"t-{shard:05}-of-00003.parquet"
        write_vectors(name, keys[part], vectors[part])
    field = Embeddings("teacher_image", str(tmp_path / "t.parquet"))
    rows = batch(Image(), field)
    assert rows["teacher_image"].dtype == np.float32
    np.testing.assert_array_equal(rows["teacher_image"], vectors[22 - rows["sample"]])
    (tmp_path / "t-00001-of-00003.parquet").unlink()
    with pytest.raises(ClipjaxError, match=r"2 of 3 files of .*t\.parquet"):
        data(field).spec()


def test_vectors_of_the_very_text_that_is_shown(tmp_path):
    texts = list(dict.fromkeys(CAPTIONS))
    write_vectors(tmp_path / "t.parquet", texts, np.eye(3), key_column="text")
    by_text = Embeddings("teacher_text", str(tmp_path / "t.parquet"), by="text")
    several = Embeddings("teacher_texts", str(tmp_path / "t.parquet"), by="text", text="texts")
    rows = batch(Text(), Text("texts", count=3), by_text, several, batch_size=64)
    lower = [text.lower() for text in texts]
    for tokens, vector in zip(
        np.concatenate([rows["text"], rows["texts"].reshape(-1, 12)]),
        np.concatenate([rows["teacher_text"], rows["teacher_texts"].reshape(-1, 3)]),
        strict=True,
    ):
        assert lower[int(vector.argmax())] == TOKENIZER.decode(tokens[None])[0]
    with pytest.raises(ClipjaxError, match="'text' is no Text"):
        data(Image(), by_text).spec()


def test_vectors_that_are_missing_are_named(tmp_path):
    path = str(tmp_path / "t.parquet")
    write_vectors(path, [f"toy-{i}" for i in range(1, 23)], np.ones((22, 2)))
    config = data(Embeddings("teacher", path), max_error_rate=0)
    with pytest.raises(RunFailed, match=r"toy-0: .*t\.parquet has no vector"):
        for step in range(3):
            config.build(TOKENIZER, 0).batch(step)
    write_vectors(path, ["other-1", "other-2"], np.ones((2, 2)))
    with pytest.raises(ClipjaxError, match="'toy-0'; its first key is 'other-1'"):
        config.build(TOKENIZER, 0)
    write_vectors(path, ["toy-1", "toy-1"], np.ones((2, 2)))
    with pytest.raises(ClipjaxError, match="'toy-1' is there more than once"):
        config.build(TOKENIZER, 0)
    write_table(tmp_path, [("a.png", "a", 1), ("b.png", "b", 2)])
    write_vectors(path, ["a.png", "c.png"], np.ones((2, 2)))
    folder = data(Embeddings("teacher", path), source=ImageFolder(str(tmp_path)))
    with pytest.raises(ClipjaxError, match=r"no vector for 1 of the 2 records.*'b\.png'"):
        folder.build(TOKENIZER, 0)
    tolerant = dataclasses.replace(folder, max_error_rate=0.5)
    assert set(tolerant.build(TOKENIZER, 0).batch(0)["sample"]) == {0}
    with pytest.raises(ClipjaxError, match="no column 'vector'"):
        data(Embeddings("teacher", path, column="vector")).spec()


def test_fields_survive_json_and_old_runs_have_the_default_ones():
    config = data(*EVERYTHING, Boxes(), Embeddings("t", "x.parquet"))
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    old = to_json(data())
    del old["fields"]
    assert from_json(old).fields == (Image(), Text())
