"""``senet list``: the networks, and the known weights for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from senet.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from senet.weights.known import KnownWeights


def command(
    pattern: Annotated[str, typer.Argument(help="A shell pattern: 'se_*', '*50*'.")] = "*",
    weights: Annotated[
        bool, typer.Option("--weights", help="Show the known weights, which --pretrained default loads.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the networks, with parameters and multiply-adds (madds) for 1000 classes (CIFAR networks: 10)."""
    from senet.cli.console import to_output
    from senet.cli.tables import zoo_json, zoo_table
    from senet.models.registry import list_models

    names = list_models(pattern)
    if not names:
        names = list_models(f"*{pattern}*")  # people type `senet list 50`
    if not names:
        raise InputError(f"no model matches {pattern!r}; `senet list` shows all")
    if weights:
        _show_weights(names, to_output(), as_json)
    elif as_json:
        print(zoo_json(names))
    else:
        zoo_table(names, to_output())


def _show_weights(names: list[str], console: Console, as_json: bool) -> None:
    from senet.weights.known import KNOWN_WEIGHTS

    known = {name: KNOWN_WEIGHTS[name] for name in names if name in KNOWN_WEIGHTS}
    if as_json:
        print(json.dumps([{"model": name} | row.to_dict() for name, row in known.items()], indent=2))
    elif known:
        _weights_table(known, console)
    else:
        raise InputError(
            f"no weights are known for {', '.join(names[:3])}; `senet list --weights` shows the known ones"
        )


def _weights_table(known: dict[str, KnownWeights], console: Console) -> None:
    """Print the numbers as a table of less than 80 columns, and longer values below it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("model", "top-1, %", "top-5, %", "input", "crop", "resizing", "license"):
        table.add_column(name, justify="left" if name in ("model", "resizing", "license") else "right", no_wrap=True)
    for name, row in known.items():
        accuracy = f"{row.top1:.2f}", f"{row.top5:.2f}"
        table.add_row(name, *accuracy, str(row.input_size), f"{row.crop:g}", row.interpolation, row.licence)
    console.print(table)
    for name, row in known.items():
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (row.mean, row.std))
        console.print(f"{name}: {row.source}", highlight=False, soft_wrap=True)
        console.print(f"  RGB in 0…1: mean {mean}, std {std}", style="dim", highlight=False, soft_wrap=True)
