"""The interval of an error rate over images."""

import math

from senet.errors import InputError


def binomial_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, as fractions in 0..1.

    Wilson (1927) keeps close to its nominal coverage for proportions near 0 and 1, where the usual
    mean ± 1.96 s.d. fails.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise InputError(f"a proportion needs 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + confidence / 2))
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    # Rounding must not push the end of the interval past the value it is about.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)
