import json
import os

import numpy as np
import pytest
from PIL import Image

from clipjax.data import (
    ClassFolder,
    ImageFolder,
    PictureFolder,
    UnreadableRecord,
    decode,
    load_eval,
)
from clipjax.errors import ClipjaxError


@pytest.fixture
def root(tmp_path):
    for i, name in enumerate(("a.png", "b.png", "deep/c.jpg")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (i * 50, 0, 0)).save(path)
    return tmp_path


def read(source):
    opened = source.open()
    return [opened[i] for i in range(len(opened))]


def test_csv_with_several_rows_per_picture(root):
    (root / "captions.csv").write_text(
        'image,caption\na.png,"one, two"\nb.png,three\na.png,"a ""quoted"" one"\ndeep/c.jpg,猫\n'
    )
    found = read(ImageFolder(str(root)))
    assert [(r["key"], r["captions"], r["id"]) for r in found] == [
        ("a.png", ("one, two", 'a "quoted" one'), 0),
        ("b.png", ("three",), 1),
        ("deep/c.jpg", ("猫",), 2),
    ]
    assert [decode(r["image"])[0, 0, 0] for r in found[:2]] == [0, 50]


def test_tsv_with_languages_and_labels(root):
    (root / "t.tsv").write_bytes(
        "\ufefffile\ten\tzh\tkind\r\na.png\tcat\t猫\tpet\r\nb.png\tox\t牛\tfarm\r\n".encode()
    )
    source = ImageFolder(str(root), "t.tsv", "file", ("zh", "en"), ("zh", "en"), "kind")
    assert source.open().class_names == ("farm", "pet")
    assert [(r["captions"], r["languages"], r["label"]) for r in read(source)] == [
        (("猫", "cat"), ("zh", "en"), 1),
        (("牛", "ox"), ("zh", "en"), 0),
    ]


def test_jsonl_with_lists_and_nulls(root):
    rows = [
        {"image": "a.png", "caption": ["x", "y"]},
        {"image": str(root / "b.png"), "caption": None},
    ]
    (root / "t.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    found = read(ImageFolder(str(root), "t.jsonl"))
    assert [r["captions"] for r in found] == [("x", "y"), ()]
    assert decode(found[1]["image"])[0, 0, 0] == 50  # an absolute path


def test_a_missing_picture_is_named_when_it_is_read(root):
    (root / "captions.csv").write_text("image,caption\na.png,x\ngone.png,y\n")
    record = read(ImageFolder(str(root)))[1]
    with pytest.raises(UnreadableRecord, match=r"gone.png: there is no file '.*gone.png'"):
        decode(record["image"], record["key"])


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("captions.csv", None, "no table '.*captions.csv'; did you mean 'caption.csv'"),
        (
            "t.csv",
            b"image,captoin\na.png,x\n",
            "line 2, has no column 'caption'; did you mean 'capt",
        ),
        (
            "t.csv",
            b"filepath,caption\na.png,x\n",
            r"no column 'image'; known: caption, filepath \(image_column says which\)",
        ),
        ("t.csv", b"", "has no rows"),
        ("t.csv", b"image,caption\n", "has no rows"),
        ("t.csv", "image,caption\na.png,é\n".encode("latin-1"), "not UTF-8"),
        ("t.txt", b"x", "must end in .csv, .tsv or .jsonl"),
        ("t.jsonl", b'{"image": "a.png", "caption": "x"}\n{', "line 2, is not JSON"),
        ("t.jsonl", b"[1]", "line 1, is not a JSON object"),
    ],
)
def test_bad_tables_are_named(root, table, content, message):
    (root / "caption.csv").write_text("")
    if content is not None:
        (root / table).write_bytes(content)
    with pytest.raises(ClipjaxError, match=message):
        ImageFolder(str(root), table).open()


def test_languages_must_match_the_columns():
    with pytest.raises(ClipjaxError, match="2 languages for 1 caption columns"):
        ImageFolder("x", languages=("en", "de"))


def test_class_folders(root):
    for name in ("polar_bear", "ant"):
        (root / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(root / "classes" / name / "1.png")
    (root / "classes" / "ant" / "notes.txt").write_text("no picture")
    found = load_eval(ClassFolder(str(root / "classes")), 2)
    assert found.class_names == ("ant", "polar_bear")
    np.testing.assert_array_equal(found.labels, [0, 1])
    assert found.captions == (("ant",), ("polar bear",))
    with pytest.raises(ClipjaxError, match="no folder 'nowhere'"):
        ClassFolder("nowhere").open()
    with pytest.raises(ClipjaxError, match="holds a picture"):
        ClassFolder(str(root / "classes" / "ant")).open()


def test_pictures_of_a_folder(root, tmp_path_factory, caplog):
    outside = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (2, 2)).save(outside / "x.png")
    (root / "out.png").symlink_to(outside / "x.png")
    (root / "in.png").symlink_to("a.png")
    (root / "loop").symlink_to(root)
    (root / "folder.png").mkdir()
    (root / ".hidden").mkdir()
    Image.new("RGB", (2, 2)).save(root / ".hidden" / "h.png")
    (root / "notes.txt").write_text("no picture")
    for name in (b"\xff.png", b"\x1b[2J.png"):
        with open(os.path.join(os.fsencode(root), name), "wb"):
            pass
    found = read(PictureFolder(str(root)))
    assert [r["key"] for r in found] == ["a.png", "b.png", "deep/c.jpg", "in.png"]
    assert "out.png: a link out of the folder" in caplog.text
    assert r"'\udcff.png': a name with control" in caplog.text and "\x1b" not in caplog.text
    assert "loop: a link to a folder" in caplog.text
    with pytest.raises(ClipjaxError, match="no folder 'nowhere'"):
        PictureFolder("nowhere").open()
    with pytest.raises(ClipjaxError, match="holds no picture"):
        PictureFolder(str(root / "folder.png")).open()


@pytest.mark.parametrize(
    "path", ["../x.png", "{outside}/x.png", "link.png", "deep/../../x.png", "a\0"]
)
def test_a_table_reads_nothing_outside_of_its_folder(root, tmp_path_factory, path):
    outside = tmp_path_factory.mktemp("outside")
    for place in (outside, root.parent):
        Image.new("RGB", (2, 2)).save(place / "x.png")
    (root / "link.png").symlink_to(outside / "x.png")
    row = {"image": path.replace("{outside}", str(outside)), "caption": "x"}
    (root / "t.jsonl").write_text(json.dumps(row))
    opened = ImageFolder(str(root), "t.jsonl").open()
    with pytest.raises(UnreadableRecord, match="leads out of the folder"):
        opened[0]


def table(folder, name, text, **fields):
    (folder / name).write_text(text, encoding="utf-8")
    return ImageFolder(str(folder), name, **fields)


def test_in_a_tsv_a_quote_is_text(root):
    rows = ["image\tcaption", 'a.png\t"a cat', "b.png\ta dog", 'c.png\t"Stop" sign']
    found = read(table(root, "t.tsv", "\n".join(rows)))
    assert [r["captions"] for r in found] == [('"a cat',), ("a dog",), ('"Stop" sign',)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "image,caption\na.png,a cat, asleep\n", r"line 2, has 3 fields for 2 columns"),
        ("t.tsv", "image\tcaption\na.png\tx\ty\n", r"line 2, has 3 fields for 2 columns"),
        ("t.csv", 'image,caption\na.png,ok\nb.png,"a" cat\n', r"line 3, cannot be read"),
        ("t.csv", 'image,caption\na.png,"open\nb.png,x\n', r"line 2, cannot be read"),
        ("t.csv", "image,caption,caption\na.png,x,y\n", "two columns called 'caption'"),
        ("t.csv", "image,caption\n ,x\n", "line 2, names no picture"),
        ("t.jsonl", '{"image": null, "caption": "x"}', "line 1, names no picture"),
        ("t.jsonl", '{"image": "a.png", "caption": {"en": "x"}}', "line 1: 'caption' is dict"),
        ("t.jsonl", '{"image": "a.png", "caption": ["a", ["b"]]}', "line 1: 'caption' is list"),
    ],
)
def test_rows_that_are_none_are_refused_by_line(root, name, text, message):
    with pytest.raises(ClipjaxError, match=message):
        table(root, name, text).open()


def test_values_that_are_no_text_are_no_captions(root):
    rows = ['[null, "x"]', "NaN", "7", '"\\ud83d\\ude00 \\ud83d"']
    lines = [f'{{"image": "{i}.png", "caption": {row}}}' for i, row in enumerate(rows)]
    found = read(table(root, "t.jsonl", "\n".join(lines)))
    assert [r["captions"] for r in found] == [("x",), (), ("7",), ("\U0001f600 \ufffd",)]


def test_a_long_text_and_an_absent_label(root):
    text = f"image,caption,label\na.png,{'x' * 140_000},cat\nb.png,y,\nc.png,z, \n"
    opened = table(root, "t.csv", text, label_column="label").open()
    assert len(opened[0]["captions"][0]) == 140_000
    assert opened.class_names == ("cat",)
    assert [opened[i]["label"] for i in range(3)] == [0, -1, -1]


def test_folders_that_are_no_classes_and_classes_without_pictures(tmp_path, caplog):
    for name in ("dog", "hot_dog", "empty", ".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / name).mkdir()
    for name in ("dog/a.png", "hot_dog/._b.png", "hot_dog/b.JFIF", ".ipynb_checkpoints/a.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name, "png")
    opened = ClassFolder(str(tmp_path)).open()
    assert opened.class_names == ("dog", "empty", "hot_dog")
    assert [(r["key"], r["label"], r["captions"]) for r in opened] == [
        ("dog/a.png", 0, ("dog",)),
        ("hot_dog/b.JFIF", 2, ("hot dog",)),
    ]
    assert "the class 'empty'" in caplog.text


@pytest.mark.parametrize("suffix", ["jpg", "jfif", "jpe", "avif", "jp2", "ppm", "webp", "tif"])
def test_every_format_that_is_decoded_is_found(tmp_path, suffix):
    kind = {"jfif": "jpeg", "jpe": "jpeg", "jp2": "jpeg2000", "jpg": "jpeg", "tif": "tiff"}
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{suffix}", kind.get(suffix, suffix))
    (record,) = read(PictureFolder(str(tmp_path)))
    assert decode(record["image"]).shape == (8, 8, 3)


def test_class_names_are_spoken_with_spaces(tmp_path):
    from clipjax.evals import ZeroShot
    from clipjax.evals.zeroshot import _by_label

    for name in ("hot_dog", "snow_leopard"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / name / "a.png")
    source = ClassFolder(str(tmp_path))
    assert source.open().class_names == ("hot_dog", "snow_leopard")  # as other folders are matched
    found = _by_label(ZeroShot(source=source), load_eval(source, 8))
    assert found[""].names == ("hot dog", "snow leopard")
