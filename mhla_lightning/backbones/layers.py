"""What backbones put around the self-attention layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mhla_lightning.attention import BlockGrid, DepthwiseConv
from mhla_lightning.errors import UserError


class ConditionalPosition(nn.Module):
    """CPE: x + depthwise 3x3(x) on raster tokens; zero at the start, so a fresh one changes nothing (SPEC D6).

    Args:
        dim: channels.
        axes: grid axes, 1 to 3.
    """

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(dim, axes, kernel_size=3)
        nn.init.zeros_(self.depthwise.conv.weight)
        if self.depthwise.conv.bias is not None:
            nn.init.zeros_(self.depthwise.conv.bias)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        return x + self.depthwise(x, grid)

    def flops(self, tokens: int) -> int:
        return self.depthwise.flops(tokens)


class BlockOrderConv(DepthwiseConv):
    """The release's `dwconv`: a depthwise 3x3 without residual, on tokens in block order laid out as a square (SPEC D6).

    Neighbours in that square are not neighbours in the image; :class:`ConditionalPosition` is what the paper means.

    Args:
        dim: channels.
        blocks: the operator's partition; None for an operator without blocks, whose tokens stay in raster order.
        tokens: how many, a square number.

    Raises:
        UserError: tokens that make no square, or short blocks.
    """

    def __init__(self, dim: int, blocks: BlockGrid | None, tokens: int) -> None:
        super().__init__(dim, axes=2, kernel_size=3)
        if math.isqrt(tokens) ** 2 != tokens:
            raise UserError(f"dwconv lays the tokens out as a square, and {tokens} is no square number; take pos_conv: cpe3")
        if blocks is not None and not blocks.even:
            raise UserError(f"dwconv needs full blocks, and {blocks} has short ones; take pos_conv: cpe3")
        self.blocks, self.side = blocks, math.isqrt(tokens)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """(batch, tokens, dim) in raster order -> same shape; the square stands for any grid."""
        square = (self.side, self.side)
        if self.blocks is None:
            return super().forward(x, square)
        out = super().forward(self.blocks.to_blocks(x).flatten(1, 2), square)
        return self.blocks.from_blocks(out.unflatten(1, (self.blocks.num_blocks, self.blocks.tokens_per_block)))


class TimestepEmbedder(nn.Module):
    """Sinusoid of the model time, then Linear SiLU Linear (SPEC 4.2).

    Args:
        dim: channels of the embedding.
    """

    channels = 256  # of the sinusoid

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.channels, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """(batch,) of any number type -> (batch, dim) in the parameters' dtype; the sinusoid itself is float32."""
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        return self.mlp(time_sinusoid(t, self.channels).to(first.weight.dtype))

    def flops(self) -> int:
        return 2 * sum(layer.weight.numel() for layer in self.mlp if isinstance(layer, nn.Linear))


class LabelEmbedder(nn.Module):
    """One vector a class and one, the last, for no class: the null label of classifier-free guidance.

    Args:
        num_classes: without the null label.
        dim: channels of the embedding.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        """(batch,) int64 -> (batch, dim)"""
        return self.embedding_table(y)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x (1 + scale) + shift; x is (batch, tokens, dim), shift and scale (batch, dim)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def time_sinusoid(t: Tensor, channels: int) -> Tensor:
    """(batch,) -> (batch, channels) float32: [cos | sin] of t / 10000^(j / half), j = 0 ... half - 1."""
    half = channels // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_sinusoid(grid: Sequence[int], dim: int) -> Tensor:
    """(rows * columns, dim) float32 in raster order, dim a multiple of 4: the first half from the column, the second from the row (SPEC 4.2).

    Each half is [sin(p w_0), ..., cos(p w_0), ...] with w_j = 10000^(-j / (dim / 4)).
    """
    rows, columns = grid
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    by_axis = []
    for count in (columns, rows):
        angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
        by_axis.append(torch.cat([angle.sin(), angle.cos()], dim=-1))
    column, row = by_axis
    table = torch.cat([column[None].expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)], dim=-1)
    return table.flatten(0, 1).float()
