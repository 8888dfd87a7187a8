"""Prepare a folder for GenEval (arXiv 2310.11513) and read its results. Imports no torch.

Its detector needs an environment of its own, so its official script is run there by the user.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.errors import UserError
from mhla_lightning.evaluation.sampled import IMAGES
from mhla_lightning.textfiles import NotText, json_rows, read_text

PER_PROMPT = 4
"""Images of each prompt in published results."""

PROMPTS = 553
"""Prompts of evaluation_metadata.jsonl."""

INSTALL = (
    "git clone https://github.com/djghosh13/geneval && cd geneval && conda env create -f environment.yml && "
    "conda activate geneval && mim install mmdet==2.27.0 && ./evaluation/download_models.sh detector/"
)
"""Makes the scorer's environment; it needs conda and a CUDA GPU."""

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class Metadata:
    """One prompt of GenEval.

    Attributes:
        prompt: the text.
        line: the JSON object of the scorer, on one line.
    """

    prompt: str
    line: str


def read_metadata(path: str | Path) -> list[Metadata]:
    """Read evaluation_metadata.jsonl of the official repository.

    Raises:
        UserError: no such file, no prompt in it, or a line without `prompt`, `tag` or `include`.
    """
    found = []
    for place, row in _rows(path):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row.get("tag"):
            raise UserError(
                f"{path}, {place}",
                "is no prompt of GenEval, an object with `tag`, `include` and `prompt`; the file is "
                "prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval",
            )
        found.append(Metadata(row["prompt"], json.dumps(row)))
    if not found:
        raise UserError(str(path), "this file holds no prompt")
    return found


def _rows(path: str | Path) -> list[tuple[str, Any]]:
    try:
        return list(json_rows(read_text(path)))
    except NotText as error:
        raise UserError(str(path), str(error)) from error


def layout(metadata: Sequence[Metadata], images: Sequence[tuple[Path, str]]) -> dict[str, Path | bytes]:
    """Return the files below TO/images that the scorer reads.

    Args:
        metadata: the prompts.
        images: files and prompts, the same number for each prompt, in the prompts' order.

    Raises:
        UserError: images of other prompts.
    """
    each, rest = divmod(len(images), len(metadata))
    wanted = [entry.prompt for entry in metadata for _ in range(each)]
    if rest or not each or [prompt for _, prompt in images] != wanted:
        raise UserError(
            "metadata",
            f"its {len(metadata)} prompts are not those of the {len(images)} images; draw them with "
            f"mhla sample RUN --prompts evaluation_metadata.jsonl --n {PER_PROMPT}",
        )
    files: dict[str, Path | bytes] = {}
    for number, entry in enumerate(metadata):
        files[f"{number:05d}/metadata.jsonl"] = (entry.line + "\n").encode()
        for index in range(each):
            files[f"{number:05d}/samples/{index:04d}.png"] = images[number * each + index][0]
    return files


def command(to: Path) -> str:
    """Return the command that scores a prepared folder, for the official repository's folder."""
    place = to.absolute()
    return (
        f"python evaluation/evaluate_images.py {shlex.quote(str(place / IMAGES))} "
        f"--outfile {shlex.quote(str(place / 'results.jsonl'))} --model-path detector/"
    )


def read_results(path: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Read results.jsonl of the official scorer, which has a line for each image.

    Returns:
        scores and counts. Scores: the share of correct images of each tag; `overall`, their mean;
        `correct_images`; and `correct_prompts`, with one correct image or more. Counts: `images`, `prompts`.

    Raises:
        UserError: no such file, or another content.
    """
    by_tag: dict[str, list[bool]] = {}
    by_prompt: dict[str, bool] = {}
    for place, row in _rows(path):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("tag"), str)
            or not isinstance(row.get("metadata"), str)
            or not isinstance(row.get("correct"), bool)
        ):
            raise UserError(f"{path}, {place}", "is no result of GenEval's evaluate_images.py")
        by_tag.setdefault(row["tag"], []).append(row["correct"])
        by_prompt[row["metadata"]] = by_prompt.get(row["metadata"], False) or row["correct"]
    if not by_tag:
        raise UserError(str(path), "holds no results; GenEval's evaluate_images.py writes a line an image")
    order = [*(tag for tag in TAGS if tag in by_tag), *(tag for tag in by_tag if tag not in TAGS)]
    scores = {tag: sum(by_tag[tag]) / len(by_tag[tag]) for tag in order}
    images = [correct for found in by_tag.values() for correct in found]
    totals = {
        "overall": sum(scores.values()) / len(scores),
        "correct_images": sum(images) / len(images),
        "correct_prompts": sum(by_prompt.values()) / len(by_prompt),
    }
    return {**scores, **totals}, {"images": len(images), "prompts": len(by_prompt)}
