"""Multinomial logistic regression on frozen features, on the devices, by L-BFGS."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from clipjax.mesh import batch_sharding, batch_shards

MAX_STEPS = 1000


class Ending(NamedTuple):
    """When a fit ends, at the latest after `MAX_STEPS`.

    Attributes:
      tolerance: the largest entry of the gradient of the mean loss.
      patience: steps without a lower loss; in float32 the gradient falls on for a while.
    """

    tolerance: float
    patience: int


CLOSE = Ending(1e-6, 30)
ROUGH = Ending(1e-5, 5)  # a few of a thousand predictions may differ from the minimum's


@dataclasses.dataclass(frozen=True)
class Examples:
    """Labeled features on the devices.

    Attributes:
      x: [N, E] float32, rows beyond the data are zero.
      y: [N] int32.
      size: how many of the rows are data.
      mesh: what the rows are split over; None: the default device.
    """

    x: jax.Array
    y: jax.Array
    size: int
    mesh: Mesh | None

    @classmethod
    def place(
        cls, x: np.ndarray, y: np.ndarray, mesh: Mesh | None = None, rows: int | None = None
    ) -> Examples:
        """Splits features [n, E] and labels [n] over the devices.

        Args:
          x: features.
          y: labels.
          mesh: what to split over.
          rows: how many rows to pad to, for fits of different sizes to compile once.
        """
        shards = 1 if mesh is None else batch_shards(mesh)
        padded = -(-max(rows or 0, len(x)) // shards) * shards
        x = np.pad(np.asarray(x, np.float32), ((0, padded - len(x)), (0, 0)))
        return cls(spread(x, mesh), spread(np.pad(y, (0, padded - len(y))), mesh), len(y), mesh)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """`x @ weight + bias`: weight [E, C], bias [C], float64."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[n, C] logits of features [n, E]."""
        return np.asarray(x, np.float64) @ self.weight + self.bias


def fit(
    examples: Examples,
    classes: int,
    c: float,
    used: np.ndarray | None = None,
    start: Classifier | None = None,
    ending: Ending = CLOSE,
) -> Classifier:
    """The minimum of sum_i loss_i + ||W||^2 / (2 c), as scikit-learn's LogisticRegression has it.

    The bias is not penalized, so features may be centered, and all of them scaled by one number,
    with the same minimum: the tolerance then means the same for any features.

    Args:
      examples: the data.
      classes: how many, C.
      c: inverse strength of the penalty.
      used: bool [n], which of the data count; None: all. Other subsets compile nothing anew.
      start: where to begin.
      ending: when to stop.
    """
    weight = np.zeros(len(examples.y), np.float32)
    weight[: examples.size] = 1.0 if used is None else used
    placed = spread(weight, examples.mesh)
    # A number for the penalty of the mean loss, so that the tolerance means the same at any size.
    penalty = 1.0 / (c * float(weight.sum()))
    width = examples.x.shape[1]
    begin = start or Classifier(np.zeros((width, classes)), np.zeros(classes))
    w, b, center = _fit(
        examples.x, examples.y, placed, jnp.float32(penalty), ending,
        jnp.asarray(begin.weight, jnp.float32), jnp.asarray(begin.bias, jnp.float32),
    )  # fmt: skip
    kernel = np.asarray(w, np.float64)
    return Classifier(kernel, np.asarray(b, np.float64) - np.asarray(center, np.float64) @ kernel)


def spread(rows: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """Rows on the devices, split over a mesh's batch axes where there is one."""
    if mesh is None:
        return jnp.asarray(rows)
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), rows.__getitem__)


@jax.jit
def _fit(x, y, used, penalty, ending, w, b):
    """(w, b, center): logits are (x - center) @ w + b."""
    total = used.sum()
    center = (used[:, None] * x).sum(0) / total
    scale = jnp.sqrt((used[:, None] * (x - center) ** 2).sum() / (total * x.shape[1]))
    scale = jnp.maximum(scale, 1e-6)
    # What is fitted is the bias for centered features.
    params = (w * scale, b + center @ w)

    def loss(params):
        w, b = params
        dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        logits = dot((x - center) / scale, w) + b
        each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return (used * each).sum() / total + 0.5 * penalty / scale**2 * (w**2).sum()

    solver = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state, _, since = carry
        before = optax.tree.get(state, "value")
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        after = optax.tree.get(state, "value")
        since = jnp.where(after < before - 1e-7 * jnp.abs(before), 0, since + 1)
        largest = jax.tree.reduce(
            jnp.maximum, jax.tree.map(lambda g: jnp.abs(g).max(), optax.tree.get(state, "grad"))
        )
        return optax.apply_updates(params, updates), state, largest, since

    def going(carry):
        _, state, largest, since = carry
        count = optax.tree.get(state, "count")
        return (count < MAX_STEPS) & (largest > ending.tolerance) & (since < ending.patience)

    begin = (params, solver.init(params), jnp.float32(jnp.inf), jnp.int32(0))
    (w, b), _, _, _ = jax.lax.while_loop(going, step, begin)
    return w / scale, b, center
