"""Measures how well images show their prompts, by a CLIP model.

The CLIP score is the mean of 100 max(cos, 0) between an image and its prompt. From a RUN of text-to-image,
images of --prompts are drawn; the score is kept in the run folder. A FOLDER of `mhla sample` is used as it
is. CLIP is a folder of a CLIP model of transformers, or its name on the Hugging Face hub. Scores of different
models do not compare.
  mhla eval clip RUN --prompts captions.txt --clip models/clip-vit-large-patch14
  mhla eval clip FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from mhla_lightning.cli.eval import text_images
from mhla_lightning.cli.eval.image_table import print_numbers
from mhla_lightning.cli.output import write_json
from mhla_lightning.errors import UserError
from mhla_lightning.evaluation import with_options
from mhla_lightning.evaluation.clip import DEFAULT_CLIP, ClipScoreOptions

HELP = "images and their prompts, by a CLIP model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla eval clip`."""
    text_images.add_arguments(parser)
    parser.add_argument("--prompts", metavar="FILE", help="one prompt per line, or .jsonl; for a run")
    parser.add_argument(
        "--clip",
        metavar="CLIP",
        default=DEFAULT_CLIP,
        help="a CLIP model: folder or name on the hub (default: %(default)s)",
    )
    parser.add_argument("--n", type=int, help="images of each prompt (default: 1)")
    parser.add_argument(
        "--fresh", action="store_true", help="measure again instead of reading the kept number of a run"
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    drawn = text_images.drawn_before(args, also=("prompts", "fresh"))
    return _run(args) if drawn is None else _folder(args, drawn)


def _run(args: argparse.Namespace) -> int:
    from mhla_lightning.cli.sample import parse_size
    from mhla_lightning.runs.folder import find_run, runs_root

    if args.prompts is None:
        raise UserError("prompts", "a run needs a file of prompts to draw; write one prompt per line")
    for name in ("ckpt", "processes"):
        value = getattr(args, name)
        if value not in (None, 1):
            raise UserError(
                name,
                "the kept number is of the newest checkpoint, drawn by one process; draw with mhla sample, "
                "then give the folder",
            )
    folder = find_run(args.run, runs_root(args.runs))
    given: dict[str, Any] = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(ClipScoreOptions)
        if hasattr(args, field.name)
    }
    size = None if args.size is None else list(parse_size(args.size))
    wanted = with_options(
        "clip", {**given, "n": args.n or 1, "size": size, "ema": not args.no_ema}, args.runs
    )
    numbers = None if args.fresh else wanted.kept(folder)
    title = f"{folder.run_id} by {args.clip}{', measured before' if numbers else ''}"
    print_numbers(title, numbers := numbers or wanted.measure(folder))
    write_json(args.json, {"rows": [{"run": folder.run_id, **numbers}], "summary": wanted.identity})
    return 0


def _folder(args: argparse.Namespace, drawn: list[tuple[Path, str]]) -> int:
    import numpy as np
    from PIL import Image

    from mhla_lightning.cli.sample import drawing_bar
    from mhla_lightning.evaluation.clip import ClipScorer
    from mhla_lightning.inference.weights import choose_device

    judge = ClipScorer(args.clip, choose_device(args.device))
    texts, scores = [prompt for _, prompt in drawn], []
    with drawing_bar(len(drawn)) as on_batch:
        for first in range(0, len(drawn), 32):
            part = drawn[first : first + 32]
            images = [np.asarray(Image.open(file).convert("RGB")) for file, _ in part]
            scores.append(judge.scores(images, [prompt for _, prompt in part], on_batch))
    score = float(np.concatenate(scores).mean())
    print_numbers(f"{len(drawn)} images of {Path(args.run).name} by {args.clip}", {"clip_score": score})
    if longer := judge.count_longer(texts):
        text_images.show(f"{longer} prompts have more than {judge.tokens} tokens and lost their end")
    facts = {"images": len(drawn), "clip": args.clip, "shortened": longer}
    write_json(args.json, {"rows": [{"images": Path(args.run).name, "clip_score": score}], "summary": facts})
    return 0
