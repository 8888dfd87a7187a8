"""Write images or latents as webdataset shards with an index.

The same command continues an interrupted one.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from mhla_lightning.cli.data import output
from mhla_lightning.cli.output import check_writable, progress_bars, write_json

HELP = "write images or latents as shards"
EPILOG = """examples:
  mhla data pack mnist --to data/mnist
  mhla data pack /images --to data/mine --val 0.1
  mhla data pack torchvision:CIFAR10:/downloads --to data/cifar10
  mhla data pack /latents --to data/latents --kind latents --vae-name sd-vae --vae-scale 0.18 --vae-shift 0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla data pack`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=(
            "mnist, fashion_mnist[:FOLDER], digit_scenes, repeated_noise[:SIDE], mqar[:PAIRS], "
            "torchvision:NAME[:ROOT], or a folder: CLASS/*, or train/CLASS/* and val/CLASS/*"
        ),
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to make, with train/ and val/")
    parser.add_argument(
        "--val",
        type=output.count_or_share,
        metavar="N|SHARE",
        help="number (1000) or share (default: 0.2) of samples held out; not for a source with a val part",
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="training shards (default: about 512 MB each, at least 16)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the order and of the held-out samples (default: 0)"
    )
    parser.add_argument(
        "--kind",
        choices=["images", "latents", "video_latents"],
        default="images",
        help="kind of the files in a folder (default: images)",
    )
    output.add_vae(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace shards that DIR already holds")
    output.add_workers(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Pack and return 0. Raises UserError."""
    check_writable("json", args.json)
    given = output.vae_options(args)
    from mhla_lightning.data.index import VAE
    from mhla_lightning.data.prepare.pack import PackOptions, pack

    vae = given and VAE(*given, shape=())
    options = PackOptions(args.val, args.shards, args.seed, args.kind, vae)
    console = Console()
    with output.vae_arguments(), progress_bars(console) as on_progress:
        indices = pack(
            args.source,
            args.to,
            options,
            overwrite=args.overwrite,
            workers=output.workers(args),
            wait=False,
            on_progress=on_progress,
            on_note=lambda text: console.print(text, markup=False, soft_wrap=True),
        )
    rows = [output.index_row(split, index) for split, index in indices.items()]
    console.print(output.index_table(args.to, rows))
    write_json(args.json, {"rows": rows})
    return 0
