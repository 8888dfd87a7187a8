"""Wan2.1's video diffusion transformer around any attention operator.

Wan2.1: arXiv 2503.20314. With MHLA: paper Sec. 5.3; SPEC section 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.attention import (
    BlockGrid,
    DepthwiseConv,
    LayerAttention,
    Rotary,
    SelfAttention,
    resolve_layers,
)
from mhla_lightning.attention.base import accumulation_dtype, full_precision, positive
from mhla_lightning.backbones.activations import KeptActivations
from mhla_lightning.backbones.adapting import Grid, adapted_to, remember_geometry, source_geometry
from mhla_lightning.backbones.compiling import CompileModule, Parts
from mhla_lightning.backbones.layers import (
    ConditionalPosition,
    CrossAttention,
    GridRotation,
    mixing_weights,
    modulate,
    time_sinusoid,
)
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
class VideoDiTOptions:
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


_COUNTS = (
    "embed_dim",
    "ffn_dim",
    "depth",
    "num_heads",
    "in_channels",
    "freq_dim",
    "text_dim",
    "text_length",
)


class VideoDiT(KeptActivations, nn.Module):
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
        super().__init__()
        options = options or VideoDiTOptions()
        dim, channels = options.embed_dim, options.in_channels
        self.input_size = _three("input_size", options.input_size)
        self.patch_size = _three("patch_size", options.patch_size)
        self._layouts: list[_Layout] = []
        self.grid = self._tokens("input_size", self.input_size)
        for key in _COUNTS:
            positive(key, getattr(options, key))
        if dim % (2 * options.num_heads):
            raise UserError(
                "num_heads",
                f"{options.num_heads} heads do not divide the {dim} channels of `embed_dim` into even heads, "
                "which rotary positions need",
            )
        if options.freq_dim % 2:
            raise UserError("freq_dim", f"{options.freq_dim} is odd; half are cosines and half are sines")
        self.in_channels = self.out_channels = channels
        self.embed_dim, self.freq_dim = dim, options.freq_dim
        self.text_dim, self.text_length = options.text_dim, options.text_length
        with inside("attention"):
            layers = resolve_layers(
                attention, options.depth, _presets(options.blocks), SelfAttention.layer_options()
            )
        self.patch_embedding = nn.Conv3d(channels, dim, self.patch_size, self.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(options.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(options.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            VideoBlock(dim, options.num_heads, options.ffn_dim, spec, self.grid) for spec in layers
        )
        self.head = Head(dim, math.prod(self.patch_size) * channels)
        self._layouts = _layouts(layers, self.grid)
        self._initialise()
        remember_geometry(self)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Return the velocity of the latents, (batch, C, frames, height, width).

        It has the parameters' dtype.

        Args:
            x: (batch, C, frames, height, width).
            t: model times (batch,), 0 to 1000, whole or not.
            text: (batch, rows, text_dim), at most text_length rows; filled up with zeros, which are not
                masked
                (SPEC 6.2).

        Raises:
            UserError: shapes that do not fit the model.
        """
        grid = self._check(x, t, text)
        weight = self.patch_embedding.weight
        # Under autocast the convolution returns bf16; the residual stream is as wide as the parameters.
        tokens = self.patch_embedding(x.to(weight.dtype)).flatten(2).transpose(1, 2).to(weight.dtype)
        text = self.text_embedding(F.pad(text.to(weight.dtype), (0, 0, 0, self.text_length - text.shape[1])))
        time, modulation = self._embed_time(t)
        rotary = GridRotation(grid, self.embed_dim // cast(VideoBlock, self.blocks[0]).attn.heads, x.device)
        with self.offloaded():
            for block in self.blocks:
                tokens = self.run(block, tokens, modulation, text, rotary, grid)
        return self._to_video(self.head(tokens, time), grid)

    def _embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (batch, dim) and (batch, 6, dim), in float32 at least, also under autocast.

        Args:
            t: (batch,).
        """
        with full_precision(t):
            sinusoid = time_sinusoid(t, self.freq_dim, torch.float64)
            time = self.time_embedding(sinusoid.to(self.patch_embedding.weight.dtype))
            modulation = self.time_projection(time).unflatten(1, (6, -1))
        return time.to(accumulation_dtype(time)), modulation.to(accumulation_dtype(modulation))

    def _to_video(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Put patches together to (batch, channels, frames, height, width).

        Args:
            tokens: (batch, tokens, frames * rows * columns of a patch * channels).
            grid: tokens per axis.
        """
        patches = tokens.reshape(len(tokens), *grid, *self.patch_size, self.out_channels)
        sides = [count * size for count, size in zip(grid, self.patch_size, strict=True)]
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(tokens), self.out_channels, *sides)

    def _check(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[int, int, int]:
        """Return the tokens per axis of x. Raises UserError for shapes that do not fit."""
        if x.dim() != 5 or x.shape[1] != self.in_channels:
            wanted = f"(batch, {self.in_channels}, frames, height, width)"
            raise UserError(
                "x", f"latents of shape {tuple(x.shape)} do not fit this model, which takes {wanted}"
            )
        if t.shape != x.shape[:1]:
            raise UserError(
                "t",
                f"times have the shape {tuple(t.shape)}; a batch of {len(x)} takes one number a sample, "
                f"({len(x)},)",
            )
        if (
            text.dim() != 3
            or len(text) != len(x)
            or text.shape[1] > self.text_length
            or text.shape[2] != self.text_dim
        ):
            wanted = f"({len(x)}, at most {self.text_length}, {self.text_dim})"
            raise UserError(
                "text",
                f"texts have the shape {tuple(text.shape)}; a batch of {len(x)} takes (batch, rows, "
                f"channels) = {wanted}",
            )
        return self._tokens("x", _three("x", tuple(x.shape[2:])))

    def check_size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the tokens per axis of latents of a size.

        Args:
            shape: (frames, height, width).

        Raises:
            UserError: a size that the patch does not divide, or that gives another number of blocks than the
                mixing matrix has; the reason names the nearest sizes that work.
        """
        return self._tokens("shape", _three("shape", shape))

    def _tokens(self, key: str, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the tokens per axis; `key` names the argument in the error."""
        for axis, size in enumerate(shape):
            near = self.nearest(axis, size)
            if size not in near:
                layouts = "".join(f" and blocks {layout.blocks}" for layout in self._layouts)
                use = " or ".join(map(str, near))
                raise UserError(
                    key,
                    f"latents of {shape} (frames, height, width) do not fit patches of "
                    f"{self.patch_size}{layouts}: {AXES[axis]} {size}; use {use}",
                )
        return cast(
            tuple[int, int, int],
            tuple(size // patch for size, patch in zip(shape, self.patch_size, strict=True)),
        )

    def nearest(self, axis: int, size: int) -> tuple[int, ...]:
        """Return the nearest latent sizes along an axis that work.

        Args:
            axis: 0 frames, 1 height, 2 width.
            size: wanted size.

        Returns:
            `size` alone where it works, else the next below and above it.
        """
        patch = self.patch_size[axis]
        if size > 0 and size % patch == 0 and self._fits(axis, size // patch):
            return (size,)
        down = next((n for n in range((size - 1) // patch, 0, -1) if self._fits(axis, n)), None)
        first = max(1, size // patch + 1)
        up = next(
            (
                n
                for n in range(first, 2 * first + 4 * self.grid[axis] if self._layouts else first + 1)
                if self._fits(axis, n)
            ),
            None,
        )
        return tuple(n * patch for n in (down, up) if n is not None)

    def _fits(self, axis: int, tokens: int) -> bool:
        return all(layout.takes(axis, tokens) for layout in self._layouts)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise all weights as Wan2.1 does.

        Linears Xavier-uniform with zero biases, text and time embeddings N(0, 0.02), output zero. Depthwise
        convolutions, which Wan lacks, start at zero, so a fresh one changes nothing. Mixing matrices, norms
        and modulations (N(0, 1 / dim)) keep theirs.
        """
        # apply(), because under ZeRO-3 it gathers each module's weights around the call
        self.apply(
            partial(_initialise, small={*self.text_embedding, *self.time_embedding}, zero={self.head.head})
        )

    def flops(self, shape: Sequence[int]) -> int:
        """Return the forward FLOPs of one sample, 2 a multiply-add.

        Args:
            shape: token counts per axis.
        """
        tokens = math.prod(shape)
        ends = 2 * tokens * (self.patch_embedding.weight.numel() + self.head.head.weight.numel())
        text = self.text_length * _linear_flops(self.text_embedding)
        time = _linear_flops(self.time_embedding) + _linear_flops(self.time_projection)
        return (
            ends
            + text
            + time
            + sum(cast(VideoBlock, block).flops(shape, self.text_length) for block in self.blocks)
        )

    def no_weight_decay(self) -> set[str]:
        """Return the names of mixing matrices (SPEC 1.4) and of modulations, which are offsets.

        Norms and biases are never decayed.
        """
        return mixing_weights(self) | {
            f"{name}.modulation"
            for name, module in self.named_modules()
            if isinstance(module, (VideoBlock, Head))
        }

    def compile_parts(self, what: Parts, compile_module: CompileModule) -> None:
        """Compile the model, or each of its blocks."""
        for part in [self] if what == "whole" else self.blocks:
            compile_module(part)

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
        width = adapted.get("patch_embedding.bias")
        if width is not None and tuple(width.shape) != (self.embed_dim,):
            needed = (self.embed_dim,)
            raise UserError(
                "state",
                f"these are weights of another size: patch_embedding.bias is {tuple(width.shape)}, "
                f"and this model needs {needed}",
            )
        heads = ("head.head.weight", "head.head.bias")
        return adapted_to(self, adapted, source, patches=("patch_embedding.weight", heads))


class VideoBlock(nn.Module):
    """Self-attention, attention to the text, and a feed-forward network (SPEC 6.2).

    The first and the last are shifted, scaled and gated by the time.

    Args:
        dim, heads, ffn_dim: the model's.
        spec: this layer's resolved attention entry.
        grid: tokens per axis that its blocks are laid out for.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int, spec: LayerAttention, grid: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads, attention=spec.entry, grid=grid)
        self.cross_attn = CrossAttention(dim, heads)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )
        self.cpe = ConditionalPosition(dim, len(grid)) if spec.layer.get("pos_conv") == "cpe3" else None

    def forward(
        self, x: Tensor, modulation: Tensor, text: Tensor, rotary: Rotary, grid: Sequence[int]
    ) -> Tensor:
        """Return (batch, tokens, dim).

        Args:
            x: (batch, tokens, dim) in raster order.
            modulation: (batch, 6, dim) in float32.
            text: (batch, rows, dim).
            rotary: turns q and k of the self-attention.
            grid: tokens per axis of x.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + modulation).unbind(1)
        attended = self.attn(_modulated(self.norm1, x, shift1, scale1), grid=grid, rotary=rotary)
        x = (x + gate1.unsqueeze(1) * attended).to(x.dtype)
        x = x + self.cross_attn(self.norm3(x), text)
        x = (x + gate2.unsqueeze(1) * self.ffn(_modulated(self.norm2, x, shift2, scale2))).to(x.dtype)
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
            self._layer(grid).flops(grid)
            + self.cross_attn.flops(tokens, rows)
            + tokens * _linear_flops(self.ffn)
            + convolution
        )

    def _layer(self, grid: Sequence[int]) -> SelfAttention:
        """Return the attention layer laid out for a grid, for its FLOPs.

        The filling of short blocks depends on the grid.
        """
        if tuple(grid) == self.attn.grid:
            return self.attn
        with torch.device("meta"):
            return SelfAttention(self.attn.dim, self.attn.heads, attention=self.spec.entry, grid=grid)


class Head(nn.Module):
    """Shifted and scaled norm, then one Linear to the pixels of a patch.

    It runs in float32 also under autocast, as in Wan2.1.

    Args:
        dim: channels of a token.
        out: numbers for each token: pixels of a patch times channels.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, out)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return (batch, tokens, out).

        Args:
            x: (batch, tokens, dim).
            time: (batch, dim) in float32.
        """
        with full_precision(x):
            shift, scale = (self.modulation + time.unsqueeze(1)).unbind(1)
            return self.head(_modulated(self.norm, x, shift, scale))


class _Layout:
    """The blocks of a layer, and the sizes that give the same number of blocks.

    Args:
        partition: blocks or block_size, of the attention entry.
        grid: tokens per axis that the layer was made for.
        full: whether short blocks are refused.
    """

    def __init__(self, partition: Mapping[str, Any], grid: Sequence[int], full: bool) -> None:
        made = BlockGrid(grid, **partition)
        self.blocks, self.full = made.blocks, full
        size = partition.get("block_size")
        self.widths = None if size is None else (size,) * len(grid) if isinstance(size, int) else tuple(size)

    def takes(self, axis: int, tokens: int) -> bool:
        """Return whether an axis of `tokens` tokens gives this layout's number of blocks."""
        if axis == 0 and tokens == 1 and self.widths is None:  # an image, see MHLA.is_image
            return True
        count = self.blocks[axis]
        width = -(-tokens // count) if self.widths is None else min(tokens, self.widths[axis])
        return -(-tokens // width) == count and not (self.full and tokens % width)


def _layouts(layers: Sequence[LayerAttention], grid: Sequence[int]) -> list[_Layout]:
    """Return one layout for each partition that occurs in the layers."""
    found: dict[str, _Layout] = {}
    for spec in layers:
        partition = {
            key: spec.operator[key] for key in ("blocks", "block_size") if spec.operator.get(key) is not None
        }
        full = spec.operator.get("normalizer") == "slot"  # pairs queries by their place in the block
        if partition:
            found.setdefault(f"{partition} {full}", _Layout(partition, grid, full))
    return list(found.values())


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


def _three(key: str, size: Sequence[int]) -> tuple[int, int, int]:
    given = tuple(size) if isinstance(size, Sequence) else ()
    if len(given) != 3 or not all(isinstance(n, int) and n > 0 for n in given):
        raise UserError(key, f"{size} does not fit; give three whole numbers from 1, [frames, height, width]")
    return given


def _modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Norm, scale and shift in float32 at least; the result has x's dtype."""
    return modulate(norm(x.to(accumulation_dtype(x))), shift, scale).to(x.dtype)


def _linear_flops(layers: nn.Sequential) -> int:
    return 2 * sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))


@torch.no_grad()
def _initialise(module: nn.Module, *, small: set[nn.Module], zero: set[nn.Module]) -> None:
    """Initialise the weights that belong to one module itself.

    Args:
        module: any module of the model.
        small: Linears that are drawn from N(0, 0.02).
        zero: modules whose weights are zero.
    """
    if isinstance(module, DepthwiseConv):
        nn.init.zeros_(module.conv.weight)
        nn.init.zeros_(cast(Tensor, module.conv.bias))
    elif isinstance(module, nn.Linear):
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if module in zero:
            nn.init.zeros_(module.weight)
        elif module in small:
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Conv3d) and module.groups == 1:
        # The patches, as one Linear; its bias keeps torch's initialisation, as in Wan2.1.
        nn.init.xavier_uniform_(module.weight.flatten(1))
