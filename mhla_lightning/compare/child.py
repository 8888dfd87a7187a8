"""Ordinary runs in processes of their own, as `compare` starts them. Standard library only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from mhla_lightning.runs.folder import RunFolder, read_object

WARNING = "warning: "
"""Begins every line of a run's log that warns."""

_POLL = 0.5  # seconds
_GRACE = 60.0  # seconds a run has to end after an interrupt


@dataclass(frozen=True)
class ChildRun:
    """A run to train.

    recipe: name or path. run: where; resumed when it exists. overrides: `--key=value` words. log: file that
        stdout and stderr are appended to.
    """

    recipe: str
    run: RunFolder
    overrides: Sequence[str]
    log: Path

    def start(self, output: IO[bytes], threads: int | None) -> subprocess.Popen[bytes]:
        """`mhla run RECIPE` in a process of its own; threads: of torch, None is all cores."""
        place = ["--runs", str(self.run.path.parent), "--run-id", self.run.run_id]
        command = [sys.executable, "-m", "mhla_lightning", "run", self.recipe, *place, *self.overrides]
        env = None if threads is None else {"OMP_NUM_THREADS": str(threads), **os.environ}
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env
        )


def train_in_children(
    runs: Sequence[ChildRun],
    jobs: int,
    on_progress: Callable[[float], None],
    on_end: Callable[[ChildRun, int], None],
) -> int:
    """Train `runs` in their order, `jobs` at once.

    Jobs share the cores. After a failure no other run is started.

    Args:
        on_progress: called about twice a second with how many runs are done, parts of runs included.
        on_end: called with every run that has ended and its exit code: 128 + number where a signal ended it.

    Returns:
        the exit code of the first that failed, else 0.
    """
    threads = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    waiting, ended, first_failure = list(runs), 0, 0
    running: dict[subprocess.Popen[bytes], ChildRun] = {}
    with ExitStack() as files, _end_with_us(running):
        while running or (waiting and not first_failure):
            while waiting and len(running) < jobs and not first_failure:
                one = waiting.pop(0)
                running[one.start(files.enter_context(one.log.open("ab")), threads)] = one
            time.sleep(_POLL)
            for child in [child for child in running if child.poll() is not None]:
                one, code = running.pop(child), child.returncode
                code = code if code >= 0 else 128 - code
                ended, first_failure = ended + 1, first_failure or code
                on_end(one, code)
            on_progress(ended + sum(share_done(one.run) for one in running.values()))
    return first_failure


def share_done(run: RunFolder) -> float:
    """Return the share of a run's steps that its progress.json reports; 1 where it ended early."""
    progress = read_object(run.progress)
    if progress.get("state") == "finished":
        return 1.0
    return min(1.0, progress.get("step", 0) / max(1, progress.get("max_steps", 1)))


def warnings_in(log: Path) -> list[str]:
    """Return the warnings of a run's log, each once; empty where there is no log."""
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return list(dict.fromkeys(line.removeprefix(WARNING) for line in lines if line.startswith(WARNING)))


@contextmanager
def _end_with_us(children: Mapping[subprocess.Popen[bytes], ChildRun]) -> Iterator[None]:
    """Pass SIGTERM on, so that the children can save; end them after an interrupt."""

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    except BaseException:
        forward(
            signal.SIGINT, None
        )  # a terminal's Ctrl-C reaches the children too; a second one does no harm
        deadline = time.monotonic() + _GRACE
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
