"""Colours and legends of plots of runs."""

from __future__ import annotations

from mhla_lightning.runs.plots import colors, legend_columns


def test_every_run_has_a_colour_of_its_own() -> None:
    for count in (1, 10, 11, 30):
        assert len(set(colors(count))) == count


def test_long_names_stand_below_each_other() -> None:
    assert legend_columns(["a", "b"], 100) == 5
    assert legend_columns(["a", "b" * 40], 100) == 2
    assert legend_columns(["a" * 200], 100) == 1
    assert legend_columns([], 100) == 5
