"""The smallest model there is, and its training step: what a step costs here is the objective."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clipjax.data.placement import process_rows, to_global
from clipjax.mesh import MeshShape
from clipjax.models import DualEncoder
from clipjax.objectives import AllGather, PairEngine
from clipjax.optim import SGD, Constant, Scale
from clipjax.params import paths
from clipjax.sharding import Sharding
from clipjax.towers import Tower
from clipjax.train.state import Blueprint
from clipjax.train.step import make_step

ROWS, TOKENS, WIDTH = 16, 32, 12
# A plain step so large that the old parameters drown in it: the gradient can be read off.
RATE = 1e4
OPTIMIZER = SGD(lr=RATE, momentum=0.0, weight_decay=0.0, clip_norm=None, schedule=Constant())


class Projection(nnx.Module):
    """Mean of the rows of a table that the tokens name, or of pixels times a matrix."""

    def __init__(self, rngs, rows, width=WIDTH):
        self.width = width
        self.table = nnx.Param(jax.random.normal(rngs.params(), (rows, width)))

    def __call__(self, inputs, *, key=None):
        if jnp.issubdtype(inputs.dtype, jnp.integer) and inputs.ndim == 2:
            inputs = jax.nn.one_hot(inputs, len(self.table[...])).sum(1)
        flat = inputs.reshape(len(inputs), -1).astype(jnp.float32)
        pooled = jnp.matmul(flat, self.table[...], precision="highest")
        return pooled[:, None], pooled


@dataclasses.dataclass(frozen=True)
class Linear(Tower):
    rows: int = 3 * 4 * 4

    def build(self, rngs):
        return Projection(rngs, self.rows)


MODEL = DualEncoder(
    image=Linear(),
    text=Linear(TOKENS),
    embed_dim=WIDTH,
    logit_scale_init=5.0,
    logit_bias_init=-2.0,
    image_projection="none",
    text_projection="none",
)


def make_batch(rows=ROWS):
    """Rows 0 and 1, and 4, 5 and 6, share an id; teachers of the model's width."""
    rng = np.random.default_rng(0)
    ids = np.arange(rows, dtype=np.int32)
    ids[1], ids[5:7] = ids[0], ids[4]
    teacher = rng.normal(size=(2, rows, WIDTH)).astype(np.float32)
    teacher /= np.linalg.norm(teacher, axis=-1, keepdims=True)
    return {
        "image": rng.integers(0, 256, (rows, 4, 4, 3)).astype(np.uint8),
        "text": rng.integers(0, TOKENS, (rows, 8)).astype(np.int32),
        "id": ids,
        "sample": np.arange(rows, dtype=np.int32) * 3 % 64,
        "teacher_image": teacher[0],
        "teacher_text": teacher[1],
    }


def one_step(
    objectives,
    jit=jax.jit,
    devices=1,
    accumulate=1,
    shape=None,
    exchange=None,
    batch=None,
    model=MODEL,
):
    """{name: (loss, {path: gradient})} of one training step each, in one compiled program.

    `devices` first ones of all processes; `batch` is the global batch, cut here.
    """
    batch = make_batch() if batch is None else batch
    inputs = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in batch.items()}
    mesh = (shape or MeshShape()).build(jax.devices()[:devices])
    engine = PairEngine(mesh, exchange or AllGather())
    states, steps, layouts = {}, {}, {}
    for name, objective in objectives.items():
        blueprint = Blueprint.draw(
            model, objective, OPTIMIZER, None, mesh, Sharding(), 10, Scale(ROWS, 64), 0, inputs
        )
        if not states:
            base = blueprint.init()
        layouts[name] = blueprint.shardings
        kept = blueprint.abstract.objective_state, blueprint.abstract.averages
        extra = blueprint.init() if jax.tree.leaves(kept) else base
        states[name] = dataclasses.replace(
            base, objective_state=extra.objective_state, averages=extra.averages
        )
        steps[name] = make_step(blueprint, objective, engine, mesh, accumulate)

    def run(states, batch):
        return {name: steps[name](states[name], batch) for name in steps}

    part, parts = process_rows(mesh)
    local = {k: np.split(v, parts)[part] for k, v in batch.items()}
    after = jit(
        run, in_shardings=(layouts, None), out_shardings={n: (s, None) for n, s in layouts.items()}
    )(states, to_global(local, mesh))
    start = {path: np.array(leaf) for path, leaf in paths(base.params)}
    return {
        name: (
            float(metrics["loss"]),
            {path: (start[path] - np.array(leaf)) / RATE for path, leaf in paths(state.params)},
        )
        for name, (state, metrics) in after.items()
    }


def assert_close(got, expected, tolerance=1e-5):
    """The same losses and gradients: largest difference over the largest reference value."""
    for name, (loss, grads) in expected.items():
        assert abs(got[name][0] - loss) < tolerance * abs(loss), name
        for path, reference in grads.items():
            scale = max(np.abs(reference).max(), 1e-30)
            worst = np.abs(got[name][1][path] - reference).max() / scale
            assert worst < tolerance, (name, path, worst)
