"""Checkpoints: save, restore, open (Orbax; asynchronous, atomic, restorable onto any mesh).

A run's folder holds `run.json` and `checkpoints/<step>/`. Each checkpoint is complete by itself: the train
state (parameters, optimizer, averages, objective state, RNG, step) and `meta` (clipjax/meta.py). Every array
has its checksum there, so a checkpoint that was damaged on the disk is told from a whole one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from clipjax import orbax_s3
from clipjax.checksums import checksums
from clipjax.component import Component
from clipjax.errors import ClipjaxError, DamagedCheckpoint, Unavailable, did_you_mean
from clipjax.files import scratch
from clipjax.meta import Meta
from clipjax.optim.duration import Duration, Every, as_every
from clipjax.params import map_with_path, paths
from clipjax.stores import COMMITTED, absolute, is_remote, move_tree, passes, place

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
ASIDE = "aside"
MILESTONE = "milestone"


@dataclasses.dataclass(frozen=True)
class Checkpointing(Component):
    """When to save and what to keep. The last step is always saved."""

    every: Every | Duration | tuple[Every, ...] | None = Every(1000)
    """When to save; several cadences, such as `(Every(1000), Every(10, "minutes"))`, save at each of them."""
    keep: int = 2
    """How many of the latest checkpoints stay."""
    milestones: Every | None = None
    """Checkpoints that stay for ever, and are saved whatever `every` says: `Every(50_000)`."""
    best: str | None = None
    """Name of an evaluation metric whose best checkpoint stays too, such as `retrieval/image_to_text/R@1`. An
    evaluation that beats all before it is saved, whatever `every` says."""
    best_is: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ClipjaxError(f"checkpoint.keep={self.keep}: keep at least the latest one")
        several = self.every if isinstance(self.every, (tuple, list)) else (self.every,)
        every = tuple(as_every(e, "checkpoint.every") for e in several if e is not None)
        object.__setattr__(self, "every", every[0] if len(every) == 1 else every or None)
        if self.milestones is not None:
            milestones = as_every(self.milestones, "checkpoint.milestones")
            object.__setattr__(self, "milestones", milestones)

    @classmethod
    def upgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        minutes = fields.pop("minutes", None)  # it had a field of its own
        if minutes is not None:
            steps = [as_every(fields["every"], "checkpoint.every")] if fields.get("every") else []
            fields["every"] = (*steps, Every(minutes, "minutes"))
        return fields

    @property
    def cadences(self) -> tuple[Every, ...]:
        """All of `every`."""
        return self.every if isinstance(self.every, tuple) else (self.every,) if self.every else ()  # type: ignore[return-value]

    def beats(self, value: float, best: float) -> bool:
        """Whether a figure is better than another; NaN never is."""
        return value > best if self.best_is == "max" else value < best


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        run_folder: Path,
        config: Checkpointing | None = None,
        before_save: Callable[[], None] = lambda: None,
    ):
        """Opens (and, when `config` is given, creates) `run_folder/checkpoints`.

        Args:
          run_folder: the run's.
          config: when to save and what to keep; None: only to read.
          before_save: called before a save: what a run that goes on from it will look for must be there.
        """
        self._before_save = before_save
        self.folder = absolute(place(run_folder)) / FOLDER
        in_bucket = {}
        if is_remote(self.folder):
            orbax_s3.teach()
            in_bucket = {"temporary_path_class": ocp.path.atomicity.CommitFileTemporaryPath}
        self._config = config
        self._metas: dict[int, Meta] = {}
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=config is not None,
                read_only=config is None,
                preservation_policy=config and _Keep(config),
                # Orbax keeps figures only where this is given; the policy alone decides by them.
                best_fn=config and _no_order,
                enable_async_checkpointing=config is not None,
                # What a kill during a save leaves is as large as a checkpoint.
                cleanup_tmp_directories=config is not None,
                **in_bucket,
            ),
        )
        # In memory, since what is on the disk differs from process to process while a save is under way.
        self._saved_with: dict[int, dict[str, float]] = {
            step: self._manager.metrics(step) or {} for step in (self.steps() if config else ())
        }

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return latest_step(self.folder.parent)

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: Any,
        meta: Meta,
        figures: dict[str, float] | None = None,
        milestone: bool = False,
    ) -> None:
        """Starts an asynchronous save; returns once the state has been copied off the devices.

        Args:
          step: number of finished training steps.
          state: pytree of arrays.
          meta: what goes beside it; step, figures and checksums are filled in here.
          figures: evaluation results of this very step, if there are any.
          milestone: whether it stays for ever.

        Raises:
          Unavailable: this save, or the one before it, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        self._before_save()
        kept = ({MILESTONE: 1.0} if milestone else {}) | self._best(figures or {})
        self._saved_with[step] = kept
        meta = dataclasses.replace(
            meta, step=step, figures=dict(figures or {}), sums=checksums(state)
        )
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta.to_json())
                ),
                metrics=kept or None,
                force=True,
            )

    def _best(self, figures: dict[str, float]) -> dict[str, float]:
        """The figure that `best` asks for; none where the evaluation of this step has none."""
        best = self._config.best if self._config else None
        if best is None or not figures:
            return {}
        if best in figures:
            return {best: figures[best]}
        if any(name.split("/")[0] == best.split("/")[0] for name in figures):
            # Worth no lost run: the save goes on without it.
            log.warning(
                "checkpoint.best=%r is no evaluation metric%s", best, did_you_mean(best, figures)
            )
        return {}

    def is_best(self, figures: dict[str, float]) -> bool:
        """Whether these figures have the one that `best` asks for, better than any checkpoint has it."""
        config = self._config
        if config is None or config.best not in figures or math.isnan(figures[config.best]):
            return False
        before = [kept[config.best] for kept in self._saved_with.values() if config.best in kept]
        return all(
            math.isnan(other) or config.beats(figures[config.best], other) for other in before
        )

    def milestones(self) -> list[int]:
        """Steps of the checkpoints that stay for ever, ascending."""
        return sorted(s for s, kept in self._saved_with.items() if MILESTONE in kept)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (
            Exception
        ) as error:  # Orbax and TensorStore raise whatever the file system makes of it
            raise Unavailable(
                f"a checkpoint cannot be written to {self.folder}: {_one_line(error)}; "
                f"{self.describe_latest()}. Once there is room, the same command continues"
            ) from error

    def describe_latest(self) -> str:
        """What is safe, for the message of a run that ends early."""
        latest = self.latest()
        if latest is None:
            return "nothing was saved yet"
        return f"the last good checkpoint is {self.folder / str(latest)}"

    def meta(self, step: int) -> Meta:
        """What was saved beside the state.

        Raises:
          DamagedCheckpoint: it cannot be read.
          Unavailable: not just now.
        """
        if step not in self._metas:
            with self._reading(step):
                arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
                data = self._manager.restore(step, args=arguments)["meta"]
                self._metas[step] = Meta.from_json(data, f"checkpoint {self.folder / str(step)}")
        return self._metas[step]

    def restore(self, step: int, target: Any) -> Any:
        """The state of `step`, or a part of it, in the layout of `target`.

        Args:
          step: one of `steps()`.
          target: pytree of ShapeDtypeStructs with shardings; any mesh.

        Raises:
          ClipjaxError: the checkpoint holds other leaves or shapes.
          DamagedCheckpoint: it cannot be read, or holds other numbers than were saved.
          Unavailable: it cannot be read just now.
        """
        leaves = self.read(step, dict(paths(target)))
        return map_with_path(lambda name, _: leaves[name], target)

    def read(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Some arrays of the state of `step` by their paths there; shapes, layouts and errors as in `restore`."""
        self._check(step, wanted)
        folder = self.folder / str(step) / "state"
        with self._reading(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            saved = reader.metadata(folder).item_metadata.tree
            # In the dtype that was saved, since the checksum is of that.
            target = map_with_path(
                lambda name, leaf: (
                    jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=wanted[name].sharding)
                    if name in wanted
                    else ocp.PLACEHOLDER
                ),
                _plain_containers(saved),
            )
            restore_args = ocp.checkpoint_utils.construct_restore_args(target)
            arguments = ocp.args.PyTreeRestore(target, restore_args=restore_args)
            leaves = dict(paths(reader.restore(folder, args=arguments)))
            leaves = {name: leaves[name] for name in wanted}
            self._verify(step, leaves)
        return {name: leaf.astype(wanted[name].dtype) for name, leaf in leaves.items()}

    def _verify(self, step: int, leaves: dict[str, jax.Array]) -> None:
        saved = self.meta(step).sums
        if not saved:  # format 1
            return
        for name, value in checksums(leaves).items():
            if saved.get(name, value) != value:
                raise ValueError(f"{name!r} is damaged: its checksum differs")

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except ClipjaxError:
            raise
        except Exception as error:  # damaged files make Orbax and TensorStore raise almost anything
            what = f"checkpoint {self.folder / str(step)} cannot be read: {_one_line(error)}"
            if passes(error):
                raise Unavailable(f"{what}. The same command may find it later") from error
            others = [s for s in self.steps() if s < step]
            raise DamagedCheckpoint(
                f"{what}. "
                + (
                    f"With --fallback, step {others[-1]} is used instead and that folder moved to {ASIDE}/"
                    if others
                    else "There is no earlier checkpoint beside it"
                ),
                step,
            ) from error

    def saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every array of the saved state."""
        with self._reading(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            metadata = reader.metadata(self.folder / str(step) / "state").item_metadata.tree
        return {name: tuple(leaf.shape) for name, leaf in paths(metadata)}

    def _check(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        # Checked here because Orbax's own complaint comes with a storm of tracebacks on stderr.
        saved = self.saved_shapes(step)
        for name, leaf in wanted.items():
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
          Unavailable: it cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes the save under way and lets go of the folder; errors as in `wait`."""
        with self._writing():
            self._manager.close()


@dataclasses.dataclass(frozen=True)
class _Keep:
    """Orbax' preservation policy: the latest, the milestones and the best by what was saved with them."""

    config: Checkpointing

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        figures = [info.metrics or {} for info in checkpoints]
        latest = len(checkpoints) - self.config.keep
        keep = [i >= latest or MILESTONE in figures[i] for i in range(len(checkpoints))]
        scores = {i: f[self.config.best] for i, f in enumerate(figures) if self.config.best in f}
        scores = {i: score for i, score in scores.items() if not math.isnan(score)}
        if scores:
            choose = max if self.config.best_is == "max" else min
            keep[choose(scores, key=lambda i: (scores[i], i))] = True
        return keep


def _plain_containers(tree: Any) -> Any:
    """Orbax' metadata in the containers that it restores into: dicts, lists, and None for nothing."""
    if isinstance(tree, dict):
        return {key: _plain_containers(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain_containers(value) for value in tree]
    return tree


def _no_order(metrics: Any) -> float:
    return 0.0


def set_aside(run_folder: Path, step: int) -> Path:
    """Moves a checkpoint out of the way, into the run's `aside/`; returns where it is now."""
    folder = place(run_folder) / ASIDE
    folder.mkdir(exist_ok=True)
    target = folder / str(step)
    if target.exists():
        target = scratch(target)
    move_tree(place(run_folder) / FOLDER / str(step), target)
    return target


def latest_step(run_folder: Path) -> int | None:
    """Step of the newest complete checkpoint in a run's folder, or None; one process alone may ask."""
    return max(complete_steps(run_folder), default=None)


def complete_steps(run_folder: Path) -> list[int]:
    """Steps of all complete checkpoints in a run's folder, ascending; one process alone may ask."""
    folder = place(run_folder) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and _is_complete(p))


def _is_complete(folder: Path) -> bool:
    if is_remote(folder):
        return (folder / COMMITTED).exists()
    return ocp.utils.is_checkpoint_finalized(folder)


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
    path = place(path)
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
