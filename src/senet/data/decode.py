"""From the bytes of one image file to uint8 pixels, the way a person would expect to see them.

A :class:`Picture` knows its height and width before anything is decoded. A transform therefore chooses its crop first
and then asks for pixels at the smallest resolution that the crop can stand. Only JPEG can be decoded small:
libjpeg-turbo computes 1/2, 1/4 and 1/8 straight from the DCT coefficients. (Its other n/8 sizes exist too, but were
measured slower than the full size.) At full size the pixels are bit-equal to Pillow's.
"""

import io
import struct
import warnings
from typing import Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps

from senet.errors import InputError

Pixels = npt.NDArray[np.uint8]

# libjpeg-turbo's words for "part of the picture is lost". Anything else that it complains about (stray bytes between
# segments, odd headers) is left to Pillow, which shows such files.
_LOST_DATA = ("premature end", "huffman", "progression")
# As many decoded pixels as Pillow accepts before it speaks of a decompression bomb attack.
MAX_PIXELS = 2 * 89_478_485
# How EXIF orientation k is undone on an (H, W, C) array; 5 to 8 exchange height and width.
_UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


class BadImageError(InputError):
    """One image cannot be read: the message is the reason, without the file's name."""


class Picture(Protocol):
    """An image that may not be decoded yet; ``height`` and ``width`` are those of the upright, full-size image."""

    height: int
    width: int

    def pixels(self, channels: int, reduce: int = 1) -> tuple[Pixels, int]:
        """Decode to (H, W, channels) uint8 at 1/reduce of the size, if the format can.

        Returns the pixels and the reduction that was really applied: ``reduce`` or 1. Sizes round up.
        Raises :class:`BadImageError` when the image is damaged.
        """
        ...


class ArrayPicture:
    """Pixels in memory: (H, W) or (H, W, C) uint8 with 1 or 3 channels."""

    def __init__(self, array: Pixels) -> None:
        self.array = array
        self.height, self.width = array.shape[:2]

    def pixels(self, channels: int, reduce: int = 1) -> tuple[Pixels, int]:
        """Return the pixels with 1 or 3 channels; ``reduce`` is ignored."""
        return with_channels(self.array, channels), 1


class JpegPicture:
    """A JPEG file of grey or colour pixels (not CMYK), decoded by libjpeg-turbo at the size asked for."""

    def __init__(self, data: bytes, height: int, width: int) -> None:
        self.data = data
        self.orientation = _jpeg_orientation(data)
        self.raw_size = (height, width)
        self.height, self.width = (width, height) if self.orientation >= 5 else (height, width)

    def pixels(self, channels: int, reduce: int = 1) -> tuple[Pixels, int]:
        """Decode; see :class:`Picture`. ``reduce`` is 1, 2, 4 or 8."""
        if self.orientation != 1 and any(side % reduce for side in self.raw_size):
            reduce = 1  # the incomplete last pixels would come first and shift the image
        height, width = (-(-side // reduce) for side in self.raw_size)
        _check_pixel_count(height, width)
        space = "RGB" if channels == 3 else "GRAY"
        try:
            array = simplejpeg.decode_jpeg(self.data, space, min_height=height, min_width=width)
        except ValueError as error:
            if any(word in str(error).lower() for word in _LOST_DATA):
                raise BadImageError(f"damaged JPEG ({str(error)[:80]})") from error
            return pillow_pixels(self.data, channels), 1
        if self.orientation != 1:
            array = np.ascontiguousarray(_UPRIGHT[self.orientation](array))
        return array, reduce


def open_picture(data: bytes) -> Picture:
    """Open the bytes of a file. A JPEG is only looked at, everything else is decoded at once by Pillow.

    Raises :class:`BadImageError` for an empty, damaged or non-image file.
    """
    if not data:
        raise BadImageError("empty file")
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            space = "unknown"  # Pillow may still read it, and names the damage otherwise
        if space in ("YCbCr", "RGB", "Gray"):
            return JpegPicture(data, height, width)
    return ArrayPicture(pillow_pixels(data))


def pillow_pixels(data: bytes, channels: int | None = None) -> Pixels:
    """Decode any format Pillow knows to upright (H, W, C) uint8.

    First frame of animations; transparency over white; 16-bit values scaled to 8 bits; CMYK converted (Adobe's inverted
    files included); EXIF orientation applied. ``channels`` None keeps grey images at one channel.
    """
    with warnings.catch_warnings():
        # Odd metadata, transparency kept as bytes and size warnings are no reason to stop; real damage raises.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                return image_pixels(image, channels)
        except BadImageError:
            raise
        except Image.UnidentifiedImageError as error:
            raise BadImageError("not an image") from error
        except Exception as error:  # Pillow's many format plugins raise nearly anything on damaged bytes
            raise BadImageError(f"damaged image ({type(error).__name__}: {str(error)[:80]})") from error


def image_pixels(image: Image.Image, channels: int | None = None) -> Pixels:
    """Turn an open Pillow image into upright (H, W, C) uint8; see :func:`pillow_pixels`."""
    _check_pixel_count(image.height, image.width)
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        upright = _eight_bit(upright)
    elif upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        colours = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    if upright.mode not in ("L", "RGB"):
        upright = upright.convert("L" if upright.mode == "1" else "RGB")
    array = np.array(upright)
    return with_channels(array, channels or (1 if array.ndim == 2 else 3))


def with_channels(array: Pixels, channels: int) -> Pixels:
    """Give (H, W) or (H, W, 1|3) pixels 1 channel (ITU-R 601 luma) or 3 (grey repeated)."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == channels:
        return array
    if array.shape[2] not in (1, 3) or channels not in (1, 3):
        raise InputError(f"images have 1 or 3 channels: cannot turn {array.shape[2]} into {channels}")
    if channels == 3:
        return np.repeat(array, 3, axis=2)
    return np.array(Image.fromarray(np.ascontiguousarray(array)).convert("L"))[:, :, None]


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit (and float) grey values to 0..255. Floats up to 1 count as 0..1, other floats as 0..255."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode != "F":
        values = values / 257  # 65535 / 255
    elif values.max() <= 1:
        values = values * 255
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))


def _jpeg_orientation(data: bytes) -> int:
    """Read the EXIF orientation, 1 to 8; 1 when there is none or when the metadata is broken."""
    start = data.find(b"Exif\0\0", 0, 65536)
    if start < 0:
        return 1
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Corrupt EXIF data" must not cost the image
        try:
            exif.load(data[start : start + 65536])
            orientation = exif.get(0x0112, 1)
        except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
            return 1
    return orientation if orientation in _UPRIGHT else 1


def _check_pixel_count(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{width}x{height} pixels are more than the {MAX_PIXELS:,} that are decoded")
