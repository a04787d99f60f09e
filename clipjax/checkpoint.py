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
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from clipjax.component import Component
from clipjax.errors import ClipjaxError, did_you_mean
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
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

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
        """
        if step in self._manager.all_steps():
            return
        best = self._config.best if self._config else None
        if metrics and best and best not in metrics:
            raise ClipjaxError(
                f"checkpoint.best={best!r} is no evaluation metric{did_you_mean(best, metrics)}"
            )
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
            metrics={best: metrics[best]} if metrics and best else None,
            force=True,
        )

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved beside the state."""
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return restored["meta"]

    def restore(self, step: int, target: Any) -> Any:
        """The state of `step` in the layout of `target`.

        Args:
          step: one of `steps()`.
          target: pytree of ShapeDtypeStructs with shardings; any mesh.

        Raises:
          ClipjaxError: the checkpoint holds other leaves or shapes, or cannot be read.
        """
        self._check(step, target)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )
        except (ValueError, OSError) as error:
            raise ClipjaxError(
                f"checkpoint {self.folder / str(step)} cannot be read: {error}"
            ) from error
        return restored["state"]

    def restore_part(self, step: int, target: dict[str, Any]) -> Any:
        """Only the named top-level parts of the state (`{"params": ..., "ema": ...}`)."""
        self._check(step, target)
        arguments = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self.folder / str(step) / "state", args=arguments)

    def saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every array of the saved state."""
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            metadata = reader.metadata(self.folder / str(step) / "state").item_metadata.tree
        return {name: tuple(leaf.shape) for name, leaf in paths(metadata)}

    def _check(self, step: int, target: Any) -> None:
        # Checked here because Orbax's own complaint comes with a storm of tracebacks on stderr.
        saved = self.saved_shapes(step)
        for name, leaf in paths(target):
            if name not in saved:
                raise ClipjaxError(
                    f"checkpoint {self.folder / str(step)} is of another model: it has no {name!r}"
                    f"{did_you_mean(name, saved)}"
                )
            if saved[name] != tuple(leaf.shape):
                raise ClipjaxError(
                    f"checkpoint {self.folder / str(step)} is of another model: {name!r} has shape "
                    f"{saved[name]} there and {tuple(leaf.shape)} here"
                )

    def preempted(self, step: int) -> bool:
        """Whether the cluster has asked any process of a multi-process run to stop (all agree on the answer)."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Blocks until the save under way is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes the save under way and lets go of the folder."""
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
    """Step of the newest complete checkpoint in a run's folder, or None; writes nothing."""
    if not (Path(run_folder) / FOLDER).is_dir():
        return None
    with contextlib.closing(Checkpoints(run_folder)) as checkpoints:
        return checkpoints.latest()


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
