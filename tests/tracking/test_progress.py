import io

import pytest
from rich.console import Console

from clipjax.tracking import Progress, headline, print_results


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_progress_without_a_terminal_prints_plain_lines_every_so_often():
    clock, output = Clock(), io.StringIO()
    with Progress(1000, 64, console=Console(file=output, width=60), clock=clock) as progress:
        for step in range(1, 51):
            clock.now = 0.5 * step
            progress.update(step, {"loss": 4.0 / step, "lr": 1e-3, "other": 1.0})
            if step == 30:
                progress.evaluated(step, {"retrieval/image_to_text/R@1": 0.25})
    printed = output.getvalue().splitlines()
    # At 0.5, 10.5 and 20.5 s, the evaluation, and the last state on leaving.
    assert [line.split("  ")[0] for line in printed] == [
        "step 1/1000 (0.1 %)",
        "step 21/1000 (2.1 %)",
        "evaluation at step 30: retrieval/image_to_text/R@1 0.25",
        "step 41/1000 (4.1 %)",
        "step 50/1000 (5.0 %)",
    ]
    assert "loss 0.1905" in printed[1] and "128 examples/s" in printed[1]
    assert "ETA 0:08:10" in printed[1]  # 979 steps at 0.5 s
    assert "\x1b" not in output.getvalue()


def test_the_last_state_is_not_printed_twice():
    output = io.StringIO()
    with Progress(1, 8, console=Console(file=output), clock=Clock()) as progress:
        progress.update(1, {"loss": 1.0})
    assert output.getvalue().count("step 1/1") == 1


def test_speed_leaves_evaluations_out_and_the_time_left_does_not():
    clock = Clock()
    progress = Progress(100, 10, console=Console(file=io.StringIO()), clock=clock)
    assert progress.examples_per_second is None and progress.seconds_left is None
    for step, now in ((1, 5.0), (2, 6.0), (3, 7.0)):
        clock.now = now
        progress.update(step)
    assert progress.examples_per_second == 10.0 and progress.seconds_left == 97.0
    progress.evaluated(3, {})
    for step, now in ((4, 27.0), (5, 28.0)):
        clock.now = now
        progress.update(step)
    assert progress.examples_per_second == 10.0
    assert progress.seconds_left == pytest.approx(23.0 / 4 * 95)


def test_progress_on_a_terminal_shows_step_loss_speed_and_evaluation():
    clock, output = Clock(), io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with Progress(200, 8, 100, console=console, clock=clock) as progress:
        for step in (101, 102, 103):
            clock.now += 2.0
            progress.update(step, {"loss": 2.5, "bad_steps": 1})
        progress.evaluated(103, {"zeroshot/top1": 0.75})
        progress.say("saved [103]")
    text = output.getvalue()
    for part in ("step 103/200", "loss 2.5", "bad_steps 1", "4 examples/s", "zeroshot/top1 0.75"):
        assert part in text
    assert "saved [103]" in text  # not taken for rich's markup


def test_headline_prefers_the_main_figures():
    metrics = {
        "retrieval/image_to_text/R@1": 0.1,
        "retrieval/image_to_text/median_rank": 9.0,
        "retrieval/en/image_to_text/R@1": 0.1,
        "zeroshot/top1": 0.3,
        "zeroshot/zh/top1": 0.2,
    }
    assert headline(metrics) == {"retrieval/image_to_text/R@1": 0.1, "zeroshot/top1": 0.3}
    assert headline({"mine/a": 1.0}) == {"mine/a": 1.0}


def test_results_are_printed_in_full_even_in_a_narrow_pipe():
    output = io.StringIO()
    results = {
        "retrieval/image_to_text/R@1": 0.31234,
        "retrieval/zh/text_to_image/median_rank": 4.0,
    }
    print_results("runs/[x] at step 7", results, Console(file=output, width=80))
    printed = [line.split() for line in output.getvalue().splitlines()]
    assert printed[0] == ["runs/[x]", "at", "step", "7"]
    assert ["retrieval/image_to_text/R@1", "0.3123"] in printed
    assert ["retrieval/zh/text_to_image/median_rank", "4.0000"] in printed
