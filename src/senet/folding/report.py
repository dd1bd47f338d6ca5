"""What ``senet.fold`` did: the folded network, what became of each gate, and the steps of the search."""

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
        name: its path.
        stage, map_size: the paper's number of the stage (maps of one size are a stage, the largest is 2), and the size.
        channels, parameters: of the gate.
        variation: how far it moves from image to image, against its size (``SiteExcitations.variation``).
        fate: ``"folded"`` into other weights, ``"constant"``: replaced by a factor a channel, ``"kept"``.
        into: the modules whose weights took the factors.
        reason: why it does not fold, or was kept, in words.
        obstacle: what keeps it from folding exactly; empty where nothing does.
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
    """One step of the search: a gate more was folded and the network measured.

    Attributes:
        site: the gate; empty in the first row, the network as it was.
        kept: whether the fold was kept; the next step starts from the last kept one.
        folds: gates folded in the network that was measured.
        accuracy: of that network, as ``evaluate`` gives it.
        drop: how much lower that is than at the start, in the same unit.
        parameters: of that network.
        variation: of the gate.
        time: its time ÷ that of the network at the start: quartile, median, quartile; None where not measured.
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
        network: a folded copy, in the mode and on the device of the original, which was not changed.
        name: the class of the network.
        sites: every gate, in the network's order.
        steps: the search, from the network as it was; empty without ``evaluate``.
        parameters: of the network (before, after).
        max_drop: what the accuracy was allowed to lose; None: anything.
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
        """JSON values."""
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
