"""Colours and legends of plots of runs. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib import colormaps

_SWATCH = 7  # letters that the line before a name takes
_MOST = 5  # names beside each other


def colors(count: int) -> list[tuple[float, ...]]:
    """One colour a run: distinct ones up to ten, then along a map."""
    if count <= 10:
        return [tuple(colormaps["tab10"](index)) for index in range(count)]
    return [tuple(colormaps["turbo"](0.05 + 0.9 * index / (count - 1))) for index in range(count)]


def legend_columns(names: Iterable[str], letters: int) -> int:
    """Return how many names of a legend stand side by side.

    Args:
        names: as they are shown.
        letters: that fit the width of the figure.
    """
    longest = max(map(len, names), default=0)
    return max(1, min(_MOST, letters // (longest + _SWATCH)))
