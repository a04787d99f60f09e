"""A split larger than memory: pictures are decoded as they are embedded."""

import dataclasses
import logging

import numpy as np
import pytest

from clipjax.data import Resize, Source, evalset, load_eval
from clipjax.errors import RunFailed
from clipjax.evals import KNN, Retrieval, ZeroShot
from clipjax.evals.embed import embed_images
from clipjax.mesh import MeshShape
from clipjax.predictor import Predictor


@pytest.fixture
def large(monkeypatch):
    """No picture may stay in memory."""
    monkeypatch.setattr(evalset.load_eval, "__defaults__", (None, Resize(), 0))


@dataclasses.dataclass(frozen=True)
class Broken(Source):
    """Another source with some pictures that do not decode."""

    source: Source
    broken: tuple[int, ...]

    def open(self):
        records = self.source.open()
        for i in self.broken:
            list.__setitem__(records, i, {**list.__getitem__(records, i), "image": b"no picture"})
        return records


EYE = np.eye(4)
TEXTS = {"a": [1, 0, 0, 0], "b": [0, 1, 0, 0], "c": [0, 0, 1, 0], "d": [0, 0, 0, 1]}
CAPTIONS = (("a",), ("b",), ("c",), ("d",))


def test_only_a_small_split_stays_in_memory(shades, reads):
    source = shades(CAPTIONS)
    kept = load_eval(source, 8)
    assert reads() == 4
    assert kept.images[1:3].shape == (2, 8, 8, 3) and kept.images[3][0, 0, 0] == 30
    assert reads() == 4
    streamed = load_eval(source, 8, keep_bytes=4 * 8 * 8 * 3 - 1)
    assert reads() == 8
    np.testing.assert_array_equal(streamed.images[np.array([2, 0])], kept.images[np.array([2, 0])])
    assert reads() == 10
    np.testing.assert_array_equal(streamed.images[1], kept.images[1])
    assert streamed.images[4:].shape == (0, 8, 8, 3)


@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_the_first_records_are_a_part_of_the_whole(shades, keep_bytes):
    source = Broken(shades(CAPTIONS, labels=(-1, 0, 1, 2)), (1,) if keep_bytes else ())
    whole = load_eval(source, 8, keep_bytes=keep_bytes)
    for limit in (1, 2, 3, 4):
        part, read = whole.first(limit), load_eval(source, 8, limit, keep_bytes=keep_bytes)
        assert (part.tried, part.skipped, part.captions) == (limit, read.skipped, read.captions)
        assert (part.labels is None) == (read.labels is None)
        np.testing.assert_array_equal(part.images[:], read.images[:])
    whole.images.unreadable[1] = True  # what is found later is known to both
    assert part.images.unreadable.tolist() == whole.images.unreadable.tolist()


def test_figures_do_not_depend_on_what_stays_in_memory(shades, table, large, reads):
    source = shades(CAPTIONS, labels=(0, 1, 2, 3), class_names=("a", "b", "c", "d"))
    predictor = table(EYE, TEXTS)
    for evaluator in (Retrieval(source), ZeroShot(source)):
        runner = evaluator.build()
        assert (
            runner(predictor)[
                f"{evaluator.name}/"
                + {"retrieval": "image_to_text/R@1"}.get(evaluator.name, "top1")
            ]
            == 1.0
        )
        before = reads()
        runner(table(EYE, TEXTS))
        assert reads() == before + 4  # read again for another model


def test_a_picture_that_breaks_late_is_left_out(shades, table, large, caplog):
    source = Broken(shades(CAPTIONS, labels=(0, 1, 2, 3), class_names=("a", "b", "c", "d")), (1, 2))
    # The broken ones would be wrong.
    predictor = table(np.array([[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]), TEXTS)
    retrieval = Retrieval(source).build()
    with caplog.at_level(logging.WARNING):
        figures = retrieval(predictor)
        assert retrieval(predictor) == figures
    assert caplog.text.count("shade 1") == 1
    assert figures["retrieval/image_to_text/R@1"] == 1.0
    assert figures["retrieval/text_to_image/median_rank"] == 1.0
    assert retrieval.chance()["retrieval/image_to_text/R@1"] == 0.5
    assert ZeroShot(source).run(predictor)["zeroshot/top1"] == 1.0
    assert KNN(train=source, source=source, k=1).run(predictor)["knn/top1"] == 1.0


def test_a_split_without_a_readable_picture_ends_the_evaluation(shades, table):
    data = load_eval(shades(CAPTIONS), 8, keep_bytes=0)
    data.images._opened = Broken(shades(CAPTIONS), (0, 1, 2, 3)).open()
    with pytest.raises(RunFailed, match="none of 4 pictures"):
        embed_images(table(EYE, TEXTS), data.images)


def test_pictures_are_read_batch_by_batch_and_by_each_device_once(linear):
    asked = []

    def read(index):
        asked.append(index.tolist())
        return np.stack([np.full((8, 8, 3), i, np.uint8) for i in index])

    settings = {"tokenizer": None, "context_length": 4, "image_size": 8}
    one = Predictor.from_module(linear, batch_size=8, **settings)
    pictures = read(np.arange(21))
    expected = one.encode_image(pictures)
    asked.clear()
    np.testing.assert_array_equal(one.encode_image_rows(read, 21), expected)
    assert asked == [list(range(8)), list(range(8, 16)), list(range(16, 21))]
    asked.clear()
    mesh = MeshShape(2, 2, 2).build()
    many = Predictor.from_module(linear, mesh=mesh, batch_size=8, **settings)
    np.testing.assert_allclose(many.encode_image_rows(read, 21), expected, atol=1e-6)
    # four shards of two rows, each shared by the two devices of the tensor axis
    assert sorted(asked[:4]) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(asked) == 12 and max(map(len, asked)) == 2
    assert one.encode_image_rows(read, 0).shape == (0, 5)
