"""The tables of ``senet bench``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from senet.bench.tax import Measured

_MEMORY = {"saved_mb_per_image": "MB/image", "peak_mb": "peak MB"}


def checks_table(measured: Measured, console: Console) -> None:
    """Print the comparisons with float64: one line per kind, with the candidate that has the largest error."""
    if not measured.checks:
        return
    kinds: dict[str, list[Any]] = {}
    for check in measured.checks:
        kinds.setdefault(check.what.partition(", ")[2], []).append(check)
    for kind, checks in kinds.items():
        worst = max(checks, key=lambda check: (not check.ok, check.error))
        console.print(
            f"{measured.setting.mode}, batch {measured.setting.batch}: {kind} of {len(checks)} "
            f"{'[green]agree[/]' if worst.ok else '[red]do not agree[/]'} with float64; largest error: "
            f"{worst.what.partition(',')[0]}, {worst.error:.1e} (allowed {worst.allowed:.1e})",
            highlight=False,
            soft_wrap=True,
        )


def tax_tables(everything: Sequence[Measured], console: Console) -> None:
    """Print the ratios and the stages of each setting, and the candidates that were left out, with reasons."""
    for measured in everything:
        if measured.timings:
            _ratios(measured, console)
            _stages(measured, console)
        for name, reason in measured.left_out.items():
            console.print(f"{name}: {escape(reason)}", style="dim", highlight=False)
    if any(measured.timings for measured in everything):
        console.print(
            "Ratios are computed per round: median (quartiles). The twin is the plain network on the same engine, so "
            "the ratio to it is the SE tax. MB/image: saved for backward. Milliseconds apply only to this machine.",
            style="dim",
            highlight=False,
        )


def _ratios(measured: Measured, console: Console) -> None:
    setting, rows = measured.setting, measured.rows()
    rounds = min(row["rounds"] for row in rows)
    stopped = "" if measured.complete else " (stopped early)"
    what = "train step" if setting.mode == "train" else "inference"
    console.print(
        f"\n[bold]{setting.model}, {what}, batch {setting.batch}[/], {setting.size}×{setting.size}, {setting.dtype}, "
        f"{setting.layout}, {setting.device}, {rounds} rounds{stopped}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("÷ plain-eager", "÷ its twin", "ms here"):
        table.add_column(column, justify="right", no_wrap=True)
    memory = [column for column in _MEMORY if any(row[column] for row in rows)]
    for column in memory:
        table.add_column(_MEMORY[column], justify="right", no_wrap=True)
    for row in rows:
        cells = [_ratio(row, "over_plain"), _ratio(row, "over_twin"), f"{row['ms']:.1f}"]
        cells += ["" if row[column] is None else f"{row[column]:,.1f}" for column in memory]
        table.add_row(row["candidate"], *cells)
    console.print(table)


def _ratio(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return ""
    return f"{row[name]:.3f} ({row[f'{name}_q25']:.3f}–{row[f'{name}_q75']:.3f})"


def _stages(measured: Measured, console: Console) -> None:
    if not measured.stages:
        return
    console.print("[bold]Stage by stage[/], each timed alone on its own input")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("stage", "candidate", "÷ plain", "adds to the total"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for cost in measured.stages:
        table.add_row(str(cost.stage), cost.candidate, f"{cost.over_plain:.3f}", f"{100 * cost.share:+.1f} %")
    console.print(table)
