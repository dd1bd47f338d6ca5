"""Output of the commands: tables for people, JSON and CSV for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from senet.cli.console import counted
from senet.system.csv_file import write_csv, write_rows

if TYPE_CHECKING:
    from senet.comparison.compare import Comparison
    from senet.evaluation.evaluate import Evaluation, Predictions
    from senet.training.run import RunResult


def run_summary(result: RunResult) -> str:
    """A short summary of a finished run."""
    top5 = "" if result.val_top5_error is None else f", top-5 {result.val_top5_error:.2f} %"
    return escape(
        f"{result.model}: validation error {result.val_error:.2f} %{top5} after {result.epochs} epochs "
        f"(best {result.best_val_error:.2f} % in epoch {result.best_epoch}; {result.val_images} images)\n"
        f"weights in {result.folder}/best.safetensors and last.safetensors, curves in {result.folder}/curves.png"
    )


def comparison_table(comparison: Comparison, console: Console) -> None:
    """The comparison as a table, the verdict, and where the files are."""
    plain, se = comparison.plain, comparison.se
    seeds = len(se.runs)
    count = f"{seeds} seeds" if seeds > 1 else "one seed"
    table = Table(title=f"{se.model} vs. {plain.model}, {count}", title_justify="left")
    for name in ("", plain.model, se.model, "SE vs. plain"):
        table.add_column(name, justify="left" if not name else "right")
    _cost_row(table, "parameters", plain.cost.params, se.cost.params)
    _cost_row(table, "multiply-adds", plain.cost.mult_adds, se.cost.mult_adds)
    table.add_row("validation error, %", str(plain.val_error), str(se.val_error), comparison.difference.points())
    table.add_row(
        "training error, %",
        str(plain.train_error),
        str(se.train_error),
        f"{se.train_error.mean - plain.train_error.mean:+.2f} points",
    )
    ratio = comparison.step_ratio
    table.add_row(
        f"training step, batch {comparison.step_batch}, ms",
        *(f"{1000 * side.step_seconds:.2f}" for side in (plain, se)),
        f"× {ratio.median:.2f} ({ratio.q25:.2f} to {ratio.q75:.2f})",
    )
    table.add_section()
    table.add_row("verdict", "", "", f"[bold]{comparison.verdict}[/]")
    console.print(table)
    word = comparison.verdict
    opening = f"SE {word}" if word in ("helps", "hurts") else word.capitalize()
    console.print(f"[bold]{opening}[/]: {comparison.sentence}", highlight=False)
    console.print(
        "Errors are from the last epoch (choosing the best epoch on the validation images would be optimistic). "
        "± is the 95 % Student-t interval over seeds. Step times are each network's fastest; their ratio is the median "
        "(and quartiles) of interleaved rounds.",
        style="dim",
        highlight=False,
    )
    console.print(f"data: {escape(comparison.split)}", style="dim", highlight=False)
    files = ", ".join(str(Path(comparison.folder) / name) for name in ("curves.png", "results.json", "results.csv"))
    console.print(f"written: {escape(files)}", highlight=False, soft_wrap=True)


def _cost_row(table: Table, name: str, plain: int, se: int) -> None:
    table.add_row(name, f"{plain:,}", f"{se:,}", f"{100 * (se / plain - 1):+.2f} %")


def evaluation_table(result: Evaluation, console: Console) -> None:
    """Print the errors with their intervals. Top-5 is a dash for fewer than six classes."""
    table = Table(title=f"{result.model} on {result.images:,} images", title_justify="left")
    for name in ("", "error, %", "95 % interval"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("top-1", f"{result.top1_error:.2f}", _range(result.top1_interval))
    top5 = "—" if result.top5_error is None else f"{result.top5_error:.2f}"
    table.add_row("top-5", top5, "—" if result.top5_interval is None else _range(result.top5_interval))
    console.print(table)
    crops = "ten crops" if result.crops == "ten" else "center crop"
    console.print(f"{escape(result.data)}; {crops} of {result.size} pixels", style="dim", highlight=False)
    if result.skipped:
        console.print(f"{len(result.skipped)} unreadable images were skipped", highlight=False)
    if result.damaged:
        console.print(f"{len(result.damaged)} images were decoded with damage", highlight=False)


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def prediction_table(predictions: Predictions, console: Console) -> None:
    """Print one row per class, with the image's name in the row of its likeliest class."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("image", "class", "probability"):
        table.add_column(name, justify="right" if name == "probability" else "left", overflow="fold")
    for row in predictions:
        for rank, (label, probability) in enumerate(zip(row.classes, row.probabilities, strict=True)):
            table.add_row(escape(row.name) if rank == 0 else "", escape(label), f"{probability:.4f}")
    if table.row_count:
        console.print(table)


def predictions_csv(predictions: Predictions, target: str) -> None:
    """Write ``image,rank,class,probability``. An existing file is replaced only after the last row."""
    columns = ("image", "rank", "class", "probability")
    rows = (
        {"image": row.name, "rank": rank, "class": label, "probability": f"{probability:.6f}"}
        for row in predictions
        for rank, (label, probability) in enumerate(zip(row.classes, row.probabilities, strict=True), 1)
    )
    if target == "-":
        write_rows(sys.stdout, columns, rows)
    else:
        write_csv(target, columns, rows)


def zoo_table(names: list[str], console: Console) -> None:
    """Print the networks, with progress on a terminal while they are counted."""
    # No frame, as the names are long and a terminal may have only 80 columns.
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("model", "params, M", "madds, G", "input", "stride in", "twin"):
        right = name in ("params, M", "madds, G", "input")
        table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="fold")
    for name in counted(names, "counting"):
        row = _zoo_row(name)
        table.add_row(
            name,
            f"{row['parameters'] / 1e6:,.2f}",
            f"{row['mult_adds'] / 1e9:,.3f}",
            str(row["input_size"]),
            row["stride"],
            row["twin"],
        )
    console.print(table)


def zoo_json(names: list[str]) -> str:
    """The networks as JSON."""
    return json.dumps([_zoo_row(name) for name in names], indent=2, ensure_ascii=False)


def _zoo_row(name: str) -> dict[str, Any]:
    from senet.cost.count import model_cost
    from senet.models.registry import model_spec

    spec = model_spec(name)
    cost = model_cost(name)
    return {
        "model": name,
        "family": spec.family,
        "parameters": cost.params,
        "mult_adds": cost.mult_adds,
        "input_size": spec.input_size,
        "stride": spec.stride,
        "twin": spec.twin,
        "recipe": spec.recipe,
    }
