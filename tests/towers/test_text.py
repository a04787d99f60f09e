"""TextTransformer: sizes, pooling, and who sees whom, by perturbation."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from clipjax.errors import ClipjaxError
from clipjax.params import abstract, count
from clipjax.towers import TextTransformer

PAD, EOS = 0, 2
CONFIG = TextTransformer(
    vocab_size=20, context_length=7, width=8, heads=2, depth=2, mlp_dim=12, pad_id=PAD, eos_id=EOS
)
TEXT = np.array(
    [
        [1, 5, 6, EOS, PAD, PAD],
        [1, 7, 8, 9, 3, EOS],
        [1, 5, 6, 7, 8, 9],  # cut short: no end-of-text
        [1, EOS, 4, EOS, PAD, PAD],  # the first one counts
        [PAD] * 6,
    ],
    np.int32,
)
LAST = [3, 5, 5, 3, 0]
FIRST_EOS = [3, 5, 5, 1, 0]


@pytest.mark.parametrize(
    ("name", "embed_dim", "millions"),
    [("B", 512, 63.43), ("L", 768, 123.65), ("H", 1024, 354.03), ("G", 1280, 694.66)],
)
def test_presets_have_the_published_millions_of_parameters(name, embed_dim, millions):
    """OpenCLIP lists text towers with their projections."""
    config = TextTransformer.preset(name)
    _, params, _ = abstract(lambda: config.build(nnx.Rngs(0)))
    assert (count(params) + config.width * embed_dim) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_small_preset_is_what_it_says():
    config = TextTransformer.preset("S", vocab_size=100)
    assert (config.width, config.depth, config.heads, config.vocab_size) == (384, 12, 6, 100)


def reference(oracles, params, text, config):
    p = oracles.float64(params)
    n = text.shape[1]
    x = p["embedding"][text] + p["positions"][:n]
    valid = np.ones_like(text, bool) if config.pad_id is None else text != config.pad_id
    valid[~valid.any(1), 0] = True
    mask = np.broadcast_to(valid[:, None, :], (len(text), n, n))
    if config.causal:
        mask = mask & np.tril(np.ones((n, n), bool))
    for i in range(config.depth):
        x = oracles.block(oracles.layer(p["blocks"], i), x, config.heads, mask)
    x = oracles.norm(p["norm"], x)
    if config.pool == "map":
        return x, oracles.map_pool(p["pool"], x, config.heads, valid)
    if config.pool == "mean":
        return x, np.stack([row[v].mean(0) for row, v in zip(x, valid, strict=True)])
    return x, x[np.arange(len(text)), FIRST_EOS if config.pool == "eos" else LAST]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pool": "last", "causal": False},
        {"pool": "mean", "causal": False},
        {"pool": "map", "causal": False},
        {"pad_id": None},
    ],
    ids=["causal-eos", "last", "mean", "map", "no_padding"],
)
def test_the_whole_tower_in_float64(fields, tower, oracles):
    config = dataclasses.replace(CONFIG, **fields)
    # With padding first, a causal position that sees only padding has nothing to look at: none here.
    text = TEXT
    params, run = tower(config)
    tokens, pooled = run(params, text)
    if config.pad_id is None:
        # Without padding the row of zeros is a text without end, of which the last token counts.
        expected_tokens, expected = reference(oracles, params, text, config)
        expected[4] = expected_tokens[4, 5]
    else:
        expected_tokens, expected = reference(oracles, params, text, config)
    np.testing.assert_allclose(tokens, expected_tokens, atol=5e-5)
    np.testing.assert_allclose(pooled, expected, atol=5e-5)


def seen_by(tower, config, row):
    """[query, key] -> whether another token at `key` changes the features at `query`."""
    params, run = tower(config)
    text = np.repeat(TEXT[row][None], 5, 0)
    before = np.asarray(run(params, text)[0][0])
    seen = np.zeros((6, 6), bool)
    for key in range(6):
        other = text.copy()
        other[:, key] = 11
        seen[:, key] = (np.asarray(run(params, other)[0][0]) != before).any(-1)
    return seen


def test_causal_positions_see_themselves_and_what_comes_before(tower):
    np.testing.assert_array_equal(seen_by(tower, CONFIG, 1), np.tril(np.ones((6, 6), bool)))


def test_bidirectional_positions_see_everything(tower):
    config = dataclasses.replace(CONFIG, pool="mean", causal=False)
    assert seen_by(tower, config, 1).all()


@pytest.mark.parametrize("pool", ["last", "mean", "map"])
def test_padding_is_invisible(pool, tower):
    """More of it changes neither the pooled vector nor the features of real tokens."""
    config = dataclasses.replace(CONFIG, pool=pool, causal=False)
    params, run = tower(config)
    tokens, pooled = run(params, TEXT[:, :6])
    longer = np.pad(TEXT, ((0, 0), (0, 1)), constant_values=PAD)
    more_tokens, more_pooled = run(params, longer)
    for more, few in ((more_pooled, pooled), (more_tokens[0, :4], tokens[0, :4])):
        np.testing.assert_allclose(more, few, rtol=0, atol=1e-6 * np.abs(few).max())


def test_dropout_is_replayed_by_its_key_and_off_without(tower):
    params, run = tower(dataclasses.replace(CONFIG, dropout=0.3))
    first = run(params, TEXT, jax.random.key(0))[1]
    np.testing.assert_array_equal(first, run(params, TEXT, jax.random.key(0))[1])
    assert (np.asarray(first) != run(params, TEXT, jax.random.key(1))[1]).any()
    _, plain = tower(CONFIG)
    np.testing.assert_array_equal(run(params, TEXT)[1], plain(params, TEXT)[1])


@pytest.mark.parametrize("pool", ["eos", "mean", "map", "class"])
def test_embeddings_stand_for_ids(pool, drawn):
    """A text's own embeddings give what the text gives; noise in padding changes nothing."""
    config = dataclasses.replace(CONFIG, pool=pool)
    graphdef, params = drawn(lambda: config.build(nnx.Rngs(0)))
    module = nnx.merge(graphdef, nnx.State(params))
    text = TEXT[[0, 1, 2]]  # where the end, or else the last token, is the last that counts
    tokens, pooled = module(text)
    embeddings, valid = np.array(module.embed(text)), module.valid(text)
    assert embeddings.shape == (3, 6, 8)
    np.testing.assert_allclose(embeddings, params["embedding"][text])
    embeddings[0, 4:] += 3
    got_tokens, got = module(embeddings, valid=valid)
    np.testing.assert_allclose(got, pooled, atol=2e-6)
    np.testing.assert_allclose(got_tokens[valid], tokens[valid], atol=2e-6)
    for found in (module.describe(text), module.describe(embeddings, valid=valid)):
        np.testing.assert_array_equal(found["mask"], text != PAD)
        np.testing.assert_array_equal(found["places"], [range(6)] * 3)
    assert module.describe(embeddings)["mask"].all()  # nobody said what is padding


def test_the_embeddings_gradient_adds_up_in_float32(drawn):
    """1,000 terms of 1 end at 256 in bfloat16, where 256 + 1 is 256."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16", context_length=1000)
    graphdef, params = drawn(lambda: config.build(nnx.Rngs(0)))

    def total(embedding):
        module = nnx.merge(graphdef, nnx.State(params | {"embedding": embedding}))
        return module.embed(np.full((1, 1000), 7)).astype(np.float32).sum()

    gradient = jax.grad(total)(params["embedding"])
    assert (gradient[7] == 1000).all() and not gradient[np.arange(20) != 7].any()


def test_numpy_goes_without_jit(drawn):
    graphdef, params = drawn(lambda: CONFIG.build(nnx.Rngs(0)))
    assert nnx.merge(graphdef, nnx.State(params))(TEXT[:1])[1].shape == (1, 8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pool": "first"}, "pool='first' is unknown"),
        ({"eos_id": 20}, "eos_id=20 is no token of a vocabulary of TextTransformer.vocab_size=20"),
        ({"pad_id": -1}, "pad_id=-1 is no token"),
        ({"pad_id": 2}, "pad_id=2 is also the eos_id"),
        ({"context_length": 0}, "context_length=0"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, words):
    with pytest.raises(ClipjaxError, match=words):
        dataclasses.replace(CONFIG, **fields)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ClipjaxError, match="unknown TextTransformer preset 'XL'"):
        TextTransformer.preset("XL")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (np.zeros((1, 8), np.int32), "8 tokens are longer than TextTransformer.context_length=7"),
        (np.zeros((1, 6), np.float32), r"embeddings \[B, L, 8\], got float32 \[1, 6\]"),
        (np.zeros((1, 6, 9), np.float32), r"embeddings \[B, L, 8\], got float32 \[1, 6, 9\]"),
        (np.zeros(6, np.int32), r"integers \[B, L\], or .* got int32 \[6\]"),
    ],
)
def test_what_is_no_text_is_refused(text, words, tower):
    params, run = tower(CONFIG)
    with pytest.raises(ClipjaxError, match=words):
        run(params, text)
