"""The files of ``senet fold``: the steps as CSV, everything as JSON, and a plot of the trade-off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senet.folding.report import FoldReport, FoldStep
from senet.system.atomic import write_atomically
from senet.system.csv_file import write_csv
from senet.system.figures import new_figure, save_png
from senet.system.machine import machine
from senet.system.timing import interleaved, ratio
from senet.text import json_text

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from torch import nn

    from senet.folding.search import Measure

FILES = ("fold.csv", "fold.json", "tradeoff.png")
COLUMNS = (
    "step",
    "gate",
    "kept",
    "folds",
    "accuracy",
    "drop",
    "parameters",
    "variation",
    "time",
    "time_q25",
    "time_q75",
)
_KEPT, _TRIED, _PARAMETERS = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito's blue and vermilion, and a gray


def time_of(x: torch.Tensor, rounds: int) -> Measure:
    """A function that times two networks alternately on ``x`` in evaluation mode and returns quartiles of the ratio."""
    import torch

    def measure(before: nn.Module, after: nn.Module) -> tuple[float, float, float]:
        networks = {"before": before.eval(), "after": after.eval()}
        with torch.inference_mode():
            runs: dict[str, Any] = {name: lambda network=network: network(x) for name, network in networks.items()}
            timings = interleaved(runs, rounds, warmup=2, device=x.device.type)
        found = ratio(timings["after"], timings["before"])
        return found.q25, found.median, found.q75

    return measure


def step_rows(steps: Sequence[FoldStep]) -> list[dict[str, Any]]:
    """The rows of fold.csv; a missing number is an empty cell."""
    rows = []
    for number, step in enumerate(steps):
        q25, median, q75 = step.time if step.time is not None else ("", "", "")
        rows.append(
            {
                "step": number,
                "gate": step.site,
                "kept": step.kept,
                "folds": step.folds,
                "accuracy": step.accuracy,
                "drop": step.drop,
                "parameters": step.parameters,
                "variation": "" if math.isnan(step.variation) else step.variation,
                "time": median,
                "time_q25": q25,
                "time_q75": q75,
            }
        )
    return rows


def write_fold(folder: Path, report: FoldReport, about: dict[str, str]) -> None:
    """Write ``FILES`` to a folder; ``about`` describes where the numbers come from."""
    write_csv(folder / "fold.csv", COLUMNS, step_rows(report.steps))
    content = {"about": about, "machine": machine(), **report.to_dict()}
    write_atomically(folder / "fold.json", (json_text(content, indent=2) + "\n").encode())
    plot_tradeoff(folder / "tradeoff.png", report, about.get("model", report.name))


def plot_tradeoff(path: Path, report: FoldReport, title: str) -> None:
    """Save a PNG of accuracy, time, and parameters over the gates, in the order in which they were tried."""
    steps = report.steps
    figure = new_figure(max(6.0, 0.42 * len(steps) + 2.5), 6.5)
    figure.suptitle(f"Folding the gates of {title}, least movement first", fontsize=11, x=0.01, ha="left")
    above, below = figure.subplots(2, 1, sharex=True)
    _accuracy(above, steps, report.max_drop)
    _cost(below, steps)
    below.set_xticks(range(len(steps)), ["none", *(s.site for s in steps[1:])], rotation=60, ha="right", fontsize=8)
    below.set_xlabel("next gate folded", fontsize=9)
    for axes in (above, below):
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    save_png(figure, path)


def _accuracy(axes: Axes, steps: Sequence[FoldStep], max_drop: float | None) -> None:
    kept = [(i, step.accuracy) for i, step in enumerate(steps) if step.kept]
    tried = [(i, step.accuracy) for i, step in enumerate(steps) if not step.kept]
    axes.plot(*zip(*kept, strict=True), "-o", color=_KEPT, markersize=5, label="folded")
    if tried:
        axes.plot(*zip(*tried, strict=True), "x", color=_TRIED, markersize=7, label="tried, not kept")
    if max_drop is not None:
        limit = steps[0].accuracy - max_drop
        axes.axhline(limit, color="0.3", linewidth=1, linestyle="--", label=f"limit: {max_drop:g} points lower")
    axes.set_ylabel("accuracy, %", fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def _cost(axes: Axes, steps: Sequence[FoldStep]) -> None:
    start = steps[0].parameters
    kept = [(i, step) for i, step in enumerate(steps) if step.kept]
    places = [i for i, _ in kept]
    axes.plot(
        places, [s.parameters / start for _, s in kept], "--s", color=_PARAMETERS, markersize=4, label="parameters"
    )
    timed = [(i, step.time) for i, step in kept if step.time is not None]
    if timed:
        medians = [time[1] for _, time in timed]
        spread = [[time[1] - time[0] for _, time in timed], [time[2] - time[1] for _, time in timed]]
        style: dict[str, Any] = {"color": _KEPT, "markersize": 5, "capsize": 2.5, "linewidth": 1.2}
        axes.errorbar([i for i, _ in timed], medians, yerr=spread, fmt="-o", label="time (median, quartiles)", **style)
    axes.axhline(1.0, color="0.3", linewidth=1, linestyle="--")
    axes.set_ylabel("ratio to the original network", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
