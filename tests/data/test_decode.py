"""Decoding against Pillow, and the odd files that real folders hold."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, ImageSequence

from senet.data import decode
from senet.data.decode import BadImageError, JpegPicture, open_picture, pillow_pixels


def scene(height: int = 75, width: int = 100) -> Image.Image:
    """A smooth picture with a few edges, different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    array = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], axis=2)
    array[: height // 3, : width // 4] = (250, 20, 30)
    return Image.fromarray(array.astype(np.uint8))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes, channels: int = 3) -> np.ndarray:
    return open_picture(data).pixels(channels)[0]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_full_size_jpeg_is_bit_equal_to_pillow(mode: str, options: dict) -> None:
    data = saved(scene().convert(mode), "JPEG", **options)
    assert isinstance(open_picture(data), JpegPicture)
    np.testing.assert_array_equal(decoded(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_reduced_jpeg_is_bit_equal_to_pillows_draft(reduce: int) -> None:
    data = saved(scene(161, 203), "JPEG")
    pixels, applied = open_picture(data).pixels(3, reduce)
    draft = Image.open(io.BytesIO(data))
    draft.draft("RGB", (203 // reduce, 161 // reduce))
    assert applied == reduce
    np.testing.assert_array_equal(pixels, np.array(draft))


def test_one_channel_of_a_colour_jpeg_is_its_luma() -> None:
    data = saved(scene(), "JPEG", quality=95)
    grey = decoded(data, 1)
    expected = np.array(Image.open(io.BytesIO(data)).convert("L"), dtype=int)
    assert grey.shape == (75, 100, 1)
    assert np.abs(grey[:, :, 0] - expected).mean() < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(scene(), form, exif=exif.tobytes())
    picture = open_picture(data)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (picture.height, picture.width) == expected.shape[:2]
    np.testing.assert_array_equal(picture.pixels(3)[0], expected)
    assert picture.pixels(3, 2)[0].shape[0] in (expected.shape[0], (expected.shape[0] + 1) // 2)


def test_broken_exif_does_not_cost_the_image() -> None:
    data = saved(scene(), "JPEG")
    broken = data[:2] + b"\xff\xe1\x00\x14Exif\0\0II*\0" + b"\xff" * 8 + data[2:]
    np.testing.assert_array_equal(decoded(broken), decoded(data))


def with_noise(data: bytes) -> bytes:
    return data[: len(data) // 2] + b"\xff\xd0" * 40 + data[len(data) // 2 + 80 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "empty file"),
        (lambda data: b"these are words", "not an image"),
        (lambda data: data[:3], "damaged|not an image"),
        (lambda data: data[:100], "damaged|not an image"),
        (lambda data: data[: len(data) // 2], "damaged"),
    ],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_files_are_bad_images(form: str, damage: Callable[[bytes], bytes], reason: str) -> None:
    with pytest.raises(BadImageError, match=reason) as caught:
        decoded(damage(saved(scene(), form)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [with_noise, lambda data: data[: len(data) // 2] + b"\xff\xd9"])
def test_jpeg_with_lost_data_is_bad_although_pillow_shows_grey(damage: Callable[[bytes], bytes]) -> None:
    data = damage(saved(scene(), "JPEG", quality=95))
    assert Image.open(io.BytesIO(data)).convert("RGB").size == (100, 75)
    with pytest.raises(BadImageError, match="damaged JPEG"):
        decoded(data)


def test_stray_bytes_in_a_jpeg_are_harmless() -> None:
    data = saved(scene(), "JPEG")
    scan = data.index(b"\xff\xda")
    with pytest.raises(ValueError):  # noqa: PT011 - libjpeg's word for it
        simplejpeg.decode_jpeg(data[:scan] + b"abc" + data[scan:])
    np.testing.assert_array_equal(decoded(data[:scan] + b"abc" + data[scan:]), decoded(data))
    np.testing.assert_array_equal(decoded(data + b"trailing"), decoded(data))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 2), (0, 0, 0, 255))
    image.putpixel((3, 3), (0, 0, 0, 128))
    pixels = decoded(saved(image.convert(mode), "PNG"))
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert tuple(pixels[2, 1]) == (0, 0, 0)
    assert abs(int(pixels[3, 3, 0]) - 127) <= 1


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_palette_with_a_transparent_colour_shows_white(transparency: int | bytes) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((2, 1), 1)
    pixels = decoded(saved(image, "PNG", transparency=transparency))
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert tuple(pixels[1, 2]) == (200, 100, 50)


def test_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    data = saved(red, "JPEG", quality=100)
    assert b"Adobe" in data, "Pillow writes Adobe's inverted CMYK"
    assert np.abs(decoded(data).astype(int) - (255, 0, 0)).max() <= 3
    assert np.abs(decoded(saved(red, "TIFF")).astype(int) - (255, 0, 0)).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form: str) -> None:
    values = np.array([[0, 257, 25700], [32896, 65278, 65535]], dtype=np.uint16)
    pixels = decoded(saved(Image.fromarray(values), form), 1)
    np.testing.assert_array_equal(pixels[:, :, 0], [[0, 1, 100], [128, 254, 255]])


@pytest.mark.parametrize(("top", "expected"), [(1.0, [0, 128, 255]), (255.0, [0, 128, 255])])
def test_float_tiff(top: float, expected: list[int]) -> None:
    values = np.array([[0, 128 / 255, 1]], dtype=np.float32) * top
    assert decoded(saved(Image.fromarray(values), "TIFF"), 1).ravel().tolist() == expected


def test_one_bit_image() -> None:
    image = Image.new("1", (4, 4))
    image.putpixel((1, 1), 1)
    assert decoded(saved(image, "PNG"))[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:])
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 3
    assert np.abs(decoded(data).astype(int) - (255, 0, 0)).max() <= 3


def test_large_images_neither_warn_nor_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    monkeypatch.setattr(decode, "MAX_PIXELS", 10000)
    assert decoded(saved(scene(75, 100), "PNG")).shape == (75, 100, 3)  # Pillow warns above 5,000
    for form in ("PNG", "JPEG"):
        with pytest.raises(BadImageError, match=r"150x100|exceeds limit"):
            decoded(saved(scene(100, 150), form))
    large = open_picture(saved(scene(100, 150), "JPEG"))
    assert large.pixels(3, 2)[0].shape == (50, 75, 3)


def test_grey_stays_grey_and_becomes_colour_on_request() -> None:
    data = saved(scene().convert("L"), "PNG")
    assert pillow_pixels(data).shape == (75, 100, 1)
    np.testing.assert_array_equal(decoded(data, 3), np.repeat(decoded(data, 1), 3, axis=2))
