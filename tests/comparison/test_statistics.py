import numpy as np
import pytest
from scipy import stats

from senet.comparison.statistics import Interval, mean_interval, paired_interval, verdict, widen
from senet.errors import InputError


@pytest.mark.parametrize("count", [2, 3, 10])
def test_mean_interval_is_scipys(count):
    values = np.random.default_rng(count).normal(5, 2, count)
    interval = mean_interval(values.tolist())
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-12)


def test_paired_interval_agrees_with_the_paired_t_test():
    a, b = [3.0, 2.5, 4.0, 3.5], [3.4, 2.6, 4.1, 4.2]
    expected = stats.ttest_rel(a, b).confidence_interval(0.9)
    interval = paired_interval(a, b, 0.9)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected), rel=1e-12)


def test_one_value_has_no_interval():
    interval = mean_interval([4.2])
    assert (interval.low, interval.high) == (None, None)
    assert verdict(interval) == "one seed cannot say"
    assert str(interval) == "4.20"


@pytest.mark.parametrize(
    ("mean", "half", "word"),
    [(-1, 0.5, "helps"), (1, 0.5, "hurts"), (-0.2, 0.5, "no difference seen"), (-0.5, 0.5, "no difference seen")],
)
def test_verdict(mean, half, word):
    assert verdict(Interval(mean, half, 3)) == word


def test_equal_differences_do_not_claim_certainty():
    # Three seeds that all differ by one of 200 images.
    difference = paired_interval([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert (difference.mean, difference.half_width) == (-0.5, 0.0)
    assert mean_interval([7.0, 7.0]).half_width == paired_interval([7.0, 7.0], [7.0, 7.0]).half_width == 0.0
    assert verdict(difference) == "helps"
    assert verdict(widen(difference, 100 / 200)) == "no difference seen"
    assert widen(Interval(1, 2, 3), 0.5).half_width == 2


def test_signed_points():
    assert Interval(-0.001, 0.5, 3).points() == "+0.00 ± 0.50 points"
    assert Interval(-0.2, None, 1).points() == "-0.20 points"


def test_bad_values_are_refused():
    with pytest.raises(InputError, match="empty"):
        mean_interval([])
    with pytest.raises(InputError, match="finite"):
        mean_interval([1.0, float("nan")])
    with pytest.raises(InputError, match="both sides"):
        paired_interval([1.0], [1.0, 2.0])
