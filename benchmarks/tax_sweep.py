"""The SE tax as a function of batch size, resolution, and width: rows of results/tax_sweep.csv, and a figure.

    python benchmarks/tax_sweep.py [--only batch|size|width] [--mode train|inference] [--rounds 9]
    python benchmarks/tax_sweep.py --draw      draws docs/images/tax-sweep.png from the rows, without measuring

One parameter changes at a time: batch size at 224 pixels, image size at batch size 4, and the width of the bottleneck
(`base_width`) at both. Float32, channels_last, CPU. Each point is one interleaved run of senet.bench.tax.
"""

import argparse
import csv
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from common import RESULTS
from tax import save

import senet
from senet.bench.candidates import Setting, choose
from senet.bench.figure import COLORS
from senet.bench.tax import measure
from senet.errors import InputError
from senet.models.resnet import TIMM_SE, Bottleneck, ResNet
from senet.system.figures import new_figure, save_png

FILE = RESULTS / "tax_sweep.csv"
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "tax-sweep.png"
POINTS = {"batch": (1, 2, 4, 8, 16), "size": (96, 160, 224, 288), "width": (32, 64, 128)}
LABELS = {"batch": "batch, 224×224", "size": "side of the image, batch 4", "width": "width at the first stage, batch 4"}
# mode → (numerator, denominator): ours, and PyTorch alone, each ÷ plain on the same engine
LINES = {
    "train": (("se-accelerated", "plain-eager"), ("se-reference", "plain-eager")),
    "inference": (("se-accelerated", "plain-accelerated"), ("se-compiled", "plain-compiled")),
}
GRAY = "#666666"
KEYS = ("mode", "swept", "of", "numerator", "denominator")


def register_widths() -> None:
    """Register ResNet-50 with bottlenecks of half and double width; 64 is the standard width."""
    for width in POINTS["width"]:
        if width != 64:
            build = functools.partial(ResNet, Bottleneck, (3, 4, 6, 3), base_width=width)
            senet.register_model(f"resnet50_w{width}", build, se=TIMM_SE)


def settings(mode: str, only: str | None, rounds: int) -> Iterator[tuple[str, int, Setting]]:
    """Yield (swept parameter, its value, setting)."""
    chosen = choose([name for line in LINES[mode] for name in line])
    for swept, values in POINTS.items():
        for value in values:
            if only in (None, swept):
                batch = value if swept == "batch" else 4
                size = value if swept == "size" else 224
                model = f"se_resnet50_w{value}" if swept == "width" and value != 64 else "se_resnet50"
                yield swept, value, Setting(model, mode, batch, size, rounds=rounds, candidates=chosen)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Draw one column per swept parameter, with one row for training and one for inference."""
    modes = [mode for mode in LINES if any(row["mode"] == mode for row in rows)]
    sweeps = [swept for swept in POINTS if any(row["swept"] == swept for row in rows)]  # no empty panels
    figure = new_figure(2.1 + 2.8 * len(sweeps), 0.6 + 2.9 * len(modes))
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.95), hspace=0.1)
    panels = figure.subplots(len(modes), len(sweeps), sharey="row", squeeze=False)
    for mode, line in zip(modes, panels, strict=True):
        for swept, axes in zip(sweeps, line, strict=True):
            for (numerator, denominator), color in zip(LINES[mode], (COLORS["se"], GRAY), strict=True):
                wanted = {
                    "mode": mode,
                    "swept": swept,
                    "of": "time",
                    "numerator": numerator,
                    "denominator": denominator,
                }
                found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
                latest = sorted({int(row["value"]): row for row in found}.items())
                values = [float(row["ratio"]) for _, row in latest]
                low = [value - float(row["q25"]) for value, (_, row) in zip(values, latest, strict=True)]
                high = [float(row["q75"]) - value for value, (_, row) in zip(values, latest, strict=True)]
                places = [POINTS[swept].index(value) for value, _ in latest]
                axes.errorbar(
                    places,
                    values,
                    (low, high),
                    color=color,
                    marker="o",
                    capsize=3,
                    label=f"{numerator} ÷ {denominator}",
                )
            axes.axhline(1.0, color="0.15", linewidth=1.0, linestyle="--")
            axes.set_xticks(range(len(POINTS[swept])), [str(value) for value in POINTS[swept]])
            axes.set_xlabel(LABELS[swept], fontsize=9)
            axes.grid(axis="y", color="0.9", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        what = "train step" if mode == "train" else "inference"
        line[0].set_ylabel(f"{what}: time with SE ÷ without", fontsize=9)
        legend = line[0].legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        legend.set_in_layout(False)  # the legend is wider than its panel
    save_png(figure, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=tuple(POINTS))
    parser.add_argument("--mode", choices=tuple(LINES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args(arguments)
    if not args.draw:
        register_widths()
        for mode in (args.mode,) if args.mode else tuple(LINES):
            for swept, value, setting in settings(mode, args.only, args.rounds):
                print(f"{mode}, {swept} {value}", flush=True)
                try:
                    measured = measure(setting)
                except InputError as error:
                    print(error, file=sys.stderr)
                    return 1
                save(measured, (), str(FILE), swept=swept, value=value)
    if not FILE.exists():
        print(f"{FILE.name} does not exist yet; run without --draw", file=sys.stderr)
        return 2
    with FILE.open(newline="") as handle:
        draw(list(csv.DictReader(handle)), FIGURE)
    print(f"drawn: {FIGURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
