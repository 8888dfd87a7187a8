"""Start TensorBoard on run folders, and print how to see it from your own machine.

RUN is a run id, a run folder or a SLURM job id; without one every run is shown, also those that start later.
`mhla report RUN` writes one HTML page instead, which needs no server.
"""

from __future__ import annotations

import argparse
import getpass
import importlib.util
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import find_runs, runs_root


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
        logdir = _linked(args.run, root, Path(links)) if args.run else root
        print(f"http://localhost:{args.port}/  ({logdir if not args.run else ', '.join(args.run)})")
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
        with subprocess.Popen(command) as process:
            try:
                return process.wait()
            except KeyboardInterrupt:
                return 0


def _linked(names: list[str], root: Path, links: Path) -> Path:
    """Link runs into one folder: TensorBoard's list of folders allows no comma or colon."""
    for name in names:
        for one in find_runs(name, root):
            (links / one.run_id).symlink_to(one.tensorboard, target_is_directory=True)
    return links
