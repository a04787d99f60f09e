"""Captions from pictures: `Predictor.caption`, on any mesh, and the same of a real CoCa."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.errors import ClipjaxError
from clipjax.generation import Beam, ContrastiveSearch, Greedy, Sample, SpecialTokens
from clipjax.generation.generate import compiled
from clipjax.mesh import MeshShape, batch_sharding
from clipjax.models import CoCa
from clipjax.models.coca import CaptionDecoder, Poolers
from clipjax.params import abstract, map_with_path, merge, split
from clipjax.predictor import Predictor
from clipjax.sharding import Sharding
from clipjax.towers import TextTransformer, ViT

STRATEGIES = {
    "greedy": Greedy(),
    "beam": Beam(width=3),
    "sample": Sample(top_k=8, top_p=0.95),
    "contrastive": ContrastiveSearch(k=3, repetition_penalty=1.2),
}
LENGTH = 9


@pytest.fixture(scope="module")
def predictor(scribe, words):
    def make(**settings):
        common = {"tokenizer": words, "context_length": LENGTH, "image_size": 8}
        return Predictor.from_module(scribe(3), **common | settings)

    return make


@pytest.mark.parametrize("name", STRATEGIES)
def test_captions_depend_on_neither_batch_nor_mesh(name, predictor, pictures):
    strategy, prompts = STRATEGIES[name], ["w5", "", "w3 w4"] * 3 + ["", "w12"]
    one = predictor(batch_size=11).generate(pictures, strategy, prompts, seed=3)
    assert one.tokens.shape == (11, LENGTH) and one.tokens.dtype == np.int32
    assert len(set(map(bytes, one.tokens))) > 5
    many = predictor(mesh=MeshShape(2, 2, 2).build(), batch_size=4)
    generated = many.generate(pictures, strategy, prompts, seed=3)
    np.testing.assert_array_equal(generated.tokens, one.tokens)
    np.testing.assert_allclose(generated.scores, one.scores, atol=1e-5)


def test_no_device_waits_for_another_but_to_stop(scribe, pictures):
    """In the loop nothing travels but whether all have ended; at its end, the captions."""
    mesh = MeshShape(2, 4).build()
    graphdef, params, state = split(scribe(3))
    function = compiled(graphdef, Beam(width=3), SpecialTokens(bos=1, eos=2, pad=0), mesh)
    columns = (pictures[:8], np.ones((8, 5), np.int32), np.ones(8, np.int32), np.arange(8))
    batch = jax.device_put(columns, batch_sharding(mesh))
    text = function.lower(params, state, batch, 0).compile().as_text()
    collective = r"= (\S+?)(?:\{\S*)? (?:all-|collective|reduce-scatter)[a-z-]+\("
    assert set(re.findall(collective, text)) == {"pred[]", "f32[8]", "s32[8,5]"}


def test_captions_are_text_and_begin_with_the_prompt(predictor, pictures):
    model = predictor()
    captions = model.caption(pictures, prompt="w3 w4 ")
    assert captions == model.decode(model.generate(pictures, prompt="w3 w4"))
    assert all(c.startswith("w3 w4") and "w1 " not in c for c in captions)
    assert model.caption(list(pictures[:2]), prompt=["w3 w4", "w7"])[1].startswith("w7")
    assert model.caption([]) == []
    # One picture gives one caption, and arrays of jax are pictures too.
    first = model.caption(pictures[0], prompt="w3 w4")
    assert first == captions[0] == model.caption(jnp.asarray(pictures[0]), prompt="w3 w4")
    assert model.generate(pictures[0]).tokens.shape[0] == 1
    read = []
    assert captions == model.caption_rows(
        lambda rows: read.append(rows) or pictures[rows], len(pictures), prompt="w3 w4"
    )
    assert np.concatenate(read).tolist() == list(range(11))
    assert max(len(c.split()) for c in model.caption(pictures, Greedy(max_length=3))) == 3


def test_one_compilation_whatever_the_prompt_the_seed_and_the_number(predictor, pictures):
    model, strategy = predictor(batch_size=4), Sample()
    first = model.caption(pictures, strategy, seed=1)
    assert model.caption(pictures[:3], strategy, prompt="w4", seed=2**40 + 1) != first[:3]
    other = model.with_params(jax.tree.map(lambda p: 0.5 * p, model.params))
    assert other.caption(pictures, strategy, seed=1) != first
    (function,) = model._captioners.values()
    assert function._cache_size() == 1


def test_what_cannot_be_captioned_is_refused(predictor, pictures, words):
    model = predictor()
    with pytest.raises(ClipjaxError, match="2 prompts for 11 pictures"):
        model.caption(pictures, prompt=["a", "b"])
    with pytest.raises(ClipjaxError, match=r"prompt 'w3( w3)+' leaves no room in captions of 9"):
        model.caption(pictures, prompt="w3 " * 8)
    assert model.caption(pictures[:1], prompt="w3 " * 7)[0].startswith("w3 " * 7)
    with pytest.raises(ClipjaxError, match="max_length=9 is more than the 8 tokens"):
        model.caption(pictures, Greedy(max_length=9))
    with pytest.raises(ClipjaxError, match="min_length=8 leaves no room"):
        model.caption(pictures, Greedy(min_length=8))
    with pytest.raises(ClipjaxError, match="no tokenizer"):
        predictor(tokenizer=None).caption(pictures)

    class Mute(nnx.Module):
        pass

    settings = {"tokenizer": words, "context_length": LENGTH, "image_size": 8}
    with pytest.raises(ClipjaxError, match="the kind Mute, has no captioning decoder"):
        Predictor.from_module(Mute(), **settings).caption(pictures)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Greedy(max_length=0), "Greedy: max_length=0 must be at least 1"),
        (lambda: Greedy(min_length=-1), "min_length=-1 must be at least 0"),
        (lambda: Greedy(min_length=3, max_length=3), "leaves no room for the end token"),
        (lambda: Greedy(repetition_penalty=0.0), "repetition_penalty=0.0 must be above 0"),
        (lambda: Beam(width=0), "Beam: width=0"),
        (lambda: Sample(temperature=0.0), "Greedy is the limit"),
        (lambda: Sample(top_k=0), "top_k=0"),
        (lambda: Sample(top_p=1.5), "top_p=1.5"),
        (lambda: ContrastiveSearch(alpha=1.1), "alpha=1.1 must be from 0 to 1"),
        (lambda: ContrastiveSearch(k=0), "k=0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ClipjaxError, match=message):
        make()


def test_a_tokenizer_without_bos_needs_a_prompt(predictor, pictures, words):
    class NoBos:
        pad_id, bos_id, eos_id = words.pad_id, None, words.eos_id

        def encode(self, texts, context_length):
            rows = words.encode(texts, context_length + 1)[:, 1:]
            return rows

        decode = staticmethod(words.decode)

    model = predictor(tokenizer=NoBos())
    with pytest.raises(ClipjaxError, match="no token to begin a caption with: give a prompt"):
        model.caption(pictures)
    assert all(c.startswith("w4") for c in model.caption(pictures, prompt="w4"))


@pytest.fixture(scope="module")
def coca():
    sizes = {"width": 16, "heads": 2}
    model = CoCa(
        image=ViT(image_size=8, patch_size=4, depth=1, pool="mean", **sizes),
        text=TextTransformer(
            vocab_size=13, context_length=LENGTH, depth=1, eos_id=2, pool="class", **sizes
        ),
        decoder=CaptionDecoder(depth=2, **sizes),
        poolers=Poolers(queries=4, heads=2),
        embed_dim=8,
    )
    graphdef, shapes, state = abstract(lambda: model.build(nnx.Rngs(0)))
    assert not state
    # Large enough for pictures and the past to matter, which they hardly do as drawn by `build`.
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path.endswith(("bias", "scale")):
            return jnp.full(leaf.shape, float(path.endswith("scale")))
        std = 2 * leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 1.0
        return jnp.asarray(rng.normal(0, std, leaf.shape), jnp.float32)

    return graphdef, map_with_path(draw, shapes), state


@pytest.mark.parametrize("name", STRATEGIES)
def test_coca_cached_equals_uncached_token_by_token(name, coca, pictures, complete):
    module = merge(*coca)
    memory = module.caption_memory(pictures)
    prompts = [[], [5], [7, 3]] * 3 + [[], [9]]
    cached = complete(module, memory, STRATEGIES[name], LENGTH, prompts)
    uncached = complete(module, memory, STRATEGIES[name], LENGTH, prompts, use_cache=False)
    np.testing.assert_array_equal(cached[0], uncached[0])
    np.testing.assert_allclose(cached[1], uncached[1], rtol=1e-4, atol=1e-4)
    assert len(set(map(bytes, cached[0]))) > 5


def test_coca_captions_alike_however_its_weights_are_laid_out(coca, pictures, words):
    graphdef, params, state = coca
    settings = {"tokenizer": words, "context_length": LENGTH, "image_size": 8}
    one = Predictor(graphdef, params, state, **settings).generate(pictures)
    mesh = MeshShape(2, 2, 2).build()
    layout = Sharding(fsdp=True, min_size=1).apply(params, mesh)
    spread = Predictor(graphdef, jax.device_put(params, layout), state, mesh=mesh, **settings)
    many = spread.generate(pictures)
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_allclose(many.scores, one.scores, atol=1e-4)
