"""Data sets as CLIP_benchmark publishes them: tars by split, and beside them what they are for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipjax.data.webdataset import WebDataset
from clipjax.plain_text import read_text

NAMES_FILE, TEMPLATES_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
"""Names of classes and, "{c}" standing for one, templates, one a line."""
TYPE_FILE = "dataset_type.txt"
"""Says "retrieval" where each line of a .txt is a caption."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A published data set.

    Attributes:
      folder: where its files lie.
      source: the tars of a split, `.cls` for labels, each line of a `.txt` a caption of its own.
      names: path of its class names, or None.
      retrieval: whether it is one of captions.
    """

    folder: Path
    source: WebDataset
    names: str | None
    retrieval: bool


def published(name: str) -> Published | None:
    """The data set of which `name` is the folder, the folder of a split, or a pattern of its tars.

    Of the folder itself the split is "test". None for anything else.
    """
    place = Path(name).expanduser()
    if name.endswith(".tar"):
        shards, folders = name, (place.parent, place.parent.parent)
    elif any(place.glob("*.tar")):
        shards, folders = str(place / "*.tar"), (place, place.parent)
    elif any(place.glob("test/*.tar")):
        shards, folders = str(place / "test" / "*.tar"), (place,)
    else:
        return None
    for folder in folders:
        names, kind = folder / NAMES_FILE, folder / TYPE_FILE
        if names.is_file() or kind.is_file():
            retrieval = kind.is_file() and read_text(kind).strip().lower() == "retrieval"
            source = WebDataset(shards, label_key="cls", lines=retrieval)
            return Published(folder, source, str(names) if names.is_file() else None, retrieval)
    return None
