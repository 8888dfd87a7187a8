"""Prepares what VBench expects, videos named PROMPT-INDEX.mp4, and calls it where it is installed.

A RUN is sampled, 5 videos of each of VBench's prompts (or of --prompts FILE), resumably; a FOLDER of `mhla sample` is taken as it is:
  mhla eval vbench RUN --frames 81 --size 480x800 --python ~/vbench/bin/python
  mhla eval vbench FOLDER --prepare
VBench needs numpy below 2: install it in an environment of its own and name its interpreter with --python.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mhla_lightning.cli.bench.report import write_json
from mhla_lightning.cli.eval.image_table import print_numbers
from mhla_lightning.cli.trained import add_trained_arguments
from mhla_lightning.errors import UserError

HELP = "videos of a run, by the VBench package"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla eval vbench`."""
    add_trained_arguments(parser, "run_or_folder")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt a line, or .jsonl (default: VBench's own)")
    parser.add_argument("--dimensions", metavar="NAMES", help="with commas (default: all; of other prompts the six that take them)")
    parser.add_argument("--to", metavar="DIR", help="default: vbench in the folder of the videos")
    parser.add_argument("--python", metavar="PATH", help="interpreter of the environment that has vbench (default: this one)")
    parser.add_argument("--prepare", action="store_true", help="prepare the folder only")
    parser.add_argument("--n", type=int, default=5, help="videos of each prompt (default: %(default)s)")
    parser.add_argument("--frames", type=int, metavar="F", help="default: those of training")
    parser.add_argument("--size", metavar="HxW", help="e.g. 480x800 (default: that of training)")
    parser.add_argument("--rate", type=float, metavar="R", help="frames a second of the files (default: those of the run's data)")
    parser.add_argument("--guidance", type=float, default=3.0, help="default: %(default)s")
    parser.add_argument("--sampler", help="default: dpm++")
    parser.add_argument("--steps", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="videos at once (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.set_defaults(guidance_interval=(0.0, 1.0), out=None)


def run(args: argparse.Namespace) -> int:
    """Carries out the verb; returns the exit code."""
    from mhla_lightning.cli.sample import check_common
    from mhla_lightning.evaluation.vbench import ANY_PROMPT, DIMENSIONS, INSTALL, check_dimensions, evaluate, find_package, lay_out

    check_common(args)
    package = find_package(args.python)
    own = set(package.prompts()) if package is not None else set()
    videos, folder = _videos(args, package)
    standard = {prompt for _, prompt in videos} <= own
    dimensions = args.dimensions.split(",") if args.dimensions else list(DIMENSIONS if standard else ANY_PROMPT)
    if args.dimensions:
        check_dimensions(dimensions, standard or package is None)
    to = Path(args.to) if args.to else folder / "vbench"
    names = lay_out(videos, to / "videos")
    prompts = len({prompt for _, prompt in videos})
    prepared = f"{len(names)} videos of {prompts} prompts are in {to / 'videos'}, named as VBench expects"
    if standard and prompts < len(own):
        prepared += f" ({prompts} of its {len(own)} prompts: scores do not compare with published ones)"
    facts = {"videos": len(names), "prompts": prompts, "folder": str(to), "standard": standard, "dimensions": dimensions}
    if args.prepare:
        _print(prepared)
        write_json(args.json, {"rows": [], "summary": facts})
        return 0
    if package is None:
        raise UserError(f"VBench is not installed; {prepared}; to have it measure them: {INSTALL}")
    from mhla_lightning.generation.weights import choose_device

    _print(prepared)
    scores = evaluate(package, to / "videos", to / "results", dimensions, standard, str(choose_device(args.device)))
    print_numbers(f"VBench of {folder.name}" + ("" if standard else ", prompts of your own"), scores)
    write_json(args.json, {"rows": [{"videos": folder.name, **scores}], "summary": facts})
    return 0


def _videos(args: argparse.Namespace, package: Any) -> tuple[list[tuple[Path, str]], Path]:
    """Files with their prompts, and the folder that holds them; drawn where a run was named."""
    from mhla_lightning.cli.sample import given_prompts, sample_videos
    from mhla_lightning.evaluation.vbench import INSTALL, sampled_videos
    from mhla_lightning.generation.prompts import Prompt

    given = Path(args.run_or_folder)
    if given.is_dir() and not (given / "recipe.yaml").is_file():
        if args.prompts:
            raise UserError(f"--prompts is for runs, and {given} is a folder of videos, whose samples.json holds their prompts; leave it out")
        return sampled_videos(given), given
    if args.prompts is None and package is None:
        raise UserError(f"VBench is not installed, and its prompts come with it; give others with --prompts FILE, or {INSTALL}")
    own = [] if args.prompts else package.prompts()
    prompts = given_prompts(args.prompts, None) or [Prompt(text, f"VBench's prompt {text[:40]!r}") for text in own]
    args.diffusion_run = args.run_or_folder
    folder = sample_videos(args, prompts)
    return sampled_videos(folder), folder


def _print(text: str) -> None:
    from rich.console import Console

    Console().print(text, soft_wrap=True, highlight=False, markup=False)
