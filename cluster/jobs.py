"""The jobs of a run: the file job.json, and the attempts that the batch script records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import FORMAT, RunFolder, read_object, write_json, write_text

ATTEMPTS, CANCELLED = "slurm/attempts", "slurm/cancelled"
_KINDS = ("started", "finished", "preempted", "failed", "mistake", "cancelled")


@dataclass(frozen=True)
class Attempt:
    """One line of the batch script's record; an empty field is None.

    Args:
        job: SLURM's id of the job.
        restart: how often SLURM had started the job before.
        kind: started, finished, preempted, failed, mistake or cancelled.
        code: exit code.
        begun, reached: optimizer steps done at the start and at the end.
        time: seconds since 1970.
    """

    job: str
    restart: int
    kind: str
    code: int | None
    begun: int | None
    reached: int | None
    time: int


def read_job(run: RunFolder) -> dict[str, Any] | None:
    """Read the job.json of a run; None when the run was never submitted, or the file is damaged.

    Raises:
        UserError: another version wrote it.
    """
    facts = read_object(run.job) or None
    if facts is not None and facts.get("format") != FORMAT:
        raise UserError(
            str(run.job),
            f"the file has format {facts.get('format')}, and this version reads format {FORMAT}; submit the "
            "recipe again under another `run_id`",
        )
    return facts


def write_job(run: RunFolder, facts: dict[str, Any]) -> None:
    """Replace the job.json of a run at once."""
    write_json(run.job, {"format": FORMAT, **facts})


def current_job(run: RunFolder) -> str | None:
    """Return the newest job of a run; None when it was never submitted."""
    jobs = (read_job(run) or {}).get("jobs") or []
    return jobs[-1] if jobs else None


def attempts(run: RunFolder) -> list[Attempt]:
    """Return the attempts that the batch script has recorded, oldest first."""
    path = run.path / ATTEMPTS
    text = path.read_text(errors="replace") if path.is_file() else ""
    rows = [line.split() for line in text.split("\n")]
    whole = [row for row in rows if _is_attempt(row)]  # a full disk or a lost node may cut the last one
    return [
        Attempt(job, int(n), kind, _number(code), _number(begun), _number(at), int(when))
        for job, n, kind, code, begun, at, when in whole
    ]


def _is_attempt(row: list[str]) -> bool:
    return len(row) == 7 and row[2] in _KINDS and row[1].isdecimal() and row[6].isdecimal()


def mark_cancelled(run: RunFolder, job: str) -> None:
    """Tell the batch script that the job is cancelled and must not be queued again."""
    write_text(run.path / CANCELLED, f"{job}\n")


def unmark_cancelled(run: RunFolder) -> None:
    """Remove the mark of :func:`mark_cancelled`."""
    (run.path / CANCELLED).unlink(missing_ok=True)


def is_marked_cancelled(run: RunFolder, job: str) -> bool:
    """Return whether `mhla cancel` has ended this job."""
    path = run.path / CANCELLED
    return path.is_file() and path.read_text(errors="replace").strip() == job


def code_folder(run: RunFolder) -> Path:
    """Return the folder with the copy of the code."""
    return run.path / "slurm" / "code"


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
