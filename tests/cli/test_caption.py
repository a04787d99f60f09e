"""`clipjax caption`, on a tiny CoCa that was saved as a model's folder."""

import csv
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import clipjax
from clipjax.cli import main
from clipjax.data import BPE
from clipjax.generation import Beam, ContrastiveSearch, Generated, Sample
from clipjax.models import CaptionDecoder, CoCa, DualEncoder, Poolers
from clipjax.params import abstract
from clipjax.towers import TextTransformer, ViT

SIZES = {"width": 16, "heads": 2, "depth": 1}
IMAGE = ViT(image_size=8, patch_size=4, pool="mean", **SIZES)


def save(model, folder):
    _, shapes, state = abstract(lambda: model.build(nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(rng.normal(0, 0.3, x.shape), np.float32), shapes)
    tokenizer = BPE(vocab_size=280).build(iter(["a cat", "a dog on a mat"]))
    clipjax.Pretrained(model, params, state, tokenizer, context_length=8, image_size=8).save(folder)
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Eight would take eight times as long to compile for."""
    devices = jax.devices()[:1]
    monkeypatch.setattr("clipjax.mesh.jax.devices", lambda: devices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    text = TextTransformer(vocab_size=280, context_length=8, pool="class", **SIZES)
    model = CoCa(IMAGE, text, None, CaptionDecoder(**SIZES), Poolers(4, heads=2), embed_dim=8)
    return save(model, tmp_path_factory.mktemp("model") / "coca")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (10, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def captions(capsys, *arguments):
    assert main(["caption", *map(str, arguments), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return "\n".join(lines[:-1]), json.loads(lines[-1])["captions"]


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        (
            "--strategy beam --width 2 --length-penalty=-0.5 --max_length 6 --min_length 2",
            Beam(width=2, length_penalty=-0.5, max_length=6, min_length=2),
        ),
        (
            "--strategy sample --temperature 1.5 --top_k 90 --top_p 0.9",
            Sample(temperature=1.5, top_k=90, top_p=0.9),
        ),
        (
            "--strategy contrastive --alpha 0.4 --k 2 --repetition_penalty 1.3",
            ContrastiveSearch(alpha=0.4, k=2, repetition_penalty=1.3),
        ),
    ],
)
def test_options_reach_the_strategy(options, strategy, folder, pictures, capsys, monkeypatch):
    asked = []

    def generate(self, images, *settings):
        asked.append(settings)
        rows = self.tokenizer.encode([f"a dog {i}" for i in range(len(images))], 8)
        return Generated(rows, np.arange(len(images), dtype=np.float32))

    monkeypatch.setattr(clipjax.Predictor, "generate", generate)
    common = ("--prompt", "a dog", "--seed", 7)
    _, rows = captions(capsys, "--model", folder, pictures, *options.split(), *common)
    assert asked == [(strategy, "a dog", 7)]
    assert rows == [
        {"image": str(pictures / f"{i}.png"), "caption": f"a dog {i}", "score": i} for i in range(3)
    ]


def test_greedy_is_the_default_and_the_table_shows_captions(folder, pictures, capsys, monkeypatch):
    monkeypatch.chdir(pictures)  # a short name, which no table folds
    file = "1.png"
    table, (row,) = captions(capsys, "--model", folder, file, "--min_length", 4)
    (caption,) = clipjax.load(folder).caption(
        [np.asarray(Image.open(file))], clipjax.generation.Greedy(min_length=4)
    )
    assert row["caption"] == caption
    assert "1.png" in table and f"{row['score']:.2f}" in table


def test_eval_compares_captions_with_a_data_sets(folder, pictures, tmp_path, capsys, monkeypatch):
    """Two pictures whose references are what the model writes, and one with no word of it."""
    _, rows = captions(capsys, "--model", folder, pictures, "--prompt", "a dog")
    shutil.copytree(pictures, tmp_path / "set")
    with open(tmp_path / "set" / "captions.csv", "w") as file:
        csv.writer(file).writerows(
            [("image", "caption")]
            + [(f"{i}.png", row["caption"] if i else "zebra") for i, row in enumerate(rows)]
        )
    asked = ["eval", str(folder), "--dataset", str(tmp_path / "set"), "--task", "captioning"]
    assert main([*asked, "--prompt", "a dog", "--no-embeddings", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["captioning/ROUGE-L"] == pytest.approx(2 / 3)
    assert 0 < found["captioning/BLEU-1"] < 1 and "captioning/CLIPScore" not in found
    chosen = []
    monkeypatch.setattr(
        clipjax.Predictor,
        "caption_rows",
        lambda self, read, count, strategy, *rest: chosen.append(strategy) or ["zebra"] * count,
    )
    assert main([*asked, "--strategy", "beam", "--no-embeddings"]) == 0
    assert chosen == [Beam()]
    assert main([*asked, "--strategy", "bean"]) == 2
    assert "--strategy bean: choose of greedy, beam, sample" in capsys.readouterr().err


def test_a_bad_picture_costs_no_other_its_caption(folder, pictures, capsys):
    """Skipped, named and counted, as by the other commands; hidden files are no pictures."""
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:40])
    (pictures / "._0.png").write_bytes(b"finder")
    assert main(["caption", "--model", str(folder), str(pictures), "--json"]) == 1
    shown = capsys.readouterr()
    found = json.loads(shown.out.splitlines()[-1])
    assert [Path(row["image"]).name for row in found["captions"]] == ["0.png", "1.png", "2.png"]
    assert list(found["skipped"]) == [str(pictures / "cut.png")] and "cut.png" in shown.err
    for name in ("cut.png", "._0.png"):
        (pictures / name).unlink()


def test_help_lists_the_options_of_the_strategy(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["caption", "--strategy", "beam", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--prompt" in shown and "--length_penalty" in shown and "GREEDY" not in shown


def test_mistakes_are_told_before_a_model_is_opened(folder, pictures, tmp_path, capsys):
    def fails(*arguments):
        try:
            code = main(["caption", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        return capsys.readouterr().err

    assert "there is no picture 'nowhere.png'" in fails("--model", folder, "nowhere.png")
    assert "holds no pictures (.jpg" in fails("--model", folder, tmp_path)
    assert "not one of 1 pictures can be read" in fails("--model", folder, pictures / "notes.txt")
    assert "--width" in fails("--model", folder, pictures, "--width", 3)  # no option of greedy
    assert "width=0" in fails("--model", folder, pictures, "--strategy", "beam", "--width", 0)
    assert "invalid choice: 'bean'" in fails("--model", folder, pictures, "--strategy", "bean")
    text = TextTransformer(vocab_size=280, context_length=8, **SIZES)
    dual = save(DualEncoder(IMAGE, text, embed_dim=8), tmp_path / "dual")
    said = fails("--model", dual, pictures)
    assert f"{dual}: the model, of the kind DualEncoder, has no captioning decoder" in said
