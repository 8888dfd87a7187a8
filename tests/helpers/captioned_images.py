"""A tiny text-to-image recipe in pixels: a bright square in the corner that a sentence names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.prepare.samples import Sample, image_sample
from mhla_lightning.data.prepare.sources.base import png_bytes
from mhla_lightning.data.prepare.writer import write_split

CLASSES = ("box in the left", "box in the right", "bar in the left", "bar in the right")
COUNTS = {"train": 16, "val": 8}
RECIPE = """
seed_everything: 0
trainer: {accelerator: cpu, devices: 1, max_steps: 12, val_check_interval: 4, log_every_n_steps: 1,
  callbacks: [
    {class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}},
    {class_path: mhla_lightning.callbacks.SampleGrids, init_args: {grids: 1, first: 4, steps: 2, per_class: 2,
      prompts: [a box in the left, bar]}}]}
model:
  class_path: mhla_lightning.tasks.TextToImageTask
  init_args:
    backbone: sana_tiny
    attention: {name: mhla, blocks: 2}
    backbone_options: {input_size: 8, patch_size: 2, in_channels: 3, embed_dim: 24, depth: 2, num_heads: 3,
      cross_heads: 2, text_dim: 8, text_length: 6}
    diffusion: {name: flow, shift: 3.0}
    optimizer: {lr: 2.0e-3}
    schedule: {warmup_steps: 2}
data:
  class_path: mhla_lightning.data.CaptionedImageDataModule
  init_args: {path: PATH, image_size: 8, batch_size: 4, reading: {num_workers: 0},
    text_encoder: {name: 'words:8', tokens: 6, channels: 8},
    augmentation: {scale: [1.0, 1.0], ratio: [1.0, 1.0], hflip: 0.0, color_jitter: 0.0, auto_augment: null,
      re_prob: 0.0, crop_pct: 1.0, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
checkpoint: {every_n_steps: 4, keep_last: 2}
"""


def picture(label: int) -> np.ndarray:
    """Return the pixels of a class, uint8 (8, 8)."""
    pixels = np.zeros((8, 8), np.uint8)
    left = 4 * (label % 2)
    pixels[2 : 6 if label < 2 else 3, left : left + 4] = 255
    return pixels


def write_captioned(shards: Path, captions: bool = True, labels: bool = True) -> Path:
    """Write 16 training and 8 validation images of 8 x 8 pixels, each with its label and its caption."""
    header, written = ShardIndex("images", (), CLASSES), ShardIndex("images", (), CLASSES if labels else ())

    def samples(count: int) -> list[Sample]:
        return [
            image_sample(
                header,
                f"{number}",
                png_bytes(Image.fromarray(picture(number % 4))),
                number % 4,
                f"a {CLASSES[number % 4]}, {number}" if captions else None,
            )
            for number in range(count)
        ]

    shards.mkdir()
    for split, count in COUNTS.items():
        found = samples(count)
        if not labels:
            for sample in found:
                del sample.members["cls"]
        write_split(shards / split, written, found)
    return shards


def write_recipe(path: Path, shards: Path) -> Path:
    path.write_text(RECIPE.replace("PATH", str(shards)))
    return path
