"""Attention itself: queries, keys and values in, what is attended to out; one function, several ways.

Written as two products and a softmax, automatic differentiation keeps the scores of every pair of
tokens for the backward pass: more than all else that a block keeps. None of the other ways here
does; all keep queries, keys and values, and agree with the plain one to rounding.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from clipjax.layout import per_shard, platform

KINDS = ("auto", "xla", "lean", "cudnn", "splash")


class Causal(NamedTuple):
    """The mask of rows that see what is at or before their own place, N = M; kernels know it."""

    keys: jax.Array | None = None
    """bool, broadcastable to [B, heads, N, M]: False is not attended to. It may only tell padding at
    the end of rows, which no token before it sees anyway: kernels leave it out."""

    def array(self, n: int) -> jax.Array:
        """bool, broadcastable to [B, heads, n, n]."""
        before = jnp.tril(jnp.ones((n, n), bool))[None, None]
        return before if self.keys is None else before & self.keys


Mask = jax.Array | Causal | None
"""bool, broadcastable to [B, heads, N, M], False is not attended to and every query must be left at
least one key; or a kind of mask; or None, for no mask."""

KERNEL_TOKENS = 128
"""`auto` takes splash from this many tokens on: it pads shorter rows to more than twice."""
CUDNN = "dot_product_attention_fwd_wrapper"
"""cuDNN's forward pass among JAX's primitives."""
LANES = 128
"""Splash wants tokens in multiples of it."""
EVEN = 2
"""JAX has cuDNN's backward pass for even numbers of tokens alone."""
WHOLE = 1024
"""Up to this many tokens a row is one tile of splash; beyond, tiles have half as many."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    heads: int,
    kind: str,
    bias: jax.Array | None = None,
    tokens: tuple[int, int] | None = None,
) -> jax.Array:
    """Multi-head attention of projected queries, keys and values.

    Args:
      q: [B, N, D], heads side by side.
      k: [B, M, D].
      v: [B, M, D].
      mask: who may be attended to.
      heads: divides D.
      kind: how, one of `KINDS`. "xla" keeps the scores; "lean" makes them again in the backward pass.
        "cudnn" (NVIDIA, bfloat16) and "splash" (Pallas, for TPU; interpreted elsewhere) never write
        them. cuDNN's takes no mask that is an array and splash none at all: "lean" stands in there.
        "auto" is the kernel of the platform where that pays, and "lean" else.
      bias: added to the scores, broadcastable to [B, heads, N, M]; scores are made again then, whatever
        the kind but "xla".
      tokens: how many of N and of M are no padding (`before_projection`); None: all.

    Returns:
      [B, N, D]; what padding attends to is not defined.
    """
    kind = resolve(kind, q.shape[-1] // heads, q, k, mask, bias)
    if kind in ("xla", "lean"):
        seen = mask.array(q.shape[1]) if isinstance(mask, Causal) else mask
        if kind == "lean" and bias is None:
            return _lean(q, k, v, seen, heads)
        plain = functools.partial(_plain, heads=heads)
        return (plain if kind == "xla" else jax.checkpoint(plain))(q, k, v, seen, bias)
    n, m = tokens or (q.shape[1], k.shape[1])
    run = _cudnn if kind == "cudnn" else _splash
    run = functools.partial(run, size=q.shape[-1] // heads, n=n, m=m)
    if mask is not None:
        run = functools.partial(run, causal=True)
    kernel = per_shard(run, len(q), heads)
    # Checkpointed, splash keeps q, k and v; by itself, padded copies of them, and of what comes out.
    return (kernel if kind == "cudnn" else jax.checkpoint(kernel))(q, k, v)


def _plain(q, k, v, mask, bias, *, heads):
    q, k, v = (_heads(x, heads) for x in (q, k, v))
    weights = _softmax(_scores(q, k, mask, bias))[0].astype(v.dtype)
    return _flat(jnp.einsum("bhnm,bhmd->bhnd", weights, v))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The plain way, for q [B, heads, N, D / heads] and a cache's k and v [B, heads, M, D / heads].

    Returns:
      [B, N, D].
    """
    weights = _softmax(_scores(q, k, mask))[0].astype(v.dtype)
    return _flat(jnp.einsum("bhnm,bhmd->bhnd", weights, v))


def resolve(
    kind: str, size: int, q: jax.Array, k: jax.Array, mask: Mask, bias: jax.Array | None
) -> str:
    """The way that is gone, one of `KINDS` but "auto".

    Args:
      kind: what is asked for.
      size: channels of a head.
      q: [B, N, ...], queries or what they are projected from.
      k: [B, M, ...], likewise.
      mask: who may be attended to.
      bias: of the scores, or None.
    """
    if kind == "auto":
        kind = _fastest(size, min(q.shape[1], k.shape[1]), q.dtype)
    masks = {"cudnn": (Causal,), "splash": ()}
    if kind not in masks or (bias is None and (mask is None or isinstance(mask, masks[kind]))):
        return kind
    return "lean"


def _fastest(size: int, tokens: int, dtype: Any) -> str:
    if dtype != jnp.bfloat16:
        return "lean"
    if platform() == "tpu":
        return "splash" if tokens >= KERNEL_TOKENS else "lean"
    return "cudnn" if platform() == "gpu" and size % 8 == 0 and size <= 128 else "lean"


def before_projection(kind: str, x: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, N, D] and [B, M, D], padded as the kernel wants queries, keys and values.

    Done to what is projected, it costs nothing: the norm writes the zeros, and the projections as
    many rows as the kernel reads. Splash pads more than that would be worth, and does it itself.
    """
    if kind != "cudnn":
        return x, memory
    padded = _padded(x, EVEN)
    return padded, padded if memory is x else _padded(memory, EVEN)


def _heads(x: jax.Array, heads: int) -> jax.Array:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def _flat(x: jax.Array) -> jax.Array:
    return rearrange(x, "b h n d -> b n (h d)")


def _scores(
    q: jax.Array, k: jax.Array, mask: jax.Array | None, bias: jax.Array | None = None
) -> jax.Array:
    """[B, heads, N, M], float32."""
    scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def _softmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The softmax over keys, and the logarithm of its denominators [B, heads, N, 1]."""
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    terms = jnp.exp(scores - top)
    total = terms.sum(-1, keepdims=True)
    return terms / total, top + jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _lean(q, k, v, mask, heads):
    return _lean_forward(q, k, v, mask, heads)[0]


def _lean_forward(q, k, v, mask, heads):
    weights, logs = _softmax(_scores(_heads(q, heads), _heads(k, heads), mask))
    out = _flat(jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), _heads(v, heads)))
    return out, (q, k, v, mask, checkpoint_name(logs, "lse"))


def _lean_backward(heads, kept, g):
    q, k, v, mask, logs = kept
    q, k, v, g = (_heads(x, heads) for x in (q, k, v, g))
    weights = jnp.exp(_scores(q, k, mask) - logs)
    dv = jnp.einsum("bhnm,bhnd->bhmd", weights.astype(v.dtype), g)
    dweights = jnp.einsum("bhnd,bhmd->bhnm", g, v, preferred_element_type=jnp.float32)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dscores = (dscores * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = jnp.einsum("bhnm,bhmd->bhnd", dscores, k)
    dk = jnp.einsum("bhnm,bhnd->bhmd", dscores, q)
    return _flat(dq), _flat(dk), _flat(dv), None


_lean.defvjp(_lean_forward, _lean_backward)


def _cudnn(q, k, v, *, size: int, n: int, m: int, causal: bool = False) -> jax.Array:
    """cuDNN's fused attention; of the keys [B, M, D], the first m count."""
    rows, queries = q.shape[:2]
    q, k, v = (rearrange(_padded(x, EVEN), "b n (h d) -> b n h d", d=size) for x in (q, k, v))
    lengths: dict[str, Any] = {}
    if not causal and (q.shape[1] > n or k.shape[1] > m):  # no query looks past itself anyway
        lengths["query_seq_lengths"] = jnp.full(rows, n, jnp.int32)
        lengths["key_value_seq_lengths"] = jnp.full(rows, m, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn", **lengths)
    return rearrange(out[:, :queries], "b n h d -> b n (h d)")


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, *, size: int, n: int, m: int) -> jax.Array:
    """JAX's Pallas kernel for TPUs; what it is padded with makes a segment of its own."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    queries = q.shape[1]
    tiles = [_tile(x.shape[1]) for x in (q, k)]
    q, k, v = (
        rearrange(_padded(x, tile), "b n (h d) -> b h n d", d=size)
        for x, tile in ((q * size**-0.5, tiles[0]), (k, tiles[1]), (v, tiles[1]))
    )
    segments = splash.SegmentIds(
        (jnp.arange(q.shape[2]) >= n).astype(jnp.int32),
        (jnp.arange(k.shape[2]) >= m).astype(jnp.int32),
    )
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
             "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")  # fmt: skip
    blocks: dict[str, Any] = {name: tiles["_kv" in name] for name in names}
    one = splash.FullMask((q.shape[2], k.shape[2]))
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([one] * q.shape[1]),
        block_sizes=splash.BlockSizes(**blocks),
        interpret=platform() != "tpu",
    )
    out = jax.vmap(functools.partial(kernel, segment_ids=segments))(q, k, v)
    return rearrange(out[:, :, :queries], "b h n d -> b n (h d)")


def _tile(tokens: int) -> int:
    """Side of splash's tiles: the whole row up to a limit."""
    padded = -(-tokens // LANES) * LANES
    return padded if padded <= WHOLE else WHOLE // 2


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """Zeros after the tokens of [B, N, D], up to a multiple."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0)))
