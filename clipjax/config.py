"""Run: the whole experiment as one tree of frozen dataclasses.

A config file is Python with `def config() -> Run`. The command line overrides fields by dotted path. The tree is
saved as JSON with every checkpoint, so a checkpoint opens without the file it came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from jax.sharding import Mesh

from clipjax.checkpoint import Checkpointing
from clipjax.component import Component, did_you_mean_field
from clipjax.data import Data
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.evals.base import Evaluator
from clipjax.mesh import MeshShape
from clipjax.models.base import Model
from clipjax.objectives.base import Objective
from clipjax.objectives.pairs import AllGather, Exchange, PairEngine
from clipjax.optim import Duration, Ema, Every, Optimizer, SpikeGuard
from clipjax.optim.duration import as_every
from clipjax.sharding import Sharding
from clipjax.start import Start
from clipjax.stores import place
from clipjax.tracking import TensorBoard, Tracker


@dataclasses.dataclass(frozen=True)
class Run(Component):
    """One experiment."""

    model: Model
    objective: Objective
    data: Data
    optimizer: Optimizer
    duration: Duration
    """Length of training."""
    start: Start | None = None
    """Weights to begin with; None: random."""
    evals: tuple[Evaluator, ...] = ()
    mesh: MeshShape = MeshShape()
    sharding: Sharding = Sharding()
    exchange: Exchange = AllGather()
    """How embeddings reach the other devices for the objective."""
    pair_chunk: int | None = None
    """Rows and columns of a tile of similarities, at most; None chooses by `pair_tile_mb`."""
    pair_tile_mb: float | None = None
    """Size of the largest array that a tile of similarities makes, in MB; None chooses by the kind of device."""
    pair_dtype: str = "float32"
    """Operands of the similarities, float32 or bfloat16; they accumulate in float32."""
    pair_grads: str = "float32"
    """The gradient of embeddings as it travels, float32 or bfloat16; it is added up in float32."""
    pair_precision: str = "highest"
    """Of float32 similarities: highest, or high (TF32 on NVIDIA's chips, three bfloat16 products on TPUs)."""
    pair_kernel: str = "auto"
    """fused: a tile of similarities is one kernel where it can be; generic: never; auto: fused on chips in
    bfloat16, where that is faster."""
    accumulate: int = 1
    """Micro-batches per step; the result equals the big batch."""
    ema: Ema | None = None
    checkpoint: Checkpointing = Checkpointing()
    trackers: tuple[Tracker, ...] = (TensorBoard(),)
    """Where figures go besides `metrics.jsonl`."""
    log_every: Every | Duration | int = Every(10)
    """How often a line of metrics is written."""
    seed: int = 0
    """Initialization, data order, augmentation and dropout all follow from it."""
    spikes: SpikeGuard | None = None
    """Skips steps whose loss or gradient is out of proportion; None: only those that are not finite."""
    max_bad_steps: int = 10
    """Skipped steps in a row that end the run."""
    stall_minutes: float | None = 30.0
    """Minutes after which a step that has not ended ends the process, with the stacks of all threads and code 76.
    Starting, the first step (which compiles), evaluations and saves get four times as long. None: never."""

    def engine(self, mesh: Mesh | None) -> PairEngine:
        """How pairs are reduced on this mesh."""
        return PairEngine(
            mesh,
            self.exchange,
            self.pair_chunk,
            self.pair_dtype,
            self.pair_tile_mb,
            self.pair_grads,
        )

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_every", as_every(self.log_every, "log_every"))
        if self.max_bad_steps < 1:
            raise ClipjaxError(f"max_bad_steps={self.max_bad_steps}: must be at least 1")
        if self.stall_minutes is not None and not self.stall_minutes > 0:
            raise ClipjaxError(f"stall_minutes={self.stall_minutes:g}: must be above 0, or None")


def load_module(path: Path) -> ModuleType:
    """Imports a user's Python file under its stem, so that its components can be named in JSON.

    Raises:
      ClipjaxError: the file is missing or does not import.
    """
    path = Path(path)
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside)
        raise ClipjaxError(f"{path}: no such file{did_you_mean(path.name, near)}")
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None:
        if Path(getattr(loaded, "__file__", None) or "").absolute() == path.absolute():
            return loaded
        raise ClipjaxError(f"{path}: a module called {name!r} is already imported; rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ClipjaxError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _explain(path, error) from error
    return module


def load_config(path: Path) -> Run:
    """The run that a config file describes.

    Args:
      path: a Python file with `def config() -> Run`, or a `run.json`.

    Raises:
      ClipjaxError: the file is missing, does not run, or returns something else.
    """
    path = place(path)
    if path.suffix == ".json":
        return load_run(path)
    module = load_module(path)
    if not callable(getattr(module, "config", None)):
        raise ClipjaxError(f"{path}: a config file defines `def config() -> Run`")
    try:
        run = module.config()
    except Exception as error:
        raise _explain(path, error) from error
    if not isinstance(run, Run):
        raise ClipjaxError(f"{path}: config() returned {type(run).__name__}, not a clipjax.Run")
    return run


def _explain(path: Path, error: Exception) -> ClipjaxError:
    """One message for an exception that a config file raised; unknown fields get the nearest names."""
    if isinstance(error, ClipjaxError):
        return ClipjaxError(f"{path}: {error}")
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if match:
        cls, field = match.groups()
        return ClipjaxError(f"{path}: {cls} has no field {field!r}{did_you_mean_field(cls, field)}")
    return ClipjaxError(f"{path}: {type(error).__name__}: {error}")


def load_run(path: Path) -> Run:
    """The run saved as JSON at `path`."""
    import json

    from clipjax.component import from_json

    try:
        run = from_json(json.loads(place(path).read_text()))
    except OSError as error:
        raise ClipjaxError(f"{path}: {error.strerror or 'no such file'}") from error
    except json.JSONDecodeError as error:
        raise ClipjaxError(f"{path}: not JSON ({error})") from error
    if not isinstance(run, Run):
        raise ClipjaxError(f"{path}: holds a {type(run).__name__}, not a run")
    return run


def override(run: Run, options: Sequence[str], prog: str) -> Run:
    """`run` with command-line options (`--data.batch_size 512`) applied.

    Misspelt options are refused with the nearest names (SystemExit 2, the message on stderr).
    """
    import tyro

    return tyro.cli(
        Run,
        default=run,
        args=list(options),
        prog=prog,
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands,),
    )
