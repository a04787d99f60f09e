"""What a run begins with: another model's weights, a part of them, their mean, LoRA's base."""

import json

import jax
import numpy as np
import pytest

from clipjax import ClipjaxError, open_pretrained
from clipjax.cli import main
from clipjax.config import load_config
from clipjax.params import paths
from clipjax.start import Average, StartFrom

TRANSFER = """
import dataclasses
from pathlib import Path

from clipjax import StartFrom, load_config
from clipjax.models import Lora
from clipjax.optim import Duration, Group

def config():
    run = load_config(Path({tiny!r}))
    return dataclasses.replace(run, {change})
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the tiny config to start from."""
    from pathlib import Path

    folder = tmp_path_factory.mktemp("trained") / "run"
    tiny = Path(__file__).with_name("tiny.py")
    assert main(["train", str(tiny), "--workdir", str(folder), "--duration.amount", "3",
                 "--mesh.data", "-1", "--data.batch_size", "16"]) == 0  # fmt: skip
    return folder


@pytest.fixture
def write(tmp_path, tiny):
    def write(name, change):
        path = tmp_path / f"{name}.py"
        path.write_text(TRANSFER.format(tiny=str(tiny), change=change))
        return path

    return write


def weights(path):
    return {n: np.asarray(x) for n, x in paths(open_pretrained(path).params)}


def moved(before, after):
    return {n for n in after if n not in before or not np.array_equal(before[n], after[n])}


def test_lit_starts_from_the_image_tower_and_keeps_it(clipjax, trained, write):
    groups = 'Group("^image/", frozen=True), Group("^image_projection/", starts=Duration(2))'
    change = (
        f'start=StartFrom({str(trained)!r}, fresh="^text/"), '
        f"optimizer=dataclasses.replace(run.optimizer, groups=({groups},)), evals=()"
    )
    config = write("locked", change)
    assert (
        clipjax("train", "--duration.amount", 2, "--checkpoint.every.amount", 1, config=config) == 0
    )
    start = weights(trained)
    first, last = (weights(clipjax.workdir / "checkpoints" / str(s)) for s in (1, 2))
    kept = {n for n in start if n.startswith(("image/", "image_projection/"))}
    assert not kept & moved(start, last)  # steps 0 and 1 are before `starts`
    assert {n for n in start if n.startswith("text/blocks")} <= moved(start, first)
    assert clipjax("train", "--duration.amount", 3, config=config) == 0
    third = weights(clipjax.workdir)
    assert "image_projection/kernel" in moved(start, third)
    assert not {n for n in kept if n.startswith("image/")} & moved(start, third)


def test_lora_trains_the_factors_alone_and_folds(clipjax, trained, write):
    change = (
        f'model=Lora(run.model, rank=2), start=StartFrom({str(trained)!r}, into="base", '
        'fresh="^lora/"), optimizer=dataclasses.replace(run.optimizer, '
        'groups=(Group("^base/", frozen=True),))'
    )
    config = write("adapted", change)
    assert clipjax("train", "--duration.amount", 4, config=config) == 0
    start, after = weights(trained), weights(clipjax.workdir)
    for name, leaf in start.items():
        np.testing.assert_array_equal(after[f"base/{name}"], leaf)
    factors = {n for n in after if n.startswith("lora/")}
    assert len(factors) == 8
    assert all(np.abs(after[n]).max() > 0 for n in factors)  # b has left zero
    opened = open_pretrained(clipjax.workdir)
    image = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_allclose(
        opened.folded().predictor().encode_image(image),
        opened.predictor().encode_image(image),
        atol=1e-6,
    )
    results = json.loads((clipjax.workdir / "results.json").read_text())
    assert "retrieval/image_to_text/R@1" in results


def test_average_is_the_weighted_mean(clipjax, trained, tmp_path, capsys):
    assert clipjax("train", "--duration.amount", 2, "--seed", 1) == 0
    out = tmp_path / "mean"
    options = ["--weights", "0.25,0.75", "--out", str(out)]
    assert main(["average", str(trained), str(clipjax.workdir), *options]) == 0
    a, b, mean = weights(trained), weights(clipjax.workdir), weights(out)
    for name in a:
        expected = 0.25 * np.float64(a[name]) + 0.75 * np.float64(b[name])
        np.testing.assert_allclose(mean[name], expected, rtol=1e-6, atol=1e-7)
    # As a run's start, through the command line alone; the state is what a step from there gives.
    soup = Average((str(trained), str(out))).open(open_pretrained)
    half = 0.5 * (np.float64(a["logit_scale"]) + np.float64(mean["logit_scale"]))
    assert float(soup.params["logit_scale"]) == pytest.approx(half, rel=1e-6)
    capsys.readouterr()
    assert (
        main(["average", str(trained), str(out), "--weights", "1,1", "--out", str(tmp_path / "x")])
        == 2
    )
    assert "add up to 2" in capsys.readouterr().err
    assert (
        main(["average", str(trained), str(out), "--weights", "a,b", "--out", str(tmp_path / "x")])
        == 2
    )
    assert main(["average", str(trained), "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


def test_what_does_not_fit_is_refused_by_name(clipjax, trained, write, capsys):
    def refused(words, change, *options):
        config = write(f"bad{abs(hash(change))}", change)
        assert clipjax("train", *options, config=config) == 2
        message = capsys.readouterr().err
        for word in words:
            assert word in message, message
        assert not clipjax.workdir.exists()

    start = f"start=StartFrom({str(trained)!r})"
    refused(["no 'base/image", "start.fresh"], f"model=Lora(run.model), {start}")
    refused(["'image/blocks/mlp/fc1/bias' has shape (2, 64)", "(2, 32)"],
            start, "--model.image.mlp_dim", 32)  # fmt: skip
    refused(
        ["'^vision/' matches no parameter"], f'start=StartFrom({str(trained)!r}, fresh="^vision/")'
    )
    refused(["nowhere is no folder"], 'start=StartFrom("nowhere")')


def test_the_average_copies_and_momentum_begin_with_the_start(trained, tiny):
    """EMA is a copy of the starting weights, not of the random ones."""
    import dataclasses

    from clipjax.mesh import MeshShape
    from clipjax.optim import Ema, Scale
    from clipjax.train.state import Blueprint

    run = load_config(tiny)
    mesh = MeshShape().build(jax.devices()[:2])
    sharding = dataclasses.replace(run.sharding, fsdp=True, min_size=16)
    blueprint = Blueprint.draw(run.model, run.objective, run.optimizer, Ema(0.9), mesh, sharding, 3,
                               Scale(16, 64), 7)  # fmt: skip
    state = blueprint.init(blueprint.start_leaves(StartFrom(str(trained))))
    start = weights(trained)
    for tree in (state.params, state.ema):
        for name, leaf in paths(tree):
            np.testing.assert_array_equal(np.asarray(leaf), start[name], err_msg=name)
    kernel = state.params["image"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert "data" in tuple(kernel.sharding.spec)


@pytest.mark.parametrize("name", ["lora", "lit"])
def test_the_configs_that_ship_fit_the_quickstart(name):
    """Every start leaf has a place: the quickstart's parameters, against what the config expects."""
    from pathlib import Path

    from flax import nnx

    from clipjax.params import abstract

    folder = Path(__file__).parents[2] / "configs"
    run = load_config(folder / f"{name}.py")
    base = load_config(folder / "quickstart.py")
    _, wanted, _ = abstract(lambda: run.model.build(nnx.Rngs(0)))
    _, given, _ = abstract(lambda: base.model.build(nnx.Rngs(0)))
    run.optimizer.trainable(wanted)

    class Given(StartFrom):
        def open(self, opener):
            class Opened:
                params, model_state = given, {}

            return Opened

    start = Given(path="", fresh=run.start.fresh, into=run.start.into)
    leaves, _ = start.leaves(wanted, {}, open_pretrained)
    assert len(leaves) > 5


def test_bad_patterns_and_weights():
    with pytest.raises(ClipjaxError, match="at least two"):
        Average(("a",))
    with pytest.raises(ClipjaxError, match="3 weights for 2 models"):
        Average(("a", "b"), (0.1, 0.2, 0.7))
    with pytest.raises(ClipjaxError, match="no regular expression"):
        StartFrom("a", fresh="(").leaves({}, {}, open_pretrained)
