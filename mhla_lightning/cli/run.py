"""Trains a recipe, validates it, and resumes it when the same command is given again.

RECIPE is a name of `mhla recipes list` or the path of a YAML file. Overrides follow as --dotted.key VALUE,
for example
  lightning run classification/deit_tiny_mhla_mnist_cpu --model.attention softmax --trainer.max_steps 200
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shutil
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mhla_lightning.config.recipes import Recipe, apply_overrides, load_recipe, parse_overrides, read_yaml
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import (
    RunFolder,
    check_run_id,
    default_run_id,
    find_run,
    newest_checkpoint,
    read_json,
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
    forget,
    place,
    tell_rank_zero,
)
from mhla_lightning.runs.stopping import Preempted, StopSignals, stop_signals

if TYPE_CHECKING:
    from mhla_lightning.config.resolve import Resolved
    from mhla_lightning.training.session import Session

TAKES_OVERRIDES = True
_CHILD = (
    "MHLA_RUN_FOLDER"  # processes that Lightning starts for further ranks find the folder of the first here
)
_WAIT_FOR_DATA = 3600.0  # seconds
_WAIT_FOR_OTHERS = 5.0  # seconds in which other ranks may end by themselves, with the same error
_LAST_WAIT = 60.0  # seconds that other ranks have to end after the training has
_INTERRUPTED = 130  # what a shell reports for Ctrl-C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla run`."""
    parser.usage = "%(prog)s RECIPE [options] [--dotted.key VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="name of a packaged recipe, or path of a YAML file")
    parser.add_argument(
        "--runs", metavar="DIR", help="where run folders live (default: $MHLA_RUNS, else ./runs)"
    )
    parser.add_argument(
        "--run-id",
        metavar="NAME",
        help="name of the run (default: recipe name and a hash of the resolved recipe)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start anew in NAME-2, NAME-3, ... instead of resuming"
    )
    parser.add_argument(
        "--accept-changes", action="store_true", help="go on with a run although the recipe has changed"
    )
    parser.add_argument(
        "--mode",
        choices=["fit", "validate", "test"],
        default="fit",
        help="fit trains and validates (default)",
    )
    parser.add_argument(
        "--ckpt",
        metavar="PATH",
        help="checkpoint folder or run for --mode validate and test (default: the run's newest)",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved recipe and stop")


def run(args: argparse.Namespace) -> int:
    """Carries out the verb; returns the exit code."""
    # With three trainings on two cores OpenMP's default spinning made a step 20 times slower, this one 3
    # times. Alone it costs 3 %.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    end_with_rank_zero()
    try:
        with stop_signals() as signals:
            return _run(args, signals)
    except Preempted as stop:
        print(f"stopped by {stop.by} before training began; the same command goes on", file=sys.stderr)
        return PREEMPTED


def _run(args: argparse.Namespace, signals: StopSignals) -> int:
    if args.ckpt and args.mode == "fit":
        raise UserError(
            "--ckpt belongs to --mode validate or test; training resumes by itself, and "
            "model.init_from starts from other weights"
        )
    recipe = load_recipe(args.recipe)
    values = apply_overrides(recipe.values, parse_overrides(args.overrides))
    from mhla_lightning.config.resolve import resolve

    _quiet()
    resolved = resolve(values)
    if args.print_config:
        return _print_config(resolved)
    run_folder = _choose_folder(args, recipe, resolved)
    if args.mode != "fit":
        return _evaluate(args, resolved, run_folder)
    changed = _changes(run_folder, resolved)
    if changed and _first_process() and not args.accept_changes:
        raise UserError(
            f"run {run_folder.run_id} was started with another recipe: {changed}; use --fresh, "
            "another --run-id, or --accept-changes"
        )
    if run_folder.finished() and not changed:
        return _say_finished(resolved, run_folder)
    new = not run_folder.path.exists()
    run_folder.create()
    try:
        with ExitStack() as stack:
            if _first_process():
                stack.enter_context(hold(run_folder.path))
                forget(run_folder.path)
                os.environ[_CHILD] = str(run_folder.path)
                stack.callback(os.environ.pop, _CHILD, None)
                _record(resolved, run_folder)
            _prepare_data(resolved)
            return _fit(resolved, run_folder, signals)
    except UserError:
        begun = run_folder.metrics.exists() or newest_checkpoint(run_folder.path) is not None
        if (
            new and _first_process() and not begun
        ):  # refused: nothing of use is in there, and every verb would take it for a run
            shutil.rmtree(run_folder.path, ignore_errors=True)
        raise


def _quiet() -> None:
    """Our own lines on stdout; of Lightning's only warnings. After the imports: Lightning sets its own
    level in them.
    """
    ours = logging.getLogger("mhla_lightning")
    ours.handlers, ours.level = [logging.StreamHandler(sys.stdout)], logging.INFO
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message="Grad strides do not match bucket view strides"
    )  # DDP copies such a gradient once more, no error
    warnings.filterwarnings(
        "ignore", message="The `srun` command is available on your system but is not used"
    )  # `mhla submit` uses it
    warnings.filterwarnings(
        "ignore", message=".*torch.distributed.* is deprecated"
    )  # DeepSpeed 0.19 on torch 2.14, DeepSpeed's to change
    warnings.filterwarnings(
        "ignore", message=r".*isinstance\(treespec, LeafSpec\)"
    )  # Lightning 2.6.6 on torch 2.14, Lightning's to change


def _print_config(resolved: Resolved) -> int:
    from mhla_lightning.config.length import length

    if resolved.values["data"]["init_args"].get("epochs") is not None and resolved.data.is_ready():
        resolved.values["trainer"]["max_steps"] = length(resolved)
    print(resolved.to_yaml(), end="")
    return 0


def _choose_folder(args: argparse.Namespace, recipe: Recipe, resolved: Resolved) -> RunFolder:
    if not _first_process() and _CHILD in os.environ:
        return RunFolder(Path(os.environ[_CHILD]))
    root = runs_root(args.runs)
    name = check_run_id(args.run_id) if args.run_id else default_run_id(recipe.name, resolved.identity())
    if args.fresh and _started_among_others():
        raise UserError(
            "--fresh chooses a folder, and each of the processes that were started together would "
            "choose another: use a new --run-id"
        )
    if args.fresh and (root / name).exists():
        name = next(f"{name}-{n}" for n in range(2, sys.maxsize) if not (root / f"{name}-{n}").exists())
    return RunFolder(root / name)


def _first_process() -> bool:
    """Whether this process is rank 0 as far as the launcher's environment tells (Lightning, torchrun,
    srun).
    """
    return all(int(os.environ.get(name) or 0) == 0 for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _started_among_others() -> bool:
    """Whether torchrun, srun or the like has started this process as one of several."""
    return any(int(os.environ.get(name) or 1) > 1 for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


def _changes(run_folder: RunFolder, resolved: Resolved) -> str:
    """In what the recipe differs from the one whose checkpoints the folder holds; empty when it does not."""
    from mhla_lightning.config.resolve import differences

    if not run_folder.recipe.is_file() or newest_checkpoint(run_folder.path) is None:
        return ""
    return differences(read_yaml(run_folder.recipe), resolved.values)


def _record(resolved: Resolved, run_folder: RunFolder) -> None:
    """Writes recipe.yaml and environment.json."""
    from mhla_lightning.training.session import versions

    run_folder.summary.unlink(
        missing_ok=True
    )  # before the recipe: another rank that looks now must not take the run for finished
    write_text(run_folder.recipe, resolved.to_yaml())
    facts = {
        "command": sys.argv,
        "cwd": str(Path.cwd()),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "versions": versions(),
    }
    write_json(
        run_folder.environment, {"format": 1, **facts, "recipe_hash": recipe_hash(resolved.identity())}
    )


def _prepare_data(resolved: Resolved) -> None:
    """The first process packs; the others of the same start wait for it."""
    data = resolved.data
    if _first_process():
        if data.source is not None and not data.is_ready():
            print(f"packing {data.source} into {data.path}", flush=True)
        elif data.source is not None:
            print(f"{data.path} holds shards already; {data.source} is not packed again", flush=True)
        data.prepare_data()
        return
    waited = 0.0
    while data.source is not None and not data.is_ready() and waited < _WAIT_FOR_DATA:
        time.sleep(0.5)
        waited += 0.5


def _fit(resolved: Resolved, run_folder: RunFolder, signals: StopSignals) -> int:
    from mhla_lightning.training.session import Session

    session = Session(resolved, run_folder, resume=newest_checkpoint(run_folder.path), signals=signals)
    first = session.trainer.is_global_zero
    if first:
        from_step = f", going on from {session.resume.name}" if session.resume else ""
        task = session.task
        print(f"run {run_folder.run_id}: {session.max_steps} steps of {session.data.batch_size}{from_step}")
        print(
            f"{task.parameter_count:,} parameters, {task.flops_per_sample / 1e9:.3g} GFLOPs a sample "
            f"(forward), {run_folder.path}"
        )
        print(f"watch it: tensorboard --logdir {run_folder.tensorboard}", flush=True)
    try:
        session.fit()
    except Preempted as stop:
        if _CHILD in os.environ and not _first_process():
            return 0  # the first process has the code of the command
        return _stopped(stop.by, PREEMPTED, run_folder)
    except SystemExit:  # what Lightning makes of Ctrl-C once it has shut down
        return _stopped("Ctrl-C", _INTERRUPTED, run_folder)
    except Exception as error:
        if session.trainer.world_size == 1:
            raise
        return _failed(error, session, run_folder)
    if first:
        _print_summary(run_folder)
    return _all_ended(session)


def _failed(error: Exception, session: Session, run_folder: RunFolder) -> int:
    """What one rank of several does with an error: the last words of a run are those of the rank that failed
    first, not of those that missed it.

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
            print(f"error: {failed}; the same command goes on from {_newest(run_folder)}", file=sys.stderr)
            return failed.exit_code
    elif RANK_ZERO in os.environ and trainer.local_rank > 0:
        if isinstance(error, UserError):
            tell_rank_zero(run_folder.path, trainer.global_rank, str(error))
            return 2
        time.sleep(GRACE if lost else 0.0)  # rank 0 knows which rank was lost, and ends this one
    elif lost:
        print(
            f"error: rank {trainer.global_rank} of {trainer.world_size} has lost another rank, whose "
            "own error is the cause",
            file=sys.stderr,
        )
        return 1
    if not isinstance(error, UserError):
        error.add_note(place(trainer.global_rank, trainer.world_size))
    raise error


def _all_ended(session: Session) -> int:
    """Waits for the ranks that this one has started; the exit code of the first that failed, else 0."""
    from mhla_lightning.strategies.launcher import watch_of

    watch = watch_of(session.trainer)
    if watch is None:
        return 0
    deadline = time.monotonic() + _LAST_WAIT
    while not watch.ended() and time.monotonic() < deadline:
        time.sleep(0.05)
    failed = watch.failure()
    if failed is not None:
        print(f"error: {failed}", file=sys.stderr)
    watch.stop()
    return 0 if failed is None else failed.exit_code


def _stopped(by: str, code: int, run_folder: RunFolder) -> int:
    print(f"stopped by {by}; the same command goes on from {_newest(run_folder)}", file=sys.stderr)
    return code


def _newest(run_folder: RunFolder) -> str:
    newest = newest_checkpoint(run_folder.path)
    return newest.name if newest else "the start: no checkpoint was written yet"


def _evaluate(args: argparse.Namespace, resolved: Resolved, run_folder: RunFolder) -> int:
    """Validates or tests a checkpoint; writes nothing."""
    from mhla_lightning.training.session import Session

    checkpoint = _checkpoint(args, run_folder)
    _prepare_data(resolved)
    session = Session(resolved, run_folder, resume=None)
    metrics = session.evaluate(args.mode, checkpoint)
    if session.trainer.is_global_zero:
        _print_metrics(f"{args.mode} {checkpoint}", metrics)
    return 0


def _checkpoint(args: argparse.Namespace, run_folder: RunFolder) -> Path:
    if args.ckpt is None:
        folder = newest_checkpoint(run_folder.path)
        if folder is None:
            raise UserError(f"run {run_folder.run_id} has no checkpoint; name one with --ckpt")
        return folder
    path = Path(args.ckpt)
    if (path / "COMPLETE").is_file():
        return path
    if (path / "trainer.ckpt").is_file():
        raise UserError(f"checkpoint {path} was not written to the end; take another of {path.parent}")
    folder = newest_checkpoint(find_run(args.ckpt, runs_root(args.runs)).path)
    if folder is None:
        raise UserError(f"run {args.ckpt} has no complete checkpoint")
    return folder


def _say_finished(resolved: Resolved, run_folder: RunFolder) -> int:
    from mhla_lightning.training.session import check_same_data

    _prepare_data(resolved)
    newest = newest_checkpoint(run_folder.path)
    if newest is not None:
        check_same_data(newest, resolved.data)
    print(f"run {run_folder.run_id} is finished; --fresh trains it anew")
    if _first_process():
        _print_summary(run_folder)
    return 0


def _print_summary(run_folder: RunFolder) -> None:
    summary = read_json(run_folder.summary)
    _print_metrics(
        f"{run_folder.run_id}: {summary['steps']} steps in {summary['seconds']:.0f} s",
        summary["last"],
        summary["best"],
    )
    print(f"run folder: {run_folder.path}\ntensorboard --logdir {run_folder.tensorboard}")


def _print_metrics(title: str, metrics: dict[str, float], best: dict[str, float] | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for heading in ("tag", "value", "best") if best else ("tag", "value"):
        table.add_column(heading, justify="left" if heading == "tag" else "right")
    for tag, value in sorted(metrics.items()):
        table.add_row(tag, f"{value:.4f}", *([f"{best[tag]:.4f}"] if best else []))
    Console().print(table)
