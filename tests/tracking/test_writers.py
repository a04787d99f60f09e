import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from clipjax.errors import ClipjaxError
from clipjax.tracking import MetricsLog, Progress, TensorBoard, Tracking, Wandb, writers


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, steps, resume_step=None):
    log = MetricsLog(path, resume_step, clock=lambda: 12.3456)
    for step in steps:
        log.write(step, {"loss": 1.0 / step})
    log.close()


def test_a_line_is_a_json_object(tmp_path):
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl", clock=lambda: 12.3456)
    log.write(np.int32(3), {"loss": jnp.float32(0.1), "grad_norm": float("nan"), "n": 7})
    # Readable while the run goes on: every line is out when write returns.
    (line,) = lines(tmp_path / "new" / "metrics.jsonl")
    assert line == {
        "step": 3,
        "time": 12.346,
        "loss": float(np.float32(0.1)),
        "grad_norm": None,
        "n": 7.0,
    }
    log.close()


def test_resuming_drops_later_lines_and_leaves_the_others_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    first = path.read_bytes().splitlines(keepends=True)
    write(path, [6, 7, 8], resume_step=5)
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert path.read_bytes().splitlines(keepends=True)[:5] == first[:5]
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    write(path, [1])
    assert [line["step"] for line in lines(path)] == [1]


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_partial_last_line_is_repaired(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-cut])  # what a kill within the last write leaves
    write(path, [3], resume_step=3)
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_damage_elsewhere_costs_that_line_only(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(content[0] + b"\0\0\0\n" + b"[1]\n" + content[2])
    write(path, [], resume_step=3)
    assert [line["step"] for line in lines(path)] == [1, 3]
    assert "dropped 2 unreadable" in caplog.text


def test_tensorboard_can_be_read_back_and_a_resumed_run_purges_later_steps(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume, steps in ((None, [1, 2, 3]), (2, [3, 4])):
        with Tracking(tmp_path, (TensorBoard(),), resume_step=resume) as track:
            for step in steps:
                track.write(
                    step, {"retrieval/image_to_text/R@1": step if resume is None else 10 * step}
                )
    reader = events.EventAccumulator(str(tmp_path / "tb"))
    reader.Reload()
    (tag,) = reader.Tags()["scalars"]
    assert [(e.step, e.value) for e in reader.Scalars(tag)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.jax, "process_index", lambda: 1)
    output = io.StringIO()
    with (
        Tracking(tmp_path / "run", (TensorBoard(),)) as track,
        Progress(10, 4, console=Console(file=output)) as progress,
    ):
        track.write(1, {"loss": 1.0})
        progress.update(1, {"loss": 1.0})
        progress.evaluated(1, {"top1": 0.5})
        progress.say("hello")
    assert not (tmp_path / "run").exists()
    assert output.getvalue() == ""


def test_missing_wandb_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ClipjaxError, match=r"pip install 'clipjax\[tracking\]'"):
        Tracking(tmp_path, (Wandb(project="p"),))
    with pytest.raises(ClipjaxError, match="mode='on'"):
        Wandb(project="p", mode="on")


class FakeWandb:
    """The part of wandb that is used, recording its calls."""

    def __init__(self):
        self.inits, self.logged, self.finished = [], [], 0
        self.errors = self

    class Error(Exception):
        pass

    def init(self, **kwargs):
        if kwargs["project"] == "forbidden":
            raise self.Error("no API key")
        self.inits.append(kwargs)
        return self

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, scalars):
        self.logged.append(scalars)

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_config_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume in (None, 5, None):
        with Tracking(tmp_path / "run", (Wandb(project="p"),), {"seed": 1}, resume) as track:
            track.write(6, {"loss": 0.5})
    first, second, third = (call["id"] for call in fake.inits)
    assert first == second != third
    assert fake.inits[0]["config"] == {"seed": 1} and fake.inits[0]["name"] == "run"
    assert fake.logged[0] == {"step": 6, "loss": 0.5}
    assert fake.finished == 3
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ClipjaxError, match=r"no API key.*wandb login"):
        Tracking(tmp_path / "run", (Wandb(project="p"), Wandb(project="forbidden")))
    assert fake.finished == 4
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
