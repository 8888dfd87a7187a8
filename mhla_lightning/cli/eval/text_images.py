"""Arguments and steps of the evaluations of text-to-image runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhla_lightning.cli.trained import add_trained_arguments
from mhla_lightning.errors import UserError

_DEFAULTS = {"guidance": 4.5, "steps": 20, "seed": 0, "batch_size": 4, "processes": 1}
_OF_RUNS = ("n", *_DEFAULTS, "size", "sampler", "runs", "ckpt", "no_ema")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of drawing images of prompts."""
    add_trained_arguments(parser)
    parser.add_argument("--size", metavar="HxW", help="e.g. 1024x1024 (default: as in training)")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance (default: 4.5)")
    parser.add_argument("--sampler", help="euler or dpm++ (default: dpm++)")
    parser.add_argument("--steps", type=int, help="of the sampler (default: 20)")
    parser.add_argument("--seed", type=int, help="of the noise (default: 0)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images drawn at once (default: 4)")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that draw (default: 1)")
    parser.set_defaults(
        guidance_interval=(0.0, 1.0), guidance_channels=None, out=None, frames=None, rate=None
    )


def drawn_before(args: argparse.Namespace, also: Sequence[str] = ()) -> list[tuple[Path, str]] | None:
    """Return files and prompts of a folder of `mhla sample`, and None for a run.

    Defaults of drawing are filled in.

    Args:
        args: of the command.
        also: further arguments that only runs take.

    Raises:
        UserError: an argument for runs beside a folder; a folder without images; a number outside its range.
    """
    from mhla_lightning.cli.sample import check_common
    from mhla_lightning.evaluation.sampled import sampled_files

    folder = Path(args.run)
    drawn = None
    if folder.is_dir() and not (folder / "recipe.yaml").is_file():
        drawn = sampled_files(folder, "images")
    for name in (*_OF_RUNS, *also) if drawn is not None else ():
        value = getattr(args, name, None)
        if value is not None and value is not False:  # 0 is given
            raise UserError(
                name,
                f"only for runs, and {args.run} is a folder of images that are drawn already; leave it out",
            )
    for name, default in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    check_common(args)
    return drawn


def draw(args: argparse.Namespace, texts: Sequence[str], origin: str) -> list[tuple[Path, str]]:
    """Draw args.n images of each text; a stopped job continues.

    Args:
        args: of the command.
        texts: the prompts.
        origin: of the prompts, for errors.

    Returns:
        files and prompts, prompt by prompt.

    Raises:
        UserError: the images cannot be drawn.
    """
    from mhla_lightning.cli.sample import sample_text_images
    from mhla_lightning.evaluation.sampled import sampled_files
    from mhla_lightning.inference.diffusion.prompts import Prompt

    prompts = [Prompt(text, f"{origin}, {text[:40]!r}") for text in texts]
    return sampled_files(sample_text_images(args, prompts), "images")


def show(text: Any) -> None:
    """Print one line, whatever its length."""
    from rich.console import Console

    Console().print(str(text), soft_wrap=True, highlight=False, markup=False)
