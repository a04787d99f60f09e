import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipjax import load
from clipjax.evals.prompts import read_classes


def classify(run, *arguments):
    code, out, err = run("classify", *arguments, "--json")
    return code, json.loads(out), err


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pixels(path):
    """What the model sees of the pictures here, by hand: the middle 16 x 16 of 20 x 16."""
    return np.asarray(Image.open(path))[:, 2:18]


def test_probabilities_of_a_softmax_model(run, model, pictures, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a {}\n\n{} square\n")
    files = [str(pictures / "red.png"), str(pictures / "deep" / "gray.png")]
    code, found, _ = classify(
        run, *files, "--labels", "red, blue,dog", "--model", model, "--top", "3",
        "--templates", tmp_path / "prompts.txt",
    )  # fmt: skip
    assert code == 0 and found["skipped"] == {} and found["model"] == str(model)
    predictor = load(model)
    image = predictor.encode_image(np.stack([pixels(f) for f in files]))
    names = ("red", "blue", "dog")
    prompts = [[f"a photo of a {n}", f"{n} square"] for n in names]
    classes = unit(np.stack([predictor.encode_text(p).mean(0) for p in prompts]))
    powers = np.exp((image @ classes.T).astype(np.float64) / 0.07)
    expected = powers / powers.sum(1, keepdims=True)
    for file, picture, row in zip(files, found["images"], expected, strict=True):
        assert picture["image"] == file
        got = {entry["label"]: entry["probability"] for entry in picture["labels"]}
        np.testing.assert_allclose([got[n] for n in names], row, atol=1e-5)
        ranked = [entry["probability"] for entry in picture["labels"]]
        assert ranked == sorted(ranked, reverse=True)


def test_probabilities_of_a_sigmoid_model(run, sigmoid_model, pictures):
    file = str(pictures / "red.png")
    _, found, _ = classify(run, file, "--labels", "red,blue", "--model", sigmoid_model)
    predictor = load(sigmoid_model)
    cosine = predictor.encode_image(pixels(file)[None]) @ predictor.encode_text(["red", "blue"]).T
    expected = 1 / (1 + np.exp(-(cosine[0].astype(np.float64) / 0.07 - 3.0)))
    got = {entry["label"]: entry["probability"] for entry in found["images"][0]["labels"]}
    np.testing.assert_allclose([got["red"], got["blue"]], expected, atol=1e-5)
    assert abs(sum(got.values()) - 1) > 1e-3


def test_the_table_shows_the_best_labels(run, model, pictures, tmp_path):
    (tmp_path / "labels.txt").write_text("red\nblue\n\ndog\n")
    code, out, _ = run(
        "classify", pictures / "red.png", pictures / "blue.png",
        "--labels", tmp_path / "labels.txt", "--top", 2, "--model", model,
    )  # fmt: skip
    assert code == 0
    assert out.count(" %") == 4  # two labels of two pictures
    assert "probability" in out and "█" in out


def test_templates_of_a_well_known_data_set(run, model, pictures, tmp_path):
    shipped = read_classes("cifar10").templates
    assert len(shipped) > 2
    (tmp_path / "same.txt").write_text("\n".join(shipped))
    command = (str(pictures / "red.png"), "--labels", "red,blue", "--model", model, "--templates")
    (_, named, _), (_, listed, _) = (
        classify(run, *command, t) for t in ("cifar10", tmp_path / "same.txt")
    )
    assert named == listed


def test_the_only_run_is_the_default(run, model, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("classify", pictures / "red.png", "--labels", "a,b")
    code, _, err = run(*command)
    assert code == 2 and "name a model with --model PATH: there is no run in runs/" in err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "one").symlink_to(model)
    assert classify(run, *command[1:])[1]["model"] == "runs/one"
    (tmp_path / "runs" / "two").symlink_to(model)
    code, _, err = run(*command)
    assert code == 2 and "name one with --model, of runs/one, runs/two" in err


def test_hostile_pictures_are_named_and_the_rest_is_classified(
    run, model, pictures, hostile, tree, tmp_path
):
    refusals = hostile(pictures)
    (pictures / "folder.png").mkdir()
    refusals["folder.png"] = "is no regular file"
    os.mkfifo(pictures / "pipe.png")
    refusals["pipe.png"] = "is no regular file"
    before = tree(tmp_path)
    files = [pictures / name for name in ["red.png", *refusals]]
    code, found, err = classify(run, *files, "--labels", "red,blue", "--model", model)
    assert code == 1
    assert [p["image"] for p in found["images"]] == [str(pictures / "red.png")]
    for name, message in refusals.items():
        assert message in found["skipped"][str(pictures / name)]
        assert f"skipped: {pictures / name}: " in err
    assert tree(tmp_path) == before
    code, _, err = run("classify", pictures / "empty.png", "--labels", "red,blue", "--model", model)
    assert code == 2 and "not one of 1 pictures can be read" in err


def test_unusual_pictures_are_read(run, model, tmp_path):
    gray16 = np.full((16, 16), 200 << 8, np.uint16)
    Image.fromarray(gray16).save(tmp_path / "deep.png")
    Image.new("L", (16, 16), 200).save(tmp_path / "flat.png")
    frames = [Image.new("RGB", (16, 16), c) for c in ("white", "black")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (16, 16), "white").save(tmp_path / "still.png")
    files = [tmp_path / n for n in ("deep.png", "flat.png", "moving.gif", "still.png")]
    _, found, _ = classify(run, *files, "--labels", "a,b,c", "--model", model)
    deep, flat, moving, still = (picture["labels"] for picture in found["images"])
    assert deep == flat and moving == still and deep != moving


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "red,red"], "the label 'red' is given 2 times"),
        (["--labels", "red,"], "a label is empty"),
        (["--labels", "missing.txt"], "--labels 'missing.txt' is not readable"),
        (["--labels", "a,b", "--templates", "photo"], "has no {} where the label goes"),
        (["--labels", "a,b", "--templates", "cifar11"], "did you mean 'cifar10'"),
        (["--labels", "a,b", "--top", "0"], "--top 0: must be at least 1"),
        (["--labels", "a,b", "nowhere.png"], "nowhere.png: there is no such file"),
        (["--labels", "a,b", "--model", "nowhere"], "--model nowhere: there is no such file"),
        ([], "the following arguments are required: --labels"),
    ],
)
def test_bad_options_are_refused(run, model, pictures, arguments, message):
    code, _, err = run("classify", pictures / "red.png", "--model", model, *arguments)
    assert code == 2 and message in err


def test_a_model_folder_starts_light_and_its_compilations_are_kept(model, pictures, tmp_path):
    env = dict(os.environ, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"):
        env.pop(name, None)
    command = [
        sys.executable, "-X", "importtime", "-m", "clipjax.cli", "classify",
        str(pictures / "red.png"), "--labels", "red,blue", "--model", str(model), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout)["images"][0]["labels"]) == 2
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in _timed(done.stderr)}
    heavy = {"orbax", "grain", "tensorflow_datasets", "tensorstore", "matplotlib", "pyarrow"}
    assert "jax" in imported and not heavy & imported
    kept = Path(env["XDG_CACHE_HOME"]) / "clipjax" / "xla"
    assert any(kept.iterdir()) and kept.stat().st_mode & 0o077 == 0


def _timed(text):
    return [line for line in text.splitlines() if line.startswith("import time:")]
