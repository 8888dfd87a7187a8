"""Prepare a folder for DPG-Bench (ELLA, arXiv 2403.05135) and read its results.

Its question-answering model needs an environment of its own, so its official script is run there by the user.
"""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mhla_lightning.errors import UserError
from mhla_lightning.evaluation.sampled import IMAGES
from mhla_lightning.textfiles import read_text, split_lines

PER_PROMPT = 4
"""Images of each prompt: the scorer cuts a grid of 2 x 2."""

PROMPTS = 1065
"""Files of dpg_bench/prompts."""

INSTALL = "git clone https://github.com/TencentQQGYLab/ELLA && cd ELLA && pip install -r requirements.txt"
"""Makes the scorer's environment; it needs a GPU, and fetches mPLUG from ModelScope."""

_SCORE = "DPG-Bench score: "
_NEAR = 1e-3  # percent; the mean of the images against the score in the file


def read_prompt_files(folder: str | Path) -> dict[str, str]:
    """Read dpg_bench/prompts of the official repository: one text file for each prompt.

    Returns:
        name without .txt -> prompt, by name.

    Raises:
        UserError: no such folder, or no text in it.
    """
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise UserError(
            "prompts",
            f"{folder} is no folder of NAME.txt files; it is dpg_bench/prompts of "
            "github.com/TencentQQGYLab/ELLA",
        )
    found = {file.stem: " ".join(read_text(file).split()) for file in files}
    if empty := [name for name, text in found.items() if not text]:
        raise UserError(str(Path(folder) / f"{empty[0]}.txt"), "this file holds no prompt")
    return found


def layout(prompts: dict[str, str], images: Sequence[tuple[Path, str]]) -> tuple[dict[str, bytes], int]:
    """Return the grids that the scorer reads, and the side of one image in pixels.

    Args:
        prompts: name -> prompt.
        images: files and prompts, four for each prompt, in the prompts' order.

    Raises:
        UserError: images of other prompts, or that are not square and all of one size.
    """
    if [prompt for _, prompt in images] != [text for text in prompts.values() for _ in range(PER_PROMPT)]:
        raise UserError(
            "prompts",
            f"its {len(prompts)} files are not the prompts of the {len(images)} images, {PER_PROMPT} each",
        )
    grids: dict[str, bytes] = {}
    sides: set[int] = set()
    for number, name in enumerate(prompts):
        four = [_open(file) for file, _ in images[number * PER_PROMPT : (number + 1) * PER_PROMPT]]
        sides.update(size for image in four for size in image.size)
        if len(sides) > 1:
            raise UserError(
                "size", f"the scorer cuts square images of one size, and these have {sorted(sides)} pixels"
            )
        grids[f"{name}.png"] = _grid(four)
    return grids, sides.pop()


def _open(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _grid(four: Sequence[Image.Image]) -> bytes:
    """Return a PNG with four images, row by row."""
    side = four[0].width
    grid = Image.new("RGB", (2 * side, 2 * side))
    for number, image in enumerate(four):
        grid.paste(image, (number % 2 * side, number // 2 * side))
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    return buffer.getvalue()


def command(to: Path, side: int) -> str:
    """Return the command that scores a prepared folder, for the official repository's folder."""
    place = to.absolute()
    return (
        "accelerate launch --num_machines 1 --num_processes 1 --mixed_precision fp16 "
        f"dpg_bench/compute_dpg_bench.py --image-root-path {shlex.quote(str(place / IMAGES))} "
        f"--resolution {side} --pic-num {PER_PROMPT} --vqa-model mplug "
        f"--res-path {shlex.quote(str(place / 'results.txt'))}"
    )


def read_results(path: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Read the text file of the official scorer.

    It has a line for each grid (file, its four scores, their mean), then the scores by category in percent.

    Returns:
        `dpg`, the score in percent, and those of the broad categories; and the count `prompts`.

    Raises:
        UserError: no such file, another content, a file whose last line is missing, or one whose score is not
            that of its lines.
    """
    lines = split_lines(read_text(path))
    scores: dict[str, float] = {}
    means: list[float] = []
    section = ""
    for line in lines:
        if line.startswith(_SCORE):
            scores = {"dpg": _number(line.removeprefix(_SCORE)), **scores}
        elif line.endswith("category scores:"):
            section = line
        elif line.startswith("\t") and section.startswith("L1"):
            name, _, value = line.strip().rpartition(": ")
            scores[name] = _number(value)
        elif not section and ", " in line:
            means.append(_number(line.rpartition(", ")[2]))
    if "dpg" not in scores or not means or not all(map(math.isfinite, [*scores.values(), *means])):
        raise UserError(
            str(path),
            "is no complete result of DPG-Bench's compute_dpg_bench.py: a line for each grid, then "
            f"'{_SCORE}'",
        )
    mean = 100 * sum(means) / len(means)
    if abs(mean - scores["dpg"]) > _NEAR:
        raise UserError(
            str(path),
            f"says {scores['dpg']:.3f}, and its {len(means)} lines have a mean of {mean:.3f}; it is of two "
            "runs of the scorer",
        )
    return scores, {"prompts": len(means)}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
