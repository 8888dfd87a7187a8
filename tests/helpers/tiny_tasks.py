"""Tiny recipes of all four tasks with data of their own: a step takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.helpers import diffusion_models, images, language_runs, video_runs

TASKS = ("classification", "language", "image_dit", "video_dit")


def write_recipes(root: Path, tasks: Sequence[str] = TASKS) -> dict[str, Path]:
    """A recipe by task, each with EMA, gradient clipping and data of its own."""
    made: dict[str, tuple[str, Callable[[Path], Path]]] = {
        "classification": (images.TINY_RECIPE, images.write_images),
        "language": (language_runs.RECIPE, language_runs.write_text),
        "image_dit": (diffusion_models.RECIPE, images.write_images),
        "video_dit": (video_runs.RECIPE, video_runs.write_clips),
    }
    recipes = {}
    for task in tasks:
        text, write = made[task]
        (root / f"{task}_data").mkdir()
        shards = write(root / f"{task}_data")
        recipes[task] = root / f"{task}.yaml"
        recipes[task].write_text(
            text.replace("PATH", str(shards)).replace(
                "log_every_n_steps: 1", "log_every_n_steps: 1, gradient_clip_val: 0.5"
            )
        )
    return recipes
