"""Make shards of images, latents, video clips or text; check, index and show them.

Example: mhla data pack mnist --to data/mnist
"""

from __future__ import annotations

import argparse

from mhla_lightning.cli.data import clips, index, latents, pack, preview, tokenize, train_tokenizer, verify

VERBS = {
    "pack": pack,
    "tokenize": tokenize,
    "train-tokenizer": train_tokenizer,
    "latents": latents,
    "clips": clips,
    "verify": verify,
    "index": index,
    "preview": preview,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `mhla data` to its parser."""
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        summary = (verb.__doc__ or "").partition("\n")[0]
        verb.add_arguments(
            verbs.add_parser(
                name,
                help=verb.HELP,
                description=summary,
                epilog=verb.EPILOG,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
        )


def run(args: argparse.Namespace) -> int:
    """Run the verb that `args` names and return its exit code. Raises UserError."""
    return VERBS[args.data_verb].run(args)
