"""The published complexity beside ours, under the paper's conventions.

Multiply-adds are those of convolutions and fully connected layers and, with SE, of its poolings: the scaling is left
out. This is what SE-VGG-16's 15.48 and SE-MobileNet's 572 fix; without the poolings, or with the scaling, neither fits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from senet.cost.count import Cost, model_cost
from senet.cost.published import ROWS, Quantity, Row
from senet.errors import InputError
from senet.models.registry import model_spec
from senet.nn.squeeze_excite import SEConfig

MIB = 2**20
BYTES = 4  # of a value in float32
# How far a figure may be from the printed one, both rounded to the printed digits. A released file has names, shapes
# and settings beside its values.
ALLOWED: dict[Quantity, float] = {"gflops": 0.02, "file_mib": 1}
UNITS: dict[Quantity, str] = {
    "gflops": "GFLOPs",
    "mflops": "MFLOPs",
    "params_m": "params, M",
    "added_m": "added, M",
    "added_percent": "added, %",
    "file_mib": "file, MiB",
}


@dataclass(frozen=True)
class Compared:
    """One published figure and ours.

    Attributes:
        row, quantity: what was published where.
        printed: the figure.
        ours: our count in the same unit, in full.
    """

    row: Row
    quantity: Quantity
    printed: str
    ours: float

    @property
    def digits(self) -> int:
        """Decimals of the printed figure."""
        return len(self.printed.partition(".")[2])

    @property
    def difference(self) -> float:
        """Ours, rounded as the paper rounds, minus the printed figure."""
        return round(round(self.ours, self.digits) - float(self.printed), self.digits)

    @property
    def agrees(self) -> bool:
        """Whether the difference is allowed: 0.02 GFLOPs, 1 MiB of a file, else none."""
        return abs(self.difference) <= ALLOWED.get(self.quantity, 0)

    def cells(self) -> tuple[str, str, str]:
        """For a table: what is printed, ours with two more digits, the difference."""
        difference = f"{self.difference:+.{self.digits}f}".replace("-", "−") if self.difference else "0"
        return self.printed, f"{self.ours:.{self.digits + 2}f}", difference

    @property
    def note(self) -> str:
        """Why it does not agree; empty where it does."""
        return self.row.notes.get(self.quantity, "")


def compared(rows: Sequence[Row] = ROWS) -> list[Compared]:
    """Every figure of ``rows`` beside ours; nothing is allocated."""
    return [
        Compared(row, quantity, printed, _ours(_cost(row.model, row.se), quantity, row))
        for row in rows
        for quantity, printed in row.printed.items()
    ]


def numbered_notes(figures: Sequence[Compared]) -> dict[str, int]:
    """The reasons among ``figures``, numbered from 1 in order."""
    return {note: number for number, note in enumerate(dict.fromkeys(f.note for f in figures if f.note), 1)}


@functools.cache  # several tables print the same networks
def _cost(model: str, se: SEConfig | None) -> Cost:
    """The cost of the network that stands for a row, at its own image size."""
    return model_cost(model) if se is None else model_cost(model, se=se)


def rows_of(model: str) -> list[Row]:
    """What is published of a network, its twin, and its other stride: ``resnet50`` finds what ``resnet50_v1`` is in.

    Raises:
        InputError: nothing is, or there is no such network.
    """
    names = {model, model_spec(model).twin}
    names |= {f"{name}_v1" for name in names}
    rows = [row for row in ROWS if row.model in names]
    if not rows:
        raise InputError(f"the paper prints no cost of {model!r}; `senet cost --all --vs-paper` shows what it prints")
    return rows


def _ours(cost: Cost, quantity: Quantity, row: Row) -> float:
    if quantity == "file_mib":
        return cost.params_with_statistics * BYTES / MIB
    if quantity == "added_m":
        return cost.se_params / 1e6
    if quantity == "added_percent":
        return 100 * cost.se_params / (cost.params - cost.se_params)
    if quantity == "params_m":
        return (cost.params_with_statistics if row.counts_statistics else cost.params) / 1e6
    return cost.paper_mult_adds / (1e9 if quantity == "gflops" else 1e6)
