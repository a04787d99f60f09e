"""What a person sees of a run on the console."""

from __future__ import annotations

import collections
import datetime
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from clipjax.tracking.writers import Scalars


class Progress:
    """Step, loss, examples/s, time left and the last evaluation.

    On a terminal: a live display. Elsewhere (a cluster's log, a pipe): a plain line every so often.
    Silent in every process but the first. Use as a context manager.
    """

    def __init__(
        self,
        total_steps: int,
        batch_size: int,
        start_step: int = 0,
        *,
        console: Console | None = None,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Nothing is shown before `__enter__`.

        Args:
          total_steps: the step at which training ends.
          batch_size: examples per step, over all processes.
          start_step: steps already done, by the run that this one continues.
          console: where to write; default: stderr.
          seconds_between_lines: least time between two lines when the console is no terminal.
          clock: monotonic seconds.
        """
        self._total, self._batch_size, self._step = total_steps, batch_size, start_step
        self._console = console or Console(stderr=True, highlight=False)
        self._shown = jax.process_index() == 0
        self._live: Live | None = None
        self._line_every, self._last_line = seconds_between_lines, -math.inf
        self._printed: int | None = None
        self._clock = clock
        self._first: tuple[float, int] | None = None
        self._window: collections.deque[tuple[float, int]] = collections.deque(maxlen=20)
        self._speed: float | None = None
        self._scalars: dict[str, float] = {}
        self._evaluation: tuple[int, dict[str, float]] | None = None

    def __enter__(self) -> Progress:
        if self._shown and self._console.is_terminal:
            self._live = Live(self._render(), console=self._console, refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(self, *exc_info) -> None:
        if self._live:
            self._live.update(self._render())
            self._live.__exit__(*exc_info)
            self._live = None
        elif self._shown and self._scalars and self._printed != self._step:
            self._print_line()

    def update(self, step: int, scalars: Scalars | None = None) -> None:
        """Reports that `step` is done, with its figures where they are at hand."""
        now = self._clock()
        self._step = step
        self._first = self._first or (now, step)
        self._window.append((now, step))
        (t0, s0), (t1, s1) = self._window[0], self._window[-1]
        if t1 > t0:
            self._speed = (s1 - s0) * self._batch_size / (t1 - t0)
        if scalars is not None:
            self._scalars = {name: float(value) for name, value in scalars.items()}
        self._refresh(now)

    def evaluated(self, step: int, metrics: Scalars) -> None:
        """Reports an evaluation; the time it took does not count into examples/s."""
        self._evaluation = (step, {name: float(value) for name, value in metrics.items()})
        self._window.clear()
        if self._shown and not self._live and metrics:
            self.say(f"evaluation at step {step}: {_figures(headline(self._evaluation[1]))}")
        elif self._live:
            self._live.update(self._render())

    def say(self, text: str) -> None:
        """Prints a line of text, above the display if there is one."""
        if self._shown:
            self._console.print(Text(text), soft_wrap=True)

    @property
    def examples_per_second(self) -> float | None:
        """Over the last 20 updates since an evaluation; None before the second update."""
        return self._speed

    @property
    def seconds_left(self) -> float | None:
        """At the pace since the first update (which compiled), evaluations and saves included."""
        if self._first is None or self._step <= self._first[1]:
            return None
        per_step = (self._window[-1][0] if self._window else self._clock()) - self._first[0]
        return per_step / (self._step - self._first[1]) * max(self._total - self._step, 0)

    def _refresh(self, now: float) -> None:
        if self._live:
            self._live.update(self._render())
        elif self._shown and self._scalars and now - self._last_line >= self._line_every:
            self._last_line = now
            self._print_line()

    def _print_line(self) -> None:
        self._printed = self._step
        percent = 100 * self._step / max(self._total, 1)
        self.say(
            f"step {self._step}/{self._total} ({percent:.1f} %)  {self._pace()}  {self._state()}"
        )

    def _pace(self) -> str:
        speed, left = self.examples_per_second, self.seconds_left
        mfu, data = (self._scalars.get(name, math.nan) for name in ("mfu", "data_share"))
        return "  ".join(
            ([] if speed is None else [f"{speed:,.0f} examples/s"])
            + ([] if math.isnan(mfu) else [f"{100 * mfu:.1f} % MFU"])
            # Below that it is no news: the batch was ready.
            + ([f"{100 * data:.0f} % of it waiting for data"] if data >= 0.05 else [])
            + ([] if left is None else [f"ETA {datetime.timedelta(seconds=round(left))}"])
        )

    def _state(self) -> str:
        shown = ("loss", "lr", "grad_norm", "logit_scale")
        figures = {name: self._scalars[name] for name in shown if name in self._scalars}
        if self._scalars.get("bad_steps"):
            figures["bad_steps"] = self._scalars["bad_steps"]
        return _figures(figures)

    def _render(self) -> Group:
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(f"step {self._step:,}/{self._total:,}", style="bold"),
            ProgressBar(total=self._total, completed=self._step, width=32),
            Text(self._pace() if self._first else "compiling the first step"),
        )
        lines: list[Any] = [bar, Text(self._state())]
        if self._evaluation:
            step, metrics = self._evaluation
            lines.append(Text(f"step {step:,}: {_figures(headline(metrics))}", style="green"))
        return Group(*lines)


HEADLINES = ("R@1", "R@5", "top1", "top5", "CIDEr-D", "BLEU-4", "CLIPScore")
"""How the names of main figures end."""


def print_results(title: str, results: Mapping[str, float], console: Console | None = None) -> None:
    """Prints evaluation results as a table, a row per name.

    Args:
      title: what was evaluated.
      results: names and figures.
      console: where to write; default: stdout.
    """
    table = Table(
        title=Text(title), title_justify="left", show_header=False, box=None, padding=(0, 2)
    )
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in results.items():
        table.add_row(Text(name), f"{value:.4f}")
    (console or Console(highlight=False)).print(table)


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few figures worth a line: each evaluator's main accuracies, without single languages'.

    Of `retrieval/image_to_text/R@1` and `retrieval/en/image_to_text/R@1` the first is kept: it has
    the fewest parts among the names of its evaluator that end alike.
    """
    main = [n for n in metrics if n.rsplit("/", 1)[-1] in HEADLINES]
    if not main:
        return dict(list(metrics.items())[:4])
    fewest: dict[str, int] = {}
    for name in main:
        group = name.split("/", 1)[0]
        fewest[group] = min(fewest.get(group, name.count("/")), name.count("/"))
    return {n: metrics[n] for n in main if n.count("/") == fewest[n.split("/", 1)[0]]}


def _figures(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
