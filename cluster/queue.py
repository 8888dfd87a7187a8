"""The state of jobs in SLURM's queue, with and without its accounting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mhla_lightning.cluster.slurm import Slurm
from mhla_lightning.errors import UserError

# Width of every column of squeue's table. A reason may hold any separator, and without a width squeue cuts at
# 20 characters.
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
    """The state of one job.

    Args:
        state: SLURM's word for it.
        reason: why the job waits or has failed.
        restarts: how often SLURM has queued it again; None where only the accounting knows the job.
        nodes: names of its nodes.
        time_left: of this attempt, as SLURM writes it.
        start: of this attempt, as SLURM writes it.
    """

    state: str
    reason: str | None = None
    restarts: int | None = None
    nodes: str | None = None
    time_left: str | None = None
    start: str | None = None

    @property
    def active(self) -> bool:
        """Whether the job waits, runs or will run again."""
        return self.state in ACTIVE


def ask(slurm: Slurm, jobs: Sequence[str]) -> dict[str, QueueState]:
    """Return the state of each job that SLURM still knows.

    squeue knows recent jobs; sacct knows older ones, where the site keeps accounts.

    Raises:
        UserError: SLURM does not answer.
    """
    if not jobs:
        return {}
    form = ",".join(f"{name}:{_WIDTH}" for name in _COLUMNS)
    done = slurm.call(["squeue", "-h", "-r", "-t", "all", "-j", ",".join(jobs), "-O", form])
    if done.returncode and "Invalid job id" not in done.stderr:  # squeue's answer for a single old job
        raise UserError(
            "squeue", f"SLURM does not answer: {' '.join(done.stderr.split()) or 'no reason given'}"
        )
    found = parse_squeue(done.stdout)
    old = [job for job in jobs if job not in found]
    return {**found, **(_ask_accounting(slurm, old) if old else {})}


def parse_squeue(text: str) -> dict[str, QueueState]:
    """Read the lines of squeue's table as job id -> state."""
    rows: dict[str, QueueState] = {}
    for line in text.splitlines():
        job, state, reason, restarts, nodes, left, start = (
            line[n * _WIDTH : (n + 1) * _WIDTH].strip() for n in range(len(_COLUMNS))
        )
        if job:
            rows[job] = QueueState(
                state,
                _known(reason),
                int(restarts) if restarts.isdigit() else None,
                _known(nodes),
                _known(left),
                _known(start),
            )
    return rows


def parse_sacct(text: str) -> dict[str, QueueState]:
    """Read the lines of `sacct -n -P` as job id -> state; `CANCELLED by 1000` is CANCELLED."""
    rows: dict[str, QueueState] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) == len(_SACCT) and fields[0]:
            job, state, code, nodes = fields
            rows[job] = QueueState(
                state.split(" ")[0], None if code == "0:0" else f"exit code {code}", None, _known(nodes)
            )
    return rows


def _ask_accounting(slurm: Slurm, jobs: Sequence[str]) -> dict[str, QueueState]:
    """The states that sacct knows; none where a site has no sacct or keeps no accounts."""
    try:
        done = slurm.call(["sacct", "-n", "-P", "-X", "-j", ",".join(jobs), "-o", ",".join(_SACCT)])
    except UserError:
        return {}
    return parse_sacct(done.stdout) if done.returncode == 0 else {}


def _known(text: str) -> str | None:
    """A field of SLURM's; None where it is one of SLURM's words for nothing."""
    return None if text in ("", "N/A", "None", "None assigned", "(null)", "INVALID") else text
