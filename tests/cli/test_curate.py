"""`clipjax data keep`, `near`, `count`, `tokenizer` and `look`, and sources that read what they wrote."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipjax.data import BPE, Balanced, Filtered, ImageFolder, SavedTokenizer, SentencePiece
from clipjax.embeddings import near as near_module
from clipjax.embeddings.near import near_rows

CONFIG = """
from clipjax import Run
from clipjax.data import BPE, Array, Data, ImageFolder, Image, Text, TokenizerFile, TrainedSentencePiece
from clipjax.models import DualEncoder
from clipjax.objectives import Softmax
from clipjax.optim import AdamW, Duration
from clipjax.towers import TextTransformer, ViT


def config():
    shape = {"width": 16, "depth": 1, "heads": 2}
    return Run(
        model=DualEncoder(
            image=ViT(image_size=16, patch_size=8, **shape),
            text=TextTransformer(vocab_size=400, context_length=8, eos_id=2, **shape),
            embed_dim=8,
        ),
        objective=Softmax(),
        optimizer=AdamW(),
        duration=Duration(1),
        data=Data(
            ImageFolder(FOLDER),
            tokenizer=TOKENIZER,
            image_size=16,
            batch_size=8,
            context_length=8,
            fields=(Image(), Text(), Array("score")),
        ),
    )
"""


@pytest.fixture
def folder(tmp_path):
    """12 pictures; 3.png is broken, 4.png has no caption."""
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    texts = [f"a <b>red</b> square, number {i}" for i in range(12)]
    texts[4] = ""
    texts[5] = "a caption of so many words that their end does not fit in"
    rows = "".join(f'{i}.png,"{text}",{i / 10}\n' for i, text in enumerate(texts))
    (tmp_path / "captions.csv").write_text("image,caption,score\n" + rows)
    return tmp_path


def config(folder, tokenizer="BPE(300)"):
    # A module of its own each time.
    file = folder / f"config_{abs(hash((str(folder), tokenizer)))}.py"
    file.write_text(CONFIG.replace("FOLDER", repr(str(folder))).replace("TOKENIZER", tokenizer))
    return file


def test_keep_writes_keys_that_a_source_reads(run, folder):
    out = folder / "keep.txt"
    code, printed, err = run("data", "keep", folder, "--where", "score >= 0.8", "--out", out)
    assert code == 0 and "4 of 12 records" in err and printed.strip() == str(out)
    assert out.read_text() == "8.png\n9.png\n10.png\n11.png\n"
    assert len(Filtered(ImageFolder(str(folder)), keep=str(out)).open()) == 4
    code, _, err = run("data", "keep", folder, "--out", out)
    assert code == 2 and "give --where, --keys or --drop" in err


def test_keep_names_what_is_misspelled_or_missing(run, folder, monkeypatch):
    out, missing = folder / "keep.txt", folder / "nope.csv"
    keep = ("data", "keep", folder, "--out", out)
    code, _, err = run(*keep, "--where", "scoer >= 0.8")
    assert code == 2 and "no" in err and "did you mean 'score'?" in err
    code, _, err = run(*keep, "--where", "score >= 9")  # there, and never met
    assert code == 2 and "leaves none of 12" in err and "did you mean" not in err
    code, _, err = run(*keep, "--keys", folder / "none.txt")
    assert code == 2 and "No such file" in err and "UTF-8" not in err
    for name in (missing, "nope.csv", "nope/*.parquet"):
        code, _, err = run("data", "keep", name, "--where", "a > 1", "--out", out)
        assert code == 2 and f"no file or folder '{name}'" in err
        assert "download_and_prepare" not in err
    opened = []
    read = ImageFolder.open
    monkeypatch.setattr(ImageFolder, "open", lambda self: opened.append(1) or read(self))
    assert run(*keep, "--where", "score >= 0.8")[0] == 0 and len(opened) == 1


def test_near_names_files_as_they_were_typed(run, folder):
    mine = vectors(folder / "mine.parquet", angles(0, 90))
    for options, said in (
        ([folder / "none.parquet"], "there is no file"),
        ([mine, "--column", "embeding"], "did you mean 'embedding'?"),
        ([folder / "captions.csv"], "is no Parquet file"),
    ):
        code, _, err = run("data", "near", *options, "--out", folder / "keep.txt")
        assert code == 2 and said in err and "Embeddings(" not in err


def test_keep_and_count_read_files_of_examples_and_plain_folders(run, tmp_path, monkeypatch):
    from tensorflow_datasets.proto import tf_example_pb2

    from clipjax.data import records

    monkeypatch.setattr(records, "_checked", lambda content, name: content[12:-4])
    monkeypatch.setattr(records, "_masked", lambda content: 7)
    with (tmp_path / "x.tfrecord-00000-of-00001").open("wb") as file:
        for i in range(4):
            made = tf_example_pb2.Example()
            made.features.feature["caption"].bytes_list.value.append(b"number %d" % i)
            made.features.feature["score"].float_list.value.append(i)
            content = made.SerializeToString()
            file.write(len(content).to_bytes(8, "little") + b"\7\0\0\0" + content + bytes(4))
    out, entries = tmp_path / "out.tsv", tmp_path / "entries.txt"
    entries.write_text("number 3\n")
    pattern = tmp_path / "x.tfrecord-*"
    for name in (pattern, f"file://{pattern}"):
        code, _, err = run("data", "keep", name, "--where", "score >= 2", "--out", out)
        assert code == 0 and "2 of 4 records" in err
        code, _, err = run("data", "count", name, "--entries", entries, "--out", out)
        assert code == 0 and "1 of 1 entries" in err
    code, _, err = run("data", "sizes", pattern)
    assert code == 0 and "4 records in 1 files" in err
    flat = tmp_path / "flat"
    flat.mkdir()
    for width in (10, 30):
        Image.new("RGB", (width, 9)).save(flat / f"{width}.png")
    code, _, err = run("data", "keep", flat, "--where", "image.width >= 20", "--out", out)
    assert code == 0 and out.read_text() == "30.png\n"


def test_count_writes_what_balancing_reads(run, folder):
    (folder / "entries.txt").write_text("red\nnumber 7\nblue\n")
    out = folder / "counts.tsv"
    code, _, err = run("data", "count", folder, "--entries", folder / "entries.txt", "--out", out)
    assert code == 0 and "2 of 3 entries are in 12 records" in err
    assert out.read_text() == "entry\tcount\nred\t10\nnumber 7\t1\nblue\t0\n"
    assert len(Balanced(ImageFolder(str(folder)), counts=str(out)).open()) == 10


def vectors(path, rows):
    keys = [f"{i}.png" for i in range(len(rows))]
    flat = pa.array(np.asarray(rows, np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, len(rows[0]))
    pq.write_table(pa.table({"key": keys, "embedding": column}), path)
    return path


def angles(*degrees):
    return np.stack([[np.cos(np.radians(a)), np.sin(np.radians(a))] for a in degrees])


def test_near_duplicates_and_what_is_near_an_evaluation_set(run, folder):
    # cos 10 degrees = 0.985: 5 is near 0; 14 near 5, which is left out, and not near 0; 93 is near the other set's 90.
    mine = vectors(folder / "mine.parquet", 3 * angles(0, 5, 14, 45, 93, 180))
    theirs = vectors(folder / "theirs.parquet", angles(90, 270))
    out, pairs = folder / "keep.txt", folder / "pairs.tsv"
    options = ["--threshold", "0.985", "--out", out, "--pairs", pairs]
    code, _, err = run("data", "near", mine, "--against", theirs, *options)
    assert code == 0
    assert "4 of 6 are left; 1 were near an earlier one, 1 near one of" in err
    assert out.read_text().split() == ["0.png", "2.png", "3.png", "5.png"]
    found = [line.split("\t") for line in pairs.read_text().splitlines()[1:]]
    assert found == [
        ["1.png", "0.png", "itself", f"{np.cos(np.radians(5)):.4f}"],
        ["4.png", "0.png", "against", f"{np.cos(np.radians(3)):.4f}"],
    ]
    kept = Filtered(ImageFolder(str(folder)), keep=str(out)).open()
    assert kept.keys() == ["0.png", "2.png", "3.png", "5.png"]
    code, _, err = run("data", "near", mine, "--threshold", "2", "--out", out)
    assert code == 2 and "above 0 and at most 1" in err


@pytest.mark.parametrize("block", [4096, 7])
def test_near_rows_are_those_of_a_plain_loop(monkeypatch, block):
    monkeypatch.setattr(near_module, "BLOCK", block)
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.standard_normal((12, 16)), 4, 0) + 0.15 * rng.standard_normal((48, 16))
    rng.shuffle(rows)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    kept = []
    for i in range(len(unit)):
        if all(unit[i] @ unit[j] < 0.95 for j in kept):
            kept.append(i)
    assert 12 <= len(kept) < 40
    found = near_rows(rows, 0.95)
    assert sorted({*range(48)} - {near.row for near in found}) == kept
    for near in found:
        assert near.other in kept and near.other < near.row
        assert near.score == pytest.approx(unit[near.row] @ unit[near.other], abs=1e-5)
    pytest.importorskip("faiss")
    assert [n.row for n in near_rows(rows, 0.95, approximate=True)] == [n.row for n in found]


def test_tokenizers_are_trained_beforehand(run, folder):
    out = folder / "bpe"
    code, _, err = run("data", "tokenizer", config(folder), "--out", out)
    assert code == 0 and re.search(r"2\d\d|300 tokens", err)
    saved, texts = SavedTokenizer(str(out)).build(), ["a red square", "café"]
    captions = [f"a <b>red</b> square, number {i}" for i in range(12) if i not in (4, 5)]
    captions.insert(4, "a caption of so many words that their end does not fit in")
    np.testing.assert_array_equal(
        saved.encode(texts, 12), BPE(300).build(captions).encode(texts, 12)
    )
    out, pieces = folder / "sentencepiece", "TrainedSentencePiece(320)"
    code, _, err = run("data", "tokenizer", config(folder, pieces), "--out", out)
    assert code == 0, err
    saved = SavedTokenizer(str(out)).build()
    assert (saved.pad_id, saved.bos_id, saved.eos_id) == (0, 1, 2)
    assert saved.decode(saved.encode(texts, 16)) == texts
    file = SentencePiece(str(out / "tokenizer.model")).build()
    np.testing.assert_array_equal(file.encode(texts, 16), saved.encode(texts, 16))
    code, printed, _ = run("data", "tokenizer", config(folder), "--help")
    assert code == 0 and "--out FOLDER" in printed and "[--out" not in printed
    code, _, err = run(
        "data", "tokenizer", config(folder, f"SavedTokenizer({str(out)!r})").with_name("x.py")
    )
    assert code == 2


def test_look_shows_what_the_model_sees(run, folder, tmp_path):
    out = tmp_path / "look.html"
    file = config(folder)
    code, printed, err = run("data", "look", file, "--html", out, "--count", "6", "--records", "14")
    assert code == 0, err
    assert "12 records; " in printed and "score: float32 []" in printed
    page = out.read_text()
    assert page.count('<li class="example">') == 6 and page.count("data:image/") == 6
    assert "&lt;b&gt;red" in page and "<b>red" not in page
    # 14 records and more were read, of the 12: either bad one came, and each is said with its reason.
    assert "3.png: not an image" in page and "4.png: the caption is empty" in page
    assert 'class="cut">cut' in page or "that their end" not in page
    assert re.search(r"text: \d tokens", page) and "score: 0." in page
    code, _, err = run("data", "look", file, "--count", "0")
    assert code == 2 and "must be >= 1" in err
