"""Transformers in NumPy float64, written from the papers and independent of clipjax."""

import math

import numpy as np

erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.where(x > 0, x, 0.0),
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


def turned(x, angles, pairs):
    """RoPE as multiplication of complex numbers: x [N, head_dim], angles [N, head_dim / 2]."""
    half = x.shape[-1] // 2
    a, b = (x[:, :half], x[:, half:]) if pairs == "halves" else (x[:, ::2], x[:, 1::2])
    z = (a + 1j * b) * np.exp(1j * angles)
    if pairs == "halves":
        return np.concatenate([z.real, z.imag], 1)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def variant_attention(p, x, config, angles=None, pairs="halves", bias=None):
    """Attention with all settings of `Transformer`, one example, head and query at a time."""
    size = config.head_dim or config.width // config.heads
    scale = config.attention_scale or 1 / math.sqrt(size)
    group = config.heads // (config.kv_heads or config.heads)
    q, k, v = (linear(p[name], x) for name in "qkv")
    out = np.zeros((*x.shape[:2], config.heads * size))
    for b in range(len(x)):
        for h in range(config.heads):
            mine, theirs = (slice(i * size, (i + 1) * size) for i in (h, h // group))
            qs, ks, vs = q[b][:, mine], k[b][:, theirs], v[b][:, theirs]
            if config.qk_norm:
                qs, ks = norm(p["q_norm"], qs), norm(p["k_norm"], ks)
            if angles is not None:
                qs, ks = turned(qs, angles, pairs), turned(ks, angles, pairs)
            for n, row in enumerate(qs):
                scores = np.array([scale * row @ key for key in ks])
                scores = scores if bias is None else scores + bias[h, n]
                e = np.exp(scores - scores.max())
                out[b, n, mine] = (e / e.sum()) @ vs
    if config.inner_norms:
        out = norm(p["norm"], out)
    return linear(p["out"], out)


def variant_block(p, x, config, **places):
    """A block with all settings of `Transformer`."""
    before = config.norms in ("pre", "both")

    def sublayer(x, i, f):
        y = f(norm(p[f"norm{i}"], x) if before else x)
        y = norm(p[f"norm{i}"], y) if config.norms == "out" else y
        y = norm(p[f"norm{i}_out"], y) if config.norms == "both" else y
        y = y if config.layer_scale is None else y * p[f"scale{i}"]
        return norm(p[f"norm{i}"], x + y) if config.norms == "post" else x + y

    def variant_mlp(x):
        m = p["mlp"]
        hidden, activate = linear(m["fc1"], x), ACTIVATIONS[config.activation]
        hidden = activate(linear(m["gate"], x)) * hidden if config.gated else activate(hidden)
        return linear(m["fc2"], norm(m["norm"], hidden) if config.inner_norms else hidden)

    x = sublayer(x, 1, lambda y: variant_attention(p["attn"], y, config, **places))
    return sublayer(x, 2, variant_mlp)


def map_pool(p, tokens, heads, valid=None):
    b, _n, d = tokens.shape
    probe = np.broadcast_to(p["probe"], (b, 1, d))
    mask = None if valid is None else valid[:, None, :]
    x = attention(p["attn"], probe, tokens, heads, mask)
    return (x + mlp(p["mlp"], norm(p["norm"], x)))[:, 0]
