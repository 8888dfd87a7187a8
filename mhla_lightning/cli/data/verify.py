"""Check shards: files, tar structure, offsets, keys and every sample.

The exit code is 2 when there is a problem.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mhla_lightning.cli.data import output
from mhla_lightning.cli.output import check_writable, progress_bars, write_json

if TYPE_CHECKING:
    from mhla_lightning.data.prepare.verify import VerifyReport

HELP = "check the bytes, the structure and every sample of shards"
EPILOG = """examples:
  mhla data verify data/mnist
  mhla data verify s3://bucket/imagenet --split val --json problems.json"""
_SHOWN = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla data verify`."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="folder or address (http://, s3://, ...) of a data set (train/, val/, ...) or of one split",
    )
    parser.add_argument("--split", nargs="+", choices=output.SPLITS, help="splits to check (default: all)")
    output.add_workers(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Verify and return 0 when clean, else 2. Raises UserError when there is nothing to check."""
    check_writable("json", args.json)
    from mhla_lightning.data.prepare.verify import verify

    console = Console()
    with progress_bars(console) as on_progress:
        report = verify(args.path, args.split, output.workers(args), on_progress)
    rows = [problem._asdict() for problem in report.problems]
    summary = {
        "problems": report.found,
        "samples": report.samples,
        "unusable": report.unusable,
        "shards": report.shards,
    }
    write_json(args.json, {"rows": rows, "summary": summary})
    if not report.found:
        console.print(f"no problem found: {report.samples} samples, {report.shards} shards", soft_wrap=True)
        return 0
    _print_problems(console, report)
    return 2


def _print_problems(console: Console, report: VerifyReport) -> None:
    table = Table("file", "sample", "problem")
    for problem in report.problems[:_SHOWN]:
        table.add_row(*(escape(text) for text in problem))
    console.print(table)
    if report.found > _SHOWN:
        console.print(f"... and {report.found - _SHOWN} more (--json FILE lists them)", soft_wrap=True)
    problems = "1 problem" if report.found == 1 else f"{report.found} problems"
    console.print(
        f"{problems} found: {report.unusable} of {report.samples} samples looked at cannot be decoded",
        soft_wrap=True,
    )
