import json
import logging

import numpy as np
import pytest
import tensorflow_datasets as tfds

from clipjax.errors import ClipjaxError
from clipjax.evals.prompts import (
    ClassSet,
    label_map,
    read_class_map,
    read_classes,
    read_templates,
    shipped_classes,
)

SIZES = {
    "caltech101": 102, "cars196": 196, "cifar10": 10, "cifar100": 100, "dtd": 47, "eurosat": 10,
    "food101": 101, "imagenet": 1000, "imagenet_a": 200, "imagenet_r": 200, "mnist": 10,
    "oxford_flowers102": 102, "oxford_iiit_pet": 37, "patch_camelyon": 2, "resisc45": 45,
    "stl10": 10, "sun397": 397, "svhn_cropped": 10,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_shipped_sets_are_complete(name):
    classes = read_classes(name)
    assert len(classes.names) == SIZES[name] == len(set(classes.names))
    assert all(n == n.strip() and n and "_" not in n for n in classes.names)
    assert len(classes.templates) >= 2 and all(t.count("{}") == 1 for t in classes.templates)


def test_no_set_is_missing_above():
    assert shipped_classes() == sorted(SIZES)


@pytest.mark.parametrize("name", sorted(set(SIZES) - {"imagenet_a", "imagenet_r"}))
def test_labels_are_those_of_tfds(name, tmp_path):
    builder = tfds.builder(
        {"eurosat": "eurosat/rgb", "imagenet": "imagenet2012"}.get(name, name), data_dir=tmp_path
    )
    declared = tuple(builder.info.features["label"].names)
    # In TFDS's order without a warning: by their names, or as numbers where TFDS has no more.
    found = label_map(read_classes(name), declared, np.arange(len(declared)))
    np.testing.assert_array_equal(found, np.arange(SIZES[name]))


def test_names_of_imagenet_are_where_they_belong():
    classes = read_classes("imagenet")
    by_name = dict(zip(classes.names, classes.synsets, strict=True))
    # WordNet 3.0
    assert by_name["tench"] == "n01440764" and by_name["toilet paper"] == "n15075141"
    assert by_name["crane, a wading bird"] == "n02012849"
    assert by_name["crane, a lifting machine"] == "n03126707"
    assert by_name["golden retriever"] == "n02099601" and by_name["espresso"] == "n07920052"
    assert list(classes.synsets) == sorted(classes.synsets)


def test_imagenet_r_and_a_are_parts_of_imagenet():
    whole = read_classes("imagenet")
    for name, some in (("imagenet_r", "n01443537"), ("imagenet_a", "n01498041")):
        part = read_classes(name)
        assert part.whole == 1000 and some in part.synsets  # goldfish, stingray
        for i, index in enumerate(part.indices):
            assert part.names[i] == whole.names[index]
            assert part.synsets[i] == whole.synsets[index]


THREE = ClassSet(
    "three", ("red fox", "grey wolf", "dog"), synsets=("n00000001", "n00000002", "n00000003")
)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (("n00000002", "n00000009", "n00000001"), [1, -1, 0]),  # folders of ImageNet
        (("n00000003-dog", "n00000001-red_fox"), [2, 0]),  # folders of Stanford Dogs' kind
        (("0", "2", "1"), [0, 2, 1]),  # sorted as text: ImageNet-V2
        (("Dog", "grey_wolf", "red-fox"), [2, 1, 0]),
        (None, [0, 1, 2]),
    ],
)  # fmt: skip
def test_labels_find_their_names(declared, expected, caplog):
    labels = np.arange(len(declared or expected))
    with caplog.at_level(logging.WARNING):
        assert label_map(THREE, declared, labels).tolist() == expected
    assert not caplog.records


def test_other_names_are_taken_in_order_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert label_map(THREE, ("x", "y"), np.array([0, 1])).tolist() == [0, 1]
    assert "(x, ...)" in caplog.text and "(red fox, ...)" in caplog.text


def test_labels_of_the_whole_find_a_part():
    part = ClassSet("part", ("a", "b"), indices=(1, 3), whole=5)
    assert label_map(part, None, np.array([0, 4])).tolist() == [-1, 0, -1, 1, -1]
    assert label_map(part, None, np.array([0, 1])).tolist() == [0, 1]
    with pytest.raises(ClipjaxError, match="has 6 classes, but 'part' names 2"):
        label_map(part, None, np.array([5]))


def test_a_set_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"names": ["a", "b"], "templates": ["one {}"], "about": "mine"}))
    assert read_classes(str(path)) == ClassSet(str(path), ("a", "b"), ("one {}",))
    assert read_templates(str(path)) == ("one {}",)
    lines = tmp_path / "lines.txt"
    lines.write_text("a {}\n\n  the {}!\n")
    assert read_templates(str(lines)) == ("a {}", "the {}!")
    path.write_text('["x {}"]')
    assert read_templates(str(path)) == ("x {}",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected an object"),
        ("{", "is not JSON"),
        ('{"names": []}', "'names' is missing"),
        ('{"names": ["a"], "template": []}', "did you mean 'templates'"),
        ('{"names": ["a"], "synsets": ["n1", "n2"]}', "2 synsets for 1 names"),
        ('{"names": "ab"}', "must be a list of strings"),
        ('{"subset_of": "cifar10", "classes": [3, 2]}', "ascending"),
        ('{"subset_of": "cifar10", "classes": [10]}', "ascending"),
    ],
)
def test_a_bad_set_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ClipjaxError, match=message) as refused:
        read_classes(str(path))
    assert "bad.json" in str(refused.value)


def test_what_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ClipjaxError, match=r"no class names 'cifar'; did you mean 'cifar10'"):
        read_classes("cifar")
    with pytest.raises(ClipjaxError, match="no file of templates"):
        read_templates(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ClipjaxError, match="templates .*is empty"):
        read_templates(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes("caf\xe9 {}".encode("cp1252"))
    with pytest.raises(ClipjaxError, match="not readable as UTF-8"):
        read_templates(str(tmp_path / "latin.txt"))
    (tmp_path / "marked.txt").write_bytes("a {}\r\na\u2028b {}\n".encode("utf-8-sig"))
    assert read_templates(str(tmp_path / "marked.txt")) == ("a {}", "a\u2028b {}")
    (tmp_path / "braces.json").write_text('{"names": ["a"], "templates": ["a {c}"]}')
    with pytest.raises(ClipjaxError, match=r"'a \{c\}' lacks the \{\}"):
        read_classes(str(tmp_path / "braces.json"))
    (tmp_path / "bare.txt").write_text("a photo\n")
    with pytest.raises(ClipjaxError, match="lacks the {}"):
        read_templates(str(tmp_path / "bare.txt"))
    with pytest.raises(ClipjaxError, match="no class_map"):
        read_class_map(str(tmp_path / "none.json"), THREE, None)


def test_a_class_map_names_classes_by_number_id_or_name(tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"canine": ["n00000003", "Grey wolf"], "other": 0}))
    assert read_class_map(str(path), THREE, ("other", "cat", "canine")) == {0: [0], 2: [2, 1]}
    path.write_text(json.dumps({"1": 2}))
    assert read_class_map(str(path), THREE, None) == {1: [2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected an object"),
        ('{"caninne": 0}', "no class 'caninne'; did you mean 'canine'"),
        ('{"canine": "gray wolf"}', "no class 'gray wolf'; did you mean 'grey wolf'"),
        ('{"canine": 3}', "3 is no class of three"),
        ('{"canine": 2, "other": "dog"}', "'dog' stands for two classes"),
    ],
)
def test_a_bad_class_map_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises(ClipjaxError, match=message):
        read_class_map(str(path), THREE, ("other", "canine"))
