"""Figures without a display: matplotlib's object interface with the Agg canvas, and atomic PNG files."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from senet.system.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, dpi: int = 150) -> Figure:
    """An empty figure; sizes are in inches. It uses no global state, so any thread can draw it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a PNG file atomically."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())
