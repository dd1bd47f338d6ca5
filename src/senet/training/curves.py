"""Learning curves: the CSV file of a run, and the figures of runs and comparisons (like the paper's Fig. 4)."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senet.errors import InputError
from senet.system.figures import new_figure, save_png
from senet.text import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("epoch", "train_error", "train_loss", "val_error", "val_top5_error", "val_loss", "lr", "seconds")
_NEEDED = ("epoch", "train_error", "val_error")
# From Okabe and Ito: distinguishable by color-blind readers and in grayscale print.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")

Row = Mapping[str, Any]


def read_csv(path: Path) -> list[dict[str, float | None]]:
    """The rows of a ``curves.csv``. If it is damaged, raises InputError, which names file, row, and column."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [_numbers(row, number) for number, row in enumerate(csv.DictReader(file), 1)]
    except (ValueError, csv.Error, FileNotFoundError) as error:
        raise InputError(f"{path} is damaged ({error}); start the run again with --overwrite") from None
    if not rows:
        raise InputError(f"{path} is damaged (it has no rows); start the run again with --overwrite")
    return rows


def _numbers(row: Mapping[str, Any], number: int) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for column in COLUMNS:
        cell = str(row.get(column) or "")
        try:
            values[column] = float(cell) if cell else None
        except ValueError:
            raise ValueError(f"row {number}, {column}: {str(cell)[:40]!r} is not a number") from None
        value = values[column]
        if (value is None and column in _NEEDED) or (value is not None and not math.isfinite(value)):
            raise ValueError(f"row {number}, {column}: must be a finite number")
    return values


def plot_curves(path: Path, runs: Mapping[str, Sequence[Sequence[Row]]], title: str) -> None:
    """Draw training (dashed) and validation (solid) error over epochs, one color per network, and save a PNG.

    Args:
        path: The file.
        runs: Network name → its runs (one per seed) → rows of ``curves.csv``. Several runs are drawn as their mean and
            a band from the lowest to the highest.
        title: The title of the figure.
    """
    figure = new_figure(7.2, 4.6, dpi=160)
    axes = figure.add_subplot()
    for (name, rows), color in zip(runs.items(), COLORS, strict=False):
        _draw(axes, name, rows, color)
    _decorate(axes, runs, title)
    # Below the axes, as no place inside is always free of curves.
    figure.legend(loc="outside lower center", ncols=len(runs), frameon=False, fontsize=9, columnspacing=2.0)
    save_png(figure, path)


def _draw(axes: Axes, name: str, runs: Sequence[Sequence[Row]], color: str) -> None:
    for column, style, width, label in (("train_error", "--", 1.3, "training"), ("val_error", "-", 2.0, "validation")):
        shortest = min(len(run) for run in runs)
        epochs = [int(row["epoch"]) for row in runs[0][:shortest]]
        at_epoch = [[float(run[i][column]) for run in runs] for i in range(shortest)]
        mean = [sum(values) / len(values) for values in at_epoch]
        marker = "o" if shortest == 1 else None
        axes.plot(epochs, mean, style, color=color, linewidth=width, marker=marker, label=f"{name}, {label}", zorder=3)
        if len(runs) > 1:
            low, high = [min(v) for v in at_epoch], [max(v) for v in at_epoch]
            axes.fill_between(epochs, low, high, color=color, alpha=0.14, linewidth=0, zorder=2)


def _decorate(axes: Axes, runs: Mapping[str, Sequence[Sequence[Row]]], title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    seeds = max(len(group) for group in runs.values())
    axes.set_title(shown(title), fontsize=11, loc="left", pad=10, parse_math=False)
    if seeds > 1:
        axes.set_title(f"mean and range of {seeds} seeds", fontsize=8.5, loc="right", color="0.4")
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 error (%)")
    axes.set_ylim(0, _upper_limit(runs))
    last = max(int(run[-1]["epoch"]) for group in runs.values() for run in group)
    axes.set_xlim(1, max(last, 2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _upper_limit(runs: Mapping[str, Sequence[Sequence[Row]]]) -> float:
    """Cut off the drop from chance level in the first epochs, which would squeeze the rest into the bottom tenth."""
    all_runs = [run for group in runs.values() for run in group]
    late = [_worst(row) for run in all_runs for row in run[len(run) // 5 :]]
    highest = max(_worst(row) for run in all_runs for row in run)
    return max(min(highest, 1.6 * max(late)) * 1.05, 1.0)


def _worst(row: Row) -> float:
    return max(float(row["train_error"]), float(row["val_error"]))
