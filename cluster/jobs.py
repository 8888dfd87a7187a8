"""job.json, which ties a run to its jobs, and the attempts that the batch script records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import FORMAT, RunFolder, read_json, write_json, write_text

ATTEMPTS, CANCELLED = "slurm/attempts", "slurm/cancelled"


@dataclass(frozen=True)
class Attempt:
    """One line of the batch script's record.

    kind: started, finished, preempted, failed, mistake or cancelled. code: exit code. begun, reached:
        optimizer steps. Empty fields are None.
    """

    job: str
    restart: int
    kind: str
    code: int | None
    begun: int | None
    reached: int | None
    time: int


def read_job(run: RunFolder) -> dict[str, Any] | None:
    """job.json of a run; None when it was never submitted.

    Raises:
        UserError: written by another version.
    """
    facts: dict[str, Any] | None = read_json(run.job)
    if facts is not None and facts.get("format") != FORMAT:
        raise UserError(
            f"{run.job} has format {facts.get('format')}; this version reads format {FORMAT}; submit "
            "the recipe again under another --run-id"
        )
    return facts


def write_job(run: RunFolder, facts: dict[str, Any]) -> None:
    """Replaces job.json at once."""
    write_json(run.job, {"format": FORMAT, **facts})


def current_job(run: RunFolder) -> str | None:
    """The newest job of a run."""
    jobs = (read_job(run) or {}).get("jobs") or []
    return jobs[-1] if jobs else None


def attempts(run: RunFolder) -> list[Attempt]:
    """What the batch script recorded, oldest first."""
    path = run.path / ATTEMPTS
    rows = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    whole = [row for row in rows if len(row) == 7]  # a full disk or a lost node may cut the last one
    return [
        Attempt(job, int(n), kind, _number(code), _number(begun), _number(at), int(when))
        for job, n, kind, code, begun, at, when in whole
    ]


def mark_cancelled(run: RunFolder, job: str) -> None:
    """Tells the batch script that this end is wanted: it must not queue the job again."""
    write_text(run.path / CANCELLED, f"{job}\n")


def unmark_cancelled(run: RunFolder) -> None:
    """Takes the mark back."""
    (run.path / CANCELLED).unlink(missing_ok=True)


def is_marked_cancelled(run: RunFolder, job: str) -> bool:
    """Whether `mhla cancel` ended this job."""
    path = run.path / CANCELLED
    return path.is_file() and path.read_text().strip() == job


def code_folder(run: RunFolder) -> Path:
    """Where the copy of the code lies."""
    return run.path / "slurm" / "code"


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
