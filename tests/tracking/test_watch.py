"""Where the time goes: against sums done by hand, on a clock that stands still unless told."""

import logging

import jax
import pytest

from clipjax.chips import peak_flops
from clipjax.cli import _first_process_alone, _Lines
from clipjax.tracking.goodput import goodput
from clipjax.train.watch import Watch


def test_throughput_and_the_parts_of_the_time():
    now = [100.0]
    watch = Watch(32, 10, 6e9, restarts=2, elapsed=5.0, clock=lambda: now[0])

    def spend(part, seconds):
        with watch.doing(part):
            now[0] += seconds

    spend("evaluation", 3.0)
    spend("data", 1.0)  # before the first step it is part of the start
    now[0] += 6.0
    watch.stepped()
    figures = watch.figures()
    assert figures == {"seconds/starting": 12.0, "seconds/evaluation": 3.0, "restarts": 2}
    for _ in range(4):
        spend("data", 0.5)
        now[0] += 1.5
        watch.stepped()
    spend("saving", 7.0)
    spend("evaluation", 9.0)
    figures = watch.figures()
    assert figures["seconds/training"] == pytest.approx(8.0)
    assert figures["seconds/data"] == pytest.approx(2.0)
    assert figures["seconds/saving"] == pytest.approx(7.0)
    assert figures["seconds/evaluation"] == pytest.approx(9.0)
    assert "seconds/starting" not in figures
    assert figures["step_seconds"] == pytest.approx(2.0)
    assert figures["examples_per_second"] == pytest.approx(16.0)
    assert figures["tokens_per_second"] == pytest.approx(160.0)
    assert figures["data_share"] == pytest.approx(0.25)
    assert figures["tflops_per_device"] == pytest.approx(16 * 6e9 / 1e12 / jax.device_count())
    assert figures["mfu"] != figures["mfu"]  # the CPU is in no table


def test_chips_are_known_by_what_jax_calls_them():
    names = {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12,
             "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA L4": 121e12,
             "NVIDIA L40S": 362e12, "NVIDIA H200": 989e12, "Tesla T4": 65e12, "cpu": None}  # fmt: skip
    assert {name: peak_flops(name) for name in names} == names


def test_goodput_over_two_restarts():
    """Began at 0; killed at 100 and 200, 30 s and 10 s down; 20 s of steps were lost with the first kill."""
    attempts = [
        {"began": 0.0, "last_heard": None},
        {"began": 130.0, "last_heard": 100.0},
        {"began": 210.0, "last_heard": 200.0},
    ]
    lines = [
        {"step": 1, "time": 10.0, "seconds/starting": 10.0},
        {"step": 5, "time": 80.0, "seconds/training": 60.0, "seconds/data": 15.0, "seconds/saving": 10.0},
        {"step": 6, "time": 150.0, "seconds/starting": 20.0},
        {"step": 9, "time": 200.0, "seconds/training": 45.0, "seconds/evaluation": 5.0},
        {"step": 10, "time": 225.0, "seconds/starting": 15.0},
        {"step": 12, "time": 300.0, "seconds/training": 75.0, "loss": 1.0},
    ]  # fmt: skip
    spent = goodput(lines, attempts)
    assert spent.wall == 300.0
    assert spent.seconds == {
        "steps": 165.0, "waiting for data": 15.0, "evaluation": 5.0, "saving": 10.0,
        "starting and compiling": 45.0, "not running": 40.0, "done again or lost": 20.0,
    }  # fmt: skip
    assert spent.share == 165 / 300
    assert spent.to_json()["goodput"] == 0.55
    assert spent.restarts == 2
    assert goodput([], attempts) is None
    assert goodput(lines, []) is None


def test_log_lines_have_time_and_process_and_one_process_speaks(monkeypatch):
    record = logging.LogRecord("clipjax.x", logging.INFO, "f", 1, "hello %d", (3,), None)
    lines = _Lines("%(where)s%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    monkeypatch.setattr("clipjax.cli._process", lambda: None)
    assert lines.format(record).split(" ", 1)[1] == "INFO hello 3"
    monkeypatch.setattr("clipjax.cli._process", lambda: 3)
    assert lines.format(record).startswith("[p3] ")
    assert not _first_process_alone(record)
    monkeypatch.setattr("clipjax.cli._process", lambda: 0)
    assert _first_process_alone(record)
    record.levelno = logging.WARNING
    monkeypatch.setattr("clipjax.cli._process", lambda: 3)
    assert _first_process_alone(record)
