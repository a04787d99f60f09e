"""The configs with CoCa: the pod recipe is drawn and traced without allocating; the quickstart trains a step."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from clipjax.batch import SpecialTokens
from clipjax.cli import main
from clipjax.config import load_config
from clipjax.mesh import MeshShape
from clipjax.optim import Scale
from clipjax.sharding import per_device_bytes
from clipjax.train.state import Blueprint
from clipjax.train.step import make_step

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_pod_recipe_is_drawn_without_allocating():
    run = load_config(CONFIGS / "coca_large_webscale.py")
    mesh = MeshShape(group=2).build(jax.devices()[:8])
    blueprint = Blueprint.draw(
        run.model, run.objective, run.optimizer, run.ema, mesh, run.sharding,
        run.duration.amount, Scale(run.data.batch_size, 10**9), run.seed,
    )  # fmt: skip
    layout = blueprint.shardings.params
    assert tuple(layout["decoder"]["head"]["kernel"].spec) == (None, "data")
    assert tuple(layout["text"]["embedding"].spec) == ("data", None)
    local, total = per_device_bytes(blueprint.abstract.params, layout)
    assert total == pytest.approx(4 * 798e6, rel=0.01)
    assert local == pytest.approx(total / 4, rel=0.01)  # FSDP within a group of 4
    engine = run.engine(mesh)
    tokens = SpecialTokens(bos=1, eos=2, pad=0)
    step = make_step(blueprint, run.objective, engine, mesh, run.accumulate, tokens=tokens)
    batch = {
        "image": jax.ShapeDtypeStruct((run.data.batch_size, 288, 288, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((run.data.batch_size, 76), jnp.int32),
    }
    state, metrics = jax.eval_shape(step, blueprint.abstract, batch)
    assert jax.tree.map(lambda a: a.shape, state) == jax.tree.map(
        lambda a: a.shape, blueprint.abstract
    )
    assert {"loss/softmax", "loss/caption", "caption/accuracy"} <= metrics.keys()


def test_the_quickstart_loads_and_takes_options(capsys):
    options = ["--objective.terms.1.weight", "0.5"]
    assert main(["config", str(CONFIGS / "quickstart_coca.py"), *options]) == 0
    assert '"weight": 0.5' in capsys.readouterr().out
