"""Prepares videos as VBench expects them, and calls VBench if it is installed.

The videos are named PROMPT-INDEX.mp4. From a RUN, 5 videos of each of VBench's prompts (or of --prompts FILE)
are drawn; a stopped job continues. A FOLDER of `mhla sample` is used as it is:
  mhla eval vbench RUN --frames 81 --size 480x800 --python ~/vbench/bin/python
  mhla eval vbench FOLDER --prepare
VBench needs numpy below 2: install it in an environment of its own and name its interpreter with --python.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mhla_lightning.cli.eval.image_table import print_numbers
from mhla_lightning.cli.output import write_json
from mhla_lightning.cli.trained import add_trained_arguments
from mhla_lightning.errors import UserError

HELP = "videos of a run, by the VBench package"
_DEFAULTS = {"n": 5, "guidance": 3.0, "steps": 50, "seed": 0, "batch_size": 1, "processes": 1}
_OF_RUNS = ("prompts", *_DEFAULTS, "frames", "size", "rate", "sampler", "runs", "ckpt", "no_ema")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla eval vbench`."""
    add_trained_arguments(parser)
    parser.add_argument(
        "--prompts", metavar="FILE", help="one prompt per line, or .jsonl (default: VBench's own)"
    )
    parser.add_argument(
        "--dimensions",
        metavar="NAMES",
        help="names separated by commas (default: all; for other prompts the six that allow them)",
    )
    parser.add_argument(
        "--to", metavar="DIR", help="folder to prepare (default: vbench in the folder of the videos)"
    )
    parser.add_argument(
        "--python", metavar="PATH", help="interpreter of the environment that has vbench (default: this one)"
    )
    parser.add_argument("--prepare", action="store_true", help="prepare the folder, but do not call VBench")
    parser.add_argument("--n", type=int, help="videos of each prompt (default: 5)")
    parser.add_argument("--frames", type=int, metavar="F", help="of each video (default: as in training)")
    parser.add_argument("--size", metavar="HxW", help="e.g. 480x800 (default: as in training)")
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="frames per second of the files (default: as in the run's data)",
    )
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance (default: 3)")
    parser.add_argument("--sampler", help="euler or dpm++ (default: dpm++)")
    parser.add_argument("--steps", type=int, help="of the sampler (default: 50)")
    parser.add_argument("--seed", type=int, help="of the noise (default: 0)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="videos drawn at once (default: 1)")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that draw (default: 1)")
    parser.set_defaults(guidance_interval=(0.0, 1.0), out=None)


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    from mhla_lightning.cli.sample import check_common, sample_videos
    from mhla_lightning.evaluation.vbench import (
        INSTALL,
        RESULTS,
        VIDEOS,
        check_target,
        find_package,
        lay_out,
        run_vbench,
        sampled_videos,
        video_names,
    )

    folder = Path(args.run)
    drawn = sampled_videos(folder) if folder.is_dir() and not (folder / "recipe.yaml").is_file() else None
    _complete(args, drawn is not None)
    check_common(args)
    package = find_package(args.python)
    own = set(package.prompts()) if package is not None else set()
    asked = [] if drawn is not None else _prompts(args, package)
    texts = (
        [prompt for _, prompt in drawn]
        if drawn is not None
        else [prompt.text for prompt in asked for _ in range(args.n)]
    )
    standard = set(texts) <= own
    dimensions = _dimensions(args.dimensions, standard, package is not None)
    video_names(texts)  # names and folder are checked first, because drawing takes hours
    if args.to:
        check_target(Path(args.to))
    if drawn is None:
        folder = sample_videos(args, asked)
    to = Path(args.to) if args.to else folder / "vbench"
    videos = sampled_videos(folder) if drawn is None else drawn
    names = lay_out(videos, to)
    prompts = len({prompt for _, prompt in videos})
    prepared = f"{len(names)} videos of {prompts} prompts are in {to / VIDEOS}, named as VBench expects"
    if standard and prompts < len(own):
        prepared += f" ({prompts} of its {len(own)} prompts: scores do not compare with published ones)"
    facts = {
        "videos": len(names),
        "prompts": prompts,
        "folder": str(to),
        "standard": standard,
        "dimensions": dimensions,
    }
    if args.prepare:
        _print(prepared)
        write_json(args.json, {"rows": [], "summary": facts})
        return 0
    if package is None:
        raise UserError("python", f"no VBench is installed there; {prepared}; to measure them: {INSTALL}")
    from mhla_lightning.inference.weights import choose_device

    _print(prepared)
    scores = run_vbench(
        package, to / VIDEOS, to / RESULTS, dimensions, standard, str(choose_device(args.device))
    )
    print_numbers(f"VBench of {folder.name}" + ("" if standard else ", prompts of your own"), scores)
    write_json(args.json, {"rows": [{"videos": folder.name, **scores}], "summary": facts})
    return 0


def _complete(args: argparse.Namespace, drawn: bool) -> None:
    """Fill in the defaults of drawing.

    Raises:
        UserError: an option of drawing for videos that are drawn already.
    """
    for name in _OF_RUNS if drawn else ():
        value = getattr(args, name)
        if value is not None and value is not False:  # 0 is given
            raise UserError(
                name,
                f"only for runs, and {args.run} is a folder of videos that are drawn already; leave it out",
            )
    for name, default in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _dimensions(given: str | None, standard: bool, installed: bool) -> list[str]:
    """Return the dimensions of --dimensions, or all that the prompts allow.

    Raises:
        UserError: an unknown dimension, or one that needs other prompts.
    """
    from mhla_lightning.evaluation.vbench import ANY_PROMPT, DIMENSIONS, check_dimensions

    if not given:
        return list(DIMENSIONS if standard else ANY_PROMPT)
    # Without the package nobody knows whose prompts these are.
    check_dimensions(given.split(","), standard or not installed)
    return given.split(",")


def _prompts(args: argparse.Namespace, package: Any) -> list[Any]:
    """Return the prompts of --prompts, else VBench's own.

    Raises:
        UserError: VBench is not installed, or the file has no prompts.
    """
    from mhla_lightning.cli.sample import given_prompts
    from mhla_lightning.evaluation.vbench import INSTALL
    from mhla_lightning.inference.diffusion.prompts import Prompt

    if args.prompts is None and package is None:
        raise UserError(
            "prompts",
            f"VBench is not installed, and its prompts come with it; name a file of prompts, or {INSTALL}",
        )
    own = [] if args.prompts else package.prompts()
    return given_prompts(args.prompts, None) or [
        Prompt(text, f"VBench's prompt {text[:40]!r}") for text in own
    ]


def _print(text: str) -> None:
    from rich.console import Console

    Console().print(text, soft_wrap=True, highlight=False, markup=False)
