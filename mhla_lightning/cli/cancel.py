"""Cancels the SLURM jobs of runs, queued or running. Training saves first where SLURM leaves it the time;
`mhla resume RUN` goes on later.

RUN is a run id, a run folder or a SLURM job id; the id of an array cancels all its runs.
"""

from __future__ import annotations

import argparse

from mhla_lightning.cluster.jobs import current_job, mark_cancelled, unmark_cancelled
from mhla_lightning.cluster.queue import ask
from mhla_lightning.cluster.slurm import Slurm
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder, find_runs, runs_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla cancel`."""
    parser.add_argument("run", nargs="+", metavar="RUN", help="run id, run folder or SLURM job id")
    parser.add_argument(
        "--runs", metavar="DIR", help="where run folders live (default: $MHLA_RUNS, else ./runs)"
    )


def run(args: argparse.Namespace) -> int:
    """Carries out the verb; returns the exit code."""
    root = runs_root(args.runs)
    for one in [one for name in args.run for one in find_runs(name, root)]:
        _cancel(one, Slurm())
    return 0


def _cancel(one: RunFolder, slurm: Slurm) -> None:
    job = current_job(one)
    if job is None:
        raise UserError(f"run {one.run_id} was never submitted; a local run is stopped by Ctrl-C or SIGTERM")
    queue = ask(slurm, [job]).get(job)
    if queue is None or not queue.active:
        print(
            f"job {job} of run {one.run_id} has ended{f' ({queue.state})' if queue else ''}; there "
            "is nothing to cancel"
        )
        return
    mark_cancelled(one, job)  # before: the batch script may look at once
    try:
        slurm.cancel([job])
    except UserError:
        unmark_cancelled(one)  # the job goes on, and its next preemption must bring it back
        raise
    print(
        f"cancelled job {job} of run {one.run_id}, which was {queue.state}; mhla resume {one.run_id} goes on"
    )
