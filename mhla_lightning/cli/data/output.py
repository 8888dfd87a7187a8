"""What the verbs of `mhla data` share: arguments, progress bars, tables."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table

from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.data.index import ShardIndex

OnProgress = Callable[[str, int, int], None]  # split, done, in all
SPLITS = ("train", "val", "test")  # as in data.index, which brings numpy


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers."""
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that work on a shard each (default: the number of cores, at most 8)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")


def add_column(parser: argparse.ArgumentParser) -> None:
    """Add --text-column."""
    parser.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help="key of JSON lines, column of parquet and hf (default: text)",
    )


def count_or_share(text: str) -> int | float:
    """argparse type: digits are a number of samples, anything else a share."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of samples (1000) nor a share (0.2)"
        ) from None


def add_vae(parser: argparse.ArgumentParser) -> None:
    """Add what an index of latents must say: a latent z is used as (z - shift) * scale."""
    parser.add_argument(
        "--vae-name", metavar="NAME", help="what made the latents, e.g. stabilityai/sd-vae-ft-ema"
    )
    parser.add_argument("--vae-scale", type=float, metavar="S", help="a latent z is used as (z - T) * S")
    parser.add_argument("--vae-shift", type=float, metavar="T", help="see --vae-scale")


def vae_options(args: argparse.Namespace) -> tuple[str, float, float] | None:
    """(name, scale, shift) from add_vae's arguments, None when none was given. Raises UserError when some
    are missing.
    """
    given = {"--vae-name": args.vae_name, "--vae-scale": args.vae_scale, "--vae-shift": args.vae_shift}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(
            f"{', '.join(missing)} must be given too: an index of latents says by which VAE and how "
            "they are to be scaled"
        )
    for name in ("--vae-scale", "--vae-shift"):
        if not math.isfinite(given[name]):
            raise UserError(f"{name} is {given[name]}; it must be a finite number")
    return args.vae_name, args.vae_scale, args.vae_shift


def workers(args: argparse.Namespace) -> int:
    """--workers, or as many as this machine has use for."""
    from mhla_lightning.data.prepare.parallel import default_workers

    return default_workers() if args.workers is None else args.workers


def check_writable(option: str, file: str | None) -> None:
    """Refuse, before any work, a file that could not be written. Raises UserError."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise UserError(f"{option} {file}: there is no folder {Path(file).absolute().parent}")
    if file is not None and Path(file).is_dir():
        raise UserError(f"{option} {file} is a folder; name a file")


def write_json(file: str | None, content: Mapping[str, object]) -> None:
    """Write a table for programs, when asked to."""
    if file is not None:
        Path(file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def progress_bars(console: Console) -> Iterator[OnProgress]:
    """A bar for each split, moved by calling what the block gets."""
    bars: dict[str, TaskID] = {}
    progress = Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )

    def advance(split: str, done: int, total: int) -> None:
        progress.start()  # not before: it would leave an empty line above the sentence about a mistake
        if split not in bars:
            bars[split] = progress.add_task(split, total=total)
        progress.update(bars[split], completed=done)

    try:
        yield advance
    finally:
        if bars:
            progress.stop()


def index_row(split: str, index: ShardIndex) -> dict[str, str | int]:
    """What a user wants to know of an index."""
    return {
        "split": split,
        "kind": index.kind,
        "samples": index.samples,
        "shards": len(index.shards),
        "classes": len(index.classes),
        "bytes": index.bytes,
        "hash": index.hash,
    }


def index_table(title: str, rows: Sequence[Mapping[str, object]]) -> Table:
    """Splits that were written."""
    table = Table(*rows[0], title=title)
    for row in rows:
        shown = {**row, "bytes": decimal(int(str(row["bytes"]))), "hash": str(row["hash"])[:12]}
        table.add_row(*(str(value) for value in shown.values()))
    return table
