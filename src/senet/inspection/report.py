"""The report on a network's gates: figures, a self-contained offline HTML page, and a table."""

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
PAGE_BYTES = 4_900_000  # the page always stays below 5 MB
_THUMBNAIL_BYTES = (3_000_000, 700_000)  # if there is room, and if classes and channels need it
FIRST_CELLS = 5_000_000  # channels × classes over all gates at which the search for a page that fits starts
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
    """Write ``index.html``, ``class_means.png`` (Fig. 6), ``class_spread.png`` (Fig. 7), ``findings.csv``, and
    ``excitations.npz`` to a folder, each atomically.

    Args:
        folder: the folder; created if needed. Existing files with these names are replaced.
        excitations: the recorded excitations.
        thresholds: the limits of the gate doctor.
        sites, classes: the content of the two figures; by default as in the paper. The page shows everything.
        picture: returns the pixels of an image by its number, uint8 (H, W, 1|3), for the page's thumbnails.

    Returns:
        the gate doctor's diagnosis of each gate.

    Raises:
        InputError: fewer than two images, an unknown site or class, or a class to draw that has no images.
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
    """One row per gate, with its numbers, findings, and advice."""
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
    """The page as one self-contained HTML file of at most ``most_bytes``.

    If the channels do not all fit, each gate keeps fewer, in equal steps, as in the paper's figures.
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
    raise InputError(f"{cells} gates × classes do not fit in a page of {most_bytes:,} bytes; record fewer sites")


def _page(data: dict[str, object], thresholds: Thresholds) -> bytes:
    """The template with the data. ``<`` is escaped in the data, so that nothing in it can close its element."""
    parts = resources.files("senet.inspection") / "page"
    text = json.dumps(data | {"thresholds": thresholds.sentence()}, ensure_ascii=False, separators=(",", ":"))
    script = "\n".join((parts / name).read_text(encoding="utf-8") for name in ("data.js", "plot.js", "page.js"))
    page = (parts / "page.html").read_text(encoding="utf-8")
    page = page.replace("/* style */", (parts / "page.css").read_text(encoding="utf-8"))
    page = page.replace("/* script */", script)
    return page.replace("/* data */", text.replace("<", "\\u003c")).encode("utf-8", errors="replace")
