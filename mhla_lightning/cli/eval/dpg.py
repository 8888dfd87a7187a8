"""Prepares images as DPG-Bench expects them, and reads its results.

From a RUN of text-to-image, 4 images of each prompt are drawn and put into grids of 2 x 2; a stopped job
continues. A FOLDER of `mhla sample` with 4 images of each prompt is used as it is. The command that scores
them is printed: the question-answering model mPLUG needs an environment of its own and a GPU. Its RESULTS.txt
becomes a table:
  mhla eval dpg RUN --prompts ELLA/dpg_bench/prompts --size 1024x1024
  mhla eval dpg RESULTS.txt --json dpg.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mhla_lightning.cli.eval import text_images
from mhla_lightning.cli.eval.image_table import print_numbers
from mhla_lightning.cli.output import write_json
from mhla_lightning.errors import UserError

HELP = "images of a text-to-image run, for the scorer of DPG-Bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla eval dpg`."""
    text_images.add_arguments(parser)
    parser.add_argument("--prompts", metavar="DIR", help="dpg_bench/prompts of ELLA's repository")
    parser.add_argument(
        "--to", metavar="DIR", help="folder to prepare (default: dpg in the folder of the images)"
    )
    parser.set_defaults(n=None)


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    from mhla_lightning.cli.sample import parse_size
    from mhla_lightning.evaluation import dpg
    from mhla_lightning.evaluation.sampled import IMAGES, check_prepared, prepare

    if Path(args.run).is_file():
        return _read(args)
    drawn = text_images.drawn_before(args)
    args.n = dpg.PER_PROMPT
    if args.prompts is None:
        raise UserError(
            "prompts",
            "name the folder of DPG-Bench's prompts; it is dpg_bench/prompts after: "
            "git clone https://github.com/TencentQQGYLab/ELLA",
        )
    if args.size and len(set(parse_size(args.size))) > 1:
        raise UserError("size", f"{args.size} is not square, and DPG-Bench's scorer cuts square images")
    prompts = dpg.read_prompt_files(args.prompts)
    if args.to:
        check_prepared(Path(args.to))  # first, because drawing takes hours
    images = drawn or text_images.draw(args, list(prompts.values()), args.prompts)
    to = Path(args.to) if args.to else images[0][0].parent / "dpg"
    grids, side = dpg.layout(prompts, images)
    prepare(grids, to)
    text_images.show(f"{len(grids)} grids of 4 images are in {to / IMAGES}, as DPG-Bench expects them")
    if len(grids) != dpg.PROMPTS:
        text_images.show(
            f"published scores have {dpg.PROMPTS} prompts: scores of these do not compare with them"
        )
    text_images.show(f"its environment, once:  {dpg.INSTALL}")
    text_images.show(f"the scores, there:      {dpg.command(to, side)}")
    text_images.show(f"the table, here:        mhla eval dpg {to / 'results.txt'}")
    facts = {"grids": len(grids), "side": side, "folder": str(to)}
    write_json(args.json, {"rows": [], "summary": {**facts, "command": dpg.command(to, side)}})
    return 0


def _read(args: argparse.Namespace) -> int:
    from mhla_lightning.evaluation import dpg

    scores, counts = dpg.read_results(Path(args.run))
    print_numbers(f"DPG-Bench of {counts['prompts']} prompts, percent", scores)
    if counts["prompts"] != dpg.PROMPTS:
        text_images.show(f"published scores have {dpg.PROMPTS} prompts: these do not compare with them")
    write_json(args.json, {"rows": [{"results": args.run, **scores}], "summary": counts})
    return 0
