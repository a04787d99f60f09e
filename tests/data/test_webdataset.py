import gzip
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from clipjax.data import UnreadableRecord, WebDataset, decode, reading, tars
from clipjax.data import webdataset as module
from clipjax.data.fields import entry
from clipjax.errors import ClipjaxError


def picture(i) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (i, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def sample(i, folder=""):
    return [
        (f"{folder}{i:04}.png", picture(i)),
        (f"{folder}{i:04}.txt", f"caption {i}".encode()),
        (f"{folder}{i:04}.json", json.dumps({"zh": f"标题 {i}", "nsfw": 0.1}).encode()),
        (f"{folder}{i:04}.cls", str(i % 3).encode()),
    ]


@pytest.fixture
def shards(tmp_path):
    """Three tars of 5, 0 and 4 samples."""
    for shard, numbers in enumerate((range(5), range(0), range(5, 9))):
        files = [file for i in numbers for file in sample(i, "dir.v1/")]
        write_tar(tmp_path / f"s-{shard:03}.tar", files)
    return tmp_path


def read(source):
    opened = source.open()
    return [opened[i] for i in range(len(opened))]


def test_samples_in_order(shards):
    source = WebDataset(
        str(shards / "s-*.tar"),
        caption_keys=("txt", "json:zh"),
        languages=("en", "zh"),
        label_key="cls",
    )
    found = read(source)
    assert [decode(r["image"])[0, 0, 0] for r in found] == list(range(9))
    assert [r["captions"] for r in found] == [(f"caption {i}", f"标题 {i}") for i in range(9)]
    assert {r["languages"] for r in found} == {("en", "zh")}
    assert [r["label"] for r in found] == [i % 3 for i in range(9)]
    assert [r["id"] for r in found] == list(range(9))
    assert found[7]["key"] == "s-002.tar:dir.v1/0007"


def test_patterns(shards, tmp_path, monkeypatch):
    everything = [str(shards / f"s-{i:03}.tar") for i in range(3)]
    assert module.expand(str(shards / "s-{000..002}.tar")) == everything
    assert module.expand(str(shards / "*.tar")) == everything
    assert module.expand(everything[1]) == [everything[1]]
    assert module.expand("a{8..11}") == ["a8", "a9", "a10", "a11"]


def test_threads_read_at_once_and_files_are_reused(shards, monkeypatch):
    monkeypatch.setattr(reading, "OPEN_FILES", 1)  # every change of tar closes a file
    opened = WebDataset(str(shards / "*.tar")).open()
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with ThreadPoolExecutor(4) as pool:
        order = [i * 5 % 9 for i in range(900)]
        found = list(pool.map(lambda i: decode(opened[i]["image"])[0, 0, 0], order))
        if descriptors:
            assert len(os.listdir("/proc/self/fd")) <= descriptors + 5
    assert found == order


def test_samples_without_picture_are_left_out_and_said(tmp_path, caplog):
    files = [*sample(0), ("0001.txt", b"no picture"), ("0002.png", picture(2)), ("__meta", b"")]
    write_tar(tmp_path / "a.tar", files)
    found = read(WebDataset(str(tmp_path / "a.tar")))
    assert [r["captions"] for r in found] == [("caption 0",), ()]
    assert "2 samples have no picture" in caplog.text


def test_the_first_of_the_image_keys_counts(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.seg.png", picture(9)), ("x.PNG", picture(1))])
    assert decode(read(WebDataset(str(tmp_path / "a.tar")))[0]["image"])[0, 0, 0] == 1


def test_the_index_is_kept_and_renewed_when_the_tar_changes(shards, tmp_path, monkeypatch):
    source = WebDataset(str(shards / "s-*.tar"), index_dir=str(tmp_path / "index"))
    before = read(source)
    assert len(list((tmp_path / "index").iterdir())) == 1
    scanned = []
    scan = tars.scan
    monkeypatch.setattr(tars, "scan", lambda *a: scanned.append(a[0]) or scan(*a))
    assert read(source) == before
    assert scanned == []
    write_tar(shards / "s-001.tar", sample(42))
    assert len(read(source)) == 10
    assert scanned == [str(shards / "s-001.tar")]


def cut_short(path):
    write_tar(path, [*sample(0), ("0001.png", picture(1) * 100)])
    path.write_bytes(path.read_bytes()[:5000])


def compressed(path):
    write_tar(path, sample(0))
    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cut_short, "a.tar' is cut short in '0001.png'"),
        (compressed, "is not an uncompressed tar"),
        (lambda path: path.write_bytes(b"nonsense" * 100), "is not an uncompressed tar"),
        (lambda path: write_tar(path, [("a.txt", b"x")]), "no sample .* has a picture"),
        (lambda path: None, "there is no file '.*a.tar'"),
    ],
)
def test_bad_tars_are_named(tmp_path, make, message):
    make(tmp_path / "a.tar")
    with pytest.raises(ClipjaxError, match=message):
        WebDataset(str(tmp_path / "a.tar")).open()


def test_nothing_matches():
    with pytest.raises(ClipjaxError, match=r"no file matches shards='nowhere/\*.tar'"):
        WebDataset("nowhere/*.tar").open()
    with pytest.raises(ClipjaxError, match="1 languages for 2 caption_keys"):
        WebDataset("a.tar", caption_keys=("txt", "json:zh"), languages=("en",))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (("0.txt", b"\xff"), {}, "a.tar:0: the file .txt does not parse"),
        (
            ("0.json", b"{"),
            {"caption_keys": ("json:zh",)},
            "a.tar:0: the file .json does not parse",
        ),
        (("0.json", b'{"zh": {}}'), {"caption_keys": ("json:zh",)}, "a.tar:0: 'json:zh' is dict"),
        (("0.json", b"[]"), {"caption_keys": ("json:zh",)}, "a.tar:0: the file .json does not"),
        (("0.cls", b"dog"), {"label_key": "cls"}, "a.tar:0: the class b'dog' is no number"),
    ],
)
def test_bad_samples_are_skippable(tmp_path, file, fields, message):
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), file])
    opened = WebDataset(str(tmp_path / "a.tar"), **fields).open()
    with pytest.raises(UnreadableRecord, match=message):
        opened[0]


def test_a_damaged_index_is_made_anew(shards, tmp_path, caplog):
    source = WebDataset(str(shards / "s-*.tar"), index_dir=str(tmp_path / "index"))
    before = read(source)
    for file in (tmp_path / "index").iterdir():
        file.write_bytes(b"nonsense")
    assert read(source) == before and "is damaged" in caplog.text
    caplog.clear()
    assert read(source) == before and not caplog.text


def test_a_file_of_absurd_size_is_refused_unread(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [("0.png", picture(0))])
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    opened = WebDataset(str(tmp_path / "a.tar")).open()
    with pytest.raises(
        UnreadableRecord, match=r"a.tar: the sample at byte 0 has [0-9,]+ bytes, above 10"
    ):
        opened[0]


def test_a_name_that_is_not_utf8(tmp_path):
    write_tar(tmp_path / "a.tar", [("\udcff.png", picture(1))])
    assert [r["key"] for r in read(WebDataset(str(tmp_path / "a.tar")))] == ["a.tar:\ufffd"]


def test_names_that_climb_out_are_left_out(tmp_path, caplog):
    names = ["../up.png", "/root.png", "a/../../b.png", "..c/fine.png"]
    write_tar(tmp_path / "a.tar", [(name, picture(i)) for i, name in enumerate(names)])
    assert [r["key"] for r in read(WebDataset(str(tmp_path / "a.tar")))] == ["a.tar:..c/fine"]
    assert "left out '../up.png'" in caplog.text and "left out 3 files" in caplog.text


def whole(n=6):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(n):
            for name, content in sample(i):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        return buffer.getvalue(), {member.name: member.offset for member in tar}


CONTENT, AT = whole()
THIRD = AT["0003.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:THIRD] + b"\x5a" * 512 + CONTENT[THIRD + 512 :], f"damaged at byte {THIRD:,}"),
        (CONTENT[: THIRD + 100], f"cut short at byte {THIRD:,}"),
        (CONTENT[:THIRD], f"no end mark: it seems to be cut short at byte {THIRD:,}"),
        (CONTENT + CONTENT, f"goes on at byte {len(CONTENT):,} after its end at byte"),
        (
            CONTENT[:THIRD] + b"\0" * 512 + CONTENT[THIRD + 512 :],
            f"after its end at byte {THIRD:,}",
        ),
        (CONTENT[:THIRD] + bytes(2_000_000), f"nothing but zeros from byte {THIRD:,}"),
        (b"", "is not an uncompressed tar file .it is empty"),
    ],
)
def test_a_tar_that_is_not_whole_is_refused_or_left_out(tmp_path, caplog, content, message):
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "b.tar").write_bytes(CONTENT)
    with pytest.raises(ClipjaxError, match=rf"a\.tar.*{message}"):
        WebDataset(str(tmp_path / "*.tar")).open()
    if content:
        found = read(WebDataset(str(tmp_path / "*.tar"), damaged="skip"))
        assert [r["key"] for r in found] == [f"b.tar:{i:04}" for i in range(6)]
        assert "left out: " in caplog.text and "a.tar" in caplog.text


def test_a_tar_from_a_mac(tmp_path):
    files = [
        ("./" + prefix + name, content)
        for name, content in sample(0) + sample(1)
        for prefix in ("._", "")
    ]
    write_tar(tmp_path / "a.tar", [*files, ("__MACOSX/0002.png", picture(2))])
    found = read(WebDataset(str(tmp_path / "a.tar")))
    assert [(r["key"], r["captions"]) for r in found] == [
        ("a.tar:0000", ("caption 0",)),
        ("a.tar:0001", ("caption 1",)),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.png", "b.png", "a.txt", "b.txt"], "sample 'a' do not follow each other"),
        (["a.png", "a.txt", "a.png", "a.txt"], "has 'a.png' more than once"),
    ],
)
def test_samples_that_are_not_in_order_are_refused(tmp_path, names, message):
    write_tar(tmp_path / "a.tar", [(name, picture(0)) for name in names])
    with pytest.raises(ClipjaxError, match=message):
        WebDataset(str(tmp_path / "a.tar")).open()


def test_what_else_a_sample_holds_is_in_its_record(tmp_path):
    facts = {"scores": {"clip": 0.5}, "caption": ["x", "y"], "a.b": 3}
    files = [*sample(0)[:2], ("0000.json", json.dumps(facts).encode()), ("0000.npy", b"123")]
    write_tar(tmp_path / "a.tar", files)
    source = WebDataset(str(tmp_path / "a.tar"), caption_keys=("txt", "json:caption"))
    (record,) = read(source)
    assert record["npy"] == b"123" and "png" not in record
    assert record["captions"] == ("caption 0", "x", "y")
    assert entry(record, "json:scores.clip") == 0.5 and entry(record, "json:a.b") == 3
    for missing in ("json:scores.other", "json:none", "txt.gz"):
        with pytest.raises(UnreadableRecord, match="has no entry"):
            entry(record, missing)


def test_lines_of_a_text(tmp_path, caplog):
    content = "\ufeffone\r\ntwo\n\nthree\u2028still\n".encode()
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("0.txt", content)])
    (record,) = read(WebDataset(str(tmp_path / "a.tar"), lines=True))
    assert [c.strip() for c in record["captions"]] == ["one", "two", "three\u2028still"]
    assert not caplog.text
    (record,) = read(WebDataset(str(tmp_path / "a.tar")))
    assert len(record["captions"]) == 1 and record["captions"][0].startswith("one")
    assert "holds line breaks" in caplog.text


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_what_is_no_file(tmp_path, form):
    long = "d" * 90 + "/" + "n" * (60 if form == tarfile.USTAR_FORMAT else 160)
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name, content in [(f"{long}1.png", picture(1)), (f"{long}1.txt", b"long")]:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            link = tarfile.TarInfo("link")
            link.type, link.linkname = (
                tarfile.SYMTYPE,
                "x" * (99 if form != tarfile.PAX_FORMAT else 200),
            )
            tar.addfile(folder), tar.addfile(link)
            header = tarfile.TarInfo(name)
            header.size, header.pax_headers = len(content), {"mtime": "1.5"}
            tar.addfile(header, io.BytesIO(content))
    (record,) = read(WebDataset(str(tmp_path / "a.tar")))
    assert record["key"] == f"a.tar:{long}1" and record["captions"] == ("long",)
    assert decode(record["image"])[0, 0, 0] == 1


def test_texts_are_read_without_pictures(shards, monkeypatch):
    opened = WebDataset(str(shards / "*.tar"), label_key="cls").open()
    sizes = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda f, n, at: sizes.append(n) or pread(f, n, at))
    facts = opened.facts(3)
    assert max(sizes) == 512
    whole = opened[3]
    assert facts.pop("image") == b"" and whole.pop("image")
    assert facts == whole


def test_the_index_takes_twelve_bytes_a_sample_and_is_mapped(tmp_path):
    write_tar(tmp_path / "a.tar", [file for i in range(300) for file in sample(i)])
    source = WebDataset(str(tmp_path / "a.tar"), index_dir=str(tmp_path / "index"))
    source.open()
    (file,) = (tmp_path / "index").iterdir()
    assert 12 * 300 <= file.stat().st_size < 12 * 300 + 400
    places = source.index().places
    assert isinstance(places.starts, np.memmap) and isinstance(places.blocks, np.memmap)


def test_an_index_is_whole_or_absent_whoever_writes_it(tmp_path):
    """Several write the same file, of different contents, while others read it."""
    file = tmp_path / "a.tars"

    def kept(n):
        places = tars.Places(np.arange(n, dtype=np.uint64), np.full(n, n, np.uint32))
        return tars._Kept([["a.tar", n, 0]], [n], [0], places)

    def work(i):
        for n in range(1 + i % 4, 2000, 97):
            if i < 4:
                tars._save(file, kept(n))
            elif (found := tars._load(file)) is not None:
                count = found.counts[0]
                assert found.marks == [["a.tar", count, 0]]
                assert (found.places.blocks == count).all() and len(found.places.starts) == count

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert [f.name for f in tmp_path.iterdir()] == ["a.tars"]  # and no scratch is left
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 5)
    assert tars._load(file) is None


def test_a_tar_that_shrinks_is_a_record_skipped(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PAUSES", ())
    opened = WebDataset(str(shards / "s-000.tar")).open()
    path = shards / "s-000.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(
        reading.Unreachable, match=r"s-000\.tar: the sample at byte .* ends .* early"
    ):
        opened[4]
    path.unlink()
    opened._files = reading.Files()
    with pytest.raises(UnreadableRecord, match="there is no file"):
        opened[4]
