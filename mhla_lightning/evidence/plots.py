"""Pictures of a study: intervals of rows, or lines over sizes.

No pyplot, no display, no torch.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from mhla_lightning.compare.comparison import values_by_seed
from mhla_lightning.compare.student import half_width
from mhla_lightning.evidence.study import Plot
from mhla_lightning.runs.plots import colors

_DPI = 110
_WIDTH = 8.0  # inches


def plot_png(plot: Plot, rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> bytes | None:
    """Return a picture as PNG; None where there is nothing to draw.

    Args:
        plot: what is drawn.
        rows: of a table.
        titles: tag -> heading.
    """
    if not any(values_by_seed(row, tag) for row in rows for tag in plot.metrics):
        return None
    figure = _lines(plot, rows) if plot.x else _intervals(plot, rows, titles)
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    return content.getvalue()


def _interval(row: Mapping[str, Any], tag: str) -> tuple[float, float] | None:
    """Return a mean and half its 95 % interval, 0 where it has none; None without a value."""
    values = list(values_by_seed(row, tag).values())
    return (statistics.fmean(values), half_width(values) or 0.0) if values else None


def _intervals(plot: Plot, rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> Figure:
    """Panels side by side: mean, interval and seeds of every row."""
    height = 1.1 + 0.34 * len(rows)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panels = figure.subplots(1, len(plot.metrics), sharey=True, squeeze=False)[0]
    for panel, tag in zip(panels, plot.metrics, strict=True):
        for place, (row, color) in enumerate(zip(rows, colors(len(rows)), strict=True)):
            found = _interval(row, tag)
            if found is not None:
                seeds = list(values_by_seed(row, tag).values())
                panel.plot(seeds, [place] * len(seeds), ".", color=color, alpha=0.5, markersize=5)
                panel.errorbar(found[0], place, xerr=found[1], color=color, marker="o", capsize=3)
        panel.set_xlabel(titles.get(tag, tag))
        panel.xaxis.set_major_locator(MaxNLocator(nbins=max(3, 8 // len(plot.metrics))))
        panel.margins(y=0.4 / len(rows))
        _dress(panel)
    panels[0].set_yticks(range(len(rows)), [_plain(row["name"]) for row in rows])
    panels[0].invert_yaxis()
    return figure


def _lines(plot: Plot, rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
    panel = figure.subplots()
    for row, color in zip(rows, colors(len(rows)), strict=True):
        found = [_interval(row, tag) for tag in plot.metrics]
        points = [(x, *one) for x, one in zip(plot.x, found, strict=True) if one is not None]
        if points:
            x, mean, half = zip(*points, strict=True)
            panel.errorbar(x, mean, yerr=half, color=color, marker="o", capsize=3, label=_plain(row["name"]))
    if plot.log:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
    elif min(plot.x) > 0 and max(plot.x) / min(plot.x) > math.e:
        panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(list(plot.x)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    panel.set_xlabel(plot.x_title)
    panel.set_ylabel(plot.y_title)
    panel.legend(frameon=False)
    _dress(panel)
    return figure


def _dress(panel: Axes) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _plain(name: str) -> str:
    """Return a name as matplotlib shows it: '$' begins mathematics, '_' hides a label."""
    return name.replace("$", r"\$").removeprefix("_")
