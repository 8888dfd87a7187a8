"""Arguments and steps of all verbs that load a language run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mhla_lightning.cli.trained import add_trained_arguments
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    import torch

    from mhla_lightning.backbones import CausalLM
    from mhla_lightning.inference.loading import LanguageRun

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN and the arguments of how it is loaded."""
    add_trained_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="bytes, a tokenizer.json or a Hugging Face name (default: the run's own)",
    )
    parser.add_argument(
        "--extrapolation",
        choices=("shift",),
        help=(
            "for text longer than max_chunks: each token sees the last max_chunks chunks (default: the "
            "recipe's)"
        ),
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="of the weights (default: float32)"
    )


def find(args: argparse.Namespace) -> tuple[LanguageRun, torch.device]:
    """Find the run and the device and check both; no weights are loaded.

    Raises:
        UserError: no such run, checkpoint, tokenizer or device.
    """
    from mhla_lightning.inference.loading import find_language_run
    from mhla_lightning.inference.weights import choose_device

    device = choose_device(args.device)
    options = {
        "runs": args.runs,
        "ckpt": args.ckpt,
        "tokenizer": args.tokenizer,
        "extrapolation": args.extrapolation,
    }
    return find_language_run(args.run, ema=not args.no_ema, **options), device


def load(args: argparse.Namespace, found: LanguageRun, device: torch.device) -> CausalLM:
    """Load the model in eval mode.

    Raises:
        UserError: the weights belong to another model.
    """
    import torch

    from mhla_lightning.inference.loading import load_model

    return load_model(found, device, getattr(torch, args.dtype))


def demand_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Check that counts are at least 1.

    Raises:
        UserError: one is below 1.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(name, f"{value} is too small; it must be at least 1")
