"""Write text as shards of token rows with an index.

The same command continues an interrupted one.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mhla_lightning.cli.data import output
from mhla_lightning.cli.output import check_writable, progress_bars, write_json

if TYPE_CHECKING:
    from mhla_lightning.data.prepare.text.tokenize import TokenizeReport

HELP = "write text as token shards"
EPILOG = """INPUT is one of these:
  a file: text (one document), JSON lines, JSON (objects or one array), CSV or TSV with a header, or parquet;
    the content decides, and all but parquet may be compressed by gzip, zstd, xz or bzip2
  a folder of such files; text:FOLDER where its name is also that of another input
  stdlib, the sources of Python's standard library
  hf:NAME[:CONFIG][:SPLIT], a data set of the Hugging Face hub

examples:
  mhla data tokenize stdlib --to data/stdlib --length 1024
  mhla data tokenize /books notes.txt --to data/books --tokenizer bpe.json --length 2048 --val 0.02
  mhla data tokenize hf:HuggingFaceFW/fineweb-edu:sample-10BT --to data/fineweb --tokenizer gpt2 --val 2000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla data tokenize`."""
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files, folders, stdlib, hf:NAME[:CONFIG][:SPLIT]"
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="DIR",
        help="folder to make, with train/, val/ and tokenizer.json",
    )
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="bytes, a tokenizer.json, or a Hugging Face name such as gpt2 (default: bytes)",
    )
    parser.add_argument("--length", type=int, default=2048, metavar="T", help="tokens a row (default: 2048)")
    parser.add_argument(
        "--val-length",
        type=int,
        metavar="T",
        help="tokens a row of the val split (default: the value of --length)",
    )
    parser.add_argument(
        "--packing",
        default="best-fit",
        metavar="HOW",
        help=(
            "best-fit cuts only documents longer than a row, and pads; concatenate fills rows without "
            "padding (default: best-fit)"
        ),
    )
    parser.add_argument(
        "--val",
        type=output.count_or_share,
        default=0.01,
        metavar="N|SHARE",
        help="number (1000) or share (default: 0.01) of documents held out",
    )
    output.add_column(parser)
    parser.add_argument(
        "--shards", type=int, metavar="N", help="training shards (default: about 512 MB each, at least 16)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the order and of the held-out documents (default: 0)"
    )
    output.add_skipped_share(parser, "rows")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that DIR already holds")
    output.add_workers(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Tokenize and return 0. Raises UserError."""
    check_writable("json", args.json)
    from mhla_lightning.data.prepare.text.tokenize import TextOptions, tokenize

    options = TextOptions(
        args.tokenizer,
        args.length,
        args.val_length,
        args.packing,
        args.val,
        args.text_column,
        args.seed,
        args.shards,
        args.max_skipped_share,
    )
    console = Console()
    with progress_bars(console) as on_progress:
        report = tokenize(
            args.inputs,
            args.to,
            options,
            overwrite=args.overwrite,
            workers=output.workers(args),
            wait=False,
            on_progress=on_progress,
            on_note=lambda text: console.print(text, markup=False, soft_wrap=True),
        )
    rows = _rows(report)
    console.print(_table(args.to, rows))
    for line in _remarks(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    write_json(
        args.json,
        {
            "rows": rows,
            "summary": {
                "binary": report.binary,
                "empty": report.empty,
                "skipped": report.skipped.bad,
                "taken": report.taken,
                "left_out": [{"file": file, "reason": reason} for file, reason in report.left_out],
                "seconds": report.seconds,
            },
        },
    )
    return 0


def _rows(report: TokenizeReport) -> list[dict[str, object]]:
    rate = report.made / max(report.seconds, 1e-9)
    return [
        {
            "split": name,
            "documents": found.documents,
            "tokens": found.tokens,
            "rows": report.indices[name].samples,
            "length": report.indices[name].length,
            "padding": found.padding,
            "bytes_per_token": found.bytes / found.tokens,
            "tokens_per_second": rate,
            "shards": len(report.indices[name].shards),
            "dropped": found.dropped,
            "tokenizer": report.indices[name].tokenizer,
            "hash": report.indices[name].hash,
        }
        for name, found in report.splits.items()
    ]


def _table(title: str, rows: list[dict[str, object]]) -> Table:
    table = Table(title=title)
    for heading in ("split", "documents", "tokens", "rows", "padding", "bytes/token", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "split" else "right", no_wrap=True)
    for row in rows:
        counts = (f"{row[name]:,}" for name in ("documents", "tokens", "rows"))
        rates = (f"{row['padding']:.2%}", f"{row['bytes_per_token']:.3f}", f"{row['tokens_per_second']:,.0f}")
        table.add_row(str(row["split"]), *counts, *rates)
    return table


def _remarks(report: TokenizeReport) -> list[str]:
    left_out = [
        output.counted(count, what)
        for what, count in (("binary file", report.binary), ("empty document", report.empty))
        if count
    ]
    dropped = [
        f"{output.counted(found.dropped, 'token')} of {name}"
        for name, found in report.splits.items()
        if found.dropped
    ]
    remarks = {"left out": left_out, "dropped, since they fill no row": dropped}
    return [
        *output.read_files(report.taken, report.left_out),
        *output.bad_rows(report.skipped),
        *(f"{what}: {', '.join(counts)}" for what, counts in remarks.items() if counts),
    ]
