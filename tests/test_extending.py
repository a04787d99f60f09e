"""docs/extending.md is true: its files are taken out of it, its commands are run."""

import json
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.batch import Encoded
from clipjax.cli import main
from clipjax.config import load_module
from clipjax.mesh import MeshShape
from clipjax.objectives import Context, PairEngine

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's files, in the current folder."""
    files = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(files) == PAGE.count("```python") == 7
    for name, text in files:
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    everything = jax.devices()
    monkeypatch.setattr("clipjax.mesh.jax.devices", lambda: everything[:2])
    yield tmp_path
    for name, _ in files:
        sys.modules.pop(name, None)


def test_the_commands_of_the_page_run(folder, capsys):
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    train, evaluate = (shlex.split(line) for line in commands.splitlines())
    assert train[:2] == ["clipjax", "train"]
    assert main(train[1:]) == 0
    run = json.loads((folder / "runs/mine/run.json").read_text())
    assert run["model"]["image"] == {"@type": "my_tower:ConvNet", "width": 32, "depth": 2}
    lines = (folder / "runs/mine/metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)}
    assert {"loss/softmax", "loss/hinge", "loss/follow", "similarity/own"} <= logged
    results = json.loads((folder / "runs/mine/results.json").read_text())

    for name in (
        "my_run",
        "my_field",
        "my_tower",
        "my_source",
        "my_objective",
        "my_teacher",
        "my_evaluator",
    ):
        sys.modules.pop(name, None)  # as in a new process
    capsys.readouterr()
    assert main(evaluate[1:]) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < evaluated["gap/distance"] <= 2
    assert evaluated["gap/distance"] == pytest.approx(results["gap/distance"], rel=1e-4)
    assert "retrieval/image_to_text/R@1" in evaluated


def test_without_its_files_a_run_says_which_are_missing(folder, capsys):
    assert main(["train", "my_run.py", "--workdir", "runs/none"]) == 2
    assert "No module named 'my_evaluator'" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_the_objective_of_the_page_is_the_dense_formula_on_a_mesh(folder):
    hinge = load_module(folder / "my_objective.py").Hinge(margin=0.3)
    rng = np.random.default_rng(0)
    image, text = (
        v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.standard_normal((2, 16, 4))
    )
    table = image @ text.T
    own = np.diag(table)
    costs = np.maximum(0, 0.3 + table - own[:, None]) + np.maximum(0, 0.3 + table - own)
    expected = costs[~np.eye(16, dtype=bool)].sum() / 16
    encoded = Encoded.pair(
        jnp.asarray(image, jnp.float32), jnp.asarray(text, jnp.float32), jnp.float32(1)
    )
    mesh = MeshShape().build()
    loss, metrics = jax.jit(lambda e: hinge(e, Context(PairEngine(mesh))))(encoded)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["similarity/own"]) == pytest.approx(own.mean(), rel=1e-5)


def test_the_tower_of_the_page_refuses_by_name(folder):
    from clipjax import ClipjaxError

    with pytest.raises(ClipjaxError, match="width=12"):
        load_module(folder / "my_tower.py").ConvNet(width=12)
