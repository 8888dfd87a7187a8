"""Small video DiTs for tests."""

from __future__ import annotations

from typing import Any

import torch

from mhla_lightning import backbones
from mhla_lightning.attention import ATTENTION

SMALL: dict[str, Any] = {
    "input_size": (4, 8, 12),
    "patch_size": (1, 2, 2),
    "in_channels": 3,
    "embed_dim": 24,
    "ffn_dim": 40,
    "num_heads": 2,
}
SMALL |= {"depth": 3, "freq_dim": 16, "text_dim": 10, "text_length": 6, "blocks": (2, 2, 3)}
HYBRID = ["softmax", "mhla", "mhla"]
FULL = {"name": "mhla", "gate": True, "pos_conv": "lepe3", "normalizer": "block"}
ENTRIES: list[Any] = [
    *ATTENTION,
    {"name": "mhla", "preset": "release"},
    HYBRID,
    FULL,
    {"name": "linear", "pos_conv": "cpe3", "gate": True},
]


def build(name: str = "wan_1_3b", **options: Any) -> Any:
    """Untyped on purpose: the tests look inside."""
    return backbones.build_backbone(name, **{**SMALL, **options})


def awake(model: Any, seed: int = 0) -> Any:
    """Every parameter random: at its initialisation the output is zero. Mixing matrices stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                noise.abs() * 0.2
                if "mixing" in name
                else noise * 0.1 + (1.0 if "norm" in name and "weight" in name else 0.0)
            )
    return model.eval()


def inputs(
    model: Any, size: tuple[int, ...] | None = None, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.in_channels, *(size or model.input_size), generator=generator)
    return (
        x,
        torch.tensor([7.0, 900.5])[:batch],
        torch.randn(batch, model.text_length, model.text_dim, generator=generator),
    )
