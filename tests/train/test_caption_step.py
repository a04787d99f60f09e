"""Contrast and captions in one step: the same on every mesh, with every exchange, however it is accumulated.

Gradients are read off a plain SGD step with a large learning rate, as in test_step.py.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.batch import SpecialTokens
from clipjax.data.placement import to_global
from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape
from clipjax.models import CaptionDecoder, CoCa, DualEncoder, Poolers
from clipjax.objectives import (
    AllGather,
    Caption,
    Hierarchical,
    PairEngine,
    PerExample,
    Ring,
    Softmax,
)
from clipjax.optim import SGD, Constant, Scale
from clipjax.params import merge, paths
from clipjax.sharding import Sharding
from clipjax.towers import TextTransformer, ViT
from clipjax.train.state import Blueprint
from clipjax.train.step import make_step

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))
from drawn import begin
from jax import jit

LR = 1e4
SHAPE = {"width": 16, "heads": 4, "depth": 1, "scan": False}
MODEL = CoCa(
    image=ViT(image_size=16, patch_size=8, pool="mean", **SHAPE),
    text=TextTransformer(vocab_size=64, context_length=8, pool="class", **SHAPE),
    decoder=CaptionDecoder(**SHAPE),
    poolers=Poolers(queries=3, heads=4),
    embed_dim=16,
    logit_scale_init=5.0,
)


@dataclasses.dataclass(frozen=True)
class Tilt(PerExample):
    """A user's per-example objective: the mean first number of the images' embeddings."""

    needs = frozenset({"image"})

    def local(self, encoded, context, totals):
        value = jnp.sum(encoded["image"][:, 0]) / totals["examples"]
        return value, {"tilt": value}


TOKENS = SpecialTokens(bos=1, eos=2, pad=0)
COCA = Softmax() * 1.0 + Caption(chunk=24) * 2.0 + Tilt() * 0.5
PLAIN = SGD(lr=LR, momentum=0.0, weight_decay=0.0, clip_norm=None, schedule=Constant())


def make_batch(n=16):
    rng = np.random.default_rng(0)
    text = rng.integers(3, 64, (n, 8)).astype(np.int32)
    for row in range(
        n
    ):  # captions of different lengths: micro-batches have different numbers of tokens
        end = 2 + row % 6
        text[row, end], text[row, end + 1 :] = 2, 0
    image = rng.integers(0, 256, (n, 16, 16, 3)).astype(np.uint8)
    return {"image": image, "text": text, "id": np.arange(n, dtype=np.int32)}


def draw(model, objective, mesh, fsdp=False):
    sharding = Sharding(fsdp=fsdp, min_size=64)
    return Blueprint.draw(model, objective, PLAIN, None, mesh, sharding, 10, Scale(16, 64), seed=0)


@functools.cache
def one_step(
    objective=COCA,
    model=MODEL,
    shape=MeshShape(),  # noqa: B008
    devices=1,
    fsdp=False,
    accumulate=1,
    exchange=AllGather(),  # noqa: B008
):
    """(metrics, gradients by path, state) of one step from the same initial parameters."""
    mesh = shape.build(jax.devices()[:devices])
    blueprint = draw(model, objective, mesh, fsdp)
    step = jit(
        make_step(
            blueprint, objective, PairEngine(mesh, exchange), mesh, accumulate, tokens=TOKENS
        ),
        in_shardings=(blueprint.shardings, None),
        out_shardings=(blueprint.shardings, None),
    )
    before = begin(blueprint)
    start = {name: np.array(leaf) for name, leaf in paths(before.params)}
    after, metrics = step(before, to_global(make_batch(), mesh))
    grads = {name: (start[name] - np.array(leaf)) / LR for name, leaf in paths(after.params)}
    return {name: float(value) for name, value in metrics.items()}, grads, after


def assert_close(got, expected, tolerance=1e-5):
    assert got[0] == pytest.approx(expected[0], rel=tolerance)
    for name, reference in expected[1].items():
        if name.endswith("k/bias"):
            continue  # exactly 0 in theory: softmax does not see what shifts all of a query's scores
        worst = np.abs(got[1][name] - reference).max() / np.abs(reference).max()
        assert worst < tolerance, f"{name}: {worst:.1e}"


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"accumulate": 4, "devices": 4, "exchange": Ring(), "fsdp": True},
        {
            "accumulate": 2,
            "devices": 8,
            "shape": MeshShape(group=2, tensor=2),
            "fsdp": True,
            "exchange": Hierarchical(),
        },
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items() if k != "exchange"),
)
def test_any_way_is_the_big_batch(changes):
    got, expected = one_step(**changes), one_step()
    assert_close(got, expected)
    assert {"loss/softmax", "loss/caption", "caption/accuracy", "tilt", "logit_scale"} <= got[
        0
    ].keys()
    assert "decoder/head/kernel" in got[1]


def test_the_head_is_split_by_words():
    _, _, state = one_step(
        accumulate=2,
        devices=8,
        shape=MeshShape(group=2, tensor=2),
        fsdp=True,
        exchange=Hierarchical(),
    )
    assert tuple(state.params["decoder"]["head"]["kernel"].sharding.spec) == ("data", "tensor")


def test_accumulation_replays_dropout():
    """Against plain differentiation through all micro-batches at once, with the keys the step uses."""
    k = 2
    model = dataclasses.replace(
        MODEL,
        image=dataclasses.replace(MODEL.image, dropout=0.3, patch_dropout=0.5),
        text=dataclasses.replace(MODEL.text, dropout=0.3),
        decoder=dataclasses.replace(MODEL.decoder, dropout=0.3),
    )
    got = one_step(model=model, accumulate=k)
    blueprint = draw(model, COCA, MeshShape().build(jax.devices()[:1]))
    state = begin(blueprint)
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), 0), k)
    batch = make_batch()

    def loss(params):
        module = merge(blueprint.graphdef, params, {})
        parts = [
            module(
                {n: v[i * 8 : i * 8 + 8] for n, v in batch.items()}, key=keys[i], needs=COCA.needs
            )
            for i in range(k)
        ]
        image, text, features = (
            jnp.concatenate([p[n] for p in parts]) for n in ("image", "text", "captions")
        )
        table = parts[0].logit_scale * image @ text.T
        rows, cols = jax.nn.log_softmax(table, 1), jax.nn.log_softmax(table, 0)
        contrast = -0.5 * (jnp.diagonal(rows) + jnp.diagonal(cols)).mean()
        words = jax.nn.log_softmax(features @ parts[0].shared["caption_head"])
        nll = -jnp.take_along_axis(words, batch["text"][:, 1:, None], -1)[..., 0]
        counts = batch["text"][:, 1:] != 0
        return contrast + 2 * (nll * counts).sum() / counts.sum() + 0.5 * image[:, 0].mean()

    value, grads = jit(jax.value_and_grad(loss))(state.params)
    assert got[0]["loss"] == pytest.approx(float(value), rel=1e-5)
    assert_close(({}, got[1]), ({}, {n: np.array(g) for n, g in paths(grads)}))
    assert abs(got[0]["loss"] - one_step()[0]["loss"]) > 1e-3  # dropout was on


def test_the_first_pass_holds_no_caption_features():
    """What is kept of a micro-batch between the passes is asked for without captions."""
    asked = []

    class Spy:
        def __call__(self, *args, needs, **_):
            asked.append(needs)
            raise StopIteration

    mesh = MeshShape().build(jax.devices()[:1])
    blueprint = draw(MODEL, COCA, mesh)
    step = make_step(blueprint, COCA, PairEngine(mesh), mesh, accumulate=2, tokens=TOKENS)
    object.__setattr__(blueprint, "module", lambda *_: Spy())
    with pytest.raises(StopIteration):
        jax.eval_shape(step, blueprint.abstract, to_global(make_batch(), mesh))
    assert asked == [{"image", "text"}]


def test_models_that_do_not_fit_are_refused():
    mesh = MeshShape().build(jax.devices()[:1])
    dual = DualEncoder(
        image=MODEL.image, text=dataclasses.replace(MODEL.text, pool="eos"), embed_dim=16
    )
    step = make_step(draw(dual, COCA, mesh), COCA, PairEngine(mesh), mesh, tokens=TOKENS)
    with pytest.raises(ClipjaxError, match="'captions' is asked for"):
        jax.eval_shape(step, draw(dual, COCA, mesh).abstract, make_batch())
    captioner = CoCa(
        image=MODEL.image,
        text=None,
        unimodal=dataclasses.replace(MODEL.text, pool="none", depth=0),
        decoder=dataclasses.replace(MODEL.decoder, parallel=0.75),
        poolers=None,
    )
    with pytest.raises(ClipjaxError, match="no text embeddings: it only captions"):
        one_step(model=captioner)
    metrics, grads, _ = one_step(Caption(), captioner, accumulate=2)
    assert np.isfinite(metrics["loss"])
    assert np.abs(grads["decoder/mask_token"]).max() > 0
