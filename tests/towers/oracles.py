"""Transformers in NumPy float64, written from the papers and independent of clipjax."""

import math

import numpy as np

erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def float64(tree):
    """A nested dict of arrays in float64."""
    if isinstance(tree, dict):
        return {name: float64(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)


def layer(tree, i):
    """Layer `i` of stacked parameters."""
    return {n: layer(v, i) if isinstance(v, dict) else v[i] for n, v in tree.items()}


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def norm(p, x, eps=1e-5):
    if "bias" in p:
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p.get("bias", 0.0)


def attention(p, x, memory, heads, mask=None):
    """One image and one head at a time; mask [B, N, M] of bools."""
    q, k, v = linear(p["q"], x), linear(p["k"], memory), linear(p["v"], memory)
    size = q.shape[-1] // heads
    out = np.zeros_like(q)
    for b in range(len(q)):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[b][:, part] @ k[b][:, part].T / math.sqrt(size)
            if mask is not None:
                scores = np.where(mask[b], scores, -np.inf)
            e = np.exp(scores - scores.max(-1, keepdims=True))
            out[b][:, part] = e / e.sum(-1, keepdims=True) @ v[b][:, part]
    return linear(p["out"], out)


def mlp(p, x, activation="gelu"):
    return linear(p["fc2"], ACTIVATIONS[activation](linear(p["fc1"], x)))


def block(p, x, heads, mask=None, activation="gelu"):
    y = norm(p["norm1"], x)
    x = x + attention(p["attn"], y, y, heads, mask)
    return x + mlp(p["mlp"], norm(p["norm2"], x), activation)


def map_pool(p, tokens, heads, valid=None):
    b, _n, d = tokens.shape
    probe = np.broadcast_to(p["probe"], (b, 1, d))
    mask = None if valid is None else valid[:, None, :]
    x = attention(p["attn"], probe, tokens, heads, mask)
    return (x + mlp(p["mlp"], norm(p["norm"], x)))[:, 0]
