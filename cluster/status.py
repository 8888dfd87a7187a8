"""The rows of `mhla status`: SLURM's queue, the run's progress, the script's record."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from mhla_lightning.cluster.jobs import attempts, current_job, is_marked_cancelled
from mhla_lightning.cluster.queue import QueueState, ask
from mhla_lightning.cluster.slurm import Slurm
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder, newest_checkpoint, read_object
from mhla_lightning.runs.lock import is_held

# SLURM's words for the ends that the batch script records, for jobs that SLURM has forgotten.
_ENDED = {
    "finished": "COMPLETED",
    "failed": "FAILED",
    "mistake": "FAILED",
    "cancelled": "CANCELLED",
    "preempted": "PREEMPTED",
}
# States of runs that were never submitted.
_LOCAL = {"running": "LOCAL", "finished": "FINISHED", "failed": "FAILED", "preempted": "STOPPED"}


def status_rows(runs: Sequence[RunFolder], slurm: Slurm) -> list[dict[str, Any]]:
    """Return one row a run, in the order of `runs`; unknown values are None.

    The keys are those of :func:`_row`. `job_time_left` is as SLURM writes it; `run_time_left` follows from
    the speed so far.
    """
    jobs = {run.run_id: current_job(run) for run in runs}
    known, trouble = _ask(slurm, [job for job in jobs.values() if job is not None])
    return [_row(run, jobs[run.run_id], known, trouble) for run in runs]


def _ask(slurm: Slurm, jobs: list[str]) -> tuple[dict[str, QueueState], str | None]:
    """(states by job, why SLURM does not answer): the other columns need no SLURM."""
    try:
        return ask(slurm, jobs), None
    except UserError as error:
        return {}, str(error)


def _row(
    run: RunFolder, job: str | None, known: dict[str, QueueState], trouble: str | None
) -> dict[str, Any]:
    progress = read_object(run.progress)
    queue = known.get(job) if job is not None else None
    if queue is None:
        queue = (
            _remembered(run, job, progress, trouble)
            if job is not None
            else QueueState(_local_state(run, progress), progress.get("reason"))
        )
    restarts = queue.restarts
    if restarts is None and job is not None:
        restarts = max((attempt.restart for attempt in attempts(run) if attempt.job == job), default=0)
    newest = newest_checkpoint(run.path)
    return {
        "run": run.run_id,
        "job": job,
        "state": "REQUEUED" if queue.state == "PENDING" and restarts else queue.state,
        "reason": queue.reason,
        "restarts": restarts,
        "nodes": queue.nodes,
        "step": progress.get("step", 0),
        "max_steps": progress.get("max_steps"),
        "loss": progress.get("loss"),
        "samples_per_second": progress.get("samples_per_second"),
        "job_time_left": queue.time_left if queue.active else None,
        "run_time_left": _time_left(progress) if queue.state not in _ENDED.values() else None,
        "checkpoint": newest.name if newest else None,
    }


def _local_state(run: RunFolder, progress: dict[str, Any]) -> str:
    state = progress.get("state", "")
    if state == "running" and not is_held(run.path):
        state = "preempted"  # killed, before it could say so
    return _LOCAL.get(state, "NEW")


def _remembered(run: RunFolder, job: str, progress: dict[str, Any], trouble: str | None) -> QueueState:
    """The state of a job that SLURM has forgotten, from the run's own files."""
    if progress.get("state") == "finished":
        return QueueState("COMPLETED", trouble or progress.get("reason"))
    if is_marked_cancelled(run, job):
        return QueueState("CANCELLED", trouble)
    of_job = [attempt for attempt in attempts(run) if attempt.job == job]
    if not of_job or of_job[-1].kind == "started":
        return QueueState(
            "UNKNOWN",
            trouble or "SLURM has forgotten the job, and its script recorded no end; mhla resume queues it",
        )
    last = of_job[-1]
    reason = progress.get("reason") if last.kind == "preempted" else None
    code = f"exit code {last.code}" if last.code else None
    return QueueState(_ENDED[last.kind], trouble or reason or code, last.restart)


def _time_left(progress: dict[str, Any]) -> str | None:
    """The time that the remaining steps take at the speed of the last report."""
    step, speed = progress.get("step"), progress.get("samples_per_second")
    if not step or not speed or progress.get("state") not in ("running", "preempted"):
        return None
    samples_a_step = progress["consumed"] / step
    return str(timedelta(seconds=round((progress["max_steps"] - step) * samples_a_step / speed)))
