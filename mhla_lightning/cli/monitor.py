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
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder, find_runs, is_run, runs_root

_LOOK = 5.0  # seconds between two looks for new runs


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
        # the screen with loss and validation; TensorBoard's own first one begins with the heat maps
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
        with subprocess.Popen(command) as process:
            try:
                while True:
                    with suppress(subprocess.TimeoutExpired):
                        return process.wait(_LOOK)
                    if not args.run:
                        link_runs([], root, logdir)
            except KeyboardInterrupt:
                return 0


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
