"""`clipjax eval --task`: probes from files, published data sets, languages, groups, masks."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipjax.data import Resize
from clipjax.evals.masks import nearest
from clipjax.evals.segmentation import of_patches
from clipjax.restore import open_pretrained

NAMES = ("red", "green", "blue")


def pictures(world, count):
    return [world / "test" / name / f"{i}.png" for name in NAMES for i in range(count)]


def tar_of(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for suffix, content in sample.items():
                info = tarfile.TarInfo(f"{i:03}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_probes_from_files_of_entries(evaluate, refused, world, tmp_path):
    pair = {"image_0": "red/0", "image_1": "blue/0", "caption_0": "a red thing"}
    (tmp_path / "w.jsonl").write_text(json.dumps(pair | {"caption_1": "a blue thing"}))
    where = ["--images", world / "test"]
    found = evaluate("one", "--dataset", tmp_path / "w.jsonl", "--task", "winoground", *where)
    assert {"winoground/text", "winoground/image", "winoground/w/group"} <= set(found)
    entry = {"cue": "red", "candidates": ["red/0.png", "blue/0.png"], "associations": ["red/0.png"]}
    (tmp_path / "g.json").write_text(json.dumps([entry]))
    asked = ["--dataset", tmp_path / "g.json", "--task", "winogavil", "--article", *where]
    assert evaluate("one", *asked)["winogavil/2_candidates/jaccard"] in (0.0, 1.0)
    # Without --task, each file is what its entries are.
    both = ["--dataset", tmp_path / "w.jsonl", "--dataset", tmp_path / "g.json", *where]
    told = evaluate("one", *both)
    assert told == found | evaluate("one", *asked[:4], *where)
    assert "winogavil needs --images" in refused("one", *asked[:4])


def test_a_published_data_set_brings_its_names_and_templates(evaluate, refused, world, tmp_path):
    """CLIP_benchmark's layout: names and templates beside the tars, {c} for the name; groups in JSON."""
    folder = tmp_path / "wds_colors"
    samples = [
        {
            "webp": path.read_bytes(),
            "cls": str(NAMES.index(path.parent.name)).encode(),
            "json": json.dumps({"place": "north" if path.stem == "0" else "south"}).encode(),
            "npy": numbers(int(path.stem), 7),
        }
        for path in pictures(world, 2)
    ]
    tar_of(folder / "test" / "0.tar", samples)
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} thing\nthe {c}\n")
    grouped = ["--groups-key", "json:place", "--macro-f1"]
    found = evaluate("one", "--dataset", folder, *grouped)
    prompts = tmp_path / "p.json"
    prompts.write_text(json.dumps({"names": NAMES, "templates": ["a {} thing", "the {}"]}))
    tar = folder / "test" / "0.tar"
    assert found == evaluate("one", "--dataset", tar, "--prompts", prompts, *grouped)
    north, south = (found[f"zeroshot/group/{place}/top1"] for place in ("north", "south"))
    assert found["zeroshot/worst_group/top1"] == min(north, south)
    assert found["zeroshot/group_gap/top1"] == pytest.approx(abs(north - south))
    assert found["zeroshot/top1"] == pytest.approx((north + south) / 2)
    by_number = evaluate("one", "--dataset", folder / "test", "--groups-key", "npy[0]")
    assert by_number["zeroshot/group/1/top1"] == south
    words = refused("one", "--dataset", folder / "test", "--groups-key", "cls[0]")
    assert "groups_key='cls[0]': cls is no .npy file" in words
    several = tmp_path / "en.json"
    several.write_text(json.dumps({"colors": NAMES, "others": ["x"]}))
    texts = tmp_path / "templates.json"
    texts.write_text(json.dumps({"colors": ["a {c} thing", "the {c}"]}))
    asked = ["--prompts", f"{several}:colors", "--templates", f"{texts}:colors"]
    assert found == evaluate("one", "--dataset", tar, *asked, *grouped)


def numbers(*values):
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


def test_published_captions_are_one_a_line(evaluate, world, tmp_path):
    folder = tmp_path / "wds_pairs"
    samples = [
        {
            "png": path.read_bytes(),
            "txt": f"a {path.parent.name} thing\n{path.stem} of it\n".encode(),
        }
        for path in pictures(world, 1)
    ]
    tar_of(folder / "test" / "0.tar", samples)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    found = evaluate("one", "--dataset", folder)
    # Of six captions, three are "0 of it": all tie, and stand before no picture's own alone.
    assert found["retrieval/text_to_image/median_rank"] >= 2
    assert found["retrieval/text_to_image/R@10"] == 1.0


def test_captions_in_many_languages(evaluate, refused, world, tmp_path):
    rows = [
        {"image/key": f"{name}/0", "image/locale": "en"}
        | {"en": {"caption": [f"a {name} thing", name]}, "fi": {"caption": [f"{name} 0"]}}
        for name in NAMES
    ]
    table = tmp_path / "captions.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    found = evaluate("one", "--dataset", table, "--images", world / "test", "--bootstrap", 100)
    both = [found[f"retrieval/{code}/text_to_image/R@1"] for code in ("en", "fi")]
    mean = "retrieval/mean_over_languages/text_to_image/R@1"
    assert found[mean] == pytest.approx(np.mean(both))
    assert mean in found["interval_95"]
    table.write_text('{"image/key": 3}')
    assert "line 1, has no 'image/key'" in refused(
        "one", "--dataset", table, "--images", world / "test"
    )


def halves(world, folder, count=3):
    """Pictures whose left half is of one color and whose right half of another, and masks of them."""
    for i in range(count):
        left, right = (NAMES.index(n) for n in (NAMES[i % 3], NAMES[(i + 1) % 3]))
        pixels, mask = np.zeros((16, 16, 3), np.uint8), np.full((16, 16), left, np.uint8)
        mask[:, 8:] = right
        for place, name in ((left, NAMES[left]), (right, NAMES[right])):
            pixels[mask == place] = np.asarray(Image.open(world / "test" / name / "1.png"))[0, 0]
        mask[0] = 255  # counts for nothing
        for kind, content, end in (("images", pixels, "png"), ("masks", mask, "png")):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(folder / kind / f"{i}.{end}")


def test_segmentation_by_names_is_numpys(evaluate, refused, world, tmp_path):
    halves(world, tmp_path)
    where = ["--dataset", tmp_path / "images", "--task", "segmentation"]
    asked = [*where, "--masks", tmp_path / "masks", "--class-names", "red,green,blue"]
    found = evaluate("one", *asked)
    # Independently: tokens, projected one by one, compared with the names, interpolated, counted.
    predictor = open_pretrained(world / "one").predictor()
    names = predictor.encode_text(list(NAMES)).astype(np.float64)
    kernel = np.asarray(predictor.params["image_projection"]["kernel"], np.float64)
    weight = np.array(
        [[max(0, 1 - abs((x + 0.5) / 8 - 0.5 - i)) for i in (0, 1)] for x in range(16)]
    )
    weight /= weight.sum(axis=1, keepdims=True)
    right, taken, true = np.zeros((3, 3))
    for i in range(3):
        pixels = np.asarray(Image.open(tmp_path / "images" / f"{i}.png"))
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{i}.png"))
        tokens = predictor.encode("image", pixels, output="tokens")["values"] @ kernel
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        score = (tokens @ names.T).reshape(2, 2, 3)
        chosen = np.einsum("yi,xj,ijc->yxc", weight, weight, score).argmax(axis=-1)
        for c in range(3):
            counted = mask != 255
            taken[c] += ((chosen == c) & counted).sum()
            true[c] += (mask == c).sum()
            right[c] += ((chosen == c) & (mask == c)).sum()
    union = taken + true - right
    assert found["segmentation/mIoU"] == pytest.approx((right[union > 0] / union[union > 0]).mean())
    assert found["segmentation/pixel_accuracy"] == pytest.approx(right.sum() / true.sum())
    assert found["segmentation/mean_accuracy"] == pytest.approx((right / true).mean())
    few = [*asked[:-1], "red,green"]
    assert "has the class 2, but there are 2" in refused("one", *few)
    assert "has no mask '0.png'" in refused("one", *where, "--masks", world, *asked[-2:])
    assert "either prompts or class_names" in refused("one", *asked[:-2])


def test_linear_segmentation_learns_colors(evaluate, world, tmp_path):
    halves(world, tmp_path / "train", 6)
    halves(world, tmp_path / "test")
    rows = ["image,mask", *(f"images/{i}.png,masks/{i}.png" for i in range(6))]
    (tmp_path / "train" / "captions.csv").write_text("\n".join(rows))  # masks in the records
    found = evaluate(
        "one", "--dataset", tmp_path / "test" / "images", "--masks", tmp_path / "test" / "masks",
        "--train-dataset", tmp_path / "train", "--task", "linear_segmentation",
    )  # fmt: skip
    assert found["linear_segmentation/mIoU"] > 0.9


def test_masks_follow_the_pictures_resizing():
    mask = np.arange(12 * 24).reshape(12, 24)
    squashed = nearest(mask, 6, Resize("squash"))
    np.testing.assert_array_equal(squashed, mask[1::2, 2::4])
    np.testing.assert_array_equal(nearest(mask, 12, Resize("crop")), mask[:, 6:18])
    label = of_patches(np.array([[0, 0, 2, -1], [0, 1, -1, 2], [-1, -1, 1, 0], [-1, -1, 1, 1]]), 2)
    np.testing.assert_array_equal(label, [[0, 2], [-1, 1]])
