"""Show the output of a run's job: the batch script's lines, and those of a rank.

RUN is a run id, a run folder or a SLURM job id. With -f new lines are shown until the job has ended.

  mhla logs RUN -f
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from mhla_lightning.cluster.jobs import attempts, current_job
from mhla_lightning.cluster.queue import ask
from mhla_lightning.cluster.script import JOB_LOG
from mhla_lightning.cluster.slurm import Slurm
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder, find_run, runs_root

_POLL = 0.5  # seconds between two looks at the files
_ASK = 5.0  # seconds between two questions to SLURM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla logs`."""
    parser.add_argument("run", metavar="RUN", help="run id, run folder or SLURM job id")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="show lines as they are written, until the job has ended"
    )
    parser.add_argument("--rank", type=int, metavar="N", help="show only the lines of this rank")
    parser.add_argument(
        "-n",
        "--lines",
        type=int,
        default=200,
        metavar="N",
        help="begin with the last N lines of each file (default: %(default)s)",
    )
    parser.add_argument("--runs", metavar="DIR", help="folder of all runs (default: $MHLA_RUNS, else ./runs)")


def run(args: argparse.Namespace) -> int:
    """Show the lines; return the exit code."""
    one, slurm = find_run(args.run, runs_root(args.runs)), Slurm()
    job = current_job(one)
    if job is None:
        raise UserError("run", f"{one.run_id} was never submitted; a local run prints to its terminal")
    tail = _Tail(_files(one, args.rank), args.lines)
    shown = tail.show()
    if not shown and not args.follow:
        print(f"job {job} has printed nothing yet ({_state(slurm, job)[0]})")
    if args.follow:
        _follow(tail, slurm, job)
    return 0


def _files(one: RunFolder, rank: int | None) -> list[Path]:
    if rank is None:
        return [one.path / JOB_LOG, one.path / "slurm" / "rank-0.log"]
    path = one.path / "slurm" / f"rank-{rank}.log"
    ranks = sorted(int(log.stem.removeprefix("rank-")) for log in path.parent.glob("rank-*.log"))
    if not path.is_file() and attempts(one) and ranks:
        raise UserError(
            "rank", f"run {one.run_id} has no rank {rank}; ranks with a log: {', '.join(map(str, ranks))}"
        )
    return [path]


def _follow(tail: _Tail, slurm: Slurm, job: str) -> None:
    while True:
        state, active = _state(slurm, job)
        asked = time.monotonic()
        while time.monotonic() - asked < _ASK:
            tail.show()
            if not active:
                print(f"job {job}: {state}")
                return
            time.sleep(_POLL)


def _state(slurm: Slurm, job: str) -> tuple[str, bool]:
    queue = ask(slurm, [job]).get(job)
    if queue is None:
        return "ended", False
    return queue.state + (f", {queue.reason}" if queue.reason else ""), queue.active


class _Tail:
    """Prints the new lines of files, like `tail`: with the file's name where there are several.

    Args:
        files: to read; those that do not exist yet may come later.
        lines: number of last lines of each file to begin with.
    """

    def __init__(self, files: list[Path], lines: int) -> None:
        self.files, self.lines = files, lines
        self._at: dict[Path, int] = {}
        self._last: Path | None = None

    def show(self) -> bool:
        """Print the new lines; return whether there were any."""
        any_new = False
        for path in self.files:
            for line in self._new(path):
                if len(self.files) > 1 and path != self._last:
                    print(f"==> {path.parent.name}/{path.name} <==")
                print(line, flush=True)
                self._last, any_new = path, True
        return any_new

    def _new(self, path: Path) -> Iterator[str]:
        if not path.is_file():
            return
        first = path not in self._at
        with path.open("rb") as file:
            file.seek(0 if first else self._at[path])
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # without a line that is being written
        self._at[path] = self._at.get(path, 0) + len(whole)
        lines = whole.decode(errors="replace").splitlines()
        yield from lines[-self.lines :] if first else lines
