"""Queue a recipe as a SLURM job: the same recipe, on a cluster.

RECIPE is a name of `mhla recipes list` or the path of a YAML file. Overrides follow as --dotted.key VALUE.

  mhla submit classification/deit_tiny_mhla_mnist_cpu --profile cpu --nodes 2
  mhla submit RECIPE --profile my_site.yaml --nodes 4 --time 12:00:00 --array 0,1,2 --after 4711

A profile holds the settings of a site; the packaged ones are examples of each style: venv, conda, modules,
pyxis, apptainer, cpu. The job saves before its time is over or when it is preempted, queues itself again,
and resumes with the next step.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from mhla_lightning.cli.numbers import parse_ranges
from mhla_lightning.cli.output import check_json, write_json
from mhla_lightning.cluster.jobs import current_job
from mhla_lightning.cluster.profile import Profile, load_profile, minutes
from mhla_lightning.cluster.script import Submission, SubmitOptions, prepare
from mhla_lightning.cluster.slurm import Slurm
from mhla_lightning.cluster.submission import new_run_id, queue_new
from mhla_lightning.config.quick_checks import check_names
from mhla_lightning.config.recipes import apply_overrides, load_recipe, parse_overrides
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import check_run_id, find_run, runs_root, shortened

TAKES_OVERRIDES = True
_MOST_SEEDS = 10_000  # each has a folder, and a copy of the code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla submit`."""
    parser.usage = "%(prog)s RECIPE --profile P [options] [--dotted.key VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="name of a packaged recipe, or path of a YAML file")
    parser.add_argument(
        "--profile",
        required=True,
        metavar="P",
        help="site settings: a YAML file, or a name (packaged, or in ~/.config/mhla/profiles)",
    )
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="nodes (default: the recipe's trainer.num_nodes)"
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="D",
        help="processes a node (default: the profile's GPUs, on CPUs the recipe's trainer.devices)",
    )
    parser.add_argument(
        "--time", metavar="LIMIT", help="of one attempt, as SLURM writes it (default: the profile's)"
    )
    parser.add_argument("--array", metavar="SEEDS", help="a run for each seed, such as 0,1,2 or 0-2")
    parser.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="JOB",
        help="start after this job, or the job of this run, has succeeded",
    )
    parser.add_argument("--runs", metavar="DIR", help="folder of all runs (default: $MHLA_RUNS, else ./runs)")
    parser.add_argument(
        "--run-id",
        metavar="NAME",
        help="name of the run (default: recipe name and a hash, with a number where the name is taken)",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="skip the checks of `mhla plan`; SLURM still checks the job"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and stop")
    parser.add_argument("--json", metavar="FILE", help="write run and job ids as JSON too")


def run(args: argparse.Namespace) -> int:
    """Queue the runs; return the exit code."""
    check_json(args.json)
    recipe, overrides = load_recipe(args.recipe), parse_overrides(args.overrides)
    profile, runs = load_profile(args.profile), runs_root(args.runs)
    seeds = parse_seeds(args.array)
    if args.time is not None:
        minutes(args.time)
    name = (
        check_run_id(args.run_id)
        if args.run_id
        else new_run_id(recipe.name, apply_overrides(recipe.values, overrides), runs, seeds)
    )
    after = () if args.dry_run and not args.after else tuple(job_of(one, runs) for one in args.after)
    options = SubmitOptions(
        name, runs, Path.cwd(), args.nodes, args.devices, args.time, seeds, after, Path(sys.executable)
    )
    submission = prepare(recipe, profile, overrides, options)
    if args.dry_run:
        print(submission.script, end="")
        return 0
    profile.check_files()
    if not args.no_check:
        check_recipe(next(iter(submission.recipes.values())), submission)
    jobs = queue_new(submission, profile, options, Slurm(), {"recipe": recipe.name, "command": sys.argv})
    say_queued(jobs, submission, profile, args.time)
    write_json(args.json, {"jobs": jobs})
    return 0


def parse_seeds(text: str | None) -> tuple[int, ...]:
    """Read the seeds of `0,1,2` or `0-2`; None gives none.

    Raises:
        UserError: another form, or a seed twice.
    """
    if text is None:
        return ()
    seeds = parse_ranges("array", text, "seeds", _MOST_SEEDS)
    if len(set(seeds)) < len(seeds):
        raise UserError("array", f"'{shortened(text, 80)}' must give every seed once")
    return tuple(seeds)


def job_of(name: str, runs: Path) -> str:
    """Return the SLURM job of a job id or of a run, whose newest job is taken.

    Raises:
        UserError: no such run, or one that was never queued.
    """
    if re.fullmatch(r"\d+(_\d+)?", name):
        return name
    job = current_job(find_run(name, runs, key="after"))
    if job is None:
        raise UserError("after", f"run {name} was never submitted, so there is no job to wait for")
    return job


def check_recipe(values: dict[str, Any], submission: Submission) -> None:
    """Check a recipe as `mhla plan` does, on the nodes and devices of a submission.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_names(values)  # before torch is imported
    from mhla_lightning.config.resolve import resolve
    from mhla_lightning.planning.plan import make_plan

    make_plan(resolve(values), nodes=submission.nodes, gpus_per_node=submission.devices)


def say_queued(jobs: dict[str, str], submission: Submission, profile: Profile, time: str | None) -> None:
    """Print what was queued, and the commands that come next."""
    many = "es" if submission.devices > 1 else ""
    size = (
        f"{submission.nodes} node{'s' if submission.nodes > 1 else ''} x {submission.devices} "
        f"process{many}, time limit {time or profile.time}"
    )
    for name, job in jobs.items():
        print(f"job {job}: run {name}, {size}")
    first = next(iter(jobs))
    print(f"mhla status {first}\nmhla logs {first} -f\nmhla cancel {first}")
