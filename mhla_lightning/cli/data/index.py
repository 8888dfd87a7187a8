"""Write index.json and offsets for shards that others made. The tar files are read, not changed."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from mhla_lightning.cli.data import output
from mhla_lightning.errors import UserError

HELP = "index shards that others made"
EPILOG = """Samples are KEY.jpg or KEY.png with KEY.cls (a class number), KEY.tokens.npy with KEY.documents.npy,
KEY.latent.npy with KEY.cls or KEY.text.npy, or KEY.clip.npy or KEY.mp4 with KEY.txt (the caption).

examples:
  mhla data index /data/imagenet --classes names.txt
  mhla data index /data/latents/train --vae-name sd-vae --vae-scale 0.18215 --vae-shift 0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla data index`."""
    parser.add_argument("path", help="folder of *.tar, or of train/, val/, test/ with *.tar")
    parser.add_argument(
        "--kind",
        choices=["images", "tokens", "latents", "video_latents", "clips"],
        help="refuse other samples (default: as the first sample)",
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="names of the classes, one a line, class 0 first (default: their numbers)",
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="what made the tokens, e.g. bytes or gpt2")
    parser.add_argument(
        "--rate", type=float, metavar="R", help="of clips that do not say it themselves, frames a second"
    )
    output.add_vae(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an index; what it says of classes, tokenizer, VAE and rate is kept if not given anew",
    )
    output.add_workers(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Index; 0 when done. Raises UserError."""
    output.check_writable("--json", args.json)
    given, classes = output.vae_options(args), _classes(args.classes)
    from mhla_lightning.data.index import VAE
    from mhla_lightning.data.prepare.indexing import Facts, index_shards

    facts = Facts(args.kind, classes, given and VAE(*given, shape=()), args.tokenizer, args.rate)
    console = Console()
    with output.progress_bars(console) as on_progress:
        indices = index_shards(args.path, facts, args.overwrite, output.workers(args), on_progress)
    rows = [output.index_row(split, index) for split, index in indices.items()]
    console.print(output.index_table(args.path, rows))
    output.write_json(args.json, {"rows": rows})
    return 0


def _classes(file: str | None) -> tuple[str, ...] | None:
    if file is None:
        return None
    try:
        names = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {file} cannot be read ({error})") from error
    while names and not names[-1].strip():
        names.pop()
    if not names or not all(name.strip() for name in names):
        raise UserError(f"--classes {file} must hold one name a line, without empty lines")
    return tuple(name.strip() for name in names)
