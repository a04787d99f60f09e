"""Worker processes: the batches that threads make, with any number of them, and an end whatever happens."""

import dataclasses
import itertools
import logging
import os
import signal
import sys

import numpy as np
import pytest

from clipjax.config import load_module
from clipjax.data import BPE, Data, Flip, UnreadableRecord
from clipjax.data.workers import made_by_workers, modules_of
from clipjax.errors import ClipjaxError, RunFailed

SOURCE = '''
import dataclasses

import numpy as np

from clipjax.data import Source, UnreadableRecord


@dataclasses.dataclass(frozen=True)
class Numbers(Source):
    """Gray pictures of their number; some cannot be read, and one ends the worker."""

    broken: tuple[int, ...] = ()
    fatal: int = -1

    def open(self):
        return Opened(self)


class Opened:
    def __init__(self, config):
        self.config = config

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index in self.config.broken:
            raise UnreadableRecord(f"number {index} is broken")
        if index == self.config.fatal:
            raise KeyError(f"number {index} is a bug")
        image = np.full((8, 8, 3), index, np.uint8)
        return {"image": image, "captions": (f"number {index}",), "id": index, "key": str(index)}
'''


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A source in a user's file, which no import finds."""
    file = tmp_path_factory.mktemp("user") / "numbers_of_a_user.py"
    file.write_text(SOURCE)
    yield load_module(file).Numbers
    del sys.modules["numbers_of_a_user"]


@pytest.fixture(scope="module")
def tokenizer():
    return BPE(300).build([f"number {i}" for i in range(40)])


def data_of(source, **fields):
    augment = (Flip(),)
    return Data(source, image_size=8, batch_size=8, context_length=16, augment=augment, **fields)


def test_workers_make_what_threads_make(numbers, tokenizer, caplog):
    data = data_of(numbers(broken=(3, 17)), max_error_rate=0.5, prefetch=1)
    assert [name for name, _ in modules_of(data)] == ["numbers_of_a_user"]
    threads = data.build(tokenizer, seed=1, process_index=1, process_count=2)
    loader = dataclasses.replace(data, num_workers=2).build(tokenizer, 1, 1, 2)
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    with caplog.at_level(logging.WARNING):
        batches, expected = loader.iterate(2, shift=4), threads.iterate(2, shift=4)
        for found, wanted in itertools.islice(zip(batches, expected, strict=True), 12):
            assert found.keys() == wanted.keys()
            for key in wanted:
                np.testing.assert_array_equal(found[key], wanted[key])
                assert found[key].dtype == wanted[key].dtype
        batches.close()
    # 12 batches of 4 rows out of 40 records: each broken one came at least once an epoch of 5 batches.
    assert (loader.seen, loader.skipped) == (threads.seen, threads.skipped)
    assert loader.skipped >= 2
    assert "number 3 is broken" in caplog.text
    if before:
        assert set(os.listdir("/dev/shm")) <= before


def test_what_a_worker_raises_is_raised_at_its_batch(numbers, tokenizer):
    data = data_of(numbers(fatal=5), shuffle=False, num_workers=1)
    batches = data.build(tokenizer, seed=0).iterate(
        1
    )  # records 8 to 15, ..., 32 to 39, then 0 to 7
    for _ in range(4):
        next(batches)
    with pytest.raises(KeyError, match="number 5 is a bug"):
        next(batches)


def test_a_worker_that_is_killed_ends_the_run(numbers, tokenizer):
    import multiprocessing

    data = data_of(numbers(), num_workers=1)
    made = made_by_workers(data, tokenizer, 0, 0, 1, 0, 0)
    next(made)
    (worker,) = [p for p in multiprocessing.active_children() if p.name == "clipjax-data"]
    os.kill(worker.pid, signal.SIGTERM)  # what a scheduler sends to all: the run decides
    for _ in range(4):
        next(made)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RunFailed, match="gone .killed: too little memory"):
        for _ in range(9):
            next(made)
    assert not worker.is_alive()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_workers": -1}, "num_workers=-1 must be >= 0"),
        ({"num_workers": 2, "cache": True}, "each of num_workers would keep its own cache"),
        ({"num_workers": 3}, "not divisible by 1 processes with num_workers=3 each"),
    ],
)
def test_what_does_not_fit_is_refused(numbers, tokenizer, fields, reason):
    with pytest.raises(ClipjaxError, match=reason):
        data_of(numbers(), **fields).build(tokenizer, seed=0)


def test_a_failure_travels_between_processes():
    import pickle

    failure = pickle.loads(pickle.dumps(UnreadableRecord("x: broken")))
    assert isinstance(failure, UnreadableRecord) and str(failure) == "x: broken"
