"""What the gates of a network do, for people: figures, a page that needs no server and no network, and a table."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from senet.errors import InputError
from senet.inspection.doctor import Diagnosis, Thresholds, diagnose
from senet.inspection.excitations import Excitations
from senet.inspection.figures import plot_class_means, plot_class_spread
from senet.inspection.page_data import Picture, data_uri, page_data, thumbnails
from senet.system.atomic import write_atomically
from senet.system.csv_file import write_csv
from senet.text import shown

FILES = ("index.html", "class_means.png", "class_spread.png", "findings.csv", "excitations.npz")
PAGE_BYTES = 4_900_000  # the page stays below 5 MB whatever it shows
_THUMBNAIL_BYTES = (3_000_000, 700_000)  # where there is room, and where classes and channels need it
FIRST_CELLS = 5_000_000  # channels × classes over all gates with which the search for a fitting page begins
_COLUMNS = (
    *("site", "channels", "mean", "std", "variation", "selectivity", "dead", "saturated", "constant"),
    *("findings", "advice"),
)


def write_report(
    folder: str | Path,
    excitations: Excitations,
    *,
    thresholds: Thresholds | None = None,
    sites: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    picture: Picture | None = None,
) -> list[Diagnosis]:
    """Write ``index.html``, ``class_means.png`` (Fig. 6), ``class_spread.png`` (Fig. 7), ``findings.csv`` and
    ``excitations.npz`` into a folder, each whole or not at all.

    Args:
        folder: where to; made if need be. What is there under these names is replaced.
        excitations: what was recorded.
        thresholds: where the gate doctor draws its lines.
        sites, classes: what the two figures show; by default as in the paper. The page has everything.
        picture: gives the pixels, uint8 (H, W, 1|3), of an image by its number, for the page's thumbnails.

    Returns:
        the gate doctor's findings.

    Raises:
        InputError: fewer than two images, no such site or class, or a class to draw that has no images.
    """
    folder = Path(folder)
    lines = thresholds if thresholds is not None else Thresholds()
    diagnoses = diagnose(excitations, lines)
    page = build_page(excitations, diagnoses, lines, picture)
    plot_class_means(folder / "class_means.png", excitations, sites, classes)
    plot_class_spread(folder / "class_spread.png", excitations, sites, classes)
    write_atomically(folder / "index.html", page)
    write_csv(folder / "findings.csv", _COLUMNS, finding_rows(diagnoses))
    excitations.save(folder / "excitations.npz")
    return diagnoses


def finding_rows(diagnoses: Sequence[Diagnosis]) -> list[dict[str, Any]]:
    """A row a gate, with the numbers, the findings and what to do."""
    return [{name: _cell(value) for name, value in diagnosis.row().items()} for diagnosis in diagnoses]


def _cell(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return shown(value) if isinstance(value, str) else value


def build_page(
    excitations: Excitations,
    diagnoses: Sequence[Diagnosis],
    thresholds: Thresholds,
    picture: Picture | None = None,
    most_bytes: int = PAGE_BYTES,
) -> bytes:
    """The page as one HTML file that asks nobody for anything, below ``most_bytes``.

    Where all channels do not fit, fewer are kept of each gate, in equal steps, as in the paper's figures.
    """
    widest = max(site.channels for site in excitations)
    cells = len(excitations) * max(len(excitations.classes), 1)
    channels = min(widest, max(FIRST_CELLS // cells, 1))

    @functools.cache
    def uri(number: int) -> str | None:
        pixels = None if picture is None else picture(number)
        return None if pixels is None else data_uri(pixels)

    thumbnail_bytes, fewer = _THUMBNAIL_BYTES
    while True:
        pictures = thumbnails(excitations, channels, thumbnail_bytes, uri)
        page = _page(page_data(excitations, diagnoses, channels, pictures), thresholds)
        if len(page) <= most_bytes:
            return page
        if thumbnail_bytes > fewer:
            thumbnail_bytes = fewer
        elif channels == 1:
            break
        else:
            channels = max(1, min(channels - 1, int(0.97 * channels * most_bytes / len(page))))
    raise InputError(f"{cells} gates × classes do not fit into a page of {most_bytes:,} bytes; record fewer sites")


def _page(data: dict[str, object], thresholds: Thresholds) -> bytes:
    """The template filled in. ``<`` never stands in the data, so that nothing in it can end its element."""
    parts = resources.files("senet.inspection") / "page"
    text = json.dumps(data | {"thresholds": thresholds.sentence()}, ensure_ascii=False, separators=(",", ":"))
    script = "\n".join((parts / name).read_text(encoding="utf-8") for name in ("data.js", "plot.js", "page.js"))
    page = (parts / "page.html").read_text(encoding="utf-8")
    page = page.replace("/* style */", (parts / "page.css").read_text(encoding="utf-8"))
    page = page.replace("/* script */", script)
    return page.replace("/* data */", text.replace("<", "\\u003c")).encode("utf-8", errors="replace")
