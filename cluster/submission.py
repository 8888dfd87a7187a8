"""Queue runs: ask SLURM, write the run folders, submit.

A refused submission leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mhla_lightning.cluster.jobs import code_folder, read_job, write_job
from mhla_lightning.cluster.profile import Profile
from mhla_lightning.cluster.script import RECIPE_FILE, SCRIPT, Submission, SubmitOptions
from mhla_lightning.cluster.slurm import Slurm
from mhla_lightning.cluster.snapshot import copy_code, environment, git_state
from mhla_lightning.config.moved_keys import flat
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder, default_run_id, write_text

_UNWRITABLE = "the run folder cannot be written: {}; choose another place with `runs` or $MHLA_RUNS"


def new_run_id(recipe_name: str, values: Mapping[str, Any], runs: Path, seeds: Sequence[int]) -> str:
    """Return an id that no run has yet: two submissions of one recipe are two runs.

    Args:
        recipe_name: begins the id; a hash of the recipe follows, and a number where need be.
        values: the recipe with its overrides.
        runs: folder of all runs.
        seeds: each makes a run of its own, `<id>-seed<N>`.
    """
    base = default_run_id(recipe_name, flat(values, filled=False))
    number, name = 1, base
    while any((runs / one).exists() for one in [name, *(f"{name}-seed{seed}" for seed in seeds)]):
        number += 1
        name = f"{base}-{number}"
    return name


def queue_new(
    submission: Submission, profile: Profile, options: SubmitOptions, slurm: Slurm, facts: Mapping[str, Any]
) -> dict[str, str]:
    """Write one folder a run and queue the runs; return run id -> job id.

    Args:
        submission: script and recipes.
        profile: the site.
        options: of the submission.
        slurm: SLURM's commands.
        facts: further entries of job.json, such as the command.

    Raises:
        UserError: SLURM refuses, the disk is full or not writable, a run folder exists already.
    """
    runs = [RunFolder(options.runs / name) for name in submission.recipes]
    for run in runs:
        if run.path.exists():
            raise UserError(
                "run_id",
                f"run {run.run_id} exists already in {options.runs}; mhla resume {run.run_id} resumes it, or "
                "choose another name",
            )
    slurm.test(submission.script, options.runs)
    with _removed_on_failure(runs):
        for run in runs:
            run.create()
            text = yaml.safe_dump(submission.recipes[run.run_id], sort_keys=False, allow_unicode=True)
            (run.path / "slurm").mkdir()
            copy_code(code_folder(run))
            write_text(run.path / RECIPE_FILE, text)
            write_text(run.recipe, text)
            write_text(run.path / SCRIPT, submission.script)
        return _submit(runs, submission, profile, options, slurm, facts)


def queue_again(
    run: RunFolder,
    submission: Submission,
    profile: Profile,
    options: SubmitOptions,
    slurm: Slurm,
    facts: Mapping[str, Any],
) -> str:
    """Queue an existing run; return the job id.

    A run that was never submitted gets its copy of the code now.

    Args:
        run: its folder.
        submission: script and recipe.
        profile: the site.
        options: of the submission.
        slurm: SLURM's commands.
        facts: further entries of job.json, such as the command.

    Raises:
        UserError: SLURM refuses, the disk is full or not writable.
    """
    slurm.test(submission.script, options.runs)
    with _disk_errors():
        (run.path / "slurm").mkdir(exist_ok=True)
        if not code_folder(run).is_dir():
            copy_code(code_folder(run))
        write_text(
            run.path / RECIPE_FILE,
            yaml.safe_dump(submission.recipes[run.run_id], sort_keys=False, allow_unicode=True),
        )
        write_text(run.path / SCRIPT, submission.script)
    return _submit([run], submission, profile, options, slurm, facts)[run.run_id]


def _submit(
    runs: Sequence[RunFolder],
    submission: Submission,
    profile: Profile,
    options: SubmitOptions,
    slurm: Slurm,
    facts: Mapping[str, Any],
) -> dict[str, str]:
    kept = {
        **facts,
        "profile": {key: value for key, value in dataclasses.asdict(profile).items() if value is not None},
        "nodes": submission.nodes,
        "devices": submission.devices,
        "time": options.time or profile.time,
        "cwd": str(options.cwd),
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": environment(),
        "git": git_state(),
    }
    job = slurm.submit(submission.script, options.runs)
    ids = {run.run_id: f"{job}_{seed}" for run, seed in zip(runs, options.seeds, strict=False)} or {
        runs[0].run_id: job
    }
    try:
        for run in runs:
            earlier = (read_job(run) or {}).get("jobs", [])
            write_job(run, {"run_id": run.run_id, "jobs": [*earlier, ids[run.run_id]], **kept})
    except OSError:
        slurm.cancel([job])
        raise
    return ids


@contextmanager
def _removed_on_failure(runs: Sequence[RunFolder]) -> Iterator[None]:
    """Remove the folders where a submission fails: other verbs would take them for runs."""
    try:
        with _disk_errors():
            yield
    except BaseException:
        for run in runs:
            shutil.rmtree(run.path, ignore_errors=True)
        raise


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn errors of the disk into a UserError."""
    try:
        yield
    except shutil.Error as error:  # copytree gives a list of (source, destination, reason)
        raise UserError("runs", _UNWRITABLE.format(error.args[0][0][2])) from error
    except OSError as error:
        raise UserError("runs", _UNWRITABLE.format(f"{error.filename}: {error.strerror}")) from error
