"""`mhla data`: make shards. Everything heavy is imported inside the verb, so that `mhla --help` stays fast."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from mhla_lightning.data.index import ShardIndex
    from mhla_lightning.data.shards import Progress as OnProgress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `mhla data` to its parser."""
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    pack = verbs.add_parser("pack", help="write images as shards", description="Write images as webdataset shards with an index.")
    pack.add_argument("source", help="mnist, an image folder (CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg), or torchvision:NAME[:ROOT]")
    pack.add_argument("--to", required=True, metavar="DIR", help="folder to make; holds train/ and val/ afterwards")
    pack.add_argument(
        "--val", type=_samples_or_share, metavar="N|SHARE", help="samples (1000) or share (0.2, the default) held out; not if the source has its own"
    )
    pack.add_argument("--shards", type=int, metavar="N", help="training shards (default: about 512 MB each, at least 16)")
    pack.add_argument("--seed", type=int, default=0, help="of the order of samples and of the held-out part (default: 0)")
    pack.add_argument("--overwrite", action="store_true", help="replace shards that DIR already holds")
    pack.add_argument("--json", metavar="FILE", help="write the table as JSON too")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb that `args` (of add_arguments' parser) names; 0 when done. Raises UserError."""
    from mhla_lightning.data.pack import pack

    console = Console()
    with _progress(console) as on_progress:
        indices = pack(args.source, args.to, val=args.val, shards=args.shards, seed=args.seed, overwrite=args.overwrite, on_progress=on_progress)
    rows = [_row(split, index) for split, index in indices.items()]
    console.print(_table(args.to, rows))
    if args.json is not None:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def _samples_or_share(text: str) -> int | float:
    """argparse type: digits are samples, anything else a share."""
    return int(text) if text.isdigit() else float(text)


@contextmanager
def _progress(console: Console) -> Iterator[OnProgress]:
    bars: dict[str, TaskID] = {}
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), console=console) as progress:

        def advance(split: str, done: int, total: int) -> None:
            if split not in bars:
                bars[split] = progress.add_task(split, total=total)
            progress.update(bars[split], completed=done)

        yield advance


def _row(split: str, index: ShardIndex) -> dict[str, str | int]:
    return {
        "split": split,
        "samples": index.samples,
        "shards": len(index.shards),
        "classes": len(index.classes),
        "bytes": index.bytes,
        "hash": index.hash,
    }


def _table(folder: str, rows: list[dict[str, str | int]]) -> Table:
    table = Table(*rows[0], title=folder)
    for row in rows:
        shown = row | {"bytes": decimal(int(row["bytes"])), "hash": str(row["hash"])[:12]}
        table.add_row(*(str(value) for value in shown.values()))
    return table
