"""The train state: everything a step reads and writes, and everything a checkpoint holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from clipjax.objectives.base import Objective
from clipjax.optim import Ema, Optimizer, Scale
from clipjax.params import join, merge, paths, select, split
from clipjax.restore import open_pretrained
from clipjax.sharding import Sharding
from clipjax.start import Start, overlay

Leaves = dict[str, Any]
"""Path -> array."""


@struct.dataclass
class TrainState:
    """One pytree. Paths of its leaves (`params/image/...`, `opt_state/...`) are what sharding rules see.

    Attributes:
      step: [] int32, finished steps, skipped ones included.
      params: the model's parameters, nested dict.
      model_state: what the model keeps besides parameters (batch statistics), nested dict.
      opt_state: optax state for the trainable parameters.
      ema: average of the trainable parameters, or `{}`.
      objective_state: what the objective declared.
      key: uint32 key data of the run's RNG; a step's key is folded from it and the step.
      bad_steps: [] int32, steps skipped because loss or gradient was not finite.
      bad_streak: [] int32, how many of these in a row up to now.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any
    objective_state: Any
    key: jax.Array
    bad_steps: jax.Array
    bad_streak: jax.Array


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What is known about a run's state before any array exists.

    Attributes:
      graphdef: the static half of the model.
      trainable: tree of bools like `params`.
      transform: the optimizer.
      learning_rate: step -> learning rate.
      abstract: TrainState of ShapeDtypeStructs.
      shardings: TrainState of NamedShardings.
      jit_init: (parameters, model state to begin with, by path) -> TrainState.
    """

    graphdef: Any
    trainable: Any
    transform: optax.GradientTransformation
    learning_rate: optax.Schedule
    abstract: TrainState
    shardings: TrainState
    jit_init: Any

    @classmethod
    def draw(
        cls,
        model,
        objective: Objective,
        optimizer: Optimizer,
        ema: Ema | None,
        mesh: Mesh,
        sharding: Sharding,
        total_steps: int,
        scale: Scale,
        seed: int,
    ) -> Blueprint:
        """Traces the initialization once; nothing is allocated."""
        static: dict[str, Any] = {}

        def init(params_leaves, model_state_leaves) -> TrainState:
            key = jax.random.key(seed)
            params_key, run_key = jax.random.split(key)
            graphdef, params, model_state = split(model.build(nnx.Rngs(params_key)))
            params = overlay(params, params_leaves)
            model_state = overlay(model_state, model_state_leaves)
            trainable = optimizer.trainable(params)
            moving, _ = select(trainable, params)
            transform, learning_rate = optimizer.build(moving, total_steps, scale)
            static.update(
                graphdef=graphdef,
                trainable=trainable,
                transform=transform,
                learning_rate=learning_rate,
            )
            zero = jnp.zeros((), jnp.int32)
            return TrainState(
                step=zero,
                params=params,
                model_state=model_state,
                opt_state=transform.init(moving),
                ema=jax.tree.map(jnp.copy, moving) if ema else {},
                objective_state=objective.init_state(params),
                key=jax.random.key_data(run_key),
                bad_steps=zero,
                bad_streak=zero,
            )

        abstract = jax.eval_shape(init, {}, {})
        shardings = sharding.apply(abstract, mesh)
        return cls(
            **static,
            abstract=abstract,
            shardings=shardings,
            jit_init=jax.jit(init, out_shardings=shardings),
        )

    def init(self, leaves: tuple[Leaves, Leaves] = ({}, {})) -> TrainState:
        """The state of a fresh run on the devices, random but for `leaves` (see `start_leaves`).

        The optimizer's, the average's and the objective's own copies begin with these weights too.
        """
        return self.jit_init(*leaves)

    def start_leaves(self, start: Start) -> tuple[Leaves, Leaves]:
        """What `start` has of the parameters and of the model state, by path, placed as the state is.

        Raises:
          ClipjaxError: the start does not fit the model.
        """
        leaves = start.leaves(self.abstract.params, self.abstract.model_state, open_pretrained)
        layouts = self.shardings.params, self.shardings.model_state
        return tuple(  # type: ignore[return-value]
            {
                name: jax.device_put(found[name], sharding)
                for name, sharding in paths(layout)
                if name in found
            }
            for found, layout in zip(leaves, layouts, strict=True)
        )

    def target(self) -> TrainState:
        """`abstract` with `shardings` attached: what a checkpoint is restored into."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.abstract,
            self.shardings,
        )

    def module(self, params: Any, model_state: Any) -> nnx.Module:
        """The model with these parameters."""
        return merge(self.graphdef, params, model_state)

    def averaged(self, state: TrainState) -> Any:
        """The state's parameters with the trainable ones replaced by their average."""
        _, frozen = select(self.trainable, state.params)
        return join(state.ema, frozen)
