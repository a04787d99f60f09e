"""Streams of files: nothing is read beforehand, every record comes once an epoch, a step is all there is to resume."""

import collections
import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipjax.component import from_json, to_json
from clipjax.data import (
    Array,
    ArrayRecord,
    Data,
    Image,
    Mixture,
    Parquet,
    Source,
    Stage,
    Stream,
    TFRecord,
    WebDataset,
    columns,
    reading,
    records,
)
from clipjax.data import webdataset as tar_module
from clipjax.errors import ClipjaxError

sys.path.append(str(Path(__file__).parent))
from stream_files import TOKENIZER, labels, png, write_array_record, write_tar, write_tfrecord

FIELDS = (Image(), Array("label", dtype="int32"))
STREAM = Stream(lanes=4, run=5, block=2)


def write_parquet(path, numbers):
    table = {"image": [png(i) for i in numbers], "label": list(numbers)}
    pq.write_table(pa.table(table), path, row_group_size=5)


WRITERS = {
    "tar": (write_tar, lambda files: WebDataset(files, label_key="cls")),
    "tfrecord": (write_tfrecord, lambda files: TFRecord(files)),
    "array_record": (write_array_record, lambda files: ArrayRecord(files)),
    "parquet": (write_parquet, lambda files: Parquet(files=files)),
}
SIZES = (7, 12, 1, 10, 9, 5, 6, 14)  # of 64; each lane has 16 where none is shuffled


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """All formats deal files, however few."""
    for module in (columns, records):
        monkeypatch.setattr(module, "FEW", 0)


def shards(folder, end, sizes=SIZES):
    folder.mkdir(exist_ok=True, parents=True)
    write, source = WRITERS[end]
    first = 0
    for number, size in enumerate(sizes):
        write(folder / f"{number:03}.{end}", range(first, first + size))
        first += size
    return source(str(folder / f"*.{end}"))


def data(source, **changes):
    given = {"image_size": 8, "batch_size": 8, "fields": FIELDS, "stream": STREAM, "num_threads": 2}
    return Data(source, **(given | changes))


@pytest.mark.parametrize("end", WRITERS)
def test_every_record_once_an_epoch(tmp_path, end):
    config = data(shards(tmp_path, end))
    loader = config.build(TOKENIZER, 3)
    assert loader.num_examples is None
    shown, seen = collections.defaultdict(list), set()
    for step in range(40):
        rows = loader.batch(step)
        np.testing.assert_array_equal(rows["image"][:, 0, 0, 0], rows["label"])
        seen.update(
            zip(rows["sample"].tolist(), rows["id"].tolist(), rows["label"].tolist(), strict=True)
        )
        for lane in range(4):
            shown[lane] += rows["label"][2 * lane : 2 * lane + 2].tolist()
    assert len(seen) == len({i for _, i, _ in seen}) == len({s for s, _, _ in seen}) == 64
    # A lane has two files an epoch, which are one group, and shows each record of theirs once.
    starts = np.cumsum([0, *SIZES])
    dealt = []
    for lane, numbers in shown.items():
        for epoch in range(3):
            files = loader._stream.order.members(lane, epoch)
            own = [n for f in files for n in range(starts[f], starts[f + 1])]
            assert sorted(numbers[: len(own)]) == sorted(own) and len(files) == 2
            numbers = numbers[len(own) :]
            dealt.append((epoch, *files))
    assert all(
        sorted(f for e, *fs in dealt if e == k for f in fs) == list(range(8)) for k in (0, 1, 2)
    )
    # The same, ahead and by threads; and from the middle, where nothing is known of what came before.
    batches = config.build(TOKENIZER, 3).iterate(17)
    for step in range(17, 27):
        np.testing.assert_array_equal(next(batches)["label"], loader.batch(step)["label"])
    batches.close()


@pytest.mark.parametrize("end", ["tar", "tfrecord"])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_same_on_any_number_of_processes_and_from_any_step(tmp_path, end, processes):
    config = data(shards(tmp_path, end))
    whole = labels(config, 30)
    for start in (0, 3, 11, 24):
        parts = [
            labels(config, 3, start, process_index=p, process_count=processes)
            for p in range(processes)
        ]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[start : start + 3])


def test_shuffled_anew_or_not_at_all(tmp_path):
    source = shards(tmp_path, "tar")
    assert not np.array_equal(labels(data(source), 3), labels(data(source), 3, start=8))
    plain = labels(data(source, shuffle=False), 3)
    # Files 0 and 4 side by side, five records of each at a time; files 1 and 5 in the next lane.
    np.testing.assert_array_equal(plain[:, :2].ravel(), [0, 1, 2, 3, 4, 30])
    np.testing.assert_array_equal(plain[:, 2:4].ravel(), [7, 8, 9, 10, 11, 39])


def test_nothing_but_what_the_first_batch_needs_is_read_before_it(tmp_path, monkeypatch):
    source = shards(tmp_path, "tar", (6,) * 40)
    config = data(source, fields=(Image(),), prefetch=1)
    opened = set()
    real = os.open

    def watched(path, *rest, **more):
        if str(path).endswith(".tar"):
            opened.add(path)
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", watched)
    loader = config.build(TOKENIZER, 0)
    assert not opened
    loader.batch(0)
    assert len(opened) == 8  # a block of two files for each of four lanes


def test_sizes_beside_the_files_make_epochs_known(tmp_path):
    source = shards(tmp_path, "tar")
    unknown = labels(data(source), 20)
    sizes = {f"{i:03}.tar": n for i, n in enumerate(SIZES)}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    loader = data(source).build(TOKENIZER, 3)
    assert loader.num_examples == 64
    for step in range(20):
        rows = loader.batch(step)
        np.testing.assert_array_equal(rows["sample"], rows["label"])  # dense
        np.testing.assert_array_equal(rows["label"], unknown[step])


def test_sizes_that_are_wrong_are_told(tmp_path, caplog):
    source = shards(tmp_path, "tar")
    sizes = {f"{i:03}.tar": n for i, n in enumerate(SIZES)} | {"001.tar": 11, "003.tar": 12}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    loader = data(source, max_error_rate=1.0).build(TOKENIZER, 3)
    for step in range(30):
        loader.batch(step)
    assert loader.skipped and "sizes.json says 12 records, and it has fewer" in caplog.text
    assert "001.tar: sizes.json says 11 records, and it has 12" in caplog.text


def test_how_many_records_files_have_is_learned_kept_and_believed(tmp_path, monkeypatch):
    source = shards(tmp_path / "data", "tar")
    config = data(source, stream=dataclasses.replace(STREAM, cache_dir=str(tmp_path / "cache")))
    whole = labels(config, 60)
    (kept,) = (tmp_path / "cache").glob("counts-*.jsonl")
    found = dict(json.loads(line) for line in kept.read_text().splitlines())
    assert sorted(found.values()) == sorted(SIZES)
    with kept.open("a") as file:
        file.write('["cut')
    took = []
    take = tar_module._TarShard.take
    monkeypatch.setattr(
        tar_module._TarShard, "take", lambda s, *a: took.append(s.place.path) or take(s, *a)
    )
    np.testing.assert_array_equal(labels(config, 1, start=59), whole[59:])
    assert len(set(took)) <= 2 * len(
        SIZES
    )  # where lanes are, is known; two groups of each are read
    kept.unlink()
    for i, size in enumerate(SIZES):  # img2dataset's
        (tmp_path / "data" / f"{i:03}_stats.json").write_text(json.dumps({"successes": size}))
    counted = []
    monkeypatch.setattr(tar_module._TarShard, "count", lambda s: counted.append(s) or 0)
    np.testing.assert_array_equal(labels(config, 1, start=59), whole[59:])
    assert not counted


@pytest.mark.parametrize("end", ["tar", "tfrecord", "array_record", "parquet"])
def test_damaged_files_cost_what_they_lack(tmp_path, end, caplog):
    source = shards(tmp_path, end, (20,) * 8)
    bad = tmp_path / f"003.{end}"
    content = bad.read_bytes()
    bad.write_bytes(content[: len(content) // 2 - 7])
    (tmp_path / f"005.{end}").write_bytes(b"nothing of the kind" * 100)
    (tmp_path / f"006.{end}").unlink()
    (tmp_path / f"006.{end}").mkdir()
    config = data(source, max_error_rate=1.0)
    if end == "parquet":  # a folder is no file there
        (tmp_path / f"006.{end}").rmdir()
        write_parquet(tmp_path / f"006.{end}", range(120, 140))
    runs = []
    for _ in range(2):
        loader = config.build(TOKENIZER, 3)
        shown = np.stack([loader.batch(step)["label"] for step in range(60)])
        runs.append((shown, loader.skipped))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] > 0
    whole = set(range(160)) - set(range(60, 80)) - set(range(100, 140))
    assert whole <= set(runs[0][0].ravel().tolist())
    assert not set(range(100, 120)) & set(runs[0][0].ravel().tolist())
    assert f"003.{end}" in caplog.text and f"005.{end}" in caplog.text
    if end in ("tar", "tfrecord"):  # what comes before the cut is shown
        assert {60, 61, 62, 63} <= set(runs[0][0].ravel().tolist())


def test_examples_with_random_access(tmp_path):
    for end in ("tfrecord", "array_record"):
        opened = shards(tmp_path / end, end).open()
        assert len(opened) == 64
        for i in (0, 6, 7, 63):
            record = opened[i]
            assert record["id"] == record["label"] == i and record["captions"] == (f"number {i}",)
            np.testing.assert_array_equal(record["scores"], np.float32([0.5, i]))
            assert record["image"] == png(i) and ":" in record["key"]
        with pytest.raises(IndexError):
            opened[64]


def test_a_damaged_record_is_one_record(tmp_path):
    source = shards(tmp_path, "tfrecord", (9,) * 4)
    path = tmp_path / "001.tfrecord"
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)
    config = data(source, max_error_rate=1.0)
    loader = config.build(TOKENIZER, 3)
    shown = {n for step in range(12) for n in loader.batch(step)["label"].tolist()}
    assert shown == set(range(36)) - {9}
    with pytest.raises(ClipjaxError, match="another checksum"):
        source.open()[9]


def test_a_mixture_of_streams_and_records_by_weight_and_stage(tmp_path):
    tar = shards(tmp_path / "a", "tar", (20,) * 8)
    single = shards(tmp_path / "b", "parquet", (30,))  # one file: its records are dealt in runs
    stream = Stream(lanes=2, run=5, block=2)
    source = Mixture((tar, single), (3.0, 1.0), stages=(Stage(400, (1.0, 1.0)), Stage(800, (0, 1))))
    config = data(source, stream=stream)
    loader = config.build(TOKENIZER, 3)
    assert loader.num_examples is None
    rows = [loader.batch(step) for step in range(130)]
    which = np.stack([r["sample"] % 2 for r in rows])
    for steps, share in ((slice(0, 50), 0.25), (slice(50, 100), 0.5), (slice(100, 130), 1.0)):
        assert abs(which[steps].mean() - share) < 0.01
        assert np.ptp(which[steps].sum(1)) <= 2
    lanes = [
        np.concatenate([r["label"][half][w[half] == 0] for r, w in zip(rows, which, strict=True)])
        for half in (slice(0, 4), slice(4, 8))
    ]
    for epoch in (slice(0, 80), slice(80, 160)):
        assert sorted(np.concatenate([lane[epoch] for lane in lanes])) == list(range(160))
    parts = [config.build(TOKENIZER, 3, p, 2) for p in range(2)]
    for step in (0, 55, 101):
        both = np.concatenate([part.batch(step)["sample"] for part in parts])
        np.testing.assert_array_equal(both, rows[step]["sample"])
    batches = config.build(TOKENIZER, 3).iterate(60)
    for step in range(60, 64):
        np.testing.assert_array_equal(next(batches)["sample"], rows[step]["sample"])
    batches.close()
    assert from_json(to_json(config)) == config


class Letters(Source):
    def open(self):
        image = np.zeros((8, 8, 3), np.uint8)
        return [{"image": image, "captions": ("a",), "id": i, "key": f"{i}"} for i in range(12)]


def test_stages_without_a_stream():
    source = Mixture((Letters(), Letters()), stages=(Stage(48, (1.0, 3.0)),))
    loader = data(source, stream=None, fields=(Image(),)).build(TOKENIZER, 0)
    found = np.concatenate([loader.batch(step)["sample"] for step in range(14)])
    assert (found[:48] < 12).sum() == 24 and (found[48:112] < 12).sum() == 16
    assert sorted(found[found < 12][:12].tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture((Letters(),), stages=(Stage(0, (1.0, 1.0)),)), "has 2 weights for 1"),
        (lambda: Stage(-1, (1.0,)), "examples=-1"),
        (lambda: Stage(0, (0.0,)), "one of them above"),
        (
            lambda: Mixture((Letters(),), stages=(Stage(5, (1.0,)), Stage(5, (1.0,)))),
            "put them in order",
        ),
        (lambda: Mixture((Letters(),) * 2, (1e6, 1.0)).shares([12, 12], 1), "less than one in"),
        (lambda: Mixture((Letters(),) * 2).shares([None, 12], 1), "give weights"),
        (lambda: TFRecord("nothing-*.tfrecord").open(), "no file matches"),
        (lambda: ArrayRecord("s3://b/a.array_record").open(), "not on disk"),
        (lambda: TFRecord("a", languages=("en",)), "1 languages for 0"),
        (lambda: Stream(cache_gb=-1), "cache_gb=-1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ClipjaxError, match=message):
        make()


def test_a_lane_without_records_is_refused(tmp_path):
    source = shards(tmp_path, "tar", (5, 0, 5, 5))
    with pytest.raises(ClipjaxError, match="no records in an epoch"):
        labels(data(source, shuffle=False), 3)


def test_reads_that_fail_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0))
    config = data(shards(tmp_path, "tar"))
    good = labels(config, 10)
    real, calls = os.pread, collections.Counter()

    def failing(handle, size, at):
        calls[at, size] += 1
        if calls[at, size] % 3:
            raise OSError(5, "Input/output error")
        return real(handle, size, at)

    monkeypatch.setattr(os, "pread", failing)
    np.testing.assert_array_equal(labels(config, 10), good)
