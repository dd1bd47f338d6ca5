"""The passes over feature maps in the tail of a residual block in training: counted and drawn.

    python benchmarks/passes.py     draws docs/images/passes.svg

A *transfer* is one feature map read or written. tests/bench/test_passes.py compares this list with PyTorch's
operations. The second read by batch norm is inside a single operation of PyTorch.
"""

import io
import sys
from pathlib import Path
from typing import NamedTuple

from senet.system.atomic import write_atomically

FIGURE = Path(__file__).parent.parent / "docs" / "images" / "passes.svg"
READ, WRITTEN = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion
INK, PALE = "#1f2328", "#57606a"


class Pass(NamedTuple):
    """One pass: its purpose, and the feature maps that it reads and writes. Without any, it works on tables."""

    what: str
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()

    @property
    def transfers(self) -> int:
        return len(self.reads) + len(self.writes)


_NORM = (Pass("batch norm: statistics", ("U",)), Pass("batch norm: normalize", ("U",), ("y",)))
_NORM_BACKWARD = (Pass("batch norm: sums", ("dy", "U")), Pass("batch norm: gradient", ("dy", "U"), ("dU",)))
_RELU_BACKWARD = Pass("ReLU", ("dout", "out"), ("G",))
EAGER = (
    (
        *_NORM,
        Pass("SE: squeeze", ("y",)),
        Pass("SE: scale", ("y",), ("s·y",)),
        Pass("add the shortcut", ("s·y", "id"), ("sum",)),
        Pass("ReLU", ("sum",), ("out",)),
    ),
    (
        _RELU_BACKWARD,
        Pass("SE: product for the gate", ("G", "y"), ("G·y",)),
        Pass("SE: sum the product", ("G·y",)),
        Pass("SE: scale", ("G",), ("s·G",)),
        Pass("SE: gradient of the squeeze", (), ("dz/S",)),
        Pass("SE: add both gradients", ("s·G", "dz/S"), ("dy",)),
        *_NORM_BACKWARD,
    ),
)
PLAIN = (
    (*_NORM, Pass("add the shortcut", ("y", "id"), ("sum",)), Pass("ReLU", ("sum",), ("out",))),
    (_RELU_BACKWARD, *_NORM_BACKWARD),
)
SWEEPS = (
    (
        Pass("moments", ("U",)),
        Pass("on tables: batch norm's statistics, squeeze, gate", ()),
        Pass("affine", ("U", "id"), ("out",)),
    ),
    (
        Pass("backward of affine", ("dout", "out", "U"), ("G",)),
        Pass("on tables: gradients of gate, FCs, γ, β, and statistics", ()),
        Pass("backward of moments", ("G", "U"), ("dU",)),
    ),
)
Passes = tuple[tuple[Pass, ...], tuple[Pass, ...]]


def transfers(passes: Passes) -> tuple[int, int]:
    """The numbers of transfers forward and backward."""
    forward, backward = (sum(each.transfers for each in direction) for direction in passes)
    return forward, backward


def draw(path: Path) -> None:
    """Draw both forms side by side: one line per pass, one box per feature map."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines = sum(map(len, EAGER)) + 2
    with rc_context({"svg.hashsalt": "senet"}):  # reproducible output
        figure = Figure(figsize=(10.4, 0.36 * lines + 1.0), facecolor="white", layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        _column(left, EAGER, "One operation at a time", lines)
        _column(right, SWEEPS, "Fused into sweeps", lines)
        note = f"Without SE: {sum(transfers(PLAIN))} with one operation at a time, {sum(transfers(SWEEPS))} in sweeps."
        right.text(-3.6, 9, note, fontsize=10.5, color=INK, va="center", weight="bold")
        handles = [Patch(color=READ, label="feature map read"), Patch(color=WRITTEN, label="feature map written")]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=10, labelcolor=INK)
        image = io.BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None})
    write_atomically(path, image.getvalue())


def _column(axes, passes: Passes, title: str, lines: int) -> None:  # type: ignore[no-untyped-def] # matplotlib's Axes
    counts = transfers(passes)
    axes.set_title(f"{title}: {sum(counts)} transfers", fontsize=12, color=INK, loc="left", weight="bold")
    axes.set_xlim(-3.6, 4.1)
    axes.set_ylim(lines - 0.4, -0.7)
    axes.axis("off")
    line = 0
    for name, direction, count in zip(("forward", "backward"), passes, counts, strict=True):
        axes.text(-3.6, line, f"{name}: {count}", fontsize=10.5, color=PALE, va="center", weight="bold")
        for each in direction:
            line += 1
            style = {"color": INK} if each.transfers else {"color": PALE, "style": "italic"}
            axes.text(-3.4, line, each.what, fontsize=10, va="center", **style)
            boxes = [(name, READ) for name in each.reads] + [(name, WRITTEN) for name in each.writes]
            for place, (text, color) in enumerate(boxes):
                axes.barh(line, 0.94, left=place, height=0.78, color=color)
                axes.text(place + 0.47, line, text, fontsize=9, color="white", va="center", ha="center", weight="bold")
        line += 1


def main() -> int:
    draw(FIGURE)
    print(f"drawn: {FIGURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
