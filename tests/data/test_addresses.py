"""Tars and Parquet files at an address, and a store that fails at times."""

import dataclasses
import io
import itertools
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image as Pillow

from clipjax.data import BPE, Data, Image, Parquet, Stream, WebDataset, found_source, reading
from clipjax.errors import ClipjaxError


class Faulty(MemoryFileSystem):
    """Files in memory, of which reads fail as `faults` says: an exception, a number of bytes, or None."""

    protocol = "faulty"
    faults = itertools.repeat(None)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("faulty://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        fault = next(self.faults)
        if isinstance(fault, Exception):
            raise fault
        found = super().cat_file(path, start=start, end=end, **kwargs)
        return found if fault is None else found[:fault]


fsspec.register_implementation("faulty", Faulty, clobber=True)


def png(i):
    buffer = io.BytesIO()
    Pillow.new("RGB", (8, 8), (i,) * 3).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def address(monkeypatch):
    """Where 3 tars of 20 samples are, gray 0 to 59, and the same in a Parquet file."""
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0, 0.0))
    fs = MemoryFileSystem()
    for number in range(3):
        with (
            fs.open(f"/bucket/{number}.tar", "wb") as file,
            tarfile.open(fileobj=file, mode="w") as out,
        ):
            for i in range(20 * number, 20 * number + 20):
                for name, content in ((f"{i:03}.png", png(i)), (f"{i:03}.txt", b"%d" % i)):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    out.addfile(header, io.BytesIO(content))
    with fs.open("/bucket/t.parquet", "wb") as file:
        table = {"png": [png(i) for i in range(60)], "txt": [str(i) for i in range(60)]}
        pq.write_table(pa.table(table), file, row_group_size=5)
    yield "faulty://bucket"
    Faulty.faults = itertools.repeat(None)
    fs.rm("/bucket", recursive=True)


def batches(source, steps=15, faults=None, **changes):
    given = {"image_size": 8, "batch_size": 8, "num_threads": 1, "max_error_rate": 1.0}
    config = Data(source, fields=(Image(),), **(given | changes))
    loader = config.build(BPE(300).build(["x"]), 0)
    Faulty.faults = faults or Faulty.faults
    return loader, [loader.batch(step) for step in range(steps)]


@pytest.mark.parametrize("stream", [None, Stream(lanes=2, run=5, block=2)])
@pytest.mark.parametrize("name", ["{0..2}.tar", "*.tar", "t.parquet"])
def test_what_is_at_an_address_is_read_as_on_disk(address, name, stream, tmp_path):
    source = found_source(f"{address}/{name}", captions=True)
    assert isinstance(source, Parquet if name == "t.parquet" else WebDataset)
    opened = source.open()
    assert len(opened) == 60 and opened[33]["captions"] == ("33",)
    assert opened.facts(59)["captions"] == ("59",)
    if stream and isinstance(source, WebDataset):
        source = dataclasses.replace(source, index_dir=str(tmp_path))
    for rows in batches(source, 3, stream=stream)[1]:
        np.testing.assert_array_equal(rows["image"][:, 0, 0, 0], rows["sample"])


def test_an_index_of_what_is_at_an_address(address, tmp_path, monkeypatch):
    source = WebDataset(f"{address}/{{0..2}}.tar", index_dir=str(tmp_path))
    source.open()
    monkeypatch.setattr("clipjax.data.tars.scan", lambda *a: 1 / 0)
    assert len(source.open()) == 60


def faults(seed):
    rng = np.random.default_rng(seed)
    while True:
        kind = rng.random()
        fault = RuntimeError("503") if kind < 0.03 else 7 if kind < 0.05 else None
        yield from [fault] * 4 if fault is not None and rng.random() < 0.5 else [fault]


def test_reads_that_fail_at_times_change_nothing_but_what_is_skipped(address):
    source = WebDataset(f"{address}/*.tar")
    _, good = batches(source)
    loader, first = batches(source, faults=faults(0))
    Faulty.faults = itertools.repeat(None)
    again, second = batches(source, faults=faults(0))
    assert loader.skipped == again.skipped == loader.unreachable > 0
    for a, b, c in zip(first, second, good, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["image"][:, 0, 0, 0], a["sample"])
        kept = a["sample"] == c["sample"]
        np.testing.assert_array_equal(a["image"][kept], c["image"][kept])
    assert np.mean([a["sample"] == c["sample"] for a, c in zip(first, good, strict=True)]) > 0.9


def test_a_store_that_is_down_ends_the_run_in_words(address):
    source = WebDataset(f"{address}/*.tar")
    down = itertools.repeat(ConnectionError("refused"))
    with pytest.raises(ClipjaxError, match=r"100 records in a row .*failed 4 times \(refused\)"):
        batches(source, 1, down)
    Faulty.faults = down
    with pytest.raises(ClipjaxError, match=r"0\.tar.*failed 4 times \(refused\)"):
        source.open()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing://bucket/a.tar", "cannot be opened"),
        ("faulty://bucket/none.tar", "there is no file 'faulty://bucket/none.tar'"),
        ("faulty://bucket/*.gz.tar", "no file matches"),
        ("faulty://bucket/none.parquet", "none.parquet"),
        ("faulty://bucket", r"\.tar, \.parquet, \.tfrecord and \.array_record files only"),
    ],
)
def test_refusals(address, name, message):
    with pytest.raises(ClipjaxError, match=message):
        found_source(name, captions=True).open()
