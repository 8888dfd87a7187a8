"""Verbs in processes of their own, as `compare` and `reproduce` start them.

Standard library only.
"""

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
from typing import IO, Protocol, TypeVar

from mhla_lightning.runs.folder import RunFolder, read_object

WARNING = "warning: "
"""Begins every line of a run's log that warns."""

_POLL = 0.5  # seconds
_GRACE = 60.0  # seconds a run has to end after an interrupt


class Child(Protocol):
    """A process to start."""

    @property
    def log(self) -> Path:
        """The file that stdout and stderr are appended to."""

    def words(self) -> Sequence[str]:
        """Return the arguments of `mhla`."""

    def share(self) -> float:
        """Return the share of the work that is done, 0 to 1."""


AnyChild = TypeVar("AnyChild", bound=Child)


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

    def words(self) -> list[str]:
        """Return the arguments of `mhla`."""
        place = ["--runs", str(self.run.path.parent), "--run-id", self.run.run_id]
        return ["run", self.recipe, *place, *self.overrides]

    def share(self) -> float:
        """Return the share of the steps that are done."""
        return share_done(self.run)


@dataclass(frozen=True)
class ChildVerb:
    """Another verb to carry out.

    verb: its arguments, the name first. log: file that stdout and stderr are appended to.
    """

    verb: Sequence[str]
    log: Path

    def words(self) -> Sequence[str]:
        """Return the arguments of `mhla`."""
        return self.verb

    def share(self) -> float:
        """Return 0: how far it is shows at its end."""
        return 0.0


def start(child: Child, output: IO[bytes], threads: int | None) -> subprocess.Popen[bytes]:
    """Start `mhla ...` in a process of its own; threads: of torch, None is all cores."""
    command = [sys.executable, "-m", "mhla_lightning", *child.words()]
    env = None if threads is None else {"OMP_NUM_THREADS": str(threads), **os.environ}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env
    )


def train_in_children(
    runs: Sequence[AnyChild],
    jobs: int,
    on_progress: Callable[[float], None],
    on_end: Callable[[AnyChild, int], None],
    *,
    keep_going: bool = False,
    threads: int | None = None,
) -> int:
    """Train `runs` in their order, `jobs` at once.

    Jobs share the cores.

    Args:
        runs: to train; other verbs are carried out.
        jobs: at once.
        on_progress: called about twice a second with how many runs are done, parts of runs included.
        on_end: called with every run that has ended and its exit code: 128 + number where a signal ended it.
        keep_going: start the others after a failure; else no other run is started. A failure by a signal to
            this process ends both.
        threads: of each; None shares the cores.

    Returns:
        the exit code of the first that failed, else 0.
    """
    if threads is None and jobs > 1:
        threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting, ended, first_failure = list(runs), 0, 0
    running: dict[subprocess.Popen[bytes], AnyChild] = {}
    with ExitStack() as files, _end_with_us(running) as stopped:
        while running or (waiting and (keep_going or not first_failure) and not stopped):
            while waiting and len(running) < jobs and (keep_going or not first_failure) and not stopped:
                one = waiting.pop(0)
                running[start(one, files.enter_context(one.log.open("ab")), threads)] = one
            time.sleep(_POLL)
            for child in [child for child in running if child.poll() is not None]:
                one, code = running.pop(child), child.returncode
                code = code if code >= 0 else 128 - code
                ended, first_failure = ended + 1, first_failure or code
                on_end(one, code)
            on_progress(ended + sum(one.share() for one in running.values()))
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
def _end_with_us(children: Mapping[subprocess.Popen[bytes], Child]) -> Iterator[list[int]]:
    """Pass SIGTERM on, so that the children can save; end them after an interrupt.

    Yields:
        the signals that were passed on.
    """
    passed: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        passed.append(number)
        for child in children:
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield passed
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
