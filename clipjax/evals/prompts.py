"""Class names and prompts of well-known data sets, as data files, and how labels find their names.

The files are in `clipjax/evals/classes/`, one a data set: `names` in the order of the labels,
`templates`, for ImageNet `synsets`, and `labels` where the data set has other names. Names are
facts; the templates were written for clipjax in the spirit of CLIP's (arXiv:2103.00020, section
3.1.4) and are not those behind published figures. A file of one's own has the same form and is given by its path.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.data.published import TEMPLATES_FILE
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.plain_text import read_json, read_lines

logger = logging.getLogger(__name__)

Names = tuple[str, ...]
FOLDER = Path(__file__).parent / "classes"


@dataclasses.dataclass(frozen=True)
class ClassSet:
    """What the classes of a data set are called and how to ask for them.

    Attributes:
      name: for messages.
      names: in the order of the labels.
      templates: prompts, "{}" standing for a name; may be empty.
      synsets: WordNet ids in the order of the labels, or empty.
      labels: what the data set itself calls its classes, where that differs from `names`, or empty.
      indices: for a set that has part of another's classes: their labels there, ascending; else
        empty.
      whole: how many classes the other has, 0 without `indices`.
    """

    name: str
    names: Names
    templates: Names = ()
    synsets: Names = ()
    labels: Names = ()
    indices: tuple[int, ...] = ()
    whole: int = 0


def shipped_classes() -> list[str]:
    """Names of the data sets whose classes come with clipjax."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_classes(name: str) -> ClassSet:
    """The classes of a well-known data set, or those in a JSON file of one's own.

    Args:
      name: one of `shipped_classes()`, or a path that ends in .json; or files as CLIP_benchmark has them:
        the path of a `classnames.txt`, with the templates beside it, or `en_classnames.json:food101`, of a
        file of several data sets.

    Raises:
      ClipjaxError: there is no such set or file, or the file is not of that form.
    """
    if name.endswith(".txt"):
        return _published(Path(name).expanduser())
    if ".json:" in name:
        return ClassSet(name, _of_several(name, "names"))
    path = Path(name).expanduser() if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise ClipjaxError(
            f"there are no class names {name!r}{did_you_mean(name, shipped_classes())} "
            "(or give the path of a .json file)"
        )
    content = read_json(path)
    if not isinstance(content, dict):
        raise ClipjaxError(f"{path}: expected an object with 'names' or 'subset_of'")
    known = ("about", "names", "templates", "synsets", "labels", "subset_of", "classes")
    for key in content:
        if key not in known:
            raise ClipjaxError(f"{path}: unknown key {key!r}{did_you_mean(key, known)}")
    if "subset_of" in content:
        return _subset(name, path, content)
    names = _strings(path, content, "names", needed=True)
    synsets = _strings(path, content, "synsets")
    labels = _strings(path, content, "labels")
    for key, value in (("synsets", synsets), ("labels", labels)):
        if value and len(value) != len(names):
            raise ClipjaxError(f"{path}: {len(value)} {key} for {len(names)} names")
    templates = _checked(path, _strings(path, content, "templates"))
    return ClassSet(name, names, templates, synsets, labels)


def read_templates(path: str) -> Names:
    """Prompts from a file: one a line, or a JSON list, or the `templates` of a file of classes.

    CLIP_benchmark's are read by their names: `zeroshot_classification_templates.txt`, and
    `FILE.json:food101` of a file of several data sets; in these "{c}" stands for the name.

    Raises:
      ClipjaxError: the file is missing or has none, or one lacks the {} for the name.
    """
    if ".json:" in path:
        return _checked(path, _in_braces(_of_several(path, "templates")))
    file = Path(path).expanduser()
    if not file.is_file():
        raise ClipjaxError(f"there is no file of templates {path!r}")
    if file.suffix == ".json":
        content = read_json(file)
        content = content if isinstance(content, dict) else {"templates": content}
        templates = _strings(file, content, "templates", needed=True)
    else:
        templates = tuple(read_lines(file, "the file of templates"))
    return _checked(path, _in_braces(templates) if file.name == TEMPLATES_FILE else templates)


def _published(names: Path) -> ClassSet:
    templates: Names = ()
    if (names.parent / TEMPLATES_FILE).is_file():
        templates = read_templates(str(names.parent / TEMPLATES_FILE))
    return ClassSet(str(names), tuple(read_lines(names, "the file of class names")), templates)


def _of_several(name: str, what: str) -> Names:
    """The list of one data set in a JSON object of several: FILE.json:NAME."""
    path, _, key = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ClipjaxError(f"there is no file of {what} {path!r}")
    content = read_json(file)
    if not isinstance(content, dict) or key not in content:
        known = list(content) if isinstance(content, dict) else []
        raise ClipjaxError(f"{path} has no data set {key!r}{did_you_mean(key, known)}")
    return _strings(file, content, key, needed=True)


def _in_braces(templates: Names) -> Names:
    return tuple(template.replace("{c}", "{}") for template in templates)


def _checked(path: str | Path, templates: Names) -> Names:
    for template in templates:
        if "{}" not in template:
            raise ClipjaxError(
                f"{path}: the template {template!r} lacks the {{}} for the class name"
            )
    return templates


def label_map(classes: ClassSet, declared: Names | None, labels: np.ndarray) -> np.ndarray:
    """Where the labels of a data set are among `classes.names`.

    A data set that declares its classes as WordNet ids (ImageNet folders), as the numbers of the
    labels ("0", "1", "10", ... in the order of sorted folders: ImageNet-V2), or by these very names
    is matched by them. Otherwise labels count in the order of the names; those of a set like
    ImageNet-R may be the labels of all of ImageNet.

    Args:
      classes: the names.
      declared: the data set's own names of its labels, if it has any.
      labels: [n] int that occur; -1 is unknown.

    Returns:
      int [L]: by the data set's label, the index of the name, -1 for classes without one.

    Raises:
      ClipjaxError: there are more labels than names.
    """
    size = max(len(declared or ()), int(labels.max(initial=-1)) + 1)
    found = _by_declared(classes, declared) if declared else None
    if found is not None:
        return found
    if classes.indices and size > len(classes.names):
        found = np.full(max(size, classes.whole), -1)
        found[list(classes.indices)] = np.arange(len(classes.names))
        if size <= classes.whole:
            return found
    if size > len(classes.names):
        raise ClipjaxError(
            f"the data set has {size} classes, but {classes.name!r} names {len(classes.names)}: "
            "choose other class names, or a class_map from one to the other"
        )
    if declared and not all(name.isdigit() for name in declared):
        logger.warning(
            "the data set's classes (%s, ...) are taken to be those of %r in order (%s, ...)",
            declared[0], classes.name, classes.names[0],
        )  # fmt: skip
    return np.arange(size)


def read_class_map(path: str, classes: ClassSet, declared: Names | None) -> dict[int, list[int]]:
    """By the data set's label, the classes of another set that it stands for.

    The file is a JSON object from a class of the data set (its declared name, or its label's
    number) to a class of `classes` or a list of them, each by its label, WordNet id or name.
    Classes that it leaves out take no part. It is how ObjectNet is read with ImageNet's classes.

    Raises:
      ClipjaxError: the file is missing or names a class that is unknown on either side.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ClipjaxError(f"there is no class_map {path!r}")
    content = read_json(file)
    if not isinstance(content, dict) or not content:
        raise ClipjaxError(f"{path}: expected an object from classes to classes")
    own = {_plain(name): i for i, name in enumerate(declared or ())}
    others = {_plain(name): i for i, name in enumerate(classes.names)}
    others |= {synset: i for i, synset in enumerate(classes.synsets)}
    result: dict[int, list[int]] = {}
    for key, value in content.items():
        label = own.get(_plain(key), int(key) if key.isdigit() and not declared else None)
        if label is None:
            raise ClipjaxError(f"{path}: the data set has no class {key!r}{did_you_mean(key, own)}")
        result[label] = [
            _index(path, entry, classes, others)
            for entry in (value if isinstance(value, list) else [value])
        ]
    taken = [index for indices in result.values() for index in indices]
    if len(set(taken)) < len(taken):
        twice = next(index for index in taken if taken.count(index) > 1)
        raise ClipjaxError(f"{path}: {classes.names[twice]!r} stands for two classes")
    return dict(sorted(result.items()))


def _subset(name: str, path: Path, content: dict[str, Any]) -> ClassSet:
    whole = read_classes(str(content["subset_of"]))
    indices = content.get("classes")
    if (
        not isinstance(indices, list)
        or not indices
        or any(not isinstance(i, int) or not 0 <= i < len(whole.names) for i in indices)
        or sorted(set(indices)) != indices
    ):
        raise ClipjaxError(f"{path}: 'classes' must list labels of {whole.name} in ascending order")
    return ClassSet(
        name,
        tuple(whole.names[i] for i in indices),
        _checked(path, _strings(path, content, "templates")) or whole.templates,
        tuple(whole.synsets[i] for i in indices) if whole.synsets else (),
        indices=tuple(indices),
        whole=len(whole.names),
    )


def _strings(path: Path, content: dict[str, Any], key: str, needed: bool = False) -> Names:
    value = content.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ClipjaxError(f"{path}: {key!r} must be a list of strings")
    if needed and not value:
        raise ClipjaxError(f"{path}: {key!r} is missing or empty")
    return tuple(value)


def _by_declared(classes: ClassSet, declared: Names) -> np.ndarray | None:
    """Labels matched by what the data set calls them; None where that says nothing."""
    if classes.synsets:
        by_synset = {synset: i for i, synset in enumerate(classes.synsets)}
        prefixes = [name.split("-")[0] for name in declared]
        if all(len(p) == 9 and p[0] == "n" and p[1:].isdigit() for p in prefixes):
            return np.array([by_synset.get(prefix, -1) for prefix in prefixes])
    names = [_plain(name) for name in declared]
    for known in (classes.labels, classes.names):
        by_name = {_plain(name): i for i, name in enumerate(known)}
        if len(by_name) == len(known) and set(names) <= set(by_name):
            return np.array([by_name[name] for name in names])
    if all(name.isdigit() for name in declared):
        numbers = np.array([int(name) for name in declared])
        if len(declared) <= len(classes.names) and numbers.max() < len(classes.names):
            return numbers
    return None


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()


def _index(path: str, entry: Any, classes: ClassSet, known: dict[str, int]) -> int:
    if isinstance(entry, int) and 0 <= entry < len(classes.names):
        return entry
    index = known.get(entry, known.get(_plain(entry))) if isinstance(entry, str) else None
    if index is None:
        raise ClipjaxError(
            f"{path}: {classes.name} has no class {entry!r}{did_you_mean(str(entry), known)}"
            if isinstance(entry, str)
            else f"{path}: {entry!r} is no class of {classes.name} (0 to {len(classes.names) - 1})"
        )
    return index
