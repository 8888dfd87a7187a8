"""curves.png of a comparison: training loss and validation over steps.

Needs no torch. matplotlib is used without pyplot: no global state, no display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mhla_lightning.compare.comparison import headline
from mhla_lightning.evaluation.tags import higher_is_better
from mhla_lightning.runs.plots import colors, legend_columns

Curve = list[tuple[int, float]]  # (step, value)
Runs = Mapping[str, Sequence[Mapping[str, Curve]]]  # row name -> one mapping tag -> curve for each seed

_UNITS = {"top1": "share of samples", "top5": "share of samples", "bits_per_byte": "bits"}
_FEW = 12  # points that are worth a marker each
_LEGEND_LETTERS = 150  # that fit the width of a figure
_NAME_LENGTH = 48


def write_curves(path: Path, title: str, runs: Runs) -> None:
    """Draws all rows and writes a PNG."""
    figure = curves_figure(title, runs)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def curves_figure(title: str, runs: Runs) -> Figure:
    """Left the training loss, right the validation; thin lines are seeds, bold ones their mean."""
    columns = legend_columns(map(_short, runs), _LEGEND_LETTERS)
    figure = Figure(figsize=(12, 5 + 0.2 * math.ceil(len(runs) / columns)), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    width = smoothing_width(runs)
    _draw(left, runs, "train/loss", width)
    left.set_ylabel("train/loss" + (f" (running mean of {width} points)" if width > 1 else ""))
    tag = headline(tag for seeds in runs.values() for series in seeds for tag in series)
    _draw(right, runs, tag or "val/loss", 1)
    right.set_ylabel(_with_unit(tag or "val/loss"))
    figure.suptitle(title, fontsize=12)
    _legend(figure, (left, right), columns)
    return figure


def _legend(figure: Figure, panels: Sequence[Axes], columns: int) -> None:
    """One for both panels: a row has one colour."""
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
        )


def _draw(panel: Axes, runs: Runs, tag: str, width: int) -> None:
    for color, (name, seeds) in zip(colors(len(runs)), runs.items(), strict=True):
        curves = [finite(series.get(tag, [])) for series in seeds]
        curves = [smooth(curve, width) for curve in curves if curve]
        if len(curves) > 1:
            for curve in curves:
                panel.plot(*_xy(curve), color=color, linewidth=0.8, alpha=0.4)
        average = mean_curve(curves)
        if average:
            marker = "o" if len(average) <= _FEW else None
            panel.plot(
                *_xy(average), color=color, linewidth=2.0, marker=marker, markersize=4, label=_short(name)
            )
    _dress(panel, tag)


def _dress(panel: Axes, tag: str) -> None:
    panel.set_xlabel("optimizer steps")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(
        "validation" if tag.startswith("val") else "training", loc="left", fontsize=10, color="0.35"
    )
    if not panel.lines:
        panel.text(0.5, 0.5, f"no {tag} logged", transform=panel.transAxes, ha="center", color="0.4")
    elif higher_is_better(tag):
        panel.set_ylim(top=min(1.01, panel.get_ylim()[1]))


def smoothing_width(runs: Runs) -> int:
    """Points of the running mean of the training loss: odd, light, none at all on short curves."""
    longest = max(
        (len(series.get("train/loss", [])) for seeds in runs.values() for series in seeds), default=0
    )
    return min(51, longest // 40 | 1)


def smooth(curve: Curve, width: int) -> Curve:
    """Return the centred running mean over `width` points.

    It is shorter at the ends, so that the first and the last point keep their values.
    """
    reach = width // 2
    result = []
    for index, (step, _) in enumerate(curve):
        near = min(reach, index, len(curve) - 1 - index)
        window = curve[index - near : index + near + 1]
        result.append((step, sum(value for _, value in window) / len(window)))
    return result


def finite(curve: Curve) -> Curve:
    """Return the points without inf and nan, one a step, in order of steps.

    A resumed run may validate a step twice; the last value counts.
    """
    return sorted({step: value for step, value in curve if math.isfinite(value)}.items())


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean over seeds, at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    return [(step, sum(table[step] for table in tables) / len(tables)) for step in steps]


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def _with_unit(tag: str) -> str:
    unit = _UNITS.get(tag.rpartition("/")[2])
    return f"{tag} ({unit})" if unit else tag


def _short(name: str) -> str:
    """Return a legend entry.

    matplotlib leaves out labels that begin with '_' and reads '$' as mathematics.
    """
    text = name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"
    return text.replace("$", r"\$").removeprefix("_")
