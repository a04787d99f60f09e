"""Checkpoints: save, restore, open (Orbax; asynchronous, atomic, restorable onto any mesh).

A run's folder holds `run.json` and `checkpoints/<step>/`. Each checkpoint is complete by itself: the train
state (parameters, optimizer, averages, objective state, RNG, step; the data position is a function of the step)
and `meta`: the run as JSON and the tokenizer's files.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from clipjax.component import Component
from clipjax.errors import ClipjaxError, RunFailed, did_you_mean
from clipjax.optim.duration import Duration
from clipjax.params import paths

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Checkpointing(Component):
    """When to save and what to keep. The last step is always saved."""

    every: Duration | None = Duration(1000)
    """Distance between two saves; None: only `minutes` counts."""
    minutes: float | None = None
    """Save also when this many minutes have passed since the last save."""
    keep: int = 2
    """How many of the latest checkpoints stay."""
    best: str | None = None
    """Name of an evaluation metric whose best checkpoint stays too, such as `retrieval/image_to_text/R@1`."""
    best_is: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ClipjaxError(f"checkpoint.keep={self.keep}: keep at least the latest one")
        if self.minutes is not None and not self.minutes > 0:
            raise ClipjaxError(
                f"checkpoint.minutes={self.minutes}: must be above 0, or None for steps alone"
            )


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_folder: Path, config: Checkpointing | None = None):
        """Opens (and, when `config` is given, creates) `run_folder/checkpoints`."""
        self.folder = Path(run_folder).absolute() / FOLDER
        self._config = config
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=config is not None,
                read_only=config is None,
                preservation_policy=config and _policy(config),
                enable_async_checkpointing=config is not None,
                # What a kill during a save leaves is as large as a checkpoint.
                cleanup_tmp_directories=config is not None,
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return latest_step(self.folder.parent)

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Starts an asynchronous save; returns once the state has been copied off the devices.

        Args:
          step: number of finished training steps.
          state: pytree of arrays.
          meta: JSON-able.
          metrics: evaluation results of this very step, if there are any.

        Raises:
          RunFailed: this save, or the one before it, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        best = self._best(metrics or {})
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
                metrics=best,
                force=True,
            )

    def _best(self, metrics: dict[str, float]) -> dict[str, float] | None:
        """The figure that `best` asks for; None where the evaluation of this step has none."""
        best = self._config.best if self._config else None
        if best is None or best in metrics:
            return {best: metrics[best]} if best else None
        if any(name.split("/")[0] == best.split("/")[0] for name in metrics):
            # Worth no lost run: the save goes on without it.
            log.warning(
                "checkpoint.best=%r is no evaluation metric%s", best, did_you_mean(best, metrics)
            )
        return None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (
            Exception
        ) as error:  # Orbax and TensorStore raise whatever the file system makes of it
            raise RunFailed(
                f"a checkpoint cannot be written to {self.folder}: {_one_line(error)}; "
                f"{self.describe_latest()}. Once there is room, the same command continues"
            ) from error

    def describe_latest(self) -> str:
        """What is safe, for the message of a run that ends early."""
        latest = self.latest()
        if latest is None:
            return "nothing was saved yet"
        return f"the last good checkpoint is {self.folder / str(latest)}"

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved beside the state.

        Raises:
          ClipjaxError: it cannot be read.
        """
        with self._reading(step):
            arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return self._manager.restore(step, args=arguments)["meta"]

    def restore(self, step: int, target: Any) -> Any:
        """The state of `step` in the layout of `target`.

        Args:
          step: one of `steps()`.
          target: pytree of ShapeDtypeStructs with shardings; any mesh.

        Raises:
          ClipjaxError: the checkpoint holds other leaves or shapes, or cannot be read.
        """
        self._check(step, target)
        with self._reading(step):
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            return self._manager.restore(step, args=arguments)["state"]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # damaged files make Orbax and TensorStore raise almost anything
            others = [s for s in self.steps() if s != step]
            raise ClipjaxError(
                f"checkpoint {self.folder / str(step)} cannot be read: {_one_line(error)}. "
                + (
                    f"Move that folder out of {self.folder}, and step {others[-1]} is used instead"
                    if others
                    else "There is no other checkpoint beside it"
                )
            ) from error

    def restore_part(self, step: int, target: dict[str, Any]) -> Any:
        """Only the named top-level parts of the state (`{"params": ..., "ema": ...}`)."""
        self._check(step, target)
        arguments = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        with self._reading(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self.folder / str(step) / "state", args=arguments)

    def saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every array of the saved state."""
        with self._reading(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            metadata = reader.metadata(self.folder / str(step) / "state").item_metadata.tree
        return {name: tuple(leaf.shape) for name, leaf in paths(metadata)}

    def _check(self, step: int, target: Any) -> None:
        # Checked here because Orbax's own complaint comes with a storm of tracebacks on stderr.
        saved = self.saved_shapes(step)
        for name, leaf in paths(target):
            model = name.startswith(("params/", "model_state/"))
            where = f"checkpoint {self.folder / str(step)} is of another " + (
                "model" if model else "optimizer, ema or objective"
            )
            if name not in saved:
                raise ClipjaxError(f"{where}: it has no {name!r}{did_you_mean(name, saved)}")
            if saved[name] != tuple(leaf.shape):
                raise ClipjaxError(
                    f"{where}: {name!r} has shape {saved[name]} there and {tuple(leaf.shape)} here"
                )

    def wait(self) -> None:
        """Blocks until the save under way is complete.

        Raises:
          RunFailed: it cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes the save under way and lets go of the folder; errors as in `wait`."""
        with self._writing():
            self._manager.close()


def _policy(config: Checkpointing):
    policy = checkpoint_managers.preservation_policy
    keep: list[Any] = [policy.LatestN(config.keep)]
    if config.best:
        sign = 1.0 if config.best_is == "max" else -1.0

        def score(metrics):
            value = sign * metrics[config.best]
            return -math.inf if math.isnan(value) else value

        keep.append(policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
    return policy.AnyPreservationPolicy(keep)


def latest_step(run_folder: Path) -> int | None:
    """Step of the newest complete checkpoint in a run's folder, or None; one process alone may ask."""
    return max(complete_steps(run_folder), default=None)


def complete_steps(run_folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a run's folder, ascending, as they are at this moment."""
    folder = Path(run_folder) / FOLDER
    if not folder.is_dir():
        return []
    complete = [
        p for p in folder.iterdir() if p.name.isdigit() and ocp.utils.is_checkpoint_finalized(p)
    ]
    return sorted(int(p.name) for p in complete)


def _one_line(error: Exception) -> str:
    """The first words of an error; TensorStore's go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


def locate(path: Path) -> tuple[Path, int]:
    """The run folder and step that `path` means: a run's folder (its latest) or one `checkpoints/<step>`.

    Raises:
      ClipjaxError: there is no checkpoint of clipjax at `path`.
    """
    path = Path(path)
    if not path.is_dir():
        raise ClipjaxError(
            f"{path} is no folder: give a run's folder or one of its checkpoints/<step>"
        )
    if path.name.isdigit() and path.parent.name == FOLDER:
        if not (path / "state").is_dir():
            raise ClipjaxError(f"{path} holds no complete checkpoint")
        return path.parent.parent, int(path.name)
    if not (path / FOLDER).is_dir():
        raise ClipjaxError(
            f"{path} is no clipjax run: it has no {FOLDER}/ (give the --workdir of a `clipjax train`)"
        )
    step = latest_step(path)
    if step is None:
        raise ClipjaxError(f"{path / FOLDER} holds no complete checkpoint yet")
    return path, step


def pack_tokenizer(tokenizer: Any) -> dict[str, str]:
    """The files that `tokenizer.save` writes, as JSON-able text (base64)."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = sorted(Path(folder).iterdir())
        return {file.name: base64.b64encode(file.read_bytes()).decode() for file in files}


def unpack_tokenizer(files: dict[str, str], folder: Path) -> None:
    """Writes what `pack_tokenizer` packed.

    Raises:
      ClipjaxError: a name that would leave the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise ClipjaxError(f"a checkpoint's tokenizer names the file {name!r}: refused")
        (folder / name).write_bytes(base64.b64decode(content))
