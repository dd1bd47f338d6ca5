"""The gate doctor: findings about each gate, with numbers and a sentence of advice.

All limits are relative to the gate's range: the unit is 1 for a sigmoid, 2 for 2·sigmoid, and 1 for an unbounded gate
(ReLU). "Always" means within two standard deviations of the mean over all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from senet.errors import InputError
from senet.inspection.excitations import Excitations
from senet.inspection.site_excitations import SiteExcitations

KINDS = ("dead", "saturated", "untrained", "input-independent", "class-selective")


@dataclass(frozen=True)
class Thresholds:
    """The limits of the gate doctor, all between 0 and 1.

    Attributes:
        dead: a channel is dead if |mean| + 2 std is at most this, in units of the gate's range.
        saturated: a channel is saturated if |mean| − 2 std is within this distance of the end of the range.
        untrained: a gate is untrained if the mean of each channel is within this distance of the gate function's value
            at 0, and its std is at most ``constant``.
        constant: a channel is constant if its std is at most this.
        independent: a gate is input-independent if its variation (root mean square of the std ÷ that of the mean, over
            channels) is at most this.
        selective: a gate or channel is class-selective if the class explains at least this fraction of its variance.
    """

    dead: float = 0.05
    saturated: float = 0.05
    untrained: float = 0.02
    constant: float = 0.01
    independent: float = 0.05
    selective: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise InputError(f"Thresholds: {field.name}={value!r} is not allowed; give a fraction between 0 and 1")

    def sentence(self) -> str:
        """The limits as text, to be printed under the findings."""
        return (
            f"dead: |mean| + 2 std ≤ {self.dead:g}; saturated: |mean| − 2 std within {self.saturated:g} of the end; "
            f"untrained: every mean within {self.untrained:g} of the value at 0 and std ≤ {self.constant:g} "
            f"(in units of the gate's range); input-independent: variation ≤ {self.independent:g}; class-selective: "
            f"the class explains ≥ {self.selective:g} of the variance"
        )


@dataclass(frozen=True)
class Finding:
    """A finding about a gate: its kind (one of ``KINDS``), the channels concerned, its value, and advice."""

    kind: str
    channels: tuple[int, ...]
    value: float
    sentence: str


@dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of one gate.

    Attributes:
        site: the gate's name.
        channels: its number of channels.
        mean: mean excitation over all channels and images.
        std: standard deviation from image to image, as root mean square over channels.
        variation: std relative to the mean; 0 for a constant gate. Gates with the least variation fold best.
        selectivity: fraction of the variance that the class explains; NaN if there are no classes to compare.
        dead, saturated, constant: number of such channels.
        findings: the most urgent first; empty for a healthy gate.
    """

    site: str
    channels: int
    mean: float
    std: float
    variation: float
    selectivity: float
    dead: int
    saturated: int
    constant: int
    findings: tuple[Finding, ...]

    def row(self) -> dict[str, Any]:
        """One row of a table or CSV file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        advice = " ".join(finding.sentence for finding in self.findings) or HEALTHY
        return values | {"findings": ", ".join(finding.kind for finding in self.findings), "advice": advice}


HEALTHY = "Nothing odd: the gate opens and closes with the image."
Numbers = dict[str, Any]


def diagnose(excitations: Excitations, thresholds: Thresholds | None = None) -> list[Diagnosis]:
    """Find dead, saturated, untrained, input-independent, and class-selective gates.

    Returns:
        one diagnosis per gate, in the network's order.

    Raises:
        InputError: fewer than two images were recorded.
    """
    if excitations.images < 2:
        raise InputError(f"{excitations.images} images are too few to diagnose a gate; record at least 2")
    lines = thresholds if thresholds is not None else Thresholds()
    return [_examine(site, lines) for site in excitations]


def _examine(site: SiteExcitations, lines: Thresholds) -> Diagnosis:
    mean, std = site.overall()
    unit = site.high if np.isfinite(site.high) else 1.0
    size, spread = np.abs(mean) / unit, std / unit
    numbers: Numbers = {
        "unit": unit,
        "dead": np.flatnonzero(size + 2 * spread <= lines.dead),
        "saturated": np.flatnonzero((size - 2 * spread >= 1 - lines.saturated) & np.isfinite(site.high)),
        "constant": np.flatnonzero(spread <= lines.constant),
        "offset": float(np.max(np.abs(mean - site.neutral))) / unit,
        "variation": site.variation(),
        "selectivity": site.selectivity(),
        "selective": np.flatnonzero(site.channel_selectivity() >= lines.selective),
    }
    found = [finding for check in _CHECKS if (finding := check(site, numbers, lines)) is not None]
    return Diagnosis(
        site=site.name,
        channels=site.channels,
        mean=float(mean.mean()),
        std=float(np.sqrt(np.mean(std**2))),
        variation=numbers["variation"],
        selectivity=numbers["selectivity"],
        **{name: len(numbers[name]) for name in ("dead", "saturated", "constant")},
        findings=tuple(found),
    )


def _is_untrained(site: SiteExcitations, numbers: Numbers, lines: Thresholds) -> bool:
    return numbers["offset"] <= lines.untrained and len(numbers["constant"]) == site.channels


def _untrained(site: SiteExcitations, numbers: Numbers, lines: Thresholds) -> Finding | None:
    if not _is_untrained(site, numbers, lines):
        return None
    effect = {0.0: "zeroes its feature map", 1.0: "does nothing"}.get(site.neutral, "shrinks its feature map")
    return Finding(
        "untrained",
        tuple(range(site.channels)),
        numbers["offset"],
        f"All {site.channels} channels stay at {site.neutral:g}, as in a gate that has learned nothing: it only "
        f"{effect}. Train it, with a higher learning rate than the rest if the network was trained before, or remove "
        "it.",
    )


def _dead(site: SiteExcitations, numbers: Numbers, lines: Thresholds) -> Finding | None:
    channels = numbers["dead"]
    if not len(channels) or _is_untrained(site, numbers, lines):
        return None
    return Finding(
        "dead",
        tuple(channels.tolist()),
        len(channels) / site.channels,
        f"{len(channels)} of {site.channels} channels stay at 0 for every image (|mean| + 2 std ≤ "
        f"{lines.dead * numbers['unit']:g}), so their computation is wasted. Prune these channels and their filters; "
        "if they closed early in training, lower the learning rate.",
    )


def _saturated(site: SiteExcitations, numbers: Numbers, lines: Thresholds) -> Finding | None:
    channels = numbers["saturated"]
    if not len(channels):
        return None
    most = len(channels) > site.channels / 2
    advice = "The gate does little here: try `senet fold`." if most else "No action needed: these channels are kept."
    return Finding(
        "saturated",
        tuple(channels.tolist()),
        len(channels) / site.channels,
        f"{len(channels)} of {site.channels} channels stay at the end of the range, {site.high:g}, for every image. "
        + advice,
    )


def _independent(site: SiteExcitations, numbers: Numbers, lines: Thresholds) -> Finding | None:
    if numbers["variation"] > lines.independent or _is_untrained(site, numbers, lines):
        return None
    return Finding(
        "input-independent",
        tuple(numbers["constant"].tolist()),
        numbers["variation"],
        f"The gate moves by {100 * numbers['variation']:.2g} % of its size from image to image, so it is nearly a "
        "fixed factor per channel. Fold it: `senet fold` moves the factors into neighboring weights.",
    )


def _selective(site: SiteExcitations, numbers: Numbers, lines: Thresholds) -> Finding | None:
    share = numbers["selectivity"]
    if not share >= lines.selective or numbers["variation"] <= lines.independent:
        return None
    count = len(numbers["selective"])
    return Finding(
        "class-selective",
        tuple(numbers["selective"].tolist()),
        share,
        f"The class explains {100 * share:.0f} % of the gate's variance, and at least {100 * lines.selective:g} % in "
        f"{count} of {site.channels} channels. Keep this gate: it treats classes differently.",
    )


_CHECKS: Sequence[Callable[[SiteExcitations, Numbers, Thresholds], Finding | None]] = (
    _untrained,
    _dead,
    _saturated,
    _independent,
    _selective,
)
