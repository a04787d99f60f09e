"""Makes the golden for LiT: big_vision's two towers, put together again from Flax's own layers.

big_vision is no package, so this is its architecture as its code and the LiT paper (arXiv:2111.07991)
describe it: a ViT whose class token has no position and no head, and a text tower that takes its last
token and has one. Run with clipjax's environment: python make_lit.py
"""

import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import named_weights as weights

WIDTH, HEADS, DEPTH = 32, 4, 2


class Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="Dense_1")(
            nn.gelu(nn.Dense(self.hidden, name="Dense_0")(x))
        )


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="LayerNorm_0")(x)
        name = "MultiHeadDotProductAttention_0"
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name=name)(y, y)
        return x + Mlp(80, name="MlpBlock_0")(nn.LayerNorm(name="LayerNorm_1")(x))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(DEPTH):
            x = Block(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class Image(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.Conv(WIDTH, (8, 8), (8, 8), "VALID", name="embedding")(image)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = x + self.param("pos_embedding", nn.initializers.zeros, (1, x.shape[1], WIDTH))
        token = self.param("cls", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, WIDTH)), x], 1)
        return Encoder(name="Transformer")(x)[:, 0]


class Text(nn.Module):
    @nn.compact
    def __call__(self, text):
        x = nn.Embed(60, WIDTH, name="Embed_0")(text)
        x = x + self.param("pos_embedding", nn.initializers.zeros, (1, x.shape[1], WIDTH))
        return nn.Dense(WIDTH, name="head")(Encoder(name="Encoder_0")(x)[:, -1])


class TwoTowers(nn.Module):
    @nn.compact
    def __call__(self, image, text):
        u, v = Image(name="img")(image), Text(name="txt")(text)
        u, v = (z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (u, v))
        scale = jnp.exp(self.param("t", nn.initializers.zeros, (1,)))
        return u, v, scale * u @ v.T


def main():
    image = weights.pictures(3, 24).astype(np.float32) / 127.5 - 1
    text = weights.texts(3, 12, 60, None)
    shapes = jax.eval_shape(TwoTowers().init, jax.random.key(0), image, text)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    arrays = [weights.tensor(n, leaf.shape) for n, (_, leaf) in zip(names, leaves, strict=True)]
    with jax.default_matmul_precision("highest"):
        outputs = TwoTowers().apply(jax.tree.unflatten(structure, arrays), image, text)
    golden = {
        "family": "big_vision",
        "files": {},
        "tensors": {n: [list(a.shape), "float32"] for n, a in zip(names, arrays, strict=True)},
        "inputs": {"image_size": 24, "context_length": 12, "vocab_size": 60, "eos": None},
        "outputs": {
            name: [[float(f"{x:.8g}") for x in row] for row in np.asarray(value, np.float64)]
            for name, value in zip(("image", "text", "logits"), outputs, strict=True)
        },
    }
    file = Path(__file__).parent.parent / "goldens" / "big_vision_lit.json"
    file.write_text(json.dumps(golden, separators=(",", ":")).replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main()
