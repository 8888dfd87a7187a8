"""A tiny text-to-image recipe on latents of bars that a sentence places."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mhla_lightning.data.encoders.text_encoders import load_text_encoder
from mhla_lightning.data.index import VAE, ShardIndex, TextEncoding
from mhla_lightning.data.prepare.samples import Sample, latent_sample
from mhla_lightning.data.prepare.writer import write_split
from tests.helpers.vaes import save_dc

CHANNELS, SIDE = 8, 8  # of the autoencoder of save_dc and images of 32 x 32 pixels
PLACES = ("left", "right", "top", "bottom")
TEXT = TextEncoding("words:8", 6, 8)
RECIPE = """
seed_everything: 0
trainer: {accelerator: cpu, devices: 1, max_steps: 4, val_check_interval: 4, log_every_n_steps: 1,
  callbacks: [
    {class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}},
    {class_path: mhla_lightning.callbacks.SampleGrids, init_args: {grids: 1, first: 4, steps: 2, per_class: 2,
      prompts: [a bar at the left, a bar at the top]}}]}
model:
  class_path: mhla_lightning.tasks.TextToImageTask
  init_args:
    backbone: sana_tiny
    attention: {name: mhla, blocks: 2}
    backbone_options: {input_size: 8, patch_size: 1, in_channels: 8, embed_dim: 24, depth: 2, num_heads: 3,
      cross_heads: 2, text_dim: 8, text_length: 6}
    diffusion: {name: flow, shift: 3.0}
    optimizer: {lr: 2.0e-3}
    schedule: {warmup_steps: 2}
data:
  class_path: mhla_lightning.data.LatentDataModule
  init_args:
    path: PATH
    batch_size: 4
    reading: {num_workers: 0}
    vae: {name: AUTOENCODER, scale: 0.4, shift: 0.0, shape: [8, 8, 8]}
    text_encoder: {name: 'words:8', tokens: 6, channels: 8}
checkpoint: {every_n_steps: 2, keep_last: 2}
"""


def write_latents(root: Path, name: str = "bars") -> Path:
    """Write shards of latents, in which a bar lies where the text says."""
    vae = VAE(name, 0.4, 0.0, (CHANNELS, SIDE, SIDE))
    header, rng = ShardIndex("latents", (), vae=vae, text=TEXT), np.random.default_rng(0)
    texts = load_text_encoder(TEXT).encode([f"a bar at the {place}" for place in PLACES])

    def samples(count: int) -> list[Sample]:
        found = []
        for number in range(count):
            latent = rng.standard_normal((CHANNELS, SIDE, SIDE)).astype(np.float32) * 0.1
            bar = latent if number % 4 > 1 else latent.transpose(0, 2, 1)
            bar[:, :2] += 2 if number % 2 == 0 else 0
            bar[:, -2:] += 2 if number % 2 else 0
            found.append(latent_sample(header, f"{number}", latent, text=texts[number % 4].numpy()))
        return found

    shards = root / "shards"
    shards.mkdir()
    for split, count in (("train", 16), ("val", 4)):
        write_split(shards / split, header, samples(count))
    return shards


def write_recipe(path: Path, root: Path) -> Path:
    """Write shards, an autoencoder and the recipe."""
    vae = save_dc(root / "dc")
    text = RECIPE.replace("PATH", str(write_latents(root, vae))).replace("AUTOENCODER", vae)
    path.write_text(text)
    return path
