"""A tiny language recipe on the bytes of forty short documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mhla_lightning.data.prepare.text.tokenize import TextOptions, tokenize

RECIPE = """
seed_everything: 0
trainer: {accelerator: cpu, devices: 1, max_steps: 10, val_check_interval: 5, log_every_n_steps: 1,
  callbacks: [{class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}}]}
model:
  class_path: mhla_lightning.tasks.LanguageTask
  init_args:
    backbone: lm_tiny
    attention: {name: mhla, chunk_size: 8, max_chunks: 8, heads: 2}
    backbone_options: {context: 32, embed_dim: 16, depth: 2, intermediate: 32}
    eval_lengths: [16, 64]
    optimizer: {lr: 2.0e-3, betas: [0.9, 0.95]}
    schedule: {warmup_steps: 2, min_lr: 2.0e-4}
data:
  class_path: mhla_lightning.data.TokenDataModule
  init_args: {path: PATH, batch_size: 8, reading: {num_workers: 0}}
checkpoint: {every_n_steps: 5, keep_last: 1}
"""


def write_text(root: Path) -> Path:
    """Rows of 32 (train) and 64 (val) tokens."""
    (root / "text").mkdir()
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "looked", "at", "a", "bird"]
    for number in range(40):
        chosen = np.random.default_rng(number).choice(words, 8 + number % 9)
        (root / "text" / f"{number:02d}.txt").write_text(" ".join(chosen) + ".\n")
    tokenize([str(root / "text")], root / "shards", TextOptions(length=32, val_length=64, val=6))
    return root / "shards"
