"""CSV files: they are read back to the same values, and are safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from senet.system.atomic import write_atomically

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_rows(
    stream: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, header: bool = True
) -> None:
    """Write rows to an open text stream as they arrive, after a header (``header``).

    ``None`` becomes an empty cell; floats keep the digits that are needed to read them back. Text that a spreadsheet
    would run as a formula, such as a class named ``=cmd()``, gets a leading apostrophe; numbers never do.
    """
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file atomically; file names that are not UTF-8 keep their bytes."""
    write_atomically(path, csv_text(columns, rows).encode("utf-8", errors="surrogateescape"))


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """The content of a CSV file."""
    text = io.StringIO()
    write_rows(text, columns, rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_FORMULA) and not _is_number(value):
        return f"'{value}"
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
