"""Intervals and paired tests against known tables and scipy's numbers."""

from __future__ import annotations

import math
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from mhla_lightning.compare.comparison import table_row
from mhla_lightning.compare.significance import (
    as_json,
    difference_table,
    paired_difference,
    paired_differences,
)
from mhla_lightning.compare.student import half_width, quantile, share_within


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_the_quantiles_are_those_of_the_tables(degrees: int, t: float) -> None:
    assert quantile(degrees) == pytest.approx(t, rel=1e-5)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 29, 200])
def test_the_shares_are_those_of_scipy(degrees: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for t in (0.0, 0.3, 1.0, 2.5, 40.0):
        assert share_within(t, degrees) == pytest.approx(1 - 2 * stats.t.sf(t, degrees), abs=1e-12)
    assert share_within(math.inf, degrees) == pytest.approx(1)


def row(name: str, values: dict[int, float], tag: str = "val/top1") -> dict[str, Any]:
    return table_row(name, {}, {seed: {"last": {tag: value}} for seed, value in values.items()})


LINEAR = row("linear", {0: 0.70, 1: 0.72, 2: 0.69})
MHLA = row("mhla", {0: 0.95, 1: 0.96, 2: 0.93, 3: 0.1})


def test_the_paired_test_is_that_of_scipy_over_common_seeds() -> None:
    stats = pytest.importorskip("scipy.stats")
    found = paired_difference(MHLA, LINEAR, "val/top1")
    assert found is not None
    expected = stats.ttest_rel([0.95, 0.96, 0.93], [0.70, 0.72, 0.69])
    interval = expected.confidence_interval(0.95)
    assert found.seeds == 3
    assert found.p == pytest.approx(expected.pvalue)
    assert found.mean == pytest.approx((interval.low + interval.high) / 2)
    assert found.half == pytest.approx((interval.high - interval.low) / 2)


def test_the_ends_of_a_paired_test() -> None:
    same = paired_difference(LINEAR, LINEAR, "val/top1")
    assert same is not None
    assert (same.mean, same.half, same.p) == (0, 0, 1)
    shifted = row("shifted", {0: 0.5, 1: 0.5})
    moved = paired_difference(row("moved", {0: 0.75, 1: 0.75}), shifted, "val/top1")
    assert moved is not None
    assert (moved.mean, moved.p) == (0.25, pytest.approx(0))
    assert paired_difference(row("one", {0: 0.5}), LINEAR, "val/top1") is None
    assert paired_difference(row("nan", {0: 0.5, 1: math.nan}), LINEAR, "val/top1") is None
    assert half_width([1.0]) is None


def test_evaluations_are_compared_too() -> None:
    rows = [
        table_row(
            name,
            {},
            {0: {"last": {}}, 1: {"last": {}}},
            {seed: {"samples": {"fd": value + seed}} for seed in (0, 1)},
        )
        for name, value in (("a", 3.0), ("b", 5.0))
    ]
    (found,) = as_json(list(paired_differences(rows, "b", ["samples/fd"])))
    assert (found["row"], found["against"], found["mean"]) == ("a", "b", -2.0)


def test_the_table_has_the_interval_of_each_row_and_each_difference() -> None:
    rows = [LINEAR, MHLA]
    table = difference_table(rows, list(paired_differences(rows, "linear", ["val/top1"])), "val/top1")
    assert table is not None
    console = Console(width=120, file=StringIO())
    console.print(table)
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert any("linear" in line and "0.7033 ±0.0379" in line for line in lines)
    assert any("mhla" in line and "+0.2433 ±0.0143" in line and "0.00019" in line for line in lines)
    assert difference_table(rows, [], "val/top1") is None
