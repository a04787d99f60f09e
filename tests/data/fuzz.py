"""Damaged pictures, tars, Parquet files and tables: each is read, or refused in words, in bounded time and memory.

`python tests/data/fuzz.py 10000` tries so many; a number is a file, the same each time.
"""

import collections
import io
import json
import logging
import random
import resource
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipjax.data import ImageFolder, Parquet, UnreadableRecord, WebDataset, decode
from clipjax.errors import ClipjaxError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")


def picture(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"exif": exif} if kind == "JPEG" else {}))
    return buffer.getvalue()


def tar(chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    form = chance.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=form) as out:
        for i in range(4):
            stem = "x" * chance.choice([1, 120]) + str(i)
            facts = json.dumps({"caption": [f"number {i}"]}).encode()
            for name, content in ((f"{stem}.jpg", PICTURES["JPEG"]), (f"{stem}.json", facts)):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                out.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def parquet(chance: random.Random) -> bytes:
    table = {"jpg": [PICTURES["JPEG"]] * 9, "caption": [f"number {i}" for i in range(9)]}
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer, row_group_size=4)
    return buffer.getvalue()


PICTURES = {kind: picture(kind) for kind in FORMATS}
CSV = "image,caption\n" + "".join(f'{i}.png,"a, {i}"\n' for i in range(9))
JSONL = "".join(json.dumps({"image": f"{i}.png", "caption": [f"a {i}"]}) + "\n" for i in range(9))
KINDS = {
    **{kind: lambda chance, kind=kind: PICTURES[kind] for kind in FORMATS},
    "tar": tar,
    "parquet": parquet,
    "csv": lambda chance: CSV.encode(),
    "tsv": lambda chance: CSV.replace(",", "\t", 2).encode(),
    "jsonl": lambda chance: JSONL.encode(),
}


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Bytes changed, cut off, taken out, put in or zeroed, a few times."""
    out = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        at = chance.randrange(len(out) or 1)
        match chance.randrange(5):
            case 0:
                out[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del out[at:]
            case 2:
                del out[at : at + chance.randrange(1, 600)]
            case 3:
                out[at:at] = chance.randbytes(chance.randrange(1, 40))
            case 4:
                size = min(chance.randrange(1, 512), len(out) - at)
                out[at : at + size] = bytes(size)
    return bytes(out)


def read(kind: str, path: Path) -> None:
    """Reads all there is to read of a file."""
    if kind in FORMATS:
        decode(path, path.name)
        return
    if kind == "tar":
        opened = WebDataset(str(path), caption_keys=("json:caption",)).open()
        opened.read_run(0, len(opened))
    elif kind == "parquet":
        opened = Parquet(files=str(path)).open()
    else:
        opened = ImageFolder(str(path.parent), path.name).open()
    for i in range(len(opened)):
        try:
            record = opened[i]
            decode(record["image"], record["key"])
        except UnreadableRecord:
            continue


def run(first: int, count: int, folder: Path) -> collections.Counter:
    """Tries files `first` to `first + count`; anything but `ClipjaxError` is a bug, and is raised."""
    found: collections.Counter = collections.Counter()
    for i in range(9):
        (folder / f"{i}.png").write_bytes(PICTURES["PNG"])
    names = list(KINDS)
    for number in range(first, first + count):
        chance = random.Random(number)
        kind = chance.choice([*names, "tar", "tar", "parquet"])
        path = folder / f"file.{kind.lower()}"
        path.write_bytes(damaged(KINDS[kind](chance), chance))
        began = time.monotonic()
        try:
            read(kind, path)
            found[kind, "read"] += 1
        except ClipjaxError:
            found[kind, "refused"] += 1
        except Exception as error:
            raise AssertionError(f"file {number}, a {kind}: {error!r}") from error
        if time.monotonic() - began > 5:
            raise AssertionError(f"file {number}, a {kind}, took more than 5 s")
    return found


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as scratch:
        for (kind, what), n in sorted(run(0, int(sys.argv[1]), Path(scratch)).items()):
            print(f"{kind:9} {what:8} {n}")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"memory above the beginning: {(after - before) / 1024:.0f} MB")
