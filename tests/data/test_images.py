import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from clipjax.data import UnreadableRecord, decode
from clipjax.data.images import Jpeg, resize, resize_fast


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_bytes_path_and_pixels_agree(pixels, tmp_path):
    content = encoded(Image.fromarray(pixels), "png")
    (tmp_path / "a.png").write_bytes(content)
    for image in (content, tmp_path / "a.png", str(tmp_path / "a.png"), pixels):
        out = decode(image)
        assert out.dtype == np.uint8
        np.testing.assert_array_equal(out, pixels)


def test_alpha_is_composited_on_white(pixels):
    alpha = np.linspace(0, 255, 35).round().astype(np.uint8).reshape(5, 7, 1)
    rgba = np.concatenate([pixels, alpha], axis=2)
    a = alpha / 255
    expected = pixels * a + 255 * (1 - a)
    for image in (encoded(Image.fromarray(rgba), "png"), rgba):
        assert np.abs(decode(image) - expected).max() <= 1
    np.testing.assert_array_equal(decode(rgba)[0, 0], [255, 255, 255])


def test_palette_with_a_transparent_color():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    np.testing.assert_array_equal(
        decode(encoded(picture, "png", transparency=0)), [[[255, 255, 255], [200, 100, 50]]]
    )
    np.testing.assert_array_equal(decode(encoded(picture, "png")), [[[10, 20, 30], [200, 100, 50]]])


def test_gray_of_8_and_16_bits():
    gray = np.array([[0, 100, 255]], np.uint8)
    expected = np.repeat(gray[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(gray), "png")), expected)
    np.testing.assert_array_equal(decode(gray), expected)
    np.testing.assert_array_equal(decode(gray[..., None]), expected)
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode(encoded(deep, "png")), expected)


def test_cmyk():
    picture = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    out = decode(encoded(picture, "jpeg", quality=100))
    assert np.abs(out.astype(int) - [255, 0, 0]).max() <= 3


def test_exif_orientation_turns_the_picture(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    content = encoded(Image.fromarray(pixels), "png", exif=exif)
    np.testing.assert_array_equal(decode(content), np.rot90(pixels, -1))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    content = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(content), np.full((4, 4, 3), [255, 0, 0]))


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels whose data is missing: the header alone must be enough."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_deep_gray_keeps_its_tone():
    shares = np.tile(np.linspace(0, 1, 64), (4, 1))
    expected = np.round(shares * 255)
    deep = (shares * 65535).astype(np.int64)
    for image in (
        encoded(Image.fromarray(deep.astype(np.int32)), "tiff"),
        encoded(Image.fromarray(shares.astype(np.float32)), "tiff"),
        Image.fromarray((shares * 255).astype(np.float32)),
        Image.fromarray(deep.astype(np.int32)),
        b"P5 64 4 65535\n" + deep.astype(">u2").tobytes(),
        b"P5 64 4 1023\n" + (shares * 1023).astype(">u2").tobytes(),
    ):
        assert np.abs(decode(image).mean(2) - expected).max() <= 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "rec: not an image"),
        (b"not an image at all", "rec: not an image"),
        ("/nowhere/a.png", "rec: there is no file '/nowhere/a.png'"),
        (bomb(8_100), "rec: 8100 x 8100 pixels exceed the limit of 64,000,000"),
        (bomb(100_000), "rec: .*pixels"),
        (3, "rec: an image must be bytes"),
        (np.zeros((2, 2, 3), np.float32), r"rec: pixels must be uint8.*float32 \[2, 2, 3\]"),
        (np.zeros((2, 2, 5), np.uint8), r"rec: pixels must be uint8.*\[2, 2, 5\]"),
    ],
)
def test_what_does_not_decode_is_named(image, message):
    with pytest.raises(UnreadableRecord, match=message):
        decode(image, "rec")


def test_truncated_file_is_refused_not_filled_up(pixels):
    big = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("png", "jpeg"):
        content = encoded(big, kind)
        with pytest.raises(UnreadableRecord, match="rec: the image does not decode"):
            decode(content[: len(content) // 2], "rec")


def test_resize_is_pillows_bicubic(pixels):
    big = np.random.default_rng(2).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    expected = Image.fromarray(big).resize((16, 12), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize(big, (12, 16)), np.asarray(expected))
    expected = Image.fromarray(big[10:30, 20:50]).resize((15, 10), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize(big[10:30, 20:50], (10, 15)), np.asarray(expected))
    assert resize(pixels, (5, 7)) is pixels


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}]
)
def test_jpeg_pixels_are_pillows(mode, options):
    pixels = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(pixels).convert(mode), "jpeg", **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(decode(content), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_turned_upright(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(pixels), "jpeg", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    np.testing.assert_array_equal(decode(content), expected)
    jpeg = Jpeg.of(content)
    assert (jpeg.height, jpeg.width) == expected.shape[:2]


def test_without_simplejpeg_pillow_does_it(monkeypatch):
    content = encoded(Image.new("RGB", (9, 7), (10, 200, 30)), "jpeg")
    expected = decode(content)
    monkeypatch.setattr("clipjax.data.images._simplejpeg", lambda: None)
    assert Jpeg.of(content) is None
    np.testing.assert_array_equal(decode(content), expected)


@pytest.mark.parametrize(
    "box", [(0, 0, 300, 200), (10.3, 20.7, 250.2, 177.9), (290, 0.5, 300, 199)]
)
def test_fast_resizing_is_pillows_but_for_rounding(box):
    pytest.importorskip("cykooz_resizer")
    # Away from black and white, where one clips what it makes along rows, and the other along columns.
    image = np.random.default_rng(0).integers(64, 192, (200, 300, 3), np.uint8)
    for size in ((64, 64), (250, 90), (1, 1)):
        difference = np.abs(resize_fast(image, size, box).astype(int) - resize(image, size, box))
        assert difference.mean() < 0.4 and difference.max() <= 2
