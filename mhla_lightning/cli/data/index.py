"""Write index.json and offsets for shards that others made.

The tar files are read, not changed.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from mhla_lightning.cli.data import output
from mhla_lightning.cli.output import check_writable, progress_bars, write_json
from mhla_lightning.errors import UserError
from mhla_lightning.textfiles import read_text, split_lines

HELP = "index shards that others made"
EPILOG = """A sample has one of these groups of members:
  images         KEY.jpg, KEY.png or KEY.webp, and KEY.cls (the class number) or, with --captioned,
                 KEY.txt or KEY.json (the caption), for mhla data latents
  tokens         KEY.tokens.npy and KEY.documents.npy
  latents        KEY.latent.npy, and KEY.cls or KEY.text.npy
  clips          KEY.clip.npy or KEY.mp4, and KEY.txt (the caption)

examples:
  mhla data index /data/imagenet --classes names.txt
  mhla data index /data/latents/train --vae-name sd-vae --vae-scale 0.18215 --vae-shift 0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla data index`."""
    parser.add_argument("path", metavar="PATH", help="folder of *.tar, or of train/, val/, test/ with *.tar")
    parser.add_argument(
        "--kind",
        choices=["images", "tokens", "latents", "video_latents", "clips"],
        help="refuse samples of another kind (default: the kind of the first sample)",
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="text file with the names of the classes, one a line, class 0 first (default: their numbers)",
    )
    parser.add_argument(
        "--captioned", action="store_true", help="images have captions, KEY.txt or KEY.json, and no classes"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="tokenizer that made the tokens, e.g. bytes or gpt2"
    )
    parser.add_argument(
        "--rate", type=float, metavar="R", help="frames a second, for clips whose files do not hold it"
    )
    output.add_vae(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an index; its classes, tokenizer, VAE and rate are kept where no new ones are given",
    )
    output.add_workers(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Index and return 0. Raises UserError."""
    check_writable("json", args.json)
    given, classes = output.vae_options(args), _classes(args.classes)
    from mhla_lightning.data.index import VAE
    from mhla_lightning.data.prepare.indexing import Facts, index_shards

    vae = given and VAE(*given, shape=())
    facts = Facts(args.kind, classes, vae, args.tokenizer, args.rate, args.captioned)
    console = Console()
    with output.vae_arguments(), progress_bars(console) as on_progress:
        indices = index_shards(
            args.path,
            facts,
            args.overwrite,
            output.workers(args),
            on_progress,
            on_note=lambda text: console.print(text, markup=False, soft_wrap=True),
        )
    rows = [output.index_row(split, index) for split, index in indices.items()]
    console.print(output.index_table(args.path, rows))
    write_json(args.json, {"rows": rows})
    return 0


def _classes(file: str | None) -> tuple[str, ...] | None:
    if file is None:
        return None
    names = split_lines(read_text(file, "classes"))
    while names and not names[-1].strip():
        names.pop()
    if not names or not all(name.strip() for name in names):
        raise UserError("classes", f"{file} must hold one name a line, without empty lines")
    return tuple(name.strip() for name in names)
