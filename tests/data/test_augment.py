import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from clipjax.data import (
    CaptionChoice,
    ColorJitter,
    Flip,
    RandomResizedCrop,
    Resize,
    Shift,
)
from clipjax.data.augment import augmented, augmented_jpeg
from clipjax.data.images import Jpeg, decode
from clipjax.errors import ClipjaxError


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def image():
    return rng(7).integers(0, 256, (24, 36, 3), dtype=np.uint8)


AUGMENTATIONS = [
    Resize(),
    Resize("crop"),
    RandomResizedCrop((0.1, 1.0)),
    Flip(),
    Shift(3),
    Shift(3, "edge"),
    ColorJitter(0.4, 0.4, 0.4, 0.1),
]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=repr)
def test_same_generator_same_result_and_input_untouched(augmentation, image):
    before = image.copy()
    first, again = (augmentation(image, 16, rng(3)) for _ in range(2))
    assert first.dtype == np.uint8 and first.shape[2] == 3
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS[2:], ids=repr)
def test_other_generators_other_results(augmentation, image):
    results = {augmentation(image, 16, rng(seed)).tobytes() for seed in range(20)}
    assert len(results) >= (2 if isinstance(augmentation, Flip) else 10)


def test_resize_crop_keeps_the_center(image):
    out = Resize("crop")(image, 24)
    np.testing.assert_array_equal(out, image[:, 6:30])
    tall = np.ascontiguousarray(image.transpose(1, 0, 2))
    np.testing.assert_array_equal(Resize("crop")(tall, 24), tall[6:30])


def test_resize_squash_keeps_everything():
    halves = np.zeros((10, 40, 3), np.uint8)
    halves[:, 20:] = 200
    out = Resize("squash")(halves, 10)
    assert out.shape == (10, 10, 3)
    assert (out[:, :4] == 0).all() and np.abs(out[:, 6:] - 200.0).max() <= 3


def test_crop_box_has_the_area_and_ratio_asked_for():
    crop = RandomResizedCrop(scale=(0.2, 0.5), ratio=(0.5, 2.0))
    generator, areas, ratios = rng(), [], []
    for _ in range(2000):
        left, top, right, bottom = crop._box(100, 120, generator)
        assert 0 <= left < right <= 120 and 0 <= top < bottom <= 100
        areas.append((right - left) * (bottom - top) / 12000)
        ratios.append(np.log2((right - left) / (bottom - top)))
    assert min(areas) >= 0.2 and max(areas) <= 0.5 + 1e-9
    assert min(ratios) >= -1 - 1e-9 and max(ratios) <= 1 + 1e-9
    assert np.mean(areas) == pytest.approx(0.35, abs=0.01)  # uniform in area
    assert np.mean(ratios) == pytest.approx(0.0, abs=0.05)  # uniform in the logarithm


def test_crop_falls_back_to_the_largest_centered_box():
    crop = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert crop._box(10, 30, rng()) == (10, 0, 20, 10)


def test_crop_of_everything_is_a_resize(image, monkeypatch):
    monkeypatch.setattr("clipjax.data.images._cykooz_resizer", lambda: None)  # Pillow does it
    square = image[:, :24]
    np.testing.assert_array_equal(
        RandomResizedCrop((1, 1), (1, 1))(square, 12, rng()), Resize()(square, 12)
    )


def test_flip_mirrors_half_of_them(image):
    flips = [Flip()(image, 16, generator) for generator in [rng()] for _ in range(400)]
    mirrored = [np.array_equal(f, image[:, ::-1]) for f in flips]
    assert all(m or np.array_equal(f, image) for m, f in zip(mirrored, flips, strict=True))
    assert 160 < sum(mirrored) < 240
    np.testing.assert_array_equal(Flip(1.0)(image, 16, rng()), image[:, ::-1])


@pytest.mark.parametrize("fill", ["white", "edge"])
def test_shift_equals_padding_and_cutting(fill):
    image = rng(1).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    mode = {"white": {"constant_values": 255}, "edge": {"mode": "edge"}}[fill]
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), **mode)
    windows = {padded[y : y + 12, x : x + 12].tobytes(): (y, x) for y in range(5) for x in range(5)}
    seen = {windows[Shift(2, fill)(image, 12, rng(seed)).tobytes()] for seed in range(300)}
    assert len(seen) == 25  # every shift occurs


def test_jitter_strengths_and_hue():
    gray = np.full((4, 4, 3), 100, np.uint8)
    values = [int(ColorJitter(0.5, 0, 0, 0)(gray, 4, rng(s))[0, 0, 0]) for s in range(200)]
    assert 50 <= min(values) < 60 and 140 < max(values) <= 150
    # On a flat gray picture contrast and saturation have nothing to change.
    np.testing.assert_array_equal(ColorJitter(0, 0.9, 0.9, 0)(gray, 4, rng()), gray)
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    turned = [ColorJitter(0, 0, 0, 0.1)(red, 4, rng(s))[0, 0] / 255 for s in range(100)]
    hues = [(colorsys.rgb_to_hsv(*t)[0] + 0.5) % 1 - 0.5 for t in turned]
    assert -0.105 <= min(hues) < -0.08 and 0.08 < max(hues) <= 0.105
    assert ColorJitter(0, 0, 0, 0)(red, 4, rng()).tobytes() == red.tobytes()


def test_jitter_saturation_blends_with_gray():
    color = np.full((2, 2, 3), [200, 50, 50], np.uint8)
    gray = int(np.asarray(Image.fromarray(color).convert("L"))[0, 0])
    results = [ColorJitter(0, 0, 1.0, 0)(color, 2, rng(s))[0, 0].astype(float) for s in range(9)]
    out = min(results, key=lambda r: abs(r[0] - r[1] - 75))  # about half way, where nothing clips
    factor = (out[0] - out[1]) / 150
    assert 0.1 < factor < 0.9
    np.testing.assert_allclose(out, gray + factor * (np.array([200, 50, 50]) - gray), atol=1.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resize("stretch"), "'stretch'"),
        (lambda: RandomResizedCrop((0.0, 1.0)), "scale"),
        (lambda: RandomResizedCrop((0.5, 1.5)), "scale"),
        (lambda: RandomResizedCrop(ratio=(2.0, 1.0)), "ratio"),
        (lambda: Flip(1.5), "probability=1.5"),
        (lambda: Shift(-1), "pixels=-1"),
        (lambda: Shift(1, "black"), "'black'"),
        (lambda: Shift(20)(np.zeros((8, 8, 3), np.uint8), 8, rng()), "pixels=20"),
        (lambda: ColorJitter(brightness=-1), "brightness=-1"),
        (lambda: ColorJitter(hue=0.6), "hue=0.6"),
        (lambda: CaptionChoice(pick="best"), "'best'"),
        (lambda: CaptionChoice(("en",), (1.0, 2.0)), "2 weights for 1 languages"),
        (lambda: CaptionChoice(("en",), (0.0,)), "> 0"),
        (lambda: CaptionChoice(("en",), (1.0,), "first"), "weights mean nothing"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ClipjaxError, match=message):
        make()


RECORD = {
    "captions": ("cat", " ", "Katze", "chat", "Kater"),
    "languages": ("en", "en", "de", "fr", "de"),
}


def shares(choice, n=3000):
    generator = rng()
    drawn = [choice(RECORD, generator) for _ in range(n)]
    return {c: drawn.count(c) / n for c in set(drawn)}


def test_any_caption_has_the_same_chance_but_empty_ones_none():
    found = shares(CaptionChoice())
    assert found.keys() == {"cat", "Katze", "chat", "Kater"}
    assert all(share == pytest.approx(0.25, abs=0.03) for share in found.values())


def test_weights_are_shares_of_languages_not_of_captions():
    found = shares(CaptionChoice(("de", "en"), (3.0, 1.0)))
    assert found.keys() == {"cat", "Katze", "Kater"}
    assert found["cat"] == pytest.approx(0.25, abs=0.03)
    assert found["Katze"] == pytest.approx(0.375, abs=0.03)


def test_first_is_first_in_the_order_of_the_languages():
    assert shares(CaptionChoice(pick="first"), 20) == {"cat": 1.0}
    assert shares(CaptionChoice(("fr", "en"), pick="first"), 20) == {"chat": 1.0}


def test_no_caption_is_none():
    assert CaptionChoice(("zh",))(RECORD, rng()) is None
    assert CaptionChoice()({"captions": ("  ", "")}, rng()) is None
    assert CaptionChoice(("en",))({"captions": ("cat",)}, rng()) is None  # language not known


@pytest.mark.parametrize("shape", [(1, 30), (40, 3), (16, 400), (300, 20)])
@pytest.mark.parametrize("half_pixel", ["even", "down"])
def test_the_middle_of_a_strip_is_what_resizing_all_of_it_gives(shape, half_pixel, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    crop = Resize("crop", half_pixel=half_pixel)
    middle, moved = crop.mapped(image, 24)
    monkeypatch.setattr("clipjax.data.augment.LONGEST", 1e9)
    whole, moved_whole = crop.mapped(image, 24)
    assert middle.shape == (24, 24, 3)
    # Of noise: Pillow may take the axes in another order, and rounds between them.
    difference = np.abs(middle.astype(int) - whole)
    assert difference.max() <= 16 and difference.mean() < 1
    np.testing.assert_array_equal(moved, moved_whole)


def test_a_strip_of_any_length_takes_bounded_memory():
    import tracemalloc

    for shape in ((1, 1_000_000), (1_000_000, 1)):
        image = np.full((*shape, 3), 7, np.uint8)
        tracemalloc.start()
        assert (Resize("crop")(image, 224) == 7).all()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20e6


def photo(width, height, **options):
    picture = Image.fromarray(smooth(height, width))
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=90, **options)
    return buffer.getvalue()


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + y / b) for a, b in ((17, 40), (60, -23), (9, 31))]
    return (128 + 120 * np.stack(waves, 2)).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_small_shows_what_the_whole_does(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    content = photo(640, 480, exif=exif)
    steps = (RandomResizedCrop((0.5, 0.9)), Flip())
    jpeg = Jpeg.of(content)
    for seed in range(4):
        whole, where = augmented(decode(content), steps, Resize(), 64, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        small, where_small = augmented_jpeg(jpeg, steps, Resize(), 64, rng)
        assert np.abs(small.astype(int) - whole).mean() < 1
        np.testing.assert_allclose(where_small, where)
        # The same draws were taken.
        other = np.random.default_rng(seed)
        augmented(decode(content), steps, Resize(), 64, other)
        assert rng.random() == other.random()


def test_a_jpeg_is_decoded_at_a_fraction_only_where_half_the_size_will_do(monkeypatch):
    seen = []
    turbo = Jpeg.decode
    monkeypatch.setattr(
        Jpeg, "decode", lambda self, eighths=8: seen.append(eighths) or turbo(self, eighths)
    )
    jpeg = Jpeg.of(photo(640, 480))
    crop = (RandomResizedCrop((1.0, 1.0), (1.0, 1.0)),)  # 480 x 480
    for size in (60, 61, 240, 241, 480, 500):
        image, _ = augmented_jpeg(jpeg, crop, Resize(), size, np.random.default_rng(0))
        assert image.shape == (size, size, 3)
    assert seen == [1, 2, 4, 8, 8, 8]
    assert augmented_jpeg(jpeg, (Flip(), *crop), Resize(), 64, np.random.default_rng(0)) is None


def test_a_damaged_jpeg_leaves_the_draws_alone():
    rng = np.random.default_rng(0)
    jpeg = Jpeg.of(photo(640, 480)[:20_000])
    assert augmented_jpeg(jpeg, (RandomResizedCrop(),), Resize(), 64, rng) is None
    assert rng.random() == np.random.default_rng(0).random()
