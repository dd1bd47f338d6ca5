"""The image formats: an allowlist of raster formats, recognized by the first bytes of a file.

Pillow decodes only these formats. It supports others that start programs (Ghostscript for PostScript), contain no
pixels (HDF5, GRIB), or are not used for photographs.
"""

import functools
import os
import struct

from PIL import Image

RASTER = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"),
    *("PPM", "QOI", "ICO", "PCX", "PSD", "SGI", "SUN", "TGA"),
)
HEAD_BYTES = 512  # enough to recognize an image, and to describe another file
_NO_SIGNATURE = "TGA"  # has no signature: only its extension tells

# Files that are stored with images or mistaken for images: kind → extensions. They are skipped without being opened, as
# a camera RAW file starts like a TIFF file and contains a thumbnail.
_STRANGERS = {
    "HEIC": ".heic .heif .hif",
    "camera RAW": ".3fr .arw .cr2 .cr3 .crw .dng .iiq .nef .nrw .orf .pef .raf .raw .rw2 .sr2 .srf .srw .x3f",
    "SVG": ".svg .svgz",
    "JPEG XL": ".jxl",
    "video": ".avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm .wmv",
    "NumPy": ".npy .npz",
    "DICOM": ".dcm",
    "PDF or PostScript": ".ai .eps .pdf .ps",
    "archive": ".7z .bz2 .gz .rar .tar .tgz .xz .zip",
    "system": ".db .ini .lnk .url",  # Thumbs.db, desktop.ini
}
_KIND_OF = {extension: kind for kind, extensions in _STRANGERS.items() for extension in extensions.split()}

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_BEGINNINGS = (
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"<svg", "an SVG drawing"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"version https://git-lfs", "a Git LFS pointer"),
)


@functools.cache
def formats() -> tuple[str, ...]:
    """The allowed formats that this version of Pillow can open."""
    Image.init()
    return tuple(name for name in RASTER if name in Image.OPEN)


@functools.cache
def image_extensions() -> frozenset[str]:
    """The file extensions of the allowed formats, in lower case with the dot."""
    allowed = {*formats(), "MPO"}  # MPO: a JPEG followed by more JPEGs
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in allowed)


def recognized(head: bytes, name: str = "") -> str | None:
    """The image format of a file with these first bytes, or None. ``name`` decides for a format without signature."""
    for form in formats():
        accept = Image.OPEN[form][1]
        try:
            if accept is not None and accept(head[:16]) is True:
                return form
        except (IndexError, struct.error):
            continue  # shorter than the signature
    extension = os.path.splitext(name)[1].lower()
    return _NO_SIGNATURE if Image.registered_extensions().get(extension) == _NO_SIGNATURE else None


def stranger(name: str) -> str | None:
    """The kind of a file whose extension shows that it is not an image, or None if its bytes must decide."""
    return _KIND_OF.get(os.path.splitext(name)[1].lower())


def what_it_is(head: bytes) -> str:
    """Why a file with these first bytes cannot be read as an image."""
    if head[4:8] == b"ftyp":
        heic = head[8:12] in _HEIC_BRANDS
        return "HEIC, which is not supported: convert it to JPEG" if heic else "not an image: a video"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning.lower()):
            return f"not an image: {kind}"
    return "not an image"
