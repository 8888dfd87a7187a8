"""Prepares images as GenEval expects them, and reads its results.

From a RUN of text-to-image, 4 images of each prompt of evaluation_metadata.jsonl are drawn; a stopped job
continues. A FOLDER of `mhla sample` is used as it is. The command that scores them is printed: GenEval's
detector needs an environment of its own and a CUDA GPU. Its RESULTS.jsonl becomes a table:
  mhla eval geneval RUN --metadata geneval/prompts/evaluation_metadata.jsonl --size 512x512
  mhla eval geneval RESULTS.jsonl --json geneval.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mhla_lightning.cli.eval import text_images
from mhla_lightning.cli.eval.image_table import print_numbers
from mhla_lightning.cli.output import write_json
from mhla_lightning.errors import UserError

HELP = "images of a text-to-image run, for the scorer of GenEval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla eval geneval`."""
    text_images.add_arguments(parser)
    parser.add_argument(
        "--metadata", metavar="FILE", help="prompts/evaluation_metadata.jsonl of GenEval's repository"
    )
    parser.add_argument(
        "--to", metavar="DIR", help="folder to prepare (default: geneval in the folder of the images)"
    )
    parser.add_argument("--n", type=int, help="images of each prompt (default: 4)")


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    from mhla_lightning.evaluation import geneval
    from mhla_lightning.evaluation.sampled import IMAGES, check_prepared, prepare

    if Path(args.run).is_file():
        return _read(args)
    drawn = text_images.drawn_before(args)
    args.n = args.n or geneval.PER_PROMPT
    if args.metadata is None:
        raise UserError(
            "metadata",
            "name evaluation_metadata.jsonl with GenEval's prompts; it is in prompts/ after: "
            "git clone https://github.com/djghosh13/geneval",
        )
    metadata = geneval.read_metadata(args.metadata)
    if args.to:
        check_prepared(Path(args.to))  # first, because drawing takes hours
    images = drawn or text_images.draw(args, [entry.prompt for entry in metadata], args.metadata)
    to = Path(args.to) if args.to else images[0][0].parent / "geneval"
    prepare(geneval.layout(metadata, images), to)
    each = len(images) // len(metadata)
    text_images.show(
        f"{len(images)} images of {len(metadata)} prompts are in {to / IMAGES}, as GenEval expects them"
    )
    if (len(metadata), each) != (geneval.PROMPTS, geneval.PER_PROMPT):
        text_images.show(
            f"published scores have {geneval.PROMPTS} prompts and {geneval.PER_PROMPT} images of each: "
            "scores of these do not compare with them"
        )
    text_images.show(f"its environment, once:  {geneval.INSTALL}")
    text_images.show(f"the scores, there:      {geneval.command(to)}")
    text_images.show(f"the table, here:        mhla eval geneval {to / 'results.jsonl'}")
    facts = {"images": len(images), "prompts": len(metadata), "folder": str(to)}
    write_json(args.json, {"rows": [], "summary": {**facts, "command": geneval.command(to)}})
    return 0


def _read(args: argparse.Namespace) -> int:
    from mhla_lightning.evaluation import geneval

    scores, counts = geneval.read_results(Path(args.run))
    print_numbers(f"GenEval of {counts['images']} images of {counts['prompts']} prompts", scores)
    if counts["prompts"] != geneval.PROMPTS:
        text_images.show(f"published scores have {geneval.PROMPTS} prompts: these do not compare with them")
    write_json(args.json, {"rows": [{"results": args.run, **scores}], "summary": counts})
    return 0
