"""Goodput: the share of a run's wall clock, over all its restarts, in which it learned something that stayed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipjax.stores import read_bytes

ATTEMPTS_FILE = "attempts.jsonl"


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where the wall clock of a run went.

    Attributes:
      wall: seconds from the first start to the last figure.
      seconds: by what they were spent on, adding up to `wall`.
      restarts: how many times the run was started again.
    """

    wall: float
    seconds: dict[str, float]
    restarts: int

    @property
    def share(self) -> float:
        """Of the wall clock, in steps that stayed."""
        return self.seconds["steps"] / self.wall if self.wall > 0 else float("nan")

    def to_json(self) -> dict[str, Any]:
        """For `results.json`."""
        seconds = {name: round(value, 1) for name, value in self.seconds.items()}
        return {"goodput": round(self.share, 4), "restarts": self.restarts,
                "wall_seconds": round(self.wall, 1), "wall_seconds_by": seconds}  # fmt: skip


def read_attempts(workdir: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first: when, from which step, where, and what was last heard of the one before."""
    try:
        lines = read_bytes(workdir / ATTEMPTS_FILE).decode().splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []


def goodput(
    lines: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]]
) -> Goodput | None:
    """What a run's log says of its time; None without attempts or figures.

    Steps that were lost with a kill are not in the log any more (their lines were dropped): they are what
    remains when everything known has been taken from the wall clock.

    Args:
      lines: of `metrics.jsonl`.
      attempts: of `attempts.jsonl`.
    """
    times = [line["time"] for line in lines if "time" in line]
    if not times or not attempts:
        return None
    spent = dict.fromkeys(("starting", "training", "data", "evaluation", "saving"), 0.0)
    for line in lines:
        for part in spent:
            spent[part] += line.get(f"seconds/{part}") or 0.0
    wall = times[-1] - attempts[0]["began"]
    down = 0.0
    for attempt in attempts[1:]:
        if attempt["last_heard"] is not None:
            down += max(attempt["began"] - attempt["last_heard"], 0.0)
    data = min(spent["data"], spent["training"])
    seconds = {
        "steps": spent["training"] - data,
        "waiting for data": data,
        "evaluation": spent["evaluation"],
        "saving": spent["saving"],
        "starting and compiling": spent["starting"],
        "not running": down,
    }
    seconds["done again or lost"] = max(wall - sum(seconds.values()), 0.0)
    return Goodput(max(wall, sum(seconds.values())), seconds, len(attempts) - 1)
