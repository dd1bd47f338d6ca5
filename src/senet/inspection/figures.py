"""Figures of excitations as in the paper: by class (Fig. 6), and with the spread within a class (Fig. 7)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from senet.errors import InputError
from senet.inspection.excitations import Excitations
from senet.inspection.site_excitations import SiteExcitations
from senet.system.figures import new_figure, save_png
from senet.text import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MEAN_CLASSES, SPREAD_CLASSES, PANELS = 4, 2, 12
CHANNELS = 50  # "fifty uniformly sampled channels" (section 7.2)
ALL = "all"
# Okabe and Ito's colors, safe for color-blind readers. Line styles differ too, for grayscale print.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D31", "#6A3D9A")
_STYLES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1)), (0, (1, 3)))


def figure_sites(excitations: Excitations) -> list[str]:
    """The gates that the paper shows: the last of each stage, and all of the last stage (section 7.2).

    A stage ends where the number of channels changes. At most twelve gates are drawn, evenly spaced.
    """
    sites = list(excitations)
    last_change = max((i for i in range(1, len(sites)) if sites[i].channels != sites[i - 1].channels), default=0)
    chosen = [s.name for i, s in enumerate(sites) if i >= last_change or sites[i + 1].channels != s.channels]
    if len(chosen) <= PANELS:
        return chosen
    return [chosen[round(i * (len(chosen) - 1) / (PANELS - 1))] for i in range(PANELS)]


def figure_classes(excitations: Excitations, count: int) -> list[str]:
    """At most ``count`` classes that have images, evenly spaced."""
    empty = set(excitations.empty_classes())
    filled = [name for name in excitations.classes if name not in empty]
    if len(filled) <= count:
        return filled
    return [filled[round(i * (len(filled) - 1) / max(count - 1, 1))] for i in range(count)]


def sampled_channels(channels: int, most: int = CHANNELS) -> range:
    """At most ``most`` channels in equal steps, as in the paper: 0, 6, 12, … of 256."""
    return range(0, channels, math.ceil(channels / most))


def plot_class_means(
    path: str | Path, excitations: Excitations, sites: Sequence[str] | None = None, classes: Sequence[str] | None = None
) -> None:
    """Save Fig. 6 as a PNG: the mean excitation of each channel, for each class and for all images, a panel per gate.

    Args:
        path: the file to write.
        excitations: the recorded excitations.
        sites: names of gates; by default those that the paper shows, see ``figure_sites``.
        classes: names of classes; by default four from ``figure_classes``.

    Raises:
        InputError: unknown gate or class, or a class without images.
    """
    chosen = list(classes) if classes is not None else figure_classes(excitations, MEAN_CLASSES)
    _plot(path, excitations, sites, chosen, "Mean excitation by class", band=False)


def plot_class_spread(
    path: str | Path, excitations: Excitations, sites: Sequence[str] | None = None, classes: Sequence[str] | None = None
) -> None:
    """Save Fig. 7: as Fig. 6, with a band of one standard deviation over the images of each class.

    By default, two classes are drawn; without classes, all images.
    """
    chosen = list(classes) if classes is not None else figure_classes(excitations, SPREAD_CLASSES)
    _plot(path, excitations, sites, chosen, "Mean and standard deviation within a class", band=True)


def _plot(
    path: str | Path, excitations: Excitations, sites: Sequence[str] | None, classes: list[str], title: str, band: bool
) -> None:
    names = list(sites) if sites is not None else figure_sites(excitations)
    chosen = [excitations[name] for name in names]
    rows = [(name, excitations.class_index(name)) for name in classes]
    for name, row in rows:
        if not any(site.count[row] for site in chosen):
            raise InputError(f"class {name!r} has no images here, so it cannot be drawn; choose another")
    columns = min(3, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    figure = new_figure(4.6 * columns, 2.9 * lines + 0.9, dpi=130)
    origin = shown(", ".join(excitations.about[key] for key in ("model", "data") if key in excitations.about))
    figure.suptitle(f"{title}: {origin}" if origin else title, fontsize=11, x=0.01, ha="left", parse_math=False)
    panels = figure.subplots(lines, columns, squeeze=False)
    for number, axes in enumerate(panels.flat):
        if number >= len(chosen):
            axes.set_axis_off()
            continue
        _draw(axes, chosen[number], [(shown(name), row) for name, row in rows], band)
        _decorate(axes, chosen[number])
    _legend(figure, panels.flat[0].lines)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # drawn as a box; the page has the name
        save_png(figure, path)


def _legend(figure: Figure, lines: Sequence[Line2D]) -> None:
    """A legend with literal names: matplotlib interprets a leading "_" and "$"."""
    places = [str(number) for number, _ in enumerate(lines)]
    legend = figure.legend(
        lines, places, loc="outside lower center", ncols=min(len(places), 5), frameon=False, fontsize=9
    )
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set_parse_math(False)
        text.set_text(str(line.get_label()))


def _draw(axes: Axes, site: SiteExcitations, rows: list[tuple[str, int]], band: bool) -> None:
    channels = np.array(sampled_channels(site.channels))
    means, stds = site.class_mean(), site.class_std()
    lines: list[tuple[str, Any, Any, str, Any, float]] = [
        # When the colors repeat, the styles are offset by one.
        (
            name,
            means[row],
            stds[row],
            _COLORS[i % len(_COLORS)],
            _STYLES[(i + i // len(_COLORS)) % len(_STYLES)],
            1.3,
        )
        for i, (name, row) in enumerate(rows)
    ]
    if not band or not rows:
        lines.append((ALL, *site.overall(), "0.15", "-", 1.8))
    marker = "o" if len(channels) == 1 else None
    for name, mean, std, color, style, width in lines:
        y, half = mean[channels], std[channels]
        axes.plot(channels, y, color=color, linestyle=style, linewidth=width, marker=marker, label=name, zorder=3)
        if band:
            low, high = np.maximum(y - half, site.low), np.minimum(y + half, site.high)
            axes.fill_between(channels, low, high, color=color, alpha=0.2, linewidth=0, zorder=2)


def _decorate(axes: Axes, site: SiteExcitations) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(site.name, fontsize=9.5, loc="left")
    axes.set_title(f"{site.channels} channels, {site.function}", fontsize=8, loc="right", color="0.4")
    axes.set_xlabel("channel index", fontsize=9)
    axes.set_ylabel("activation", fontsize=9)
    axes.set_xlim(0, max(site.channels - 1, 1))
    if np.isfinite(site.low) and np.isfinite(site.high):
        axes.set_ylim(site.low, site.high)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
