"""Small options of every image classifier."""

from __future__ import annotations

from typing import Any

TINY_VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}
TINY_VLT: dict[str, Any] = {
    "img_size": 28,
    "embed_dims": (8, 12, 16, 24),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 3),
    "mlp_ratio": 1.5,
    "head_dim": 16,
    "num_classes": 5,
    "layer_scale": (1.0, 1.0, 1.0, 1.0),
}


def tiny_options(backbone: str) -> dict[str, Any]:
    """Options that make a registered classifier small."""
    return dict(TINY_VLT if backbone.startswith("vlt_") else TINY_VIT)
