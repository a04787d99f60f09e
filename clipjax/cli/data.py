"""`clipjax data VERB`: what training needs of data, found, made, chosen or looked at beforehand."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import time
from pathlib import Path

from clipjax.cli import curate, sizes
from clipjax.cli.arguments import new_parser, parse_run
from clipjax.cli.models import say
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.stores import place

OF_CONFIGS = {
    "look": "show the first examples of a run as the model sees them, and what was skipped",
    "tokenizer": "train the tokenizer of a run beforehand",
}
"""Verbs that take a run's configuration, and what they do."""
VERBS = ("index", "sizes", *OF_CONFIGS, *curate.VERBS)


def main(arguments: list[str]) -> int:
    """Runs one of the verbs."""
    verb = arguments[0] if arguments else ""
    if verb and not verb.startswith("-") and verb not in VERBS:
        raise ClipjaxError(f"clipjax data: no {verb!r}{did_you_mean(verb, VERBS)}")
    if verb == "look":
        return _look(arguments[1:])
    if verb == "tokenizer":
        return _tokenizer(arguments[1:])
    parser = new_parser("data", "Prepare data for training.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, what in OF_CONFIGS.items():
        verbs.add_parser(name, help=what)
    curate.add_verbs(verbs)
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
    sizes.add_verb(verbs)
    namespace = parser.parse_args(arguments)
    if namespace.verb == "sizes":
        return sizes.run(namespace)
    return _index(namespace) if namespace.verb == "index" else curate.run(namespace)


def _look(arguments: list[str]) -> int:
    parser = new_parser(
        "data look",
        "Show the first examples of a run as the model sees them: pictures after augmentation, texts as tokens, "
        "every other field; and how many records were skipped, and why.",
    )
    parser.add_argument("config", type=place, help="a Python config file, or the folder of a run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write them as one page")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="examples; default 64")
    parser.add_argument(
        "--records", type=int, default=512, metavar="N",
        help="records that are read to see which are skipped; default 512",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER",
        help="one that `clipjax data tokenizer` wrote; default: the configuration's",
    )  # fmt: skip
    namespace, run = parse_run(parser, arguments)
    from clipjax.report.look import look, page_of, summary_of

    seen = look(run.data, run.seed, namespace.count, namespace.records, namespace.tokenizer)
    print(summary_of(seen))
    if namespace.html is not None:
        try:
            namespace.html.write_text(
                page_of(seen, Path(namespace.config).stem), "utf-8", "replace"
            )
        except OSError as error:
            raise ClipjaxError(f"--html {namespace.html}: {error.strerror}") from error
        print(namespace.html)
    return 0


def _tokenizer(arguments: list[str]) -> int:
    parser = new_parser(
        "data tokenizer",
        "Train the tokenizer of a run beforehand, on captions from all over its data, of which no picture is "
        "read where the source can leave it. A run takes it as SavedTokenizer(FOLDER).",
    )
    parser.add_argument("config", type=place, help="a Python config file")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER",
        help="where to write it",
    )  # fmt: skip
    namespace, run = parse_run(parser, arguments)
    if not run.data.tokenizer.trains:
        raise ClipjaxError(
            f"the tokenizer of {namespace.config} is a {type(run.data.tokenizer).__name__}, which is not trained: "
            "give it BPE or TrainedSentencePiece"
        )
    began = time.monotonic()
    tokenizer = run.data.tokenizer.build(run.data.iter_captions())
    try:
        tokenizer.save(namespace.out)
    except OSError as error:
        raise ClipjaxError(f"--out {namespace.out}: {error.strerror}") from error
    say(f"{tokenizer.vocab_size:,} tokens, in {time.monotonic() - began:.1f} s")
    print(namespace.out)
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
