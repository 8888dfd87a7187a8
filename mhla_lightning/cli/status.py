"""Show runs: state in the queue, restarts, step, loss, speed, time left, last checkpoint.

RUN is a run id, a run folder or a SLURM job id; without one all runs are shown. Local runs are shown, too.
SLURM's accounting is not needed.

  mhla status
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from mhla_lightning.cli.output import check_json, write_json
from mhla_lightning.cluster.queue import ACTIVE
from mhla_lightning.cluster.slurm import Slurm
from mhla_lightning.cluster.status import status_rows
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import FORMAT, RunFolder, find_runs, runs_root

_WIDE = 200  # columns of a table that is not shown on a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla status`."""
    parser.add_argument(
        "run", nargs="*", metavar="RUN", help="run id, run folder or SLURM job id (default: every run)"
    )
    parser.add_argument("--runs", metavar="DIR", help="folder of all runs (default: $MHLA_RUNS, else ./runs)")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=10.0,
        metavar="SECONDS",
        help="show them every SECONDS (default: 10) until no job is active",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="also write the rows as JSON; - prints them in place of the table",
    )


def run(args: argparse.Namespace) -> int:
    """Show the runs; return the exit code."""
    if args.watch is not None and args.watch <= 0:
        raise UserError("watch", f"{args.watch} is not allowed; it is a number of seconds above 0")
    file = None if args.json == "-" else args.json
    check_json(file)
    root = runs_root(args.runs)
    while True:
        rows = status_rows(_chosen(args.run, root), Slurm())
        write_json(file, {"format": FORMAT, "rows": rows})
        if args.json == "-":
            print(json.dumps({"format": FORMAT, "rows": rows}, indent=1), flush=True)
        else:
            _show(rows, clear=args.watch is not None and sys.stdout.isatty())
        if args.watch is None or not any(row["state"] in ACTIVE for row in rows):
            return 0
        time.sleep(args.watch)


def _chosen(names: list[str], root: Path) -> list[RunFolder]:
    if names:
        return [one for name in names for one in find_runs(name, root)]
    runs = [
        RunFolder(path.parent)
        for path in sorted(root.glob("*/recipe.yaml"), key=lambda path: path.parent.stat().st_mtime)
    ]
    if not runs:
        raise UserError("runs", f"there are no runs in {root}; choose another folder here or with $MHLA_RUNS")
    return runs


def _show(rows: list[dict[str, Any]], clear: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "run",
        "job",
        "state",
        "restarts",
        "nodes",
        "step",
        "loss",
        "samples/s",
        "time left: job, run",
        "checkpoint",
    )
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in _cells(row)))
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    if clear:
        console.clear()
    console.print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    state = row["state"] + (f" ({row['reason']})" if row["reason"] else "")
    step = f"{row['step']}/{row['max_steps']}" if row["max_steps"] else "-"
    speed = "-" if row["samples_per_second"] is None else f"{row['samples_per_second']:.4g}"
    loss = "-" if row["loss"] is None else f"{row['loss']:.4g}"
    left = f"{row['job_time_left'] or '-'}, {row['run_time_left'] or '-'}"
    facts = [row[name] for name in ("restarts", "nodes")]
    return [
        row["run"],
        row["job"] or "-",
        state,
        *("-" if fact is None else str(fact) for fact in facts),
        step,
        loss,
        speed,
        left,
        row["checkpoint"] or "-",
    ]
