"""What a few seeds can tell: the interval of a mean, and the paired test of a difference.

Student's t distribution, exact for whole degrees of freedom. Needs no torch and no scipy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from rich.table import Table
from rich.text import Text

from mhla_lightning.compare.comparison import score

CONFIDENCE = 0.95


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


def share_within(t: float, degrees: int) -> float:
    """Return the probability that |T| <= t (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        t: at least 0.
        degrees: of freedom, at least 1.
    """
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for step in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (step - 1) / step
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + sine * total)


@cache
def quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return t such that |T| <= t has this probability, by bisection."""
    low, high = 0.0, 1.0
    while share_within(high, degrees) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if share_within(middle, degrees) < confidence else (low, middle)
    return high


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def values_by_seed(row: Mapping[str, Any], tag: str) -> dict[int, float]:
    """Return the scores of a row of table.json by seed; seeds without a finite one are left out."""
    found: dict[int, float] = {}
    for seed in row["seeds"]:
        name, _, number = tag.rpartition("/")
        measured = seed.get("eval", {}).get(name, {})
        value = seed.get("last", {}).get(tag, measured.get(number))
        if value is not None and math.isfinite(value):
            found[seed["seed"]] = float(value)
    return found


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
