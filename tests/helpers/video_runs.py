"""A tiny text-to-video recipe on real clips of two films."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mhla_lightning.data.index import Clip
from mhla_lightning.data.prepare.clips.make import make_clips
from mhla_lightning.data.prepare.clips.options import ClipOptions

pytest.importorskip("av")
from tests.helpers.videos import write_video  # noqa: E402  needs PyAV

FRAMES, SIDE, RATE = 8, 16, 8.0
CAPTIONS = ("a bar moves right", "a bar moves down")
RECIPE = """
seed_everything: 0
trainer: {accelerator: cpu, devices: 1, max_steps: 4, val_check_interval: 4, log_every_n_steps: 1,
  callbacks: [{class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}}]}
model:
  class_path: mhla_lightning.tasks.VideoDiffusionTask
  init_args:
    backbone: wan_tiny
    attention: {name: mhla, blocks: [2, 2, 2]}
    backbone_options: {input_size: [8, 16, 16], embed_dim: 32, ffn_dim: 48, depth: 2, num_heads: 2,
      freq_dim: 16, text_dim: 8, text_length: 6}
    optimizer: {lr: 2.0e-3}
    schedule: {warmup_steps: 2}
data:
  class_path: mhla_lightning.data.ClipDataModule
  init_args: {path: PATH, batch_size: 4, reading: {num_workers: 0},
    text_encoder: {name: 'words:8', tokens: 6, channels: 8}}
checkpoint: {every_n_steps: 2, keep_last: 2}
"""


def write_clips(root: Path) -> Path:
    """Shards of overlapping clips of two films, in which a bright bar moves right or down."""
    for number, caption in enumerate(CAPTIONS):
        frames = []
        for time in range(48):
            frame = np.full((32, 32, 3), 40 + 20 * number, np.uint8)
            first = time * 28 // 47
            frame[first : first + 4] = (220, 180, 60)
            frames.append(frame if number else frame.transpose(1, 0, 2))
        write_video(root / f"films/film{number}.mp4", frames, rate=int(RATE))
        (root / f"films/film{number}.txt").write_text(caption)
    make_clips(
        root / "films",
        root / "shards",
        ClipOptions((Clip(FRAMES, SIDE, SIDE, RATE),), stride=2, val_by="time", store="npy"),
    )
    return root / "shards"


def write_recipe(path: Path, shards: Path) -> Path:
    path.write_text(RECIPE.replace("PATH", str(shards)))
    return path
