"""``senet inspect``: what the gates of a network do on a dataset."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from senet.cli import options as opt
from senet.cli.groups import grouped
from senet.data.viewing import Viewing
from senet.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from senet.inspection.doctor import Diagnosis, Thresholds

_ADVICE = 12  # findings printed on the terminal; findings.csv has all


@grouped
def command(
    *,
    data: Annotated[str, typer.Option(help="Folder of <class>/* images, or digits, cifar10, ...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")],
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", "-c", help="Weight file, such as RUN/best.safetensors.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Or a network from `senet list`, with --pretrained.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="Weights of --model: a file, default, timm:…")] = None,
    sites: Annotated[str, typer.Option(help="Pattern of the gates to inspect: 'layer4.*'.")] = "*",
    classes: Annotated[
        str | None, typer.Option(help="Comma-separated classes for the figures. Default: a few.")
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Change a limit of the gate doctor: dead=0.1. Repeatable."),
    ] = None,
    top: Annotated[
        int, typer.Option(max=10_000, help="Images to show per channel: those that open or close it most.")
    ] = 8,
    view: Viewing,
    overwrite: opt.OverwriteOption = False,
) -> None:
    """Report what each SE gate does, per class, with the gate doctor's findings: a page, figures, and tables.

    If --data is the folder that the run was trained on, only its validation images are used.

    Example: [cyan]senet inspect --checkpoint run/best.safetensors --data photos/val --output report[/]
    """
    if (checkpoint is None) == (model is None) or (checkpoint is not None and pretrained is not None):
        raise InputError("give --checkpoint FILE, or --model NAME with --pretrained WEIGHTS")
    import matplotlib  # noqa: F401 - if it is missing, fail before anything is computed

    from senet.cli.console import bars, to_output
    from senet.inspection.command import check_output, inspect, open_checkpoint, open_model
    from senet.inspection.report import FILES

    check_output(output, overwrite)
    lines = _thresholds(threshold)
    if checkpoint is not None:
        subject = open_checkpoint(checkpoint, data, view)
    else:
        subject = open_model(str(model), pretrained, data, view)
    total = len(subject.images)
    with bars() as show:
        found = inspect(
            subject,
            output,
            overwrite=overwrite,
            sites=sites,
            classes=None if classes is None else [name.strip() for name in classes.split(",")],
            top=top,
            thresholds=lines,
            view=view,
            progress=lambda done: show("", "looking at images", done, total),
        )
    console = to_output()
    _findings(found, lines, subject.about, console)
    written = ", ".join(str(output / name) for name in FILES)
    console.print(f"written: {written}", highlight=False, markup=False, soft_wrap=True)


def _thresholds(entries: list[str] | None) -> Thresholds:
    from dataclasses import fields

    from senet.inspection.doctor import Thresholds

    values = dict(opt.key_values(entries, "--threshold"))
    known = [field.name for field in fields(Thresholds)]
    for name, value in values.items():
        if name not in known or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"--threshold {name}={value}: give a number for one of {', '.join(known)}")
    return Thresholds(**values)


def _findings(found: list[Diagnosis], lines: Thresholds, about: dict[str, str], console: Console) -> None:
    """Print one row per gate, and advice on the first gates that need some."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    title = f"Gates of {escape(about['model'])}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("gate", "ch", "mean", "moves by", "by class", "dead", "open", "findings"):
        table.add_column(name, justify="left" if name in ("gate", "findings") else "right", no_wrap=name != "findings")
    for one in found:
        table.add_row(
            escape(one.site),
            str(one.channels),
            f"{one.mean:.3f}",
            f"{100 * one.variation:.3g} %",
            "—" if math.isnan(one.selectivity) else f"{100 * one.selectivity:.0f} %",
            str(one.dead or "·"),
            str(one.saturated or "·"),
            ", ".join(finding.kind for finding in one.findings) or "·",
        )
    console.print(table)
    advice = [f"{d.site}: {f.sentence}" for d in found for f in d.findings if f.kind != "class-selective"]
    for line in advice[:_ADVICE]:
        console.print(f"• {line}", highlight=False, markup=False)
    if len(advice) > _ADVICE:
        console.print(f"… and {len(advice) - _ADVICE} more in findings.csv", highlight=False)
    legend = (
        "ch: channels; moves by: standard deviation over images ÷ size; by class: share of the variance that the class "
    )
    legend += "explains; dead, open: channels that stay at 0, or at the end of the range. "
    console.print(legend, style="dim", highlight=False, markup=False)
    console.print(lines.sentence(), style="dim", highlight=False, markup=False)
    console.print(about["images"], style="dim", highlight=False, markup=False)
