"""A tiny image diffusion recipe on the 8 x 8 pixels of the fixture `shards`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_lightning.cli.main import main
from mhla_lightning.tasks import ImageDiffusionLossConfig, ImageDiffusionTask

OPTIONS: dict[str, Any] = {
    "input_size": 8,
    "in_channels": 3,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 4,
}
MHLA: dict[str, Any] = {"name": "mhla", "blocks": 2}
RECIPE = """
seed_everything: 0
trainer: {accelerator: cpu, devices: 1, max_steps: 12, val_check_interval: 4, log_every_n_steps: 1,
  callbacks: [{class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}}]}
model:
  class_path: mhla_lightning.tasks.ImageDiffusionTask
  init_args:
    backbone: dit_s2
    attention: {name: mhla, blocks: 2}
    backbone_options: {input_size: 8, in_channels: 3, embed_dim: 16, depth: 2, num_heads: 2, num_classes: 4}
    optimizer: {lr: 2.0e-3}
    schedule: {warmup_steps: 2}
data:
  class_path: mhla_lightning.data.ImageDataModule
  init_args: {path: PATH, image_size: 8, batch_size: 16, reading: {num_workers: 0},
    augmentation: {scale: [1.0, 1.0], ratio: [1.0, 1.0], auto_augment: null, re_prob: 0.0, crop_pct: 1.0,
      mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
checkpoint: {every_n_steps: 4, keep_last: 2}
"""


def make_task(attention: Any = MHLA, diffusion: Any = "ddpm", **loss: Any) -> Any:
    """Return a task whose weights are all random: a fresh DiT predicts zeros.

    Args:
        loss: arguments of its loss.
    """
    config = ImageDiffusionLossConfig(**loss)
    task = ImageDiffusionTask("dit_s2", attention, OPTIONS, diffusion, loss=config)
    task.configure_model()
    assert task.backbone is not None
    drawn = torch.Generator().manual_seed(0)
    for parameter in task.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=drawn)
    return task


def make_batch(rows: int = 6, first: int = 0) -> dict[str, Any]:
    pixels = torch.from_numpy(np.random.default_rng(first).uniform(-1, 1, (rows, 3, 8, 8)).astype(np.float32))
    return {
        "key": [f"sample{n}" for n in range(first, first + rows)],
        "image": pixels,
        "label": torch.arange(first, first + rows) % 4,
        "index": torch.arange(first, first + rows),
        "epoch": torch.zeros(rows, dtype=torch.int64),
        "weight": torch.ones(rows),
    }


def write_recipe(path: Path, shards: Path) -> Path:
    path.write_text(RECIPE.replace("PATH", str(shards)))
    return path


def train(recipe: Path, run_id: str, *extra: str) -> None:
    assert main(["run", str(recipe), "--run-id", run_id, *extra]) == 0
