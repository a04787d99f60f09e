import io
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipjax import load
from clipjax.predictor import Predictor


def embed(run, source, out, model, *more):
    code, printed, err = run("embed", source, "--out", out, "--model", model, *more)
    assert code == 0, err
    return printed.split(), err


def table(*files):
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return rows, np.array([row["embedding"] for row in rows], np.float32)


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_folder(run, model, pictures, hostile, tmp_path):
    refusals = hostile(pictures)
    files, err = embed(run, pictures, tmp_path / "x.parquet", model)
    assert files == [str(tmp_path / "x.parquet")]
    rows, embedded = table(files[0])
    names = ["blue.png", "deep/gray.png", "green.png", "red.png"]
    assert [row["key"] for row in rows] == names
    expected = load(model).encode_image([pictures / name for name in names])
    np.testing.assert_allclose(embedded, expected, atol=1e-6)
    for name in refusals:
        assert f"skipped: {name}: " in err
    assert "4 pictures embedded in" in err and f"{len(refusals)} skipped" in err
    assert "pictures/s" in err
    files, err = embed(run, pictures, tmp_path / "x.parquet", model)
    assert "0 pictures embedded" in err and "1 of 1 files were finished already" in err


def test_shards_and_resuming_after_a_kill(run, model, pictures, tmp_path, monkeypatch):
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 9, 9)).save(pictures / f"n{i}.png")
    out = tmp_path / "x.parquet"
    calls = []
    encode = Predictor.encode_image

    def killed(self, images):
        if len(images):
            calls.append(len(images))
            if len(calls) == 3:
                raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(Predictor, "encode_image", killed)
    with pytest.raises(KeyboardInterrupt):
        run("embed", pictures, "--out", out, "--model", model, "--shard-size", 4)
    monkeypatch.setattr(Predictor, "encode_image", encode)
    # Shards 0 and 1 are finished; of shard 2 there is nothing under its name.
    names = [f"x-{i:05}-of-00003.parquet" for i in range(3)]
    assert sorted(p.name for p in tmp_path.glob("x*")) == names[:2]
    finished = [(tmp_path / n).stat().st_mtime_ns for n in names[:2]]
    (tmp_path / (names[2] + ".tmp")).write_bytes(b"what a kill -9 leaves")
    files, err = embed(run, pictures, out, model, "--shard-size", 4, "--batch-size", 8)
    assert [f.rsplit("/", 1)[1] for f in files] == names
    assert "2 of 3 files were finished already" in err and "2 pictures embedded" in err
    assert [(tmp_path / n).stat().st_mtime_ns for n in names[:2]] == finished
    assert not list(tmp_path.glob("*.tmp"))
    rows, embedded = table(*files)
    assert len({row["key"] for row in rows}) == 10
    expected = load(model).encode_image([pictures / row["key"] for row in rows])
    np.testing.assert_allclose(embedded, expected, atol=1e-6)


def test_files_of_something_else_are_never_mixed_in(run, model, sigmoid_model, pictures, tmp_path):
    out = tmp_path / "x.parquet"
    embed(run, pictures, out, model)
    before = out.read_bytes()

    def refused(*arguments):
        code, _, err = run("embed", *arguments)
        assert code == 2 and out.read_bytes() == before
        return err

    assert "with model" in refused(pictures, "--out", out, "--model", sigmoid_model)
    assert "another division" in refused(
        pictures, "--out", out, "--model", model, "--shard-size", 3
    )
    Image.new("RGB", (16, 16)).save(pictures / "new.png")
    assert "with source" in refused(pictures, "--out", out, "--model", model)
    out.write_bytes(before := b"somebody's own file")
    assert "was not written by clipjax embed" in refused(pictures, "--out", out, "--model", model)


def test_tars_with_captions(run, model, tmp_path):
    first = [("a.png", png("red")), ("a.txt", b"a red square"), ("b.png", b"broken")]
    write_tar(tmp_path / "t-0.tar", first)
    write_tar(
        tmp_path / "t-1.tar", [("c.png", png("blue")), ("d.png", png("lime")), ("d.txt", b"d")]
    )
    files, err = embed(run, tmp_path / "t-{0..1}.tar", tmp_path / "x.parquet", model, "--captions")
    rows, embedded = table(*files)
    assert [(r["key"], r["caption"]) for r in rows] == [
        ("t-0.tar:a", "a red square"), ("t-1.tar:c", None), ("t-1.tar:d", "d")
    ]  # fmt: skip
    assert rows[1]["caption_embedding"] is None and "skipped: t-0.tar:b" in err
    predictor = load(model)
    text = predictor.encode_text(["a red square", "d"])
    got = np.array([rows[i]["caption_embedding"] for i in (0, 2)])
    np.testing.assert_allclose(got, text, atol=1e-6)
    image = predictor.encode_image([png("red"), png("blue"), png("lime")])
    np.testing.assert_allclose(embedded, image, atol=1e-6)


def test_files_of_examples(run, model, tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    file = tmp_path / "x.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for color in ("red", "blue"):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(png(color))
        example.features.feature["key"].bytes_list.value.append(color.encode())
        writer.write(example.SerializeToString())
    writer.close()
    files, _ = embed(run, file, tmp_path / "x.parquet", model)
    rows, embedded = table(*files)
    assert [row["key"] for row in rows] == ["red", "blue"]
    expected = load(model).encode_image([png("red"), png("blue")])
    np.testing.assert_allclose(embedded, expected, atol=1e-6)


def test_hostile_tars(run, model, tmp_path, tree):
    box = tmp_path / "box"
    box.mkdir()
    climbing = [("../out.png", png("red")), ("/abs.png", png("red")), ("x/../../y.png", png("red"))]
    write_tar(box / "a.tar", [*climbing, ("ok.png", png("blue"))])
    with tarfile.open(box / "a.tar", "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    before = tree(box)
    files, _ = embed(run, box / "a.tar", tmp_path / "x.parquet", model)
    assert [row["key"] for row in table(*files)[0]] == ["a.tar:ok"]
    assert tree(box) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["box", "x.parquet"]
    content = bytearray((box / "a.tar").read_bytes())
    content[124:136] = b"\xff" * 10 + b"\xfe\0"  # the first size, in base 256: -512, back to itself
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (box / "b.tar").write_bytes(content)
    code, _, err = run("embed", box / "b.tar", "--out", tmp_path / "y.parquet", "--model", model)
    assert code == 2 and "b.tar' gives '../out.png' a negative size" in err
    (box / "c.tar").write_bytes((box / "a.tar").read_bytes()[:900])
    code, _, err = run("embed", box / "c.tar", "--out", tmp_path / "y.parquet", "--model", model)
    assert code == 2 and "c.tar" in err and not (tmp_path / "y.parquet").exists()


def test_a_table_that_climbs_out(run, model, pictures, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    rows = ["red.png,a", "../secret.png,b", f"{tmp_path}/secret.png,c", "link.png,d", "/dev/zero,e"]
    (pictures / "t.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    files, err = embed(run, pictures / "t.csv", tmp_path / "x.parquet", model, "--captions")
    assert [(r["key"], r["caption"]) for r in table(*files)[0]] == [("red.png", "a")]
    assert err.count("leads out of the folder") == 4


def test_texts(run, model, tmp_path):
    (tmp_path / "t.txt").write_text("a red square\n\n  猫  \nx\n")
    files, err = embed(run, tmp_path / "t.txt", tmp_path / "x.parquet", model, "--shard-size", 2)
    rows, embedded = table(*files)
    assert [(r["key"], r["text"]) for r in rows] == [("1", "a red square"), ("3", "猫"), ("4", "x")]
    expected = load(model).encode_text(["a red square", "猫", "x"])
    np.testing.assert_allclose(embedded, expected, atol=1e-6)
    assert "3 texts embedded" in err


def test_tfds(run, model, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "shades"
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # noqa: RUF012

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["a", "b"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                yield i, {"image": png((50 * i, 0, 0)), "caption": f"shade {i}", "label": i % 2}

    Builder(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    # The colons of a version and of a slice are no separators.
    source = "tfds:shades:1.0.0:test[:75%]"
    embed(run, source, tmp_path / "x.parquet", model, "--captions")
    rows, embedded = table(tmp_path / "x.parquet")
    assert len(rows) == 3 and all(row["label"] == int(row["caption"][-1]) % 2 for row in rows)
    shades = [png((50 * int(row["caption"][-1]), 0, 0)) for row in rows]
    np.testing.assert_allclose(embedded, load(model).encode_image(shades), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "x.parquet"], "'nowhere': there is no such file or folder"),
        (["t.txt", "--out", "x.csv"], "must end in .parquet"),
        (["t.txt", "--out", "nowhere/x.parquet"], "no folder to write it into"),
        (["t.txt", "--out", "x.parquet", "--shard-size", "0"], "shard_size=0"),
        (["t.txt", "--out", "x.parquet", "--batch-size", "0"], "batch_size=0"),
        (["t.txt", "--out", "x.parquet", "--captions"], "the source is texts already"),
        (["empty.txt", "--out", "x.parquet"], "holds no text"),
        (["latin.txt", "--out", "x.parquet"], "not readable as UTF-8"),
        (["t.bin", "--out", "x.parquet"], "SOURCE is a folder of pictures"),
        (["tfds:x", "--out", "x.parquet"], "write tfds:NAME:SPLIT"),
        (["."], "the following arguments are required: --out"),
    ],
)
def test_bad_options_are_refused(run, model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("x\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\n")
    (tmp_path / "t.bin").write_bytes(b"\0")
    code, _, err = run("embed", *arguments, "--model", model)
    assert code == 2 and message in err
    assert not (tmp_path / "x.parquet").exists()
