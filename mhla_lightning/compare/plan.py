"""What a comparison trains: its rows, its seeds and their run folders. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.compare.child import ChildRun
from mhla_lightning.compare.comparison import headline, table_row
from mhla_lightning.compare.variants import VariantRow, arguments, merged
from mhla_lightning.config.recipes import Recipe, apply_overrides
from mhla_lightning.errors import UserError
from mhla_lightning.evaluation import RequestedEvaluation
from mhla_lightning.runs.folder import RunFolder, check_run_id, read_object

_LOG_LINES = 15

Measured = Mapping[str, Mapping[int, Mapping[str, Mapping[str, float]]]]
"""row name -> seed -> name of an evaluation -> numbers"""


@dataclass(frozen=True)
class Comparison:
    """What to train.

    Args:
        recipe: as written.
        rows, seeds: every pair is a run.
        common: overrides of all rows.
        folder: holds the runs, their logs, and what is written about them.
        evaluations: run on every finished run.
    """

    recipe: Recipe
    rows: Sequence[VariantRow]
    seeds: Sequence[int]
    common: Mapping[str, Any]
    folder: Path
    evaluations: Sequence[RequestedEvaluation] = ()

    def runs(self, seed_by_seed: bool = False) -> list[tuple[VariantRow, int, RunFolder]]:
        """Return every run, row by row or seed by seed."""
        pairs = [(row, seed) for row in self.rows for seed in self.seeds]
        if seed_by_seed:
            pairs = [(row, seed) for seed in self.seeds for row in self.rows]
        return [(row, seed, self.run(row, seed)) for row, seed in pairs]

    def run(self, row: VariantRow, seed: int) -> RunFolder:
        """Return the folder of a run, which need not exist."""
        return RunFolder(self.folder / check_run_id(row.run_id(seed)))

    def values(self, row: VariantRow) -> dict[str, Any]:
        """Return the overrides of a row and of all rows."""
        return merged(self.common, row.overrides)

    def child(self, row: VariantRow, seed: int) -> ChildRun:
        """Return a run as a process to start."""
        folder = self.run(row, seed)
        words = arguments({"seed_everything": seed, **self.values(row)})
        return ChildRun(str(self.recipe.path), folder, words, self.log(row, seed))

    def log(self, row: VariantRow, seed: int) -> Path:
        """Return the file of all that a run says."""
        return self.folder / f"{self.run(row, seed).run_id}.log"


def check_rows(plan: Comparison) -> None:
    """Build every row and evaluation without training.

    A typo in the last row shows before the first row has trained for hours.

    Raises:
        UserError: a row is wrong; the reason names it.
    """
    from mhla_lightning.config.resolve import resolve

    for row in plan.rows:
        try:
            resolved = resolve(apply_overrides(plan.recipe.values, plan.values(row)))
            for wanted in plan.evaluations:
                wanted.check(resolved.task, resolved.data)
        except UserError as error:
            raise UserError(error.key, f"row '{row.name}': {error.reason}") from error


def make_folder(folder: Path) -> None:
    """Make the folder of a comparison. Raises UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            str(folder), f"cannot write: {error.strerror}; choose another place with `runs` or $MHLA_RUNS"
        ) from error


def finished_line(row: VariantRow, seed: int, folder: RunFolder, reused: bool) -> str:
    """Return what a finished run has reached, in one line."""
    summary = read_object(folder.summary)
    tag = headline(summary["last"])
    value = f"{tag} {summary['last'][tag]:.4f}, " if tag else ""
    return f"{row.name}, seed {seed}: {value}{summary['seconds']:.1f} s" + (
        " (finished before)" if reused else ""
    )


def log_end(log: Path) -> list[str]:
    """Return the last lines of the log of a child."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]


def measure_runs(
    plan: Comparison,
    on_measured: Callable[[VariantRow, int, str, Mapping[str, float], bool], None],
) -> Measured:
    """Run the evaluations on every run; earlier results are read.

    Args:
        plan: its runs are finished.
        on_measured: called with row, seed, name of the evaluation, numbers and whether they were kept.

    Raises:
        UserError: a run cannot be measured; the reason names it.
    """
    measured: dict[str, dict[int, dict[str, Mapping[str, float]]]] = {
        row.name: {seed: {} for seed in plan.seeds} for row in plan.rows
    }
    for wanted in plan.evaluations:
        for row, seed, _ in plan.runs():
            found, kept = measure_run(plan, wanted, row, seed)
            on_measured(row, seed, wanted.name, found, kept)
            measured[row.name][seed][wanted.name] = found
    return measured


def measure_run(
    plan: Comparison, wanted: RequestedEvaluation, row: VariantRow, seed: int
) -> tuple[dict[str, float], bool]:
    """Return the numbers of an evaluation of one run, and whether they were measured before.

    Raises:
        UserError: the run cannot be measured; the reason names it.
    """
    folder = plan.run(row, seed)
    kept = wanted.kept(folder)
    try:
        return (kept, True) if kept is not None else (wanted.measure(folder), False)
    except UserError as error:
        raise UserError(error.key, f"row '{row.name}', seed {seed}: {error.reason}") from error


def table_rows(plan: Comparison, measured: Measured) -> list[dict[str, Any]]:
    """Return the rows of table.json, from those runs that are finished."""
    finished = {
        row.name: {
            seed: read_object(folder.summary)
            for seed in plan.seeds
            if (folder := plan.run(row, seed)).finished()
        }
        for row in plan.rows
    }
    return [
        table_row(row.name, row.overrides, finished[row.name], measured.get(row.name, {}))
        for row in plan.rows
    ]
