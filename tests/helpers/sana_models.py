"""Small SANA transformers for tests, and diffusers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from mhla_lightning import backbones
from mhla_lightning.attention import ATTENTION
from tests.helpers.vaes import save_dc, save_gemma2
from tests.helpers.video_models import inputs

SMALL: dict[str, Any] = {
    "input_size": (8, 12),
    "patch_size": 1,
    "in_channels": 3,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "cross_heads": 2,
    "text_dim": 10,
    "text_length": 6,
}
HYBRID = ["linear", "mhla"]
FULL = {"name": "mhla", "gate": True, "pos_conv": "lepe3", "out_norm": True, "qk_norm": True}
ENTRIES: list[Any] = [*ATTENTION, HYBRID, FULL, {"name": "mhla", "pos_conv": "cpe3", "blocks": (3, 4)}]


def build(name: str = "sana_600m", **options: Any) -> Any:
    """Untyped on purpose: the tests look inside."""
    return backbones.build_backbone(name, **{**SMALL, **options})


def texts(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, times, texts, and a mask that leaves 2 rows of the first text and all of the second."""
    x, t, text = inputs(model)
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    mask[0, 2:] = False
    return x, t, text, mask


def theirs(bias: bool = False, **sizes: Any) -> Any:
    """diffusers' model of the small sizes, with its own random weights."""
    small = {**SMALL, **sizes}
    torch.manual_seed(0)
    return diffusers.SanaTransformer2DModel(
        in_channels=small["in_channels"],
        out_channels=small["in_channels"],
        num_attention_heads=small["num_heads"],
        attention_head_dim=small["embed_dim"] // small["num_heads"],
        num_layers=small["depth"],
        num_cross_attention_heads=small["cross_heads"],
        cross_attention_head_dim=small["embed_dim"] // small["cross_heads"],
        cross_attention_dim=small["embed_dim"],
        caption_channels=small["text_dim"],
        attention_bias=bias,
        sample_size=small["input_size"][0],
        patch_size=small["patch_size"],
    ).eval()


def save_pipeline(folder: Path) -> Path:
    """A small random pipeline of SANA: autoencoder, text encoder with its tokenizer, and transformer."""
    save_dc(folder / "vae")
    save_gemma2(folder)
    model = theirs(in_channels=8, input_size=(4, 4), text_dim=24)
    model.save_pretrained(folder / "transformer")
    return folder
