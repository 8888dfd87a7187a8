"""What SLURM says about jobs, with and without accounting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mhla_lightning.cluster.slurm import Slurm
from mhla_lightning.errors import UserError

# Of squeue's table every column is as wide as this: separators may stand in a reason, and without a width
# squeue cuts at 20.
_WIDTH = 200
_COLUMNS = ("JobArrayID", "State", "Reason", "RestartCnt", "NodeList", "TimeLeft", "StartTime")
_SACCT = ("JobID", "State", "ExitCode", "NodeList")
ACTIVE = (
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
)


@dataclass(frozen=True)
class QueueState:
    """state: SLURM's word for it. reason: why it waits or has failed. restarts: None where accounting
    alone knows the job.
    """

    state: str
    reason: str | None = None
    restarts: int | None = None
    nodes: str | None = None
    time_left: str | None = None
    start: str | None = None

    @property
    def active(self) -> bool:
        """Whether the job can still do something: waits, runs, or comes back."""
        return self.state in ACTIVE


def ask(slurm: Slurm, jobs: Sequence[str]) -> dict[str, QueueState]:
    """State of each job that SLURM still knows: from squeue, then, for older ones, from sacct where the site
    keeps accounts.

    Raises:
        UserError: SLURM does not answer.
    """
    if not jobs:
        return {}
    form = ",".join(f"{name}:{_WIDTH}" for name in _COLUMNS)
    done = slurm.call(["squeue", "-h", "-r", "-t", "all", "-j", ",".join(jobs), "-O", form])
    if done.returncode and "Invalid job id" not in done.stderr:  # what it says of a single old job
        raise UserError(f"squeue does not answer: {' '.join(done.stderr.split()) or 'no reason given'}")
    found = parse_squeue(done.stdout)
    old = [job for job in jobs if job not in found]
    return {**found, **(_ask_accounting(slurm, old) if old else {})}


def parse_squeue(text: str) -> dict[str, QueueState]:
    """Lines of squeue's table as job id -> state."""
    rows: dict[str, QueueState] = {}
    for line in text.splitlines():
        job, state, reason, restarts, nodes, left, start = (
            line[n * _WIDTH : (n + 1) * _WIDTH].strip() for n in range(len(_COLUMNS))
        )
        if job:
            rows[job] = QueueState(
                state,
                _told(reason),
                int(restarts) if restarts.isdigit() else None,
                _told(nodes),
                _told(left),
                _told(start),
            )
    return rows


def parse_sacct(text: str) -> dict[str, QueueState]:
    """Lines of `sacct -n -P` as job id -> state; `CANCELLED by 1000` is CANCELLED."""
    rows: dict[str, QueueState] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) == len(_SACCT) and fields[0]:
            job, state, code, nodes = fields
            rows[job] = QueueState(
                state.split(" ")[0], None if code == "0:0" else f"exit code {code}", None, _told(nodes)
            )
    return rows


def _ask_accounting(slurm: Slurm, jobs: Sequence[str]) -> dict[str, QueueState]:
    """Empty where there is no sacct or it keeps no accounts."""
    try:
        done = slurm.call(["sacct", "-n", "-P", "-X", "-j", ",".join(jobs), "-o", ",".join(_SACCT)])
    except UserError:
        return {}
    return parse_sacct(done.stdout) if done.returncode == 0 else {}


def _told(text: str) -> str | None:
    return None if text in ("", "N/A", "None", "None assigned", "(null)", "INVALID") else text
