"""Layers of the vision linear transformer (VLT): stem, block, stage (SPEC 3.2).

A block runs on tokens in raster order, the convolutions between stages on images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from timm.layers import ConvNormAct, DropPath, LayerScale
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.attention import DepthwiseConv, LayerAttention, SelfAttention
from mhla_lightning.attention.context import Rotary
from mhla_lightning.backbones.layers import ConditionalPosition, take_grid


def conv_norm(before: int, dim: int, kernel_size: int = 3, stride: int = 1) -> ConvNormAct:
    """Return a convolution with batch normalisation.

    An activation follows as a module of its own: torch's synchronised batch normalisation takes the place of
    timm's, and would leave out an activation inside.

    Args:
        before, dim: channels, before and after.
        kernel_size, stride: of the convolution, which is padded.
    """
    return ConvNormAct(before, dim, kernel_size, stride=stride, bias=True, apply_act=False)


class Stem(nn.Sequential):
    """Four 3x3 convolutions with batch normalisation, the first and the last of stride 2.

    (batch, in_chans, height, width) -> (batch, dim, height / 4, width / 4).

    Args:
        in_chans: channels of the image.
        dim: channels of the first stage, even.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        half = dim // 2
        layers: list[nn.Module] = []
        for before, stride in ((in_chans, 2), (half, 1), (half, 1)):
            layers += [conv_norm(before, half, stride=stride), nn.GELU()]
        super().__init__(*layers, conv_norm(half, dim, stride=2))

    def flops(self, img_size: Sequence[int]) -> int:
        """Return the forward FLOPs of one image of (height, width) pixels, 2 a multiply-add."""
        (rows, columns), total = img_size, 0
        for layer in self:
            if isinstance(layer, ConvNormAct):
                stride = layer.conv.stride[0]
                rows, columns = math.ceil(rows / stride), math.ceil(columns / stride)
                total += 2 * rows * columns * layer.conv.weight.numel()
        return total


class ConvMLP(nn.Module):
    """Feed-forward network with a depthwise 3x3 convolution and its residual in the middle.

    Args:
        dim: channels C.
        hidden: channels in the middle.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden, axes=2, kernel_size=3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """(batch, tokens, dim) -> same shape"""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x, grid))

    def flops(self, tokens: int) -> int:
        return 2 * tokens * (self.fc1.weight.numel() + self.fc2.weight.numel()) + self.dwconv.flops(tokens)


class VLTBlock(nn.Module):
    """x += conv(x); x += scale attention(norm(x)); x += scale feed-forward(norm(x)).

    Args:
        dim, heads: of the stage.
        spec: the resolved attention entry of this layer.
        grid: token counts per axis.
        mlp_ratio: hidden channels of the feed-forward network, in channels.
        layer_scale: start of the learned factor of each branch and channel.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        spec: LayerAttention,
        grid: Sequence[int],
        *,
        mlp_ratio: float,
        layer_scale: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.cpe = ConditionalPosition(dim, axes=2)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads, attention=spec.entry, grid=grid)
        self.ls1, self.drop_path1 = LayerScale(dim, layer_scale), DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMLP(dim, int(mlp_ratio * dim))
        self.ls2, self.drop_path2 = LayerScale(dim, layer_scale), DropPath(drop_path)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Return tokens of the shape of x, (batch, tokens, dim) in raster order."""
        x = self.cpe(x, self.grid)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), rotary=rotary)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), self.grid)))

    def flops(self) -> int:
        """Return the forward FLOPs of one sample, 2 a multiply-add."""
        tokens = math.prod(self.grid)
        return self.cpe.flops(tokens) + self.attn.flops(self.grid) + self.mlp.flops(tokens)


class VLTStage(nn.Module):
    """The blocks of one resolution, after the convolution that leads there.

    Args:
        before: channels of the stage before; None for the first, which follows the stem.
        blocks: of one grid.
    """

    def __init__(self, before: int | None, blocks: Sequence[VLTBlock]) -> None:
        super().__init__()
        dim = blocks[0].attn.dim
        self.downsample = nn.Identity() if before is None else conv_norm(before, dim, stride=2)
        self.blocks = nn.ModuleList(blocks)
        self.grid, self.dim, self.head_dim = blocks[0].grid, dim, dim // blocks[0].attn.heads

    def take_grid(self, other: VLTStage) -> None:
        """Take the grid of another stage, and its operators, which are made for that grid."""
        self.grid = other.grid
        for mine, new in zip(self.blocks, other.blocks, strict=True):
            assert isinstance(mine, VLTBlock)
            assert isinstance(new, VLTBlock)
            mine.grid = new.grid
            take_grid(mine.attn, new.attn)

    def flops(self) -> int:
        """Return the forward FLOPs of one sample, 2 a multiply-add."""
        total = sum(block.flops() for block in self.blocks if isinstance(block, VLTBlock))
        if isinstance(self.downsample, ConvNormAct):
            total += 2 * math.prod(self.grid) * self.downsample.conv.weight.numel()
        return total
