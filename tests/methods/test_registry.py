"""The list of methods, what their files may use, and every method's config from the command line."""

import ast
import importlib
import json
import re
from pathlib import Path

import jax
import pytest

from clipjax.cli import main
from clipjax.methods.registry import ELSEWHERE, methods

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clipjax"
OWN = sorted(
    p.stem for p in (PACKAGE / "methods").glob("*.py") if p.stem not in ("__init__", "registry")
)
CONFIGS = sorted(p.stem for p in (ROOT / "configs" / "methods").glob("*.py"))
RUN = """
import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.component import Component
from clipjax.data import BPE
from clipjax.optim import SGD, Constant


def shallow(value):
    # One block in every stack: what a program costs here is its compilation.
    if isinstance(value, tuple):
        return tuple(map(shallow, value))
    if not isinstance(value, Component):
        return value
    fields = {{f.name: shallow(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if "depth" in fields:
        fields |= {{"depth": 1, "remat": "none"}}
    return dataclasses.replace(value, **fields)


def config() -> Run:
    run = load_config(Path({path!r}))
    optimizer = SGD(lr=1e-3, schedule=Constant())
    data = dataclasses.replace(run.data, tokenizer=BPE(vocab_size=400, max_captions=1000))
    return dataclasses.replace(
        run, model=shallow(run.model), optimizer=optimizer, data=data, evals=(), trackers=()
    )
"""


def test_every_method_is_listed_and_has_its_config(capsys):
    assert main(["methods", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == len(methods())
    for name in OWN:
        row = rows[name]
        assert row["file"] == f"clipjax/methods/{name}.py" and row["title"] and row["summary"]
        assert row["status"] in ("official", "second hand", "reconstructed")
        assert row["arxiv"] is None or re.fullmatch(r"\d{4}\.\d{4,5}", row["arxiv"]), row
        assert name in CONFIGS, f"configs/methods/{name}.py is missing"
        assert (ROOT / row["config"]).is_file()
        page = importlib.import_module(f"clipjax.methods.{name}").__doc__
        assert "differs here" in page.lower() and "Status:" in page, name
    assert set(CONFIGS) - set(OWN) == {"recipe"}
    for method in ELSEWHERE:
        module, _, attribute = method.place.partition(":")
        assert hasattr(importlib.import_module(module), attribute), method
    assert main(["methods"]) == 0
    assert "isogclr" in capsys.readouterr().out


@pytest.mark.parametrize("name", OWN)
def test_a_method_uses_what_a_user_could(name):
    """Imports of public names alone, of other methods only where one is a case of another."""
    tree = ast.parse((PACKAGE / "methods" / f"{name}.py").read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        private = [n for n in names if n.startswith("_") and not n.startswith("__")]
        assert not private, f"{name} imports {private}"
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    assert not attributes, f"{name} reaches for {attributes}"


def test_no_file_of_the_core_names_a_method():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "methods":
            continue
        text = path.read_text()
        assert "clipjax.methods" not in text or path.name in ("methods.py",), path
        for name in OWN:
            assert not re.search(rf"methods[./]{name}\b", text), (path, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains(name, tmp_path, monkeypatch, capsys):
    """Two steps of `clipjax train` of the config, with shallow towers and without evaluation."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    config = tmp_path / f"run_{name}.py"
    config.write_text(RUN.format(path=str(ROOT / "configs" / "methods" / f"{name}.py")))
    options = ["--duration.amount", "2", "--data.batch_size", "16"]
    assert main(["train", str(config), "--workdir", str(tmp_path / "run"), *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and all(abs(loss) < 1e4 for loss in losses)
