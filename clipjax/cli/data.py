"""`clipjax data index SHARDS --index-dir DIR`: what training needs to know of tars, found beforehand."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable

import numpy as np

from clipjax.cli.arguments import new_parser
from clipjax.cli.models import say
from clipjax.errors import ClipjaxError, did_you_mean

VERBS = ("index", "sizes")


def main(arguments: list[str]) -> int:
    """Runs one of the verbs."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        raise ClipjaxError(f"clipjax data: no {arguments[0]!r}{did_you_mean(arguments[0], VERBS)}")
    parser = new_parser("data", "Prepare data for training.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    index = verbs.add_parser(
        "index",
        help="find where the samples of WebDataset tars are",
        description="Find where the samples of WebDataset tars are, 12 bytes each, in one file that runs with "
        "the same shards, image_keys and index_dir map into memory. Tars that are damaged or cut short are "
        "named; those that are in the index already and have not changed are not read again.",
    )
    index.add_argument("shards", metavar="SHARDS", help='a pattern such as "data/{0000..0099}.tar"')
    index.add_argument(
        "--index-dir", required=True, metavar="DIR", help="WebDataset's index_dir: where to keep it"
    )
    index.add_argument(
        "--image-keys",
        nargs="+",
        metavar="EXTENSION",
        help="extensions of pictures; default: the source's",
    )
    index.add_argument(
        "--skip-damaged", action="store_true", help='leave damaged tars out, as damaged="skip" does'
    )
    index.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes that scan; default: one a core",
    )  # fmt: skip
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
    namespace = parser.parse_args(arguments)
    return _sizes(namespace) if namespace.verb == "sizes" else _index(namespace)


def _sizes(namespace) -> int:
    from clipjax.data import ArrayRecord, Parquet, Source, Stream, TFRecord, WebDataset
    from clipjax.data.shards import SIZES, ShardsOf
    from clipjax.data.webdataset import expand
    from clipjax.files import replace_file

    kinds: dict[str, Callable[[str], Source]] = {
        ".tar": WebDataset,
        ".tfrecord": TFRecord,
        ".array_record": ArrayRecord,
        ".parquet": lambda files: Parquet(files=files),
    }
    pattern, files = namespace.files, expand(namespace.files)
    end = os.path.splitext(pattern)[1]
    if end not in kinds:
        raise ClipjaxError(f"clipjax data sizes: {pattern!r} is of none of {', '.join(kinds)}")
    if not files:
        raise ClipjaxError(f"clipjax data sizes: no file matches {pattern!r}")
    folders = {file.rpartition("/")[0] for file in files}
    if len(folders) > 1:
        raise ClipjaxError(
            f"clipjax data sizes: the files are in {len(folders)} folders; count those of each by themselves"
        )
    counted = ShardsOf(kinds[end](pattern), files, Stream(lanes=1), known=False)
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
    replace_file(out, f"{{\n{lines}\n}}\n")
    say(f"{int(counts.sum()):,} records in {len(files):,} files")
    print(out)
    return 0


def _index(namespace) -> int:
    from clipjax.data.webdataset import WebDataset

    if namespace.workers < 1:
        raise ClipjaxError(f"--workers {namespace.workers} must be at least 1")
    source = WebDataset(
        namespace.shards,
        index_dir=namespace.index_dir,
        damaged="skip" if namespace.skip_damaged else "refuse",
    )
    if namespace.image_keys is not None:
        source = dataclasses.replace(source, image_keys=tuple(namespace.image_keys))
    began = time.monotonic()
    if namespace.workers == 1:
        index = source.index()
    else:
        # Spawned: a process that has started threads, as JAX does, must not be forked.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(namespace.workers, context) as executor:
            index = source.index(executor)
    seconds = time.monotonic() - began
    say(
        f"{len(index):,} samples in {len(index.paths):,} tars, {index.without_picture:,} without a "
        f"picture, in {seconds:.1f} s"
    )
    print(source.index_file())
    return 0
