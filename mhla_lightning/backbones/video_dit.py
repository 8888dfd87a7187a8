"""Wan2.1's video diffusion transformer around any attention operator.

Wan2.1: arXiv 2503.20314. With MHLA: paper Sec. 5.3; SPEC section 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhla_lightning.arguments.checked import CheckedOptions
from mhla_lightning.attention import BlockGrid, LayerAttention, Rotary, SelfAttention, resolve_layers
from mhla_lightning.backbones.adapting import Grid, source_geometry
from mhla_lightning.backbones.layers import ConditionalPosition, GridRotation
from mhla_lightning.backbones.sizes import whole_sizes
from mhla_lightning.backbones.text_attention import CROSS_ATTENTION, CrossEntry, TextAttention, filled_up
from mhla_lightning.backbones.text_dit import Ends, TextDiT, laid_out, linear_flops, modulated
from mhla_lightning.errors import UserError, inside
from mhla_lightning.weights.adapted import Adapted, Geometry
from mhla_lightning.weights.wan_names import RELEASE_LAYOUTS, from_wan

AXES = ("frames", "height", "width")

_WAN = {"qkv_bias": True, "qk_norm": True}
_LINEAR = {**_WAN, "feature_map": "relu"}  # SPEC 6.9
_MHLA = {**_WAN, "blocks": (3, 5, 10), "normalizer": "none", "out_norm": True}

VIDEO_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "softmax": _WAN,
        "linear": _LINEAR,
        "mhla": {**_MHLA, "mix_init": "local_row", "mix_clamp": (0.0, 1.0)},
    },
    "release": {
        "softmax": _WAN,
        "linear": _LINEAR,
        "mhla": {**_MHLA, "mix_init": "const", "mix_clamp": None},
    },
}
"""Preset -> operator -> options (SPEC 6.4, 6.9 and section 9, video).

`release` starts every mixing weight at 1e-6 and never clamps (V6, V7).
"""


@dataclass(frozen=True)
class VideoDiTOptions(CheckedOptions):
    """Sizes of a :class:`VideoDiT`.

    Args:
        input_size: (frames, height, width) of the latents that the layers' blocks are laid out for; other
            sizes work where :meth:`VideoDiT.check_size` allows them.
        patch_size: latent pixels of a token along each axis.
        in_channels: C, of the latents.
        embed_dim: channels of a token; a head has an even number.
        ffn_dim: hidden channels of the feed-forward network.
        depth, num_heads: of the transformer.
        freq_dim: channels of the time's sinusoid, even.
        text_dim: channels of the text's features.
        text_length: rows of text; every sample is filled up to them with zeros.
        blocks: blocks per axis of the entries that name neither `blocks` nor `block_size`; the paper's fit 81
            x 480 x 800 pixels.
        cross_attention: `softmax`, or `mhla` or a mapping of `name: mhla` and :class:`CrossAttentionOptions`
            (beyond the paper). Without blocks it has those of `blocks`, and at most 16 of the text.
    """

    input_size: Sequence[int] = (21, 60, 100)
    patch_size: Sequence[int] = (1, 2, 2)
    in_channels: int = 16
    embed_dim: int = 1536
    ffn_dim: int = 8960
    depth: int = 30
    num_heads: int = 12
    freq_dim: int = 256
    text_dim: int = 4096
    text_length: int = 512
    blocks: Sequence[int] = (3, 5, 10)
    cross_attention: CrossEntry = "softmax"


class VideoDiT(TextDiT):
    """Predicts the velocity (noise - clip) of latents or pixels, given a time and a text.

    Clips may have any length and size; an image is one frame.

    Args:
        attention: attention entry: name, mapping, or a list of these cycled over the layers; `[softmax, mhla,
            mhla]` is the paper's hybrid.
        options: sizes; None takes the defaults.

    Attributes:
        grid: tokens per axis of input_size, (frames, rows, columns).
        out_channels: C.

    Raises:
        UserError: a size that does not fit, or an attention entry that does not.
    """

    def __init__(
        self,
        attention: str | Mapping[str, Any] | Sequence[Any] = "mhla",
        options: VideoDiTOptions | None = None,
    ) -> None:
        options = options or VideoDiTOptions()
        whole_sizes("blocks", options.blocks, AXES)
        if options.embed_dim % (2 * options.num_heads):
            raise UserError(
                "num_heads",
                f"{options.num_heads} heads do not divide the {options.embed_dim} channels of `embed_dim` "
                "into even heads, which rotary positions need",
            )
        super().__init__(
            Ends(
                AXES,
                options.input_size,
                options.patch_size,
                options.in_channels,
                options.embed_dim,
                options.freq_dim,
                options.text_dim,
                options.text_length,
                exact_time=True,
            )
        )
        with inside("attention"):
            layers = resolve_layers(
                attention, options.depth, _presets(options.blocks), SelfAttention.layer_options()
            )
        reading = self._reading(
            options.cross_attention, options.num_heads, qk_norm=True, blocks=options.blocks
        )
        self.blocks = nn.ModuleList(
            VideoBlock(options.embed_dim, options.num_heads, options.ffn_dim, spec, self.grid, reading())
            for spec in layers
        )
        self._finish(layers)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Return the velocity of the latents, (batch, C, frames, height, width).

        It has the parameters' dtype.

        Args:
            x: (batch, C, frames, height, width).
            t: model times (batch,), 0 to 1000, whole or not.
            text: (batch, rows, text_dim), at most text_length rows; filled up with zeros.
            text_mask: (batch, rows) bool, True = a real row. None means all are for softmax, the zeros too
                (SPEC 6.2), and all but rows of zeros for `mhla`.

        Raises:
            UserError: shapes that do not fit the model.
        """
        grid = self._check(x, t, text, text_mask)
        tokens = self._embed(x)
        text, text_mask = self._filled(text, text_mask)
        text = self.text_embedding(text.to(tokens.dtype))
        time, modulation = self._embed_time(t)
        rotary = GridRotation(grid, self.embed_dim // cast(VideoBlock, self.blocks[0]).attn.heads, x.device)
        with self.offloaded():
            for block in self.blocks:
                tokens = self.run(block, tokens, modulation, text, rotary, grid, text_mask)
        return self._unpatched(self.head(tokens, time), grid)

    def _filled(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a text of text_length rows, and the mask of those that are read; None means all."""
        if mask is None and CROSS_ATTENTION[self.cross.name].masks_zeros:
            mask = text.ne(0).any(-1)
        filled, real = filled_up(text, mask, self.text_length)
        return filled, None if mask is None else real

    def adapt_state_dict(self, state: Mapping[str, Tensor], grid: Grid = None) -> Adapted:
        """Return weights of Wan2.1, of the MHLA authors or of diffusers under our names.

        Mixing matrices of other blocks are resampled.

        Args:
            state: the tensors.
            grid: tokens per axis of the model that they come from, or its geometry; None takes what the
                state tells.

        Raises:
            UserError: weights of another width, or a tensor that is not finite.
        """
        source = source_geometry(state, grid)
        adapted = from_wan(state)
        if not source.blocks and any(".block_attn." in name for name in state):
            source = _of_the_release(adapted)
        return self._placed(adapted, source)


class VideoBlock(nn.Module):
    """Self-attention, attention to the text, and a feed-forward network (SPEC 6.2).

    The first and the last are shifted, scaled and gated by the time.

    Args:
        dim, heads, ffn_dim: the model's.
        spec: this layer's resolved attention entry.
        grid: tokens per axis that its blocks are laid out for.
        cross_attn: attention to the text.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ffn_dim: int,
        spec: LayerAttention,
        grid: Sequence[int],
        cross_attn: nn.Module,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads, attention=spec.entry, grid=grid)
        self.cross_attn = cross_attn
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )
        self.cpe = ConditionalPosition(dim, len(grid)) if spec.layer.get("pos_conv") == "cpe3" else None

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        rotary: Rotary,
        grid: Sequence[int],
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Return (batch, tokens, dim).

        Args:
            x: (batch, tokens, dim) in raster order.
            modulation: (batch, 6, dim) in float32.
            text: (batch, rows, dim).
            rotary: turns q and k of the self-attention.
            grid: tokens per axis of x.
            text_mask: (batch, rows) bool, True = a row that is read; None means all are.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + modulation).unbind(1)
        attended = self.attn(modulated(self.norm1, x, shift1, scale1), grid=grid, rotary=rotary)
        x = (x + gate1.unsqueeze(1) * attended).to(x.dtype)
        x = x + self.cross_attn(self.norm3(x), text, mask=text_mask, grid=grid)
        x = (x + gate2.unsqueeze(1) * self.ffn(modulated(self.norm2, x, shift2, scale2))).to(x.dtype)
        return x if self.cpe is None else self.cpe(x, grid)

    def flops(self, grid: Sequence[int], rows: int) -> int:
        """Return the forward FLOPs of one sample.

        Args:
            grid: tokens per axis.
            rows: rows of text.
        """
        tokens = math.prod(grid)
        convolution = 0 if self.cpe is None else self.cpe.flops(tokens)
        return (
            laid_out(self.attn, self.spec.entry, grid).flops(grid)
            + cast(TextAttention, self.cross_attn).flops(grid, rows)
            + tokens * linear_flops(self.ffn)
            + convolution
        )


def _presets(blocks: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return VIDEO_PRESETS with these blocks in every entry that has some."""
    return {
        preset: {
            name: {**options, "blocks": tuple(blocks)} if "blocks" in options else options
            for name, options in entries.items()
        }
        for preset, entries in VIDEO_PRESETS.items()
    }


def _of_the_release(state: Mapping[str, Tensor]) -> Geometry:
    """Return the blocks of the mixing matrices whose layout the MHLA authors have published."""
    found = {
        name: RELEASE_LAYOUTS[value.shape[-1]]
        for name, value in state.items()
        if name.endswith(".mixing.weight") and value.shape[-1] in RELEASE_LAYOUTS
    }
    return Geometry(blocks={name: BlockGrid(layout, block_size=1) for name, layout in found.items()})
