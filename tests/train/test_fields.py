"""A batch with more in it than pictures and captions, from the command line to the trained run."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image as Pillow

from clipjax import Pretrained, load, load_config
from clipjax.cli import main
from clipjax.data import BPE, Resize, Stream
from clipjax.models import DualEncoder
from clipjax.params import split
from clipjax.towers import TextTransformer, ViT

CHANGE = """data=replace(
    run.data,
    source=ImageFolder({folder!r}),
    augment=(RandomResizedCrop((0.5, 1.0)),),
    stream=Stream(lanes=4, run=2, block=2),
    fields=(
        Image(),
        Text(),
        Image("image_2", augment=(Flip(),)),
        Text("texts", count=2),
        Text("text_hard", key="negatives", count=3),
        Array("score", missing=0.0),
        Boxes(count=2, key="box"),
        Embeddings("teacher_image", {vectors!r}),
        Embeddings("teacher_text", {vectors!r}, column="caption_embedding"),
    ),
), evals=(), checkpoint=Checkpointing()"""


@pytest.fixture
def collection(tmp_path):
    """A folder of pictures with a table of more than captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for i in range(20):
        Pillow.new("RGB", (16, 20), (12 * i, 99, 255 - 12 * i)).save(folder / f"{i}.png")
        facts = {"negatives": [f"no {i}", "nothing"], "score": i / 4, "box": [[0, 0, 0.5, 0.5]]}
        lines.append({"image": f"{i}.png", "caption": [f"color {i}", "a color"]} | facts)
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def teacher(tmp_path):
    shape = {"width": 16, "depth": 1, "heads": 2}
    model = DualEncoder(
        image=ViT(image_size=16, patch_size=8, **shape),
        text=TextTransformer(vocab_size=280, context_length=12, eos_id=2, **shape),
        embed_dim=8,
    )
    _, params, state = split(model.build(nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    tokenizer = BPE(vocab_size=280).build(["a color"])
    Pretrained(model, params, state, tokenizer, 12, 16, Resize()).save(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_run_with_many_fields(collection, teacher, clipjax, vary, tmp_path, read_metrics):
    vectors = tmp_path / "teacher.parquet"
    table = collection / "captions.jsonl"
    made = ["--out", str(vectors), "--model", str(teacher), "--captions"]
    assert main(["embed", str(table), *made]) == 0
    change = CHANGE.format(folder=str(collection), vectors=str(vectors))
    config = vary(change.replace(")", ', table="captions.jsonl")', 1))
    options = ["--data.fields.1.context_length", 7, "--data.fields.2.augment.0.probability", 1.0]
    options += [
        "--data.stream.block",
        1,
        "--data.fields.4.count",
        2,
        "--duration.amount",
        3,
    ]
    assert clipjax("train", *options, config=config) == 0
    assert len(read_metrics(clipjax.workdir)) == 3

    run = load_config(clipjax.workdir / "run.json")
    assert run.data.fields[4].count == 2 and run.data.stream == Stream(lanes=4, run=2, block=1)
    loader = run.data.build(BPE(300).build(["a color"]), run.seed)
    batch = loader.batch(0)
    assert {key: array.shape for key, array in batch.items()} == {
        "id": (16,),
        "sample": (16,),
        "image": (16, 16, 16, 3),
        "text": (16, 7),
        "image_2": (16, 16, 16, 3),
        "texts": (16, 2, 8),
        "texts_mask": (16, 2),
        "text_hard": (16, 2, 8),
        "text_hard_mask": (16, 2),
        "score": (16,),
        "boxes": (16, 2, 4),
        "boxes_mask": (16, 2),
        "teacher_image": (16, 8),
        "teacher_text": (16, 8),
    }
    np.testing.assert_array_equal(batch["score"], batch["sample"] / 4)
    model = load(teacher)
    expected = model.encode_image([collection / f"{i}.png" for i in batch["sample"]])
    np.testing.assert_allclose(batch["teacher_image"], expected, atol=1e-5)
    expected = model.encode_text([f"color {i}" for i in batch["sample"]])
    np.testing.assert_allclose(batch["teacher_text"], expected, atol=1e-5)


def test_a_field_that_the_source_lacks_is_refused_before_anything_starts(
    collection, clipjax, vary, capsys
):
    change = f"""data=replace(
        run.data,
        source=ImageFolder({str(collection)!r}, table="captions.jsonl"),
        fields=(*run.data.fields, Array("scores")),
    )"""
    assert clipjax("train", config=vary(change)) == 2
    assert "Array('scores') asks for what none" in (said := capsys.readouterr().err)
    assert "did you mean 'score'?" in said
    assert not clipjax.workdir.exists()
