"""Tiny recipes of all four tasks with data of their own: a step takes milliseconds."""

from __future__ import annotations

from pathlib import Path

from tests import conftest, diffusion_models, language_runs, video_runs

TASKS = ("classification", "language", "image_dit", "video_dit")


def write_recipes(root: Path) -> dict[str, Path]:
    """A recipe by task, each with EMA, gradient clipping and every checkpoint kept."""
    for name in ("images", "language", "clips"):
        (root / name).mkdir()
    images = conftest.write_images(root / "images")
    made = {
        "classification": (conftest.TINY_RECIPE, images),
        "language": (language_runs.RECIPE, language_runs.write_text(root / "language")),
        "image_dit": (diffusion_models.RECIPE, images),
        "video_dit": (video_runs.RECIPE, video_runs.write_clips(root / "clips")),
    }
    recipes = {}
    for task, (text, shards) in made.items():
        recipes[task] = root / f"{task}.yaml"
        recipes[task].write_text(text.replace("PATH", str(shards)).replace("log_every_n_steps: 1", "log_every_n_steps: 1, gradient_clip_val: 0.5"))
    return recipes
