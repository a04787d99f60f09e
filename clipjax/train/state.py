"""The train state: everything a step reads and writes, and everything a checkpoint holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from clipjax.batch import parse
from clipjax.errors import ClipjaxError
from clipjax.layout import on_mesh
from clipjax.objectives.base import Objective, Setting, leaves
from clipjax.objectives.teachers import Frozen, MovingAverage, Teacher
from clipjax.optim import Ema, Optimizer, Scale, SpikeGuard
from clipjax.params import abstract, join, merge, paths, select, split
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
      objective_state: what the objective's terms keep, by term; those that keep nothing are not in it.
      averages: the trainable parameters' moving averages that the objective asks for, by their decay.
      key: uint32 key data of the run's RNG; a step's key is folded from it and the step.
      bad_steps: [] int32, steps skipped because loss or gradient was not finite.
      bad_streak: [] int32, how many of these in a row up to now.
      ema_state: average of `model_state`, where there is one of the parameters; else `{}`.
      guard: what the spike guard remembers, or `{}`.
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
    averages: Any = struct.field(default_factory=dict)
    ema_state: Any = struct.field(default_factory=dict)
    guard: Any = struct.field(default_factory=dict)


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
      averages: the moving averages that the objective asks for, by their decay.
      frozen: the other models that it asks for, opened, by number.
    """

    graphdef: Any
    trainable: Any
    transform: optax.GradientTransformation
    learning_rate: optax.Schedule
    abstract: TrainState
    shardings: TrainState
    jit_init: Any
    averages: dict[str, MovingAverage]
    frozen: dict[str, OpenedTeacher]

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
        inputs: Mapping[str, Any] | None = None,
        spikes: SpikeGuard | None = None,
    ) -> Blueprint:
        """Traces the initialization once; nothing is allocated.

        Args:
          inputs: shape and dtype of one row of each field of the batch, for objectives whose state has the width of
            the model's output.
          spikes: the run's spike guard, whose memory is part of the state.
        """
        static: dict[str, Any] = {}
        teachers = objective.teachers
        # By decay, so that a run goes on with the right ones after its terms changed places.
        averages = {
            f"decay_{t.decay!r}".replace(".", "_"): t
            for t in teachers
            if isinstance(t, MovingAverage)
        }
        frozen = {
            str(i): OpenedTeacher.of(t.open(open_pretrained), t, mesh, sharding)
            for i, t in enumerate(teachers)
            if isinstance(t, Frozen)
        }

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
                objective_state=_objective_state(
                    objective,
                    Setting(
                        scale.num_examples or 0,
                        scale.batch_size,
                        lambda name: _width(merge(graphdef, params, model_state), inputs, name),
                    ),
                ),
                key=jax.random.key_data(run_key),
                bad_steps=zero,
                bad_streak=zero,
                averages={name: jax.tree.map(jnp.copy, moving) for name in averages},
                ema_state=jax.tree.map(jnp.copy, model_state) if ema else {},
                guard=spikes.init() if spikes else {},
            )

        abstract = jax.eval_shape(init, {}, {})
        shardings = sharding.apply(abstract, mesh)
        return cls(
            **static,
            abstract=abstract,
            shardings=shardings,
            jit_init=jax.jit(init, out_shardings=shardings),
            averages=averages,
            frozen=frozen,
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

    def name_of(self, teacher: Teacher) -> str:
        """The name under which a teacher's weights are kept."""
        known: dict[str, Any] = self.averages | {
            n: opened.teacher for n, opened in self.frozen.items()
        }
        for name, one in known.items():
            if one == teacher:
                return name
        if not isinstance(teacher, Teacher):
            raise ClipjaxError(
                f"{teacher!r} is no teacher: write Itself(), MovingAverage(decay) or Frozen(path)"
            )
        raise ClipjaxError(
            f"an objective encodes with {teacher}, which is not among its `teachers`: name it there"
        )

    def frozen_encoder(
        self, teacher: Teacher, weights: Any, mesh: Mesh
    ) -> tuple[Callable[..., Any], Any, Any]:
        """(forward, params, model state) of a frozen teacher, given the third argument of the step."""
        name = self.name_of(teacher)

        def forward(params, model_state, batch, key, needs):
            with on_mesh(mesh):
                return self.frozen[name].module(params, model_state)(
                    batch, key=key, needs=needs
                ), {}

        return (forward, *weights[name])

    @property
    def frozen_weights(self) -> Any:
        """The third argument of the step: (params, model state) of each frozen teacher, on the mesh."""
        return {name: opened.weights for name, opened in self.frozen.items()}

    def averaged(self, state: TrainState) -> Any:
        """The state's parameters with the trainable ones replaced by their average."""
        _, frozen = select(self.trainable, state.params)
        return join(state.ema, frozen)


@dataclasses.dataclass(frozen=True)
class OpenedTeacher:
    """A frozen teacher with its weights, laid out on the mesh as the run's parameters are.

    Attributes:
      teacher: the component.
      graphdef: the static half of its model.
      weights: (params, model state).
    """

    teacher: Frozen
    graphdef: Any
    weights: tuple[Any, Any]

    @classmethod
    def of(cls, pretrained: Any, teacher: Frozen, mesh: Mesh, sharding: Sharding) -> OpenedTeacher:
        """Places the weights that were opened."""
        graphdef, _, _ = abstract(lambda: pretrained.model.build(nnx.Rngs(0)))
        weights = pretrained.params, pretrained.model_state
        layout = sharding.apply({"params": weights[0], "model_state": weights[1]}, mesh)
        placed = jax.tree.map(jax.device_put, weights, (layout["params"], layout["model_state"]))
        return cls(teacher, graphdef, placed)

    def module(self, params: Any, model_state: Any) -> nnx.Module:
        """The model with these weights."""
        return merge(self.graphdef, params, model_state)


def _objective_state(objective: Objective, setting: Setting) -> Any:
    states = {leaf.name: leaf.objective.init_state(setting) for leaf in leaves(objective)}
    return {name: state for name, state in states.items() if jax.tree.leaves(state)}


def _width(module: Any, inputs: Any, name: str) -> int:
    """Dimensions of a row of the model's output."""
    if inputs is None:
        raise ClipjaxError(
            f"the width of {name!r} is asked for, and the batch's fields are unknown"
        )
    source = parse(name, inputs)[0]
    batch = {source: jax.ShapeDtypeStruct((1, *inputs[source].shape), inputs[source].dtype)}
    encoded = jax.eval_shape(lambda batch: module(batch, needs=frozenset({name})), batch)
    return encoded.rows[name].shape[-1]
