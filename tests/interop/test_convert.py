"""Import and export as a user meets them: from the command line, and refused where they must be."""

import dataclasses
import json
from pathlib import Path

import jax
import named_weights
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

import clipjax
from clipjax import ClipjaxError, Pretrained
from clipjax.cli import main
from clipjax.data import BPE, Resize
from clipjax.data.tokenizers import cleaned
from clipjax.interop import export_weights, import_weights, open_clip
from clipjax.interop.convert import FAMILIES
from clipjax.interop.family import Description, differences
from clipjax.interop.resample import resample_positions, with_context_length, with_image_size
from clipjax.interop.tokens import renumbered, tokenizer_files
from clipjax.models import DualEncoder, Lora
from clipjax.params import abstract, map_with_path, paths
from clipjax.start import StartFrom
from clipjax.towers import TextTransformer, ViT

CAPTIONS = ["a red apple", "two green apples on a table", "ÉTÉ à la plage", "x"]
TEXTS = [
    *CAPTIONS,
    "  Red\tAPPLE ",
    "<eos> 日本 unseen!",
    "“a” ﬁsh’s ＲＥＤ！",
    "red &amp;amp; blue",
]
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
SHAPE = {"width": 32, "depth": 2, "heads": 2}
OURS = DualEncoder(
    image=ViT(image_size=16, patch_size=8, pre_norm=True, patch_bias=False, **SHAPE),
    text=TextTransformer(vocab_size=300, context_length=12, **SHAPE),
    embed_dim=16,
)


@pytest.fixture(scope="module")
def ours():
    """A model of our own, as a run leaves it: our BPE, whose end token has the number 2."""
    _, params, state = abstract(lambda: OURS.build(nnx.Rngs(0)))
    params = map_with_path(lambda path, leaf: named_weights.tensor(path, leaf.shape), params)
    tokenizer = BPE(vocab_size=300, clean="repair").build(CAPTIONS)
    return Pretrained(OURS, params, state, tokenizer, 12, 16, Resize("crop", half_pixel="down"))


@pytest.fixture
def clip_folder(golden, tmp_path):
    return golden("hf_clip_quick").write(tmp_path / "source")


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    return code, capsys.readouterr()


def same_params(a, b):
    a, b = dict(paths(a.params)), dict(paths(b.params))
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_the_command_line_imports_and_exports(clip_folder, tmp_path, capsys):
    code, said = run(capsys, "import", clip_folder, "--out", tmp_path / "model")
    assert code == 0
    assert "pictures of 24 px, texts of 12 tokens, no tokenizer" in said.out
    code, said = run(capsys, "export", tmp_path / "model", "--to", "hf", "--out", tmp_path / "back")
    assert code == 0 and said.out.strip().endswith("CLIPModel")
    original = load_file(clip_folder / "model.safetensors")
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name]) for name in original)
    code, _ = run(capsys, "export", clip_folder, "--to", "clipjax", "--out", tmp_path / "again")
    assert code == 0
    one, other = (clipjax.open_pretrained(tmp_path / n) for n in ("model", "again"))
    assert one.model == other.model and same_params(one, other)


def test_other_peoples_weights_open_like_ours(clip_folder, golden):
    opened = clipjax.open_pretrained(clip_folder)
    assert same_params(opened, clipjax.open_pretrained(clip_folder / "model.safetensors"))
    case = golden("hf_clip_quick")
    predictor = clipjax.load(clip_folder)
    np.testing.assert_allclose(
        predictor.encode_image(case.images), case.outputs["image"], rtol=0, atol=1e-4
    )


@pytest.fixture(scope="module")
def our_embeddings(ours):
    predictor = ours.predictor(batch_size=8)
    return predictor.encode_image(PICTURES), predictor.encode_text(TEXTS)


@pytest.mark.parametrize("to", ["hf", "open_clip"])
def test_our_own_model_comes_back_with_its_tokenizer(ours, our_embeddings, to, tmp_path):
    export_weights(ours, tmp_path / "out", to)
    again = import_weights(tmp_path / "out")
    assert again.resize.mode == "crop" and again.context_length == 12
    # Hugging Face's CLIP forbids 2 as the end token: its number has changed, no text's embedding has.
    assert again.tokenizer.eos_id == (299 if to == "hf" else 2)
    after = again.predictor(batch_size=8)
    image, text = our_embeddings
    np.testing.assert_allclose(after.encode_text(TEXTS), text, atol=1e-6)
    np.testing.assert_allclose(after.encode_image(PICTURES), image, atol=1e-6)


def test_other_peoples_weights_are_evaluated_as_they_are(ours, tmp_path, capsys):
    """In one table with the same model as a folder of ours, and to the same figures."""
    ours.save(tmp_path / "model")
    export_weights(ours, tmp_path / "hf", "hf")
    for name, picture in zip(("apple", "table"), PICTURES, strict=True):
        (tmp_path / "classes" / name).mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / "classes" / name / "0.png")
    models = [tmp_path / "model", tmp_path / "hf"]
    code, said = run(
        capsys, "eval", *models, "--dataset", tmp_path / "classes", "--calibration", "--json"
    )
    assert code == 0, said.err
    model, hf = json.loads(said.out.splitlines()[-1]).values()
    assert model.keys() == hf.keys() and len(model) > 3
    assert all(model[name] == pytest.approx(hf[name], abs=1e-5) for name in model)


def test_low_rank_updates_are_exported_in_the_kernels(ours, tmp_path, capsys):
    """And averages are of the kernels, so that an adapted model mixes with its base."""
    model = Lora(OURS, rank=2)
    rng = np.random.default_rng(0)
    _, params, state = abstract(lambda: model.build(nnx.Rngs(0)))
    params = map_with_path(lambda p, x: rng.normal(size=x.shape).astype(np.float32), params)
    params["base"] = ours.params
    adapted = dataclasses.replace(ours, model=model, params=params, model_state=state)
    adapted.save(tmp_path / "adapted")
    ours.save(tmp_path / "base")
    folded = dict(paths(adapted.folded().params))
    kernel = "image/blocks/attn/q/kernel"
    before = dict(paths(ours.params))[kernel]
    assert np.abs(folded[kernel] - before).max() > 0.1
    for to in ("hf", "clipjax"):
        command = ("export", tmp_path / "adapted", "--to", to, "--out", tmp_path / to)
        assert run(capsys, *command)[0] == 0
        found = dict(paths(clipjax.open_pretrained(tmp_path / to).params))
        np.testing.assert_array_equal(found[kernel], folded[kernel])
    command = ("average", tmp_path / "base", tmp_path / "adapted", "--out", tmp_path / "mixed")
    assert run(capsys, *command)[0] == 0
    mixed = dict(paths(clipjax.open_pretrained(tmp_path / "mixed").params))
    np.testing.assert_allclose(mixed[kernel], (before + folded[kernel]) / 2, rtol=1e-5, atol=1e-6)


def test_renumbering_swaps_two_tokens_everywhere(ours):
    swapped = renumbered(ours)
    before, after = (np.asarray(p.params["text"]["embedding"]) for p in (ours, swapped))
    order = np.arange(300)
    order[[2, 299]] = 299, 2
    np.testing.assert_array_equal(after, before[order])
    ids, new = (p.tokenizer.encode(CAPTIONS, 12) for p in (ours, swapped))
    np.testing.assert_array_equal(new, order[ids])


def test_half_precision_becomes_float32(clip_folder):
    import ml_dtypes

    file = clip_folder / "model.safetensors"
    tensors = load_file(file)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        save_file({n: t.astype(dtype) for n, t in tensors.items()}, file)
        embedding = import_weights(clip_folder).params["text"]["embedding"]
        assert embedding.dtype == np.float32
        name = "text_model.embeddings.token_embedding.weight"
        np.testing.assert_array_equal(embedding, tensors[name].astype(dtype).astype(np.float32))


def test_every_tensor_is_accounted_for(clip_folder):
    file = clip_folder / "model.safetensors"
    tensors = load_file(file)
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"

    def refused(message, **changes):
        changed = {n: t for n, t in (tensors | changes).items() if t is not None}
        save_file(changed, file)
        with pytest.raises(ClipjaxError, match=message):
            import_weights(clip_folder)

    refused(f"the weights lack '{name}'", **{name: None})
    refused("they hold 'adapter', which the model has no place for", adapter=tensors["logit_scale"])
    refused(
        f"lack '{name}'; they hold '{name}s', which.*did you mean '{name}'",
        **{name: None, name + "s": tensors[name]},
    )
    refused(rf"'{name}' has shape \[95, 48\].*makes it \[96, 48\]", **{name: tensors[name][:-1]})
    refused("'logit_scale' has shape", logit_scale=np.ones(2, np.float32))
    refused(f"'{name}' holds int8.*quantized", **{name: tensors[name].astype(np.int8)})
    position_ids = {"text_model.embeddings.position_ids": np.arange(12)[None]}
    save_file(tensors | position_ids, file)  # a buffer of older transformers: no parameter
    import_weights(clip_folder)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        (
            "text_config",
            "hidden_act",
            "quick_gelo",
            "hidden_act='quick_gelo' is unknown; did you mean",
        ),
        ("text_config", "num_attention_heads", 5, "heads=5 does not divide"),
        ("vision_config", "num_hidden_layers", 4, "lack 'vision_model.encoder.layers.3"),
        ("vision_config", "num_hidden_layers", 2, "hold 'vision_model.encoder.layers.2"),
        ("vision_config", "patch_size", 12, "embedding.weight' has shape"),
        ("text_config", "eos_token_id", [1, 2], "eos_token_id=\\[1, 2\\] is not supported"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(part, field, value, message, clip_folder):
    path = clip_folder / "config.json"
    facts = json.loads(path.read_text())
    facts[part][field] = value
    path.write_text(json.dumps(facts))
    with pytest.raises(ClipjaxError, match=message):
        import_weights(clip_folder)


def test_what_is_missing_is_named(clip_folder, tmp_path, capsys):
    (clip_folder / "config.json").rename(tmp_path / "elsewhere.json")
    code, said = run(capsys, "import", clip_folder, "--out", tmp_path / "model")
    assert code == 2 and "there is no config.json beside the weights" in said.err
    assert not (tmp_path / "model").exists()
    config = ["--config", tmp_path / "elsewhere.json"]
    assert run(capsys, "import", clip_folder, "--out", tmp_path / "model", *config)[0] == 0
    code, said = run(capsys, "import", clip_folder, "--out", tmp_path / "model", *config)
    assert code == 2 and "exists and is not empty" in said.err
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipjaxError, match="holds no weights under a usual name"):
        import_weights(tmp_path / "empty")
    code, said = run(capsys, "import", tmp_path / "empty", "--out", tmp_path / "x")
    assert code == 2 and "holds no weights under a usual name" in said.err
    save_file({"a.b": np.ones(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(ClipjaxError, match=r"\(a.b, ...\) are of no family"):
        import_weights(tmp_path / "odd.safetensors")
    (clip_folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ClipjaxError, match="preprocessor_config.json is missing or no JSON"):
        import_weights(clip_folder)


def test_openais_names_need_to_be_told_from_openclips(golden, tmp_path, capsys):
    case = golden("openai_vit")
    scalars = ("input_resolution", "context_length", "vocab_size")
    bare = {n: t for n, t in case.tensors.items() if n not in scalars}
    save_file(bare, tmp_path / "weights.safetensors")
    out = ["--out", tmp_path / "model"]
    code, said = run(capsys, "import", tmp_path / "weights.safetensors", *out)
    assert code == 2 and "--family openai" in said.err
    code, said = run(capsys, "import", tmp_path / "weights.safetensors", *out, "--family", "open")
    assert code == 2 and "only 'openai'" in said.err
    assert (
        run(capsys, "import", tmp_path / "weights.safetensors", *out, "--family", "openai")[0] == 0
    )
    assert clipjax.open_pretrained(tmp_path / "model").model.image.activation == "quick_gelu"


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        ({"image": {"norm": "rmsnorm"}}, "hf", r"model.image.norm='rmsnorm'"),
        ({"image": {"pool": "mean"}}, "hf", r"model.image.pool='mean': there it is 'class'"),
        ({"image": {"pre_norm": False}}, "hf", r"model.image.pre_norm=False"),
        ({"image": {"positions": "sincos2d"}}, "open_clip", r"model.image.positions='sincos2d'"),
        ({"image": {"qkv_bias": False}}, "open_clip", r"model.image.qkv_bias=False"),
        ({"text": {"pool": "mean"}}, "open_clip", r"model.text.pool='mean'"),
        ({"text": {"causal": False}}, "hf", r"model.text.causal=False"),
        (
            {"text": {"activation": "gelu_tanh"}},
            "openai",
            r"activation='gelu': there.*'quick_gelu'",
        ),
        ({"logit_bias_init": -10.0}, "hf", r"model.logit_bias_init=-10.0: there it is None"),
        ({"image_projection": "affine"}, "open_clip", r"image_projection='affine'"),
        ({}, "big_vision", r"model.image.activation='gelu': there it is 'gelu_tanh'"),
        ({"image": {"image_size": (16, 32)}}, "hf", r"only squares"),
        ({}, "hff", r"no format 'hff'; did you mean 'hf'"),
    ],
)
def test_what_a_format_cannot_express_is_refused_by_field(change, to, message, tmp_path):
    towers = {
        s: dataclasses.replace(getattr(OURS, s), **change.pop(s, {})) for s in ("image", "text")
    }
    model = dataclasses.replace(OURS, **towers, **change)
    bare = Pretrained(model, {}, {}, None, 12, 16)
    with pytest.raises(ClipjaxError, match=message):
        export_weights(bare, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "width", "name"),
    [
        ("B/16", 768, "vit_base_patch16_siglip_224"),
        ("So400m/14", 1152, "vit_so400m_patch14_siglip_224"),
    ],
)
def test_full_size_siglip_has_its_timm_name(size, width, name):
    image = ViT.preset(size, pool="map", eps=1e-6)
    text = TextTransformer(
        width=width, heads=12 if width == 768 else 16, vocab_size=32000, context_length=64, eps=1e-6,
        pool="last", pad_id=None, causal=False, mlp_dim=image.mlp_dim,
    )  # fmt: skip
    model = DualEncoder(
        image, text, embed_dim=width, logit_bias_init=-10.0, image_projection="none",
        text_projection="affine",
    )  # fmt: skip
    assert not differences(model, open_clip.OPEN_CLIP_CUSTOM.nearest(model))
    bare = Pretrained(model, {}, {}, None, 64, 224)
    facts = open_clip.OPEN_CLIP_CUSTOM.describe(bare)["open_clip_config.json"]["model_cfg"]
    assert facts["vision_cfg"]["timm_model_name"] == name


# Other sizes


def test_positions_resample_as_openclips():
    for case in json.loads((Path(__file__).parent / "goldens" / "resampled.json").read_text()):
        old, new = case["old"], case["new"]
        table = named_weights.tensor("table.positions", (old * old + 1, 3))
        ours = resample_positions(table, (old, old), (new, new))
        np.testing.assert_allclose(ours, case["table"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "size"), [("hf_clip_quick", 40), ("openai_resnet", 96), ("hf_siglip", 16)]
)
def test_another_image_size_on_request(name, size, golden, tmp_path, capsys):
    source = golden(name).write(tmp_path / "source")
    out = ["--out", tmp_path / "model", "--image_size", size]
    assert run(capsys, "import", source, *out)[0] == 0
    resized = clipjax.open_pretrained(tmp_path / "model")
    assert resized.image_size == size and resized.model.image.image_shape == (size, size)
    flat, before = dict(paths(resized.params)), dict(paths(import_weights(source).params))
    changed = [n for n in before if not np.array_equal(before[n], flat[n])]
    assert changed == [n for n in flat if n in ("image/positions", "image/pool/positions")]
    with pytest.raises(ClipjaxError, match="is no multiple"):
        with_image_size(resized, size + 1)
    back = with_image_size(resized, size)
    assert same_params(back, resized)


def test_a_model_of_ones_own_at_another_size(ours, tmp_path, capsys):
    """From the command line as in Python, and refused where there is nothing to choose."""
    ours.save(tmp_path / "model")
    out = ["--out", tmp_path / "larger", "--image_size", 32]
    code, said = run(capsys, "import", tmp_path / "model", *out)
    assert code == 0, said.err
    larger = clipjax.open_pretrained(tmp_path / "larger")
    assert larger.image_size == 32 and same_params(larger, with_image_size(ours, 32))
    other = ["--out", tmp_path / "x", "--family", "openai"]
    code, said = run(capsys, "import", tmp_path / "model", *other)
    assert code == 2 and "is clipjax's own" in said.err


def test_a_run_starts_at_another_size(ours):
    wanted = dataclasses.replace(
        OURS,
        image=dataclasses.replace(OURS.image, image_size=32),
        text=dataclasses.replace(OURS.text, context_length=8),
    )
    _, params, state = abstract(lambda: wanted.build(nnx.Rngs(0)))
    start = StartFrom("somewhere")
    with pytest.raises(ClipjaxError, match="positions' has shape"):
        start.leaves(params, state, lambda path: ours)
    leaves, _ = StartFrom("somewhere", resample=True).leaves(params, state, lambda path: ours)
    larger = with_context_length(with_image_size(ours, 32), 8)
    assert leaves.keys() == dict(paths(larger.params)).keys()
    for name, leaf in paths(larger.params):
        np.testing.assert_array_equal(leaves[name], leaf)


def test_a_shorter_context_on_request(golden, tmp_path, capsys):
    source = golden("hf_clip_quick").write(tmp_path / "source")
    out = ["--out", tmp_path / "model", "--context_length", 8]
    assert run(capsys, "import", source, *out)[0] == 0
    shorter, whole = clipjax.open_pretrained(tmp_path / "model"), import_weights(source)
    assert shorter.context_length == 8 and shorter.model.text.context_length == 8
    np.testing.assert_array_equal(
        shorter.params["text"]["positions"], whole.params["text"]["positions"][:8]
    )
    code, said = run(capsys, "import", source, "--out", tmp_path / "m", "--context_length", 13)
    assert code == 2 and "positions for 12 tokens" in said.err
    siglip = import_weights(golden("hf_siglip").write(tmp_path / "siglip"))
    with pytest.raises(ClipjaxError, match="pools the last of exactly 12"):
        with_context_length(siglip, 8)
    coca = import_weights(golden("open_clip_coca").write(tmp_path / "coca"))
    assert with_context_length(coca, 8).params["text"]["positions"].shape[0] == 9


def test_older_big_vision_files_have_no_prefix(golden, tmp_path):
    case = golden("big_vision_lit")
    tensors = {n.removeprefix("params/"): t for n, t in case.tensors.items()}
    np.savez(tmp_path / "lit.npz", **tensors)
    case.write(tmp_path / "new")
    assert same_params(
        import_weights(tmp_path / "lit.npz"), import_weights(tmp_path / "new" / "weights.npz")
    )


def test_openclip_configurations_that_are_not_supported_are_named(golden):
    case = golden("open_clip_vit")
    shapes = {n: t.shape for n, t in case.tensors.items()}

    def refused(message, part, **changes):
        facts = json.loads(json.dumps(case.files["open_clip_config.json"]))
        facts["model_cfg"][part] |= changes
        with pytest.raises(ClipjaxError, match=message):
            open_clip.OPEN_CLIP.model(Description(shapes, {"open_clip_config.json": facts}))

    refused("pool_type='avg'", "vision_cfg", pool_type="avg")
    refused("ls_init_value=0.1", "vision_cfg", ls_init_value=0.1)
    refused("qk_norm=True", "text_cfg", qk_norm=True)
    refused("hf_model_name='roberta-base'", "text_cfg", hf_model_name="roberta-base")
    refused("timm_model_name='convnext_base'", "vision_cfg", timm_model_name="convnext_base")
    refused("pool_type='first'", "text_cfg", pool_type="first")
    refused("act_kwargs=", "text_cfg", act_kwargs={"approximate": "none"})
    refused("norm_kwargs=", "text_cfg", norm_kwargs={"bias": False})


def test_params_are_untouched_by_an_export(ours, tmp_path):
    before = jax.tree.map(np.array, ours.params)
    export_weights(ours, tmp_path / "out", "hf")
    after = dict(paths(ours.params))
    assert all(np.array_equal(after[name], leaf) for name, leaf in paths(before))


# What other libraries do otherwise, and what their configurations say that nobody here has read


def test_a_patch_bias_goes_into_the_positions(ours, tmp_path):
    """CLIP's ViTs have none: the default ViT can be written all the same, to the same embeddings."""
    image = dataclasses.replace(OURS.image, patch_bias=True)
    bias = np.linspace(-1, 1, 32, dtype=np.float32)
    patch = ours.params["image"]["patch"] | {"bias": bias}
    biased = dataclasses.replace(
        ours,
        model=dataclasses.replace(OURS, image=image),
        params=ours.params | {"image": ours.params["image"] | {"patch": patch}},
    )
    export_weights(biased, tmp_path / "out", "hf")
    again = import_weights(tmp_path / "out")
    assert not again.model.image.patch_bias
    np.testing.assert_allclose(
        again.predictor(batch_size=8).encode_image(PICTURES),
        biased.predictor(batch_size=8).encode_image(PICTURES),
        atol=1e-6,
    )


def test_an_export_says_what_its_library_does_otherwise(ours, tmp_path, caplog):
    def notes(to, **changes):
        caplog.clear()
        pretrained = dataclasses.replace(ours, **changes)
        export_weights(pretrained, tmp_path / f"{to}{len(list(tmp_path.iterdir()))}", to)
        return caplog.text

    plain = BPE(vocab_size=300).build(CAPTIONS)
    assert "half_pixel='down'" in notes("open_clip") and "mends" not in notes("open_clip")
    assert "OpenCLIP mends every text" in notes("open_clip", tokenizer=plain)
    assert "rare HTML entities" in notes("hf") and "rounds an odd" not in notes("hf")
    even = notes("hf", tokenizer=plain, resize=Resize("crop"))
    assert "rounds an odd margin down" in even and "HTML" not in even
    assert not notes("hf", tokenizer=plain, resize=Resize("squash"))


def test_all_that_a_format_cannot_express_is_named_at_once(tmp_path):
    image = dataclasses.replace(OURS.image, pool="mean", pre_norm=False)
    model = dataclasses.replace(OURS, image=image, image_projection="affine")
    with pytest.raises(ClipjaxError) as refused:
        export_weights(Pretrained(model, {}, {}, None, 12, 16), tmp_path / "out", "hf")
    clip, siglip = str(refused.value).split("\n")
    for field in ("pool='mean'", "pre_norm=False", "image_projection='affine'"):
        assert field in clip
    assert "SiglipModel cannot express" in siglip and "logit_bias_init=None" in siglip


def test_where_a_model_can_go_is_known_before_it_is_trained(capsys):
    config = Path(__file__).parents[2] / "configs" / "quickstart.py"
    code, said = run(capsys, "config", config, "--exports")
    assert code == 0
    assert "hf: yes, as CLIPModel" in said.out
    assert "open_clip: yes, as OpenCLIP's CLIP\n" in said.out
    assert "mends every text" not in said.out
    code, said = run(capsys, "config", config, "--exports", "--model.image.pool", "mean")
    assert code == 0 and "model.image.pool='mean': there it is 'class'" in said.out


def test_siglips_padding_is_not_masked(golden, tmp_path):
    """transformers masks what `attention_mask` says, and training never masked."""
    siglip = import_weights(golden("hf_siglip").write(tmp_path / "source"))
    files = tokenizer_files(
        dataclasses.replace(siglip, tokenizer=BPE(vocab_size=300).build(CAPTIONS)), siglip=True
    )
    facts = json.loads(files.files["tokenizer_config.json"])
    assert facts["model_input_names"] == ["input_ids"]


@pytest.mark.parametrize(
    ("name", "facts", "clean"),
    [
        ("hf_siglip", {"tokenizer_class": "SiglipTokenizer"}, "canonical"),
        ("hf_siglip", {"tokenizer_class": "GemmaTokenizer"}, "lower"),
        ("hf_siglip2", {"tokenizer_class": "GemmaTokenizerFast"}, "lower"),
        ("hf_siglip", {"tokenizer_class": "PreTrainedTokenizerFast"}, "keep"),
    ],
)
def test_siglip2s_texts_keep_their_punctuation(name, facts, clean, golden):
    """SigLIP 2 at one resolution is a SiglipModel: its tokenizer tells it from SigLIP."""
    case = golden(name)
    shapes = {n: t.shape for n, t in case.tensors.items()}
    description = Description(shapes, case.files | {"tokenizer_config.json": facts})
    family = next(family for family in FAMILIES if family.claims(description))
    assert family.tokens(description)["clean"] == clean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 32}}, "size={'shortest_edge': 32} is not the size"),
        ({"size": 32}, "size=32 is not the size"),
        ({"crop_size": {"height": 20, "width": 24}}, "crop_size=.* is not the size"),
        ({"size": {"longest_edge": 24}}, "only shortest_edge, or height and width"),
        ({"size": [24, 24]}, "neither a number nor an object"),
        ({"do_center_crop": False}, "pictures that are no squares"),
        ({"do_resize": False}, "do_resize=False is not supported"),
        ({"do_rescale": False}, "do_rescale=False is not supported"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=.* is not supported"),
        ({"resample": 1}, "resample=1 is not supported"),
        ({"do_sharpen": True}, "do_sharpen=True is not known here"),
    ],
)
def test_other_preprocessing_is_refused_by_field(change, message, clip_folder):
    facts = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    facts |= {"do_center_crop": True, "do_resize": True, "resample": 3}
    file = clip_folder / "preprocessor_config.json"
    file.write_text(json.dumps(facts))
    assert import_weights(clip_folder).resize == Resize("crop", half_pixel="down")
    file.write_text(json.dumps(facts | change))
    with pytest.raises(ClipjaxError, match=message):
        import_weights(clip_folder)


def test_preprocessing_in_its_older_forms(clip_folder):
    file = clip_folder / "preprocessor_config.json"
    file.write_text('{"size": 24}')
    assert import_weights(clip_folder).resize.mode == "crop"
    file.write_text('{"size": {"height": 24, "width": 24}, "do_normalize": false}')
    plain = import_weights(clip_folder)
    assert plain.resize.mode == "squash"
    assert (plain.model.image.mean, plain.model.image.std) == ((0, 0, 0), (1, 1, 1))


def test_configuration_fields_that_nobody_read_are_refused(clip_folder, golden, tmp_path):
    path = clip_folder / "config.json"
    facts = json.loads(path.read_text())
    facts["vision_config"]["use_registers"] = True
    path.write_text(json.dumps(facts))
    with pytest.raises(ClipjaxError, match="vision_config: use_registers=True is not known here"):
        import_weights(clip_folder)
    folder = golden("open_clip_vit").write(tmp_path / "oc")
    path = folder / "open_clip_config.json"
    known = json.loads(path.read_text())

    def refused(message, where, **changes):
        facts = json.loads(json.dumps(known))
        (facts["model_cfg"][where] if where else facts["model_cfg"]).update(changes)
        path.write_text(json.dumps(facts))
        with pytest.raises(ClipjaxError, match=message):
            import_weights(folder)

    refused("global_average_pool=True is not supported", "vision_cfg", global_average_pool=True)
    refused("input_patchnorm=True is not supported", "vision_cfg", input_patchnorm=True)
    refused("quick_gelu=True is not known", "vision_cfg", quick_gelu=True)
    refused("quickgelu=True is not known here.*did you mean 'quick_gelu'", None, quickgelu=True)
    known["preprocess_cfg"] = {"size": 32}
    refused("preprocess_cfg.size=32 is not the size", None)


@pytest.mark.parametrize(
    ("clean", "text", "wanted"),
    [
        # What OpenCLIP's own cleaning functions make of these.
        ("whitespace", "  Caf\xe9 “red”  ﬁsh &amp;amp; ＡＢＣ ", 'Caf\xe9 "red" fish & ABC'),
        ("lower", "A “pattypan” squash.", 'a "pattypan" squash.'),
        ("canonicalize", "A “pattypan” squash.", "a pattypan squash"),
        ("canonicalize", "snake_case — isn’t", "snake case — isnt"),
    ],
)
def test_openclip_mends_texts_before_anything_else(clean, text, wanted):
    facts = {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"clean": clean}}}}
    settings = open_clip.OPEN_CLIP.tokens(Description({}, {"open_clip_config.json": facts}))
    assert cleaned(text, settings["clean"]) == wanted


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(prefix, clip_folder):
    plain = import_weights(clip_folder)
    file = clip_folder / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    assert same_params(import_weights(clip_folder), plain)


def test_a_text_tower_alone_is_called_that(clip_folder):
    file = clip_folder / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n.startswith("text_")}, file)
    with pytest.raises(ClipjaxError, match="a text tower alone"):
        import_weights(clip_folder)


def test_a_pointer_of_git_lfs_is_called_that(tmp_path):
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid x\n"
    )
    with pytest.raises(ClipjaxError, match="pointer of Git LFS"):
        import_weights(tmp_path)
