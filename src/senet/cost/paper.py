"""Published complexity compared with ours, under the paper's conventions.

The paper counts the multiply-adds of convolutions and fully connected layers and, for SE, the pooling but not the
scaling. The figures of SE-VGG-16 (15.48) and SE-MobileNet (572) imply this: neither fits without the pooling, or with
the scaling.
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
BYTES = 4  # per float32 value
# Allowed difference from the printed figure, both rounded to the printed digits. A released file holds names, shapes,
# and settings in addition to its values.
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
        row, quantity: the published row and the quantity in it.
        printed: the figure as printed.
        ours: our count in the same unit, unrounded.
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
        """Our figure, rounded to the printed digits, minus the printed figure."""
        return round(round(self.ours, self.digits) - float(self.printed), self.digits)

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the limit: 0.02 GFLOPs, 1 MiB for a file, zero otherwise."""
        return abs(self.difference) <= ALLOWED.get(self.quantity, 0)

    def cells(self) -> tuple[str, str, str]:
        """Table cells: the printed figure, ours with two more digits, and the difference."""
        difference = f"{self.difference:+.{self.digits}f}".replace("-", "−") if self.difference else "0"
        return self.printed, f"{self.ours:.{self.digits + 2}f}", difference

    @property
    def note(self) -> str:
        """Why the figures disagree; empty if they agree."""
        return self.row.notes.get(self.quantity, "")


def compared(rows: Sequence[Row] = ROWS) -> list[Compared]:
    """Compare every figure of ``rows`` with ours; nothing is allocated."""
    return [
        Compared(row, quantity, printed, _ours(_cost(row.model, row.se), quantity, row))
        for row in rows
        for quantity, printed in row.printed.items()
    ]


def numbered_notes(figures: Sequence[Compared]) -> dict[str, int]:
    """The distinct notes in ``figures``, numbered from 1 in order."""
    return {note: number for number, note in enumerate(dict.fromkeys(f.note for f in figures if f.note), 1)}


@functools.cache  # several tables print the same networks
def _cost(model: str, se: SEConfig | None) -> Cost:
    """The cost of the network that represents a row, at its default image size."""
    return model_cost(model) if se is None else model_cost(model, se=se)


def rows_of(model: str) -> list[Row]:
    """The published rows of a network, its twin, and its v1 form: ``resnet50`` also finds ``resnet50_v1``.

    Raises:
        InputError: nothing is published, or there is no such network.
    """
    names = {model, model_spec(model).twin}
    names |= {f"{name}_v1" for name in names}
    rows = [row for row in ROWS if row.model in names]
    if not rows:
        raise InputError(f"the paper prints no cost for {model!r}; `senet cost --all --vs-paper` shows what it prints")
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
