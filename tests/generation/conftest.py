"""Two decoders small enough to search exhaustively, written against the captioning protocol only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.generation import SpecialTokens

PAD, BOS, EOS = 0, 1, 2
SPECIAL = SpecialTokens(bos=BOS, eos=EOS, pad=PAD)


class Scribe(nnx.Module):
    """Two layers of attention, to the picture and to earlier tokens; random and undecided."""

    def __init__(self, rngs, vocabulary=13, width=8, length=12, sharpness=3.0):
        def draw(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / np.sqrt(shape[-2]))

        self.sharpness = sharpness
        self.pixels = draw(4 * 4 * 3, 3 * width)
        self.embedding, self.positions = draw(vocabulary, width), draw(length, width)
        self.q, self.k, self.v = (draw(2, width, width) for _ in range(3))
        self.look, self.show = draw(2, width, width), draw(2, width, width)
        self.head = draw(width, vocabulary)

    def encode_image(self, image, key=None):
        return _unit(self.caption_memory(image).mean(1))

    def encode_text(self, text, key=None):
        return _unit(self.embedding[...][text].mean(1))

    def shared(self):
        return {"logit_scale": jnp.float32(1.0)}

    def caption_memory(self, image):
        x = image[:, :4, :4].reshape(len(image), -1) / 64.0 - 2.0
        return jnp.sin(x @ self.pixels[...] * 3).reshape(len(image), 3, -1)

    def start_cache(self, memory, length):
        keys = jnp.zeros((2, len(memory), length, memory.shape[-1]))
        seen = jnp.einsum("bqd,lde->lbqe", memory, self.show[...])
        return {"own": {"k": keys, "v": keys}, "picture": seen}

    def decode(self, tokens, start, cache):
        place = start + jnp.arange(tokens.shape[1])
        x = self.embedding[...][tokens] + self.positions[...][place]
        keys, values = [], []
        for layer in range(2):
            k = jax.lax.dynamic_update_slice(
                cache["own"]["k"][layer], x @ self.k[...][layer], (0, start, 0)
            )
            v = jax.lax.dynamic_update_slice(
                cache["own"]["v"][layer], x @ self.v[...][layer], (0, start, 0)
            )
            visible = jnp.arange(k.shape[1]) <= place[:, None]
            x = x + _attend(x @ self.q[...][layer], k, v, visible)
            picture = cache["picture"][layer]
            x = x + 2 * _attend(x @ self.look[...][layer], picture, picture)
            keys.append(k)
            values.append(v)
        own = {"k": jnp.stack(keys), "v": jnp.stack(values)}
        logits = self.sharpness * (x @ self.head[...])
        return logits, x, {"own": own, "picture": cache["picture"]}

    def caption_logits(self, tokens, memory):
        return self.decode(tokens, 0, self.start_cache(memory, tokens.shape[1]))[:2]


class Chain(nnx.Module):
    """The next token depends on the last one only: tables of probabilities and of hidden states."""

    def __init__(self, probs, hidden):
        self.probs = nnx.Param(jnp.asarray(probs, jnp.float32))
        self.hidden = nnx.Param(jnp.asarray(hidden, jnp.float32))

    def start_cache(self, memory, length):
        return {"nothing": jnp.zeros((1, len(memory)))}

    def decode(self, tokens, start, cache):
        return *self.caption_logits(tokens, None), cache

    def caption_logits(self, tokens, memory):
        return jnp.log(self.probs[...])[tokens], self.hidden[...][tokens]


class Words:
    """A tokenizer of ten words, w3 to w12."""

    pad_id, bos_id, eos_id, vocab_size = PAD, BOS, EOS, 13

    def encode(self, texts, context_length):
        rows = np.full((len(texts), context_length), PAD, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [BOS, *(int(word[1:]) for word in text.split())][: context_length - 1]
            ids.append(EOS)
            row[: len(ids)] = ids
        return rows

    def decode(self, ids):
        texts = []
        for row in np.asarray(ids).tolist():
            row = row[: row.index(EOS)] if EOS in row else row
            texts.append(" ".join(f"w{i}" for i in row if i > EOS))
        return texts


def _attend(q, k, v, visible=None):
    scores = jnp.einsum("bnd,bmd->bnm", q, k) / np.sqrt(q.shape[-1])
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    return jax.nn.softmax(scores, -1) @ v


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="session")
def scribe():
    """`scribe(**sizes)`: a random decoder."""
    return lambda seed=0, **sizes: Scribe(nnx.Rngs(seed), **sizes)


@pytest.fixture(scope="session")
def chain():
    return Chain


@pytest.fixture(scope="session")
def words():
    return Words()


@pytest.fixture(scope="session")
def special():
    return SPECIAL


@pytest.fixture(scope="session")
def pictures():
    return np.random.default_rng(5).integers(0, 256, (11, 8, 8, 3), np.uint8)


@pytest.fixture(scope="session")
def complete():
    """`complete(module, memory, strategy, length=..., prompt=None, **more)`: tokens and scores in NumPy."""
    from clipjax.generation import generate

    compiled = {}  # with the module, which keeps its id from being used again

    def function(module, strategy, use_cache):
        def caption(memory, prompt, prompt_length, seed, rows):
            return generate(
                module,
                memory,
                strategy,
                special=SPECIAL,
                prompt=prompt,
                prompt_length=prompt_length,
                seed=seed,
                rows=rows,
                use_cache=use_cache,
            )

        key = (id(module), strategy, use_cache)
        return compiled.setdefault(key, (module, jax.jit(caption)))[1]

    def run(module, memory, strategy, length=10, prompts=(), seed=0, rows=None, use_cache=True):
        tokens = np.full((len(memory), length), PAD, np.int32)
        given = np.ones(len(memory), np.int32)
        tokens[:, 0] = BOS
        for i, prompt in enumerate(prompts):
            tokens[i, 1 : 1 + len(prompt)] = prompt
            given[i] += len(prompt)
        rows = np.arange(len(memory)) if rows is None else rows
        output = function(module, strategy, use_cache)(memory, tokens, given, seed, rows)
        return np.asarray(output.tokens), np.asarray(output.scores)

    return run
