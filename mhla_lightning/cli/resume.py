"""Queue a run again, from its newest checkpoint.

The job runs the code and the recipe of the first submission. RUN is a run id, a run folder or a SLURM job id.
A local run can resume as a job, too: name a profile.

  mhla resume RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mhla_lightning.cli.submit import say_queued
from mhla_lightning.cluster.jobs import current_job, read_job
from mhla_lightning.cluster.profile import Profile, load_profile, minutes, profile_from
from mhla_lightning.cluster.queue import ask
from mhla_lightning.cluster.script import RECIPE_FILE, SubmitOptions, prepare
from mhla_lightning.cluster.slurm import Slurm
from mhla_lightning.cluster.submission import queue_again
from mhla_lightning.config.moved_keys import moved
from mhla_lightning.config.recipes import Recipe, read_run_recipe
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder, find_run, runs_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla resume`."""
    parser.add_argument("run", metavar="RUN", help="run id, run folder or SLURM job id")
    parser.add_argument("--profile", metavar="P", help="site settings (default: those of its submission)")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes (default: as before)")
    parser.add_argument("--devices", type=int, metavar="D", help="processes a node (default: as before)")
    parser.add_argument("--time", metavar="LIMIT", help="of one attempt (default: as before)")
    parser.add_argument("--runs", metavar="DIR", help="folder of all runs (default: $MHLA_RUNS, else ./runs)")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and stop")


def run(args: argparse.Namespace) -> int:
    """Queue the run; return the exit code."""
    one, slurm = find_run(args.run, runs_root(args.runs)), Slurm()
    before = read_job(one) or {}
    if one.finished():
        print(f"run {one.run_id} is finished; there is nothing to resume")
        return 0
    if args.time is not None:
        minutes(args.time)
    profile, options = _profile(args, one, before), _options(args, one, before)
    own = one.path / RECIPE_FILE
    values = moved(read_run_recipe(one, own))
    recipe = Recipe(before.get("recipe", one.run_id), own, values)
    submission = prepare(recipe, profile, {}, options)
    if args.dry_run:
        print(submission.script, end="")
        return 0
    _check_idle(one, slurm)
    profile.check_files()
    job = queue_again(one, submission, profile, options, slurm, {"recipe": recipe.name, "command": sys.argv})
    say_queued({one.run_id: job}, submission, profile, options.time)
    return 0


def _profile(args: argparse.Namespace, one: RunFolder, before: dict[str, Any]) -> Profile:
    if args.profile is not None:
        return load_profile(args.profile)
    if "profile" not in before:
        raise UserError("profile", f"run {one.run_id} was never submitted, so name the profile of a site")
    values = dict(before["profile"])
    return profile_from(values, values.pop("name"))


def _options(args: argparse.Namespace, one: RunFolder, before: dict[str, Any]) -> SubmitOptions:
    return SubmitOptions(
        run_id=one.run_id,
        runs=one.path.parent,
        cwd=Path(before.get("cwd") or Path.cwd()),
        nodes=args.nodes or before.get("nodes"),
        devices=args.devices or before.get("devices"),
        time=args.time or (before.get("time") if args.profile is None else None),
        python=Path((before.get("environment") or {}).get("python") or sys.executable),
    )


def _check_idle(one: RunFolder, slurm: Slurm) -> None:
    job = current_job(one)
    queue = ask(slurm, [job]).get(job) if job is not None else None
    if queue is not None and queue.active:
        raise UserError(
            "run", f"{one.run_id} has an active job, {job} ({queue.state}); mhla cancel {one.run_id} ends it"
        )
