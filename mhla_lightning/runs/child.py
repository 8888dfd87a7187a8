"""An ordinary run in a process of its own, as `compare` starts it. Standard library only."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mhla_lightning.runs.folder import RunFolder, read_json

_POLL = 0.5  # seconds
_GRACE = 60.0  # seconds a run has to end after an interrupt


def train_in_child(recipe: str, run: RunFolder, overrides: Sequence[str], log: Path, on_progress: Callable[[float], None]) -> int:
    """Runs `mhla run RECIPE` in a child process until it ends; its output is appended to a file.

    Args:
        recipe: name or path.
        run: where; resumed when it exists.
        overrides: `--key=value` words.
        log: file of the child's stdout and stderr.
        on_progress: called about twice a second with the share of the run that is done, 0 to 1.

    Returns:
        the exit code; 128 + number where a signal ended the child.
    """
    command = [sys.executable, "-m", "mhla_lightning", "run", recipe, "--runs", str(run.path.parent), "--run-id", run.run_id, *overrides]
    with (
        log.open("ab") as output,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT) as child,
        _ends_with_us(child),
    ):
        code = _wait(child, lambda: on_progress(share_done(run)))
    return code if code >= 0 else 128 - code


def _wait(child: subprocess.Popen[bytes], tick: Callable[[], None]) -> int:
    while True:
        try:
            return child.wait(_POLL)
        except subprocess.TimeoutExpired:
            tick()


def share_done(run: RunFolder) -> float:
    """Share of a run's steps that its progress.json reports."""
    progress = read_json(run.progress) or {}
    return min(1.0, progress.get("step", 0) / max(1, progress.get("max_steps", 1)))


@contextmanager
def _ends_with_us(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Passes SIGTERM on, so that the child can save; after an interrupt nothing of ours stays behind."""

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    except BaseException:
        child.send_signal(signal.SIGINT)  # a terminal's Ctrl-C reaches the child too; a second one does no harm
        try:
            child.wait(_GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
