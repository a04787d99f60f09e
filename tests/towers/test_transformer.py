"""Blocks against NumPy float64; scan, unrolling and recomputation change nothing but the program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.errors import ClipjaxError
from clipjax.params import paths
from clipjax.towers.remat import POLICIES, rematerialized
from clipjax.towers.transformer import Block, TransformerTower, apply_stack, stack

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Machine code that is quick to make: a run takes no time here, compiling it does."""
CONFIG = TransformerTower(width=8, heads=2, depth=3, mlp_dim=12)
X = np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)
MASK = np.tril(np.ones((5, 5), bool))[None].repeat(2, 0)
MASK[1, :, 0] = False
MASK[1, 0, 4] = True  # somebody must be left for the first token to look at


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, norm="rmsnorm", activation="gelu_tanh", qkv_bias=False),
        dataclasses.replace(CONFIG, activation="quick_gelu", heads=1, mlp_dim=None),
    ],
    ids=["layernorm-gelu", "rmsnorm-gelu_tanh-no_bias", "quick_gelu"],
)
def test_a_block_in_float64(config, oracles, drawn):
    graphdef, params = drawn(lambda: Block(config, nnx.Rngs(0)))
    assert params["mlp"]["fc1"]["kernel"].shape == (8, config.hidden)
    block, reference = nnx.merge(graphdef, nnx.State(params)), oracles.float64(params)
    for mask in (None, MASK):
        got = block(X, mask=None if mask is None else jnp.asarray(mask)[:, None])
        expected = oracles.block(reference, X, config.heads, mask, config.activation)
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.fixture(scope="module")
def blocks(drawn):
    return drawn(lambda: stack(lambda rngs: Block(CONFIG, rngs), CONFIG.depth, nnx.Rngs(0)))


@pytest.fixture(scope="module")
def outcome(blocks):
    """`outcome(**fields) -> (output, gradients by path)` with dropout on."""
    _graphdef, params = blocks

    @functools.cache
    def run(**fields):
        config = dataclasses.replace(CONFIG, dropout=0.2, **fields)
        template, _ = nnx.split(
            nnx.eval_shape(lambda: stack(lambda r: Block(config, r), config.depth, nnx.Rngs(0)))
        )

        @functools.partial(jax.jit, compiler_options=QUICK)
        def f(params):
            def value(params):
                y = apply_stack(
                    nnx.merge(template, nnx.State(params)), jnp.asarray(X), config,
                    key=jax.random.key(3),
                )  # fmt: skip
                return jnp.sin(y).sum(), y

            grads, y = jax.grad(value, has_aux=True)(params)
            return y, grads

        y, grads = f(params)
        return np.asarray(y), {name: np.asarray(g) for name, g in paths(grads)}

    return run


def test_stacked_blocks_run_one_after_another(blocks, oracles):
    graphdef, params = blocks
    y = apply_stack(nnx.merge(graphdef, nnx.State(params)), jnp.asarray(X), CONFIG)
    expected = X.astype(np.float64)
    for i in range(CONFIG.depth):
        expected = oracles.block(oracles.layer(oracles.float64(params), i), expected, 2)
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"scan": False},
        {"scan_unroll": 2},
        {"attention": "xla"},
        {"remat": "q, hidden"},
        {"remat": "lean", "offload": "q"},
        {"reduce_dtype": "float32"},
        *({"remat": r} for r in POLICIES if r != "norms"),
    ],
    ids=lambda fields: "-".join(f"{k}_{v}" for k, v in fields.items()),
)
def test_settings_of_the_program_change_no_output_and_no_gradient(fields, outcome):
    y, grads = outcome(**fields)
    expected_y, expected = outcome()
    np.testing.assert_allclose(y, expected_y, atol=1e-5)
    assert set(grads) == set(expected)
    for name, g in grads.items():
        np.testing.assert_allclose(
            g, expected[name], atol=1e-5 * np.abs(expected[name]).max() + 1e-6
        )


def saved_bytes(**fields):
    """Temporary memory of forward and backward."""
    config = TransformerTower(width=32, heads=2, depth=8, **fields)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: stack(lambda r: Block(config, r), config.depth, nnx.Rngs(0)))
    )
    x = jax.ShapeDtypeStruct((8, 64, 32), jnp.float32)

    def value(state, x):
        return apply_stack(nnx.merge(graphdef, state), x, config).sum()

    compiled = jax.jit(jax.grad(value)).lower(state, x).compile(compiler_options=QUICK)
    return compiled.memory_analysis().temp_size_in_bytes


def test_recomputation_saves_memory_also_when_the_loop_is_unrolled():
    """Full recomputation keeps one [B, N, D] a block (0.5 MB in all) beside one block's own needs."""
    plain = saved_bytes(remat="none")
    assert saved_bytes(remat="lean") < 0.8 * plain
    assert saved_bytes(remat="dots") < 0.8 * plain
    assert saved_bytes(remat="full") < 0.4 * plain
    # XLA for CPUs drops the barriers against undoing it, so only the request for them can be seen here.
    assert "optimization_barrier" in lowered_text(remat="full", scan_unroll=2)
    assert "optimization_barrier" in lowered_text(remat="full", scan=False)


def kept_bytes(**fields):
    """What one block of ViT-B/16 keeps for the backward pass, for each of its pictures, in bfloat16."""
    config = TransformerTower(width=768, heads=12, depth=1, dtype="bfloat16", **fields)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))

    def block(state, x):
        return nnx.merge(graphdef, state)(x)

    def size(rows):
        x = jax.ShapeDtypeStruct((rows, 197, 768), jnp.bfloat16)
        _, vjp = jax.eval_shape(
            functools.partial(jax.vjp, rematerialized(block, config, False)), state, x
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp))

    return size(2) - size(1)


def test_a_block_keeps_what_its_gradient_needs():
    """In units of one [N, D]: what it got and what it has after attention; both, normed; queries, keys,
    values, what they gave; 4 before the activation, 4 after. Means, rates and denominators besides."""
    unit, little = 197 * 768 * 2, 197 * 4 * 16 + 100
    assert kept_bytes(remat="none") == pytest.approx(16 * unit, abs=little)
    assert kept_bytes() == pytest.approx(14 * unit, abs=little)
    assert kept_bytes(remat="activation") == pytest.approx(12 * unit, abs=little)
    assert kept_bytes(remat="lean") == pytest.approx(10 * unit, abs=little)
    assert kept_bytes(remat="full") == unit
    assert kept_bytes(remat="q,hidden") == 6 * unit


def test_what_is_kept_may_wait_on_the_host():
    """CPUs have one memory, so the program says nothing of it; what is asked for does."""
    for offload in ("hidden", ""):
        config = dataclasses.replace(CONFIG, remat="lean", offload=offload)
        graphdef, state = nnx.split(nnx.eval_shape(lambda c=config: Block(c, nnx.Rngs(0))))

        def value(state, x, config=config, graphdef=graphdef):
            step = rematerialized(lambda state, x: nnx.merge(graphdef, state)(x), config, False)
            return step(state, x).sum()

        jaxpr = str(jax.make_jaxpr(jax.grad(value))(state, jnp.asarray(X)))
        assert ("Host" in jaxpr) == bool(offload)


def lowered_text(**fields):
    config = dataclasses.replace(CONFIG, depth=2, **fields)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: stack(lambda r: Block(config, r), config.depth, nnx.Rngs(0)))
    )
    return (
        jax.jit(jax.grad(lambda s, x: apply_stack(nnx.merge(graphdef, s), x, config).sum()))
        .lower(state, jnp.asarray(X))
        .as_text()
    )


def test_dropout_follows_the_key_and_differs_between_blocks(blocks):
    _graphdef, params = blocks
    config = dataclasses.replace(CONFIG, dropout=0.5)
    template, _ = nnx.split(
        nnx.eval_shape(lambda: stack(lambda r: Block(config, r), config.depth, nnx.Rngs(0)))
    )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, key):
        return apply_stack(nnx.merge(template, nnx.State(params)), jnp.asarray(X), config, key=key)

    first = run(params, jax.random.key(0))
    np.testing.assert_array_equal(first, run(params, jax.random.key(0)))
    assert (np.asarray(first) != run(params, jax.random.key(1))).any()
    # Blocks that add nothing but a constant 1 to every element: what is dropped shows in the sum.
    ones = jax.tree.map(jnp.zeros_like, params)
    ones["attn"]["out"]["bias"] = jnp.ones_like(ones["attn"]["out"]["bias"])
    added = (np.asarray(run(ones, jax.random.key(0))) - X).round(3)
    assert set(np.unique(added)) == {0.0, 2.0, 4.0, 6.0}  # each of the 3 blocks drew for itself


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 0}, "width=0 must be a whole number of at least 1"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"heads": 3}, "heads=3 does not divide TransformerTower.width=8"),
        ({"mlp_dim": -1}, "mlp_dim=-1"),
        ({"norm": "layer_norm"}, "norm='layer_norm' is unknown.*layernorm"),
        ({"activation": "gleu"}, "activation='gleu' is unknown.*gelu"),
        ({"dtype": "float16"}, "dtype='float16' is unknown.*bfloat16"),
        ({"remat": "all"}, "remat='all': 'all' is unknown"),
        ({"remat": "q,hiden"}, "remat='q,hiden': 'hiden' is unknown.*hidden"),
        ({"offload": "q", "remat": "none"}, "offload='q' is for policies that name what they keep"),
        ({"offload": "lean", "remat": "lean"}, "offload='lean': 'lean' is unknown"),
        ({"attention": "cudnn"}, "attention='cudnn' computes in bfloat16"),
        ({"attention": "flash"}, "attention='flash' is unknown.*splash"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"eps": 0}, "eps=0 must be above 0"),
        ({"scan_unroll": 0}, "scan_unroll=0"),
        ({"reduce_dtype": "float16"}, "reduce_dtype='float16' is unknown.*bfloat16"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, words):
    with pytest.raises(ClipjaxError, match=words):
        dataclasses.replace(CONFIG, **fields)
