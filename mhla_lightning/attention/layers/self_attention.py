"""Self-attention around any operator: projections, norms, position convolution, gate (SPEC 3.1, 4.2, 6.4)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.attention.base import Rotary
from mhla_lightning.attention.entry import Entry, build_attention
from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.errors import UserError, unknown_name

POS_CONVS = ("none", "lepe3", "lepe5", "cpe3")


class DepthwiseConv(nn.Module):
    """Depthwise convolution of raster tokens on their grid: (batch, tokens, channels) -> same shape.

    Args:
        channels: C.
        axes: 1, 2 or 3 grid axes.
        kernel_size: odd; the grid keeps its size.
    """

    def __init__(self, channels: int, axes: int, kernel_size: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.conv = conv(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
        return self.conv(image).flatten(2).transpose(1, 2)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.conv.weight.numel()


class SelfAttention(nn.Module):
    """Multi-head self-attention on raster tokens with any operator of the registry.

    Args:
        dim: channels C, a multiple of heads.
        heads: channel heads.
        attention: operator name, or a mapping of ``name`` and the operator's own options.
        grid: token counts per axis, ``(N,)``, ``(H, W)`` or ``(T, H, W)``.
        pos_conv: `lepe3`/`lepe5` adds a depthwise convolution of v to the output;
            `cpe3` belongs to the block around this layer and does nothing here.
        gate: output gate SiLU(x W_g) (SPEC 4.2).
        out_norm: RMSNorm per head on the operator's output.
        qk_norm: RMSNorm of q and k over all channels.
        qk_norm_eps: its epsilon; None takes the dtype's smallest step, as the release does.
        qkv_bias: bias of the q, k, v projection.
        inner_norm: a second LayerNorm before the projection (SPEC C4; the release has it).
        dropout: after the output projection.

    Raises:
        UserError: unknown names, dim that heads does not divide, options that do not fit the grid.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        attention: Entry = "mhla",
        grid: Sequence[int],
        pos_conv: str = "none",
        gate: bool = False,
        out_norm: bool = False,
        qk_norm: bool = False,
        qk_norm_eps: float | None = 1e-6,
        qkv_bias: bool = True,
        inner_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"{heads} heads do not divide {dim} channels")
        if pos_conv not in POS_CONVS:
            raise UserError(unknown_name("pos_conv", pos_conv, POS_CONVS))
        self.dim, self.heads, self.grid = dim, heads, tuple(grid)
        self.norm = nn.LayerNorm(dim) if inner_norm else nn.Identity()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = RMSNorm(dim, eps=qk_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim, eps=qk_norm_eps) if qk_norm else nn.Identity()
        self.lepe = (
            DepthwiseConv(dim, len(self.grid), int(pos_conv[-1])) if pos_conv.startswith("lepe") else None
        )
        self.attention = build_attention(
            attention, heads=heads, dim_k=dim // heads, dim_v=dim // heads, grid=grid
        )
        self.out_norm = RMSNorm(dim // heads, eps=1e-6) if out_norm else nn.Identity()
        self.gate = nn.Linear(dim, dim) if gate else None
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        grid: Sequence[int] | None = None,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(batch, tokens, dim) in raster order -> same shape; mask is (batch, tokens) bool, True = real
        token.
        """
        grid = self.grid if grid is None else grid
        x = self.norm(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        out = self.attention(
            *(t.unflatten(-1, (self.heads, -1)) for t in (q, k, v)), grid=grid, rotary=rotary, mask=mask
        )
        out = self.out_norm(out).flatten(2)
        if self.gate is not None:
            out = out * F.silu(self.gate(x))
        if self.lepe is not None:
            out = out + self.lepe(v if mask is None else v * mask.unsqueeze(-1).to(v.dtype), grid)
        return self.dropout(self.proj(out))

    def flops(self, grid: Sequence[int]) -> int:
        """Matrix-product and convolution FLOPs of one sample's forward, 2 a multiply-add."""
        tokens = math.prod(grid)
        projections = 4 + (self.gate is not None)
        conv = self.lepe.flops(tokens) if self.lepe is not None else 0
        head_dim = self.dim // self.heads
        return (
            2 * projections * tokens * self.dim**2
            + conv
            + self.attention.flops(tokens, self.heads, head_dim, head_dim)
        )

    @classmethod
    def layer_options(cls) -> tuple[str, ...]:
        """The keys of an attention entry that belong to this layer rather than to the operator."""
        return tuple(name for name in inspect.signature(cls.__init__).parameters if name not in _NOT_IN_ENTRY)


_NOT_IN_ENTRY = ("self", "dim", "heads", "attention", "grid")
