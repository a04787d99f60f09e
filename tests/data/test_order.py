"""Streams: every record once an epoch, the same batches however they are made, and few large reads."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image as Pillow

from clipjax.component import from_json, to_json
from clipjax.data import BPE, Array, Data, Image, Source, Stream, Text, UnreadableRecord, WebDataset
from clipjax.data.order import Shuffled, Streamed, edges_of, edges_within
from clipjax.errors import ClipjaxError

TOKENIZER = BPE(300).build(["number 7"])


def tars(folder, sizes, bad=()):
    """Tars of so many samples; sample i is gray i % 256, and its label is i."""
    i = 0
    for number, size in enumerate(sizes):
        with tarfile.open(folder / f"{number:03}.tar", "w") as tar:
            for _ in range(size):
                buffer = io.BytesIO()
                Pillow.new("RGB", (8, 8), (i % 256,) * 3).save(buffer, "png")
                image = b"damaged" if i in bad else buffer.getvalue()
                for name, content in ((f"{i}.png", image), (f"{i}.cls", b"%d" % i)):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
                i += 1
    return WebDataset(str(folder / "*.tar"), label_key="cls")


FIELDS = (Image(), Array("label", dtype="int32"))
STREAM = Stream(lanes=4, run=5, block=2)


def data(source, **changes):
    given = {"image_size": 8, "batch_size": 8, "fields": FIELDS, "stream": STREAM, "num_threads": 2}
    return Data(source, **(given | changes))


def samples(config, steps, seed=0, **build):
    loader = config.build(TOKENIZER, seed, **build)
    return np.stack([loader.batch(step)["sample"] for step in range(steps)])


def test_every_record_once_an_epoch_and_anew_each_time(tmp_path):
    source = tars(tmp_path, [40, 0, 60, 60])  # 32 runs of 5: each lane has 8 of them, 40 records
    loader = data(source).build(TOKENIZER, 3)
    epochs = np.concatenate([loader.batch(step)["sample"] for step in range(60)]).reshape(3, 160)
    for epoch in epochs:
        assert sorted(epoch) == list(range(160))
    assert not np.array_equal(epochs[0], epochs[1])
    rows = loader.batch(7)
    np.testing.assert_array_equal(rows["label"], rows["sample"])
    np.testing.assert_array_equal(rows["image"][:, 0, 0, 0], rows["sample"])
    assert not np.array_equal(samples(data(source), 1, seed=4)[0], epochs[0][:8])


def test_lanes_of_other_lengths_still_show_every_record_as_often(tmp_path):
    source = tars(tmp_path, [23, 7, 1, 60])
    counts = np.bincount(samples(data(source), 400).ravel(), minlength=91)
    epochs = 400 * 8 / 91  # a lane may be an epoch ahead, or behind
    assert counts.min() >= np.floor(epochs) - 2 and counts.max() <= np.ceil(epochs) + 2


def test_a_block_is_a_few_runs_shuffled_together(tmp_path):
    source = tars(tmp_path, [160])
    first = samples(data(source), 5)  # the first block of each lane: two runs of five
    for lane in range(4):
        shown = first[:, 2 * lane : 2 * lane + 2].ravel()
        runs = sorted({int(i) // 5 for i in shown})
        assert len(runs) == 2
        assert sorted(shown) == [5 * run + i for run in runs for i in range(5)]
        assert shown.tolist() != sorted(shown)
    plain = samples(data(source, shuffle=False), 5)
    np.testing.assert_array_equal(plain[:, :2].ravel(), [0, 1, 2, 3, 4, 20, 21, 22, 23, 24])


@pytest.mark.parametrize("processes", [2, 4])
def test_the_batches_are_the_same_on_any_number_of_processes(tmp_path, processes):
    config = data(tars(tmp_path, [40, 60, 33], bad=(3, 50, 51)), max_error_rate=1.0)
    whole = config.build(TOKENIZER, 5)
    parts = [config.build(TOKENIZER, 5, p, processes) for p in range(processes)]
    for step in (0, 1, 17, 40):
        rows = [part.batch(step) for part in parts]
        for key, array in whole.batch(step).items():
            np.testing.assert_array_equal(array, np.concatenate([r[key] for r in rows]))


@pytest.mark.parametrize("start", [0, 1, 9, 30])
def test_going_on_from_any_step(tmp_path, start):
    config = data(tars(tmp_path, [40, 60, 33], bad=(3,)), max_error_rate=1.0)
    loader = config.build(TOKENIZER, 2)
    batches = config.build(TOKENIZER, 2).iterate(start)
    for step in range(start, start + 12):
        for key, array in next(batches).items():
            np.testing.assert_array_equal(array, loader.batch(step)[key])
    batches.close()


def test_what_cannot_be_used_is_replaced_from_the_same_block(tmp_path, caplog):
    config = data(tars(tmp_path, [160], bad=(3, 50)), max_error_rate=1.0)
    loader = config.build(TOKENIZER, 0)
    shown = np.stack([loader.batch(step)["sample"] for step in range(20)])
    assert loader.skipped >= 2 and not {3, 50} & set(shown.ravel().tolist())
    good = samples(data(tars(tmp_path, [160])), 20)
    changed = shown != good
    assert set(good[changed].tolist()) == {3, 50}
    assert "000.tar:3: " in caplog.text and "000.tar:50: " in caplog.text


def test_a_run_is_one_read(tmp_path, monkeypatch):
    source = tars(tmp_path, [160])
    batches = data(source).build(TOKENIZER, 0).iterate()
    next(batches)
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda f, n, at: reads.append(n) or pread(f, n, at))
    for _ in range(59):  # three epochs of 32 runs, of which some were read before
        next(batches)
    batches.close()
    assert 70 <= len(reads) <= 3 * 32 + 16


def test_runs_that_no_step_needs_are_let_go(tmp_path):
    loader = data(tars(tmp_path, [400]), prefetch=1).build(TOKENIZER, 0)
    batches = loader.iterate()
    most = 0
    for _ in range(100):
        next(batches)
        most = max(most, len(loader._runs._held))
    batches.close()
    assert most <= 4 * 2 * 3  # lanes, runs of a block, and at most three blocks at a time
    assert not loader._runs._held


def test_runs_do_not_reach_across_files():
    np.testing.assert_array_equal(edges_within([0, 7, 7, 9], 20, 5), [0, 5, 7, 9, 14, 19, 20])
    np.testing.assert_array_equal(edges_of(range(11), 4), [0, 4, 8, 11])


class Unsteady(Source):
    """Any source can be streamed: this one has nothing but records, some of which cannot be had."""

    def open(self):
        class Opened:
            def __len__(self):
                return 64

            def __getitem__(self, i):
                if i % 9 == 4:
                    raise UnreadableRecord(f"record {i} is gone")
                image = np.full((8, 8, 3), i, np.uint8)
                return {"image": image, "captions": ("number 7",), "id": i, "key": str(i)}

        return Opened()


def test_any_source_can_be_streamed():
    config = data(Unsteady(), fields=(Image(), Text()), max_error_rate=1.0)
    rows = config.build(TOKENIZER, 0).batch(3)
    np.testing.assert_array_equal(rows["image"][:, 0, 0, 0], rows["sample"])
    assert not (rows["sample"] % 9 == 4).any()


def test_refusals(tmp_path):
    source = tars(tmp_path, [40])
    with pytest.raises(ClipjaxError, match="batch_size=6 .* 4 lanes"):
        data(source, batch_size=6).build(TOKENIZER, 0)
    with pytest.raises(ClipjaxError, match="4 lanes .* 8 processes"):
        data(source).build(TOKENIZER, 0, 0, 8)
    with pytest.raises(ClipjaxError, match="1 runs of records for the 4 lanes"):
        data(source, stream=Stream(lanes=4, run=50)).build(TOKENIZER, 0)
    with pytest.raises(ClipjaxError, match="cache"):
        data(source, cache=True)
    for name in ("lanes", "run", "block"):
        with pytest.raises(ClipjaxError, match=f"{name}=0"):
            Stream(**{name: 0})
    config = data(source)
    assert from_json(to_json(config)) == config


def test_a_stream_goes_on_after_batches_of_another_size():
    """Four steps of 8, then two of 16: every record once an epoch, as if the size had never changed."""
    stream, edges = Stream(lanes=4, run=4, block=2), np.arange(0, 65, 4)
    small = Streamed(stream, edges, 8, 3, True)
    seen = [small.at(position, 0)[0] for position in range(32)]
    large = Streamed(stream, edges, 16, 3, True)
    shift = 32 - 4 * 16
    large.go_on(shift)
    for step in (4, 5):
        rows = [large.at(step * 16 + shift + row, 0)[0] for row in range(16)]
        wanted = large.runs(step, 0, 16)
        assert {int(np.searchsorted(edges, index, side="right")) - 1 for index in rows} <= wanted
        seen += rows
    assert sorted(seen) == list(range(64))
    with pytest.raises(ClipjaxError, match="change lanes back"):
        large.go_on(6)


@pytest.mark.parametrize("count", [1, 7, 4096])
def test_shuffled_is_grains_order(count):
    import grain

    for seed in (0, 5, 2**40):
        theirs = grain.MapDataset.range(count).seed(seed % 2**32).shuffle().repeat()
        ours = Shuffled(count, seed % 2**32, True)
        for position in (0, 3, count - 1, count, 5 * count + 2):
            assert ours.at(position, 0) == (int(theirs[position]), position)
            assert ours.at(position, 2)[0] == int(theirs[position + 2 * count])
    assert [Shuffled(3, 0, False).at(i, 0)[0] for i in range(5)] == [0, 1, 2, 0, 1]
