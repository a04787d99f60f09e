"""Choosing among records: by keys, by conditions, by balance; the files stay as they are."""

import collections
import dataclasses
import io
import json
import math
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipjax.component import from_json, to_json
from clipjax.data import BPE, Balanced, Data, Filtered, ImageFolder, Parquet, Stream, WebDataset
from clipjax.data.balance import Entries, chance, count_entries
from clipjax.data.filters import Condition
from clipjax.errors import ClipjaxError

SCORES = [0.1, 0.31, None, 0.28, float("nan"), 0.5]
LANGUAGES = ["en", "fr", "de", "en", "en", "fr"]


def png(width=4, height=4):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def tars(tmp_path):
    """6 samples in two tars, of widths 4 to 9, with a JSON file each."""
    for part in range(2):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for i in range(3 * part, 3 * part + 3):
                facts = {"similarity": SCORES[i], "nested": {"language": LANGUAGES[i]}}
                files = {"png": png(4 + i), "txt": f"caption {i}", "json": json.dumps(facts)}
                for end, content in files.items():
                    content = content if isinstance(content, bytes) else content.encode()
                    header = tarfile.TarInfo(f"{i}.{end}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    return WebDataset(str(tmp_path / "{0..1}.tar"))


def captions(source):
    opened = source.open()
    return [opened[i]["captions"][0].removeprefix("caption ") for i in range(len(opened))]


@pytest.mark.parametrize(
    ("conditions", "left"),
    [
        (("json:similarity >= 0.28",), "135"),
        (("json:similarity>0.28",), "15"),
        (("json:similarity < 0.3", "json:nested.language == en"), "03"),
        (("json:nested.language in fr, de",), "125"),
        (("json:nested.language != en",), "125"),
        (("image.width >= 6", "image.width<=8", "image.height == 4"), "234"),
        (("key == 1.tar:4",), "4"),
        (("txt != caption 3",), "01245"),
    ],
)
def test_conditions_on_what_records_have(tars, conditions, left):
    source = Filtered(tars, where=conditions)
    assert "".join(captions(source)) == left
    assert from_json(to_json(source)) == source


def test_lists_of_keys_and_scores_in_a_side_table(tars, tmp_path):
    (tmp_path / "keep.txt").write_text("0.tar:0\n1.tar:4\n\n1.tar:5\nnot there\n")
    assert captions(Filtered(tars, keep=str(tmp_path / "keep.txt"))) == ["0", "4", "5"]
    (tmp_path / "drop.csv").write_text("key,why\n1.tar:4,near\n0.tar:2,near\n")
    drop = str(tmp_path / "drop.csv")
    assert captions(Filtered(tars, drop=drop)) == ["0", "1", "3", "5"]
    keys = [f"{i // 3}.tar:{i}" for i in (5, 0, 3, 1)]
    table = {"key": keys, "clip": [0.9, 0.2, 0.7, None], "embedding": [[0.0] * 2] * 4}
    pq.write_table(pa.table(table), tmp_path / "scores.parquet")
    scored = Filtered(tars, where=("clip >= 0.2",), table=str(tmp_path / "scores.parquet"))
    assert captions(scored) == ["0", "3", "5"]
    both = dataclasses.replace(scored, where=("clip >= 0.5", "json:nested.language == en"))
    assert captions(dataclasses.replace(both, drop=drop)) == ["3"]


def test_not_every_line_of_a_table_has_every_column(tars, tmp_path):
    table = tmp_path / "scores.jsonl"
    rows = [{"key": "0.tar:0", "clip": 1}, {"key": "0.tar:1", "nsfw": 0}, {"key": "1.tar:3"}]
    table.write_text("".join(json.dumps(row | {"n": 1}) + "\n" for row in rows))
    assert captions(Filtered(tars, where=("nsfw < 0.5",), table=str(table))) == ["1"]
    assert captions(Filtered(tars, where=("n > 0", "clip > 0"), table=str(table))) == ["0"]
    remember = tmp_path / "chosen.npz"
    source = Filtered(tars, where=("n > 0",), table=str(table), remember=str(remember))
    assert captions(source) == captions(source) == ["0", "1", "3"]
    table.unlink()
    with pytest.raises(ClipjaxError, match="No such file"):
        source.open()
    remember.write_bytes(remember.read_bytes()[:40])
    with pytest.raises(ClipjaxError, match="is not what Chosen.remember wrote"):
        source.open()


def test_of_tables_and_parquet_and_streamed(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(png())
    rows = "".join(f"{i}.png,caption {i},{i / 40}\n" for i in range(40))
    (tmp_path / "captions.csv").write_text("image,caption,score\n" + rows)
    folder = Filtered(ImageFolder(str(tmp_path)), where=("score >= 0.5",))
    assert captions(folder) == [str(i) for i in range(20, 40)]
    assert folder.open().keys() == [f"{i}.png" for i in range(20, 40)]
    table = {"jpg": [png()] * 40, "caption": [f"caption {i}" for i in range(40)], "n": range(40)}
    pq.write_table(pa.table(table), tmp_path / "x.parquet", row_group_size=7)
    parquet = Filtered(Parquet(files=str(tmp_path / "x.parquet")), where=("n >= 4",))
    # A stream reads runs of what is left, each record once an epoch of 36.
    data = Data(
        parquet,
        image_size=4,
        batch_size=4,
        context_length=8,
        stream=Stream(lanes=2, run=5, block=2),
    )
    loader = data.build(BPE(300).build(["caption"]), seed=0)
    assert loader.num_examples == 36
    seen = np.concatenate([loader.batch(step)["sample"] for step in range(9)])
    assert np.bincount(seen, minlength=36).max() <= 2 and len(set(seen.tolist())) >= 32
    ids = np.concatenate([loader.batch(step)["id"] for step in range(9)])
    np.testing.assert_array_equal(ids, seen + 4)  # the row's number in the file


def test_which_records_were_chosen_is_remembered(tars, tmp_path, monkeypatch, caplog):
    file = tmp_path / "chosen.npz"
    source = Filtered(tars, where=("json:similarity >= 0.28",), remember=str(file))
    assert captions(source) == ["1", "3", "5"]
    monkeypatch.setattr(Filtered, "_choose", lambda *a: 1 / 0)
    assert captions(source) == ["1", "3", "5"]
    with pytest.raises(ZeroDivisionError):  # another choice
        dataclasses.replace(source, where=("json:similarity >= 0.3",)).open()
    assert "made anew" in caplog.text
    file.write_bytes(b"no")
    with pytest.raises(ClipjaxError, match=r"is not what Chosen.remember wrote .*: remove it"):
        source.open()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "give keep, drop or where"),
        ({"where": ("similarity",)}, "'similarity' is no condition: write NAME"),
        ({"where": ("json:similarity > 2",)}, "Filtered leaves none of 6 records"),
        ({"keep": "missing.txt"}, "missing.txt"),
        ({"where": ("a > 1",), "table": "here.csv"}, "has none of the columns that the conditions"),
        ({"keep": "nokey.csv"}, "line 2, has no column 'key'; did you mean 'keys'"),
    ],
)
def test_what_cannot_be_chosen_is_refused(tars, tmp_path, monkeypatch, fields, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.csv").write_text("key,score\n0.tar:0,1\n")
    (tmp_path / "nokey.csv").write_text("keys,score\n0.tar:0,1\n")
    with pytest.raises(ClipjaxError, match=reason):
        Filtered(tars, **fields).open()


def test_conditions_compare_numbers_as_numbers():
    assert Condition.parse("n >= 10").met_by("9e2") and not Condition.parse("n >= 10").met_by("9")
    assert not Condition.parse("n < 10").met_by(float("nan"))
    assert not Condition.parse("n != 10").met_by(None)
    assert Condition.parse("tags in a,b").met_by(["c", "b"])
    assert Condition.parse("name == b").met_by(b"b\n")


def test_entries_are_found_by_whole_words():
    entries = Entries(["cat", "Black Cat", "cats and dogs", "...", "new york"])
    assert len(entries) == 4
    assert entries.found(["A black-cat!", "NEW\nYORK"]) == {"cat", "Black Cat", "new york"}
    assert entries.found(["concatenate", "dogs and cats"]) == set()
    counts = count_entries([("a cat", "cat cat"), ("no",)], ["cat", "dog"])
    assert counts == {"cat": 1, "dog": 0}
    assert chance(["a", "b"], {"a": 100, "b": 40}, 20) == pytest.approx(1 - 0.8 * 0.5)
    assert chance(["a", "b"], {"a": 100, "b": 20}, 20) == 1


def test_balancing_keeps_about_the_limit_of_frequent_entries(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(png())
    # 2,000 pictures of cats, 30 of them of lynxes too; 50 of nothing that is counted.
    texts = ["a cat"] * 1970 + ["a lynx, a wild cat"] * 30 + ["nothing"] * 50
    for i in range(len(texts)):
        os.link(tmp_path / f"{i % 8}.png", tmp_path / f"p{i}.png")
    rows = "".join(f'p{i}.png,"{text}"\n' for i, text in enumerate(texts))
    (tmp_path / "captions.csv").write_text("image,caption\n" + rows)
    (tmp_path / "counts.tsv").write_text("entry\tcount\ncat\t2000\nlynx\t30\n")
    source = ImageFolder(str(tmp_path))
    balanced = Balanced(source, counts=str(tmp_path / "counts.tsv"), limit=200)
    kept = collections.Counter(captions(balanced))
    assert kept["a lynx, a wild cat"] == 30 and kept["nothing"] == 0
    # 1,970 draws of probability 0.1: within five standard deviations.
    assert abs(kept["a cat"] - 197) < 5 * math.sqrt(1970 * 0.1 * 0.9)
    assert captions(balanced) == captions(balanced)
    other = dataclasses.replace(balanced, seed=1, unmatched=True)
    assert other.open().keys() != balanced.open().keys()
    assert collections.Counter(captions(other))["nothing"] == 50
    (tmp_path / "counts.tsv").write_text("entry\tcount\ncat\tmany\n")
    with pytest.raises(ClipjaxError, match="line 2: wants the columns"):
        balanced.open()
