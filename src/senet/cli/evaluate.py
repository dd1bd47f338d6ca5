"""``senet eval``: measure the errors of a saved network."""

from __future__ import annotations

from typing import Annotated

import typer

from senet.cli import options as opt
from senet.cli.groups import grouped
from senet.data.viewing import Viewing
from senet.text import json_text


@grouped
def command(
    *,
    data: Annotated[str, typer.Option(help="Folder of <class>/* images, or digits, cifar10, ...")],
    checkpoint: opt.CheckpointOption,
    crops: opt.CropsOption = "center",
    compile: opt.CompileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    view: Viewing,
) -> None:
    """Measure top-1 and top-5 error, with 95 % confidence intervals.

    If --data is the folder that the run was trained on, only its validation images are used.

    Example: [cyan]senet eval --data photos/val --checkpoint run/best.safetensors --crops ten[/]
    """

    from senet.cli.console import to_output
    from senet.cli.tables import evaluation_table
    from senet.evaluation.evaluate import evaluate

    result = evaluate(checkpoint, data, crops=crops, compile=compile, view=view)
    if as_json:
        print(json_text(result.to_dict(), indent=2))
    else:
        evaluation_table(result, to_output())
