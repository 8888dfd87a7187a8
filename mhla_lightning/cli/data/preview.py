"""Show samples: a picture of images, latents or clips, or the first rows of tokens.

The picture is a PNG with classes or captions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from mhla_lightning.cli.data import output
from mhla_lightning.cli.output import check_writable
from mhla_lightning.errors import DataError, UserError

if TYPE_CHECKING:
    from mhla_lightning.data.prepare.preview import Preview

HELP = "show images, latents or clips in a picture, or the first token rows"
EPILOG = """examples:
  mhla data preview data/mnist --to mnist.png
  mhla data preview data/text --n 3"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla data preview`."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="folder or address (http://, s3://, ...) of a data set (train/, val/, ...) or of one split",
    )
    parser.add_argument(
        "--split", choices=output.SPLITS, help="split to show (default: train, or the first that exists)"
    )
    parser.add_argument(
        "--n", dest="count", type=int, metavar="N", help="samples to show (default: 64, or 4 rows of tokens)"
    )
    parser.add_argument(
        "--to",
        metavar="FILE",
        help="picture to write (default: NAME-SPLIT.png here), for tokens a text file (default: print)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="choose samples at random (default: evenly over the split, or the first rows of tokens)",
    )


def run(args: argparse.Namespace) -> int:
    """Show samples and return 0. Raises UserError."""
    check_writable("to", args.to)
    from mhla_lightning.data.prepare.preview import preview

    found = preview(args.path, args.split, args.count, args.seed)
    console = Console()
    text = "\n\n".join(found.texts)
    if found.png is None and args.to is None:
        console.print(Text(text), soft_wrap=True)
        return 0
    if found.shown and found.unusable == found.shown:
        raise DataError(
            args.path,
            f"none of {found.shown} samples of {found.split} can be decoded; `mhla data verify` tells why",
        )
    file = _file(args, found)
    try:
        file.write_bytes(found.png if found.png is not None else f"{text}\n".encode())
    except OSError as error:
        raise UserError(str(file), f"cannot be written ({error.strerror})") from error
    skipped = f"; {found.unusable} cannot be decoded (mhla data verify tells why)" if found.unusable else ""
    console.print(
        f"{file}: {found.shown} of {found.samples} samples of {found.split}{skipped}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _file(args: argparse.Namespace, found: Preview) -> Path:
    if args.to is not None:
        return Path(args.to)
    names = [part for part in args.path.split("?")[0].split("/") if part not in ("", ".", "..", found.split)]
    return Path(f"{names[-1] if names else 'data'}-{found.split}.png")
