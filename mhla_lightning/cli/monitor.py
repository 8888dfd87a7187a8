"""Start TensorBoard on run folders, and print how to see it from your own machine.

RUN is a run id, a run folder or a SLURM job id; without one every run is shown, also those that start later.
`mhla report RUN` writes one HTML page instead, which needs no server.

  mhla monitor
"""

from __future__ import annotations

import argparse
import getpass
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder, find_runs, is_run, runs_root

_LOOK = 5.0  # seconds between two looks for new runs
_PAUSE = 0.2  # seconds between two looks for a signal
_GRACE = 5.0  # seconds that TensorBoard has to end
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla monitor`."""
    parser.add_argument(
        "run", nargs="*", metavar="RUN", help="run id, run folder or SLURM job id (default: every run)"
    )
    parser.add_argument("--runs", metavar="DIR", help="folder of all runs (default: $MHLA_RUNS, else ./runs)")
    parser.add_argument(
        "--port",
        type=int,
        default=6006,
        metavar="N",
        help="port of TensorBoard on this machine (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Start TensorBoard; return its exit code."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard", "the package is not installed: pip install tensorboard")
    root = runs_root(args.runs)
    if not args.run and not root.is_dir():
        raise UserError("runs", f"there is no folder {root}; choose another one here or with $MHLA_RUNS")
    with tempfile.TemporaryDirectory(prefix="mhla-monitor-") as links:
        logdir = Path(links)
        link_runs(args.run, root, logdir)
        # training and validation side by side; TensorBoard's own first screen has all curves, by name
        print(f"http://localhost:{args.port}/#custom_scalars  ({', '.join(args.run) or root})")
        if "SSH_CONNECTION" in os.environ:
            print(
                f"on your own machine: ssh -N -L {args.port}:localhost:{args.port} "
                f"{getpass.getuser()}@{socket.getfqdn()}"
            )
        print(f"one page without a server: mhla report {' '.join(map(shlex.quote, args.run)) or 'RUN'}")
        sys.stdout.flush()
        command = [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            str(logdir),
            "--port",
            str(args.port),
            "--host",
            "localhost",
        ]
        return serve(command, (lambda: None) if args.run else (lambda: link_runs([], root, logdir)))


def serve(command: list[str], look: Callable[[], None]) -> int:
    """Run a server until it ends, or until Ctrl-C, SIGTERM or SIGHUP ends it; return its exit code, or 0.

    The server never outlives this process, whose folder of links it reads.

    Args:
        command: starts the server.
        look: called every five seconds.
    """
    with noted(_ENDS) as asked:
        process = subprocess.Popen(command)
        try:
            looked = time.monotonic()
            while not asked:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(_PAUSE)
                if time.monotonic() - looked > _LOOK:
                    look()
                    looked = time.monotonic()
            return 0
        finally:
            end(process)


@contextmanager
def noted(signals: tuple[signal.Signals, ...]) -> Iterator[list[int]]:
    """Yield a list that gets each of these signals, which do nothing else meanwhile.

    A handler that raises could do so while a process starts, which nobody would end.
    """
    found: list[int] = []
    before = {number: signal.signal(number, lambda given, _: found.append(given)) for number in signals}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process: by SIGTERM, and by SIGKILL where that has no effect."""
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def link_runs(names: list[str], root: Path, links: Path) -> None:
    """Link runs into one folder, under their names; those that are there stay.

    TensorBoard's list of folders allows no comma or colon, and would call a single run `.`.

    Args:
        names: of runs; empty for all below `root`, those of comparisons too.
        root: folder of all runs.
        links: gets the links.
    """
    if names:
        found = {one.run_id: one.path for name in names for one in find_runs(name, root)}
    else:
        folders = [path.parent for path in (*root.glob("*/recipe.yaml"), *root.glob("*/*/recipe.yaml"))]
        # a job's copy of its recipe is in a folder of the run
        found = {str(path.relative_to(root)): path for path in folders if not is_run(path.parent)}
    for name, path in found.items():
        link = links / name
        if not link.is_symlink():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(RunFolder(path).tensorboard, target_is_directory=True)
