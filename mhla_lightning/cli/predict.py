"""Names the likeliest classes of images, with an image classifier of a run.

An image is prepared as in the run's validation. Of a folder, all images in and below it are taken:
  mhla predict RUN photo.jpg
  mhla predict RUN photos --top-k 5 --json photos.json
  mhla predict RUN photos --to sheet.png    a contact sheet, each image with its class
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.output import check_json, check_writable, demand_at_least, write_json
from mhla_lightning.cli.trained import add_trained_arguments
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from mhla_lightning.inference.classifier import Classified, ImageClassifierRun

_ON_SHEET = 400  # images of a contact sheet at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla predict`."""
    add_trained_arguments(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, and folders of them")
    parser.add_argument(
        "--top-k", metavar="K", type=int, default=3, help="classes of each image (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=64, help="images at once (default: %(default)s)"
    )
    parser.add_argument("--to", metavar="FILE.png", help="write a contact sheet in place of the table")
    parser.add_argument("--json", metavar="FILE", help="write classes and probabilities as JSON too")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code, 2 where an image cannot be used."""
    from rich.console import Console

    found, rows = perform(args)
    console = Console()
    if args.to is None:
        console.print(_table(rows))
    for row in rows:
        if row.problem is not None:
            Console(stderr=True).print(_line(f"{row.file}: {row.problem}"), soft_wrap=True)
    _say_end(console, args, found, rows)
    write_json(args.json, {"rows": [row.as_dict() for row in rows], "summary": _summary(found, rows)})
    return 2 if any(row.problem is not None for row in rows) else 0


def perform(args: argparse.Namespace) -> tuple[ImageClassifierRun, list[Classified]]:
    """Classify the images and write the contact sheet.

    Raises:
        UserError: an argument or the run is wrong, or no image can be used.
    """
    demand_at_least(args, top_k=1, batch_size=1)
    check_json(args.json)
    check_writable("to", args.to)
    if args.to is not None and Path(args.to).suffix.lower() != ".png":
        raise UserError("to", f"{args.to} must end in .png, the format that is written")
    from mhla_lightning.inference.classifier import classify, find_classifier, image_files
    from mhla_lightning.inference.weights import choose_device

    device, files = choose_device(args.device), image_files(args.images)
    if args.to is not None and Path(args.to).resolve() in {file.resolve() for file in files}:
        raise UserError("to", f"{args.to} is one of the images; name another file")
    found = find_classifier(args.run, runs=args.runs, ckpt=args.ckpt, ema=not args.no_ema)
    rows: list[Classified] = []
    tiles: list[tuple[list[Any], str]] = []
    for one in classify(found, files, args.top_k, args.batch_size, device):
        if args.to is not None and len(tiles) < _ON_SHEET:
            tiles += _tiles(one)
        rows.append(replace(one, image=None))
    if all(row.problem is not None for row in rows):
        raise UserError(str(rows[0].file), str(rows[0].problem))
    if args.to is not None:
        _write_sheet(args.to, tiles)
    return found, rows


def _tiles(one: Classified) -> Iterator[tuple[list[Any], str]]:
    if one.image is not None:
        from mhla_lightning.data.prepare.preview import TILE

        one.image.thumbnail((2 * TILE, 2 * TILE))  # thousands of photographs would fill the memory
        yield [one.image], f"{_percent(one.probabilities[0])} {one.classes[0]}"


def _write_sheet(to: str, tiles: list[tuple[list[Any], str]]) -> None:
    from mhla_lightning.data.prepare.preview import preview_sheet

    try:
        preview_sheet(tiles).save(to, format="PNG")
    except OSError as error:
        raise UserError("to", f"{to} cannot be written ({error.strerror})") from error


def _table(rows: list[Classified]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("then", overflow="fold")
    for row in rows:
        if row.problem is None:
            others = zip(row.classes[1:], row.probabilities[1:], strict=True)
            then = ", ".join(f"{name} {_percent(share)}" for name, share in others)
            first = _percent(row.probabilities[0])
            table.add_row(_line(str(row.file)), _line(row.classes[0]), first, _line(then))
    return table


def _say_end(
    console: Console, args: argparse.Namespace, found: ImageClassifierRun, rows: list[Classified]
) -> None:
    bad = sum(row.problem is not None for row in rows)
    shown = min(len(rows) - bad, _ON_SHEET)
    good = len(rows) - bad
    counted = f"{good} image{'' if good == 1 else 's'}"
    parts = [counted if args.to is None else f"{args.to}: {shown} of {len(rows)} images"]
    parts += [f"{bad} cannot be used"] if bad else []
    average = "averaged" if found.averaged else "raw"
    parts.append(f"{average} weights of {found.run.run_id} {found.checkpoint.name}")
    console.print(_line(", ".join(parts)), soft_wrap=True)


def _summary(found: ImageClassifierRun, rows: list[Classified]) -> dict[str, Any]:
    return {
        "run": found.run.run_id,
        "checkpoint": found.checkpoint.name,
        "weights": "averaged" if found.averaged else "raw",
        "classes": list(found.classes),
        "images": len(rows),
    }


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _line(text: str) -> Any:
    """Return text for a terminal, where no name can command it."""
    from rich.text import Text

    return Text(text if text.isprintable() else ascii(text))
