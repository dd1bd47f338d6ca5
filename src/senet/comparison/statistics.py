"""The few statistics a comparison needs: SciPy's two-sided Student-t intervals over seeds, and a verdict."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from senet.errors import InputError

HELPS = "helps"
HURTS = "hurts"
NO_DIFFERENCE = "no difference seen"
UNKNOWN = "one seed cannot say"


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided confidence interval, in the unit of the values.

    ``half_width`` is None where no interval can be given: one value has no spread to measure.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def low(self) -> float | None:
        """Lower end; None where there is no interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end; None where there is no interval."""
        return None if self.half_width is None else self.mean + self.half_width

    def points(self) -> str:
        """As a signed difference in percentage points."""
        sign = f"{round(self.mean, 2) + 0.0:+.2f}"  # + 0.0 turns -0.0 into 0.0
        return f"{sign} points" if self.half_width is None else f"{sign} ± {self.half_width:.2f} points"

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.half_width is None else f"{self.mean:.2f} ± {self.half_width:.2f}"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of ``values`` and the Student-t interval of that mean (n - 1 degrees of freedom).

    Raises:
        InputError: no values, or a value that is not finite.
    """
    if not values:
        raise InputError("cannot average an empty list of results")
    if not all(math.isfinite(value) for value in values):
        raise InputError(f"cannot average results that are not finite numbers: {list(values)}")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, None, 1)
    from scipy.stats import ttest_1samp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal values have no t statistic, but they have an interval
        low, high = ttest_1samp(values, 0.0).confidence_interval(confidence)
    return Interval(mean, float(high - low) / 2, len(values))


def paired_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and t interval of ``first - second``, paired by position (here: by seed): that of SciPy's ``ttest_rel``.

    Pairing removes what both runs share (data order, augmentation, initial weights), so it sees smaller effects
    than two separate intervals would.
    """
    if len(first) != len(second):
        raise InputError(f"a paired difference needs as many results on both sides, got {len(first)} and {len(second)}")
    return mean_interval([a - b for a, b in zip(first, second, strict=True)], confidence)


def widen(interval: Interval, resolution: float) -> Interval:
    """The interval with its half width no smaller than ``resolution``, the smallest step the values can take.

    An error rate on n images moves in steps of 100 / n. Three seeds that happen to differ by exactly the same step
    have no spread at all, and a bare t interval would claim certainty where the measurement cannot even resolve it.
    """
    if interval.half_width is None:
        return interval
    return Interval(interval.mean, max(interval.half_width, resolution), interval.count)


def verdict(difference: Interval) -> str:
    """``difference`` is SE minus plain, in error: below zero all through means that SE helps."""
    if difference.low is None or difference.high is None:
        return UNKNOWN
    if difference.high < 0:
        return HELPS
    return HURTS if difference.low > 0 else NO_DIFFERENCE
