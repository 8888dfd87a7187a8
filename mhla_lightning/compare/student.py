"""The interval of a mean over a few seeds, by Student's t distribution.

It is exact for whole degrees of freedom.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache

CONFIDENCE = 0.95


def share_within(t: float, degrees: int) -> float:
    """Return the probability that |T| <= t (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        t: at least 0.
        degrees: of freedom, at least 1.
    """
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for step in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (step - 1) / step
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + sine * total)


@cache
def quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return t such that |T| <= t has this probability, by bisection."""
    low, high = 0.0, 1.0
    while share_within(high, degrees) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if share_within(middle, degrees) < confidence else (low, middle)
    return high


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
