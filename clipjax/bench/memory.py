"""`clipjax bench memory`: what one device holds and sends in a training step of a published size.

The plain case of `clipjax plan`: the step is compiled from shapes alone, for simulated CPU devices or for a machine
that is not here. Nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from clipjax.component import Component
from clipjax.config import Run
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class MemoryBench(Component):
    """Memory and traffic per device of one compiled training step (softmax, AdamW, float32 state)."""

    image: str = "B/16"
    """Image tower: a ViT preset such as L/14, or a ResNet preset such as RN50."""
    text: str = "B"
    """Text tower: a TextTransformer preset."""
    devices: int = 8
    """Simulated devices."""
    on: str = ""
    """Another machine, as for `clipjax plan`: v5e-16, h100x8; empty: simulated devices."""
    group: int = 1
    """Groups of the mesh."""
    tensor: int = 1
    """Devices that share one tensor-parallel layer."""
    fsdp: bool = True
    """Shard parameters and optimizer state over the data axis."""
    local_batch: int = 8
    """Pairs per batch shard."""
    accumulate: int = 1
    """Micro-batches per step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the towers and of the pairs (simulated devices compute in float32 all the same)."""
    remat: str = "none"
    """What the towers recompute, as their `remat`; a ResNet knows none and full."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self) -> None:
        for name in ("devices", "local_batch"):
            if getattr(self, name) < 1:
                raise ClipjaxError(f"bench memory: {name}={getattr(self, name)} must be positive")
        self.model()  # refuses what is no preset before a process is started

    @property
    def machine(self) -> str:
        """As `clipjax plan --on` takes it."""
        return self.on or f"cpux{self.devices}"

    def model(self) -> Any:
        """The dual encoder that is measured."""
        from clipjax.models import DualEncoder
        from clipjax.towers import ResNet, TextTransformer, ViT

        settings = {"dtype": self.dtype, "remat": self.remat}
        text = TextTransformer.preset(self.text, **settings)
        if self.image.startswith("RN"):
            resnet = ResNet.preset(self.image, **settings)
            return DualEncoder(
                image=resnet, text=text, embed_dim=resnet.output_dim, image_projection="none"
            )
        return DualEncoder(image=ViT.preset(self.image, **settings), text=text)

    def planned(self, shards: int) -> Run:
        """The run whose step is compiled, for that many batch shards."""
        from clipjax.data import BPE, Data, Tfds
        from clipjax.mesh import MeshShape
        from clipjax.objectives import Softmax
        from clipjax.optim import AdamW, Duration
        from clipjax.sharding import Sharding

        model = self.model()
        words = model.text.vocab_size
        return Run(
            model=model,
            objective=Softmax(),
            data=Data(
                Tfds("none"), BPE(vocab_size=words), image_size=model.image.image_size,
                batch_size=self.local_batch * shards, context_length=model.text.context_length,
            ),
            optimizer=AdamW(),
            duration=Duration(1000),
            mesh=MeshShape(group=self.group, tensor=self.tensor),
            sharding=Sharding(fsdp=self.fsdp),
            pair_dtype=self.dtype,
            accumulate=self.accumulate,
        )  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Compiles in a process with those devices, prints the table, returns the JSON object."""
        from rich.console import Console

        from clipjax.plan import table
        from clipjax.plan.estimate import estimate
        from clipjax.plan.machines import machine
        from clipjax.plan.program import compiled_for

        on = machine(self.machine)
        run = self.planned(max(1, on.devices // self.tensor))
        found = compiled_for(run, on, [], run.data.batch_size)
        table.show(Console(width=140), run, on, found, estimate(run, on, found, None))
        results = summary(found)
        if self.json:
            print(json.dumps(results))
        return results


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What a compiled step says, in short.

    Returns:
      params and opt_state: [bytes on one device, bytes in all]; held_bytes, both on one device;
      share, both on one device over both in all; state_bytes, the whole train state as the compiled
      program returns it into the donated one; temp_bytes; sent_bytes by collective, on a ring.
    """
    params, opt_state = (
        [found[part][name] for part in ("state", "state_total")] for name in ("params", "opt_state")
    )
    held = params[0] + opt_state[0]
    return {
        "params": params,
        "opt_state": opt_state,
        "held_bytes": held,
        "share": held / (params[1] + opt_state[1]),
        "state_bytes": found["aliased"],
        "temp_bytes": found["temporary"],
        "sent_bytes": found["sent"],
    }
