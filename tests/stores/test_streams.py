"""A stream from a bucket, one request in twenty refused or cut, is the stream from disk."""

import contextlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image as Pillow

from clipjax.data import BPE, Array, Data, Image, Stream, WebDataset, reading
from clipjax.stores import client


@pytest.fixture
def tars(tmp_path):
    for number in range(8):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for i in range(20 * number, 20 * number + 20):
                buffer = io.BytesIO()
                Pillow.new("RGB", (8, 8), (i,) * 3).save(buffer, "png")
                for name, content in ((f"{i}.png", buffer.getvalue()), (f"{i}.cls", b"%d" % i)):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    return tmp_path


def shown(shards):
    data = Data(
        WebDataset(shards, label_key="cls"),
        image_size=8,
        batch_size=8,
        fields=(Image(), Array("label", dtype="int32")),
        stream=Stream(lanes=2, run=6, block=2),
        num_threads=2,
    )
    loader = data.build(BPE(300).build(["x"]), 0)
    with contextlib.closing(loader.iterate()) as batches:
        found = [next(batches) for _ in range(40)]
    assert loader.skipped == 0
    return np.stack([rows["label"] for rows in found]), found[7]["image"]


def test_a_stream_from_a_bucket_is_the_one_from_disk(store, tars, monkeypatch):
    monkeypatch.setattr(reading, "PAUSES", (0.05, 0.1, 0.2))
    folder, faults = store
    for file in tars.glob("*.tar"):
        client(folder).pipe_file(f"{folder}/{file.name}", file.read_bytes())
    with faults.at(refused=0.025, cut=0.025):
        labels, image = shown(f"{folder}/*.tar")
    wanted, picture = shown(str(tars / "*.tar"))
    np.testing.assert_array_equal(labels, wanted)
    np.testing.assert_array_equal(image, picture)
