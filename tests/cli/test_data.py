"""`clipjax data index`: made by processes beforehand, and used by the run."""

import io
import json
import tarfile

from PIL import Image

from clipjax.data import WebDataset, tars


def write(path, numbers, end=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in numbers:
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (i, 0, 0)).save(picture, "png")
            for name, content in ((f"{i}.png", picture.getvalue()), (f"{i}.txt", b"x")):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    path.write_bytes(buffer.getvalue()[:end])


def test_an_index_made_beforehand(run, tmp_path, monkeypatch):
    for number in range(3):
        write(tmp_path / f"{number}.tar", range(10 * number, 10 * number + 10))
    shards, index = str(tmp_path / "{0..2}.tar"), str(tmp_path / "index")
    code, printed, err = run("data", "index", shards, "--index-dir", index, "--workers", "2")
    assert code == 0 and "30 samples in 3 tars, 0 without a picture" in err
    source = WebDataset(shards, index_dir=index)
    assert printed.strip() == str(source.index_file())
    monkeypatch.setattr(tars, "scan", lambda *a: 1 / 0)
    opened = source.open()
    assert [opened[i]["key"] for i in (0, 17, 29)] == ["0.tar:0", "1.tar:17", "2.tar:29"]


def test_the_sizes_of_files(run, tmp_path):
    for number, count in enumerate((3, 5)):
        write(tmp_path / f"{number}.tar", range(10 * number, 10 * number + count))
    (tmp_path / "1_stats.json").write_text('{"successes": 4}')  # believed
    code, printed, err = run("data", "sizes", str(tmp_path / "*.tar"))
    assert code == 0 and "7 records in 2 files" in err
    assert printed.strip() == str(tmp_path / "sizes.json")
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"0.tar": 3, "1.tar": 4}
    code, printed, err = run("data", "sizes", str(tmp_path / "*.zip"))
    assert code == 2 and "is of none of .tar" in err
    out = str(tmp_path / "missing" / "sizes.json")
    code, _, err = run("data", "sizes", str(tmp_path / "*.tar"), "--out", out)
    assert code == 2 and f"{out}: No such file" in err
    (tmp_path / "1_stats.json").unlink()
    (tmp_path / "sizes.json").unlink()
    write(tmp_path / "1.tar", range(3), end=4000)
    code, printed, err = run("data", "sizes", str(tmp_path / "*.tar"))
    assert code == 2 and "1 of 2 files cannot be counted" in err


def test_damaged_tars_and_bad_commands_are_named(run, tmp_path, caplog):
    write(tmp_path / "0.tar", range(3))
    write(tmp_path / "1.tar", range(3, 6), end=4000)
    shards, place = str(tmp_path / "*.tar"), ("--index-dir", tmp_path / "index", "--workers", "1")
    code, _, err = run("data", "index", shards, *place)
    assert code == 2 and "1.tar" in err and "cut short" in err
    code, _, err = run("data", "index", shards, *place, "--skip-damaged")
    assert code == 0 and "3 samples in 2 tars" in err and "left out: the tar" in caplog.text
    code, _, err = run("data", "index", shards, *place)  # what was left out is not forgotten
    assert code == 2 and "cut short" in err
    code, _, err = run("data", "index", shards, *place, "--skip-damaged", "--image-keys", "gif")
    assert code == 2 and "set image_keys" in err
    code, _, err = run("data", "idnex", shards)
    assert code == 2 and "did you mean 'index'" in err
    code, _, err = run("data", "index", shards, *place[:2], "--workers", "0")
    assert code == 2 and "--workers 0" in err
