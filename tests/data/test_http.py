"""Streams over HTTP from a server that refuses, cuts and forgets: what is lost is named, and each time the same."""

import collections
import contextlib
import functools
import hashlib
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from clipjax.data import Array, Data, Image, Stream, WebDataset, reading
from clipjax.data.copies import Copies
from clipjax.data.records import ArrayRecord
from clipjax.errors import ClipjaxError

sys.path.append(str(Path(__file__).parent))
from stream_files import TOKENIZER, labels, write_array_record, write_tar

FILES, EACH = 24, 40


class Server(BaseHTTPRequestHandler):
    """Files of a folder, by ranges. A request fails as the n-th for these very bytes, whoever comes first."""

    protocol_version = "HTTP/1.1"
    folder, share, dead, ranges = "", 0.0, (), True

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        span = self.headers.get("Range") if self.ranges else None
        with self.lock:
            self.counts[name, span] += 1
            number = self.counts[name, span]
        mark = hashlib.sha256(f"{name} {span} {number}".encode()).digest()
        fault = mark[0] % 2 + 1 if int.from_bytes(mark[1:5], "little") < self.share * 2**32 else 0
        if any(
            name == file and span and int(span[6:].split("-")[0]) >= at for file, at in self.dead
        ):
            fault = 1
        self.faults.append(fault)
        path = os.path.join(self.folder, name)
        if fault == 1 or not os.path.isfile(path):
            return self.answer(503 if fault else 404, b"")
        content = Path(path).read_bytes()
        size = len(content)
        if span:
            first, last = span[6:].split("-")
            content = content[int(first) : int(last) + 1]
        more = {"Content-Range": f"bytes {first}-{last}/{size}"} if span else {}
        self.answer(206 if span else 200, content, fault == 2, more)

    def do_HEAD(self):
        path = os.path.join(self.folder, self.path.rpartition("/")[2])
        there = os.path.isfile(path)
        more = {"Accept-Ranges": "bytes"} if self.ranges else {}
        self.answer(
            200 if there else 404, b"\0" * (os.path.getsize(path) if there else 0), False, more
        )

    def answer(self, status, content, cut=False, more=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(more or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(OSError):
                self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder, **settings):
    handler = type("S", (Server,), {"folder": str(folder), **settings})
    handler.counts, handler.lock, handler.faults = collections.Counter(), threading.Lock(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=functools.partial(server.serve_forever, 0.05), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    for i in range(FILES):
        write_tar(folder / f"{i:02}.tar", range(EACH * i, EACH * (i + 1)))
    return folder


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.01, 0.02))


def data(address, **stream):
    given = {"lanes": 4, "run": 8, "block": 2} | stream
    return Data(
        WebDataset(f"{address}/{{00..{FILES - 1:02}}}.tar", label_key="cls"),
        image_size=8,
        batch_size=16,
        fields=(Image(), Array("label", dtype="int32")),
        stream=Stream(**given),
        num_threads=2,
        max_error_rate=1.0,
    )


def run(address, steps=60):
    loader = data(address).build(TOKENIZER, 3)
    with contextlib.closing(loader.iterate()) as batches:
        shown = np.stack([next(batches)["label"] for _ in range(steps)])
    return shown, loader.seen, loader.skipped, loader.unreachable


def test_one_request_in_twenty_fails_and_nothing_is_lost(folder):
    with served(folder) as (address, _):
        good = run(address)
    assert good[2] == 0 and np.bincount(good[0].ravel()).tolist() == [1] * (FILES * EACH)
    with served(folder, share=0.05) as (address, handler):
        np.testing.assert_array_equal(run(address)[0], good[0])
    kinds = collections.Counter(handler.faults)
    assert kinds[1] and kinds[2] and (kinds[1] + kinds[2]) / len(handler.faults) > 0.02


def test_what_stays_lost_is_named_counted_and_the_same_each_time(folder, caplog):
    # Of one file nothing can be had, of another only the beginning.
    dead = (("05.tar", 0), ("11.tar", 30_000))
    runs = []
    for _ in range(2):
        caplog.clear()
        with served(folder, share=0.05, dead=dead) as (address, _):
            runs.append(run(address))
        named = [r.getMessage() for r in caplog.records if "skipped a record" in r.getMessage()]
        assert sum("05.tar" in n for n in named) == sum("11.tar" in n for n in named) == 1
        assert all("reading failed 4 times" in n for n in named)
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    shown, seen, skipped, unreachable = runs[0]
    assert runs[1][1:] == (seen, skipped, unreachable) and skipped == unreachable > 0
    files = collections.Counter((np.unique(shown) // EACH).tolist())
    assert files[5] == 0 and 8 <= files[11] < EACH
    assert all(files[i] == EACH for i in range(FILES) if i not in (5, 11))


def test_sizes_known_beforehand_count_what_is_lost(folder, tmp_path):
    sizes = ", ".join(f'"{i:02}.tar": {EACH}' for i in range(FILES))
    for file in folder.iterdir():
        os.link(file, tmp_path / file.name)
    (tmp_path / "sizes.json").write_text(f"{{{sizes}}}")
    with served(tmp_path) as (address, _):
        good = run(address)[0]
    with served(tmp_path, dead=(("05.tar", 0),)) as (address, _):
        shown, _, skipped, _ = run(address)
    lost = good // EACH == 5
    np.testing.assert_array_equal(shown[~lost], good[~lost])  # nothing else moves
    assert skipped >= EACH and not (shown // EACH == 5).any()


def test_a_server_without_ranges_and_one_that_is_silent(folder, monkeypatch):
    with served(folder, ranges=False) as (address, _):
        shown = run(address, 4)[0]
    with served(folder) as (address, _):
        np.testing.assert_array_equal(shown, run(address, 4)[0])
    monkeypatch.setattr(reading, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(Server, "do_GET", lambda self: time.sleep(3))
    with served(folder) as (address, _), pytest.raises(ClipjaxError, match="failed 4 times"):
        run(address, 1)


def test_a_stream_is_read_from_copies_that_may_vanish(folder, tmp_path):
    with served(folder, share=0.05) as (address, handler):
        loader = data(address, cache_dir=str(tmp_path)).build(TOKENIZER, 3)
        with contextlib.closing(loader.iterate()) as batches:
            first = [next(batches)["label"] for _ in range(60)]
        assert np.bincount(np.concatenate(first)).tolist() == [1] * (FILES * EACH)
        copies = list((tmp_path / "copies").glob("*/*"))
        assert len(copies) == FILES
        assert all(c.read_bytes() == (folder / c.name).read_bytes() for c in copies)
        fetched = len(handler.faults)
        for copy in copies[::2]:  # as another process may, to make room
            copy.unlink()
        np.testing.assert_array_equal(loader.batch(1)["label"], first[1])
        assert len(handler.faults) > fetched


def test_copies_take_no_more_than_allowed(folder, tmp_path):
    size = os.path.getsize(folder / "00.tar")
    with served(folder) as (address, _):
        copies = Copies(str(tmp_path), 4.5 * size / 1e9, needed=False)
        for i in range(8):
            path = copies.path(f"{address}/{i:02}.tar")
            long_ago = time.time() - 10_000 + i
            os.utime(path, (long_ago, long_ago))
        assert [copies.there(f"{address}/{i:02}.tar") for i in range(8)] == [False] * 4 + [True] * 4
        # What was used just now, as these were, stays, whatever is allowed.
        copies.path(f"{address}/09.tar")
        assert all(copies.there(f"{address}/{i:02}.tar") for i in range(4, 8))


def test_copies_are_kept_between_runs(folder, tmp_path):
    with served(folder) as (address, handler):
        for _ in range(2):
            copies = Copies(str(tmp_path), 1.0, needed=False)
            path = copies.path(f"{address}/03.tar")
            assert Path(path).read_bytes() == (folder / "03.tar").read_bytes()
        assert len(handler.faults) == 1
        with pytest.raises(ClipjaxError, match="there is no file"):
            copies.path(f"{address}/none.tar")


def test_array_records_at_an_address_are_copied(tmp_path):
    for i in range(4):
        write_array_record(tmp_path / f"{i}.array_record", range(10 * i, 10 * i + 10))
    config = Data(
        ArrayRecord(str(tmp_path / "{0..3}.array_record")),
        image_size=8,
        batch_size=8,
        fields=(Image(), Array("label", dtype="int32")),
        stream=Stream(lanes=2, run=5, block=1),
    )
    with served(tmp_path) as (address, _):
        remote = labels(
            Data(**{**vars(config), "source": ArrayRecord(f"{address}/{{0..3}}.array_record")}), 5
        )
    assert sorted(remote.ravel().tolist()) == list(range(40))
