"""METEOR and SPICE, which are Java programs that `pycocoevalcap` brings along.

They need the extra `captioning` and a Java on the PATH. SPICE fetches its parser's models (about
500 MB) when it first runs; METEOR fetches nothing. Both know English only.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import shutil
from collections.abc import Sequence

from clipjax.errors import ClipjaxError, RunFailed

_MODULES = {
    "METEOR": ("pycocoevalcap.meteor.meteor", "Meteor"),
    "SPICE": ("pycocoevalcap.spice.spice", "Spice"),
}


def require(metrics: Sequence[str]) -> None:
    """Makes sure that metrics can be had.

    Args:
      metrics: among "METEOR" and "SPICE".

    Raises:
      ClipjaxError: the package or Java is missing.
    """
    names = " and ".join(metrics)
    if metrics and importlib.util.find_spec("pycocoevalcap") is None:
        raise ClipjaxError(
            f"{names} need the package pycocoevalcap: pip install 'clipjax[captioning]', or turn "
            "them off"
        )
    if metrics and shutil.which("java") is None:
        raise ClipjaxError(
            f"{names} need Java, and there is no `java` on the PATH: install a Java runtime, or turn "
            "them off"
        )


def score(
    metrics: Sequence[str],
    candidates: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
) -> dict[str, float]:
    """The corpus figures by name.

    Args:
      metrics: among "METEOR" and "SPICE".
      candidates: tokens of a caption for each picture.
      references: tokens of one or more captions for each picture.

    Raises:
      ClipjaxError: as `require` does.
      RunFailed: the Java program failed.
    """
    require(metrics)
    given = {i: [" ".join(tokens) for tokens in own] for i, own in enumerate(references)}
    made = {i: [" ".join(tokens)] for i, tokens in enumerate(candidates)}
    results = {}
    for name in metrics:
        module, cls = _MODULES[name]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                scorer = getattr(importlib.import_module(module), cls)()
                results[name] = float(scorer.compute_score(given, made)[0])
        except Exception as error:  # a subprocess, a pipe, a download: anything
            raise RunFailed(f"{name} failed: {type(error).__name__}: {error}") from error
    return results
