"""Runs that are trained, killed at a step, and compared."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from mhla_lightning.runs.folder import read_metrics
from tests.helpers.ranks import Nursery

LOGGED = [
    "--trainer.callbacks",
    "[{class_path: mhla_lightning.callbacks.EMA}, {class_path: mhla_lightning.callbacks.SampleLog}]",
]


def arguments(recipe: Path | str, run: Path, *extra: str) -> list[str]:
    return [
        "run",
        str(recipe),
        "--runs",
        str(run.parent),
        "--run-id",
        run.name,
        "--trainer.log_every_n_steps",
        "1",
        *LOGGED,
        *extra,
    ]


def fit(nursery: Nursery, recipe: Path | str, run: Path, *extra: str) -> str:
    ranks = int(extra[extra.index("--trainer.devices") + 1]) if "--trainer.devices" in extra else 1
    return nursery.run(ranks, arguments(recipe, run, *extra), Path.cwd())


def fit_killed(nursery: Nursery, recipe: Path | str, run: Path, step: int, *extra: str) -> bool:
    """Train until a batch of `step` was handed out, then kill the process at once; False when training
    ended before.
    """
    process = nursery.start(1, arguments(recipe, run, *extra), Path.cwd())
    deadline = time.monotonic() + 300
    while not process.poll() and last_step(run) < step and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    (code,) = process.wait(60)
    assert code in (0, -signal.SIGKILL), process.output()
    return code != 0


def continued_alike(nursery: Nursery, recipe: Path, *extra: str) -> Path:
    """Train a recipe for 40 steps, and again with a kill at step 17; both have the same numbers.

    Args:
        nursery: starts the processes.
        recipe: the file.
        extra: arguments of both.

    Returns:
        the folder of the whole run, runs/whole.
    """
    given = ["--trainer.max_steps", "40", "--trainer.val_check_interval", "10"]
    given += ["--checkpoint.every_n_steps", "3", *extra]
    whole, cut = Path.cwd() / "runs" / "whole", Path.cwd() / "runs" / "cut"
    fit(nursery, recipe, whole, *given)
    assert fit_killed(nursery, recipe, cut, 17, *given), "the run ended before it could be killed"
    fit(nursery, recipe, cut, *given)
    assert exact_metrics(whole) == exact_metrics(cut)
    return whole


def last_step(run: Path) -> int:
    log = run / "samples" / "rank-0.jsonl"
    if not log.is_file():
        return -1
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = [
            line
            for line in file.read().split(b"\n")[:-1]
            if line.startswith(b'{"step"') and line.endswith(b"}")
        ]
    return int(json.loads(lines[-1])["step"]) if lines else -1


def exact_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What must not depend on where a run was stopped: everything but speeds."""
    series = read_metrics(run / "metrics.jsonl")
    timed = ("samples_per_second", "tokens_per_second", "time_data", "time_compute", "skipped")
    return {tag: values for tag, values in series.items() if tag.removeprefix("train/") not in timed}
