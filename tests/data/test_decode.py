"""Decoding against Pillow, and the odd files that real folders hold."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, ImageSequence

from senet.data.decode import BadImageError, JpegPicture, open_picture, pillow_pixels, read_picture


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
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
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
@pytest.mark.parametrize("form", ["PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_files_are_bad_images(form: str, damage: Callable[[bytes], bytes], reason: str) -> None:
    with pytest.raises(BadImageError, match=reason) as caught:
        decoded(damage(saved(scene(), form)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "damage",
    [
        with_noise,
        lambda data: data[: len(data) // 2] + b"\xff\xd9",
        lambda data: data[: len(data) // 2],
        lambda data: data[: data.index(b"\xff\xda")] + b"abc" + data[data.index(b"\xff\xda") :],
    ],
)
def test_jpeg_that_libjpeg_decodes_with_a_warning_is_shown_as_pillow_shows_it(
    mode: str, damage: Callable[[bytes], bytes], options: dict
) -> None:
    data = damage(saved(scene().convert(mode), "JPEG", quality=95, **options))
    picture = open_picture(data)
    pixels = picture.pixels(3)[0]
    shown = np.array(Image.open(io.BytesIO(data + b"\xff\xd9" * 200)).convert("RGB"))  # ended, also within a segment
    np.testing.assert_array_equal(pixels, shown)
    assert "decoded with damage" in str(picture.damage)
    whole = open_picture(saved(scene().convert(mode), "JPEG", quality=95, **options))
    whole.pixels(3)
    assert whole.damage is None


@pytest.mark.parametrize("side", [75, 400])
def test_jpeg_of_which_nothing_is_left_is_bad(side: int) -> None:
    data = saved(scene(side, side), "JPEG")
    scan = data.index(b"\xff\xda")
    with pytest.raises(BadImageError, match="nothing"):
        decoded(data[: scan + 14])


def test_stray_bytes_in_a_jpeg_cost_no_pixel() -> None:
    data = saved(scene(), "JPEG")
    scan = data.index(b"\xff\xda")
    with pytest.raises(ValueError):  # noqa: PT011 - libjpeg's word for it
        simplejpeg.decode_jpeg(data[:scan] + b"abc" + data[scan:])
    np.testing.assert_array_equal(decoded(data[:scan] + b"abc" + data[scan:]), decoded(data))
    behind = open_picture(data + b"trailing")
    np.testing.assert_array_equal(behind.pixels(3)[0], decoded(data))
    assert behind.damage is None


def jpeg_with(*segments: tuple[int, bytes], tail: bytes = b"") -> bytes:
    """A JPEG with segments (marker, content) before all others."""
    data = saved(scene(), "JPEG")
    extra = b"".join(bytes([255, marker]) + (len(body) + 2).to_bytes(2, "big") + body for marker, body in segments)
    return data[:2] + extra + data[2:] + tail


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


XMP = b"http://ns.adobe.com/xap/1.0/\0"
ATTRIBUTE = XMP + b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
ELEMENT = XMP + b"<tiff:Orientation>8</tiff:Orientation>"
FILLER = (0xE2, bytes(65000))


@pytest.mark.parametrize(
    ("data", "upright"),
    [
        (jpeg_with((0xE1, ATTRIBUTE)), False),
        (jpeg_with((0xE1, ELEMENT)), False),
        (jpeg_with((0xE1, ATTRIBUTE), (0xE1, exif_of(3))), False),
        (jpeg_with(FILLER, FILLER, (0xE1, exif_of(6))), False),
        (jpeg_with((0xE1, ATTRIBUTE), (0xE1, exif_of(1))), True),
        (jpeg_with((0xED, exif_of(6))), True),
        (jpeg_with((0xFE, exif_of(6))), True),
        (jpeg_with((0xFE, ATTRIBUTE)), True),
        (jpeg_with(tail=exif_of(6)), True),
        (jpeg_with((0xE1, b"Exif\0\0" + b"\xff" * 20)), True),
    ],
)
def test_orientation_is_read_where_pillow_reads_it_and_nowhere_else(data: bytes, upright: bool) -> None:
    pixels = decoded(data)
    np.testing.assert_array_equal(pixels, np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    assert np.array_equal(pixels, decoded(saved(scene(), "JPEG"))) == upright


def test_xmp_orients_other_formats_too() -> None:
    data = saved(scene(), "WEBP", lossless=True, xmp=ATTRIBUTE[len(XMP) :])
    np.testing.assert_array_equal(decoded(data), np.rot90(np.array(scene()), -1))


def test_broken_exif_costs_no_image_of_any_format() -> None:
    for form in ("PNG", "WEBP"):
        data = saved(scene(), form, exif=b"Exif\0\0II*\0" + b"\xff" * 8)
        assert decoded(data).shape == (75, 100, 3)


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


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("top", [1, 255, 65535])
def test_grey_numbers_are_scaled_by_what_they_hold(top: int, kind: type) -> None:
    values = np.array([[0, top // 2, top]]).astype(kind)
    expected = np.rint(values.astype(float) * 255 / top).astype(int).ravel().tolist()
    assert decoded(saved(Image.fromarray(values), "TIFF"), 1).ravel().tolist() == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0.5, np.nan, 1]], np.float32), "1 of 3 pixels are NaN"),
        (np.array([[0.5, np.inf, -np.inf]], np.float32), "2 of 3 pixels are NaN"),
        (np.array([[-1, 0, 1]], np.float32), "from -1 to 1"),
        (np.array([[0, 70000]], np.int32), "from 0 to 70000"),
        (np.array([[-5, 7]], np.int32), "from -5 to 7"),
    ],
)
def test_grey_numbers_without_a_known_scale_are_bad(values: np.ndarray, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decoded(saved(Image.fromarray(values), "TIFF"), 1)


def test_a_dark_16_bit_image_is_no_mask() -> None:
    values = np.array([[0, 1, 200]], dtype=np.uint16)
    for form in ("PNG", "TIFF", "PPM"):
        assert decoded(saved(Image.fromarray(values), form), 1).ravel().tolist() == [0, 0, 1], form


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


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP"])
def test_images_of_too_many_pixels_are_bad_without_being_decoded(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(scene(100, 150), form)
    assert open_picture(data, 15_000).height == 100

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", forbidden)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", forbidden)
    with pytest.raises(BadImageError, match=r"150x100 .* 14,999 .*--max-pixels"):
        open_picture(data, 14_999)


def test_pillows_own_limit_neither_warns_nor_stops_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    data = saved(scene(75, 100), "PNG")
    assert open_picture(data, 7500).pixels(3)[0].shape == (75, 100, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(BadImageError, match="3,000 pixels"):
        open_picture(data, 3000)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"%PDF-1.7\n", "PDF"),
        (b"PK\3\4" + bytes(60), "ZIP"),
        (b"\0\0\0\x18ftypheic" + bytes(60), "HEIC.*convert"),
        (b"\0\0\0\x18ftypmp42" + bytes(60), "video"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "not an image"),
    ],
)
def test_strangers_are_known_by_their_first_bytes_and_never_opened(
    content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", None)
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(3 << 30)  # a hole: it takes no room, and reading it would take 3 GB of memory
    with pytest.raises(BadImageError, match=reason) as caught:
        read_picture(path)
    assert "\n" not in str(caught.value)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BadImageError, match="a pipe"):
        read_picture(tmp_path / "pipe.jpg")
    with pytest.raises(BadImageError, match="a device"):
        read_picture("/dev/zero")
    with pytest.raises(BadImageError, match="a folder"):
        read_picture(tmp_path)
    with pytest.raises(BadImageError, match="cannot be read"):
        read_picture(tmp_path / "gone.jpg")


def test_every_format_of_the_list_is_read_from_a_file(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif", "a.ppm", "a.ico", "a.pcx", "a.sgi", "a.tga"):
        scene(32, 32).save(tmp_path / name)
        assert read_picture(tmp_path / name).pixels(3)[0].shape == (32, 32, 3), name


def test_grey_stays_grey_and_becomes_colour_on_request() -> None:
    data = saved(scene().convert("L"), "PNG")
    assert pillow_pixels(data).shape == (75, 100, 1)
    np.testing.assert_array_equal(decoded(data, 3), np.repeat(decoded(data, 1), 3, axis=2))
