"""What the page says about the folder of `mhla compare`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.compare.comparison import COSTS, cost, score
from mhla_lightning.compare.significance import PairedDifference
from mhla_lightning.compare.student import half_width
from mhla_lightning.errors import UserError
from mhla_lightning.evaluation import EVALUATIONS
from mhla_lightning.report.folder import MOST_NAME, SafeFolder, finite, mapping, mappings
from mhla_lightning.report.run import RunReport, read_run
from mhla_lightning.runs.folder import check_run_id, is_run

_MOST_ROWS = 64
_LONGEST_REMARK = 1000  # characters
_MOST_SEEDS = 64
_MOST_TESTS = 4096


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        values: of the seeds.
        mean: of these.
        half: half the width of the 95 % interval of the mean (Student's t); None with one seed.
    """

    values: list[float]
    mean: float
    half: float | None

    def text(self) -> str:
        """Return mean and interval with the same decimals."""
        return score(self.mean, self.half).replace("±", "± ")


@dataclass
class RowReport:
    """A row of a comparison.

    Attributes:
        name: of the row.
        scores: tag -> interval.
        attention: the operators of its layers, in words; empty where the table has none.
        costs: key of COSTS -> text.
        runs: of its seeds, those whose folder is there.
    """

    name: str
    scores: dict[str, Interval]
    attention: str
    costs: dict[str, str]
    runs: list[RunReport]


@dataclass
class ComparisonReport:
    """A comparison as the page shows it.

    Attributes:
        name: of its folder.
        recipe: name of the recipe.
        rows: of the table.
        differences: paired tests of rows against one row, from the table.
        remarks: about differences between rows, from the table.
        notes: about what the page leaves out.
    """

    name: str
    recipe: str
    rows: list[RowReport]
    differences: list[PairedDifference]
    remarks: list[str]
    notes: list[str]


def read_comparison(path: Path) -> ComparisonReport:
    """Read the folder of a comparison that may come from a stranger.

    Raises:
        UserError: table.json is damaged or has no rows.
    """
    folder = SafeFolder(path)
    table = folder.object(folder.path / "table.json")
    rows = mappings(table.get("rows"))
    if not rows:
        raise UserError(
            str(path / "table.json"), "it holds no rows; the command of the comparison writes it again"
        )
    if len(rows) > _MOST_ROWS:
        folder.note(f"The comparison has {len(rows)} rows; the page shows {_MOST_ROWS}.")
    shown = [_row(folder, row) for row in rows[:_MOST_ROWS]]
    found = table.get("remarks")
    remarks = [str(line)[:_LONGEST_REMARK] for line in found[:_MOST_ROWS]] if isinstance(found, list) else []
    recipe = str(table.get("recipe", ""))[:MOST_NAME]
    tested = [one for found in mappings(table.get("differences")) if (one := _difference(found)) is not None]
    return ComparisonReport(folder.path.name, recipe, shown, tested[:_MOST_TESTS], remarks, folder.notes)


def _difference(found: dict[str, Any]) -> PairedDifference | None:
    """Return a paired test of table.json; None where it is damaged or not finite."""
    texts = [found.get(key) for key in ("row", "against", "tag")]
    numbers = [finite(found.get(key)) for key in ("mean", "half", "p")]
    seeds = found.get("seeds")
    if not all(isinstance(text, str) for text in texts) or None in numbers or type(seeds) is not int:
        return None
    row, against, tag = (str(text)[:MOST_NAME] for text in texts)
    mean, half, p = (float(number or 0.0) for number in numbers)
    return PairedDifference(row, against, tag, seeds, mean, half, p)


def _row(folder: SafeFolder, row: dict[str, Any]) -> RowReport:
    seeds = mappings(row.get("seeds"))[:_MOST_SEEDS]
    numbers = [_scores(seed) for seed in seeds]
    tags = list(dict.fromkeys(tag for found in numbers for tag in found))
    means = mapping(row.get("mean"))
    name = str(row.get("name", ""))[:MOST_NAME]
    return RowReport(
        name,
        {tag: interval([found[tag] for found in numbers if tag in found]) for tag in tags},
        str(row.get("attention") or "")[:_LONGEST_REMARK],
        {key: cost(key, finite(means.get(key))) for key in COSTS},
        [run for seed in seeds if (run := _run(folder, name, seed)) is not None],
    )


def _scores(seed: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of validation and of evaluations of one seed."""
    last = {tag: value for tag, value in mapping(seed.get("last")).items() if tag.startswith("val")}
    measured = {
        f"{name}/{number}": value
        for name, found in mapping(seed.get("eval")).items()
        if name in EVALUATIONS
        for number, value in mapping(found).items()
    }
    return {tag: number for tag, value in (last | measured).items() if (number := finite(value)) is not None}


def _run(folder: SafeFolder, name: str, seed: dict[str, Any]) -> RunReport | None:
    """Return the run of a seed; None, with a note, where its folder is not in the comparison's."""
    run_id = seed.get("run_id")
    try:
        path = folder.path / check_run_id(run_id if isinstance(run_id, str) else "")
    except UserError:
        path = None
    if path is None or not is_run(path) or not path.resolve().is_relative_to(folder.path):
        number = str(seed.get("seed"))[:20]
        folder.note(f"Row {name}, seed {number} has no run folder here, so its curves are missing.")
        return None
    return read_run(path)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of some seeds and its 95 % interval.

    Args:
        values: at least one, finite.
    """
    return Interval(list(values), statistics.fmean(values), half_width(values))
