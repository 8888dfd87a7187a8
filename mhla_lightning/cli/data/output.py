"""Arguments, progress bars and tables that the verbs of `mhla data` share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.table import Table

from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.data.index import ShardIndex
    from mhla_lightning.data.prepare.text.documents import RowTally

SPLITS = ("train", "val", "test")  # as in data.index, which imports numpy
_SHOWN = 5
VAE_ARGUMENTS = ("vae_name", "vae_scale", "vae_shift")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers."""
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: the number of cores, at most 8)",
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
        help="key of JSON, column of CSV, parquet and hf data sets; a.b for b inside a (default: text)",
    )


def add_skipped_share(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --max-skipped-share.

    Args:
        parser: of the verb.
        what: may be left out.
    """
    parser.add_argument(
        "--max-skipped-share",
        type=float,
        default=0.01,
        metavar="P",
        help=f"allowed share of {what} that cannot be read (default: 0.01)",
    )


def counted(count: int, what: str) -> str:
    """Return a count with its noun, such as `2 files`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def read_files(taken: Mapping[str, int], left_out: Sequence[tuple[str, str]]) -> list[str]:
    """Return lines that say what files of text were taken for, and which were left out.

    Args:
        taken: number of files by what they were taken for.
        left_out: (file, reason).
    """
    read = ", ".join(f"{counted(number, 'file')} as {kind}" for kind, number in taken.items())
    lines = [f"read: {read}"] if read else []
    reasons: dict[str, list[str]] = {}
    for file, reason in left_out:
        reasons.setdefault(reason, []).append(file.rpartition("/")[2])
    for reason, files in reasons.items():
        more = f" and {len(files) - _SHOWN:,} more" if len(files) > _SHOWN else ""
        lines.append(f"left out: {', '.join(files[:_SHOWN])}{more} ({reason})")
    return lines


def bad_rows(skipped: RowTally) -> list[str]:
    """Return a line about rows that cannot be read; none where there are none."""
    if skipped.first is None:
        return []
    return [f"left out: {counted(skipped.bad, 'row')}; {skipped.first.source}: {skipped.first.reason}"]


def count_or_share(text: str) -> int | float:
    """Parse an argument: digits are a number of samples, anything else is a share."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of samples (1000) nor a share (0.2)"
        ) from None


def add_vae(parser: argparse.ArgumentParser) -> None:
    """Add the facts about a VAE that an index of latents holds: name, scale and shift."""
    parser.add_argument(
        "--vae-name",
        metavar="NAME",
        help="name of the VAE that made the latents, e.g. stabilityai/sd-vae-ft-ema",
    )
    parser.add_argument(
        "--vae-scale", type=float, metavar="S", help="scale of the VAE: a latent z is used as (z - T) * S"
    )
    parser.add_argument("--vae-shift", type=float, metavar="T", help="shift of the VAE; see --vae-scale")


def vae_options(args: argparse.Namespace) -> tuple[str, float, float] | None:
    """Return (name, scale, shift) of add_vae's arguments, or None when none was given.

    Raises UserError when some are missing.
    """
    given = {name: getattr(args, name) for name in VAE_ARGUMENTS}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(
            missing[0],
            f"missing; an index of latents needs all of {', '.join(f'`{name}`' for name in given)}",
        )
    for name in VAE_ARGUMENTS[1:]:
        if not math.isfinite(given[name]):
            raise UserError(name, f"got {given[name]}; it must be a finite number")
    return args.vae_name, args.vae_scale, args.vae_shift


def workers(args: argparse.Namespace) -> int:
    """Return --workers, or the number that suits this machine."""
    from mhla_lightning.data.prepare.parallel import default_workers

    return default_workers() if args.workers is None else args.workers


@contextmanager
def vae_arguments() -> Iterator[None]:
    """Name add_vae's arguments in an error about the library's one argument `vae`."""
    try:
        yield
    except UserError as error:
        if error.key != "vae":
            raise
        options = ", ".join(f"`{name}`" for name in VAE_ARGUMENTS)
        raise UserError(VAE_ARGUMENTS[0], f"{error.reason} ({options})") from error


def index_row(split: str, index: ShardIndex) -> dict[str, str | int]:
    """Return the facts of an index for a table."""
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
    """Return a table of the splits that were written."""
    table = Table(*rows[0], title=title)
    for row in rows:
        shown = {**row, "bytes": decimal(int(str(row["bytes"]))), "hash": str(row["hash"])[:12]}
        table.add_row(*(str(value) for value in shown.values()))
    return table
