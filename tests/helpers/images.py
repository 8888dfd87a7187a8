"""A tiny recipe for images, and images to train it on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(root: Path) -> Path:
    """64 training and 20 validation images of 4 classes in 8 and 4 real tar shards; 8 x 8 pixels, class
    shown by brightness.
    """
    from mhla_lightning.data.prepare.pack import PackOptions, pack

    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5)):
        for label in range(4):
            folder = root / "source" / split / f"class{label}"
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = np.clip(60 * label + rng.normal(30, 12, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{n:03d}.png")
    pack(str(root / "source"), root / "shards", PackOptions(shards=8))
    return root / "shards"


TINY_RECIPE = """
seed_everything: 0
trainer: {accelerator: cpu, devices: 1, max_steps: 12, val_check_interval: 4, log_every_n_steps: 1,
  callbacks: [{class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}}]}
model:
  class_path: mhla_lightning.tasks.ClassificationTask
  init_args:
    backbone: deit_tiny
    attention: {name: mhla, blocks: 2}
    num_classes: 4
    backbone_options: {img_size: 8, patch_size: 2, embed_dim: 12, depth: 2, num_heads: 2}
    optimizer: {lr: 2.0e-3}
    schedule: {warmup_steps: 2}
data:
  class_path: mhla_lightning.data.ImageDataModule
  init_args: {path: PATH, image_size: 8, batch_size: 16, reading: {num_workers: 0},
    augmentation: {scale: [0.6, 1.0], auto_augment: null, crop_pct: 1.0}}
checkpoint: {every_n_steps: 4, keep_last: 2}
"""
