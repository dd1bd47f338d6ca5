"""``senet list``: the zoo."""

from __future__ import annotations

from typing import Annotated

import typer

from senet.errors import InputError


def command(
    pattern: Annotated[str, typer.Argument(help="A shell pattern: 'se_*', '*50*'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the networks: parameters and multiply-adds (madds) for 1000 classes, 10 for CIFAR networks."""
    from rich.console import Console

    from senet.cli.tables import zoo_json, zoo_table
    from senet.models.registry import list_models

    names = list_models(pattern)
    if not names:
        names = list_models(f"*{pattern}*")  # `senet list 50` is what a person types
    if not names:
        raise InputError(f"no model matches {pattern!r}; `senet list` shows all")
    if as_json:
        print(zoo_json(names))
    else:
        zoo_table(names, Console())
