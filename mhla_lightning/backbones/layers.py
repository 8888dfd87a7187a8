"""What backbones put around the self-attention layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mhla_lightning.attention import DepthwiseConv


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
