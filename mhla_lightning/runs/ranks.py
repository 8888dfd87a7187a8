"""The ranks of a run on one machine: none outlives another's failure, and the command says at its end which
rank ended, and how.

Rank 0 is the process that the user has started; it starts the others (strategies.launcher). Ranks that
torchrun or srun start are watched by those. Standard library only.
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
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mhla_lightning.errors import UserError

PREEMPTED = 75
RANK_ZERO = "MHLA_RANK_ZERO"  # pid of the process that has started this one as a further rank
# seconds in which rank 0 may end by itself, files closed and states written, once another rank has failed
GRACE = 10.0
_POLL = 0.2
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """A rank that has failed.

    Attributes:
        rank, world_size: which of how many.
        code: exit code; of a signal its negative number.
        told: the sentence of its UserError; empty where it had none.
    """

    rank: int
    world_size: int
    code: int
    told: str

    @property
    def exit_code(self) -> int:
        """What the command exits with for it."""
        return self.code if self.code == 2 else 1

    def __str__(self) -> str:
        who = f"rank {self.rank} of {self.world_size}"
        if self.told:
            return f"{who}: {self.told}"
        if self.code < 0:
            why = " (for lack of memory, perhaps: dmesg says so)" if self.code == -signal.SIGKILL else ""
            return f"{who} was ended by {signal.Signals(-self.code).name}{why}; the others were stopped"
        return f"{who} ended with exit code {self.code}, its error stands above; the others were stopped"


class Watch(threading.Thread):
    """Watches the ranks that this process has started.

    Where one fails and this process still stands after GRACE seconds, in a collective that waits for ever, it
    ends the process.

    Args:
        processes: by rank, the first being `first_rank`.
        first_rank: the rank of processes[0].
        world_size: of the run.
        run: the run folder.
    """

    def __init__(
        self, processes: Sequence[subprocess.Popen[bytes]], first_rank: int, world_size: int, run: Path
    ) -> None:
        super().__init__(daemon=True, name="ranks")
        self.processes, self.first_rank, self.world_size, self.folder = processes, first_rank, world_size, run
        self.asked = False  # ranks were told to end: that is no failure

    def failure(self, wait: float = 0.0) -> Ended | None:
        """The first rank found to have failed, looking for at least `wait` seconds."""
        deadline = time.monotonic() + wait
        while True:
            for rank, process in enumerate(self.processes, self.first_rank):
                if process.poll() not in (None, 0, PREEMPTED) and not self.asked:
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
        """Whether all have, in whatever way."""
        return all(process.poll() is not None for process in self.processes)

    def stop(self, wait: float = 0.0) -> None:
        """Leaves the ranks `wait` seconds to end, then kills those that have not."""
        deadline = time.monotonic() + wait
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(_POLL)
        self.asked = True
        for process in self.processes:
            if process.poll() is None:
                process.kill()


def end_with_rank_zero() -> bool:
    """Makes the kernel end this process when the one that has started it as a further rank dies; False
    where none has.
    """
    pid = os.environ.get(RANK_ZERO)
    if pid is None or int(os.environ.get("LOCAL_RANK") or 0) == 0:
        return False
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(pid):  # it has died already
        os._exit(1)
    return True


def tell_rank_zero(run: Path, rank: int, sentence: str) -> None:
    """Leaves rank 0 the sentence of a UserError; many ranks often have the same, and the user should read
    it once.
    """
    _note(run, rank).write_text(sentence)


def _told(run: Path, rank: int) -> str:
    note = _note(run, rank)
    return note.read_text() if note.is_file() else ""


def forget(run: Path) -> None:
    """Removes what ranks of an earlier attempt have told."""
    for note in run.glob(".rank-*-error"):
        note.unlink()


def _note(run: Path, rank: int) -> Path:
    return run / f".rank-{rank}-error"


def place(rank: int, world_size: int) -> str:
    """Who speaks: a line under a traceback."""
    return f"on rank {rank} of {world_size}, process {os.getpid()} on {socket.gethostname()}"


def end_within(seconds: float, error: BaseException, rank: int) -> None:
    """Ends this process after so long, whatever it hangs in by then: a GPU that waits for a lost rank, a
    thread, a worker.
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
    sys.stdout.flush()
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()
    os._exit(code)
