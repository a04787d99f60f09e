"""Teachers from the command line: another model, live or by its vectors in a file, and what is refused."""

import json

import numpy as np

from clipjax.component import from_json, to_json
from clipjax.objectives import MovingAverage, SoftTarget

WIDE = (
    "model=replace(run.model, image=replace(run.model.image, width=24, depth=1), "
    "text=replace(run.model.text, width=24, depth=1), embed_dim=12), evals=()"
)
FOLLOW = (
    "objective=Softmax() + Ramp(0.5, 1.0, 4) * RelationalDistillation(teacher=Frozen({path!r})), "
    "evals=()"
)
IMPORT = "from clipjax.methods.clip_distillation import *\n"


def write(vary, change):
    path = vary(change)
    path.write_text(IMPORT + path.read_text())
    return path


def test_a_frozen_teacher_of_another_architecture(clipjax, vary, tmp_path, read_metrics, capsys):
    """The student follows it; its weights are in no checkpoint; the run goes on without a difference."""
    teacher = tmp_path / "teacher"
    steps = ["--duration.amount", "4"]
    assert clipjax("train", *steps, config=vary(WIDE), workdir=teacher) == 0
    config = write(vary, FOLLOW.format(path=str(teacher)))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert clipjax("train", *steps, config=config, workdir=whole, devices=2) == 0
    assert clipjax("train", "--duration.amount", "2", config=config, workdir=halves, devices=2) == 0
    assert clipjax("train", *steps, config=config, workdir=halves, devices=2) == 0
    divergence = [read_metrics(w, "loss/relationaldistillation") for w in (whole, halves)]
    assert divergence[0][4] > 1e-3 and divergence[0][4] == divergence[1][4]
    names = {p.name for p in (whole / "checkpoints").rglob("*")}
    assert not any("frozen" in name for name in names)
    config = write(vary, FOLLOW.format(path=str(tmp_path / "nowhere")))
    assert clipjax("train", config=config, workdir=tmp_path / "no") == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_what_the_batch_or_the_model_lacks_is_refused_before_anything_is_made(
    clipjax, vary, tmp_path, capsys
):
    for change, message in (
        ("objective=Softmax('image', 'image_2')", "image_2"),
        ("objective=Softmax() + Matching()", "'fusion'"),
        ("objective=SoftTarget(teacher=None)", "teacher_image"),
        ("objective=Caption()", "captions"),
        ("objective=SoftTarget(teacher='run')", "'run' is no teacher: write"),
        (
            "model=replace(run.model, embed_dim=12), objective=Softmax('image', 'image_pooled')",
            "similarities need the same single width",
        ),
    ):
        assert clipjax("train", config=vary(change), workdir=tmp_path / "no") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_teachers_are_known_by_their_decay_when_terms_change_places(clipjax, vary, read_metrics):
    """A run stopped in the middle and started again with its terms in another order goes on as before."""
    terms = ("SoftTarget(teacher=MovingAverage(1.0))", "SoftTarget(teacher=MovingAverage(0.5))")
    config = vary("objective={} + 0.5 * {}, evals=()".format(*terms))
    other = vary("objective=0.5 * {1} + {0}, evals=()".format(*terms))
    assert clipjax("train", "--duration.amount", 4, config=config) == 0
    expected = read_metrics(clipjax.workdir)[4]
    folder = clipjax.workdir.with_name("changed")
    assert clipjax("train", "--duration.amount", 2, config=config, workdir=folder) == 0
    assert clipjax("train", "--duration.amount", 4, config=other, workdir=folder) == 0
    np.testing.assert_allclose(read_metrics(folder)[4], expected, rtol=1e-6)


def test_two_views_and_terms_of_one_class_from_the_command_line(
    clipjax, vary, tmp_path, read_metrics
):
    change = (
        "objective=Softmax() + 0.5 * Softmax('image', 'image_2'), evals=(), "
        "data=replace(run.data, fields=(Image(), Image('image_2', augment=(Flip(),)), Text()))"
    )
    options = ["--duration.amount", "2", "--objective.terms.1.weight", "0.25", "--accumulate", "2"]
    options += ["--objective.terms.1.objective.label_smoothing", "0.1"]
    assert clipjax("train", *options, config=vary(change), devices=2) == 0
    one, two = (read_metrics(clipjax.workdir, f"loss/softmax_{i}")[2] for i in (0, 1))
    assert read_metrics(clipjax.workdir, "loss")[2] == np.float32(one + 0.25 * two)
    saved = json.loads((clipjax.workdir / "run.json").read_text())
    assert saved["objective"]["terms"][1]["objective"]["second"] == "image_2"


def test_a_soft_target_of_earlier_configurations_opens():
    saved = to_json(SoftTarget(teacher=MovingAverage(0.9), alpha=0.3))
    saved.pop("teacher")
    assert from_json(saved | {"momentum": 0.9}) == SoftTarget(teacher=MovingAverage(0.9), alpha=0.3)
    assert from_json(saved | {"momentum": None}).teacher is None
