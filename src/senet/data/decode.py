"""Decodes an image file to uint8 pixels that look as in an image viewer.

A :class:`Picture` knows its height and width before it is decoded. A transform therefore chooses its crop first and
then asks for pixels at the lowest resolution that is sufficient for the crop. Only JPEG can be decoded at a reduced
size: libjpeg-turbo computes 1/2, 1/4, and 1/8 directly from the DCT coefficients. (It supports other n/8 sizes, but
they were measured to be slower than the full size.) At full size, the pixels are bit-identical to Pillow's.
"""

import io
import os
import stat
import warnings
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from senet.data import MAX_PIXELS
from senet.data.formats import HEAD_BYTES, formats, recognized, what_it_is
from senet.data.orientation import image_orientation, jpeg_orientation, upright
from senet.errors import InputError

Pixels = npt.NDArray[np.uint8]

# Words in libjpeg-turbo's messages about lost data. Its other messages are about harmless irregularities.
_LOST_DATA = ("corrupt", "premature end", "progression", "huffman")
_END_OF_JPEG = b"\xff\xd9"
_BLOCK = 24  # upper limit of the side of a JPEG block, including the pixels interpolated from it
# (limit, factor). Gray images of integers or floats have no defined scale; the first limit not exceeded decides.
_SCALES = ((1, 255.0), (255, 1.0), (65535, 1 / 257))


class BadImageError(InputError):
    """An image that cannot be read. The message is the reason, without the name of the file."""


class Picture(Protocol):
    """An image that may not be decoded yet. ``height`` and ``width`` are those of the upright, full-size image.

    After decoding, ``damage`` describes the damage of a file that could still be decoded.
    """

    height: int
    width: int
    damage: str | None

    def pixels(self, channels: int, reduce: int = 1) -> tuple[Pixels, int]:
        """Decode to (H, W, channels) uint8 at 1/reduce of the size, if the format supports it.

        Returns:
            The pixels and the actual reduction, ``reduce`` or 1. Sizes are rounded up.

        Raises:
            BadImageError: No part of the image can be decoded.
        """
        ...


class ArrayPicture:
    """Pixels in memory: (H, W) or (H, W, C) uint8 with 1 or 3 channels."""

    def __init__(self, array: Pixels, damage: str | None = None) -> None:
        self.array = array
        self.damage = damage
        self.height, self.width = array.shape[:2]

    def pixels(self, channels: int, reduce: int = 1) -> tuple[Pixels, int]:
        """Return the pixels with 1 or 3 channels. ``reduce`` is ignored."""
        return with_channels(self.array, channels), 1


class JpegPicture:
    """A JPEG file, decoded by libjpeg-turbo at the requested size."""

    def __init__(self, data: bytes, height: int, width: int, *, cmyk: bool = False) -> None:
        self.data = data
        self.cmyk = cmyk
        self.damage: str | None = None
        self.orientation = jpeg_orientation(data)
        self.raw_size = (height, width)
        self.height, self.width = (width, height) if self.orientation >= 5 else (height, width)

    def pixels(self, channels: int, reduce: int = 1) -> tuple[Pixels, int]:
        """Decode; see :class:`Picture`. ``reduce`` is 1, 2, 4, or 8."""
        if self.orientation != 1 and any(side % reduce for side in self.raw_size):
            reduce = 1  # the rotation would move the incomplete last pixels to the start and shift the image
        height, width = (-(-side // reduce) for side in self.raw_size)
        space = "CMYK" if self.cmyk else "RGB" if channels == 3 else "GRAY"
        try:
            array = simplejpeg.decode_jpeg(self.data, space, min_height=height, min_width=width)
        except ValueError as error:
            gray = np.full(
                (height, width, 4 if self.cmyk else channels), 128, dtype=np.uint8
            )  # kept where data is lost
            try:
                array = simplejpeg.decode_jpeg(
                    self.data, space, min_height=height, min_width=width, buffer=gray, strict=False
                )
            except ValueError:
                pixels, self.damage = _by_pillow(self.data, channels, str(error), self.height * self.width)
                return pixels, 1
            self.damage = _damage(str(error), array, _BLOCK // reduce)
        if self.cmyk:  # inverted, as Adobe writes it and Pillow reads it
            colors = Image.frombuffer("CMYK", array.shape[1::-1], (255 - array).tobytes(), "raw", "CMYK", 0, 1)
            array = with_channels(np.array(colors.convert("RGB")), channels)
        return upright(array, self.orientation), reduce


def read_picture(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Picture:
    """Open an image file. Other files are recognized by their first bytes and not read further.

    Raises :class:`BadImageError`; see :func:`open_picture`.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise BadImageError(f"{kind_of_node(mode)}, not a file")  # opening it could block forever
        with open(path, "rb") as file:
            return open_picture(file, max_pixels, name=os.fspath(path))
    except OSError as error:
        raise BadImageError(f"cannot be read ({error.strerror or error})") from error


def open_picture(source: bytes | io.BufferedReader, max_pixels: int = MAX_PIXELS, *, name: str = "") -> Picture:
    """Open an image, given its bytes or an open file. Of a JPEG, only the header is read; Pillow decodes all others.

    Raises:
        BadImageError: The file is empty, damaged, or not an image, or has more than ``max_pixels`` pixels.
    """
    head = source[:HEAD_BYTES] if isinstance(source, bytes) else source.peek(HEAD_BYTES)[:HEAD_BYTES]
    if not head:
        raise BadImageError("empty file")
    form = recognized(head, name)
    if form is None:
        raise BadImageError(what_it_is(head))
    if form != "JPEG":
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        return ArrayPicture(pillow_pixels(file, max_pixels=max_pixels, form=form))
    data = source if isinstance(source, bytes) else source.read()
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        return ArrayPicture(*_by_pillow(data, None, str(error), max_pixels))
    _check_pixel_count(height, width, max_pixels)
    return JpegPicture(data, height, width, cmyk=space in ("CMYK", "YCCK"))


def pillow_pixels(
    source: bytes | BinaryIO, channels: int | None = None, *, max_pixels: int = MAX_PIXELS, form: str | None = None
) -> Pixels:
    """Decode an image with Pillow to upright (H, W, C) uint8. ``form`` is its format, if known.

    Animations give their first frame, and transparent areas become white. 16-bit values are scaled to 8 bits. CMYK is
    converted, including Adobe's inverted files. The EXIF orientation is applied. If ``channels`` is None, gray images
    keep one channel.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # otherwise, Pillow would reject images that the caller allows
    with warnings.catch_warnings():
        # Warnings about unusual metadata, transparency as bytes, and sizes are harmless; real damage raises an error.
        warnings.simplefilter("ignore")
        try:
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=[form] if form else formats()) as image:
                _check_pixel_count(image.height, image.width, max_pixels)
                return image_pixels(image, channels)
        except BadImageError:
            raise
        except Image.DecompressionBombError as error:
            raise BadImageError(_too_large("more", max_pixels)) from error
        except Image.UnidentifiedImageError as error:
            raise BadImageError("damaged image (its header cannot be read)" if form else "not an image") from error
        except Exception as error:  # on damaged bytes, Pillow's plugins raise almost any exception
            raise BadImageError(f"damaged image ({type(error).__name__}: {str(error)[:80]})") from error


def image_pixels(image: Image.Image, channels: int | None = None) -> Pixels:
    """Convert an open Pillow image to upright (H, W, C) uint8; see :func:`pillow_pixels`."""
    image.load()
    orientation = image_orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        colors = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    array = upright(np.array(image), orientation)
    return with_channels(array, channels or (1 if array.ndim == 2 else 3))


def with_channels(array: Pixels, channels: int) -> Pixels:
    """Convert (H, W) or (H, W, 1|3) pixels to 1 channel (ITU-R 601 luma) or 3 channels (gray repeated)."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == channels:
        return array
    if array.shape[2] not in (1, 3) or channels not in (1, 3):
        raise InputError(f"images must have 1 or 3 channels: cannot convert {array.shape[2]} to {channels}")
    if channels == 3:
        return np.repeat(array, 3, axis=2)
    return np.array(Image.fromarray(np.ascontiguousarray(array)).convert("L"))[:, :, None]


def kind_of_node(mode: int) -> str:
    """The kind of a path that is not a regular file."""
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISLNK, "a broken link"),
    )
    return next((name for test, name in kinds if test(mode)), "a device")


def _by_pillow(data: bytes, channels: int | None, why: str, max_pixels: int) -> tuple[Pixels, str | None]:
    """Pixels and damage of a JPEG that simplejpeg rejects, usually because of stray bytes between segments."""
    # Pillow rejects a truncated file. With an end marker, it decodes the part before it.
    array = pillow_pixels(data + _END_OF_JPEG, channels, max_pixels=max_pixels)
    lost = any(word in why.lower() for word in _LOST_DATA)
    return array, _damage(why, array, _BLOCK) if lost else None


def _damage(why: str, array: Pixels, block: int) -> str:
    """Describe the damage. If all is gray except the first block, which libjpeg makes up, nothing was decoded."""
    rest = [part for part in (array[block:], array[:block, block:]) if part.size] or [array]
    if all(part.min() >= 127 and part.max() <= 128 for part in rest):
        raise BadImageError(f"damaged JPEG, nothing can be decoded ({why[:80]})")
    return f"decoded with damage ({why[:80]})"


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale gray values of more than 8 bits to 0..255: 16-bit values by their range, others by their largest value."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("I;16") or (image.mode == "I" and getattr(image, "format", "") in ("PNG", "PPM")):
        factor = 1 / 257  # 65535 / 255
    else:
        unfit = int(np.count_nonzero(~np.isfinite(values)))
        if unfit:
            raise BadImageError(f"{unfit} of {values.size} pixels are NaN or infinite")
        low, high = values.min(), values.max()
        fitting = [factor for limit, factor in _SCALES if high <= limit and low >= 0]
        if not fitting:
            raise BadImageError(f"values from {low:g} to {high:g}: scale them to 0..1, 0..255 or 0..65535")
        factor = fitting[0]
    return Image.fromarray(np.rint(values * factor).clip(0, 255).astype(np.uint8))


def _check_pixel_count(height: int, width: int, most: int) -> None:
    if height * width > most:
        raise BadImageError(_too_large(f"{width}x{height} pixels are more", most))


def _too_large(what: str, most: int) -> str:
    return f"{what} than the limit of {most:,} pixels; raise --max-pixels to allow them"
