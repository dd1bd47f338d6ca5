"""CSV files as this package writes them: read back to the same values, and harmless to spreadsheets."""

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
    """Write a header, unless the file has one, and the rows to an open text stream, each as it comes.

    ``None`` is an empty cell; floats keep what is needed to read them back. A text that a spreadsheet would run as a
    formula, a class that is named ``=cmd()`` say, gets an apostrophe before it; numbers never do.
    """
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole CSV file or nothing; file names that are no UTF-8 keep their bytes."""
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
