"""Self-attention around any operator: projections, norms, gate (SPEC 3.1, 4.2, 6.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mhla_lightning.arguments.checked import CheckedOptions
from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.base import known, positive
from mhla_lightning.attention.context import Context, Rotary
from mhla_lightning.attention.entry import Entry, build_operator, resolve_layer
from mhla_lightning.attention.layers.inputs import check_tokens
from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.errors import UserError, inside

POS_CONVS = ("none", "lepe3", "lepe5", "cpe3")
GATES = (False, True, "linear")


class DepthwiseConv(nn.Module):
    """Depthwise convolution of raster tokens on their grid.

    Tokens are (batch, tokens, channels), before and after.

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
        """Return the FLOPs of one sample's forward, 2 per multiply-add."""
        return 2 * tokens * self.conv.weight.numel()


@dataclass(frozen=True)
class LayerOptions(CheckedOptions):
    """Keys of an attention entry that belong to :class:`SelfAttention`.

    Args:
        pos_conv: `lepe3` and `lepe5` add a depthwise convolution of v to the output. `cpe3` belongs to the
            block around this layer and has no effect here.
        gate: True multiplies the operator's output by SiLU(x W_g) (SPEC 4.2). `linear` has no activation
            and multiplies the convolution's output too: (out + lepe) (x W_g) (SPEC 3.2).
        out_norm: RMSNorm per head on the operator's output.
        qk_norm: RMSNorm of q and k over all channels.
        qk_norm_eps: its epsilon; None means the dtype's smallest step, as in the release.
        qkv_bias: bias of the q, k, v projection.
        inner_norm: a second LayerNorm before the projection (SPEC C4; the release has it).
        dropout: after the output projection.

    Raises:
        UserError: unknown `pos_conv` or `gate`.
    """

    pos_conv: str = "none"
    gate: bool | str = False
    out_norm: bool = False
    qk_norm: bool = False
    qk_norm_eps: float | None = 1e-6
    qkv_bias: bool = True
    inner_norm: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        known("pos_conv", self.pos_conv, POS_CONVS)
        if self.gate not in GATES:
            raise UserError("gate", f"found {self.gate}; it is true, false or linear")


class SelfAttention(nn.Module):
    """Multi-head self-attention on raster tokens with any operator of the registry.

    Args:
        dim: channels C, a multiple of heads.
        heads: number of heads.
        attention: operator name, or a mapping of ``name``, the operator's own options and
            :class:`LayerOptions`. None is MHLA with 4 blocks an axis, or 16 of a row; fewer on short axes.
        grid: token counts per axis, ``(N,)``, ``(H, W)`` or ``(T, H, W)``.

    Raises:
        UserError: unknown names, dim that heads does not divide, options that do not fit the grid.
    """

    def __init__(self, dim: int, heads: int, *, attention: Entry | None = None, grid: Sequence[int]) -> None:
        super().__init__()
        if attention is None:
            most = 16 if len(grid) == 1 else 4
            attention = {"name": "mhla", "block_size": [ceil_div(n, most) for n in grid]}
        positive("dim", dim)
        positive("heads", heads)
        if dim % heads:
            raise UserError("heads", f"{heads} heads do not divide {dim} channels")
        with inside("attention"):
            spec = resolve_layer(attention, presets={}, layer_options=self.layer_options())
            options = LayerOptions(**spec.layer)
        pos_conv, qk_norm_eps = options.pos_conv, options.qk_norm_eps
        self.dim, self.heads, self.grid = dim, heads, tuple(grid)
        self.entry = {"name": spec.name, "operator": dict(spec.operator), "layer": asdict(options)}
        self.norm = nn.LayerNorm(dim) if options.inner_norm else nn.Identity()
        self.qkv = nn.Linear(dim, 3 * dim, bias=options.qkv_bias)
        self.q_norm = RMSNorm(dim, eps=qk_norm_eps) if options.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim, eps=qk_norm_eps) if options.qk_norm else nn.Identity()
        self.lepe = (
            DepthwiseConv(dim, len(self.grid), int(pos_conv[-1])) if pos_conv.startswith("lepe") else None
        )
        head_dim = dim // heads
        with inside("attention"):
            self.attention = build_operator(
                spec, heads=heads, dim_k=head_dim, dim_v=head_dim, grid=grid, causal=False
            )
        self.out_norm = RMSNorm(head_dim, eps=1e-6) if options.out_norm else nn.Identity()
        self.gate = nn.Linear(dim, dim) if options.gate else None
        self.gates_all = options.gate == "linear"
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(options.dropout)
        self.recompute = False

    def forward(
        self,
        x: Tensor,
        *,
        grid: Sequence[int] | None = None,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend over (batch, tokens, dim) in raster order -> same shape.

        Args:
            x: (batch, tokens, dim).
            grid: token counts per axis; None means the grid given at construction.
            rotary: turns q and k by position; None means no positions.
            mask: (batch, tokens) bool, True = real token; None means all tokens are real.

        Raises:
            UserError: a tensor of another shape, or tokens that do not fill the grid.
        """
        check_tokens(x, self.dim)
        context = Context(grid=self.grid if grid is None else grid, rotary=rotary, mask=mask)
        x = self.norm(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        heads = [t.unflatten(-1, (self.heads, -1)) for t in (q, k, v)]
        if self.recompute and self.training:
            out = checkpoint(self.attention, *heads, context, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self.attention(*heads, context)
        out = self.out_norm(out).flatten(2)
        if self.gate is not None and not self.gates_all:
            out = out * F.silu(self.gate(x))
        if self.lepe is not None:
            grid = self.grid if grid is None else grid
            out = out + self.lepe(v if mask is None else v * mask.unsqueeze(-1).to(v.dtype), grid)
        if self.gate is not None and self.gates_all:
            out = out * self.gate(x)
        return self.dropout(self.proj(out))

    def flops(self, grid: Sequence[int]) -> int:
        """Return the FLOPs of one sample's forward, 2 per multiply-add.

        Matrix products and convolutions count.
        """
        tokens = math.prod(grid)
        projections = 4 + (self.gate is not None)
        conv = self.lepe.flops(tokens) if self.lepe is not None else 0
        head_dim = self.dim // self.heads
        operator = self.attention.flops(tokens, self.heads, head_dim, head_dim)
        return 2 * projections * tokens * self.dim**2 + conv + operator

    @classmethod
    def layer_options(cls) -> tuple[str, ...]:
        """Return the keys of an attention entry that belong to this layer, not to the operator."""
        return tuple(field.name for field in fields(LayerOptions))
