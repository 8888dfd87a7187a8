"""Small autoencoders of diffusers with random weights, and images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

FACTOR, SIZE = 4, 16  # pixels a place of a latent, and a side of the images that are encoded


def save_kl(folder: Path, seed: int = 0, spread: float = 1.0, **config: object) -> str:
    """An AutoencoderKL, factor 4, 4 channels, scale 0.5, shift 0.25. spread: of its latents, so that images differ visibly."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"scaling_factor": 0.5, "shift_factor": 0.25, "norm_num_groups": 4, "latent_channels": 4} | config
        down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
        model: Any = AutoencoderKL(block_out_channels=(4, 8, 8), down_block_types=down, up_block_types=up, **options)
        if model.quant_conv is not None:
            model.quant_conv.weight.data.mul_(spread)
        model.save_pretrained(folder)
    return str(folder)


def save_dc(folder: Path, seed: int = 0) -> str:
    """An AutoencoderDC, factor 4, 8 channels, scale 0.4."""
    from diffusers import AutoencoderDC

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoencoderDC(
            latent_channels=8,
            attention_head_dim=8,
            encoder_block_out_channels=(8, 16, 16),
            decoder_block_out_channels=(8, 16, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.4,
        )
        model.save_pretrained(folder)
    return str(folder)


def save_images(folder: Path, train: int = 12, val: int = 4, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    """Noisy RGB images of two classes, FOLDER/SPLIT/CLASS/*.png. size: (width, height)."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            path = folder / split / "ab"[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return folder
