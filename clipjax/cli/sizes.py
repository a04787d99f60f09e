"""`clipjax data sizes FILES`: how many records the files of a stream have, counted beforehand."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from clipjax.cli.models import say
from clipjax.errors import ClipjaxError


def add_verb(verbs: Any) -> None:
    """Adds it to the verbs of `clipjax data`."""
    sizes = verbs.add_parser(
        "sizes",
        help="count the records of the files of a stream",
        description="Count the records of each file of a stream into a sizes.json beside them, by which epochs are "
        "known before anything is read. What img2dataset wrote of them is taken; files of which nothing is known "
        "are gone through.",
    )
    sizes.add_argument(
        "files",
        metavar="FILES",
        help="a pattern of .tar, .tfrecord, .array_record or .parquet files, on disk or at an address",
    )
    sizes.add_argument(
        "--out", metavar="FILE", help="where to write it; default: sizes.json beside the files"
    )


def run(namespace: Any) -> int:
    """Counts, and writes `sizes.json`."""
    from clipjax.data import Stream
    from clipjax.data.found import files_source
    from clipjax.data.shards import SIZES, ShardsOf
    from clipjax.data.webdataset import expand
    from clipjax.files import replace_file

    pattern, files = namespace.files, expand(namespace.files)
    source = files_source(pattern)
    if source is None:
        raise ClipjaxError(f"{pattern!r} is of none of .tar, .tfrecord, .array_record, .parquet")
    if not files:
        raise ClipjaxError(f"no file matches {pattern!r}")
    folders = {file.rpartition("/")[0] for file in files}
    if len(folders) > 1:
        raise ClipjaxError(
            f"the files are in {len(folders)} folders; count those of each by themselves"
        )
    counted = ShardsOf(source, files, Stream(lanes=1), known=False)
    counts = counted.counts(np.arange(len(files)), ask=True)
    assert counts is not None
    if counted.failed:
        raise ClipjaxError(
            f"{len(counted.failed)} of {len(files)} files cannot be counted, such as {counted.failed[0]}; see above"
        )
    names = [os.path.basename(file) for file in files]
    folder = folders.pop()
    out = namespace.out or (f"{folder}/{SIZES}" if folder else SIZES)
    lines = ",\n".join(
        f"{json.dumps(name)}: {count}" for name, count in zip(names, counts.tolist(), strict=True)
    )
    try:
        replace_file(out, f"{{\n{lines}\n}}\n")
    except OSError as error:
        raise ClipjaxError(f"{out}: {error.strerror or error}") from error
    say(f"{int(counts.sum()):,} records in {len(files):,} files")
    print(out)
    return 0
