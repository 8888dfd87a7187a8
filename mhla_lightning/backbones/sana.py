"""SANA's text-to-image diffusion transformer around any attention operator.

SANA: arXiv 2410.10629. With MHLA in place of its linear attention: paper Sec. 5.2, Tab. 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.arguments.checked import CheckedOptions
from mhla_lightning.attention import DepthwiseConv, LayerAttention, SelfAttention, resolve_layers
from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.backbones.adapting import Grid, source_geometry
from mhla_lightning.backbones.layers import ConditionalPosition, check_heads, check_ratio
from mhla_lightning.backbones.text_attention import CROSS_ATTENTION, CrossEntry, TextAttention, filled_up
from mhla_lightning.backbones.text_dit import Ends, TextDiT, laid_out, modulated
from mhla_lightning.errors import UserError, inside
from mhla_lightning.weights.adapted import Adapted
from mhla_lightning.weights.sana_names import from_sana

AXES = ("height", "width")

_SANA = {"qkv_bias": False}
_RELU = {**_SANA, "feature_map": "relu", "eps": 1e-15}

SANA_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "softmax": _SANA,
        "linear": _RELU,
        "mhla": {**_RELU, "blocks": 4, "normalizer": "block", "mix_init": "local_row"},
    }
}
"""Preset -> operator -> options.

`linear` is SANA's own attention. The paper gives no options of its SANA, so `mhla` has the features of the
linear attention that it replaces and the mixing of the paper's images. With `mix_init: uniform` a fresh one
computes that linear attention.
"""


@dataclass(frozen=True)
class SanaOptions(CheckedOptions):
    """Sizes of a :class:`SanaDiT`.

    Args:
        input_size: height and width of the latents that the layers' blocks are laid out for, one number for a
            square; other sizes work where :meth:`SanaDiT.check_size` allows them.
        patch_size: latent pixels of a token along each axis, one number for a square.
        in_channels: C, of the latents.
        embed_dim: channels of a token.
        depth, num_heads: of the transformer.
        cross_heads: heads of the attention to the text.
        cross_attention: `softmax`, or `mhla` or a mapping of `name: mhla` and :class:`CrossAttentionOptions`
            (beyond the paper). Without blocks it has 4 an axis, and at most 16 of the text.
        mlp_ratio: hidden channels of the feed-forward network, in channels of a token.
        ffn_conv: keep the depthwise convolution of the feed-forward network. SANA has no other positions;
            without it, give the attention entry a `pos_conv`.
        text_dim: channels of the text's features.
        text_length: most rows of text.
    """

    input_size: int | Sequence[int] = 32
    patch_size: int | Sequence[int] = 1
    in_channels: int = 32
    embed_dim: int = 1152
    depth: int = 28
    num_heads: int = 36
    cross_heads: int = 16
    cross_attention: CrossEntry = "softmax"
    mlp_ratio: float = 2.5
    ffn_conv: bool = True
    text_dim: int = 2304
    text_length: int = 300


class SanaDiT(TextDiT):
    """Predicts the velocity (noise - image) of latents or pixels, given a time and a text.

    Args:
        attention: attention entry: name, mapping, or a list of these cycled over the layers.
        options: sizes; None takes the defaults.

    Attributes:
        grid: tokens per axis of input_size, (rows, columns).
        out_channels: C.

    Raises:
        UserError: a size that does not fit, or an attention entry that does not.
    """

    def __init__(
        self,
        attention: str | Mapping[str, Any] | Sequence[Any] = "mhla",
        options: SanaOptions | None = None,
    ) -> None:
        options = options or SanaOptions()
        dim = options.embed_dim
        _check_sizes(options)
        check_heads(dim, options.num_heads)
        if dim % options.cross_heads:
            raise UserError(
                "cross_heads",
                f"{options.cross_heads} heads do not divide the {dim} channels of `embed_dim`",
            )
        super().__init__(
            Ends(
                AXES,
                options.input_size,
                options.patch_size,
                options.in_channels,
                dim,
                freq_dim=256,
                text_dim=options.text_dim,
                text_length=options.text_length,
                exact_time=False,
            )
        )
        with inside("attention"):
            layers = resolve_layers(attention, options.depth, SANA_PRESETS, SelfAttention.layer_options())
        self.text_norm = RMSNorm(dim, eps=1e-5)
        reading = self._reading(options.cross_attention, options.cross_heads, qk_norm=False, blocks=4)
        self.blocks = nn.ModuleList(SanaBlock(options, spec, self.grid, reading()) for spec in layers)
        self._finish(layers)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Return the velocity of the latents, (batch, C, height, width) in the parameters' dtype.

        Args:
            x: (batch, C, height, width).
            t: model times (batch,), 0 to 1000, whole or not.
            text: (batch, rows, text_dim), at most text_length rows.
            text_mask: (batch, rows) bool, True = a real row; None means all are.

        Raises:
            UserError: shapes that do not fit the model.
        """
        grid = self._check(x, t, text, text_mask)
        tokens = self._embed(x)
        text = self.text_norm(self.text_embedding(text.to(tokens.dtype))).to(tokens.dtype)
        if CROSS_ATTENTION[self.cross.name].masks_zeros:
            text, text_mask = filled_up(text, text_mask, self.text_length)
        time, modulation = self._embed_time(t)
        with self.offloaded():
            for block in self.blocks:
                tokens = self.run(block, tokens, modulation, text, text_mask, grid)
        return self._unpatched(self.head(tokens, time), grid)

    def _kept(self) -> list[nn.Module]:
        convolutions = [cast(SanaBlock, block).ffn.depthwise for block in self.blocks]
        return [convolution for convolution in convolutions if convolution is not None]

    def adapt_state_dict(self, state: Mapping[str, Tensor], grid: Grid = None) -> Adapted:
        """Return weights of SANA under our names; mixing matrices of other blocks are resampled.

        Args:
            state: the tensors, by our names or those of diffusers' SanaTransformer2DModel.
            grid: tokens per axis of the model that they come from, or its geometry; None takes what the
                state tells.

        Raises:
            UserError: weights of another width, or a tensor that is not finite.
        """
        return self._placed(from_sana(state), source_geometry(state, grid))


_MOST = {
    **dict.fromkeys(
        ("embed_dim", "in_channels", "text_dim", "text_length", "num_heads", "cross_heads"), 2**17
    ),
    **dict.fromkeys(("input_size", "patch_size"), 2**16),
    "depth": 2**12,
}
"""The largest sizes: a larger one is a mistake, and would take hours or all memory before it is seen."""
_WIDEST = 2**10  # hidden channels of a feed-forward network for each channel of a token


def _check_sizes(options: SanaOptions) -> None:
    """Refuse sizes that no machine holds, and a feed-forward network without a hidden channel.

    Raises:
        UserError: with the option's key.
    """
    for key, most in _MOST.items():
        value = getattr(options, key)
        if max(value if isinstance(value, Sequence) else (value,), default=0) > most:
            raise UserError(key, f"found {value!r}; it must be a whole number from 1 to {most}")
    if options.mlp_ratio > _WIDEST:
        raise UserError("mlp_ratio", f"found {options.mlp_ratio}; it must be at most {_WIDEST}")
    check_ratio(options.embed_dim, options.mlp_ratio)


class SanaBlock(nn.Module):
    """Self-attention, attention to the text, and a gated feed-forward network.

    The first and the last are shifted, scaled and gated by the time.

    Args:
        options: the model's.
        spec: this layer's resolved attention entry.
        grid: tokens per axis that its blocks are laid out for.
        cross_attn: attention to the text.
    """

    def __init__(
        self, options: SanaOptions, spec: LayerAttention, grid: Sequence[int], cross_attn: nn.Module
    ) -> None:
        super().__init__()
        dim = options.embed_dim
        self.spec = spec
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = SelfAttention(dim, options.num_heads, attention=spec.entry, grid=grid)
        self.cross_attn = cross_attn
        self.ffn = GatedConvolution(dim, int(options.mlp_ratio * dim), options.ffn_conv)
        self.cpe = ConditionalPosition(dim, len(grid)) if spec.layer.get("pos_conv") == "cpe3" else None

    def forward(
        self, x: Tensor, modulation: Tensor, text: Tensor, text_mask: Tensor | None, grid: Sequence[int]
    ) -> Tensor:
        """Return (batch, tokens, dim).

        Args:
            x: (batch, tokens, dim) in raster order.
            modulation: (batch, 6, dim) in float32.
            text: (batch, rows, dim).
            text_mask: (batch, rows) bool, True = a real row; None means all are.
            grid: tokens per axis of x.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + modulation).unbind(1)
        attended = self.attn(modulated(self.norm1, x, shift1, scale1), grid=grid)
        x = (x + gate1.unsqueeze(1) * attended).to(x.dtype)
        x = x + self.cross_attn(x, text, mask=text_mask, grid=grid)
        fed = self.ffn(modulated(self.norm2, x, shift2, scale2), grid)
        x = (x + gate2.unsqueeze(1) * fed).to(x.dtype)
        return x if self.cpe is None else self.cpe(x, grid)

    def flops(self, grid: Sequence[int], rows: int) -> int:
        """Return the forward FLOPs of one sample.

        Args:
            grid: tokens per axis.
            rows: rows of text.
        """
        tokens = math.prod(grid)
        convolution = 0 if self.cpe is None else self.cpe.flops(tokens)
        attention = laid_out(self.attn, self.spec.entry, grid).flops(grid)
        reading = cast(TextAttention, self.cross_attn).flops(grid, rows)
        return attention + reading + self.ffn.flops(tokens) + convolution


class GatedConvolution(nn.Module):
    """SANA's feed-forward network (GLUMBConv): widen, mix neighbours, gate, narrow.

    Args:
        dim: channels of a token.
        hidden: channels after the gate, half of those before it.
        convolution: whether a depthwise 3x3 mixes neighbours.
    """

    def __init__(self, dim: int, hidden: int, convolution: bool = True) -> None:
        super().__init__()
        self.inverted = nn.Linear(dim, 2 * hidden)
        self.depthwise = DepthwiseConv(2 * hidden, 2, 3) if convolution else None
        self.point = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return tokens of the shape of x, (batch, tokens, dim)."""
        x = F.silu(self.inverted(x))
        if self.depthwise is not None:
            x = self.depthwise(x, grid)
        x, gate = x.chunk(2, dim=-1)
        return self.point(x * F.silu(gate))

    def flops(self, tokens: int) -> int:
        """Return the FLOPs of one sample's forward, 2 a multiply-add."""
        convolution = 0 if self.depthwise is None else self.depthwise.flops(tokens)
        return 2 * tokens * (self.inverted.weight.numel() + self.point.weight.numel()) + convolution
