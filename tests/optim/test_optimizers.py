"""Update rules against NumPy written from the papers; groups, decay and freezing by path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipjax.errors import ClipjaxError
from clipjax.optim import SGD, Adafactor, AdamW, Constant, Duration, Ema, Group, Lion, Muon, Scale
from clipjax.params import join, select

SCALE = Scale(batch_size=8, num_examples=80)


def make_params():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 4, 6)).astype(np.float32)
    return {
        "image": {"blocks": {"fc1": {"kernel": kernel, "bias": np.ones((3, 6), np.float32)}}},
        "text": {"embedding": rng.normal(size=(5, 4)).astype(np.float32)},
        "logit_scale": np.float32(2.0),
    }


def make_grads(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(size=np.shape(p)).astype(np.float32), make_params())


def run(optimizer, steps=3, params=None):
    """Parameters after `steps` updates with fixed gradients."""
    params = make_params() if params is None else params
    mask = optimizer.trainable(params)
    moving, frozen = select(mask, params)
    transform, _ = optimizer.build(moving, steps, SCALE)
    state = transform.init(moving)
    for step in range(steps):
        grads, _ = select(mask, make_grads(step))
        updates, state = transform.update(grads, state, moving)
        moving = optax.apply_updates(moving, updates)
    return join(moving, frozen), state


def expected(rule, lr, weight_decay, steps=3):
    """`p <- p - lr * (rule(g) + wd * p)`, decay on kernels and embeddings only, in float64."""
    flat = jax.tree_util.tree_leaves_with_path(make_params())
    out = []
    for i, (path, p) in enumerate(flat):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        p, memory = np.float64(p), {}
        wd = weight_decay if name.endswith(("kernel", "embedding")) else 0.0
        for step in range(steps):
            g = np.float64(jax.tree.leaves(make_grads(step))[i])
            p = p - lr * (rule(g, memory, step + 1) + wd * p)
        out.append(p)
    return jax.tree.unflatten(jax.tree.structure(make_params()), out)


def adam(g, memory, t, b1=0.9, b2=0.98, eps=1e-6):
    memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
    memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g * g
    return memory["m"] / (1 - b1**t) / (np.sqrt(memory["v"] / (1 - b2**t)) + eps)


def lion(g, memory, t, b1=0.9, b2=0.99):
    m = memory.get("m", 0)
    memory["m"] = b2 * m + (1 - b2) * g
    return np.sign(b1 * m + (1 - b1) * g)


def momentum(g, memory, t):
    memory["m"] = 0.9 * memory.get("m", 0) + g
    return memory["m"]


@pytest.mark.parametrize(
    ("optimizer", "rule"), [(AdamW, adam), (Lion, lion), (SGD, momentum)], ids=lambda x: x.__name__
)
def test_updates_follow_the_papers(optimizer, rule):
    config = optimizer(lr=0.01, weight_decay=0.3, clip_norm=None, schedule=Constant())
    got, _ = run(config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        got,
        expected(rule, 0.01, 0.3),
    )


def test_muon_orthogonalizes_every_layer_of_a_stack():
    config = Muon(
        lr=1.0, weight_decay=0.0, clip_norm=None, momentum=0.0, nesterov=False, schedule=Constant()
    )
    got, _ = run(config, steps=1)
    update = (
        make_params()["image"]["blocks"]["fc1"]["kernel"] - got["image"]["blocks"]["fc1"]["kernel"]
    )
    singular = np.linalg.svd(update / (0.2 * 6**0.5), compute_uv=False)
    assert singular.shape == (3, 4)
    assert ((singular > 0.5) & (singular < 1.4)).all()  # Newton-Schulz brings them near 1
    raw = np.linalg.svd(make_grads(0)["image"]["blocks"]["fc1"]["kernel"], compute_uv=False)
    assert raw.max() / raw.min() > 2 * singular.max() / singular.min()
    adam_part = make_params()["text"]["embedding"] - got["text"]["embedding"]
    np.testing.assert_allclose(np.abs(adam_part), 1.0, rtol=1e-3)  # Adam's first step has size lr


def test_adafactor_keeps_rows_and_columns_instead_of_the_second_moment():
    params = {"kernel": np.zeros((256, 512), np.float32)}
    config = Adafactor(lr=0.1, weight_decay=0.0, clip_norm=None, b1=0.0, schedule=Constant())
    transform, _ = config.build(params, 1, SCALE)
    state = transform.init(params)
    second = sum(x.size for x in jax.tree.leaves(state) if x.dtype == jnp.float32)
    assert second < 2 * (256 + 512)
    row, col = np.linspace(1, 2, 256)[:, None], np.linspace(1, 3, 512)[None]
    grads = {"kernel": (row * col).astype(np.float32)}  # rank one: the factored estimate is exact
    updates, _ = transform.update(grads, state, params)
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-2)  # g / sqrt(g^2) = 1


@pytest.mark.parametrize("optimizer", [AdamW, Lion])
def test_bfloat16_momentum(optimizer):
    _, state = run(optimizer(lr=0.01, mu_dtype="bfloat16"))
    dtypes = {x.dtype for x in jax.tree.leaves(state) if x.ndim == 3}
    assert jnp.dtype(jnp.bfloat16) in dtypes


def test_groups_scale_decay_and_freeze():
    base = dict(lr=0.01, weight_decay=0.0, clip_norm=None, schedule=Constant())
    plain, _ = run(SGD(**base))
    groups = (
        Group("^text/", lr=0.5),
        Group("fc1/bias$", weight_decay=1.0),
        Group("^image/", frozen=True),
    )
    got, state = run(SGD(**base, groups=groups))
    start = make_params()
    np.testing.assert_allclose(
        got["text"]["embedding"] - start["text"]["embedding"],
        0.5 * (plain["text"]["embedding"] - start["text"]["embedding"]),
        rtol=1e-4,
    )
    block = got["image"]["blocks"]["fc1"]
    np.testing.assert_array_equal(block["kernel"], start["image"]["blocks"]["fc1"]["kernel"])
    assert not np.allclose(
        block["bias"], plain["image"]["blocks"]["fc1"]["bias"]
    )  # first match wins
    assert all(x.ndim < 3 for x in jax.tree.leaves(state))  # nothing is kept for frozen leaves


def test_clipping_bounds_the_global_norm():
    config = SGD(lr=1.0, weight_decay=0.0, momentum=0.0, clip_norm=0.5, schedule=Constant())
    got, _ = run(config, steps=1)
    moved = jax.tree.map(lambda a, b: np.float64(a - b), got, make_params())
    assert np.sqrt(sum((m**2).sum() for m in jax.tree.leaves(moved))) == pytest.approx(
        0.5, rel=1e-5
    )


def test_refusals_name_the_remedy():
    params = make_params()
    with pytest.raises(ClipjaxError, match="'\\^img/' matches no parameter"):
        AdamW(groups=(Group("^img/", frozen=True),)).trainable(params)
    with pytest.raises(ClipjaxError, match="freeze every parameter"):
        AdamW(groups=(Group(".*", frozen=True),)).trainable(params)
    with pytest.raises(ClipjaxError, match="no regular expression"):
        AdamW(groups=(Group("(", frozen=True),)).trainable(params)
    with pytest.raises(ClipjaxError, match="clip_norm=0"):
        AdamW(clip_norm=0)


def test_ema_closed_form():
    ema = Ema(decay=0.5)
    average, params = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    for step in range(4, 8):
        average = ema.update(average, params, jnp.int32(step))
    keep = np.prod([min(0.5, (1 + s) / (10 + s)) for s in range(4, 8)])
    assert float(average["w"]) == pytest.approx(1 - keep)


def test_a_group_that_starts_later_stands_still_until_then():
    """SGD with fixed gradients: after 5 steps, a leaf that starts at step 2 has moved 3 times."""
    plain = dict(lr=0.5, weight_decay=0.1, momentum=0.0, clip_norm=None, schedule=Constant())
    late = Group("^text/", starts=Duration(16, "examples"))  # 2 steps of 8
    params, _ = run(SGD(groups=(late,), **plain), steps=5)
    embedding = np.float64(make_params()["text"]["embedding"])
    for step in range(2, 5):
        gradient = np.float64(make_grads(step)["text"]["embedding"])
        embedding = embedding - 0.5 * (gradient + 0.1 * embedding)
    np.testing.assert_allclose(params["text"]["embedding"], embedding, rtol=1e-5)
    others, _ = run(SGD(**plain), steps=5)
    np.testing.assert_array_equal(params["logit_scale"], others["logit_scale"])
