"""`clipjax bench stream`: opening many files, memory with many records, and what follows a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.component import Component
from clipjax.data.order import Stream
from clipjax.errors import ClipjaxError

TOKENS = 8
PLACES = (0.0, 0.25, 0.5, 0.75, 0.999)
"""Where in an epoch batches are made, as shares of it."""


@dataclasses.dataclass(frozen=True)
class StreamBench(Component):
    """Tars of tiny pictures, made for the purpose, and a loader of one process in a Python of its own.

    `clipjax bench stream` has 20 million records in 10,000 files, which are one file under many names.
    `--address s3://bucket/folder --records 50` writes them to a bucket first.
    """

    files: int = 10_000
    """How many."""
    records: int = 2_000
    """In each."""
    address: str | None = None
    """Where they are: a folder in a bucket; default: a temporary one on disk."""
    batch_size: int = 1024
    """Pairs a batch."""
    stream: Stream = dataclasses.field(default_factory=lambda: Stream(run=256))
    """How they are read."""
    batches: int = 8
    """Made at each of five places of the epoch."""
    kills: int = 0
    """How often loaders of 1, 2 and 4 processes are killed and continued, over two epochs of 64 files."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self):
        for name in ("files", "records", "batch_size", "batches"):
            if getattr(self, name) < 1:
                raise ClipjaxError(f"bench stream: {name}={getattr(self, name)} must be positive")

    def run(self) -> dict[str, Any]:
        """Measures, prints and returns what the JSON object holds."""
        results: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="clipjax-") as scratch:
            if self.kills:
                found = results["resume"] = _killed(Path(scratch), self.kills)
                print(
                    f"{found['kills']} kills, {found['changes']} times on another number of processes: "
                    f"{found['steps']} batches of {found['batch_size']}, {found['wrong']} of them wrong; "
                    f"of {found['records']} records, {found['lost']} not shown once in each of "
                    f"{found['epochs']} epochs"
                )
            else:
                shards = _written(self, Path(scratch))
                found = results["open"] = _alone(_opened, self, shards)
                print(
                    f"{self.files:,} files, {found['records']:,} records: listed in {found['listing']:.2f} s, first "
                    f"batch of {self.batch_size:,} {found['first_batch']:.2f} s later; "
                    f"the loader took {found['loader_mb']:,.0f} MB beside Python's {found['python_mb']:,.0f}"
                )
        if self.json:
            print(json.dumps(results))
        return results


def _written(bench: StreamBench, scratch: Path) -> str:
    """Writes the files; returns a pattern of them."""
    name = f"{{00000..{bench.files - 1:05}}}.tar"
    first = scratch / "00000.tar"
    write_tar(first, range(bench.records))
    sizes = json.dumps({f"{i:05}.tar": bench.records for i in range(bench.files)})
    if bench.address is None:
        for i in range(1, bench.files):
            os.link(first, scratch / f"{i:05}.tar")
        (scratch / "sizes.json").write_text(sizes)
        return str(scratch / "*.tar")
    from concurrent.futures import ThreadPoolExecutor

    from clipjax.data.reading import store

    fs, inner = store(bench.address)
    content = first.read_bytes()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: fs.pipe_file(f"{inner}/{i:05}.tar", content), range(bench.files)))
    fs.pipe_file(f"{inner}/sizes.json", sizes.encode())
    return f"{bench.address}/*.tar" if bench.files > 1 else f"{bench.address}/{name}"


def write_tar(path: Path, numbers: range) -> None:
    """A tar of tiny pictures; `label` in a sample's JSON file is its number."""
    from PIL import Image

    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in numbers:
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (i % 256, i // 256 % 256, 0)).save(picture, "png")
            for name, content in ((f"{i:09}.png", picture.getvalue()), (f"{i:09}.cls", b"%d" % i)):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def _data(shards: str, batch_size: int, stream: Any) -> Any:
    from clipjax.data import Array, Data, Image, WebDataset

    return Data(
        WebDataset(shards, label_key="cls"),
        image_size=4,
        batch_size=batch_size,
        fields=(Image(), Array("label", dtype="int32")),
        stream=stream,
        num_threads=1,
        context_length=TOKENS,
    )


def _alone(function: Any, *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def _opened(bench: StreamBench, shards: str) -> dict[str, Any]:
    from clipjax.data import BPE
    from clipjax.data import webdataset as tars

    tokenizer = BPE(300).build(["x"])
    tars.expand(f"{os.path.dirname(shards)}/none-*.tar")  # imports what speaks to the store
    python, data = _peak(), _data(shards, bench.batch_size, bench.stream)
    listing, expand = 0.0, tars.expand

    def timed(pattern: str) -> list[str]:
        nonlocal listing
        began = time.perf_counter()
        found = expand(pattern)
        listing += time.perf_counter() - began
        return found

    tars.expand = timed  # of this process, which measures and ends
    began = time.perf_counter()
    loader = data.build(tokenizer, 0)
    batches = loader.iterate()
    next(batches)
    first = time.perf_counter() - began - listing
    batches.close()
    epoch = loader.num_examples
    for share in PLACES:
        batches = loader.iterate(int(share * epoch) // bench.batch_size)
        for _ in range(bench.batches):
            next(batches)
        batches.close()
    return {
        "records": epoch,
        "listing": listing,
        "first_batch": first,
        "python_mb": python,
        "loader_mb": _peak() - python,
    }


def _peak() -> float:
    """Memory that this process has had at most, in MB; `getrusage` counts that of the one that started it, too."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


FILES, EACH, BATCH, EPOCHS = 64, 48, 64, 2


def _killed(scratch: Path, kills: int) -> dict[str, Any]:
    from clipjax.data import BPE

    for i in range(FILES):
        write_tar(scratch / f"{i:05}.tar", range(EACH * i, EACH * (i + 1)))
    data = _data(str(scratch / "*.tar"), BATCH, Stream(lanes=8, run=10, block=2))
    tokenizer = BPE(300).build(["x"])
    loader = data.build(tokenizer, 0)
    steps = EPOCHS * FILES * EACH // BATCH
    wanted = [loader.batch(step) for step in range(steps)]
    chance, context = random.Random(0), multiprocessing.get_context("spawn")
    step = done = changes = checked = 0
    wrong: set[int] = set()
    count = 2
    while done < kills or step < steps:
        last = done >= kills
        other = chance.choice([n for n in (1, 2, 4) if n != count])
        changes, count = changes + (done > 0), other
        logs = [scratch / f"{done}-{p}.log" for p in range(count)]
        if step >= steps:
            step = 0  # more kills than two epochs hold
        # Slowly, so that a kill finds them in the middle of it.
        pause = 0.0 if last else 0.02
        started = [
            context.Process(
                target=_deliver,
                args=(data, tokenizer, p, count, step, steps, str(log), pause),
                daemon=True,
            )
            for p, log in enumerate(logs)
        ]
        for process in started:
            process.start()
        while not last and not all(log.exists() and log.stat().st_size for log in logs):
            time.sleep(0.01)
            if any(process.exitcode for process in started):
                raise ClipjaxError("bench stream: a loader ended before it was killed")
        if last:
            for process in started:
                process.join()
        else:
            time.sleep(chance.random() * 0.5)
            for process in started:
                process.kill()
                process.join()
            done += 1
        seen = []
        for p, log in enumerate(logs):
            lines = [
                line.split() for line in log.read_text().splitlines(keepends=True) if "\n" in line
            ]
            seen.append(step + len(lines))
            for number, (found, mark) in enumerate(lines, step):
                rows = {k: np.split(v, count)[p] for k, v in wanted[number].items()}
                if (int(found), mark) != (number, _mark(rows)):
                    wrong.add(number)
        checked += min(seen) - step
        step = min(seen)
    shown = np.concatenate([rows["label"] for rows in wanted]).reshape(EPOCHS, FILES * EACH)
    lost = max(int((np.bincount(epoch, minlength=FILES * EACH) != 1).sum()) for epoch in shown)
    return {
        "kills": done,
        "changes": changes,
        "batch_size": BATCH,
        "steps": checked,
        "wrong": len(wrong),
        "records": FILES * EACH,
        "lost": lost,
        "epochs": EPOCHS,
    }


def _deliver(
    data: Any,
    tokenizer: Any,
    process: int,
    count: int,
    step: int,
    stop: int,
    log: str,
    pause: float,
) -> None:
    """What a process of a run does: takes batch after batch, and says which it has had."""
    batches = data.build(tokenizer, 0, process, count).iterate(step)
    with open(log, "w", buffering=1) as file, contextlib.closing(batches):
        for number in range(step, stop):
            file.write(f"{number} {_mark(next(batches))}\n")
            time.sleep(pause)


def _mark(rows: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(rows):
        digest.update(np.ascontiguousarray(rows[key]).tobytes())
    return digest.hexdigest()[:16]
