"""The page of plots: numbers by layer of every run, and maps of chosen queries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from mhla_lightning.analysis.measures import TITLES
from mhla_lightning.analysis.pictures import on_grid
from mhla_lightning.analysis.study import LayerStudy, ModelStudy
from mhla_lightning.runs.plots import colors, legend_columns

_PANELS = ("effective_rank", "rank", "relative_entropy", "locality", "own_block")
_LAYERS = 4  # layers whose maps are drawn
_KEYS = 64  # tokens of text before a query that are drawn
_WIDTH = 15.0  # inches
_LEGEND_LETTERS = 130  # that fit the width
_LEGEND_ROW = 0.22  # inches


@dataclass(frozen=True)
class DrawnRun:
    """A run on the page.

    Attributes:
        name: shown.
        study: of its model.
        pixels: of the first sample, (frames, height, width, 3); None for text.
        text: of each shown token; None for pixels.
    """

    name: str
    study: ModelStudy
    pixels: np.ndarray | None
    text: Sequence[str] | None


def write_page(path: Path, runs: Sequence[DrawnRun]) -> None:
    """Write a PNG with the numbers of all runs, and the maps of each."""
    figure = page_figure(runs)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def page_figure(runs: Sequence[DrawnRun]) -> Figure:
    """Return the page: numbers at the top, then the maps, run after run."""
    mapped = [run for run in runs if any(layer.maps is not None for layer in run.study.layers)]
    columns = legend_columns([run.name for run in runs], _LEGEND_LETTERS)
    heights = [3.8 + _LEGEND_ROW * math.ceil(len(runs) / columns), *(_height(run) for run in mapped)]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_numbers(parts[0], {run.name: run.study for run in runs}, columns)
    for part, run in zip(parts[1:], mapped, strict=True):
        _draw_maps(part, run)
    return figure


def _draw_numbers(part: SubFigure, studies: Mapping[str, ModelStudy], columns: int) -> None:
    """Draw a panel a measure: a line is the mean over heads, a dot is a head."""
    panels = part.subplots(1, len(_PANELS))
    for panel, measure in zip(panels, _PANELS, strict=True):
        for (name, found), color in zip(studies.items(), colors(len(studies)), strict=True):
            kept = [(place, layer.heads[measure]) for place, layer in enumerate(found.layers) if layer.heads]
            panel.plot(
                [place for place, _ in kept],
                [float(heads.mean()) for _, heads in kept],
                color=color,
                label=name,
            )
            for place, heads in kept:
                panel.scatter([place] * len(heads), heads.tolist(), color=color, s=9, alpha=0.6)
        if measure == "own_block":
            first = next((layer for found in studies.values() for layer in found.layers if layer.heads), None)
            if first is not None:
                panel.axhline(float(first.heads["uniform_own_block"].mean()), color="gray", ls=":", lw=1)
        panel.set_title(TITLES[measure], fontsize=11)
        panel.set_xlabel("layer")
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = panels[0].get_legend_handles_labels()
    part.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=10)
    part.suptitle("lines: mean over heads; dots: heads; dotted: uniform attention", fontsize=10)


def _drawn_layers(found: ModelStudy) -> list[tuple[int, LayerStudy]]:
    """Return at most _LAYERS layers that have maps, spread from the first to the last."""
    kept = [(number, layer) for number, layer in enumerate(found.layers) if layer.maps is not None]
    places = np.linspace(0, len(kept) - 1, min(_LAYERS, len(kept))).round().astype(int)
    return [kept[place] for place in places]


def _height(run: DrawnRun) -> float:
    """Return the inches of a run's maps."""
    queries, layers = len(run.study.queries), len(_drawn_layers(run.study))
    if run.text is not None:
        return 0.6 + queries * (0.8 + 0.25 * layers)
    if len(run.study.grid) == 3:
        return 0.6 + (layers + 1) * 1.1 * queries
    return 0.6 + 2.4 * queries


def _draw_maps(part: SubFigure, run: DrawnRun) -> None:
    scales = "one scale a query" if run.text is not None else "each map has its own scale"
    part.suptitle(f"{run.name}: shares of the keys, mean over heads; {scales}", fontsize=12)
    if run.text is not None:
        _draw_text(part, run, run.text)
    elif len(run.study.grid) == 3:
        _draw_frames(part, run)
    else:
        _draw_images(part, run)


def _draw_images(part: SubFigure, run: DrawnRun) -> None:
    """Draw a row a query: the image, and each layer's map over it."""
    layers, queries = _drawn_layers(run.study), run.study.queries
    panels = part.subplots(len(queries), 1 + len(layers), squeeze=False)
    rows, columns = run.study.grid if len(run.study.grid) == 2 else (1, run.study.grid[0])
    for row, query in enumerate(queries):
        for column, panel in enumerate(panels[row]):
            _bare(panel)
            if run.pixels is not None:
                panel.imshow(run.pixels[0], extent=(0, columns, rows, 0))
            if column:
                number, layer = layers[column - 1]
                _overlay(panel, _map(run.study, layer, row).reshape(rows, columns), (columns, rows))
                if row == 0:
                    panel.set_title(f"layer {number}: {layer.attention['name']}", fontsize=10)
            elif row == 0:
                panel.set_title("image and query", fontsize=10)
            _mark(panel, query % columns, query // columns)


def _draw_frames(part: SubFigure, run: DrawnRun) -> None:
    """Draw the frames side by side, and each layer's map over them; a group of rows a query."""
    layers, queries = _drawn_layers(run.study), run.study.queries
    times, rows, columns = run.study.grid
    panels = part.subplots(len(queries) * (1 + len(layers)), 1, squeeze=False)[:, 0]
    strip = None
    if run.pixels is not None:
        frames = run.pixels[:: max(1, len(run.pixels) // times)][:times]
        strip = np.concatenate(list(frames), axis=1)
    for place, panel in enumerate(panels):
        row, line = divmod(place, 1 + len(layers))
        _bare(panel)
        if strip is not None:
            panel.imshow(strip, extent=(0, times * columns, rows, 0))
        label = "frames and query"
        if line:
            number, layer = layers[line - 1]
            shares = np.concatenate(list(_map(run.study, layer, row)), axis=1)
            _overlay(panel, shares, (times * columns, rows))
            label = f"layer {number}:\n{layer.attention['name']}"
        panel.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
        time, place_in_frame = divmod(run.study.queries[row], rows * columns)
        _mark(panel, time * columns + place_in_frame % columns, place_in_frame // columns)
        for border in range(1, times):
            panel.axvline(border * columns, color="white", lw=1)


def _draw_text(part: SubFigure, run: DrawnRun, text: Sequence[str]) -> None:
    """Draw a panel a query: a line a layer, a column a token before the query."""
    layers, found = _drawn_layers(run.study), run.study
    assert found.shown is not None
    shown = found.shown.tolist()
    panels = part.subplots(len(found.queries), 1, squeeze=False)[:, 0]
    for row, (panel, query) in enumerate(zip(panels, found.queries, strict=True)):
        last = shown.index(query) + 1
        first = max(0, last - _KEYS)
        lines = np.stack([_heads_mean(layer, row)[first:last] for _, layer in layers])
        panel.imshow(lines, aspect="auto", cmap="magma", interpolation="nearest", vmin=0)
        panel.set_yticks(
            range(len(layers)), [f"{n}: {layer.attention['name']}" for n, layer in layers], fontsize=8
        )
        panel.set_xticks(range(last - first), [_plain(piece) for piece in text[first:last]], fontsize=7)
        panel.set_title(f"query: token {query}, the last one shown; {first} earlier ones are not", fontsize=9)


def _plain(text: str) -> str:
    """Return text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _heads_mean(layer: LayerStudy, query: int) -> np.ndarray:
    assert layer.maps is not None
    return layer.maps[:, query].mean(0).numpy()


def _map(found: ModelStudy, layer: LayerStudy, query: int) -> np.ndarray:
    """Return the shares of the keys on the grid."""
    assert layer.maps is not None
    assert found.shown is not None
    return on_grid(layer.maps[:, query].mean(0), found.shown, found.grid)


def _overlay(panel: Axes, shares: np.ndarray, size: tuple[int, int]) -> None:
    panel.imshow(
        shares, extent=(0, size[0], size[1], 0), cmap="magma", alpha=0.75, interpolation="nearest", vmin=0
    )


def _mark(panel: Axes, column: int, row: int) -> None:
    """Draw the border of a token."""
    x, y = [column, column + 1, column + 1, column, column], [row, row, row + 1, row + 1, row]
    panel.plot(x, y, color="cyan", lw=1.8)


def _bare(panel: Axes) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
