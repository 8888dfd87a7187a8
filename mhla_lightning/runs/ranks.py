"""The ranks of a run on one machine: when one fails, the others end.

The command then names the rank that failed. Rank 0 is the process that the user has started; it starts the
others (strategies/launcher.py). Torchrun and srun watch the ranks that they start themselves.

Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mhla_lightning.errors import UserError

PREEMPTED = 75
RANK_ZERO = "MHLA_RANK_ZERO"  # pid of the process that has started this one as a further rank
GRACE = 10.0  # seconds in which rank 0 may close its files and end, once another rank has failed
_POLL = 0.2
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """A rank that has failed.

    Attributes:
        rank, world_size: its number, and the number of ranks.
        code: exit code; the negative number of the signal that ended it.
        told: the message of its UserError; empty where it had none.
    """

    rank: int
    world_size: int
    code: int
    told: str

    @property
    def exit_code(self) -> int:
        """The exit code of the command."""
        return self.code if self.code in (2, PREEMPTED) else 1

    def __str__(self) -> str:
        who = f"rank {self.rank} of {self.world_size}"
        if self.told:
            return f"{who}: {self.told}"
        if self.code == PREEMPTED:
            return f"{who} was asked to stop before training began; the others were stopped"
        if self.code < 0:
            why = " (perhaps for lack of memory: see dmesg)" if self.code == -signal.SIGKILL else ""
            return f"{who} was ended by {signal.Signals(-self.code).name}{why}; the others were stopped"
        return f"{who} ended with exit code {self.code}, see its error above; the others were stopped"


class Watch(threading.Thread):
    """Watches the ranks that this process has started.

    When one fails, this process may wait for it in a collective for ever. The watch ends the process GRACE
    seconds after the failure.

    Args:
        processes: of consecutive ranks.
        first_rank: the rank of processes[0].
        world_size: number of ranks of the run.
        run: the run folder.

    Attributes:
        asked: ranks were asked to end, which is no failure.
        training: all ranks have met. Before, a rank that a signal ends is one that this process waits for:
            half an hour, in torch's store. Later all ranks stop at the same step.
    """

    def __init__(
        self, processes: Sequence[subprocess.Popen[bytes]], first_rank: int, world_size: int, run: Path
    ) -> None:
        super().__init__(daemon=True, name="ranks")
        self.processes, self.first_rank, self.world_size, self.folder = processes, first_rank, world_size, run
        self.asked = self.training = False

    def failure(self, wait: float = 0.0) -> Ended | None:
        """Return the first rank that has failed, after at least one look.

        Args:
            wait: seconds after which None is returned.
        """
        deadline = time.monotonic() + wait
        while True:
            for rank, process in enumerate(self.processes, self.first_rank):
                stopped = process.poll() == PREEMPTED and self.training
                if process.returncode not in (None, 0) and not stopped and not self.asked:
                    return Ended(rank, self.world_size, process.returncode, _told(self.folder, rank))
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL)

    def run(self) -> None:
        while (failed := self.failure()) is None:
            if self.ended():
                return
            time.sleep(_POLL)
        time.sleep(GRACE)
        self.stop()
        _leave(failed.exit_code, str(failed))

    def ended(self) -> bool:
        """Return whether all ranks have ended, in any way."""
        return all(process.poll() is not None for process in self.processes)

    def stop(self, wait: float = 0.0) -> None:
        """Kill the ranks that have not ended after `wait` seconds."""
        deadline = time.monotonic() + wait
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(_POLL)
        self.asked = True
        for process in self.processes:
            if process.poll() is None:
                process.kill()


def end_with_rank_zero() -> bool:
    """Make the kernel end this process when rank 0, which has started it, dies.

    Returns:
        False where this process is no further rank.
    """
    pid = os.environ.get(RANK_ZERO)
    if pid is None or int(os.environ.get("LOCAL_RANK") or 0) == 0:
        return False
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(pid):  # it has died already
        os._exit(1)
    return True


def tell_rank_zero(run: Path, rank: int, message: str) -> None:
    """Leave the message of a UserError to rank 0, which shows it once for all ranks.

    Args:
        run: the run folder.
        rank: of this process.
        message: of the error.
    """
    _note(run, rank).write_text(message)


def _told(run: Path, rank: int) -> str:
    note = _note(run, rank)
    return note.read_text(errors="replace") if note.is_file() else ""


def remove_errors(run: Path) -> None:
    """Remove the messages that ranks of an earlier attempt have left in a run folder."""
    for note in run.glob(".rank-*-error"):
        note.unlink()


def _note(run: Path, rank: int) -> Path:
    return run / f".rank-{rank}-error"


def place(rank: int, world_size: int) -> str:
    """Return the line under a traceback that says which rank it is from."""
    return f"on rank {rank} of {world_size}, process {os.getpid()} on {socket.gethostname()}"


def end_within(seconds: float, error: BaseException, rank: int) -> None:
    """End this process after some seconds, whatever it waits for by then.

    That may be a GPU that waits for a lost rank, a thread or a worker.

    Args:
        seconds: from now.
        error: the reason, printed then.
        rank: of this process.
    """

    def force() -> None:
        traceback.print_exception(error)
        _leave(
            2 if isinstance(error, UserError) else 1,
            f"rank {rank} did not end in {seconds:.0f} s after this error and was stopped",
        )

    timer = threading.Timer(seconds, force)
    timer.daemon = True
    timer.start()


def _leave(code: int, line: str) -> NoReturn:
    with suppress(OSError, ValueError):  # their reader may be gone
        sys.stderr.write(f"error: {line}\n")
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(code)
