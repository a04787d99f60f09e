"""`clipjax plan --search`: settings that change how a run is computed and nothing of its result, ranked.

Arithmetic judges every combination; what it leaves in the running is compiled, best first, each in a process
of its own, until enough of them fit or the time is over.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from clipjax.bench.program import leaving
from clipjax.config import Run
from clipjax.errors import ClipjaxError
from clipjax.mesh import AXES
from clipjax.objectives import AllGather, Hierarchical, Ring
from clipjax.objectives.base import Pairwise, leaves
from clipjax.objectives.pairs import Exchange
from clipjax.plan.estimate import estimate
from clipjax.plan.machines import Machine
from clipjax.plan.parts import (
    apart,
    embed_dim,
    flops_per_row,
    forward_flops,
    kept_per_row,
    loss_bytes,
    temporary,
    weights,
)
from clipjax.plan.program import compiled_for, traced_for
from clipjax.plan.step import Step, state_bytes
from clipjax.sharding import Sharding
from clipjax.towers import with_fields
from clipjax.train.step import IN_FLIGHT

REMAT = ("norms", "lean", "full")
GROUPS = (1, 4, 8, 16, 32)
MICRO = 64  # micro-batches in a step, at most
SLACK = 1.25  # what arithmetic finds too large by less than this is left to the compiler


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to compute a run's step.

    Attributes:
      batch_size: pairs in a step.
      accumulate: micro-batches.
      remat: of all towers.
      group: groups of the mesh.
      fsdp: whether the state is split.
      exchange: how embeddings travel.
    """

    batch_size: int
    accumulate: int
    remat: str
    group: int
    fsdp: bool
    exchange: Exchange

    def applied(self, run: Run) -> Run:
        """The run with these settings."""
        return dataclasses.replace(
            run,
            model=with_fields(run.model, remat=self.remat),
            data=dataclasses.replace(run.data, batch_size=self.batch_size),
            accumulate=self.accumulate,
            mesh=dataclasses.replace(run.mesh, group=self.group, data=-1),
            sharding=dataclasses.replace(run.sharding, fsdp=self.fsdp),
            exchange=self.exchange,
        )

    def row(self) -> dict[str, Any]:
        """The settings as plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"exchange": type(self.exchange).__name__}


def candidates(run: Run, on: Machine, batch_sizes: list[int]) -> Iterator[Candidate]:
    """All combinations that the machine and the batch divide into."""
    shards = on.devices // run.mesh.tensor
    groups = sorted(
        {g for g in (*GROUPS, run.mesh.group, on.devices // on.island) if shards % g == 0}
    )
    coupled = any(isinstance(leaf.objective, Pairwise) for leaf in leaves(run.objective))
    exchanges: list[Exchange] = [AllGather(), Ring(), Hierarchical()] if coupled else [run.exchange]
    if not any(type(run.exchange) is type(known) for known in exchanges):
        exchanges = [run.exchange]  # other mathematics (Grouped), or one that chooses by itself
    micro = [k for k in (2**i for i in range(10)) if k <= MICRO]
    micro = sorted({*micro, run.accumulate})
    for batch, k, group, fsdp, exchange, remat in itertools.product(
        batch_sizes, micro, groups, (True, False), exchanges, REMAT
    ):
        if batch % (shards * k):
            continue
        if isinstance(exchange, Hierarchical) and not 1 < group < shards:
            continue
        if group > 1 and not fsdp and not isinstance(exchange, Hierarchical):
            continue  # the same as one group
        if fsdp and group == shards:
            continue
        yield Candidate(batch, k, remat, group, fsdp, exchange)


def facts(run: Run, on: Machine, examples: int | None, variants: list[str]) -> dict[str, Any]:
    """What arithmetic needs of a run, traced once on whatever device there is.

    Returns:
      forward (products of one example's forward pass), stateful (whether the model has a state of its own),
      batch (bytes of an example), kept and flops (bytes and products of an example by `remat`); by "group fsdp" the
      state of one device by part (state), in all (checkpoint), and `parts.weights` (weights).
    """
    shards = on.devices // run.mesh.tensor
    small = dataclasses.replace(
        run,
        mesh=dataclasses.replace(run.mesh, group=1, data=-1, tensor=1),
        data=dataclasses.replace(run.data, batch_size=8),
        sharding=Sharding(),
        accumulate=1,
    )
    one = [jax.devices("cpu")[0]]
    step = Step.of(small, one, examples)
    found: dict[str, Any] = {
        "forward": forward_flops(small, step.blueprint) / 8,
        "batch": sum(x.size * x.dtype.itemsize for x in step.batch.values()) / 8,
        "stateful": bool(jax.tree.leaves(step.blueprint.abstract.model_state)),
        "kept": {},
        "flops": {},
        "layouts": {},
    }
    for remat in variants:
        varied = Step.of(
            dataclasses.replace(small, model=with_fields(run.model, remat=remat)), one, examples
        )
        found["kept"][remat] = kept_per_row(varied.run, varied.blueprint)
        found["flops"][remat] = flops_per_row(varied.run, varied.blueprint)
    groups = {c.group for c in candidates(run, on, [shards * MICRO])}
    for group, fsdp in itertools.product(sorted(groups), (True, False)):
        mesh = AbstractMesh(
            (group, shards // group, run.mesh.tensor), AXES, axis_types=(AxisType.Auto,) * 3
        )
        sharding = dataclasses.replace(run.sharding, fsdp=fsdp)
        layout = sharding.apply(step.blueprint.abstract, mesh)
        sizes = state_bytes(step.blueprint.abstract, layout)
        found["layouts"][f"{group} {fsdp}"] = {
            "state": {name: local for name, (local, _, _) in sizes.items()},
            "checkpoint": sum(total for _, _, total in sizes.values()),
            "weights": weights(run, step.blueprint, layout.params),
        }
    return found


def expected(run: Run, on: Machine, candidate: Candidate, known: dict[str, Any]) -> dict[str, Any]:
    """What `compiled_for` would return for a candidate, by arithmetic on `facts`."""
    run = candidate.applied(run)
    group, tensor = candidate.group, run.mesh.tensor
    data = on.devices // tensor // group
    shards, k = group * data, candidate.accumulate
    rows = candidate.batch_size / shards
    layout = known["layouts"][f"{group} {candidate.fsdp}"]
    moved, state = layout["weights"], layout["state"]
    _, sent = loss_bytes(run, group, data)
    once = apart(run, moved, shards, known["stateful"])
    parts = temporary(run, known["kept"][candidate.remat], moved, group, data, known["stateful"])
    pairwise = sum(isinstance(leaf.objective, Pairwise) for leaf in leaves(run.objective))
    products = known["flops"][candidate.remat] + (known["forward"] if k > 1 else 0)
    if once:
        gathered, times = moved["split"], 1
    else:  # in micro-batches, embeddings first
        there, back, times = (1, 1, 1) if k == 1 else (2 * k, k, k)
        gathered = there * moved["travel"] + back * (moved["travel"] - moved["tables"])
    between = 2 * (group - 1) / group * moved["split"] / data
    wire = {
        "all-gather": gathered * (data - 1) / data,
        "reduce-scatter": times * moved["split"] * (data - 1) / data,
        "all-reduce": times * (between + 2 * (shards - 1) / shards * moved["whole"]),
        "embeddings": sent,
    }
    islands = [i // on.island for i in range(on.devices)]
    inside = leaving(range(data * tensor), islands)
    across = leaving(range(0, on.devices, data * tensor), islands) if group > 1 else 0.0
    slow = {"all-gather": inside, "reduce-scatter": inside, "all-reduce": across,
            "embeddings": max(inside, across)}  # fmt: skip
    return {
        "devices": on.devices,
        "shards": shards,
        "state": state,
        "checkpoint": layout["checkpoint"],
        "batch": known["batch"] * rows,
        "waiting": IN_FLIGHT * known["batch"] * rows,
        "temporary": sum(parts.values()),
        "temporary_parts": parts,
        "arguments": sum(state.values()) + known["batch"] * rows,
        "sent": wire,
        "network": {name: share * wire[name] for name, share in slow.items()},
        "flops": products * candidate.batch_size
        + pairwise * 8 * candidate.batch_size**2 * embed_dim(run),
        "forward": known["forward"] * candidate.batch_size,
        "from": "arithmetic",
    }


def search(
    run: Run,
    on: Machine,
    files: list[Path],
    examples: int | None,
    batch_sizes: list[int],
    most: int,
    seconds: float,
    disk: float,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Ranks what fits.

    Args:
      run: what to train.
      on: where.
      files: the user's Python files.
      examples: in one epoch; None: unknown.
      batch_sizes: to try.
      most: steps to compile, at most.
      seconds: for all of it; a step that is compiling then is given up.
      disk: as for `estimate`.
      say: is told what happens.

    Returns:
      the compiled ones, best first, those that do not fit last: `settings`, `compiled` (as of `compiled_for`),
      `estimated` (as of `estimate`), `expected` (what arithmetic had said, of `estimate`); and how many there
      were: combinations, left (by arithmetic), compiled, failed.

    Raises:
      ClipjaxError: no combination divides, or arithmetic leaves none.
    """
    end = time.monotonic() + seconds
    all_of_them = list(candidates(run, on, batch_sizes))
    if not all_of_them:
        shards = on.devices // run.mesh.tensor
        raise ClipjaxError(
            f"--search: batches of {batch_sizes} do not divide over {shards} batch shards: give --batch_sizes"
        )
    known = traced_for(run, on, files, examples, list(REMAT))
    left = []
    for candidate in all_of_them:
        found = expected(run, on, candidate, known)
        judged = estimate(candidate.applied(run), on, found, examples, disk)
        if judged["memory"] is None or judged["held"] <= SLACK * judged["memory"]:
            left.append((_order(judged, found), candidate, judged))
    if not left:
        raise ClipjaxError(
            f"--search: of {len(all_of_them)} combinations none fits {on.name}: it takes more or larger chips, "
            "--mesh.tensor, or a smaller --batch_sizes"
        )
    left.sort(key=lambda entry: entry[0])
    counts = {"combinations": len(all_of_them), "left": len(left), "compiled": 0, "failed": 0}
    ranked: list[dict[str, Any]] = []
    for _, candidate, judged in left:
        rest = end - time.monotonic()
        if counts["compiled"] >= most or rest <= 0:
            break
        say(f"compiling {candidate.row()}")
        try:
            found = compiled_for(candidate.applied(run), on, files, examples, rest)
        except ClipjaxError as error:
            counts["failed"] += 1
            say(str(error))
            continue
        counts["compiled"] += 1
        ranked.append(
            {
                "settings": candidate.row(),
                "compiled": found,
                "estimated": estimate(candidate.applied(run), on, found, examples, disk),
                "expected": judged,
            }
        )
    ranked.sort(
        key=lambda entry: (
            not entry["estimated"].get("fits", True),
            _order(entry["estimated"], entry["compiled"]),
        )
    )
    return ranked, counts


def _order(judged: dict[str, Any], found: dict[str, Any]) -> tuple[float, ...]:
    """Pairs a second at best, then if nothing overlaps, then memory; of CPUs, products and bytes sent."""
    pairs = found["forward"]
    if "step" in judged:
        return (judged["step"] / pairs, judged["serial"] / pairs, judged["held"])
    return (found["flops"] / pairs, sum(found["sent"].values()) / pairs, judged["held"])
