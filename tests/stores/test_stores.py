"""Files, leases and growing logs in buckets, with faults on the way."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import pytest

from clipjax import lease, orbax_s3, stores
from clipjax.errors import ClipjaxError, Unavailable
from clipjax.files import append_line, replace_file
from clipjax.lease import Lease, leased
from clipjax.stores import (
    Spool,
    absolute,
    delivered,
    fetched,
    is_remote,
    move_tree,
    place,
    remove_tree,
)
from clipjax.tracking import Tracking, read_metrics
from clipjax.tracking.goodput import ATTEMPTS_FILE, read_attempts

FAULTY = dict(refused=0.03, cut=0.03, lost=0.03, half=0.03, slow=0.03)


def test_an_address_is_a_place_in_a_bucket(servers, monkeypatch):
    path = place("gs://bucket/runs/a")
    assert str(path) == "gs://bucket/runs/a"
    assert str(place("s3:/bucket/a/") / "b") == "s3://bucket/a/b"  # as pathlib leaves it
    assert is_remote(path)
    assert not is_remote(place("runs/a"))
    assert place(path) == absolute(path) == path
    with pytest.raises(ClipjaxError, match="name a bucket"):
        place("gs://")
    monkeypatch.setattr(stores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClipjaxError, match=r"pip install 'clipjax\[s3\]'"):
        place("s3://bucket/a")


def test_files_are_written_read_moved_and_removed(store):
    folder, faults = store
    with faults.at(**FAULTY):
        for number in range(4):
            replace_file(folder / f"deep/{number}.txt", f"text {number}")
        replace_file(folder / "deep/0.txt", "new")
        assert (folder / "deep/0.txt").read_text() == "new"
        for line in ("one", "two", "three"):
            append_line(folder / "lines.txt", line)
        assert (folder / "lines.txt").read_text() == "one\ntwo\nthree\n"
        replace_file(folder / "deep" / stores.COMMITTED, "")
        move_tree(folder / "deep", folder / "moved")
        assert not (folder / "deep").exists()
        assert sorted(p.name for p in (folder / "moved").iterdir())[:4] == [
            f"{i}.txt" for i in range(4)
        ]
        remove_tree(folder / "moved")
        assert not (folder / "moved").exists()
        remove_tree(folder / "never")


def test_a_folder_is_delivered_last_file_last_and_fetched_whole(store, tmp_path):
    folder, faults = store
    with faults.at(**FAULTY):
        with delivered(folder / "model", last="a.json") as target:
            (target / "tokenizer").mkdir(parents=True)
            (target / "weights").write_bytes(bytes(range(256)) * 4000)
            (target / "tokenizer/t.json").write_text("{}")
            (target / "a.json").write_text("whole")
        with fetched(folder / "model") as copy:
            assert (copy / "weights").read_bytes() == bytes(range(256)) * 4000
            assert (copy / "tokenizer/t.json").read_text() == "{}"
            assert copy.name == "model"
        assert not copy.exists()
        with pytest.raises(ClipjaxError, match="exists"), delivered(folder / "model"):
            pass
    with contextlib.suppress(RuntimeError), delivered(folder / "half") as target:
        target.mkdir(parents=True)
        (target / "a").write_text("x")
        raise RuntimeError
    assert not (folder / "half").exists()  # nothing of what was not finished
    assert faults.failed() > 0


def test_a_store_that_refuses_every_time_is_unavailable(store, monkeypatch):
    folder, _ = store
    monkeypatch.setattr(stores, "TRIES", 2)
    monkeypatch.setattr(stores.time, "sleep", lambda seconds: None)
    calls = []

    def refused():
        calls.append(1)
        raise OSError("503 Slow Down")

    with pytest.raises(Unavailable, match="writing it failed 2 times: 503 Slow Down"):
        stores.persistent("writing it", refused)
    assert len(calls) == 2
    with pytest.raises(FileNotFoundError):
        stores.persistent("reading", (folder / "never").read_text)


def test_what_a_store_refuses_is_no_damage_and_no_file_that_is_not_there(store, monkeypatch):
    """Either would cost something: a good checkpoint set aside, the starts of a run forgotten."""
    import aiohttp
    from botocore.exceptions import ConnectTimeoutError

    folder, _ = store
    monkeypatch.setattr(stores, "TRIES", 1)
    replace_file(folder / ATTEMPTS_FILE, '{"step": 0}\n')
    replace_file(folder / "damaged", "x")
    for error in (
        aiohttp.ServerDisconnectedError(),
        ConnectTimeoutError(endpoint_url="x"),
        TimeoutError(errno.ETIMEDOUT, "read"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(folder), "read_bytes", Mock(side_effect=error))
            with pytest.raises(Unavailable, match="failed 1 times") as it:
                read_attempts(folder)
        assert stores.passes(it.value)
    assert read_attempts(folder) == [{"step": 0}]
    assert read_attempts(folder / "never") == []
    with pytest.raises(FileNotFoundError) as it:
        (folder / "never").read_text()
    assert not stores.passes(it.value)
    with pytest.raises(ValueError) as it:
        json.loads((folder / "damaged").read_text())
    assert not stores.passes(it.value)


def test_one_holds_the_lease_and_the_next_waits_for_its_silence(store, monkeypatch):
    folder, faults = store
    monkeypatch.setenv(lease.LEASE_SECONDS, "10")
    with faults.at(slow=0.05, refused=0.02):
        with leased(folder), pytest.raises(BlockingIOError):
            Lease(folder).take()  # it hears the holder
        assert Lease(folder)._numbers() == []  # it has let go of it: nobody to listen to
        with leased(folder) as holder:
            assert holder
    dead = Lease(folder)
    dead.take()
    dead._over.set()  # its machine is gone
    began = time.monotonic()
    with leased(folder):
        assert time.monotonic() - began >= 10
        assert dead._numbers() == [2]  # the term of the dead is over
    assert dead._numbers() == []


def test_of_many_who_want_it_one_gets_it(store, monkeypatch):
    folder, _ = store
    monkeypatch.setenv(lease.LEASE_SECONDS, "3")
    dead = Lease(folder)
    dead.take()
    dead._over.set()
    got, refused = [], []

    def take():
        wanted = Lease(folder)
        try:
            wanted.take()
            got.append(wanted)
        except BlockingIOError:
            refused.append(wanted)

    threads = [threading.Thread(target=take) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert len(refused) == 4
    got[0].release()


def test_whoever_loses_the_lease_ends(store, tmp_path):
    folder, _ = store
    script = (
        "import sys, time; from clipjax.stores import place; from clipjax.lease import Lease\n"
        "lease = Lease(place(sys.argv[1])); lease.take(); print('mine', flush=True); time.sleep(100)"
    )
    environment = os.environ | {lease.LEASE_SECONDS: "3"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "mine\n"
    replace_file(folder / lease.FOLDER / "00000002", "{}")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 69
    assert f"the lease of {folder} is lost (another process has taken it over)" in stderr


def test_figures_reach_the_bucket_and_are_gone_on_with(store, monkeypatch):
    folder, faults = store
    with faults.at(**FAULTY):
        with Tracking(folder, resume_step=None) as tracking:
            for step in range(1, 6):
                tracking.write(step, {"loss": 1.0 / step})
            tracking.flush()
            assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [
                1,
                2,
                3,
                4,
                5,
            ]
        with Tracking(folder, resume_step=3) as tracking:
            tracking.write(4, {"loss": 7.0})
        lines = read_metrics(folder / "metrics.jsonl")
        assert [(line["step"], line["loss"]) for line in lines][2:] == [(3, 1 / 3), (4, 7.0)]


def test_a_spool_copies_now_and_then_and_only_what_has_changed(store, monkeypatch):
    folder, faults = store
    monkeypatch.setattr(stores, "SPOOL_SECONDS", 0.2)
    with Spool(folder) as spool:
        (spool.folder / "tb").mkdir()
        (spool.folder / "tb/events").write_text("one")
        end = time.monotonic() + 60
        while not (folder / "tb/events").exists() and time.monotonic() < end:
            time.sleep(0.1)
        assert (folder / "tb/events").read_text() == "one"
        spool.flush()
        before = faults.seen["requests"]
        spool.flush()
        assert faults.seen["requests"] == before
    assert not spool.folder.exists()
    with Spool(place("/tmp")) as plain:
        assert plain.folder == place("/tmp")  # on disk there is nothing to copy


def test_orbax_is_where_it_was():
    """The two functions that `orbax_s3` puts its own in place of."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    orbax_s3.teach()
    spec = tensorstore_utils.build_kvstore_tspec("s3://bucket/a/b", "name", use_ocdbt=True)
    assert spec["base"]["driver"] == "s3"
    assert spec["base"]["bucket"] == "bucket"
    assert spec["base"]["path"] == "a/b"
    spec = tensorstore_utils.build_kvstore_tspec("gs://bucket/a/b", "name", use_ocdbt=True)
    assert spec["base"]["driver"] == "gcs"
    assert callable(gcs_utils.get_kvstore_for_gcs)
