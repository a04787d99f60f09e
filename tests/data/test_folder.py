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
    assert [r["captions"] for r in found] == [("x", "y"), ("",)]
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
