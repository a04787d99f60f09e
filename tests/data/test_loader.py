import dataclasses
import errno
import gc
import logging
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clipjax.component import from_json, to_json
from clipjax.data import (
    BPE,
    CaptionChoice,
    Data,
    Flip,
    RandomResizedCrop,
    Resize,
    Shift,
    Source,
    UnreadableRecord,
    load_eval,
)
from clipjax.data.placement import process_rows, to_global
from clipjax.errors import ClipjaxError, RunFailed


@dataclasses.dataclass(frozen=True)
class Toy(Source):
    """Picture i is flat in the color i; captions name i; some records are bad."""

    n: int = 23
    bad: tuple[int, ...] = ()
    mute: tuple[int, ...] = ()
    delay: float = 0.0

    def open(self):
        return OpenToy(self)


class OpenToy:
    class_names = ("even", "odd")

    def __init__(self, config):
        self.config = config

    def __len__(self):
        return self.config.n

    def __getitem__(self, i):
        time.sleep(self.config.delay)
        image = np.random.default_rng(i).integers(0, 256, (8, 10, 3), dtype=np.uint8)
        return {
            "image": b"broken" if i in self.config.bad else image,
            "captions": ("",) if i in self.config.mute else (f"number {i}", f"Zahl {i}"),
            "languages": ("en",) if i in self.config.mute else ("en", "de"),
            "id": i,
            "key": f"toy-{i}",
            "label": i % 2,
        }


AUGMENT = (RandomResizedCrop((0.3, 1.0)), Flip(), Shift(2))
TOKENIZER = BPE(300).build([f"number {i} Zahl" for i in range(30)])


def data(**changes) -> Data:
    fields = {"source": Toy(), "image_size": 8, "batch_size": 8, "context_length": 12}
    return Data(**(fields | {"augment": AUGMENT, "num_threads": 3} | changes))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


def take(loader, start, n):
    batches = loader.iterate(start)
    try:
        return [next(batches) for _ in range(n)]
    finally:
        batches.close()


def test_shapes_and_types():
    batch = data().build(TOKENIZER, seed=0).batch(0)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((8, 8, 8, 3), "uint8"),
        "text": ((8, 12), "int32"),
        "id": ((8,), "int32"),
        "sample": ((8,), "int32"),
    }


def test_each_epoch_shows_every_record_once_in_an_order_of_its_own():
    loader = data(batch_size=5).build(TOKENIZER, seed=1)
    ids = np.concatenate([loader.batch(step)["id"] for step in range(23)]).reshape(5, 23)
    for epoch in ids:
        assert sorted(epoch) == list(range(23))
    assert len({tuple(epoch) for epoch in ids}) == 5
    assert loader.num_examples == 23


def test_without_shuffle_the_order_is_the_sources():
    loader = data(shuffle=False).build(TOKENIZER, seed=1)
    ids = np.concatenate([loader.batch(step)["id"] for step in range(6)])
    np.testing.assert_array_equal(ids, np.arange(48) % 23)


def test_the_seed_decides_the_order():
    first, again, other = (data().build(TOKENIZER, seed=s).batch(0)["id"] for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_batch_is_the_same_on_any_number_of_processes(processes):
    config = data(source=Toy(bad=(3, 8), mute=(11,)), max_error_rate=1.0)
    whole = config.build(TOKENIZER, seed=5)
    parts = [config.build(TOKENIZER, 5, p, processes) for p in range(processes)]
    for step in (0, 1, 7):
        rows = [part.batch(step) for part in parts]
        assert_equal(whole.batch(step), {k: np.concatenate([r[k] for r in rows]) for k in rows[0]})


@pytest.mark.parametrize("start", [0, 1, 9])
def test_iterating_from_any_step_equals_random_access(start):
    loader = data(source=Toy(bad=(3,)), max_error_rate=1.0).build(TOKENIZER, seed=2)
    for step, batch in enumerate(take(loader, start, 5), start):
        assert_equal(batch, loader.batch(step))


def test_threads_prefetch_and_cache_change_nothing():
    plain = data(num_threads=1, prefetch=1).build(TOKENIZER, seed=2)
    for changes in ({"num_threads": 7, "prefetch": 5}, {"cache": True}, {"num_threads": None}):
        loader = data(**changes).build(TOKENIZER, seed=2)
        for step, batch in enumerate(take(loader, 0, 8)):
            assert_equal(batch, plain.batch(step))


def test_augmentation_depends_on_the_position():
    # One record: every difference between rows is augmentation, here of two epochs.
    loader = data(source=Toy(n=1), captions=CaptionChoice(("en",))).build(TOKENIZER, seed=0)
    images = loader.batch(0)["image"]
    assert len({image.tobytes() for image in images}) == 8
    assert len({row.tobytes() for row in loader.batch(0)["text"]}) == 1


def test_rows_hold_picture_caption_and_id_of_one_record():
    loader = data(augment=(), resize=Resize("crop"), source=Toy()).build(TOKENIZER, seed=0)
    batch = loader.batch(4)
    for image, text, i in zip(
        batch["image"], TOKENIZER.decode(batch["text"]), batch["id"], strict=True
    ):
        np.testing.assert_array_equal(image, Toy().open()[i]["image"][:, 1:9])
        assert text in (f"number {i}", f"zahl {i}")


def test_a_source_smaller_than_the_batch(caplog):
    loader = data(source=Toy(n=3), batch_size=16).build(TOKENIZER, seed=0)
    ids = np.concatenate([loader.batch(step)["id"] for step in range(3)])
    assert np.bincount(ids).tolist() == [16, 16, 16]
    assert "3 records and batches of 16" in caplog.text


def test_large_ids_keep_equality():
    @dataclasses.dataclass(frozen=True)
    class Hashed(Toy):
        def open(self):
            return [OpenToy(self)[i] | {"id": 2**40 + i // 2} for i in range(6)]

    ids = data(source=Hashed(), batch_size=6, shuffle=False).build(TOKENIZER, 0).batch(0)["id"]
    assert ids.tolist() == [0, 0, 1, 1, 2, 2]


def test_bad_records_are_replaced_counted_and_named_once(caplog):
    config = data(source=Toy(bad=(3,), mute=(7,)), max_error_rate=0.5)
    loader = config.build(TOKENIZER, seed=0)
    with caplog.at_level(logging.WARNING):
        batches = take(loader, 0, 23)  # 8 epochs
    ids = np.concatenate([b["id"] for b in batches])
    assert len(ids) == 8 * 23
    assert not {3, 7} & set(ids.tolist())
    # What replaces a record is bad in turn in 2 of 23 cases: 16 places, a little over 16 failures.
    assert 16 <= loader.skipped <= 22
    assert loader.seen == 8 * 23 + loader.skipped
    messages = sorted(r.message for r in caplog.records)
    assert len(messages) == 2
    assert "toy-3: not an image" in messages[0]
    assert "toy-7: the caption is empty" in messages[1]


def test_a_caption_in_none_of_the_languages_is_named(caplog):
    config = data(source=Toy(), captions=CaptionChoice(("zh", "ja")), max_error_rate=1.0)
    with pytest.raises(RunFailed, match=r"no caption in any of the languages zh, ja"):
        config.build(TOKENIZER, seed=0).batch(0)


def test_too_many_bad_records_fail_the_run_by_name():
    config = data(source=Toy(n=100, bad=tuple(range(0, 100, 20))), batch_size=20)  # 5 %
    batches = config.build(TOKENIZER, seed=0).iterate()
    seen = 0
    with pytest.raises(
        RunFailed, match=r"^1\d of \d+ records.*max_error_rate=0.01.*last: toy-\d+: "
    ):
        for _ in batches:
            seen += 20
    # 1 % of the first 1,000 are ten: the eleventh, near record 220, is one too many.
    assert 100 <= seen <= 300


def test_error_rate_zero_fails_at_the_first_bad_record_and_a_low_rate_never():
    with pytest.raises(RunFailed, match="toy-3"):
        for step in range(3):
            data(source=Toy(bad=(3,)), max_error_rate=0).build(TOKENIZER, 0).batch(step)
    loader = data(source=Toy(n=200, bad=(3,)), batch_size=50, augment=()).build(TOKENIZER, 0)
    for step in range(48):  # 2,400 records, 12 bad ones: half of what is allowed
        loader.batch(step)
    assert loader.skipped >= 12


def test_nothing_but_bad_records():
    config = data(source=Toy(n=2, bad=(0, 1)), max_error_rate=1.0)
    with pytest.raises(RunFailed, match="100 records in a row"):
        config.build(TOKENIZER, seed=0).batch(0)


def test_other_errors_reach_the_consumer_unchanged():
    @dataclasses.dataclass(frozen=True)
    class Failing(Toy):
        def open(self):
            class Opened(OpenToy):
                def __getitem__(self, i):
                    if i == 20:
                        raise ZeroDivisionError("a bug in the source")
                    return super().__getitem__(i)

            return Opened(self)

    batches = data(source=Failing(), shuffle=False).build(TOKENIZER, 0).iterate()
    next(batches), next(batches)  # the error is in the third batch
    with pytest.raises(ZeroDivisionError, match="a bug in the source"):
        next(batches)


def data_threads():
    return [t for t in threading.enumerate() if t.name.startswith("clipjax-data")]


def test_closing_stops_the_threads():
    loader = data(source=Toy(delay=0.002), prefetch=4).build(TOKENIZER, 0)
    batches = loader.iterate()
    next(batches)
    assert data_threads()
    batches.close()
    assert not data_threads()
    batches = loader.iterate()
    next(batches)
    del batches
    gc.collect()
    assert not data_threads()


def test_the_work_ahead_is_bounded():
    touched = []

    @dataclasses.dataclass(frozen=True)
    class Counting(Toy):
        def open(self):
            class Opened(OpenToy):
                def __getitem__(self, i):
                    touched.append(i)
                    return super().__getitem__(i)

            return Opened(self)

    batches = data(source=Counting(), prefetch=3).build(TOKENIZER, 0).iterate()
    next(batches)
    time.sleep(0.2)
    assert 8 <= len(touched) <= 4 * 8  # the batch taken, and three ahead
    batches.close()


def test_one_batch_ahead_is_made_while_the_last_one_is_used():
    batches = data(source=Toy(delay=0.02), prefetch=1, num_threads=1).build(TOKENIZER, 0).iterate()
    next(batches)
    time.sleep(0.6)  # 8 records take 0.16 s at least
    start = time.monotonic()
    next(batches)
    assert time.monotonic() - start < 0.1
    batches.close()


@dataclasses.dataclass(frozen=True)
class Unsteady(Toy):
    """Reading record i fails `fails(i)` times with an I/O error before it goes well."""

    fails: int = 2
    hopeless: tuple[int, ...] = ()

    def open(self):
        tries = {}

        class Opened(OpenToy):
            def __getitem__(opened, i):
                tries[i] = tries.get(i, 0) + 1
                if i in self.hopeless or tries[i] <= self.fails:
                    raise OSError(errno.EIO, "Input/output error")
                return super().__getitem__(i)

        return Opened(self)


def test_reading_that_fails_is_tried_again_and_then_skipped(monkeypatch, caplog):
    monkeypatch.setattr("clipjax.data.reading.PAUSES", (0.0, 0.0))
    config = data(source=Unsteady(fails=2), max_error_rate=0)
    assert_equal(config.build(TOKENIZER, 1).batch(0), data().build(TOKENIZER, 1).batch(0))
    config = data(source=Unsteady(fails=0, hopeless=(3,), bad=(5,)), max_error_rate=1.0)
    loader = config.build(TOKENIZER, 1)
    for step in range(3):
        assert 3 not in loader.batch(step)["id"]
    assert 0 < loader.unreachable < loader.skipped
    assert "record 3: reading failed 3 times ([Errno 5] Input/output error)" in caplog.text


def test_only_the_first_bad_records_are_named(caplog):
    source = Toy(n=200, bad=tuple(range(0, 200, 2)))
    loader = data(source=source, max_error_rate=1.0, batch_size=100).build(TOKENIZER, 0)
    loader.batch(0)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 21 and messages[-1].startswith("skipped 20 records so far")
    assert loader.skipped > 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data(batch_size=9).build(TOKENIZER, 0, 0, 2), "batch_size=9.*2 processes"),
        (lambda: data(source=Toy(n=0)).build(TOKENIZER, 0), "no records"),
        (lambda: data().build(TOKENIZER, -1), "seed=-1"),
        (lambda: data().build(TOKENIZER, 0).batch(-1), "step=-1"),
        (lambda: data(image_size=0), "image_size=0"),
        (lambda: data(batch_size=0), "batch_size=0"),
        (lambda: data(num_threads=0), "num_threads=0"),
        (lambda: data(max_error_rate=2.0), "max_error_rate=2.0"),
        (lambda: data(context_length=2).build(TOKENIZER, 0).batch(0), "context_length=2"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ClipjaxError, match=message):
        make()


def test_captions_for_the_tokenizer():
    captions = list(data(source=Toy(n=3, mute=(1,))).iter_captions())
    assert captions == ["number 0", "Zahl 0", "number 2", "Zahl 2"]
    german = data(source=Toy(n=2), captions=CaptionChoice(("de",)))
    assert list(german.iter_captions()) == ["Zahl 0", "Zahl 1"]


def test_config_survives_json():
    from clipjax.data import Tfds

    config = data(source=Tfds("twemoji", languages=("en", "zh")), captions=CaptionChoice(("en",)))
    assert from_json(to_json(config)) == config


def mesh_of(shape, order=slice(None)):
    devices = np.array(jax.devices()[: int(np.prod(shape))])[order]
    return Mesh(devices.reshape(shape), ("group", "data", "tensor"))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_global_arrays_are_split_over_group_and_data(shape):
    mesh = mesh_of(shape)
    batch = data(batch_size=16).build(TOKENIZER, 0).batch(0)
    assert process_rows(mesh) == (0, 1)
    arrays = to_global(batch, mesh)
    assert_equal({k: np.asarray(v) for k, v in arrays.items()}, batch)
    rows = 16 // (shape[0] * shape[1])
    for key, array in arrays.items():
        assert array.sharding.spec == P(("group", "data"))
        assert {s.data.shape[0] for s in array.addressable_shards} == {rows}, key


def test_a_batch_that_the_mesh_cannot_split_is_refused():
    with pytest.raises(ClipjaxError, match=r"batch of 12 .* 8 devices"):
        to_global({"id": np.arange(12, dtype=np.int32)}, mesh_of((2, 4, 1)))


def test_eval_set(caplog):
    found = load_eval(Toy(n=6, bad=(2,), mute=(4,)), image_size=8)
    assert len(found) == 5 and found.skipped == 1
    assert found.keys == ("toy-0", "toy-1", "toy-3", "toy-4", "toy-5")
    assert found.ids.tolist() == [0, 1, 3, 4, 5]
    assert found.labels.tolist() == [0, 1, 1, 0, 1] and found.class_names == ("even", "odd")
    assert found.captions[1] == ("number 1", "Zahl 1") and found.languages[1] == ("en", "de")
    assert found.captions[3] == () == found.languages[3]
    assert "toy-2" in caplog.text
    for i, image in zip(found.ids, found.images, strict=True):
        np.testing.assert_array_equal(image, Resize()(Toy().open()[i]["image"], 8))
    assert len(load_eval(Toy(n=6), 8, limit=2)) == 2
    cropped = load_eval(Toy(n=2), 8, resize=Resize("crop")).images[1]
    np.testing.assert_array_equal(cropped, Toy().open()[1]["image"][:, 1:9])
    with pytest.raises(ClipjaxError, match=r"no record .* can be read \(2 tried\)"):
        load_eval(Toy(n=2, bad=(0, 1)), 8)


def test_unreadable_is_an_error_for_the_user():
    assert issubclass(UnreadableRecord, ClipjaxError)
