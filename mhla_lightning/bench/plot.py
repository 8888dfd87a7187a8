"""A plot of times over sizes, one line for each operator.

matplotlib is used without pyplot: no global state, no display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Line = Sequence[tuple[float, float]]
"""Points (size, milliseconds)."""


def write_plot(
    path: Path, title: str, sizes: str, measured: Mapping[str, Line], modelled: Mapping[str, Line]
) -> None:
    """Write a PNG with logarithmic axes.

    Modelled lines are dashed, in the colour of the measured ones.

    Args:
        path: of the file.
        title: above the plot.
        sizes: what the horizontal axis counts.
        measured, modelled: a line by the name of the row; empty lines are left out.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, (name, line) in enumerate(measured.items()):
        color = colors[number % len(colors)]
        panel.plot(*zip(*line, strict=True), color=color, marker="o", markersize=4, label=name)
        if modelled.get(name):
            label = f"{name}, modelled"
            panel.plot(*zip(*modelled[name], strict=True), color=color, linestyle="--", label=label)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel(sizes)
    panel.set_ylabel("milliseconds")
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(title, loc="left", fontsize=10)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)
