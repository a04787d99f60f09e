"""Processes that find different things say so, by name and host, and end; none waits for ever."""

import json
import os
import socket
import subprocess
import sys

import pytest

from clipjax.component import differences
from clipjax.train import agreement
from clipjax.train.agreement import decide, meeting, surroundings

SCRIPT = """
import json, socket, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
port, count, process = map(int, sys.argv[1:])
jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=process)
socket.gethostname = lambda: f"host{process}"
from clipjax.errors import ClipjaxError, Unavailable
from clipjax.train import agreement
from clipjax.train.agreement import decide, meeting

def told(function):
    try:
        return function()
    except ClipjaxError as error:
        return [type(error).__name__, str(error)]

def meet(facts, differ=ClipjaxError):
    with meeting("the set-up", differ) as compare:
        if isinstance(facts, ClipjaxError):
            raise facts
        compare(facts)

def refuse():
    raise Unavailable("the folder is in use")

out = [
    told(lambda: decide("the step", lambda: {"start": 300})),
    told(lambda: decide("the step", refuse)),
    told(lambda: meet({"start": 300, "packages": {"jax": "1"}})),
    told(lambda: meet({"start": 300 if process != 2 else None, "packages": {"jax": "1" if process == 0 else "2"}})),
    told(lambda: meet({"start": process}, Unavailable)),
    told(lambda: meet(ClipjaxError("there is no shard") if process == 1 else {})),
    told(lambda: meet(ClipjaxError("there is no shard") if process == 0 else {})),
]
began = time.monotonic()
if process != 1:
    out.append(told(lambda: meet({})))
    out.append(round(time.monotonic() - began))
else:
    agreement._hear("clipjax/agreement/7/verdict", began + 100)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def heard():
    """What each of three processes was told, in the order of the script's last lines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {agreement.AGREE_SECONDS: "10"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(port), "3", str(i)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(3)
    ]  # fmt: skip
    results = [p.communicate(timeout=300) for p in processes]
    for out, err in results:
        assert out, err
    return list(zip(*(json.loads(out)[:7] for out, _ in results), strict=True)), [
        json.loads(out)[7:] for out, _ in results
    ]


def test_process_0_decides_for_all(heard):
    values, refusals = heard[0][:2]
    assert list(values) == [{"start": 300}] * 3
    assert refusals[0] == ["Unavailable", "the folder is in use"]
    assert refusals[1] == refusals[2] == ["Unavailable", "process 0 on host0: the folder is in use"]


def test_what_differs_is_named_with_its_host_in_every_process(heard):
    assert list(heard[0][2]) == [None] * 3  # they are of one mind
    one = heard[0][3][0]
    assert list(heard[0][3]) == [one] * 3
    kind, text = one
    assert kind == "ClipjaxError"
    assert (
        'packages.jax is "1" in process 0 on host0 and "2" in processes 1, 2 on host1, host2'
        in text
    )
    assert "start is 300 in process 0 on host0 and null in process 2 on host2" in text
    assert {kind for kind, _ in heard[0][4]} == {"Unavailable"}


def test_what_one_refuses_ends_all(heard):
    first, second, third = heard[0][5]
    assert second == ["ClipjaxError", "there is no shard"]
    assert first == third == ["ClipjaxError", "process 1 on host1: there is no shard"]
    first, second, third = heard[0][6]
    assert first == ["ClipjaxError", "there is no shard"]
    assert second == third == ["ClipjaxError", "process 0 on host0: there is no shard"]


def test_one_that_does_not_come_is_named_in_time(heard):
    for process in (0, 2):
        (kind, text), seconds = heard[1][process]
        assert kind == "Absent"
        assert "process 1 of 3 did not finish the set-up in 10 s" in text
        assert "heard of: process 0 on host0, process 2 on host2" in text
        assert 9 <= seconds <= 60


def test_a_single_process_agrees_with_itself():
    assert decide("anything", lambda: 3) == 3
    with meeting("anything") as compare:
        compare({"a": 1})


def test_surroundings_name_code_packages_and_the_users_files(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("mine")
    run = {
        "@type": "clipjax.config:Run",
        "model": {"@type": "mine:Tower"},
        "evals": [{"@type": "mine:E"}],
    }
    before = surroundings(run)
    assert set(before["code"]) == {"clipjax", "mine"}
    assert before["packages"]["jax"]
    file.write_text("x = 2\n")
    assert [path for path, _, _ in differences(before, surroundings(run))] == ["code.mine"]
