"""The page of plots, from numbers without runs."""

from __future__ import annotations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mhla_lightning.analysis.drawing import DrawnRun, page_figure
from mhla_lightning.analysis.measures import TITLES
from mhla_lightning.analysis.study import LayerStudy, ModelStudy


def drawn(name: str) -> DrawnRun:
    """A run of two layers without maps."""
    heads = {measure: torch.tensor([1.0, 2.0], dtype=torch.float64) for measure in TITLES}
    layers = [LayerStudy({"name": "mhla"}, heads=heads) for _ in range(2)]
    return DrawnRun(name, ModelStudy(layers, samples=1), None, None)


@pytest.mark.parametrize("count", [1, 4, 12])
@pytest.mark.parametrize("length", [5, 27, 60])
def test_the_legend_of_many_runs_is_on_the_page(count: int, length: int) -> None:
    names = [f"{number:02}-" + "mhla-at-2048-tokens-" * 4 for number in range(count)]
    names = [name[:length] for name in names]
    figure = page_figure([drawn(name) for name in names])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = figure.subfigs[0].legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert len({line.get_color() for line in legend.get_lines()}) == count
    box, page = legend.get_window_extent(), figure.bbox
    assert box.x0 >= 0
    assert box.x1 <= page.width
    assert box.y0 >= 0
    panel = figure.subfigs[0].axes[0]  # rows of the legend make the page taller, not the panels lower
    assert panel.bbox.height > 2.5 * figure.dpi
