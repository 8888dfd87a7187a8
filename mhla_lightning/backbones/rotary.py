"""Rotary positions of language models (arXiv 2104.09864; SPEC 5.1).

The two halves of a head form the pairs, as in GPT-NeoX and in the release.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mhla_lightning.attention.context import HalfRotary


class Rotation(HalfRotary):
    """Turns (batch, tokens, heads, dim) by the angles of its positions.

    Sums are taken in the precision of the angles.

    Args:
        cos, sin: (batch or 1, tokens, 1, dim / 2).
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    def __call__(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1
        ).to(x.dtype)


def rotations(positions: Tensor, dims: Iterable[int], base: float, dtype: torch.dtype) -> dict[int, Rotation]:
    """Return one rotation for each head dimension, shared by all layers of a forward.

    Args:
        positions: (batch or 1, tokens) int64.
        dims: even head dimensions.
        base: the longest wave is 2 pi `base` tokens.
        dtype: of the activations; angles are float64 for float64, else float32.
    """
    return {
        dim: _rotation(positions, dim, base, torch.float64 if dtype == torch.float64 else torch.float32)
        for dim in dims
    }


def _rotation(positions: Tensor, dim: int, base: float, dtype: torch.dtype) -> Rotation:
    frequencies = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim)
    angles = (positions.unsqueeze(-1).to(dtype) * frequencies).unsqueeze(2)
    return Rotation(angles.cos(), angles.sin())
