"""Errors that rounding to a dtype leaves, for tests that cannot have measured theirs."""

from __future__ import annotations

import math

import torch

FORWARD = 3
"""Roundings on the way to an output: of the features, of the scores or sums, and of the output."""
GRADIENT = 4 * FORWARD
"""On the way to a gradient: of the features, the output's gradient, both products and the gradient itself, in
the term through the numerator and in the one through the normalizer, whose difference it is."""


def rounding(dtype: torch.dtype, roundings: int) -> float:
    """Return the error of a value after several independent roundings, relative to the largest value.

    Each is at most half of eps in size, and their sum grows with the root of their number; twice that covers
    the largest of some thousand values.
    """
    return torch.finfo(dtype).eps * math.sqrt(roundings)
