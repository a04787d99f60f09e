"""Stopping: by signals wherever a run is, by a lost terminal (which must not), by the watchdog."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from clipjax.errors import (
    ClipjaxError,
    DamagedCheckpoint,
    Preempted,
    RunFailed,
    Unavailable,
)

HELD = """
import ctypes, signal, sys, time
from clipjax.train.signals import Interrupted, StopRequest, nothing_lost

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as it is without nohup

def block():
    lock = ctypes.create_string_buffer(256)
    for _ in range(2):  # the second time never returns, and no signal wakes it
        ctypes.CDLL(None).pthread_mutex_lock(lock)

with StopRequest() as stop:
    try:
        {before}
        print("ready", flush=True)
        {body}
    except Interrupted as signal:
        print(nothing_lost(signal.name), file=sys.stderr)
        sys.exit(75)
print("lived", flush=True)
"""


def ask(body, *signals, before="pass"):
    """What a process in the middle of `body` does: (exit code, seconds, stdout, stderr)."""
    process = subprocess.Popen(
        [sys.executable, "-c", HELD.format(body=body, before=before)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    out, err = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - began, out, err


@pytest.mark.parametrize(
    "body", ["time.sleep(50)", "block()"], ids=["in Python", "in a compiler that never lets go"]
)
def test_before_the_first_step_a_signal_ends_the_process(body):
    code, seconds, _, err = ask(body, signal.SIGHUP)
    assert code == 75
    assert seconds < 20
    assert "stopped by SIGHUP before the first step" in err


def test_while_steps_run_the_first_signal_waits_and_the_second_does_not():
    ask_in_steps = functools.partial(ask, before="stop.wait_for_steps()")
    steps = "time.sleep(1); sys.stdout.write(f'{stop.number} ')"
    assert ask_in_steps(steps, signal.SIGTERM)[::2] == (0, "15 lived\n")
    assert ask_in_steps(steps, signal.SIGHUP)[::2] == (0, "1 lived\n")
    code, _, out, _ = ask_in_steps(steps, signal.SIGTERM, signal.SIGTERM)
    assert (code, out) == (-signal.SIGTERM, "")
    evaluating = "with stop.at_once(): time.sleep(50)"
    assert ask_in_steps(evaluating, signal.SIGTERM)[0] == 75


def test_exit_codes_tell_never_again_from_try_again():
    never, again = {1, 2}, {69, 75, 76}
    kinds = {ClipjaxError: 2, RunFailed: 1, Unavailable: 69, Preempted: 75, DamagedCheckpoint: 2}
    assert {kind: kind.exit_code for kind in kinds} == kinds
    assert {k.exit_code for k in (ClipjaxError, RunFailed, DamagedCheckpoint)} == never
    assert {Unavailable.exit_code, Preempted.exit_code, 76} == again


def test_an_evaluation_is_given_up_and_the_step_before_it_saved(
    tmp_path, spawn, wait_for, vary, read_metrics
):
    config = vary("evals=(Sleeps(every=Every(4)),), checkpoint=Checkpointing(every=None)")
    config.write_text(
        config.read_text()
        + """
@dataclasses.dataclass(frozen=True)
class Sleeps(Evaluator):
    def run(self, predictor):
        import time
        Path(__file__).with_name("asleep").touch()
        time.sleep(600)
"""
    )
    workdir = tmp_path / "run"
    process = spawn("train", config, "--workdir", workdir)
    wait_for((tmp_path / "asleep").exists, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert "stopped by SIGTERM after step 4 of 8; saved" in stderr
    assert (workdir / "checkpoints" / "4" / "state").is_dir()
    assert sorted(read_metrics(workdir)) == [1, 2, 3, 4]


def test_a_lost_terminal_ends_no_run(tmp_path, spawn, vary):
    """The other end of stderr and stdout is gone after the first words."""
    process = spawn("train", vary("evals=()"), "--workdir", tmp_path / "run")
    process.stderr.read(1)
    process.stderr.close()
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert (tmp_path / "run" / "results.json").exists()
    process.stderr = process.stdout = None


def test_a_process_that_stands_still_is_named_and_the_others_end(tmp_path, spawn, wait_for, vary):
    """Of three processes one is stopped in a step: the others print all stacks, name it alone, and end with 76."""
    config = vary("evals=(), duration=Duration(100_000), checkpoint=Checkpointing(every=None), data=replace("
                  "run.data, batch_size=18)")  # fmt: skip
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        spawn("train", config, "--workdir", tmp_path / "run", "--stall_minutes", 0.2,
              JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="3", JAX_PROCESS_ID=str(index))
        for index in range(3)
    ]  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 3, processes[0])
    processes[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    for process in (processes[0], processes[2]):
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 76, stderr
        assert time.monotonic() - began < 60
        assert f"process 1 on {socket.gethostname()} is silent (it was at: " in stderr
        assert stderr.count(" is silent") == 1
        assert "Thread 0x" in stderr  # the stacks
        assert "loop.py" in stderr
    os.kill(processes[1].pid, signal.SIGKILL)
