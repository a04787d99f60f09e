"""`clipjax bench caption`: the caption loss, chunked over the vocabulary, against the dense formula."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any, Literal

from clipjax.component import Component
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class CaptionBench(Component):
    """Memory, products and time of the caption loss and its gradient, from features to words."""

    batch: int = 64
    """Captions, B."""
    length: int = 76
    """Tokens of a caption, L; L - 1 of them are predicted."""
    vocabulary: int = 49408
    """Words, V."""
    width: int = 512
    """Width of the features, D."""
    chunk: int = 2048
    """Words at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the features, and so of the products' operands."""
    rounds: int = 3
    """Runs of each formula, in turns; the least time counts. 0: only compile."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self):
        for name in ("batch", "width", "vocabulary", "chunk"):
            if getattr(self, name) < 1:
                raise ClipjaxError(f"bench caption: {name}={getattr(self, name)} must be positive")
        if self.length < 2:
            raise ClipjaxError(f"bench caption: length={self.length} leaves nothing to predict")
        if self.rounds < 0:
            raise ClipjaxError(f"bench caption: rounds={self.rounds} must not be negative")

    def run(self) -> dict[str, Any]:
        """Compiles both, runs them, prints a table and returns what the JSON object holds."""
        import jax

        from clipjax.bench.program import temporary_bytes, work

        compiled = {
            name: jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*self._shapes()).compile()
            for name, loss in (("chunked", self._chunked), ("dense", _dense))
        }
        temp = {name: temporary_bytes(c) for name, c in compiled.items()}
        product = 2.0 * self.batch * (self.length - 1) * self.width * self.vocabulary
        results: dict[str, Any] = {
            "temp_bytes": temp,
            "temp_ratio_vs_dense": temp["dense"] / temp["chunked"],
            "matmul_units": {n: work(c).matmul_flops / product for n, c in compiled.items()},
        }
        if self.rounds:
            results |= self._race(compiled)
        self._print(results)
        if self.json:
            print(json.dumps(results))
        return results

    def _shapes(self):
        import jax
        import jax.numpy as jnp

        return (
            jax.ShapeDtypeStruct((self.batch, self.length - 1, self.width), self.dtype),
            jax.ShapeDtypeStruct((self.width, self.vocabulary), jnp.float32),
            jax.ShapeDtypeStruct((self.batch, self.length), jnp.int32),
        )

    def _chunked(self, features, head, text):

        from clipjax.batch import Encoded
        from clipjax.objectives import Caption, Context

        encoded = Encoded({"captions": features}, {"caption_head": head})
        return Caption(pad_id=0, chunk=self.chunk)(encoded, Context(batch={"text": text}))[0]

    def _race(self, compiled: dict[str, Any]) -> dict[str, Any]:
        import jax
        import numpy as np

        rng = np.random.default_rng(0)
        features, head, text = self._shapes()
        inputs = (
            jax.numpy.asarray(rng.standard_normal(features.shape, np.float32), self.dtype),
            rng.standard_normal(head.shape, np.float32) * self.width**-0.5,
            rng.integers(1, self.vocabulary, text.shape, dtype=np.int32),
        )
        seconds = {name: float("inf") for name in compiled}
        values = {}
        for _ in range(self.rounds):
            for name, function in compiled.items():
                start = time.perf_counter()
                values[name] = float(jax.block_until_ready(function(*inputs))[0])
                seconds[name] = min(seconds[name], time.perf_counter() - start)
        return {
            "seconds": seconds,
            "time_ratio_vs_dense": seconds["chunked"] / seconds["dense"],
            "loss": values,
        }

    def _print(self, results: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        title = (
            f"caption loss and gradient, B={self.batch} L={self.length} V={self.vocabulary} "
            f"D={self.width} {self.dtype}, chunks of {self.chunk}"
        )
        table = Table("formula", "temporary MB", "products of B L D V", "seconds", title=title)
        for name, size in results["temp_bytes"].items():
            seconds = results.get("seconds", {}).get(name)
            table.add_row(
                name,
                f"{size / 1e6:.1f}",
                f"{results['matmul_units'][name]:.2f}",
                "-" if seconds is None else f"{seconds:.3f}",
            )
        Console().print(table)


def _dense(features, head, text):
    import jax
    import jax.numpy as jnp

    logits = jnp.einsum(
        "btd,dv->btv", features, head.astype(features.dtype), preferred_element_type=jnp.float32
    )
    target = jnp.take_along_axis(logits, text[:, 1:, None], -1)[..., 0]
    weights = text[:, 1:] != 0
    return jnp.sum((jax.nn.logsumexp(logits, -1) - target) * weights) / jnp.sum(weights)
