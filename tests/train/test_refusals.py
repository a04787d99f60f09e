"""Bad input: one clear message, the right exit code, nothing written, existing files as they were."""

import json
import shutil

import pytest


@pytest.fixture
def refused(clipjax, capsys):
    """`refused(words, "train", ...)`: the command exits with 2 (or `code`), with the words on stderr."""

    def check(words, *arguments, code=2, **settings):
        capsys.readouterr()
        assert clipjax(*arguments, **settings) == code
        message = capsys.readouterr().err
        assert "Traceback" not in message
        for word in words:
            assert word in message, message
        return message

    return check


def files(folder):
    """All but the lock, which says who looked last."""
    return {
        p.relative_to(folder): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def write_config(tmp_path, tiny, old, new, name="changed"):
    path = tmp_path / f"{name}.py"
    text = tiny.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_a_config_with_an_unknown_field(refused, tmp_path, tiny, clipjax):
    config = write_config(tmp_path, tiny, "embed_dim=16", "embed_dims=16", "unknown_field")
    refused(
        ["DualEncoder has no field 'embed_dims'", "did you mean 'embed_dim'"],
        "train",
        config=config,
    )
    assert not clipjax.workdir.exists()


def test_missing_files(refused, tmp_path):
    refused(["nowhere.py: no such file"], "train", config=tmp_path / "nowhere.py")
    refused(["nowhere.py: no such file"], "train", "--imports", tmp_path / "nowhere.py")
    (tmp_path / "somewhere.py").touch()
    refused(["did you mean 'somewhere.py'?"], "train", config=tmp_path / "somewhre.py")


def test_a_config_that_does_not_run(refused, tmp_path):
    config = tmp_path / "breaks.py"
    config.write_text("def config():\n    return 1 / 0\n")
    refused(["breaks.py", "ZeroDivisionError"], "config", config=config)
    (tmp_path / "none.py").write_text("x = 1\n")
    refused(["def config() -> Run"], "config", config=tmp_path / "none.py")
    (tmp_path / "other.py").write_text("def config():\n    return 3\n")
    refused(["returned int"], "config", config=tmp_path / "other.py")


def test_misspelt_options_name_the_nearest(clipjax, capsys, refused):
    refused(["no option '--wrkdir'; did you mean '--workdir'?"], "train", "--wrkdir", "runs/x")
    with pytest.raises(SystemExit) as stop:
        clipjax("train", "--optimizer.lrr", "1e-3")
    assert stop.value.code == 2
    assert "--optimizer.lr" in capsys.readouterr().err
    assert not clipjax.workdir.exists()


def test_a_batch_that_the_mesh_does_not_divide(refused, clipjax):
    refused(
        ["batch_size=12", "8 batch shards", "multiple of 8"],
        "train",
        "--data.batch_size",
        12,
        devices=8,
    )
    refused(["accumulate=3", "multiple of 3"], "train", "--accumulate", 3)
    refused(["mesh", "devices"], "train", "--mesh.tensor", 3, devices=4)
    assert not clipjax.workdir.exists()


def test_settings_that_do_not_fit_each_other(refused, clipjax, vary):
    refused(["vocab_size=270", "tokenizer's"], "train", "--model.text.vocab_size", 270)
    refused(["context_length=9", "context_length=8"], "train", "--data.context_length", 9)
    refused(["eos_id=7", "tokenizer's is 2"], "train", "--model.text.eos_id", 7)
    refused(["duration"], "train", "--duration.amount", 0)
    refused(["warm-up of 9 steps", "run of 8"], "train", "--optimizer.schedule.warmup.amount", 9)
    refused(["amount=0"], "train", "--log_every.amount", 0)
    refused(["checkpoint.keep=0"], "train", "--checkpoint.keep", 0)
    refused(
        ["amount=0 minutes"],
        "train",
        "--checkpoint.every.amount",
        0,
        "--checkpoint.every.unit",
        "minutes",
    )
    refused(["'nothing/R@1'", "no evaluator"], "train", "--checkpoint.best", "nothing/R@1")
    changes = {
        "optimizer=replace(run.optimizer, groups=(Group('^vision/'),))": "matches no parameter",
        "optimizer=replace(run.optimizer, groups=(Group('.', frozen=True),))": "nothing to train",
        "optimizer=replace(run.optimizer, decayed='(')": "no regular expression",
        "sharding=Sharding(rules=(Rule('kernel$'),))": "no sharding rule covers",
        "evals=run.evals * 2": "2 evaluators are named 'retrieval'",
        "data=replace(run.data, augment=(Shift(16),))": "out of view",
    }
    for change, words in changes.items():
        refused([words], "train", config=vary(change))
    assert not clipjax.workdir.exists()


def test_pictures_that_do_not_decode_and_empty_captions(refused, clipjax, caplog):
    """A few are skipped, counted and named; too many fail the run, which had started: exit code 1."""
    assert (
        clipjax(
            "train", "--data.source.broken", 1, "--data.source.silent", 1, "--duration.amount", 4
        )
        == 0
    )
    assert "square-0" in caplog.text
    assert "square-1" in caplog.text
    assert "caption is empty" in caplog.text
    shutil.rmtree(clipjax.workdir)
    words = ["records cannot be used", "max_error_rate=0.01", "square-"]
    refused(words, "train", "--data.source.broken", 20, "--duration.amount", 40, code=1)


def test_folders_that_are_no_run(refused, tmp_path, clipjax):
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.txt").write_text("meow")
    refused(["photos", "no clipjax run"], "train", workdir=other)
    for verb in ("eval", "report"):
        refused(["photos is no clipjax run"], verb, workdir=other)
        refused(["nothing is no folder"], verb, workdir=tmp_path / "nothing")
        refused(["photos/cat.txt is no folder"], verb, workdir=other / "cat.txt")
    refused(["without a run.json"], "config", config=other)
    refused(["is a file"], "train", workdir=other / "cat.txt")
    assert files(other) == {next(iter(files(other))): b"meow"}


def test_a_checkpoint_of_another_model(refused, clipjax, vary):
    assert clipjax("train", "--duration.amount", 2, config=vary("evals=()")) == 0
    before = files(clipjax.workdir)
    message = refused(
        ["is of another model", "fc1/bias", "(2, 64)", "(2, 32)"],
        "train", "--model.image.mlp_dim", 32, "--duration.amount", 4,
    )  # fmt: skip
    assert message.count("\n") < 4
    refused(
        ["is of another model", "has no"],
        "train",
        "--model.image.pool",
        "map",
        "--duration.amount",
        4,
    )
    assert files(clipjax.workdir) == before


def test_a_run_whose_components_are_unknown(refused, clipjax, capsys):
    assert clipjax("config") == 0
    run = json.loads(capsys.readouterr().out)
    clipjax.workdir.mkdir()
    saved = clipjax.workdir / "run.json"
    run["data"]["source"]["@type"] = "somewhere_else:Squares"
    saved.write_text(json.dumps(run))
    refused(["somewhere_else:Squares", "--imports"], "config", config=clipjax.workdir)
    saved.write_text("{")
    refused(["not JSON"], "config", config=clipjax.workdir)


def test_a_run_that_diverges_names_the_last_good_checkpoint(refused, clipjax):
    words = ["3 steps in a row", "checkpoints/1", "optimizer.lr"]
    options = (
        "--optimizer.lr",
        1e30,
        "--max_bad_steps",
        3,
        "--checkpoint.every.amount",
        1,
        "--checkpoint.keep",
        50,
    )
    refused(words, "train", *options, code=1)


def test_debug_shows_the_traceback(clipjax, tmp_path):
    from clipjax.errors import ClipjaxError

    with pytest.raises(ClipjaxError):
        clipjax("eval", "--debug", workdir=tmp_path)


def test_unknown_verbs(capsys):
    from clipjax.cli import main

    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


def test_an_evaluator_that_fails_costs_no_work(refused, clipjax, vary):
    """At the very end of a run the state is saved before the failure is told."""
    change = "duration=Duration(2), evals=(Fails(),), checkpoint=Checkpointing(every=None)"
    config = vary(change)
    config.write_text(
        config.read_text()
        + """
from clipjax.errors import ClipjaxError

@dataclasses.dataclass(frozen=True)
class Fails(Evaluator):
    def run(self, predictor):
        raise ClipjaxError("no figures today")
"""
    )
    refused(["evaluator 'fails': no figures today"], "train", config=config, code=1)
    assert (clipjax.workdir / "checkpoints" / "2").is_dir()
