"""`clipjax eval`: every option, on model folders, a run, and small data sets on disk."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipjax.cli import main
from clipjax.component import to_json
from clipjax.config import load_config
from clipjax.evals.embed import embed_images

TINY = Path(__file__).parents[1] / "train" / "tiny.py"
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
RETRIEVED = "retrieval/image_to_text/R@1"


def test_zero_shot_with_prompts_templates_and_pictures(evaluate, world, tmp_path):
    test = world / "test"
    bare = evaluate("one", "--dataset", test)
    assert set(bare) == {"zeroshot/top1", "zeroshot/top5", "zeroshot/mean_per_class"}
    assert bare["zeroshot/top5"] == 1.0
    prompts = tmp_path / "prompts.json"
    content = {"names": ["Blue", "Green", "Red", "sun"], "templates": ["a {} thing", "the {}"]}
    prompts.write_text(json.dumps(content))
    templates = tmp_path / "templates.txt"
    templates.write_text("{}\n")
    named = ["--dataset", test, "--task", "zeroshot", "--prompts", prompts]
    full = evaluate("one", *named, "--calibration", "--confusion", tmp_path / "c.png")
    assert {"zeroshot/ece", "zeroshot/ece_scaled"} <= set(full)
    assert Image.open(tmp_path / "c.png").width > 300
    other = evaluate("one", *named, "--templates", templates, "--calibration", "--batch-size", 5)
    assert other["zeroshot/nll"] != full["zeroshot/nll"]
    mapped = tmp_path / "map.json"
    mapped.write_text(json.dumps({"red": ["Red", "sun"], "blue": "Blue"}))
    some = evaluate("one", *named, "--class-map", mapped, "--limit", 4)
    assert some["zeroshot/top1"] in (0.0, 1.0)  # the first four are blue


def test_probes(evaluate, world, monkeypatch):
    where = ["--dataset", world / "test", "--train-dataset", world / "train"]
    found = evaluate("one", *where, "--task", "linear_probe", "--folds", 3, "--seed", 1)
    assert found["linear_probe/top1"] == 1.0  # colors are easy
    assert -2 <= found["linear_probe/log10_C"] <= 7.5
    fixed = evaluate("one", *where, "--task", "linear_probe", "--log10-c", 2)
    assert fixed["linear_probe/log10_C"] == 2.0
    pooled = evaluate("one", *where, "--task", "knn", "--k", 3, "--features", "pooled")
    assert pooled["knn/top1"] == 1.0
    near = evaluate("one", *where, "--task", "knn", "--k", 3, "--temperature", 0.2)
    assert near["knn/top1"] == 1.0 and near["knn/plain/top1"] == 1.0
    embedded = []
    monkeypatch.setattr(
        "clipjax.evals.once.embed_images",
        lambda predictor, images, rows, output: (
            embedded.append(rows) or embed_images(predictor, images, rows, output)
        ),
    )
    few = evaluate(
        "one", *where, "--task", "few_shot", "--shots", "1,4", "--draws", 2, "--log10-c", 1,
        "--task", "knn", "--k", 3, "--temperature", 0.2,
    )  # fmt: skip
    assert len(embedded) == 2  # each split once, for both
    assert {name: few.pop(name) for name in near} == near
    assert set(few) == {
        f"few_shot/{n}_shot/{k}" for n in (1, 4) for k in ("top1", "top1_std", "mean_per_class")
    }
    assert few["few_shot/4_shot/top1"] > 0.5


def test_retrieval_geometry_and_several_data_sets(evaluate, world):
    pairs = world / "test-pairs"
    both = evaluate(
        "one", "--dataset", pairs, "--task", "retrieval", "--task", "geometry", "--limit", 5
    )
    assert {RETRIEVED, "geometry/modality_gap"} <= set(both)
    two = evaluate("one", "--dataset", pairs, "--dataset", world / "train-pairs")  # retrieval
    assert {"test-pairs_" + RETRIEVED, "train-pairs_" + RETRIEVED} <= set(two)


def test_compositional(evaluate, world, tmp_path):
    files = ["--dataset", world / "swap.json", "--dataset", world / "add.json"]
    found = evaluate("one", *files, "--task", "compositional", "--images", world / "test")
    assert found["compositional/swap/accuracy"] == found["compositional/add/accuracy"]
    assert found["compositional/accuracy"] in (0.0, 1.0)
    same = {"image": "red/0", "caption": "a red thing", "negative_caption": "a red thing"}
    (tmp_path / "same.json").write_text(json.dumps([same]))
    tie = [
        "--dataset",
        tmp_path / "same.json",
        "--task",
        "compositional",
        "--images",
        world / "test",
    ]
    assert evaluate("one", *tie)["compositional/accuracy"] == 0.0
    assert evaluate("one", *tie, "--ties", "first")["compositional/accuracy"] == 1.0


def test_a_tfds_data_set_by_name_split_and_languages(evaluate, tmp_path):
    build_tiny_tfds(tmp_path / "tfds")
    where = ["--data-dir", tmp_path / "tfds", "--limit", 6, "--image-key", "picture"]
    spoken = ["--caption-key", "spoken/words", "--language-key", "spoken/code"]
    found = evaluate(
        "one", "--dataset", "colors:1.0.0:test", "--languages", "zh,en", *spoken, *where
    )
    assert {"retrieval/zh/image_to_text/R@1", "retrieval/en/image_to_text/R@1"} <= set(found)
    labels = ["--dataset", "colors", "--label-key", "kind", "--task", "zeroshot", "--task", "knn"]
    found = evaluate("one", *labels, "--k", 1, *where)
    assert found["zeroshot/top5"] == 1.0
    assert found["knn/top1"] == 1.0  # from the split train
    sliced = ["--dataset", "colors:test[:6]", *labels[2:], "--train-dataset", "colors:train[:6]"]
    assert evaluate("one", *sliced, "--k", 1, *where[:2], *where[4:]) == found


def build_tiny_tfds(folder):
    import tensorflow_datasets as tfds

    class Colors(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "colors"
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # noqa: RUF012

        def _info(self):
            text = tfds.features.Text()
            features = {
                "picture": tfds.features.Image(),
                "kind": tfds.features.ClassLabel(names=list(COLORS)),
                "spoken": tfds.features.Sequence({"words": text, "code": text}),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            for i in range(9):
                name = list(COLORS)[i % 3]
                file = io.BytesIO()
                Image.new("RGB", (16, 16), COLORS[name]).save(file, "PNG")
                spoken = {"words": [f"a {name} thing", f"{name} {i}"], "code": ["en", "zh"]}
                yield (
                    str(i),
                    {"picture": io.BytesIO(file.getvalue()), "kind": name, "spoken": spoken},
                )

    Colors(data_dir=folder, file_format="array_record").download_and_prepare()


def test_a_table_of_several_models(world, capsys, one_device):
    models = [str(world / "one"), str(world / "two")]
    data = ["--dataset", str(world / "test-pairs"), "--task", "retrieval"]
    assert main(["eval", *models, *data, "--table", "csv", "--bootstrap", "100", "--json"]) == 0
    printed = capsys.readouterr()
    *lines, last = printed.out.splitlines()
    found = json.loads(last)
    assert list(found) == models
    assert found[models[0]].pop("interval_95") and found[models[1]]["difference"]
    assert "95 % intervals" in printed.err  # stdout is the table
    rows = list(csv.reader(lines))
    assert rows[0] == ["figure", *models] and len(rows) == 1 + len(found[models[0]])
    for name, *cells in rows[1:]:
        assert [float(c) for c in cells] == [found[m][name] for m in models]
    assert main(["eval", models[0], *data, "--table", "md"]) == 0
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["figure", models[0]]
    assert set(rule) == set("|-: ") and len({len(line) for line in (head, rule, *lines)}) == 1
    for line in lines:
        _, name, cell, _ = line.split("|")
        assert float(cell) == pytest.approx(found[models[0]][name.strip()], abs=5e-5)


def test_a_users_evaluator_is_a_task_with_its_fields_as_options(evaluate, world, tmp_path):
    file = tmp_path / "my_brightness.py"
    file.write_text(
        """
import dataclasses
from clipjax.data import Source
from clipjax.evals import Evaluator, Figure

@dataclasses.dataclass(frozen=True)
class MeanBrightness(Evaluator):
    source: Source
    name: str = "brightness"
    factor: float = 1.0
    \"\"\"Multiplies it.\"\"\"

    def run(self, predictor):
        count = len(self.source.open())
        return {
            f"{self.name}/mean": self.factor * count,
            f"{self.name}/share": Figure([i < 2 for i in range(count)]),
        }
"""
    )
    where = ["--imports", file, "--dataset", world / "test"]
    own = evaluate("one", *where, "--task", "mean_brightness", "--factor", 0.5)
    assert own == {"brightness/mean": 6.0, "brightness/share": pytest.approx(2 / 12)}
    both = evaluate("one", *where, "--task", "MeanBrightness", "--task", "geometry", "--limit", 4)
    assert both["brightness/mean"] == 12.0 and "geometry/alignment" in both
    found = evaluate("one", *where, "--task", "mean_brightness", "--bootstrap", 100)
    assert set(found["interval_95"]) == {"brightness/share"}  # a plain float has none


def test_tars_with_labels_and_tables_with_other_columns(evaluate, refused, world, tmp_path):
    """CLIP_benchmark's classification tars hold `.cls`."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, name in enumerate(COLORS):
            for suffix, content in (
                ("png", (world / "test" / name / "0.png").read_bytes()),
                ("cls", str(i).encode()),
                ("txt", f"a {name} thing".encode()),
            ):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    prompts = tmp_path / "p.json"
    prompts.write_text(json.dumps({"names": list(COLORS), "templates": ["a {} thing"]}))
    tars = ["--dataset", tmp_path / "a.tar", "--label-key", "cls"]
    found = evaluate("one", *tars, "--task", "zeroshot", "--prompts", prompts)
    folder = evaluate("one", "--dataset", tmp_path / "a.tar", "--task", "retrieval")
    assert found["zeroshot/top1"] == folder["retrieval/image_to_text/R@1"]
    rows = [f"{world}/test/{name}/0.png,a {name} thing,{name}" for name in COLORS]
    table = tmp_path / "table"
    table.mkdir()
    for name in COLORS:
        shutil.copy(world / "test" / name / "0.png", table / f"{name}.png")
    rows = [f"{name}.png,a {name} thing,{name}" for name in COLORS]
    (table / "captions.csv").write_text("\n".join(["filepath,title,kind", *rows]))
    keys = ["--image-key", "filepath", "--caption-key", "title", "--label-key", "kind"]
    two_tasks = ["--task", "retrieval", "--task", "zeroshot"]
    two = evaluate("one", "--dataset", table, *keys, *two_tasks)
    assert two["retrieval/image_to_text/R@1"] == folder["retrieval/image_to_text/R@1"]
    assert two["zeroshot/top5"] == 1.0
    columns = {
        "filepath": [(world / "test" / name / "0.png").read_bytes() for name in COLORS],
        "title": [f"a {name} thing" for name in COLORS],
        "kind": [0, 1, 2],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    parquet = ["--dataset", tmp_path / "t.parquet", *keys]
    assert evaluate("one", *parquet, *two_tasks, "--prompts", prompts) == found | folder
    parquet[-1] = "title"
    assert "label_column='title' holds string" in refused("one", *parquet, *two_tasks[2:])


def test_intervals_and_differences_on_the_same_pictures(evaluate, world):
    models = ["one", "two"]
    options = ["--dataset", world / "test-pairs", "--task", "retrieval", "--bootstrap", 300]
    one, two = evaluate(models, *options).values()
    low, high = one["interval_95"][RETRIEVED]
    assert low <= one[RETRIEVED] <= high
    apart = two["difference"][RETRIEVED]
    assert apart["value"] == pytest.approx(two[RETRIEVED] - one[RETRIEVED])
    assert apart["low"] <= apart["value"] <= apart["high"] and 0 < apart["p"] <= 1
    assert 0 < apart["mcnemar"] <= 1
    assert set(one["interval_95"]) == set(one) - {"interval_95"}  # every figure has one
    assert "difference" not in one


def test_figures_are_printed_whatever_becomes_of_the_picture(world, capsys, one_device, tmp_path):
    odd = tmp_path / "odd"
    for name in ("ba$$ guitar", "$5 or $10"):
        (odd / name).mkdir(parents=True)
        shutil.copy(world / "test" / "red" / "0.png", odd / name)
    picture = tmp_path / "c.png"
    options = ["--dataset", str(odd), "--confusion", str(picture), "--json"]
    assert main(["eval", str(world / "one"), *options]) == 0
    assert "zeroshot/top1" in capsys.readouterr().out and Image.open(picture).width > 300


def test_evaluators_from_a_file(evaluate, world, tmp_path):
    file = tmp_path / "my_evals.py"
    file.write_text(
        "from clipjax.data import ClassFolder\nfrom clipjax.evals import ZeroShot\n"
        f"def evals():\n    return (ZeroShot(ClassFolder({str(world / 'test')!r}), name='mine'),)\n"
    )
    assert "mine/top1" in evaluate("one", "--evals", file, "--confusion", tmp_path / "c.png")
    assert (tmp_path / "c.png").is_file()


def test_the_robustness_file_is_a_file_of_evaluators():
    from clipjax.cli.eval import _from_file

    found = _from_file(Path(__file__).parents[2] / "configs" / "robustness.py")
    assert [e.name for e in found] == [
        "imagenet",
        "imagenet_v2",
        "imagenet_sketch",
        "imagenet_r",
        "imagenet_a",
    ]


def test_a_run_and_a_model_side_by_side(evaluate, refused, world, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert main(["train", str(TINY), "--workdir", str(run), "--duration.amount", "1"]) == 0
    capsys.readouterr()
    found = evaluate([run, "one"], "--dataset", world / "test-pairs")
    assert found[str(run)]["step"] == 1 and "step" not in found[str(world / "one")]
    own = evaluate(run, "--batch-size", 3)
    results = json.loads((run / "results.json").read_text())
    assert own["step"] == 1 and own[RETRIEVED] == results[RETRIEVED]
    # The run has ended: its one checkpoint is evaluated once, and not again.
    assert evaluate(run, "--watch", "--batch-size", 3) == own
    (line,) = (run / "watched.jsonl").read_text().splitlines()
    assert json.loads(line) == own
    assert main(["eval", str(run), "--watch"]) == 0
    assert (run / "watched.jsonl").read_text().splitlines() == [line]
    # Started before its run, it says so and waits.
    (run / "watched.jsonl").unlink()
    late, slept, said = tmp_path / "late", [], []
    monkeypatch.setattr("clipjax.cli.watch.say", said.append)
    monkeypatch.setattr(
        "clipjax.cli.watch.time.sleep", lambda s: slept.append(s) or run.rename(late)
    )
    assert evaluate(late, "--watch", "--poll", 7, "--batch-size", 3) == own
    assert slept == [7.0]
    assert said == [f"--watch {late}: it is not there yet; waiting for the first one"]
    assert "one: this is no run" in refused("one", "--watch")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Six runs of the tiny config that ended on a power law, as far as their files say."""
    root = tmp_path_factory.mktemp("runs")
    run = load_config(TINY)
    for i, steps in enumerate((10, 30, 100, 300, 1000, 3000)):
        folder = root / f"run{i}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(to_json(run)))
        error = 2.0 * (16 * steps) ** -0.4 + 0.1
        results = {"step": steps, "seconds": 1.0, RETRIEVED: 1 - error, "loss": 3 * error}
        (folder / "results.json").write_text(json.dumps(results))
    return root


def fit(finished, capsys, *options):
    runs = [str(finished / f"run{i}") for i in range(6)]
    code = main(["eval", *runs, "--fit-scaling", "--imports", str(TINY), *map(str, options)])
    return code, capsys.readouterr()


def test_a_scaling_law_over_runs(finished, capsys, tmp_path):
    code, said = fit(finished, capsys, "--json", "--plot", tmp_path / "law.png", "--resamples", 20)
    assert code == 0
    found = json.loads(said.out.splitlines()[-1])
    assert found["fit"]["b"] == pytest.approx(0.4, abs=0.01)
    assert found["fit"]["c"] == pytest.approx(0.1, abs=0.003)
    assert found["points"][0]["x"] == 160 and set(found["interval_95"]) == {"a", "b", "c"}
    assert Image.open(tmp_path / "law.png").width == 900
    code, said = fit(
        finished, capsys, "--json", "--metric", "loss", "--x", "flops", "--resamples", 0
    )
    found = json.loads(said.out.splitlines()[-1])
    assert found["fit"]["c"] == pytest.approx(0.3, abs=0.01) and found["interval_95"] == {}
    # more than 3 x 2 operations for each weight of a product and example, and not orders more
    assert 1e5 < found["points"][0]["x"] / 160 < 1e7


def test_a_scaling_law_that_cannot_be_fitted_is_refused(finished, capsys, refused):
    for options, message in (
        (["--metric", "retrieval/image_to_text/R@2"], "did you mean 'retrieval/image_to_text/R@1'"),
        (["--x", "flop"], "no axis 'flop'; did you mean 'flops'"),
        (["--x", "params"], "1 different values of x"),  # all have the same size
        (["--resamples", "-1"], "must be at least 0"),
        (["--limit", 3], "--limit has no effect with --fit-scaling"),
        (["--plot", finished / "none" / "x.png", "--resamples", 0], "cannot be written"),
    ):
        code, said = fit(finished, capsys, *options)
        assert code == 2 and message in said.err
    assert "holds no results.json" in refused("one", "--fit-scaling")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "zero_shot", "--dataset", "x"], "no task 'zero_shot'; did you mean 'zeroshot'"),
        (["--datset", "x"], "no option '--datset'; did you mean '--dataset'"),
        ([], "is a model without evaluators of its own"),
        (["--k", 3], "--k needs --dataset"),
        (["--task", "knn"], "--task needs --dataset"),
        (["--dataset", "cifar10", "--k", 3], "--k is for --task knn"),
        (["--dataset", "cifar10", "--metric", "x"], "--metric needs --fit-scaling"),
        (["--dataset", "cifar10", "--evals", "x.py"], "give one"),
        (["--evals", "none.py"], "none.py: no such file"),
        (["--dataset", "./none"], "no folder './none'"),
        (["--dataset", "nine", "--data-dir", "/none"], "the data set 'nine' is not in '/none'"),
        (["--dataset", "x:train", "--task", "knn"], "--task knn: say with --train-dataset"),
        (["--dataset", "x", "--task", "few_shot", "--shots", "two"], "--shots two"),
        (["--dataset", "x", "--task", "zeroshot", "--ties", "last"], "--ties last: choose of"),
        (["--dataset", "x:test[", "--confusion", "none/c.png"], "no folder to write 'none/c.png'"),
        (["--dataset", "x", "--confusion", "c.pgn"], "'c.pgn': pictures are written as"),
        (["--dataset", "x", "--bootstrap", 5], "--bootstrap 5: an interval takes at least 100"),
        (["--dataset", "x", "--poll", 5], "--poll needs --watch"),
        (["--fit-scaling", "--poll", 5], "--poll has no effect with --fit-scaling"),
        (["--dataset", "x", "--watch", "--table", "md"], "--watch prints"),
        (["--dataset", "x[:5]"], "name the split before its slice, as in x:test[:5]"),
        (["--dataset", "x.json", "--task", "compositional"], "needs --images"),
        (
            ["--dataset", "x", "--task", "compositional", "--task", "knn", "--images", "."],
            "by itself",
        ),
        (
            ["--dataset", "x", "--dataset", "y", "--task", "zeroshot", "--confusion", "c.png"],
            "one data set",
        ),
        (["--dataset", "x", "--task", "zeroshot", "--templates", "none"], "no file of templates"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_evaluated(refused, options, message):
    assert message in refused("one", *options)


def test_a_model_that_is_not_there_is_found_before_the_first_is_evaluated(refused, world):
    error = refused(["one", "three"], "--dataset", world / "test-pairs")
    assert "three is no folder" in error
    assert "not for what is at" in refused("one", "--dataset", world / "test", "--label-key", "x")


def test_a_model_that_writes_no_captions_is_named_before_a_picture_is_read(refused, world):
    said = refused(["one", "two"], "--dataset", world / "test-pairs", "--task", "captioning")
    assert "one: evaluator 'captioning': the model, of the kind DualEncoder, has no capt" in said


def test_a_file_without_evaluators_is_refused(refused, tmp_path):
    (tmp_path / "nothing_here.py").write_text("x = 1\n")
    assert "defines `def evals()" in refused("one", "--evals", tmp_path / "nothing_here.py")
    (tmp_path / "nothing_returned.py").write_text("def evals():\n    return ()\n")
    assert "at least one" in refused("one", "--evals", tmp_path / "nothing_returned.py")
