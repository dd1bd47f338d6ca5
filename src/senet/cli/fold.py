"""``senet fold``: remove gates from a network, as far as its accuracy allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from senet.cli import options as opt
from senet.cli.groups import grouped
from senet.data.viewing import Viewing

if TYPE_CHECKING:
    from rich.console import Console

    from senet.folding.report import FoldReport

_MAX_DROP = 0.1


@grouped
def command(
    *,
    checkpoint: opt.CheckpointOption,
    data: Annotated[str, typer.Option(help="Folder of <class>/* images, or digits, cifar10, ...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for folded.safetensors and the report.")],
    sites: Annotated[str, typer.Option(help="Pattern of the gates to fold: 'layer4.*'.")] = "*",
    stage: Annotated[
        int | None,
        typer.Option(max=2**31 - 1, help="Only the gates of this stage; the last stage of a ResNet-50 is 5."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            callback=opt.finite,
            help="Largest drop in accuracy, in percentage points. Default: 0.1; none with --sites or --stage.",
        ),
    ] = None,
    constants: Annotated[
        bool, typer.Option("--constants", help="Replace gates that cannot fold by constant factors.")
    ] = False,
    excitations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Use the recording of `senet inspect`.")
    ] = None,
    record_images: Annotated[
        int, typer.Option(max=2**31 - 1, help="Maximum number of images to record the gates on.")
    ] = 1024,
    images: Annotated[
        int | None, typer.Option(max=2**31 - 1, help="Maximum number of images to measure accuracy on. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(max=100_000, help="Timing rounds per step; 0 turns timing off.")] = 15,
    view: Viewing,
    overwrite: opt.OverwriteOption = False,
) -> None:
    """Fold the mean of each gate into other weights, and report accuracy, parameters, and time.

    The gates that move least go first. A fold that costs more accuracy than --max-drop is discarded. With --sites or
    --stage but no --max-drop, all selected gates are folded.

    Example: [cyan]senet fold --checkpoint run/best.safetensors --data photos --max-drop 0.1 -o folded[/]
    """
    import matplotlib  # noqa: F401 - if it is missing, fail before anything is computed

    from senet.cli.console import bars, to_output
    from senet.folding.command import FILES, FoldOptions, fold_checkpoint

    if max_drop is None and sites == "*" and stage is None:
        max_drop = _MAX_DROP
    options = FoldOptions(sites, stage, max_drop, constants, excitations, record_images, images, rounds)
    with bars() as show:
        report, about = fold_checkpoint(
            checkpoint,
            data,
            output,
            options,
            view=view,
            overwrite=overwrite,
            progress=lambda what, done, total: show(what.partition(" ")[0], what, done, total),
        )
    console = to_output()
    _tables(report, about, console)
    written = ", ".join(str(output / name) for name in FILES)
    console.print(f"written: {written}", highlight=False, markup=False, soft_wrap=True)


def _tables(report: FoldReport, about: dict[str, str], console: Console) -> None:
    """Print one row per step, the gates that stay and why, and a summary."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    title = f"Folding the gates of {escape(about['model'])}"
    look: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0), "show_edge": False}
    table = Table(title=title, title_justify="left", **look)
    for name in ("gate", "moves by", "accuracy", "drop", "parameters", "time", "quartiles", ""):
        table.add_column(name, justify="left" if name in ("gate", "") else "right", no_wrap=True, overflow="fold")
    fates = {site.name: site for site in report.sites}
    for step in report.steps:
        low, median, high = step.time or (None, None, None)
        table.add_row(
            escape(step.site) or "original",
            f"{100 * step.variation:.3g} %" if step.site else "",
            f"{step.accuracy:.2f}",
            f"{step.drop:+.2f}" if step.site else "",
            f"{step.parameters:,}",
            "—" if median is None else f"× {median:.2f}",
            "" if low is None or not step.site else f"{low:.2f}–{high:.2f}",
            (fates[step.site].fate if step.kept else "not kept") if step.site else "",
        )
    console.print(table)
    for site in report.sites:
        if site.obstacle:
            console.print(f"• {site.name} {site.reason}", highlight=False, markup=False)
    console.print(report.summary(), highlight=False, markup=False, soft_wrap=True)
    for key in ("gates", "accuracy"):
        console.print(f"{key}: {about[key]}", style="dim", highlight=False, markup=False)
    if any(step.time for step in report.steps):
        note = "time: of a batch of 8 in plain PyTorch, ÷ the original network's, interleaved; median and quartiles"
        console.print(note, style="dim", highlight=False, markup=False)
