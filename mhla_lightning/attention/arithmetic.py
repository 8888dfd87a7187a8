"""Integer arithmetic that counts chunks and blocks."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up: how many groups of `b` hold `a` items."""
    return -(-a // b)
