"""What a study has found, read from its folder. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mhla_lightning.compare.comparison import table_row
from mhla_lightning.compare.fairness import remarks
from mhla_lightning.compare.plan import Measured, table_rows
from mhla_lightning.evidence.claims import Claim, ClaimVerdict, judge
from mhla_lightning.evidence.machine import sessions
from mhla_lightning.evidence.study import ATTENTION, BENCH_ROWS, SPEED
from mhla_lightning.evidence.work import StudyWork
from mhla_lightning.runs.folder import read_object

_SECONDS = {"forward": "forward_seconds", "step": "step_seconds"}


@dataclass(frozen=True)
class StudyResult:
    """A study's numbers.

    Attributes:
        work: the study.
        rows: as in the table of a comparison.
        verdicts: claim and what the seeds say.
        remarks: what else the rows differ in.
        sessions: starts of the study, see machine.StudyStart.
        done, units: runs or repetitions that are finished, and all.
        complete: everything is finished, evaluations and analyses too.
    """

    work: StudyWork
    rows: list[dict[str, Any]]
    verdicts: list[tuple[Claim, ClaimVerdict]]
    remarks: list[str]
    sessions: list[dict[str, Any]]
    done: int
    units: int
    complete: bool


def read_result(work: StudyWork) -> StudyResult:
    """Read what a study has found so far; nothing is measured."""
    rows = _speed_rows(work) if work.plan is None else table_rows(work.plan, _measured(work))
    return StudyResult(
        work,
        rows,
        [(claim, judge(claim, rows)) for claim in work.study.claims],
        [] if work.plan is None else remarks([row for row in rows if row["seeds"]]),
        sessions(work.folder),
        *work.units(),
        work.complete(),
    )


def _measured(work: StudyWork) -> Measured:
    """Return kept evaluations and numbers of attention, by row and seed."""
    assert work.plan is not None
    evaluations = work.evaluations() if work.evaluable() else []
    found: dict[str, dict[int, dict[str, Mapping[str, float]]]] = {row.name: {} for row in work.plan.rows}
    for seed in work.plan.seeds:
        analyzed = {run["run"]: run for run in work.analyzed(seed)}
        for row in work.plan.rows:
            folder = work.plan.run(row, seed)
            numbers: dict[str, Mapping[str, float]] = {}
            for wanted in evaluations:
                kept = wanted.kept(folder) if folder.finished() else None
                if kept is not None:
                    numbers[wanted.name] = kept
            if folder.run_id in analyzed:
                numbers[ATTENTION] = attention_numbers(analyzed[folder.run_id])
            found[row.name][seed] = numbers
    return found


def attention_numbers(run: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers of a run of analysis.json, means over its layers; empty for other content.

    `rank_over_bound` is the largest of all layers and heads that have a bound.
    """
    return _read(_attention, run)


def speed_numbers(found: Mapping[str, Any], operator: str) -> dict[str, float]:
    """Return the milliseconds of an operator by token count, for mhla the slopes too.

    Args:
        found: content of the file of `mhla bench attention --json`; other content gives no number.
        operator: of the rows.
    """
    return _read(lambda content: _speed(content, operator), found)


def _read(
    reader: Callable[[Mapping[str, Any]], dict[str, float]], content: Mapping[str, Any]
) -> dict[str, float]:
    """Read a file that may be damaged or a stranger's: content of another form is no number."""
    try:
        found = reader(content)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return {}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _attention(run: Mapping[str, Any]) -> dict[str, float]:
    layers = [layer for layer in run["layers"] if layer["mean"]]
    found = {}
    for name in dict.fromkeys(name for layer in layers for name in layer["mean"]):
        values = [layer["mean"][name] for layer in layers if layer["mean"].get(name) is not None]
        if values:
            found[str(name)] = math.fsum(values) / len(values)
    bounded = [layer for layer in layers if layer["rank_bound"]]
    shares = [max(layer["heads"]["rank"]) / layer["rank_bound"] for layer in bounded]
    return found | ({"rank_over_bound": max(shares)} if shares else {})


def _speed(found: Mapping[str, Any], operator: str) -> dict[str, float]:
    numbers = {
        f"{name}_{row['tokens']}": float(row[column]) * 1e3
        for row in found["rows"]
        if row["operator"] == operator
        for name, column in _SECONDS.items()
    }
    if operator != "mhla":
        return numbers
    return numbers | {key: float(value) for key, value in found["summary"].items() if key.startswith("slope")}


def _speed_rows(work: StudyWork) -> list[dict[str, Any]]:
    files = {repetition: read_object(work.speeds(repetition)[0]) for repetition in work.study.seeds}
    measured = {
        name: {
            repetition: {SPEED: numbers}
            for repetition, found in files.items()
            if (numbers := speed_numbers(found, name))
        }
        for name in BENCH_ROWS
    }
    return [
        table_row(name, {}, {repetition: {} for repetition in measured[name]}, measured[name])
        for name in BENCH_ROWS
    ]
