"""What a few seeds can tell: the paired test of a difference. Needs no torch and no scipy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from mhla_lightning.compare.comparison import score, values_by_seed
from mhla_lightning.compare.student import half_width, share_within


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two rows over the seeds that both have.

    Attributes:
        row: name of the row.
        against: name of the row that is subtracted.
        tag: of the scores.
        seeds: number of pairs.
        mean: of the differences.
        half: half the width of its 95 % interval.
        p: of the two-sided paired t test: how often equal rows differ by as much. It is not corrected for
            the number of rows.
    """

    row: str
    against: str
    tag: str
    seeds: int
    mean: float
    half: float
    p: float


def paired_difference(row: Mapping[str, Any], other: Mapping[str, Any], tag: str) -> PairedDifference | None:
    """Compare two rows of table.json over the seeds that both have; None for fewer than two.

    A seed gives both rows the same order of samples and the same noise, so its two scores are a pair.
    """
    mine, theirs = values_by_seed(row, tag), values_by_seed(other, tag)
    differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    half = half_width(differences)
    if half is None:
        return None
    mean, count = statistics.fmean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(count)
    t = abs(mean) / error if error else (math.inf if mean else 0.0)
    return PairedDifference(
        row["name"], other["name"], tag, count, mean, half, 1 - share_within(t, count - 1)
    )


def paired_differences(
    rows: Sequence[Mapping[str, Any]], against: str, tags: Sequence[str]
) -> Iterator[PairedDifference]:
    """Yield the difference of every other row from one row, tag after tag."""
    base = next(row for row in rows if row["name"] == against)
    for tag in tags:
        for row in rows:
            found = paired_difference(row, base, tag) if row is not base else None
            if found is not None:
                yield found


def as_json(found: Sequence[PairedDifference]) -> list[dict[str, Any]]:
    """Return differences for table.json; an infinite number is None."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in one
        }
        for one in (asdict(difference).items() for difference in found)
    ]


def difference_table(
    rows: Sequence[Mapping[str, Any]], found: Sequence[PairedDifference], tag: str
) -> Table | None:
    """Return a table of means and differences with intervals.

    None where no row shares two seeds with the row that is subtracted.
    """
    differences = {one.row: one for one in found if one.tag == tag}
    if not differences:
        return None
    against = next(iter(differences.values())).against
    table = Table(
        title=Text(f"{tag}, with 95 % intervals over seeds"),
        caption="paired t test over seeds; p is not corrected for the number of rows",
    )
    table.add_column("row", overflow="fold")
    for heading in ("mean", f"difference from {against}", "p"):
        table.add_column(Text(heading), justify="right")
    for row in rows:
        values = list(values_by_seed(row, tag).values())
        if not values:
            continue
        mean, one = score(statistics.fmean(values), half_width(values)), differences.get(row["name"])
        shown = ("", "") if one is None else (f"{one.mean:+.4f} ±{one.half:.4f}", f"{one.p:.2g}")
        table.add_row(Text(row["name"]), mean, *shown)
    return table
