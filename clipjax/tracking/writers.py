"""Where a run's figures go: `metrics.jsonl` always, TensorBoard and Weights & Biases on request.

A resumed run continues its files: whatever was logged after the step that it resumes from is
dropped first, so that every step appears once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from clipjax.component import Component
from clipjax.errors import ClipjaxError
from clipjax.files import replace_file
from clipjax.stores import Spool, place, read_bytes

log = logging.getLogger(__name__)
WANDB_FILE = "wandb_id"

Scalars = Mapping[str, Any]


class Writer(Protocol):
    """What a tracker writes to."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Records figures of a step."""

    def close(self) -> None:
        """Flushes and lets go of everything."""


@dataclasses.dataclass(frozen=True)
class Tracker(Component):
    """Role: a place outside the run's folder, or a format inside it, that figures are sent to."""

    def check(self) -> None:
        """Refuses, before a run writes anything, what can be seen to keep `build` from working."""

    def build(self, workdir: Path, config: dict[str, Any], resume_step: int | None) -> Writer:
        """Opens the tracker; called in process 0 only.

        Args:
          workdir: the run's folder.
          config: the run's configuration as JSON-able data.
          resume_step: the step that the run resumes from, None for a new run.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TensorBoard(Tracker):
    """Event files in the run's `tb/`, without TensorFlow."""

    def build(self, workdir, config, resume_step):
        return _TensorBoardWriter(Path(workdir) / "tb", resume_step)


@dataclasses.dataclass(frozen=True)
class Wandb(Tracker):
    """Weights & Biases (the extra `tracking`)."""

    project: str
    """Project that the run appears in."""
    entity: str | None = None
    """User or team; None: the account's default."""
    name: str | None = None
    """Name of the run; None: its folder's name."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    mode: str = "online"
    """online, offline (kept in the run's folder, sent later with `wandb sync`) or disabled."""

    def __post_init__(self):
        if self.mode not in ("online", "offline", "disabled"):
            raise ClipjaxError(f"Wandb.mode={self.mode!r}: choose online, offline or disabled")

    def check(self):
        _import_wandb()

    def build(self, workdir, config, resume_step):
        return _WandbWriter(self, Path(workdir), config, resume_step)


class Tracking:
    """All of a run's writers behind one `write`; silent in every process but the first."""

    def __init__(
        self,
        workdir: str | Path,
        trackers: Sequence[Tracker] = (),
        config: dict[str, Any] | None = None,
        resume_step: int | None = None,
    ):
        """Opens `metrics.jsonl` in the run's folder, and each of `trackers`.

        Args:
          workdir: the run's folder; created if missing.
          trackers: further places to write to.
          config: the run's configuration as JSON-able data, for trackers that show it.
          resume_step: the step that the run resumes from, None for a new run.
        """
        self._writers: list[Writer] = []
        self._spool = Spool(place(workdir), ("metrics.jsonl", WANDB_FILE))
        if jax.process_index() == 0:
            folder = self._spool.__enter__().folder
            try:
                for tracker in trackers:
                    self._writers.append(tracker.build(folder, config or {}, resume_step))
                # Last, because opening it drops lines: a tracker that fails leaves the file alone.
                self._writers.append(MetricsLog(folder / "metrics.jsonl", resume_step))
            except BaseException:
                self.close()
                raise

    def write(self, step: int, scalars: Scalars) -> None:
        """Records figures of a step; arrays of one element and NumPy scalars count as figures."""
        if self._writers:
            floats = {name: float(value) for name, value in scalars.items()}
            for writer in self._writers:
                writer.write(step, floats)

    def flush(self) -> None:
        """Sees that a run's folder in a bucket has what was written so far."""
        if self._writers:
            self._spool.flush()

    def close(self) -> None:
        """Closes every writer, also when one of them fails to."""
        errors = []
        for writer in self._writers:
            try:
                writer.close()
            except Exception as error:
                errors.append(error)
        self._writers = []
        try:
            self._spool.__exit__()
        except Exception as error:
            errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


class MetricsLog:
    """`metrics.jsonl`: a JSON object a line, with `step`, `time` (seconds since 1970) and figures.

    A figure that is not finite is written as null, since JSON knows no NaN. Each line goes out in
    one write, so that a killed run leaves at most one partial line, the last; it is dropped when
    the file is opened again.
    """

    def __init__(
        self,
        path: str | Path,
        resume_step: int | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """Opens the file for appending.

        Args:
          path: the file; its folder is created if missing.
          resume_step: lines of later steps are dropped; None drops all, as for a new run.
          clock: gives the `time` of a line.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _keep_until(path, -1 if resume_step is None else resume_step)
        self._clock = clock
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, scalars: Scalars) -> None:
        """Appends one line."""
        values = {name: float(value) for name, value in scalars.items()}
        line: dict[str, Any] = {"step": int(step), "time": round(self._clock(), 3)}
        line |= {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; none if there is no file. Lines cut off by a kill are left out."""
    lines: list[dict[str, Any]] = []
    path = place(path)
    if path.is_file():
        for text in read_bytes(path).decode("utf-8", "replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "step" in line:
                lines.append(line)
    return lines


def _keep_until(path: Path, last_step: int) -> None:
    """Rewrites the file without the lines after `last_step` and without what is no whole line.

    Kept lines stay as they are, byte for byte. The new file replaces the old one in a single
    rename: a kill in between leaves one of the two.
    """
    kept, broken = [], 0
    old = path.read_bytes()
    for line in old.splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            broken += 1
            continue
        if step <= last_step and line.endswith(b"\n"):
            kept.append(line)
    new = b"".join(kept)
    if new == old:
        return
    if broken:
        log.warning("%s: dropped %d unreadable line(s), as a killed run leaves them", path, broken)
    replace_file(path, new)


class _TensorBoardWriter:
    def __init__(self, folder: Path, resume_step: int | None):
        from tensorboardX import SummaryWriter

        # Also for a new run: one that was killed before its first checkpoint begins anew.
        purge_step = 0 if resume_step is None else resume_step + 1
        # The suffix keeps a run that is restarted within a second from overwriting its first file.
        self._writer = SummaryWriter(
            str(folder), flush_secs=10, purge_step=purge_step, filename_suffix=f".{purge_step}"
        )

    def write(self, step, scalars):
        for name, value in scalars.items():
            if math.isfinite(value):  # what is not known here, as a CPU's MFU, has no point
                self._writer.add_scalar(name, value, step)

    def close(self):
        self._writer.close()


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ClipjaxError(
            "the run asks for Weights & Biases, and wandb is not installed: "
            "pip install 'clipjax[tracking]', or take Wandb(...) out of the run's trackers"
        ) from error
    return wandb


class _WandbWriter:
    def __init__(
        self, settings: Wandb, workdir: Path, config: dict[str, Any], resume_step: int | None
    ):
        wandb = _import_wandb()
        # The id in the run's folder is what lets a resumed run continue the same curves.
        id_file = workdir / WANDB_FILE
        resumed = resume_step is not None and id_file.exists()
        run_id = id_file.read_text().strip() if resumed else secrets.token_hex(4)
        id_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or workdir.resolve().name,
                tags=list(settings.tags),
                mode=settings.mode,
                dir=str(workdir),
                id=run_id,
                resume="allow",
                config=config,
            )
        except wandb.errors.Error as error:
            raise ClipjaxError(
                f"Weights & Biases does not start: {error} (log in with `wandb login`, or set "
                "Wandb(mode='offline'))"
            ) from error
        id_file.write_text(run_id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step, scalars):
        # Our own `step` is the x axis: wandb's may only grow, and a resumed run goes back.
        self._run.log({"step": step, **scalars})

    def close(self):
        self._run.finish()
