"""``senet predict``: classify image files with a saved network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from senet.cli import options as opt
from senet.cli.groups import Without, grouped
from senet.data.viewing import Viewing


@grouped
def command(
    *,
    files: Annotated[list[Path], typer.Argument(help="Image files, or folders of images.")],
    checkpoint: opt.CheckpointOption,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", max=2**31 - 1, help="Number of classes to print per image.")
    ] = 1,
    csv: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write CSV to a file, or to standard output (-).")
    ] = None,
    crops: opt.CropsOption = "center",
    compile: opt.CompileOption = None,
    view: Annotated[Viewing, Without("root", "on_bad_image")],
) -> int:
    """Classify images. Unreadable files are listed and skipped (exit code 1).

    Example: [cyan]senet predict --checkpoint run/best.safetensors photo.jpg holiday/ --top-k 3 --csv -[/]
    """
    from senet.cli.console import to_output
    from senet.cli.tables import prediction_table, predictions_csv
    from senet.evaluation.evaluate import predict

    predictions = predict(checkpoint, files, top_k=top_k, crops=crops, compile=compile, view=view)
    if csv is None:
        prediction_table(predictions, to_output())
    else:
        predictions_csv(predictions, csv)
    return 1 if predictions.bad else 0
