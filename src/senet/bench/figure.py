"""A plot of the SE tax: the time of each candidate relative to plain eager, one panel per setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from senet.bench.candidates import BASE, CANDIDATES
from senet.system.figures import new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's blue and vermilion: safe for color-blind readers; in grayscale, vermilion is lighter.
COLORS = {"plain": "#0072B2", "se": "#D55E00"}
_PANEL_WIDTH, _BAR_HEIGHT, _FRAME_HEIGHT = 7.0, 0.27, 1.15  # inches

Row = dict[str, Any]


def plot_tax(path: Path, settings: Sequence[Sequence[Row]], title: str) -> None:
    """Draw the rows of each setting (``Measured.rows``) as bars with quartiles, and save a PNG.

    The axis starts at 0, and a line marks plain eager (1.00). For an SE network, the value is followed by its ratio to
    the plain network on the same engine.
    """
    from matplotlib.patches import Patch

    panels = [rows for rows in settings if rows]
    columns = min(2, len(panels))
    groups = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    bars = [max(map(len, group)) for group in groups]  # per row of panels
    heights = [_FRAME_HEIGHT + _BAR_HEIGHT * count for count in bars]
    figure = new_figure(_PANEL_WIDTH * columns, sum(heights) + 0.8)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    limit = 1.6 * max(row["over_plain_q75"] or 1.0 for rows in panels for row in rows)
    grid = figure.add_gridspec(len(groups), columns, height_ratios=heights)
    for index, rows in enumerate(panels):
        line, column = divmod(index, columns)
        axes = figure.add_subplot(grid[line, column])
        _bars(axes, rows)
        axes.set_xlim(0, limit)
        axes.set_ylim(bars[line] - 0.4, -0.6)  # the first candidate on top, bars of equal height
    handles = [Patch(color=COLORS["plain"], label="plain"), Patch(color=COLORS["se"], label="with SE")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save_png(figure, path)


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    first = rows[0]
    for place, row in enumerate(rows):
        network = CANDIDATES[row["candidate"]].network
        value = row["over_plain"] or 1.0
        low, high = row["over_plain_q25"] or value, row["over_plain_q75"] or value
        # Median and quartiles come from the same per-round ratios, so the median lies between the quartiles.
        spread = [[value - low], [high - value]]
        axes.barh(place, value, xerr=spread, color=COLORS[network], height=0.7, ecolor="0.15", capsize=2.5, zorder=2)
        of_twin = row["over_twin"] is not None and row["twin"] != BASE
        text = f"{value:.2f}" + (f"  ({row['over_twin']:.2f} × {row['twin']})" if of_twin else "")
        # The white background keeps the line at 1.00 from crossing out the number.
        ground = {"boxstyle": "square,pad=0.1", "facecolor": "white", "linewidth": 0}
        axes.annotate(
            text, (high, place), (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=ground, zorder=4
        )
    axes.axvline(1.0, color="0.15", linewidth=1.0, linestyle="--", zorder=3)
    axes.set_yticks(range(len(rows)), [row["candidate"] for row in rows], fontsize=8.5)
    what = "train step" if first["mode"] == "train" else "inference"
    circumstances = ", ".join(str(first[name]) for name in ("dtype", "layout", "device"))
    circumstances = f"{first['size']}×{first['size']}, {circumstances}, {first['rounds']} rounds"
    axes.set_title(f"{what}, batch {first['batch']}", fontsize=10, loc="left")
    axes.set_title(circumstances, fontsize=8, loc="right", color="0.4")
    axes.set_xlabel("time ÷ plain eager (median, quartiles)", fontsize=9)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
