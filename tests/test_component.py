"""Components as JSON: exact round trips, and refusals that name what is wrong."""

import dataclasses
import sys
import types

import pytest

from clipjax.component import Component, from_json, to_json
from clipjax.errors import ClipjaxError
from clipjax.optim import AdamW, Cosine, Duration, Group


@dataclasses.dataclass(frozen=True)
class Mine(Component):
    size: int | tuple[int, int] = 3
    table: dict[str, float] = dataclasses.field(default_factory=dict)
    inner: Component | None = None


@pytest.fixture
def module():
    """This file under a name that JSON can find, as a user's imported module would be."""
    module = types.ModuleType("my_towers")
    module.Mine = Mine
    module.Plain = dict
    Mine.__module__ = "my_towers"
    sys.modules["my_towers"] = module
    yield module
    del sys.modules["my_towers"]


def test_round_trip_is_equal(module):
    value = Mine(
        size=(2, 5),
        table={"a": 0.1},
        inner=AdamW(
            lr=3e-4, schedule=Cosine(warmup=Duration(2, "epochs")), groups=(Group("^image/"),)
        ),
    )
    assert from_json(to_json(value)) == value


def test_unknown_field_names_the_nearest():
    data = to_json(AdamW()) | {"weight_dacay": 0.1}
    with pytest.raises(
        ClipjaxError, match="AdamW has no field 'weight_dacay'; did you mean 'weight_decay'"
    ):
        from_json(data)


def test_classes_that_are_no_components_are_refused(module):
    for name in (
        "my_towers:Plain",
        "clipjax.optim.duration:Scale",
        "clipjax.component:sys",
        "my_towers:nothing",
    ):
        with pytest.raises(ClipjaxError, match="no clipjax.Component"):
            from_json({"@type": name})


def test_modules_are_never_imported_on_the_word_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ClipjaxError, match="--imports path/to/hostile.py"):
        from_json({"@type": "hostile:Anything"})
    assert "hostile" not in sys.modules


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(ClipjaxError, match="cannot be saved"):
        to_json(Mine(size=len))
