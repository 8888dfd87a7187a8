"""What a study has found, read from its folder. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mhla_lightning.compare.comparison import table_row
from mhla_lightning.compare.fairness import remarks
from mhla_lightning.compare.plan import Measured, table_rows
from mhla_lightning.evidence.claims import Claim, Verdict, judge
from mhla_lightning.evidence.machine import sessions
from mhla_lightning.evidence.study import BENCH_ROWS
from mhla_lightning.evidence.work import Work
from mhla_lightning.runs.folder import read_object

ATTENTION, SPEED = "attention", "speed"
"""First part of the tags of numbers of attention, and of speed."""
_SECONDS = {"forward": "forward_seconds", "step": "step_seconds"}


@dataclass(frozen=True)
class StudyResult:
    """A study's numbers.

    Attributes:
        work: the study.
        rows: as in the table of a comparison.
        verdicts: claim and what the seeds say.
        remarks: what else the rows differ in.
        sessions: starts of the study, see machine.Session.
        done, units: runs or repetitions that are finished, and all.
        complete: everything is finished, evaluations and analyses too.
    """

    work: Work
    rows: list[dict[str, Any]]
    verdicts: list[tuple[Claim, Verdict]]
    remarks: list[str]
    sessions: list[dict[str, Any]]
    done: int
    units: int
    complete: bool


def read_result(work: Work) -> StudyResult:
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


def _measured(work: Work) -> Measured:
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
    """Return numbers of a run of analysis.json, means over its layers.

    `rank_over_bound` is the largest of all layers and heads that have a bound.
    """
    layers = [layer for layer in run.get("layers", []) if layer.get("mean")]
    names = dict.fromkeys(name for layer in layers for name in layer["mean"])
    found = {}
    for name in names:
        values = [value for layer in layers if (value := layer["mean"].get(name)) is not None]
        if values:
            found[name] = math.fsum(values) / len(values)
    shares = [
        max(layer["heads"]["rank"]) / layer["rank_bound"]
        for layer in layers
        if layer.get("rank_bound") and layer["heads"].get("rank")
    ]
    if shares:
        found["rank_over_bound"] = max(shares)
    return found


def _speed_rows(work: Work) -> list[dict[str, Any]]:
    measured: dict[str, dict[int, dict[str, Mapping[str, float]]]] = {name: {} for name in BENCH_ROWS}
    for repetition in work.study.seeds:
        found = read_object(work.speeds(repetition)[0])
        for name in BENCH_ROWS if found else ():
            numbers = {
                f"{key}_{row['tokens']}": float(row[column]) * 1e3
                for row in found["rows"]
                if row["operator"] == name
                for key, column in _SECONDS.items()
            }
            slopes = {key: value for key, value in found["summary"].items() if key.startswith("slope")}
            measured[name][repetition] = {SPEED: numbers | (slopes if name == "mhla" else {})}
    return [
        table_row(name, {}, {repetition: {} for repetition in measured[name]}, measured[name])
        for name in BENCH_ROWS
    ]
