"""Write images or latents as webdataset shards with an index. The same command again continues one that
was interrupted.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from mhla_lightning.cli.data import output

HELP = "write images or latents as shards"
EPILOG = """examples:
  mhla data pack mnist --to data/mnist
  mhla data pack /images --to data/mine --val 0.1
  mhla data pack torchvision:CIFAR10:/downloads --to data/cifar10
  mhla data pack /latents --kind latents --vae-name sd-vae --vae-scale 0.18215 --vae-shift 0 --to data/latents"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla data pack`."""
    parser.add_argument(
        "source",
        help=(
            "mnist, mqar[:PAIRS], torchvision:NAME[:ROOT], or a folder: CLASS/*, or train/CLASS/* and "
            "val/CLASS/*"
        ),
    )
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="folder to make; holds train/ and val/ afterwards"
    )
    parser.add_argument(
        "--val",
        type=output.count_or_share,
        metavar="N|SHARE",
        help="samples (1000) or share (0.2, the default) held out; not if the source has its own",
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="training shards (default: about 512 MB each, at least 16)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order of samples and of the held-out part (default: 0)"
    )
    parser.add_argument(
        "--kind",
        choices=["images", "latents", "video_latents"],
        default="images",
        help="what a folder's files are (default: images)",
    )
    output.add_vae(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace shards that DIR already holds")
    output.add_workers(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Pack; 0 when done. Raises UserError."""
    output.check_writable("--json", args.json)
    given = output.vae_options(args)
    from mhla_lightning.data.index import VAE
    from mhla_lightning.data.prepare.pack import pack

    console = Console()
    with output.progress_bars(console) as on_progress:
        indices = pack(
            args.source,
            args.to,
            kind=args.kind,
            vae=given and VAE(*given, shape=()),
            val=args.val,
            shards=args.shards,
            seed=args.seed,
            overwrite=args.overwrite,
            workers=output.workers(args),
            wait=False,
            on_progress=on_progress,
            on_note=lambda text: console.print(text, markup=False, soft_wrap=True),
        )
    rows = [output.index_row(split, index) for split, index in indices.items()]
    console.print(output.index_table(args.to, rows))
    output.write_json(args.json, {"rows": rows})
    return 0
