"""Component: a frozen dataclass that can be part of a run, and its form as JSON.

A component is configuration: plain fields, no arrays, no state. Its `build(...)` (towers, models,
optimizers, sources, ...) or its own methods (objectives, evaluators) do the work. A user's
component is any frozen dataclass that derives from one of ours; there is no registry to edit.

JSON form: `{"@type": "module:Class", field: value, ...}`. Reading it back builds only classes that
derive from `Component`, and never imports a module that the file names unless it belongs to
clipjax: a user's module must have been imported by the user first.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from typing import Any

from clipjax.errors import ClipjaxError, did_you_mean

TYPE_KEY = "@type"


@dataclasses.dataclass(frozen=True)
class Component:
    """Base of everything that can stand in a run's configuration."""

    @classmethod
    def upgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a saved configuration, as an earlier version wrote them, under today's names.

        Args:
          fields: what the file holds; may be changed.
        """
        return fields


def to_json(value: Any) -> Any:
    """Turns a component (or a tuple, dict or scalar inside one) into JSON-able data.

    Raises:
      ClipjaxError: a field holds something that JSON cannot, such as a function or an array.
    """
    if isinstance(value, Component):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {TYPE_KEY: type_name(type(value))} | {k: to_json(v) for k, v in fields.items()}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ClipjaxError(
        f"{value!r} ({type(value).__name__}) cannot be saved in a run's configuration: use numbers, "
        "strings, tuples, dicts, or a frozen dataclass that derives from clipjax.Component"
    )


def from_json(data: Any) -> Any:
    """The inverse of `to_json`; lists come back as tuples.

    Raises:
      ClipjaxError: the data names a class that is not importable here, is no component, or has
        other fields.
    """
    if isinstance(data, dict):
        items = {k: from_json(v) for k, v in data.items() if k != TYPE_KEY}
        if TYPE_KEY not in data:
            return items
        cls = _find_class(data[TYPE_KEY])
        return construct(cls, cls.upgraded(items))
    if isinstance(data, list):
        return tuple(from_json(v) for v in data)
    return data


def construct(cls: type[Component], fields: dict[str, Any]) -> Component:
    """`cls(**fields)`, refusing unknown fields by name with the nearest known one."""
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for name in fields:
        if name not in known:
            raise ClipjaxError(f"{cls.__name__} has no field {name!r}{did_you_mean(name, known)}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise ClipjaxError(f"{cls.__name__}: {error}") from error


def type_name(cls: type) -> str:
    """`"module:Class"`, the name under which JSON knows a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def _find_class(name: Any) -> type[Component]:
    module_name, _, class_name = str(name).partition(":")
    if module_name == "clipjax" or module_name.startswith("clipjax."):
        try:
            importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ClipjaxError(
                f"the configuration names {name!r}, which this version of clipjax lacks"
            ) from error
    module = sys.modules.get(module_name)
    if module is None:
        raise ClipjaxError(
            f"the configuration names {name!r}, from a module that is not imported: import it first "
            f"(on the command line: --imports path/to/{module_name.split('.')[-1]}.py)"
        )
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, Component)):
        raise ClipjaxError(f"the configuration names {name!r}, which is no clipjax.Component")
    return cls


def did_you_mean_field(class_name: str, field: str) -> str:
    """`did_you_mean` among the fields of the component called `class_name`, if one is known by that name."""
    for cls in _descendants(Component):
        if cls.__name__ == class_name and dataclasses.is_dataclass(cls):
            return did_you_mean(field, [f.name for f in dataclasses.fields(cls)])
    return ""


def _descendants(cls: type) -> list[type]:
    found: list[type] = []
    child: type
    for child in cls.__subclasses__():
        found += [child, *_descendants(child)]
    return found
