"""What ``senet cost`` prints: tables for people, records for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from senet.cli.console import counted
from senet.cost.count import Cost, model_cost
from senet.cost.paper import UNITS, Compared, numbered_notes
from senet.cost.parts import NetworkCost
from senet.models.registry import list_models, model_spec
from senet.system.atomic import write_atomically
from senet.system.csv_file import csv_text

Record = dict[str, Any]


def twin_records(plain: NetworkCost, se: NetworkCost) -> list[Record]:
    """The totals of both networks."""
    return [
        {"model": each.name, "input_size": each.input_size}
        | _counts(each.cost)
        | {"saved_bytes": each.memory.saved[""], "peak_bytes": each.memory.peak}
        for each in (plain, se)
    ]


def part_records(network: NetworkCost) -> list[Record]:
    """The parts of a network, in order."""
    return [
        {"model": network.name, "input_size": network.input_size, "part": part.name}
        | _counts(part.cost)
        | {"saved_bytes": part.saved}
        for part in network.parts
    ]


def zoo_records(input_size: int | None = None) -> list[Record]:
    """Every registered network that accepts images of this size, with progress on a terminal."""
    names = [name for name in list_models() if (input_size or model_spec(name).input_size) >= model_spec(name).min_size]
    return [
        {"model": name, "input_size": input_size or model_spec(name).input_size}
        | _counts(model_cost(name, input_size=input_size))
        for name in counted(names, "counting")
    ]


def paper_records(figures: Sequence[Compared]) -> list[Record]:
    """Every published figure with ours."""
    return [
        {
            "table": figure.row.table,
            "row": figure.row.name,
            "model": figure.row.model,
            "se": json.dumps(figure.row.se.to_dict()) if figure.row.se else "",
            "quantity": figure.quantity,
            "printed": figure.printed,
            "ours": figure.ours,
            "difference": figure.difference,
            "agrees": figure.agrees,
            "note": figure.note,
        }
        for figure in figures
    ]


def write(records: Sequence[Record], form: str, output: Path | None) -> None:
    """Print records as CSV or JSON, or write them to a file atomically."""
    if form == "json":
        text = json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    else:
        text = csv_text(list(records[0]), records)
    if output is None:
        sys.stdout.write(text)
        return
    write_atomically(output, text.encode())


def twins_table(plain: NetworkCost, se: NetworkCost, console: Console) -> None:
    """A network next to its twin, and what SE adds."""
    title = f"{se.name} and its plain twin, one image of {se.input_size}×{se.input_size}, float32"
    table = _table(title, "", plain.name, se.name, "SE adds")
    rows = [(_words(name), name) for name in ("params", "params_with_statistics", "se_params")]
    rows += [(_words(name), name) for name in ("mult_adds", "se_mult_adds", "squeeze_adds", "scale_mults")]
    rows += [(_words("paper_mult_adds"), "paper_mult_adds")]
    for words, name in rows:
        pair = getattr(plain.cost, name), getattr(se.cost, name)
        table.add_row(words, *(f"{value:,}" for value in pair), _percent(*pair))
    for words, pair in (
        ("feature maps saved for backward, MB", (plain.memory.saved[""], se.memory.saved[""])),
        ("feature maps at inference peak, MB", (plain.memory.peak, se.memory.peak)),
    ):
        table.add_row(words, *(f"{value / 1e6:,.2f}" for value in pair), _percent(*pair))
    console.print(table)


def parts_table(network: NetworkCost, console: Console) -> None:
    """The parts of a network and SE's share in each."""
    total = network.cost
    columns = ("", "params", "SE share", "madds, M", "of total", "SE share", "pooled, M", "saved, MB")
    table = _table(network.name, *columns)
    for part in network.parts:
        cost = part.cost
        table.add_row(
            part.name,
            f"{cost.params:,}",
            _share(cost.se_params, cost.params),
            f"{cost.mult_adds / 1e6:,.1f}",
            _share(cost.mult_adds, total.mult_adds),
            _share(cost.se_mult_adds, cost.mult_adds),
            f"{cost.squeeze_adds / 1e6:,.2f}",
            f"{part.saved / 1e6:,.2f}",
        )
    console.print(table)
    note = "pooled: additions in SE's pooling; saved: feature maps for backward, in the first part that saves them"
    console.print(note, style="dim")


def zoo_table(records: Sequence[Record], console: Console) -> None:
    """Every network: counts and SE's share."""
    columns = ("model", "input", "params, M", "with stats", "SE share", "madds, G", "SE share", "as in paper")
    table = _table("", *columns)
    for row in records:
        table.add_row(
            row["model"],
            str(row["input_size"]),
            f"{row['params'] / 1e6:,.2f}",
            f"{row['params_with_statistics'] / 1e6:,.2f}",
            _share(row["se_params"], row["params"]),
            f"{row['mult_adds'] / 1e9:,.3f}",
            _share(row["se_mult_adds"], row["mult_adds"]),
            f"{row['paper_mult_adds'] / 1e9:,.3f}",
        )
    console.print(table)


def paper_table(figures: Sequence[Compared], console: Console) -> None:
    """Every published figure, ours, and the difference. Figures that cannot be reproduced are explained below."""
    table = _table("", "where", "network", "quantity", "printed", "ours", "difference", "")
    table.columns[1].justify = table.columns[2].justify = "left"
    notes = numbered_notes(figures)
    for figure in figures:
        mark = f"[red]({notes[figure.note]})[/]" if figure.note else ""
        table.add_row(figure.row.table, figure.row.name, UNITS[figure.quantity], *figure.cells(), mark)
    console.print(table)
    for note, number in notes.items():
        console.print(f"({number}) {note}", highlight=False, markup=False)
    console.print(
        "Differences are between rounded figures; up to 0.02 GFLOPs, or 1 MiB of a file, count as agreement. FLOPs are "
        "multiply-adds of convolutions and FC layers, plus SE's pooling. Parameters of the ablations include running "
        "statistics. The paper's ResNets have their stride in the first 1×1 convolution: resnet50_v1, not resnet50.",
        style="dim",
        highlight=False,
    )


def _counts(cost: Cost) -> Record:
    return asdict(cost) | {
        "params_with_statistics": cost.params_with_statistics,
        "paper_mult_adds": cost.paper_mult_adds,
    }


def _words(name: str) -> str:
    return {
        "params": "parameters",
        "params_with_statistics": "  with running statistics",
        "se_params": "  in SE blocks",
        "mult_adds": "multiply-adds",
        "se_mult_adds": "  in SE's FC layers",
        "squeeze_adds": "SE's pooling, additions",
        "scale_mults": "SE's scaling, multiplications",
        "paper_mult_adds": "multiply-adds, as in the paper",
    }[name]


def _table(title: str, *columns: str) -> Table:
    # No frame, as a terminal may have only 80 columns.
    table = Table(
        title=title or None,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    return table


def _percent(before: int, after: int) -> str:
    return f"{100 * (after / before - 1):+.2f} %" if before else f"{after - before:+,}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "—"
