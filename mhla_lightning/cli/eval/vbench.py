"""Prepares what VBench expects, videos named PROMPT-INDEX.mp4, and calls it where it is installed.

A RUN is sampled, 5 videos of each of VBench's prompts (or of --prompts FILE), resumably; a FOLDER of `mhla
sample` is taken as it is:
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
    """Arguments of `mhla eval vbench`."""
    add_trained_arguments(parser, "run_or_folder")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line, or .jsonl (default: VBench's own)"
    )
    parser.add_argument(
        "--dimensions",
        metavar="NAMES",
        help="with commas (default: all; of other prompts the six that take them)",
    )
    parser.add_argument("--to", metavar="DIR", help="default: vbench in the folder of the videos")
    parser.add_argument(
        "--python", metavar="PATH", help="interpreter of the environment that has vbench (default: this one)"
    )
    parser.add_argument("--prepare", action="store_true", help="prepare the folder only")
    parser.add_argument("--n", type=int, help="videos of each prompt (default: 5)")
    parser.add_argument("--frames", type=int, metavar="F", help="default: those of training")
    parser.add_argument("--size", metavar="HxW", help="e.g. 480x800 (default: that of training)")
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="frames a second of the files (default: those of the run's data)",
    )
    parser.add_argument("--guidance", type=float, help="default: 3")
    parser.add_argument("--sampler", help="default: dpm++")
    parser.add_argument("--steps", type=int, help="default: 50")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--batch-size", type=int, metavar="N", help="videos at once (default: 1)")
    parser.add_argument("--processes", type=int, metavar="N", help="default: 1")
    parser.set_defaults(guidance_interval=(0.0, 1.0), out=None)


def run(args: argparse.Namespace) -> int:
    """Carries out the verb; returns the exit code."""
    from mhla_lightning.cli.sample import check_common, sample_videos
    from mhla_lightning.evaluation.vbench import (
        INSTALL,
        RESULTS,
        VIDEOS,
        check_target,
        evaluate,
        find_package,
        lay_out,
        sampled_videos,
        video_names,
    )

    folder = Path(args.run_or_folder)
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
    video_names(texts)  # this and the folder before anything is drawn, which takes hours
    if args.to:
        check_target(Path(args.to))
    if drawn is None:
        args.diffusion_run = args.run_or_folder
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
        raise UserError(f"VBench is not installed; {prepared}; to have it measure them: {INSTALL}")
    from mhla_lightning.inference.weights import choose_device

    _print(prepared)
    scores = evaluate(
        package, to / VIDEOS, to / RESULTS, dimensions, standard, str(choose_device(args.device))
    )
    print_numbers(f"VBench of {folder.name}" + ("" if standard else ", prompts of your own"), scores)
    write_json(args.json, {"rows": [{"videos": folder.name, **scores}], "summary": facts})
    return 0


def _complete(args: argparse.Namespace, drawn: bool) -> None:
    """Fills in how a run is drawn where it is not given. Raises UserError where it is given for videos
    that are drawn already.
    """
    for name in _OF_RUNS if drawn else ():
        value = getattr(args, name)
        if value is not None and value is not False:  # 0 is given
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} is for runs, and {args.run_or_folder} is a folder of videos that are "
                "drawn already; leave it out"
            )
    for name, default in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _dimensions(given: str | None, standard: bool, installed: bool) -> list[str]:
    """Of --dimensions, or all that the prompts allow. Raises UserError."""
    from mhla_lightning.evaluation.vbench import ANY_PROMPT, DIMENSIONS, check_dimensions

    if not given:
        return list(DIMENSIONS if standard else ANY_PROMPT)
    check_dimensions(
        given.split(","), standard or not installed
    )  # without the package nobody knows whose prompts these are
    return given.split(",")


def _prompts(args: argparse.Namespace, package: Any) -> list[Any]:
    """What a run is asked for: --prompts, else VBench's own. Raises UserError."""
    from mhla_lightning.cli.sample import given_prompts
    from mhla_lightning.evaluation.vbench import INSTALL
    from mhla_lightning.inference.diffusion.prompts import Prompt

    if args.prompts is None and package is None:
        raise UserError(
            "VBench is not installed, and its prompts come with it; give others with --prompts "
            f"FILE, or {INSTALL}"
        )
    own = [] if args.prompts else package.prompts()
    return given_prompts(args.prompts, None) or [
        Prompt(text, f"VBench's prompt {text[:40]!r}") for text in own
    ]


def _print(text: str) -> None:
    from rich.console import Console

    Console().print(text, soft_wrap=True, highlight=False, markup=False)
