"""What a checkpoint holds beside the train state: the run, its tokenizer, where it is, how good it was."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from clipjax.errors import ClipjaxError

FORMAT = 2
"""1: the optimizer's state by position, no checksums, no count of examples; still read."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """One checkpoint's facts. `from_json` is the only reader."""

    run: dict[str, Any]
    """The run as JSON."""
    tokenizer: dict[str, str]
    """Its files (`pack_tokenizer`)."""
    step: int = 0
    """Finished steps."""
    examples_seen: int | None = None
    """Examples that these steps took; None in format 1, where it is the step times the batch size."""
    num_examples: int | None = None
    """Examples in an epoch; None in format 1."""
    fingerprint: str | None = None
    """Of the data (`Loader.fingerprint`); None in format 1."""
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    """Evaluation figures of this very step."""
    sums: dict[str, int] = dataclasses.field(default_factory=dict)
    """Checksum of every array of the state, by path (`checksums`)."""
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """JSON-able, with a digest over all of it."""
        data = dataclasses.asdict(self)
        return data | {"digest": _digest(data)}

    @classmethod
    def from_json(cls, data: Any, where: str) -> Meta:
        """Reads any format.

        Args:
          data: what `to_json` gave, now or in an earlier version.
          where: names the checkpoint in messages.

        Raises:
          ClipjaxError: it is of a later version.
          ValueError: it is damaged.
        """
        if not isinstance(data, dict) or not isinstance(data.get("format"), int):
            raise ValueError("its meta is damaged: it says no format")
        if data["format"] > FORMAT:
            raise ClipjaxError(
                f"{where} was written in format {data['format']}, and this clipjax reads formats up to "
                f"{FORMAT}: take the version that wrote it, or a later one"
            )
        if data["format"] > 1:
            data = dict(data)
            if data.pop("digest", None) != _digest(data):
                raise ValueError("its meta is damaged: the digest differs")
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})

    def examples(self, step: int) -> int:
        """Examples seen up to this checkpoint, whichever format it has."""
        if self.examples_seen is not None:
            return self.examples_seen
        return step * int(self.run["data"]["batch_size"])


def _digest(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def pack_tokenizer(tokenizer: Any) -> dict[str, str]:
    """The files that `tokenizer.save` writes, as JSON-able text (base64)."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = sorted(Path(folder).iterdir())
        return {file.name: base64.b64encode(file.read_bytes()).decode() for file in files}


def unpack_tokenizer(files: dict[str, str], folder: Path) -> None:
    """Writes what `pack_tokenizer` packed.

    Raises:
      ClipjaxError: a name that would leave the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise ClipjaxError(f"a checkpoint's tokenizer names the file {name!r}: refused")
        (folder / name).write_bytes(base64.b64decode(content))
