import json
import os
import re
import shutil
import struct
import tarfile

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from clipjax import load
from clipjax.predictor import Predictor


@pytest.fixture
def embedded(monkeypatch):
    """How many pictures go through the image encoder."""
    counted = []
    encode = Predictor.encode_image

    def counting(self, images):
        if isinstance(images, np.ndarray) and images.ndim == 4:
            counted.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Predictor, "encode_image", counting)

    def since():
        total = sum(counted)
        counted.clear()
        return total

    return since


def search(run, folder, model, *more):
    code, out, err = run("search", folder, "a red square", "--model", model, "--json", *more)
    assert code == 0, err
    return [(hit["image"], hit["score"]) for hit in json.loads(out)["images"]], err


def kept(folder):
    return sorted((folder / ".clipjax").glob("*.safetensors"))


def test_pictures_are_ranked_by_cosine(run, model, pictures):
    hits, err = search(run, pictures, model)
    names = ["blue.png", "deep/gray.png", "green.png", "red.png"]
    predictor = load(model)
    images = predictor.encode_image([pictures / name for name in names])
    cosine = images.astype(np.float64) @ predictor.encode_text("a red square")
    expected = sorted(zip(names, cosine, strict=True), key=lambda pair: -pair[1])
    assert [name for name, _ in hits] == [name for name, _ in expected]
    np.testing.assert_allclose([s for _, s in hits], [s for _, s in expected], atol=1e-5)
    assert "4 pictures embedded" in err
    code, out, _ = run("search", pictures, "a red square", "--model", model, "--top", 2)
    assert code == 0 and out.count(".png") == 2 and expected[0][0] in out


def test_embeddings_are_kept_and_follow_the_files(run, model, sigmoid_model, pictures, embedded):
    first, _ = search(run, pictures, model)
    assert embedded() == 4
    assert search(run, pictures, model)[0] == first and embedded() == 0
    Image.new("RGB", (20, 16), (9, 99, 9)).save(pictures / "new.png")
    (pictures / "red.png").unlink()
    old = dict(first)["green.png"]
    Image.new("RGB", (20, 16), (200, 100, 0)).save(pictures / "green.png")
    os.utime(pictures / "green.png", ns=(1, 1))
    second, _ = search(run, pictures, model)
    assert embedded() == 2  # the new one and the changed one
    assert {name for name, _ in second} == {"blue.png", "deep/gray.png", "green.png", "new.png"}
    assert dict(second)["green.png"] != old
    assert second == search(run, pictures, model, "--no-cache")[0] and embedded() == 4
    search(run, pictures, sigmoid_model)  # another model has embeddings of its own
    assert embedded() == 4 and len(kept(pictures)) == 2
    assert search(run, pictures, model)[0] == second and embedded() == 0
    assert (pictures / ".clipjax" / ".gitignore").read_text() == "*\n"


def test_a_removed_picture_is_forgotten_also_in_the_kept_file(run, model, pictures):
    search(run, pictures, model)
    (pictures / "red.png").unlink()
    search(run, pictures, model)
    assert b"blue.png" in kept(pictures)[0].read_bytes()
    assert b"red.png" not in kept(pictures)[0].read_bytes()


def test_no_cache_writes_nothing(run, model, pictures, tree):
    before = tree(pictures)
    search(run, pictures, model, "--no-cache")
    assert tree(pictures) == before


@pytest.mark.parametrize("damage", ["cut", "nonsense", "wrong parts", "not finite"])
def test_damaged_embeddings_are_made_anew(run, model, pictures, embedded, damage):
    from safetensors.numpy import load_file, save_file

    first, _ = search(run, pictures, model)
    file = kept(pictures)[0]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "nonsense":
        file.write_bytes(b"\xff" * 100)
    else:
        parts = load_file(file)
        if damage == "wrong parts":
            parts["embeddings"] = parts["embeddings"][:-1].copy()
        else:
            parts["embeddings"][0, 0] = np.nan
        save_file(parts, file)
    embedded()
    again, _ = search(run, pictures, model)
    assert again == first and embedded() == 4
    assert search(run, pictures, model)[0] == first and embedded() == 0


def test_what_is_done_is_kept_when_the_command_is_stopped(
    run, model, pictures, monkeypatch, embedded
):
    search(run, pictures, model)
    embedded()
    for i in range(3):
        Image.new("RGB", (20, 16), (i, i, 9)).save(pictures / f"more{i}.png")
    encode = Predictor.encode_text

    def stop(self, texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "encode_text", stop)
    with pytest.raises(KeyboardInterrupt):
        run("search", pictures, "x", "--model", model)
    assert embedded() == 3
    monkeypatch.setattr(Predictor, "encode_text", encode)
    search(run, pictures, model)
    assert embedded() == 0


def test_a_folder_that_cannot_be_written_works_without(run, model, pictures):
    (pictures / ".clipjax").write_text("a file where the folder would be")
    first, _ = search(run, pictures, model)
    assert len(first) == 4
    assert (pictures / ".clipjax").read_text() == "a file where the folder would be"


def test_hostile_folders(run, model, pictures, hostile, tree, tmp_path):
    refusals = hostile(pictures)
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(pictures / "red.png", outside / "secret.png")
    (pictures / "link.png").symlink_to(outside / "secret.png")
    (pictures / "climb").symlink_to(outside)
    (pictures / "within.png").symlink_to("blue.png")
    os.mkfifo(pictures / "pipe.png")
    (pictures / "folder.png").mkdir()
    (pictures / ".clipjax").symlink_to(outside)  # would have the embeddings written there
    before = tree(tmp_path)
    hits, err = search(run, pictures, model, "--html", tmp_path / "page.html")
    assert {name for name, _ in hits} == {
        "blue.png", "deep/gray.png", "green.png", "red.png", "within.png"
    }  # fmt: skip
    for name, message in refusals.items():
        assert re.search(f"skipped: {name}: .*{message}", err)
    assert "left out: link.png: a link out of the folder" in err
    assert "left out: climb: a link to a folder" in err
    assert "left out: pipe.png: no regular file" in err
    after = tree(tmp_path)
    after.pop("page.html")
    assert after == before


def test_the_gallery_is_one_file_and_shows_names_as_text(run, model, pictures, tmp_path):
    name = "<script>alert(1)<\u2215script>.png"
    (pictures / "red.png").rename(pictures / name)
    page = tmp_path / "found.html"
    words = 'a "red" <b>square</b>'
    code, out, _ = run(
        "search", pictures, words, "--model", model, "--html", page, "--top", 3, "--no-cache"
    )
    assert code == 0 and str(page) in out
    html = page.read_text()
    assert html.count('src="data:image/webp;base64,') == 3
    assert "<b>square" not in html and "&lt;b&gt;square" in html and "<script" not in html
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html) and "http" not in html.replace(
        "http-equiv", ""
    )
    run("search", pictures, words, "--model", model, "--html", page, "--top", 9, "--no-cache")
    assert "&lt;script&gt;" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "x"], "'nowhere': there is no such file or folder"),
        (["{pictures}", " "], "the words to look for are empty"),
        (["{pictures}", "x", "--top", "0"], "--top 0"),
        (["{pictures}", "x", "--html", "nowhere/x.html"], "no folder to write it into"),
        (["{pictures}/empty", "x"], "holds no picture"),
    ],
)
def test_bad_options_are_refused(run, model, pictures, arguments, message):
    (pictures / "empty").mkdir()
    arguments = [a.replace("{pictures}", str(pictures)) for a in arguments]
    code, _, err = run("search", *arguments, "--model", model)
    assert code == 2 and message in err


def test_tars_are_searched_as_embed_reads_them(run, model, pictures, embedded, tmp_path):
    box = tmp_path / "box"
    for shard, names in (("b", ("red", "green")), ("a", ("blue",))):  # the same name in two folders
        (box / shard).mkdir(parents=True)
        with tarfile.open(box / shard / "0.tar", "w") as tar:
            for name in names:
                tar.add(pictures / f"{name}.png", f"{name}.png")
    source, page = box / "*" / "0.tar", tmp_path / "page.html"
    expected = [
        hit for hit in search(run, pictures, model, "--no-cache")[0] if "gray" not in hit[0]
    ]
    embedded()
    code, out, err = run(
        "search", source, "a red square", "--model", model, "--json", "--html", page
    )
    assert code == 0 and embedded() == 3, err
    hits = json.loads(out)["images"]
    of = {"red": "b", "green": "b", "blue": "a"}
    names = [name.removesuffix(".png") for name, _ in expected]
    assert [hit["image"] for hit in hits] == [f"0.tar:{name}" for name in names]
    assert [hit["file"] for hit in hits] == [str(box / of[name] / "0.tar") for name in names]
    np.testing.assert_allclose([hit["score"] for hit in hits], [s for _, s in expected], atol=1e-6)
    html = page.read_text()
    assert html.count('src="data:image/webp;base64,') == 3 and f"0.tar:{names[0]}" in html
    code, out, _ = run("search", source, "a red square", "--model", model, "--top", 1)
    assert embedded() == 0  # kept in the user's cache folder, and nothing beside the tars
    text = "".join(out.split())  # the table may fold
    assert f"0.tar:{names[0]}" in text and str(box / of[names[0]] / "0.tar") in text
    assert sorted(os.listdir(box / "a")) == ["0.tar"]
    shutil.copy(box / "a" / "0.tar", box / "b" / "0.tar")
    hits, _ = search(run, source, model)
    assert embedded() == 2 and {name for name, _ in hits} == {"0.tar:blue"}


def masked(content):
    """TFRecord's checksum."""
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@pytest.mark.parametrize("end", ["parquet", "csv", "tfrecord"])
def test_what_else_is_searched(run, model, pictures, end):
    picture = (pictures / "red.png").read_bytes()
    if end == "parquet":
        pq.write_table(pa.table({"key": ["r"], "image": [picture]}), pictures / "x.parquet")
    elif end == "csv":
        (pictures / "x.csv").write_text("filepath\ttitle\nred.png\tred\n")
    else:
        made = tf_example_pb2.Example()
        for name, content in (("key", b"r"), ("image", picture)):
            made.features.feature[name].bytes_list.value.append(content)
        content = made.SerializeToString()
        size = struct.pack("<Q", len(content))
        whole = size + masked(size) + content + masked(content)
        (pictures / "x.tfrecord").write_bytes(whole)
    code, out, err = run("search", pictures / f"x.{end}", "red", "--model", model, "--json")
    assert code == 0, err
    (hit,) = json.loads(out)["images"]
    of_csv = {"image": "red.png", "file": str(pictures / "red.png")}
    expected = of_csv if end == "csv" else {"image": "r", "file": str(pictures / f"x.{end}")}
    assert {name: hit[name] for name in ("image", "file")} == expected
    if end == "parquet":  # a folder of them is told by the same rule as in every command
        code, out, err = run("search", pictures, "red", "--model", model, "--json")
        assert json.loads(out)["images"] == [hit] and "is read as Parquet" in err


def test_texts_are_no_pictures(run, model, tmp_path):
    (tmp_path / "x.txt").write_text("a red square\n")
    code, _, err = run("search", tmp_path / "x.txt", "red", "--model", model)
    assert code == 2 and "holds texts: search ranks pictures" in err


def test_a_folder_without_one_readable_picture(run, model, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.png").write_bytes(b"")
    code, _, err = run("search", tmp_path / "p", "x", "--model", model)
    assert code == 2 and "not one of the 1 pictures" in err
