"""The whole of a run, from a recipe to an exit code: folder, lock, data, ranks.

Torch and Lightning are imported inside `launch`, after the names of the recipe are checked and the signal
handlers are installed.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mhla_lightning.config.quick_checks import check_names
from mhla_lightning.config.recipes import Recipe, apply_overrides, load_recipe, read_run_recipe
from mhla_lightning.errors import UserError
from mhla_lightning.runs.disk_errors import disk_errors
from mhla_lightning.runs.folder import (
    FORMAT,
    RunFolder,
    check_run_id,
    default_run_id,
    find_run,
    newest_checkpoint,
    read_object,
    recipe_hash,
    runs_root,
    write_json,
    write_text,
)
from mhla_lightning.runs.lock import hold
from mhla_lightning.runs.ranks import (
    GRACE,
    PREEMPTED,
    RANK_ZERO,
    end_with_rank_zero,
    place,
    remove_errors,
    tell_rank_zero,
)
from mhla_lightning.runs.stopping import Preempted, StopSignals, stop_signals
from mhla_lightning.training.report import LogReport, Report

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from mhla_lightning.config.resolve import Resolved
    from mhla_lightning.training.session import Session

_FOLDER = "MHLA_RUN_FOLDER"  # tells the further ranks that Lightning starts which folder the first has chosen
_WAIT_FOR_DATA = 3600.0  # seconds
_WAIT_FOR_OTHERS = 5.0  # seconds in which other ranks may end by themselves, with the same error
_LAST_WAIT = 60.0  # seconds that other ranks have to end after the training has
_EXPORT = "export {0} --to FOLDER"
_NEXT = {
    "ClassificationTask": "predict {0} IMAGE, or mhla " + _EXPORT,
    "LanguageTask": "generate {0} --prompt TEXT, or mhla " + _EXPORT,
    "ImageDiffusionTask": "sample {0}, or mhla " + _EXPORT,
    "TextToImageTask": "sample {0} --prompts FILE, or mhla " + _EXPORT,
    "VideoDiffusionTask": "sample {0}, or mhla " + _EXPORT,
}
"""The name of a task's class -> verbs for a finished run; the others are exported."""
_INTERRUPTED = 130  # exit code that a shell reports for Ctrl-C

_HARMLESS = (
    "Grad strides do not match bucket view strides",  # DDP copies such a gradient once more
    "The `srun` command is available on your system but is not used",  # `mhla submit` uses it
    ".*torch.distributed.* is deprecated",  # DeepSpeed 0.19 on torch 2.14
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning 2.6.6 on torch 2.14
)
"""Warnings of libraries about what only the libraries can change."""


Mode = Literal["fit", "validate", "test", "predict"]


@dataclass(frozen=True)
class RunOptions:
    """Where a run lives and what is done with it.

    Args:
        runs: folder of all runs; None is $MHLA_RUNS, else ./runs.
        run_id: name of the run; None is the recipe's name and a hash of the resolved recipe.
        fresh: start anew in NAME-2, NAME-3, ... where the folder exists.
        accept_changes: resume although the recipe has changed.
        mode: `fit` trains and validates; `validate`, `test` and `predict` read a checkpoint, and write
            nothing.
        ckpt: checkpoint folder or run that these take; None is the run's newest.
    """

    runs: str | None = None
    run_id: str | None = None
    fresh: bool = False
    accept_changes: bool = False
    mode: Mode = "fit"
    ckpt: str | None = None

    def __post_init__(self) -> None:
        if self.ckpt and self.mode == "fit":
            raise UserError(
                "ckpt",
                "a checkpoint belongs to `mode` validate, test or predict; training resumes by itself, and "
                "`model.init_from` starts from other weights",
            )


@dataclass(frozen=True)
class Launched:
    """How a launch ended.

    Args:
        code: see :func:`launch`.
        run: the folder; None where a signal came before it was chosen.
        trainer: Lightning's; None where nothing was left to train, or a signal came before.
        predictions: of `mode` predict, one mapping a batch; None in other modes.
    """

    code: int
    run: RunFolder | None
    trainer: Trainer | None = None
    predictions: list[dict[str, Any]] | None = None


def read_recipe(recipe: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe, apply overrides and check its names, all without importing torch.

    Args:
        recipe: name of a packaged recipe, or path of a YAML file.
        overrides: dotted key -> value.

    Raises:
        UserError: no such recipe, or a name in it that nothing takes.
    """
    found = load_recipe(recipe)
    values = apply_overrides(found.values, overrides or {})
    check_names(values)
    return Recipe(found.name, found.path, values)


def quiet_libraries() -> None:
    """Hide what Lightning and DeepSpeed print that a user can do nothing about.

    Call it once Lightning is imported: Lightning sets the level of its own logger then.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)


def launch(
    recipe: str,
    overrides: Mapping[str, Any] | None = None,
    options: RunOptions | None = None,
    report: Report | None = None,
) -> int:
    """Train a recipe to its end, resume its run, or evaluate a checkpoint of it.

    Args:
        recipe: name of a packaged recipe, or path of a YAML file.
        overrides: dotted key -> value, as `{"trainer.max_steps": 100}`.
        options: where the run lives and what is done; None is all defaults.
        report: shows the progress; None logs it.

    Returns:
        The exit code: 0 finished; 1 another rank crashed; 2 another rank found a mistake of the user.
        75 is a stop before the last step, after saving: by a signal, `trainer.max_time` or a callback. 130
        is a stop by Ctrl-C.

    Raises:
        UserError: a mistake in the recipe, the data or the options.
        DiskError: the disk is full or fails.
        Exception: an error of this rank's own.
    """
    return launch_run(recipe, overrides, options, report).code


def launch_run(
    recipe: str,
    overrides: Mapping[str, Any] | None = None,
    options: RunOptions | None = None,
    report: Report | None = None,
) -> Launched:
    """Do what :func:`launch` does, and return the folder of the run beside the exit code."""

    def opened() -> tuple[str, Resolved]:
        read = read_recipe(recipe, overrides)  # before the import below, which takes seconds
        from mhla_lightning.config.resolve import resolve

        return read.name, resolve(read.values)

    return _guarded(opened, options or RunOptions(), report or LogReport())


def launch_resolved(name: str, resolved: Resolved, options: RunOptions, report: Report) -> Launched:
    """Do what :func:`launch_run` does with a recipe whose objects are built.

    Args:
        name: of the recipe.
        resolved: the recipe; its objects belong to the run from now on.
        options: where the run lives and what is done.
        report: shows the progress.
    """
    return _guarded(lambda: (name, resolved), options, report)


def _guarded(opened: Callable[[], tuple[str, Resolved]], options: RunOptions, report: Report) -> Launched:
    """Launch with signal handlers, which are installed before a recipe is opened."""
    # Three trainings on two cores: OpenMP's default spinning makes a step 20 times slower, this value 3
    # times. A training alone becomes 3 % slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    end_with_rank_zero()
    try:
        with stop_signals() as signals:
            name, resolved = opened()
            return _launch(name, resolved, options, report, signals)
    except Preempted as stop:
        report.problem(f"stopped by {stop.by} before training began; the same command resumes the run")
        return Launched(PREEMPTED, None)


def _launch(
    name: str, resolved: Resolved, options: RunOptions, report: Report, signals: StopSignals
) -> Launched:
    quiet_libraries()
    run = _choose_folder(name, resolved, options)
    if options.mode != "fit":
        return _evaluate(resolved, run, options, report)
    with disk_errors(run.path):
        return _train(resolved, run, options, report, signals)


def _train(
    resolved: Resolved, run: RunFolder, options: RunOptions, report: Report, signals: StopSignals
) -> Launched:
    from mhla_lightning.checkpoints.whole import newest_whole
    from mhla_lightning.training.session import check_device

    changed = _changes(run, resolved)
    if changed and _first_process() and not options.accept_changes:
        raise UserError(
            str(run.path),
            f"the run was started with another recipe: {changed}; take `fresh`, another `run_id`, or "
            "`accept_changes`",
        )
    if run.finished() and not changed:
        return Launched(_report_finished(resolved, run, options, report), run)
    check_device(resolved)
    new, recorded = not run.path.exists(), run.recipe.is_file()
    run.create()
    try:
        with ExitStack() as stack:
            if _first_process():
                stack.enter_context(hold(run.path))
                remove_errors(run.path)
                os.environ[_FOLDER] = str(run.path)
                stack.callback(os.environ.pop, _FOLDER, None)
                if not recorded:  # other verbs show a run that starts
                    _record(resolved, run)
            _prepare_data(resolved, report)
            resolved.take_from_data()
            resume = newest_whole(run.path, _once(report))
            _check_data(resolved, run, options, resume)
            return _fit(resolved, run, signals, report, changed, resume)
    except (UserError, OSError):
        begun = run.metrics.exists() or newest_checkpoint(run.path) is not None
        if new and _first_process() and not begun:  # every verb would take the empty folder for a run
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _choose_folder(recipe_name: str, resolved: Resolved, options: RunOptions) -> RunFolder:
    if not _first_process() and _FOLDER in os.environ:
        return RunFolder(Path(os.environ[_FOLDER]))
    root = runs_root(options.runs)
    name = options.run_id
    name = check_run_id(name) if name else default_run_id(recipe_name, resolved.identity())
    if options.fresh and _started_among_others():
        raise UserError(
            "fresh",
            "each of the processes that were started together would choose another folder; take a new "
            "`run_id` instead",
        )
    if options.fresh and (root / name).exists():
        name = next(f"{name}-{n}" for n in range(2, sys.maxsize) if not (root / f"{name}-{n}").exists())
    return RunFolder(root / name)


def _first_process() -> bool:
    """Whether Lightning, torchrun or srun has started this process as rank 0."""
    return all(int(os.environ.get(name) or 0) == 0 for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _started_among_others() -> bool:
    """Whether torchrun, srun or the like has started this process as one of several."""
    return any(int(os.environ.get(name) or 1) > 1 for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


def _changes(run: RunFolder, resolved: Resolved) -> str:
    """The differences to the recipe that the folder's checkpoints were trained with."""
    from mhla_lightning.config.resolve import differences

    if not run.recipe.is_file() or (newest_checkpoint(run.path) is None and not run.finished()):
        return ""
    return differences(read_run_recipe(run), resolved.values)


def _record(resolved: Resolved, run: RunFolder) -> None:
    """Write recipe.yaml and environment.json."""
    from mhla_lightning.training.session import versions

    # Before the recipe: no one must take the run for finished with this recipe.
    run.summary.unlink(missing_ok=True)
    write_text(run.recipe, resolved.to_yaml())
    facts = {
        "format": FORMAT,
        "command": sys.argv,
        "cwd": str(Path.cwd()),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "versions": versions(),
        "recipe_hash": recipe_hash(resolved.identity()),
    }
    write_json(run.environment, facts)


def _prepare_data(resolved: Resolved, report: Report) -> None:
    """Pack the data in the first process; the others of the same start wait for it."""
    data = resolved.data
    if _first_process():
        if data.source is not None and not data.is_ready():
            report.line(f"packing {data.source} into {data.path}")
        elif data.source is not None:
            report.line(f"{data.path} holds shards already; {data.source} is not packed again")
        data.prepare_data()
        return
    waited = 0.0
    while data.source is not None and not data.is_ready() and waited < _WAIT_FOR_DATA:
        time.sleep(0.5)
        waited += 0.5


def _check_data(resolved: Resolved, run: RunFolder, options: RunOptions, resume: Path | None) -> None:
    """Refuse other data than before; other validation data may be accepted. Raises UserError."""
    from mhla_lightning.training.session import check_same_data

    if resume is None:
        return
    check_same_data(resume, resolved.data)
    seen = read_object(resume / "state.json").get("val_hash")
    if seen not in (None, resolved.data.val_hash) and not options.accept_changes:
        raise UserError(
            str(run.path),
            f"the run was validated on other data than the val split of {resolved.data.path}; take the old "
            "data, `fresh`, another `run_id`, or `accept_changes`",
        )


def _fit(
    resolved: Resolved,
    run: RunFolder,
    signals: StopSignals,
    report: Report,
    changed: str,
    resume: Path | None,
) -> Launched:
    """Train on, or from the start.

    The run folder keeps its content until the first step is taken.
    """
    from mhla_lightning.training.session import Session

    session = Session(
        resolved,
        run,
        resume=resume,
        signals=signals,
        record=partial(_record, resolved, run),
        changed=changed,
    )
    return Launched(_fit_session(session, run, report), run, session.trainer)


def _fit_session(session: Session, run: RunFolder, report: Report) -> int:
    first = session.trainer.is_global_zero
    if first:
        _report_start(session, run, report)
    try:
        session.fit()
    except Preempted as stop:
        if _FOLDER in os.environ and not _first_process():
            return 0  # the command's exit code is that of the first process
        report.problem(f"stopped by {stop.by}; {_how_to_resume(run)}")
        return PREEMPTED
    except SystemExit:  # raised by Lightning after Ctrl-C, once it has shut down
        report.problem(f"stopped by Ctrl-C; {_how_to_resume(run)}")
        return _INTERRUPTED
    except Exception as error:
        if session.trainer.world_size == 1:
            raise
        return _failed(error, session, run, report)
    if first:
        _report_summary(session.recipe, run, report)
    return _wait_for_ranks(session, report)


def _once(report: Report) -> Callable[[str], None]:
    """The report's lines in the first process; nothing in the others, which would repeat them."""
    return report.line if _first_process() else lambda _: None


def _report_start(session: Session, run: RunFolder, report: Report) -> None:
    task, resumed = session.task, f", resumed from {session.resume.name}" if session.resume else ""
    report.line(f"run {run.run_id}: {session.max_steps} steps of {session.data.batch_size}{resumed}")
    report.line(
        f"{task.parameter_count:,} parameters, {task.flops_per_sample / 1e9:.3g} GFLOPs a sample "
        f"(forward), {run.path}"
    )
    report.line(f"watch it: mhla monitor {run.path} (or: tensorboard --logdir {run.path.parent})")


def _failed(error: Exception, session: Session, run: RunFolder, report: Report) -> int:
    """Handle the error of one rank of several.

    The last message of the run must be that of the rank that failed first.

    Raises:
        Exception: the error, where it is this rank's own.
    """
    from mhla_lightning.strategies.launcher import lost_a_rank, watch_of

    trainer = session.trainer
    watch, lost = watch_of(trainer), lost_a_rank(error)
    if watch is not None:
        failed = None if isinstance(error, UserError) else watch.failure(GRACE if lost else 0.0)
        watch.stop(0.0 if failed else _WAIT_FOR_OTHERS)
        if failed is not None:
            report.problem(f"error: {failed}; {_how_to_resume(run)}")
            return failed.exit_code
    elif RANK_ZERO in os.environ and trainer.local_rank > 0:
        if isinstance(error, UserError):
            tell_rank_zero(run.path, trainer.global_rank, str(error))
            return 2
        time.sleep(GRACE if lost else 0.0)  # rank 0 knows which rank was lost, and ends this one
    elif lost:
        report.problem(
            f"error: rank {trainer.global_rank} of {trainer.world_size} has lost another rank, whose "
            "own error is the cause"
        )
        return 1
    if not isinstance(error, UserError):
        error.add_note(place(trainer.global_rank, trainer.world_size))
    raise error


def _wait_for_ranks(session: Session, report: Report) -> int:
    """Wait for the ranks that this one has started; return the run's exit code."""
    from mhla_lightning.strategies.launcher import watch_of

    watch = watch_of(session.trainer)
    if watch is None:
        return 0
    deadline = time.monotonic() + _LAST_WAIT
    while not watch.ended() and time.monotonic() < deadline:
        time.sleep(0.05)
    failed = watch.failure()
    if failed is not None:
        report.problem(f"error: {failed}")
    watch.stop()
    return 0 if failed is None else failed.exit_code


def _how_to_resume(run: RunFolder) -> str:
    newest = newest_checkpoint(run.path)
    start = newest.name if newest else "the start: no checkpoint was written yet"
    return f"the same command resumes from {start}"


def _evaluate(resolved: Resolved, run: RunFolder, options: RunOptions, report: Report) -> Launched:
    """Validate, test or predict with a checkpoint; write nothing."""
    from mhla_lightning.training.session import Session

    checkpoint = _checkpoint(run, options, report)
    _prepare_data(resolved, report)
    resolved.take_from_data()
    session = Session(resolved, run, resume=None)
    if options.mode == "predict":
        return Launched(0, run, session.trainer, session.predict(checkpoint))
    metrics = session.evaluate(options.mode, checkpoint)
    if session.trainer.is_global_zero:
        report.metrics(f"{options.mode} {checkpoint}", metrics)
    return Launched(0, run, session.trainer)


def _checkpoint(run: RunFolder, options: RunOptions, report: Report) -> Path:
    """The checkpoint to evaluate."""
    from mhla_lightning.checkpoints.whole import newest_whole

    if options.ckpt is None:
        folder = newest_whole(run.path, _once(report))
        if folder is None:
            raise UserError(str(run.path), "the run has no checkpoint; name one with `ckpt`")
        return folder
    path = Path(options.ckpt)
    if (path / "COMPLETE").is_file():
        return path
    if (path / "trainer.ckpt").is_file():
        raise UserError(str(path), f"the checkpoint is incomplete; take another of {path.parent}")
    folder = newest_whole(find_run(options.ckpt, runs_root(options.runs), key="ckpt").path, _once(report))
    if folder is None:
        raise UserError("ckpt", f"run {options.ckpt} has no complete checkpoint")
    return folder


def _report_finished(resolved: Resolved, run: RunFolder, options: RunOptions, report: Report) -> int:
    from mhla_lightning.checkpoints.whole import newest_whole

    _prepare_data(resolved, report)
    _check_data(resolved, run, options, newest_whole(run.path, _once(report)))
    report.line(f"run {run.run_id} is finished; `fresh` trains the recipe anew, in another folder")
    if _first_process():
        _report_summary(resolved, run, report)
    return 0


def _report_summary(resolved: Resolved, run: RunFolder, report: Report) -> None:
    summary = read_object(run.summary)
    title = f"{run.run_id}: {summary['steps']} steps in {summary['seconds']:.0f} s"
    report.metrics(title, summary["last"], summary["best"])
    if summary.get("ended_early"):
        report.line(f"ended early: {summary['ended_early']}")
    report.line(f"run folder: {run.path}\nlook at it: mhla report {run.path}, or mhla monitor {run.path}")
    report.line(f"use it: mhla {_NEXT.get(type(resolved.task).__name__, _EXPORT).format(run.path)}")
