"""Statistics of a comparison: two-sided Student-t intervals over seeds (from SciPy), and the verdict."""

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

    ``half_width`` is None if there is no interval, as for a single value.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def low(self) -> float | None:
        """Lower end, or None if there is no interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end, or None if there is no interval."""
        return None if self.half_width is None else self.mean + self.half_width

    def points(self) -> str:
        """The interval as a signed difference in percentage points."""
        sign = f"{round(self.mean, 2) + 0.0:+.2f}"  # + 0.0 turns -0.0 into 0.0
        return f"{sign} points" if self.half_width is None else f"{sign} ± {self.half_width:.2f} points"

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.half_width is None else f"{self.mean:.2f} ± {self.half_width:.2f}"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of ``values`` and its Student-t interval (n - 1 degrees of freedom).

    Raises:
        InputError: No values, or a value that is not finite.
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
        warnings.simplefilter("ignore", RuntimeWarning)  # equal values have no t statistic, but an interval
        low, high = ttest_1samp(values, 0.0).confidence_interval(confidence)
    return Interval(mean, float(high - low) / 2, len(values))


def paired_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and t interval of ``first - second``, paired by position (here: by seed), as in SciPy's ``ttest_rel``.

    Pairing removes the effects that both runs share (data order, augmentation, initial weights), so it detects smaller
    differences than two separate intervals.
    """
    if len(first) != len(second):
        raise InputError(
            f"a paired difference needs equally many results on both sides, got {len(first)} and {len(second)}"
        )
    return mean_interval([a - b for a, b in zip(first, second, strict=True)], confidence)


def widen(interval: Interval, resolution: float) -> Interval:
    """Widen the interval to a half width of at least ``resolution``, the smallest step of the values.

    An error rate on n images changes in steps of 100 / n. If the differences of all seeds happen to be equal, they have
    no spread, and the t interval would claim a precision that the measurement does not have.
    """
    if interval.half_width is None:
        return interval
    return Interval(interval.mean, max(interval.half_width, resolution), interval.count)


def verdict(difference: Interval) -> str:
    """The verdict on ``difference``, the error of SE minus plain: SE helps if the whole interval is below zero."""
    if difference.low is None or difference.high is None:
        return UNKNOWN
    if difference.high < 0:
        return HELPS
    return HURTS if difference.low > 0 else NO_DIFFERENCE
