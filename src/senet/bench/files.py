"""The files of ``senet bench``: tax.csv with the timings, tax.json with everything, and tax.png with a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from senet.bench.figure import plot_tax
from senet.bench.tax import COLUMNS, Measured
from senet.system.atomic import write_atomically
from senet.system.csv_file import write_csv
from senet.system.machine import machine
from senet.text import json_text


def write_tax(folder: Path, everything: Sequence[Measured], name: str = "tax") -> None:
    """Write the measurements so far to ``<name>.csv``, ``.json``, and ``.png``, each atomically."""
    if any(measured.timings for measured in everything):
        write_numbers(folder, everything, name)
        complete = all(measured.complete for measured in everything)
        title = f"What SE costs: {everything[0].setting.model} and its plain twin"
        rows = [measured.rows() for measured in everything]
        plot_tax(folder / f"{name}.png", rows, title if complete else f"{title} (stopped early)")


def write_numbers(folder: Path, everything: Sequence[Measured], name: str = "tax") -> None:
    """Write ``<name>.csv``, one row per candidate and setting, and ``<name>.json``, with everything."""
    write_csv(folder / f"{name}.csv", COLUMNS, (row for measured in everything for row in measured.rows()))
    settings = [measured.to_dict() for measured in everything]
    content = {"machine": machine(), "complete": all(m.complete for m in everything), "settings": settings}
    write_atomically(folder / f"{name}.json", (json_text(content, indent=2) + "\n").encode())
