"""Where a run's files may live."""

from pathlib import Path

import pytest

from clipjax import load
from clipjax.cli import main
from clipjax.errors import ClipjaxError
from clipjax.stores import place

TINY = str(Path(__file__).parent / "train" / "tiny.py")


@pytest.mark.parametrize("address", ["ftp://host/runs", "hdfs://name/a", "gcs://bucket/a"])
def test_an_unknown_store_is_refused_before_anything_is_made(
    address, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    scheme = address.split(":")[0]
    for command in (
        ["train", TINY, "--workdir", address],
        ["train", address],
        ["eval", address],
        ["export", address, "--out", "x", "--to", "openclip"],
        ["average", "a", "b", "--out", address],
    ):
        assert main(command) == 2, command
        assert f"no store {scheme}://" in capsys.readouterr().err
    with pytest.raises(ClipjaxError, match=f"no store {scheme}://"):
        load(address)
    with pytest.raises(ClipjaxError, match=f"no store {scheme}://"):
        place(Path(address))  # which says ftp:/host/runs
    assert not list(tmp_path.iterdir())


def test_paths_on_disk_stay_as_they_are():
    for path in ("runs/a", "/runs/a:b", "a:b/c", "C:/x"):
        assert place(path) == Path(path)
