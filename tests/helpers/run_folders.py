"""Run folders without training: what a run writes, through the classes that write it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mhla_lightning.compare.comparison import table_row
from mhla_lightning.runs.folder import RunFolder, write_json
from mhla_lightning.runs.logger import RunLogger
from mhla_lightning.runs.tags import MIXING_VALUES

RECIPE = """seed_everything: 3
trainer: {precision: 32-true, strategy: auto}
model:
  class_path: mhla_lightning.tasks.ClassificationTask
  init_args: {backbone: deit_tiny, attention: {name: mhla, blocks: 2}}
data:
  class_path: mhla_lightning.data.ImageDataModule
  init_args: {path: data/digits, batch_size: 16}
"""


def losses(steps: int, top: float = 2.0) -> list[float]:
    """Falling values, one a step."""
    return [top / (1 + step / 4) for step in range(1, steps + 1)]


def write_run(
    folder: Path, steps: int = 12, top: float = 2.0, validates: bool = True, pictures: bool = True
) -> RunFolder:
    """Write the folder of a finished run.

    Args:
        folder: of the run.
        steps: that it took; it validates after every fourth.
        top: height of its loss.
        validates: whether it has validated.
        pictures: whether event files hold pictures and matrices.
    """
    run = RunFolder(folder)
    run.create()
    run.recipe.write_text(RECIPE)
    logger = RunLogger(run)
    logger.start()
    for step, loss in enumerate(losses(steps, top), start=1):
        logger.log_metrics({"train/loss": loss, "train/samples_per_second": 100.0 + step}, step)
        if validates and step % 4 == 0:
            logger.log_metrics({"val/loss": loss, "val/top1": 1 - loss / 4, "val_ema/loss": loss + 0.1}, step)
        if pictures and step % 4 == 0:
            logger.experiment.add_tensor(f"{MIXING_VALUES}blocks.0", matrix(step), step)
            logger.experiment.add_image("samples", torch.full((3, 8, 8), step / steps), step)
    logger.finalize("success")
    last = {"val/loss": losses(steps, top)[-1], "val/top1": 1 - losses(steps, top)[-1] / 4}
    summary: dict[str, Any] = {
        "run_id": run.run_id,
        "last": last if validates else {},
        "parameters": 214410,
        "flops_per_sample": 28_800_000,
        "peak_memory_bytes": 5e8,
        "seconds": 75.0,
    }
    write_json(run.summary, summary)
    write_json(run.progress, {"state": "finished", "step": steps, "max_steps": steps, "consumed": steps * 16})
    write_json(
        run.environment, {"host": "node-7", "versions": {"torch": "2.14.1"}, "command": ["mhla", "run"]}
    )
    return run


def matrix(step: int) -> torch.Tensor:
    """The mixing matrix of a step, whose first weight tells the step."""
    return torch.tensor([[step / 100, 0.5], [0.25, 1.0]])


def write_comparison(folder: Path, tops: Mapping[str, Sequence[float]]) -> Path:
    """Write the folder of a comparison.

    Args:
        folder: of the comparison.
        tops: name of a row -> heights of the losses of its seeds.
    """
    rows = []
    for name, seeds in tops.items():
        runs = {seed: write_run(folder / f"{name}-seed{seed}", top=top) for seed, top in enumerate(seeds)}
        summaries = {seed: json.loads(run.summary.read_text()) for seed, run in runs.items()}
        rows.append(table_row(name, {"model.attention": name}, summaries))
    write_json(folder / "table.json", {"format": 1, "recipe": "classification/digits", "rows": rows})
    return folder
