"""Parquet, saved Hugging Face data sets, and what commands recognize at a path."""

import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipjax.data import (
    BPE,
    Array,
    ArrayRecord,
    ClassFolder,
    Data,
    ImageFolder,
    Parquet,
    PictureFolder,
    SavedDataset,
    Stream,
    TFRecord,
    UnreadableRecord,
    WebDataset,
    decode,
    found_source,
)
from clipjax.data import Image as ImageField
from clipjax.data.named import named_source
from clipjax.errors import ClipjaxError


def png(i) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (i, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def rows(n=12):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2.0 * n, dtype="f4")), 2)
    return {
        "jpg": [png(i) for i in range(n)],
        "caption": [f"number {i}" for i in range(n)],
        "key": [f"{i:05}" for i in range(n)],
        "label": [i % 3 for i in range(n)],
        "vector": vectors,
        "similarity": [i / 10 for i in range(n)],
    }


def read(source):
    opened = source.open()
    return [opened[i] for i in range(len(opened))]


@pytest.fixture
def files(tmp_path):
    table = pa.table(rows())
    pq.write_table(table.slice(0, 7), tmp_path / "00000.parquet", row_group_size=3)
    pq.write_table(table.slice(7), tmp_path / "00001.parquet", row_group_size=3)
    return tmp_path


def test_parquet(files):
    found = read(Parquet(files=str(files / "*.parquet")))
    assert [decode(r["image"])[0, 0, 0] for r in found] == list(range(12))
    assert [r["captions"] for r in found] == [(f"number {i}",) for i in range(12)]
    assert [r["key"] for r in found] == [f"{i:05}" for i in range(12)]
    assert [r["label"] for r in found] == [i % 3 for i in range(12)]
    assert [r["id"] for r in found] == list(range(12))
    assert found[5]["similarity"] == 0.5 and "jpg" not in found[5]
    np.testing.assert_array_equal(found[5]["vector"], [10, 11])


def test_row_groups_are_the_runs_of_a_stream(files, monkeypatch):
    source = Parquet(files=str(files / "*.parquet"))
    assert source.open().runs(100).tolist() == [0, 3, 6, 7, 10, 12]
    reads = []
    group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, columns=None: reads.append(i) or group(self, i, columns=columns),
    )
    fields = (ImageField(), Array("vector", shape=(2,)))
    config = Data(
        source, image_size=4, batch_size=4, fields=fields, stream=Stream(lanes=2, block=1)
    )
    loader = config.build(BPE(300).build(["x"]), 0)
    reads.clear()
    seen = np.concatenate([loader.batch(step)["sample"] for step in range(30)])
    assert set(seen.tolist()) == set(range(12))
    assert len(reads) <= 2 + 30 * 4 * 5 / 12  # each group once an epoch
    rows = loader.batch(3)
    np.testing.assert_array_equal(rows["vector"][:, 0], 2 * rows["sample"])


def test_texts_of_parquet_are_read_without_pictures(files, monkeypatch):
    opened = Parquet(files=str(files / "*.parquet")).open()
    asked = []
    group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, columns=None: asked.append(columns) or group(self, i, columns=columns),
    )
    assert opened.facts(8)["captions"] == ("number 8",)
    assert all("jpg" not in columns for columns in asked)


def saved(folder, n=5, **changes):
    """As `datasets.Dataset.save_to_disk` lays it out."""
    folder.mkdir(parents=True)
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    }
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    images = [{"bytes": png(i), "path": None} for i in range(n)]
    table = pa.table(
        {"image": images, "label": [i % 2 for i in range(n)], "text": [f"t {i}" for i in range(n)]}
    ).replace_schema_metadata(metadata)
    for number, part in enumerate((table.slice(0, 2), table.slice(2))):
        name = folder / f"data-{number:05}-of-00002.arrow"
        with pa.OSFile(str(name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part)
    names = [{"filename": f"data-{i:05}-of-00002.arrow"} for i in range(2)]
    state = {"_data_files": names, "_split": "train"} | changes
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_data_set(tmp_path):
    source = SavedDataset(folder=str(saved(tmp_path / "d")))
    found = read(source)
    assert [decode(r["image"])[0, 0, 0] for r in found] == list(range(5))
    assert [(r["captions"], r["label"]) for r in found] == [((f"t {i}",), i % 2) for i in range(5)]
    assert source.open().class_names == ("cat", "dog")
    saved(tmp_path / "both" / "train"), saved(tmp_path / "both" / "test", 3)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(read(SavedDataset(folder=str(tmp_path / "both"), split="test"))) == 3
    with pytest.raises(ClipjaxError, match=r"no split 'tset'; did you mean 'test'"):
        SavedDataset(folder=str(tmp_path / "both"), split="tset").open()
    saved(tmp_path / "selected", _indices_data_files=[{"filename": "i.arrow"}])
    with pytest.raises(ClipjaxError, match="flatten_indices"):
        SavedDataset(folder=str(tmp_path / "selected")).open()


def test_paths_and_lists_in_columns(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    table = {
        "image": ["0.png", "1.png", "../up.png", None],
        "captions": [["a", "b"], ["c"], [], None],
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    opened = Parquet(files=str(tmp_path / "t.parquet")).open()
    assert opened[0]["captions"] == ("a", "b") and opened[1]["captions"] == ("c",)
    assert decode(opened[1]["image"])[0, 0, 0] == 1 and opened[1]["key"] == "t.parquet:1"
    for index, message in ((2, "leads out of the folder"), (3, "holds no picture")):
        with pytest.raises(UnreadableRecord, match=rf"t\.parquet:{index}: .*{message}"):
            opened[index]
    assert [isinstance(r, UnreadableRecord) for r in opened.read_run(0, 4)] == [False] * 2 + [
        True
    ] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: Parquet(files=str(t / "none.parquet")), "there is no file"),
        (lambda t: Parquet(files=str(t / "text.parquet")), "text.parquet is no Parquet file"),
        (lambda t: Parquet(files=str(t / "odd.parquet")), "set image_column to one of a, b"),
        (lambda t: Parquet(files=str(t / "odd.parquet"), image_column="c"), "'c' is no column"),
        (lambda t: SavedDataset(folder=str(t)), "holds no data set"),
    ],
)
def test_refusals(tmp_path, make, message):
    (tmp_path / "text.parquet").write_text("text")
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "odd.parquet")
    with pytest.raises(ClipjaxError, match=message):
        make(tmp_path).open()


def pictures(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(1))


@pytest.mark.parametrize(
    ("table", "text", "captions"),
    [
        ("captions.csv", "image,caption\na.png,x\n", ("x",)),
        ("metadata.csv", "file_name,text\na.png,x\n", ("x",)),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}', ("x",)),
        ("metadata.csv", "file_name\na.png\n", ()),
        ("captions.csv", "filepath\ttitle\na.png\tx, y\n", ("x, y",)),
        ("captions.tsv", 'filepath\ttitle\na.png\t"x"\n', ('"x"',)),
    ],
)
def test_tables_by_the_usual_names(tmp_path, table, text, captions):
    pictures(tmp_path, "a.png")
    (tmp_path / table).write_text(text)
    for path in (tmp_path, tmp_path / table):
        source = found_source(str(path), captions=True)
        assert isinstance(source, ImageFolder)
        (record,) = read(source)
        assert (record["key"], record["captions"]) == ("a.png", captions)


def test_paths_of_a_table_may_start_at_the_working_folder(tmp_path, monkeypatch):
    pictures(tmp_path / "box", "a.png", "b.png")
    (tmp_path / "box/train.csv").write_text("filepath\ttitle\nbox/b.png\tx\nbox/a.png\ty\n")
    monkeypatch.chdir(tmp_path)  # as OpenCLIP's tables are written
    for path in ("box/train.csv", str(tmp_path / "box" / "train.csv")):
        source = found_source(path, captions=True)
        assert [os.path.isfile(r["image"]) for r in read(source)] == [True, True]
        assert [r["captions"] for r in read(source)] == [("x",), ("y",)]
    pictures(tmp_path / "box/box", "b.png")  # one that the table's own folder holds comes first
    assert found_source("box/train.csv", captions=True).root == "box"
    monkeypatch.chdir(tmp_path / "box" / "box")  # the table is not within: nothing of here is read
    assert found_source("../train.csv", captions=True).root == ".."


@pytest.mark.parametrize("end", ["tar", "tfrecord", "array_record"])
def test_img2datasets_parquet_beside_its_shards_is_no_source(tmp_path, end):
    pq.write_table(pa.table({"url": ["x"], "caption": ["x"]}), tmp_path / "00000.parquet")
    (tmp_path / f"00000.{end}").write_bytes(b"")
    kind = {"tar": WebDataset, "tfrecord": TFRecord, "array_record": ArrayRecord}[end]
    assert found_source(str(tmp_path), True) == kind(str(tmp_path / f"*.{end}"))


def test_img2datasets_parquet_beside_its_folders_is_no_source(tmp_path):
    pq.write_table(pa.table({"url": ["x"], "caption": ["x"]}), tmp_path / "00000.parquet")
    pictures(tmp_path, "00000/0.png")
    (tmp_path / "00000/0.txt").write_text("x")
    assert found_source(str(tmp_path), True) == PictureFolder(str(tmp_path), texts=True)


def test_what_a_folder_holds(tmp_path, files):
    assert found_source(str(files), True) == Parquet(files=str(files / "*.parquet"))
    assert found_source(str(files / "00000.parquet"), True).files.endswith("00000.parquet")
    assert isinstance(found_source(str(saved(tmp_path / "hf")), True), SavedDataset)
    pictures(tmp_path / "pairs", "00000/0.png", "00001/1.png")
    (tmp_path / "pairs/00000/0.txt").write_text("\ufefffirst\n", encoding="utf-8")
    source = found_source(str(tmp_path / "pairs"), True)
    assert source == PictureFolder(str(tmp_path / "pairs"), texts=True)
    assert [r["captions"] for r in read(source)] == [("first",), ()]
    pictures(tmp_path / "classes", "cat/0.png", "dog/1.png")
    assert found_source(str(tmp_path / "classes"), True) == ClassFolder(str(tmp_path / "classes"))
    assert isinstance(found_source(str(tmp_path / "classes"), False), PictureFolder)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"")
    assert found_source(str(tmp_path / "tars"), True) == WebDataset(
        str(tmp_path / "tars" / "*.tar")
    )
    assert found_source(str(tmp_path / "nothing"), True) is None
    for name, kind in (
        ("a.tfrecord", TFRecord),
        ("b-train.array_record-00000-of-00001", ArrayRecord),
    ):
        (tmp_path / name).write_bytes(b"")
        for path in (str(tmp_path / name), f"gs://bucket/{name}", f"s3://bucket/*{name[1:]}"):
            assert found_source(path, True) == kind(path)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "0.array_record").write_bytes(b"")
    assert found_source(str(tmp_path / "records"), True) == ArrayRecord(
        str(tmp_path / "records" / "*.array_record")
    )
    (tmp_path / "metadata.csv").write_text("url,text\nx,y\n")
    with pytest.raises(ClipjaxError, match="columns url, text, of which none is called"):
        found_source(str(tmp_path / "metadata.csv"), True)


def test_columns_and_extensions_from_the_command_line(tmp_path):
    source = named_source("a/{0..3}.tar", label_key="cls", caption_key="json:caption")
    assert source.label_key == "cls" and source.caption_keys == ("json:caption",)
    pictures(tmp_path, "a.png")
    (tmp_path / "captions.csv").write_text("image,caption,kind\na.png,x,cat\n")
    assert named_source(str(tmp_path), label_key="kind").label_column == "kind"
    with pytest.raises(ClipjaxError, match="data_dir: not for what is at"):
        named_source(str(tmp_path), data_dir="x")
