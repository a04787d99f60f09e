"""Opening a run (its configuration, model and evaluators, from a checkpoint alone), or any model."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax.sharding import Mesh

from clipjax.component import from_json, to_json
from clipjax.data import load_tokenizer
from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape
from clipjax.params import abstract, join, select
from clipjax.predictor import Predictor
from clipjax.pretrained import Pretrained, is_pretrained, read_pretrained
from clipjax.stores import fetched, is_hub, is_remote, place

if TYPE_CHECKING:
    from clipjax.config import Run
    from clipjax.evals.base import Evaluator, Runner
    from clipjax.meta import Meta

# What only runs need (Orbax, evaluators, reports) is imported where a run is opened, and what reads
# other people's weights where there are any: a model's folder opens in half the time without.


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run with its model as it was at one step."""

    folder: Path
    step: int
    run: Run
    predictor: Predictor
    runners: list[tuple[Evaluator, Runner]]

    def evaluate(self) -> dict[str, float]:
        """The figures of all of the run's evaluators, under the names that training gives them."""
        results: dict[str, float] = {}
        for _, runner in self.runners:
            results |= runner(self.predictor)
        return results

    def report(self, results: dict[str, float] | None = None) -> Path:
        """Writes `report.html` into the run's folder: all processes embed, the first one writes.

        Args:
          results: the model's figures; None evaluates.
        """
        from clipjax.evals.captioning import CaptioningRunner
        from clipjax.evals.retrieval import RetrievalRunner
        from clipjax.evals.zeroshot import ZeroShotRunner
        from clipjax.report import REPORT_FILE, environment, write_report

        results = self.evaluate() if results is None else results
        retrieval = [r for _, r in self.runners if isinstance(r, RetrievalRunner)]
        chance = {name: value for runner in retrieval for name, value in runner.chance().items()}
        first = retrieval[0] if retrieval else None
        confusions = [r.confusion() for _, r in self.runners if isinstance(r, ZeroShotRunner)]
        examples = first.examples(self.predictor) if first else ()
        captioning = [r for _, r in self.runners if isinstance(r, CaptioningRunner)]
        captions = captioning[0].examples(self.predictor) if captioning else ()
        similarities = first.similarities(self.predictor) if first else None
        if jax.process_index() != 0:
            return self.folder / REPORT_FILE
        return write_report(
            self.folder,
            results=results,
            config=to_json(self.run),
            environment=environment(),
            chance=chance,
            examples=examples,
            captions=captions,
            similarities=similarities,
            confusions=[confusion for confusion in confusions if confusion is not None],
            facts={"checkpoint": f"step {self.step:,}"},
        )


def open_run(path: str | Path, mesh: Mesh | None = None, batch_size: int | None = None) -> Opened:
    """Opens a run's latest checkpoint, or the one that `path` names.

    Components of the user's own must have been imported first.

    Args:
      path: a run's folder, or one of its `checkpoints/<step>`.
      mesh: where the model goes; default: all devices along the data axis.
      batch_size: pictures or texts per call of the model; default: 64 a device.

    Raises:
      ClipjaxError: there is no checkpoint, or it names components that are unknown here.
    """
    from clipjax.evals.base import build_runners

    mesh = mesh or MeshShape().build()
    folder, step, run, pretrained = _restore(place(path), mesh)
    predictor = pretrained.predictor(mesh, run.sharding, batch_size=batch_size)
    return Opened(folder, step, run, predictor, build_runners(run.evals))


def open_pretrained(path: str | Path, mesh: Mesh | None = None) -> Pretrained:
    """The model, weights, tokenizer and preprocessing that `path` holds, whatever wrote them.

    Args:
      path: a run's folder, one of its `checkpoints/<step>`, a folder that `Pretrained.save` wrote, or
        other people's weights, as `clipjax.interop.import_weights` takes them; or hf://owner/name[@revision]
        for any of the last two on the Hugging Face Hub.
      mesh: what a run's checkpoint is restored onto; default: all devices along the data axis.

    Raises:
      ClipjaxError: there is no model, or it names components that are unknown here.
    """
    if is_hub(path):
        from clipjax.hub import snapshot

        path = snapshot(os.fspath(path))
    path = place(path)
    is_run = path.parent.name == "checkpoints" or (path / "checkpoints").is_dir()
    if is_remote(path) and not is_run:
        with fetched(path) as copy:
            return open_pretrained(copy, mesh)
    if is_pretrained(path):
        return read_pretrained(path)
    from clipjax.interop.source import is_source

    if is_source(path):
        from clipjax.interop import import_weights

        return import_weights(path)
    return _restore(path, mesh or MeshShape().build())[3]


def load(path: str | Path, mesh: Mesh | None = None, batch_size: int | None = None) -> Predictor:
    """A model with its tokenizer and preprocessing, ready to use, on the devices that are there.

        model = clipjax.load("runs/quickstart")
        model.classify("cat.jpg", ["cat", "dog"], "a photo of a {}").top(1)  # [("cat", 0.98)]
        model.similarity(["a.jpg", "b.jpg"], ["a cat", "a dog"])  # [2, 2]
        model.encode_image("cat.jpg"), model.encode_text("a cat")  # [E] each

    Args:
      path: a run's folder, one of its `checkpoints/<step>`, or whatever else `open_pretrained` opens.
      mesh: devices to use; default: all of them, along the data axis.
      batch_size: pictures or texts per call of the model; default: 64 a device.

    Raises:
      ClipjaxError: as `open_pretrained`, or `batch_size` is below 1.
    """
    return open_pretrained(path, mesh).predictor(mesh, batch_size=batch_size)


def _restore(path: Path, mesh: Mesh) -> tuple[Path, int, Run, Pretrained]:
    """(run's folder, step, run, its model with the weights that evaluators see)."""
    from clipjax.checkpoint import Checkpoints, locate
    from clipjax.meta import unpack_tokenizer

    folder, step = locate(path)
    checkpoints = Checkpoints(folder)
    try:
        meta = checkpoints.meta(step)
        run = _read_run(meta, folder)
        _, params, model_state = abstract(lambda: run.model.build(nnx.Rngs(0)))
        target: dict[str, Any] = {"params": params}
        if model_state:
            target["model_state"] = model_state
        averaged = run.ema is not None and run.ema.evaluate
        mask = run.optimizer.trainable(params)
        if averaged:
            target["ema"] = select(mask, params)[0]
            if any(n.startswith("ema_state/") for n in checkpoints.saved_shapes(step)):
                target["ema_state"] = model_state
        layout = run.sharding.apply(target, mesh)
        state = checkpoints.restore(
            step,
            jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), target, layout
            ),
        )
    finally:
        checkpoints.close()
    params = join(state["ema"], select(mask, state["params"])[1]) if averaged else state["params"]
    with tempfile.TemporaryDirectory() as scratch:
        unpack_tokenizer(meta.tokenizer, Path(scratch))
        tokenizer = load_tokenizer(scratch)
    pretrained = Pretrained(
        model=run.model,
        params=params,
        model_state=state.get("ema_state", state.get("model_state", {})),
        tokenizer=tokenizer,
        context_length=run.data.context_length,
        image_size=run.data.image_size,
        resize=run.data.resize,
        sharding=run.sharding,
    )
    return folder, step, run, pretrained


def _read_run(meta: Meta, folder: Path) -> Run:
    from clipjax.config import Run

    run = from_json(meta.run)
    if not isinstance(run, Run):
        raise ClipjaxError(f"{folder}: its checkpoint describes a {type(run).__name__}, not a run")
    return run
