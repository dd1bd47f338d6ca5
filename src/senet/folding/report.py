"""The result of ``senet.fold``: the folded network, the fate of each gate, and the steps of the search."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from senet.system.text_table import text_table

FOLDED, SCALED, KEPT = "folded", "constant", "kept"


@dataclass(frozen=True)
class SiteFold:
    """One gate.

    Attributes:
        name: its path in the network.
        stage, map_size: its stage, numbered as in the paper (feature maps of the same size form a stage, the largest is
            stage 2), and the spatial size of its feature map.
        channels, parameters: the gate's number of channels and parameters.
        variation: its movement from image to image, relative to its size (``SiteExcitations.variation``).
        fate: ``"folded"`` into other weights, ``"constant"`` (replaced with one factor per channel), or ``"kept"``.
        into: the modules whose weights took the factors.
        reason: why it does not fold, or was kept.
        obstacle: what prevents an exact fold; empty if nothing does.
    """

    name: str
    stage: int
    channels: int
    map_size: tuple[int, ...]
    variation: float
    parameters: int
    fate: str
    into: tuple[str, ...] = ()
    reason: str = ""
    obstacle: str = ""


@dataclass(frozen=True)
class FoldStep:
    """One step of the search: one more gate was folded, and the network was measured.

    Attributes:
        site: the gate; empty in the first row, which is the original network.
        kept: whether the fold was kept. The next step starts from the last kept fold.
        folds: number of folded gates in the measured network.
        accuracy: its accuracy, as returned by ``evaluate``.
        drop: the loss of accuracy relative to the original network, in the same unit.
        parameters: its number of parameters.
        variation: the gate's movement.
        time: its time ÷ the time of the original network (quartile, median, quartile); None if not measured.
    """

    site: str
    kept: bool
    folds: int
    accuracy: float
    drop: float
    parameters: int
    variation: float
    time: tuple[float, float, float] | None = None


@dataclass
class FoldReport:
    """The result of ``senet.fold``; ``print`` shows it as tables.

    Attributes:
        network: the folded copy, in the mode and on the device of the original, which was not changed.
        name: the class name of the network.
        sites: every gate, in the network's order.
        steps: the search, starting with the original network; empty without ``evaluate``.
        parameters: number of parameters (before, after).
        max_drop: the allowed loss of accuracy; None means no limit.
    """

    network: nn.Module = field(repr=False)
    name: str
    sites: tuple[SiteFold, ...]
    steps: tuple[FoldStep, ...]
    parameters: tuple[int, int]
    max_drop: float | None = None

    def with_fate(self, fate: str) -> list[str]:
        """The gates that were ``"folded"``, made ``"constant"``, or ``"kept"``."""
        return [site.name for site in self.sites if site.fate == fate]

    @property
    def final(self) -> FoldStep | None:
        """The last step that was kept; None without ``evaluate``."""
        return next((step for step in reversed(self.steps) if step.kept), None)

    def summary(self) -> str:
        """One or two sentences."""
        folded, scaled, kept = (len(self.with_fate(fate)) for fate in (FOLDED, SCALED, KEPT))
        parts = [f"{folded} of {len(self.sites)} gates of {self.name} folded"]
        parts += [f"{scaled} made constant"] if scaled else []
        parts += [f"{kept} kept"] if kept else []
        before, after = self.parameters
        text = f"{', '.join(parts)}; parameters {before:,} → {after:,} ({100 * (after / before - 1):+.2f} %)"
        if self.final is not None:
            text += (
                f"; accuracy {self.steps[0].accuracy:.2f} → {self.final.accuracy:.2f} ({0.0 - self.final.drop:+.2f})"
            )
            if self.final.time is not None and self.final.site:
                text += f"; time × {self.final.time[1]:.2f}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-serializable values."""
        sites = [asdict(site) | {"variation": _number(site.variation)} for site in self.sites]
        steps = [asdict(step) | {"variation": _number(step.variation)} for step in self.steps]
        before, after = self.parameters
        return {
            "network": self.name,
            "max_drop": self.max_drop,
            "parameters_before": before,
            "parameters_after": after,
            "sites": sites,
            "steps": steps,
        }

    def __str__(self) -> str:
        header = ("gate", "stage", "channels", "map", "moves by", "fate", "into, or why")
        rows = [
            (
                site.name,
                str(site.stage or "—"),
                str(site.channels),
                "×".join(map(str, site.map_size)) or "—",
                "—" if math.isnan(site.variation) else f"{100 * site.variation:.3g} %",
                site.fate,
                ", ".join(site.into) or site.reason,
            )
            for site in self.sites
        ]
        return f"{text_table(header, rows, right=header[1:5])}\n\n{self.summary()}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
