"""Learn a byte-level BPE from text and write it as a tokenizer.json.

The same text gives the same file.
"""

from __future__ import annotations

import argparse
import os

from rich.console import Console
from rich.table import Table

from mhla_lightning.cli.data import output
from mhla_lightning.cli.output import check_writable, progress_bars, write_json
from mhla_lightning.errors import UserError

HELP = "learn a tokenizer from text"
EPILOG = """INPUT is described in `mhla data tokenize --help`.

examples:
  mhla data train-tokenizer stdlib --to bpe.json --vocabulary 4096
  mhla data tokenize stdlib --to data/stdlib --tokenizer bpe.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla data train-tokenizer`."""
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files, folders, stdlib, hf:NAME[:CONFIG][:SPLIT]"
    )
    parser.add_argument("--to", required=True, metavar="FILE", help="file to write; its name ends in .json")
    parser.add_argument(
        "--vocabulary",
        type=int,
        required=True,
        metavar="N",
        help="number of ids, at least 257: all bytes and <|endoftext|>",
    )
    output.add_column(parser)
    output.add_skipped_share(parser, "rows")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads (default: the number of cores, at most 8)"
    )
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Train and return 0. Raises UserError."""
    check_writable("json", args.json)
    if output.workers(args) < 1:
        raise UserError("workers", f"got {output.workers(args)}; it must be at least 1")
    # The package tokenizers reads it when it starts its threads.
    os.environ["RAYON_NUM_THREADS"] = str(output.workers(args))
    from mhla_lightning.data.prepare.text.train import train_tokenizer

    console = Console()
    with progress_bars(console) as on_progress:
        found = train_tokenizer(
            args.inputs,
            args.to,
            args.vocabulary,
            args.text_column,
            args.overwrite,
            args.max_skipped_share,
            lambda done, total: on_progress("read", done, total),
        )
    row = {
        "tokenizer": found.tokenizer.name,
        "vocabulary": found.tokenizer.vocabulary,
        "documents": found.documents,
        "bytes": found.bytes,
    }
    row["bytes_per_token"] = round(found.bytes_per_token, 3)
    table = Table(title=args.to)
    for heading in row:
        table.add_column(heading, overflow="fold")
    table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    for line in (*output.read_files(found.taken, found.left_out), *output.bad_rows(found.skipped)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if found.tokenizer.vocabulary < args.vocabulary:
        console.print(f"the text has no more than {found.tokenizer.vocabulary} ids", soft_wrap=True)
    write_json(args.json, {"rows": [row]})
    return 0
