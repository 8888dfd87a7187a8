"""Cancel the SLURM jobs of runs, queued or running.

Training saves first, where SLURM leaves it the time; `mhla resume RUN` queues the run again. RUN is a run
id, a run folder or a SLURM job id; the id of an array cancels all its runs.

  mhla cancel RUN
"""

from __future__ import annotations

import argparse

from mhla_lightning.cluster.jobs import current_job, mark_cancelled, unmark_cancelled
from mhla_lightning.cluster.queue import ask
from mhla_lightning.cluster.slurm import Slurm
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder, find_runs, runs_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla cancel`."""
    parser.add_argument("run", nargs="+", metavar="RUN", help="run id, run folder or SLURM job id")
    parser.add_argument("--runs", metavar="DIR", help="folder of all runs (default: $MHLA_RUNS, else ./runs)")


def run(args: argparse.Namespace) -> int:
    """Cancel the jobs; return the exit code."""
    root = runs_root(args.runs)
    for one in [one for name in args.run for one in find_runs(name, root)]:
        _cancel(one, Slurm())
    return 0


def _cancel(one: RunFolder, slurm: Slurm) -> None:
    job = current_job(one)
    if job is None:
        raise UserError("run", f"{one.run_id} was never submitted; Ctrl-C or SIGTERM stops a local run")
    queue = ask(slurm, [job]).get(job)
    if queue is None or not queue.active:
        print(
            f"job {job} of run {one.run_id} has ended{f' ({queue.state})' if queue else ''}; there "
            "is nothing to cancel"
        )
        return
    mark_cancelled(one, job)  # first: the batch script looks as soon as the job ends
    try:
        slurm.cancel([job])
    except UserError:
        unmark_cancelled(one)  # the job still runs, and must be queued again after a preemption
        raise
    print(
        f"cancelled job {job} of run {one.run_id}, which was {queue.state}; mhla resume {one.run_id} queues "
        "it again"
    )
