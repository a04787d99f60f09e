"""DINOv3, TIPS v2 and Hugging Face's text towers, models of one tower most; and runs that begin with them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from test_goldens import outputs

from clipjax import ClipjaxError, Pretrained, open_pretrained
from clipjax.cli import main
from clipjax.data.tokenizers import TokenizerFile, load_tokenizer
from clipjax.interop import import_weights, open_clip
from clipjax.interop.exports import judge
from clipjax.interop.family import differences
from clipjax.interop.resample import with_context_length, with_image_size
from clipjax.interop.timm_towers import KINDS
from clipjax.models import DualEncoder
from clipjax.params import paths
from clipjax.pretrained import read_pretrained
from clipjax.towers import TextTransformer

TOWERS = {
    # name: image size and context length
    "hf_tips": (24, 12),
    "hf_dinov3": (24, 0),
    "hf_dinov3_gated": (24, 0),
    "hf_xlm_roberta": (0, 13),
    "hf_jina": (0, 64),
    "hf_mt5": (0, 512),
    "hf_modernbert": (0, 64),
    "hf_gemma": (0, 64),
    "hf_gemma3": (0, 64),
    "hf_embeddinggemma": (0, 64),
}
TINY = Path(__file__).parents[1] / "train" / "tiny.py"
CONFIG = """
import dataclasses
from clipjax.data import TokenizerFile
from clipjax import StartFrom, Together, load_config, open_pretrained
from clipjax.models import DualEncoder
from clipjax.optim import Group

def config():
    run = load_config({tiny!r})
    image = dataclasses.replace(open_pretrained({image!r}).tower("image"), drop_path=0.3)
    text = dataclasses.replace(open_pretrained({text!r}).tower("text"), eos_id=1)
    return dataclasses.replace(
        run,
        model=DualEncoder(image, text, embed_dim=8),
        data=dataclasses.replace(run.data, image_size=24, tokenizer=TokenizerFile({words!r})),
        start=Together(parts=(
            StartFrom({image!r}, fresh="^text|_projection/|^logit"),
            StartFrom({text!r}, fresh="^image|_projection/|^logit"),
        )),
        optimizer=dataclasses.replace(run.optimizer, groups=(Group("^text/", frozen=True),)),
        evals=(),
    )
"""


def vocabulary(folder):
    """A tokenizer.json of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<pad>",
        "<eos>",
        "<bos>",
        "red",
        "apple",
        "green",
        "blue",
        "white",
        "on",
        "the",
        "left",
    ]
    ids = {word: i for i, word in enumerate([*words, "right", "top", "bottom"])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("name", TOWERS)
def test_outputs_are_the_reference_librarys(name, golden, tmp_path):
    case = golden(name)
    pretrained = import_weights(case.write(tmp_path / "source"))
    assert (pretrained.image_size, pretrained.context_length) == TOWERS[name]
    ours = outputs(pretrained, case.images, case.texts)
    assert set(ours) == set(case.outputs)
    for kind, theirs in case.outputs.items():
        np.testing.assert_allclose(ours[kind], theirs, rtol=0, atol=1e-4, err_msg=kind)


def test_towers_of_two_libraries_in_one_run(golden, tmp_path):
    """DINOv3's trained, mT5's frozen, from a config file; both begin as they were."""
    image = golden("hf_dinov3").write(tmp_path / "dinov3")
    text = golden("hf_mt5").write(tmp_path / "mt5")
    config = tmp_path / "config.py"
    paths_of = {"tiny": TINY, "image": image, "text": text, "words": vocabulary(tmp_path)}
    config.write_text(CONFIG.format(**{k: str(v) for k, v in paths_of.items()}))
    run = ["train", str(config), "--workdir", str(tmp_path / "run")]
    assert main([*run, "--duration.amount", "2", "--checkpoint.every.amount", "1"]) == 0
    after = dict(paths(open_pretrained(tmp_path / "run").params))
    before = {n: x for n, x in paths(import_weights(text).params) if n.startswith("text/")}
    assert len(before) == 12  # distances among them
    for name, leaf in before.items():
        np.testing.assert_array_equal(after[name], leaf, err_msg=name)
    before = {n: x for n, x in paths(import_weights(image).params) if n.startswith("image/")}
    still = [n for n, x in before.items() if np.array_equal(after[n], x)]
    assert not still
    assert max(np.abs(after[n] - x).max() for n, x in before.items()) < 0.05


def test_two_parts_cannot_bring_the_same(golden, tmp_path):
    from clipjax.start import StartFrom, Together

    opened = import_weights(golden("hf_mt5").write(tmp_path / "mt5"))
    start = Together(parts=(StartFrom("a"), StartFrom("b", fresh="^text/blocks")))
    with pytest.raises(ClipjaxError, match="two parts bring 'logit_scale'"):
        start.leaves(opened.params, {}, lambda path: opened)
    with pytest.raises(ClipjaxError, match="name at least two"):
        Together(parts=(StartFrom("a"),))
    with pytest.raises(ClipjaxError, match="settings of its parts"):
        Together(parts=(StartFrom("a"), StartFrom("b")), fresh="x")


def test_one_tower_as_a_model_folder(golden, tmp_path, capsys):
    source = golden("hf_dinov3").write(tmp_path / "source")
    options = ["--out", str(tmp_path / "out"), "--image_size", "48"]
    assert main(["import", str(source), *options]) == 0
    said = capsys.readouterr().out
    assert "pictures of 48 px" in said and "texts" not in said
    opened = read_pretrained(tmp_path / "out")
    assert opened.tower("image").grid == (6, 6)
    with pytest.raises(ClipjaxError, match="has no tower 'text'"):
        opened.tower("text")
    with pytest.raises(ClipjaxError, match="reads no texts"):
        with_context_length(opened, 4)
    with pytest.raises(ClipjaxError, match="sees no pictures"):
        with_image_size(import_weights(golden("hf_mt5").write(tmp_path / "mt5")), 32)


def test_positions_that_are_no_parameters_may_grow(golden, tmp_path):
    opened = import_weights(golden("hf_jina").write(tmp_path / "jina"))
    longer = with_context_length(opened, 100)
    assert longer.context_length == longer.tower("text").context_length == 100
    longer.check()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hf_dinov3", {"qk_norm": True}, "config.json: qk_norm=True is not known here"),
        ("hf_dinov3", {"mlp_bias": False}, "mlp_bias=False is not supported here"),
        ("hf_tips", {"pooling": "max"}, "config.json: pooling='max' is not known here"),
        ("hf_xlm_roberta", {"position_embedding_type": "relative_key"}, "only 'absolute'"),
        ("hf_mt5", {"scalable_attention": True}, "scalable_attention=True is not known here"),
        ("hf_modernbert", {"norm_bias": True}, "norm_bias=True is not supported here"),
        ("hf_gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not sup"),
        (
            "hf_jina",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 2e4}},
            "rope_parameters: rope_type='yarn' is not supported here",
        ),
        ("hf_gemma", {"hidden_activation": "gegelu"}, "hidden_activation='gegelu' is unknown"),
    ],
)
def test_fields_that_nobody_read_are_refused(name, changes, message, golden, tmp_path):
    case = golden(name)
    files = json.loads(json.dumps(case.files))
    files["config.json"] |= changes
    with pytest.raises(ClipjaxError, match=message):
        import_weights(dataclasses.replace(case, files=files).write(tmp_path / "source"))


def test_heads_and_poolers_are_left_out_and_all_else_is_accounted_for(golden, tmp_path):
    case = golden("hf_xlm_roberta")
    head = {f"roberta.{n}": t for n, t in case.tensors.items()}
    head["lm_head.bias"] = np.zeros(60, np.float32)
    plain = dict(paths(import_weights(case.write(tmp_path / "a")).params))
    other = import_weights(dataclasses.replace(case, tensors=head).write(tmp_path / "b"))
    for name, leaf in paths(other.params):
        np.testing.assert_array_equal(leaf, plain[name])
    head["roberta.adapter.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ClipjaxError, match="they hold 'adapter.weight'"):
        import_weights(dataclasses.replace(case, tensors=head).write(tmp_path / "c"))


def test_texts_that_no_token_ends(tmp_path):
    """Gemma's and TIPS's: the row is as long as the text, and stays so in a model's folder."""
    made = TokenizerFile(str(vocabulary(tmp_path)), ends=False).build()
    made.save(tmp_path / "saved")
    for tokenizer in (made, load_tokenizer(tmp_path / "saved")):
        rows = tokenizer.encode(["red apple", "red red red red"], 4)
        assert rows.tolist() == [[2, 3, 4, 0], [2, 3, 3, 3]]
    from tokenizers import Tokenizer

    alone = Tokenizer.from_str(made.standalone()[1].decode())
    assert alone.encode("red apple").ids == [2, 3, 4]


@pytest.mark.parametrize(
    ("kind", "size", "patch", "side"),
    [(kind, size, 14 if "14" in kind.name else 16, 224) for kind in KINDS for size in kind.sizes],
    ids=lambda value: getattr(value, "name", None),
)
def test_full_size_towers_of_timm_have_their_names(kind, size, patch, side):
    image = kind.tower(size, patch, side)
    pixels = dict(zip(("mean", "std"), kind.pixels, strict=True))
    image = dataclasses.replace(image, **pixels)
    text = TextTransformer(eos_id=49407, pad_id=None)
    none = kind.projection == "head"
    model = DualEncoder(
        image, text, embed_dim=image.width if none else 512,
        image_projection="none" if none else "affine",
    )  # fmt: skip
    nearest = open_clip.OPEN_CLIP_CUSTOM.nearest(model)
    assert not differences(model, nearest)
    bare = Pretrained(model, {}, {}, None, 77, side)
    facts = open_clip.OPEN_CLIP_CUSTOM.describe(bare)["open_clip_config.json"]["model_cfg"]
    name = kind.name.format(size=size, patch=patch, side=side)
    assert facts["vision_cfg"]["timm_model_name"] == name
    assert judge(bare, "open_clip-custom").family is open_clip.OPEN_CLIP_CUSTOM
    thinner = dataclasses.replace(model, image=dataclasses.replace(image, depth=3))
    refusal = judge(dataclasses.replace(bare, model=thinner), "open_clip-custom").refusal()
    own = image.pool == "class" and image.key_bias
    assert ("image_projection='affine'" if own else "depth 3") in refusal
