"""Packs excitations for the HTML page: rounded to 8 and 16 bits, compressed, and subsampled until they fit.

Each gate becomes one little-endian block, compressed with deflate and encoded as base64. The page decodes it when the
gate is selected. The block holds uint32 numbers of the images that open and close each channel most; uint16 mean,
lowest, highest, std, selectivity, and the excitations of those images; and, for each class, uint8 mean (as a distance
from the mean over all images, 0 for a class without images) and std.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from senet.inspection.doctor import Diagnosis
from senet.inspection.excitations import Excitations
from senet.inspection.figures import sampled_channels
from senet.inspection.site_excitations import Floats, SiteExcitations

THUMBNAILS, THUMBNAIL_SIDE = 1500, 68
SHOWN_IMAGES = 6  # that open a channel most, and as many that close it
_NOBODY, _NO_NUMBER = 2**32 - 1, 2**16 - 1
_TINY = 32  # images up to this side are stored losslessly at full size

# Returns the pixels of an image by its number, uint8 (H, W, 1|3); None if it cannot be read.
Picture = Callable[[int], NDArray[np.uint8] | None]
Json = dict[str, Any]


def page_data(excitations: Excitations, diagnoses: Iterable[Diagnosis], most_channels: int, pictures: Json) -> Json:
    """The data of the page as JSON values, with at most ``most_channels`` channels per gate."""
    shown = _image_numbers(excitations, most_channels)
    places = {number: place for place, number in enumerate(shown)}
    names = [excitations.names.get(number, f"image {number}") for number in shown]
    by_name = {diagnosis.site: diagnosis for diagnosis in diagnoses}
    return {
        "about": excitations.about,
        "images": excitations.images,
        "classes": list(excitations.classes),
        "counts": np.max([site.count[:-1] for site in excitations], axis=0).tolist(),
        "sites": [_site(site, by_name[site.name], most_channels, places) for site in excitations],
        "imageNames": _packed(json.dumps(names).encode()),
        "pictures": {str(places[int(n)]): uri for n, uri in pictures.items() if int(n) in places},
    }


def thumbnails(excitations: Excitations, most_channels: int, most_bytes: int, uri: Callable[[int], str | None]) -> Json:
    """Thumbnails of the images shown most often, as data URIs by image number; ``uri`` creates one."""
    found: Json = {}
    often: Counter[int] = Counter()
    for site in excitations:
        for numbers in _shown_ends(site, most_channels):
            often.update(numbers[numbers >= 0].tolist())
    left = most_bytes
    for number, _ in sorted(often.most_common(), key=lambda pair: (-pair[1], pair[0]))[:THUMBNAILS]:
        made = uri(number)
        if made is None:
            continue
        left -= len(made)
        if left < 0:
            break
        found[str(number)] = made
    return found


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """An image (H, W, 1|3) as a data URI: PNG at full size if it is tiny, otherwise a small JPEG."""
    from PIL import Image

    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    content = io.BytesIO()
    if max(image.size) <= _TINY:
        image.save(content, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.save(content, "JPEG", quality=65)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _site(site: SiteExcitations, diagnosis: Diagnosis, most_channels: int, places: dict[int, int]) -> Json:
    kept = sampled_channels(site.channels, most_channels)
    block, scales = _block(site, np.array(kept), places)
    return {
        "name": site.name,
        "function": site.function,
        "range": [value if np.isfinite(value) else None for value in (site.low, site.high)],
        "channels": site.channels,
        "kept": len(kept),
        "step": kept.step,
        "mean": _number(diagnosis.mean),
        "std": _number(diagnosis.std),
        "variation": _number(diagnosis.variation),
        "selectivity": _number(diagnosis.selectivity),
        "findings": [
            {"kind": f.kind, "sentence": f.sentence, "channels": channel_ranges(f.channels), "count": len(f.channels)}
            for f in diagnosis.findings
        ],
        **scales,
        "data": _packed(block),
    }


def _block(site: SiteExcitations, kept: NDArray[Any], places: dict[int, int]) -> tuple[bytes, Json]:
    mean, std = (values[kept] for values in site.overall())
    lowest, highest = site.lowest[kept], site.highest[kept]
    selectivity = site.channel_selectivity()[kept]
    away = site.class_mean()[:, kept] - mean
    within = site.class_std()[:, kept]
    low, high = float(lowest.min()), float(highest.max())
    reach = float(np.nanmax(np.abs(away), initial=0)) if np.isfinite(away).any() else 0.0
    widest = float(max(std.max(), np.nanmax(within, initial=0) if np.isfinite(within).any() else 0.0))
    top = min(SHOWN_IMAGES, site.opening.values.shape[1])
    images, values = [], []
    for extremes in (site.opening, site.closing):
        numbers = extremes.images[kept, :top]
        images.append(np.array([places.get(int(n), _NOBODY) for n in numbers.flat], "<u4"))
        values.append(_sixteen(np.nan_to_num(extremes.values[kept, :top], nan=low), low, high))
    chosen = np.where(np.isnan(selectivity), _NO_NUMBER, np.rint(np.nan_to_num(selectivity) * (_NO_NUMBER - 1)))
    with np.errstate(invalid="ignore"):
        steps = np.where(np.isnan(away), 0, 128 + np.rint(away / (reach or 1) * 127))
    parts = [
        *images,
        *(_sixteen(v, low, high) for v in (mean, lowest, highest)),
        _sixteen(std, 0, widest),
        chosen.astype("<u2"),
        *values,
        steps.astype("u1"),
        np.rint(np.nan_to_num(within) / (widest or 1) * 255).astype("u1"),
    ]
    scales = {"low": low, "high": high, "reach": reach, "widest": widest, "top": top}
    return b"".join(part.tobytes() for part in parts), scales


def _sixteen(values: Floats, low: float, high: float) -> NDArray[Any]:
    return np.rint((values - low) / ((high - low) or 1) * 65535).clip(0, 65535).astype("<u2")


def _packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _number(value: float) -> float | None:
    return None if not np.isfinite(value) else float(f"{value:.6g}")


def channel_ranges(channels: tuple[int, ...]) -> str:
    """``(0, 1, 2, 7)`` → ``"0-2, 7"``, the syntax of the page's channel field."""
    parts: list[list[int]] = []
    for channel in channels:
        if parts and parts[-1][1] == channel - 1:
            parts[-1][1] = channel
        else:
            parts.append([channel, channel])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _shown_ends(site: SiteExcitations, most_channels: int) -> list[NDArray[np.int64]]:
    kept = np.array(sampled_channels(site.channels, most_channels))
    return [extremes.images[kept, :SHOWN_IMAGES] for extremes in (site.opening, site.closing)]


def _image_numbers(excitations: Excitations, most_channels: int) -> list[int]:
    numbers = [end.ravel() for site in excitations for end in _shown_ends(site, most_channels)]
    return [int(n) for n in np.unique(np.concatenate(numbers)) if n >= 0]
