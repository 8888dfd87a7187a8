"""Measure the time to the first batch of a resume deep inside a large data set."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from mhla_lightning.cli.output import demand_at_least, load, write_json
from mhla_lightning.errors import UserError

HELP = "seconds and memory from a data module to its first batch, deep inside many samples"
EXAMPLE = "--samples 100000 --turns 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla bench resume`."""
    parser.add_argument(
        "--shards",
        type=int,
        default=1000,
        help="made in the temporary folder, 2 KB a sample (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=int, default=1000, help="tiny images a shard (default: %(default)s)"
    )
    parser.add_argument(
        "--at", type=float, default=0.9, help="share of an epoch that was consumed (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument(
        "--turns", type=int, default=5, help="each with a new data module (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    demand_at_least(args, shards=1, samples=1, workers=0, turns=1)
    if not 0 <= args.at < 1:
        raise UserError("at", f"{args.at} is no share of an epoch; it is from 0 to below 1")
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import Progress
    from rich.table import Table

    from mhla_lightning.bench.data_resume import make_many, measure_resume

    with tempfile.TemporaryDirectory(prefix="mhla-bench-") as folder, Progress(transient=True) as progress:
        bar = progress.add_task("making shards", total=args.shards)
        make_many(Path(folder), args.shards, args.samples, lambda: progress.advance(bar))
        position = int(args.shards * args.samples * args.at)
        rows: list[dict[str, Any]] = [
            measure_resume(Path(folder), position, args.workers) for _ in range(args.turns)
        ]
    size = f"{args.shards * args.samples:,} samples in {args.shards:,} shards"
    table = Table(title=f"{size}, resumed at {position:,} with {args.workers} workers; {load()}")
    for heading in (
        "turn",
        "seconds to the first batch",
        "memory taken here",
        "memory of a worker (with what it shares with this process)",
    ):
        table.add_column(heading, justify="right")
    for number, row in enumerate(rows, start=1):
        table.add_row(
            str(number), f"{row['seconds']:.2f}", decimal(row["process_bytes"]), decimal(row["worker_bytes"])
        )
    Console().print(table)
    write_json(args.json, {"rows": rows, "summary": {"slowest_seconds": max(row["seconds"] for row in rows)}})
    return 0
