import dataclasses
import types

import numpy as np
import pytest

from clipjax.component import from_json, to_json
from clipjax.data import Tfds
from clipjax.errors import ClipjaxError, RunFailed
from clipjax.evals import KNN, Evaluator, Every, Geometry, Retrieval, ZeroShot, build_runners
from clipjax.evals.base import Runner

PREDICTOR = types.SimpleNamespace(image_size=2, context_length=5)


@dataclasses.dataclass(frozen=True)
class Constant(Evaluator):
    """A user's evaluator: one method."""

    value: float

    def run(self, predictor):
        return {f"{self.name}/value": self.value * predictor.image_size}


@dataclasses.dataclass(frozen=True)
class Failing(Evaluator):
    name: str = "failing"
    kind: str = "user"

    def run(self, predictor):
        raise {"user": ClipjaxError, "run": RunFailed, "bug": KeyError}[self.kind]("the reason")


def test_every_is_due_at_its_multiples():
    every = Every(50)
    assert [step for step in range(0, 201) if every.due(step)] == [50, 100, 150, 200]
    assert Every(50, at_start=True).due(0)
    with pytest.raises(ClipjaxError, match="amount=0"):
        Every(0)


def test_a_users_evaluator_needs_one_method():
    evaluator = Constant(3.0, every=Every(10))
    assert evaluator.name == "constant"
    assert evaluator.build()(PREDICTOR) == {"constant/value": 6.0}
    assert isinstance(evaluator.build()(PREDICTOR)["constant/value"], float)


def test_what_is_needed_is_loaded_once_for_each_size():
    class Counting(Runner):
        def load(self, predictor):
            loads.append((predictor.image_size, predictor.context_length))

        def evaluate(self, predictor):
            return {"counted": len(loads)}

    @dataclasses.dataclass(frozen=True)
    class Counted(Evaluator):
        def build(self):
            return Counting(self)

    loads: list = []
    runner, other = Counted().build(), types.SimpleNamespace(image_size=2, context_length=6)
    runner.prepare(PREDICTOR)
    assert runner(PREDICTOR) == runner(PREDICTOR) == {"counted": 1}
    assert runner(other) == {"counted": 2}
    assert loads == [(2, 5), (2, 6)]
    assert Counted().run(PREDICTOR) == {"counted": 3}  # what has a runner needs no `run`
    with pytest.raises(NotImplementedError, match="Evaluator has neither run nor build"):
        Evaluator().run(PREDICTOR)


def test_an_error_names_the_evaluator_and_keeps_its_kind():
    with pytest.raises(ClipjaxError, match=r"^evaluator 'failing': the reason$") as caught:
        Failing().build()(PREDICTOR)
    assert type(caught.value) is ClipjaxError
    with pytest.raises(RunFailed, match="evaluator 'mine': the reason"):
        Failing(name="mine", kind="run").build()(PREDICTOR)
    with pytest.raises(KeyError) as bug:
        Failing(kind="bug").build()(PREDICTOR)
    assert bug.value.__notes__ == ["raised by the evaluator 'failing' (Failing)"]


def test_names_must_be_distinct():
    runners = build_runners([Constant(1.0), Failing()])
    assert [evaluator.name for evaluator, _ in runners] == ["constant", "failing"]
    with pytest.raises(ClipjaxError, match=r"2 evaluators are named 'constant'.*'constant_2'"):
        build_runners([Constant(1.0), Constant(2.0)])
    with pytest.raises(ClipjaxError, match="without '/'"):
        build_runners([Failing(name="a/b")])


def test_evaluators_survive_json():
    source = Tfds("twemoji", "test")
    for evaluator in (
        Retrieval(source, every=Every(500), languages=("en", "zh")),
        ZeroShot(source, name="z", class_names={"en": ("a", "b")}, templates=("a {}",)),
    ):
        assert from_json(to_json(evaluator)) == evaluator


def test_what_several_evaluators_need_of_a_model_is_made_once(shades, table, reads):
    captions = (("red",), ("green",), ("green",), ("blue",))
    source = shades(captions, labels=(0, 0, 1, 2), class_names=("red", "green", "blue"))
    texts = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1], "a red": [1, 0, 0]}
    texts |= {"a green": [0, 1, 0], "a blue": [0, 0, 1]}

    class Counting(table):
        pictures = encoded = 0

        def encode_image_rows(self, read, count):
            self.pictures += count
            return super().encode_image_rows(read, count)

        def encode_text(self, tokens):
            self.encoded += len(tokens)
            return super().encode_text(tokens)

    predictor = Counting(np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 1, 0], [0, 0, 1]]), texts)
    evaluators = [
        ZeroShot(source),
        ZeroShot(source, name="twice", templates=("{}", "a {}")),
        Retrieval(source),
        KNN(train=source, source=source, k=1),
        KNN(train=source, source=source, k=2, name="knn2"),
        Geometry(source),  # its limit is beyond the end
        Retrieval(source, name="some", limit=3),
    ]
    runners = build_runners(evaluators)
    together = {k: v for _, runner in runners for k, v in runner(predictor).items()}
    # Four pictures; three names, each with two templates, of which the bare one is also the caption.
    assert (predictor.pictures, predictor.encoded, reads()) == (4, 6, 4)
    alone = {k: v for each in evaluators for k, v in each.run(predictor).items()}
    assert together == alone
    # Another model is asked anew, and the first one's embeddings are not kept for it.
    other = Counting(np.eye(3)[[1, 0, 2, 2]], texts)
    assert runners[0][1](other) == ZeroShot(source).run(other) != runners[0][1](predictor)
