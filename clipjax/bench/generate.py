"""`clipjax bench generate`: captions with a key and value cache, and without one."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any, Literal

from clipjax.component import Component
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class GenerateBench(Component):
    """Time of greedy captions by a CoCa decoder with random weights, cached and uncached in turns."""

    tokens: int = 32
    """Tokens of every caption; none ends early."""
    batch: int = 8
    """Pictures captioned at once."""
    layers: int = 12
    """Layers of the decoder, one half unimodal, one half looking at the picture."""
    width: int = 512
    """Channels of the decoder."""
    heads: int = 8
    """Attention heads of the decoder."""
    queries: int = 256
    """Tokens of a picture that the decoder looks at."""
    vocabulary: int = 16384
    """Different tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    rounds: int = 3
    """Runs of each contestant, in turns; the least time counts."""
    prefix: bool = False
    """Also time running exactly the prefix at every step: a compilation for each length."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self):
        for name in ("tokens", "batch", "width", "heads", "queries", "rounds"):
            if getattr(self, name) < 1:
                raise ClipjaxError(f"bench generate: {name}={getattr(self, name)} must be positive")
        if self.layers < 2 or self.layers % 2:
            raise ClipjaxError(f"bench generate: layers={self.layers} must be even and at least 2")

    def run(self) -> dict[str, Any]:
        """Measures, prints the table and returns what the JSON object holds."""
        contestants, agree = self._contestants()
        seconds = dict.fromkeys(contestants, float("inf"))
        for _ in range(self.rounds):
            for name, caption in contestants.items():
                began = time.perf_counter()
                caption()
                seconds[name] = min(seconds[name], time.perf_counter() - began)
        results: dict[str, Any] = {
            "seconds": seconds,
            "cached_tokens_per_second": self.batch * self.tokens / seconds["cached"],
            "speedup": seconds["uncached"] / seconds["cached"],
            "same_tokens": agree,
        }
        if self.prefix:
            results["speedup_over_prefix"] = seconds["prefix"] / seconds["cached"]
        self._print(results)
        if self.json:
            print(json.dumps(results))
        return results

    def _contestants(self) -> tuple[dict[str, Callable[[], Any]], bool]:
        """(what to time, compiled and run once; whether all gave the same tokens)."""
        import jax
        import jax.numpy as jnp
        import numpy as np
        from flax import nnx

        from clipjax.generation import Greedy, SpecialTokens, generate
        from clipjax.models.coca import CaptionDecoder, CoCa, Poolers
        from clipjax.params import merge, split
        from clipjax.towers import TextTransformer, ViT

        sizes: dict[str, Any] = {"width": self.width, "heads": self.heads, "dtype": self.dtype}
        model = CoCa(
            image=ViT(image_size=16, patch_size=16, depth=1, pool="mean", **sizes),
            text=TextTransformer(
                vocab_size=self.vocabulary,
                context_length=self.tokens + 1,
                depth=self.layers // 2,
                pool="class",
                **sizes,
            ),
            decoder=CaptionDecoder(depth=self.layers // 2, **sizes),
            poolers=Poolers(queries=self.queries, heads=self.heads),
        )
        graphdef, params, state = split(model.build(nnx.Rngs(0)))
        memory = jax.random.normal(jax.random.key(1), (self.batch, self.queries, self.width))
        memory = memory.astype(self.dtype)
        bos = 1
        special = SpecialTokens(bos=bos, eos=2, pad=0)
        prompt = jnp.zeros((self.batch, self.tokens + 1), jnp.int32).at[:, 0].set(bos)
        given = jnp.ones(self.batch, jnp.int32)

        def captioner(use_cache: bool) -> Callable[[], Any]:
            @jax.jit
            def caption(params, memory):
                return generate(
                    merge(graphdef, params, state),
                    memory,
                    Greedy(min_length=self.tokens - 1),
                    special=special,
                    prompt=prompt,
                    prompt_length=given,
                    use_cache=use_cache,
                ).tokens

            return lambda: jax.block_until_ready(caption(params, memory))

        @jax.jit
        def following(params, memory, tokens):
            logits = merge(graphdef, params, state).caption_logits(tokens, memory)[0][:, -1]
            banned = [special.pad, special.bos] + [special.eos] * (tokens.shape[1] < self.tokens)
            logits = logits.at[:, jnp.array(banned)].set(-jnp.inf)
            return jnp.concatenate([tokens, jnp.argmax(logits, -1)[:, None]], 1, dtype=jnp.int32)

        def by_prefix() -> Any:
            tokens = jnp.asarray(prompt[:, :1])
            for _ in range(self.tokens):
                tokens = following(params, memory, tokens)
            return jax.block_until_ready(tokens)

        contestants = {"cached": captioner(True), "uncached": captioner(False)}
        contestants |= {"prefix": by_prefix} if self.prefix else {}
        outputs = [np.asarray(caption()) for caption in contestants.values()]
        return contestants, all(np.array_equal(outputs[0], other) for other in outputs[1:])

    def _print(self, results: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        title = (
            f"{self.tokens} tokens, {self.layers} layers of width {self.width}, {self.queries} picture "
            f"tokens, batch {self.batch}, {self.dtype}"
        )
        table = Table("decoding", "seconds", "x cached", title=title)
        for name, seconds in results["seconds"].items():
            table.add_row(
                _MEANINGS[name], f"{seconds:.3f}", f"{seconds / results['seconds']['cached']:.2f}"
            )
        console = Console()
        console.print(table)
        console.print(
            f"{results['cached_tokens_per_second']:,.0f} tokens/s cached; tokens are "
            + ("the same" if results["same_tokens"] else "NOT the same")
        )


_MEANINGS = {
    "cached": "key and value cache",
    "uncached": "whole row at every step, compiled once",
    "prefix": "prefix at every step, compiled for each length",
}
