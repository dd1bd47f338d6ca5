"""A CIFAR ResNet with and without SE on the JPEG copy of CIFAR-10: the table and the figure in docs/results.md.

    python benchmarks/cifar10.py --data cifar10-jpeg --epochs 8 --seeds 3

``--data`` is a folder with ``train/<class>/*`` and ``test/<class>/*``. Finished runs in ``--output`` are not repeated.
"""

import argparse
import csv
import shutil
from pathlib import Path

from common import RESULTS, append_row
from rich.console import Console

from senet.comparison.compare import compare
from senet.runs.recipe import load_recipe
from senet.runs.settings import RunSettings, default_recipe

FILE = "cifar10_jpeg_compare.csv"
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "cifar10.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="se_resnet20")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="runs/cifar10")
    parser.add_argument("--commit", help="the commit of the training code, if the runs are older than this checkout")
    args = parser.parse_args()
    recipe = load_recipe(default_recipe(args.data, args.model), [f"epochs={args.epochs}", "channels_last=true"])
    settings = RunSettings(data=args.data, model=args.model)
    compare(settings, recipe, args.output, seeds=args.seeds, resume=True, console=Console(stderr=True))
    with (Path(args.output) / "results.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    (RESULTS / FILE).unlink(missing_ok=True)  # the table shows one comparison; rows are not appended to older ones
    for row in rows:
        row.pop("train_step_ms")  # an absolute time means nothing on another processor
        append_row(FILE, args.commit, data="CIFAR-10 (JPEG copy)", recipe=recipe.name, **row)
    shutil.copyfile(Path(args.output) / "curves.png", FIGURE)


if __name__ == "__main__":
    main()
