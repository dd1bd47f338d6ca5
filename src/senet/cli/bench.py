"""``senet bench``: measure what SE costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from senet.cli import options as opt
from senet.errors import InputError

if TYPE_CHECKING:
    from senet.bench.candidates import Setting
    from senet.bench.tax import Measured

FILES = ("tax.csv", "tax.json", "tax.png")


def command(
    model: Annotated[str, typer.Argument(help="The SE network (or its plain twin) from `senet list`.")] = "se_resnet50",
    batch: Annotated[
        list[int] | None, typer.Option(max=opt.MAX_BATCH, help="Images per batch. Repeatable. Default: 8")
    ] = None,
    size: Annotated[
        int | None, typer.Option(max=opt.MAX_SIDE, help="Side of the images in pixels. Default: the network's own.")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Data type.")] = "float32",
    layout: Annotated[Literal["channels_last", "contiguous"], typer.Option(help="Memory layout.")] = "channels_last",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device to compute on.")] = "auto",
    mode: Annotated[Literal["train", "inference", "both"], typer.Option(help="What to time.")] = "both",
    rounds: Annotated[int, typer.Option(max=100_000, help="Timing rounds; each round runs every candidate.")] = 15,
    candidates: Annotated[str, typer.Option(help="Comma-separated names or patterns: 'se-accelerated,timm-*'.")] = "*",
    threads: Annotated[
        int | None, typer.Option(max=4096, help="CPU threads of every engine. Default: PyTorch's.")
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Measure nothing; show which code computes each gate, and why none faster."),
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for tax.csv, .json and .png.")] = None,
    overwrite: opt.OverwriteOption = False,
) -> None:
    """Measure what SE costs on this machine: SE and plain networks, in senet and on the other engines installed.

    Example: [cyan]senet bench se_resnet50 --batch 1 --batch 8 --output tax[/]
    """
    if explain and output is not None:
        raise InputError("--explain measures nothing and writes no files; omit --output")
    if output is not None:
        for name in FILES:
            opt.check_file(output / name, overwrite)
        import matplotlib  # noqa: F401 - if it is missing, fail before the measurement, not after
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads} is not allowed; it must be at least 1")
    import torch

    from senet.bench.candidates import Setting, choose
    from senet.bench.tax import Measured, checked_setting
    from senet.models.registry import model_spec

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    modes: list[Any] = ["train", "inference"] if mode == "both" else [mode]
    side = model_spec(model).input_size if size is None else size
    chosen = choose([pattern.strip() for pattern in candidates.split(",")])
    settings = [
        checked_setting(Setting(model, each, count, side, dtype, layout, device, rounds, chosen))
        for each in modes
        for count in batch or [8]
    ]
    if explain:
        _explain([setting for setting in settings if setting.mode == modes[0]])
    else:
        _run([Measured(setting) for setting in settings], output)


def _explain(settings: list[Setting]) -> None:
    """Show how the SE network runs in inference and in training, once per batch size."""
    from senet.acceleration.accelerate import explain
    from senet.bench.candidates import DTYPES, make_twins
    from senet.cli.console import to_output

    console = to_output()
    for setting in settings:
        twins = make_twins(setting)
        found = explain(twins.networks["se"].to(DTYPES[setting.dtype]), twins.x.to(DTYPES[setting.dtype]))
        console.print(f"{setting.model}, batch {setting.batch}\n{found}", highlight=False, markup=False, soft_wrap=True)


def _run(everything: list[Measured], output: Path | None) -> None:
    """Measure, show, and write. If it is stopped, what has been measured so far is shown and written."""
    from senet.bench.files import write_tax
    from senet.cli.console import to_output
    from senet.cli.tax_tables import checks_table, tax_tables

    console = to_output()
    try:
        for measured in everything:
            try:
                _measure(measured)
            finally:
                checks_table(measured, console)
            if output is not None:
                write_tax(output, everything)
    finally:
        tax_tables(everything, console)
        if output is not None and any(measured.timings for measured in everything):
            write_tax(output, everything)
            written = ", ".join(str(output / name) for name in FILES)
            console.print(f"written: {written}", highlight=False, markup=False, soft_wrap=True)


def _measure(measured: Measured) -> None:
    from senet.bench.tax import measure_into
    from senet.cli.console import bars

    title = f"{measured.setting.mode}, batch {measured.setting.batch}"
    with bars(elapsed=True) as show:
        measure_into(measured, lambda what, done, total: show("", f"{title}: {what}", done, total))
