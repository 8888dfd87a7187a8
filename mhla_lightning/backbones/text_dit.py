"""What the diffusion transformers that read a text have in common.

A time shifts, scales and gates every block, and every block attends to the text.
Wan2.1: arXiv 2503.20314. SANA: arXiv 2410.10629. Both follow PixArt, arXiv 2310.00426.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mhla_lightning.attention import DepthwiseConv, LayerAttention, SelfAttention
from mhla_lightning.attention.base import accumulation_dtype, full_precision, positive
from mhla_lightning.attention.masks import check_mask
from mhla_lightning.backbones.activations import KeptActivations
from mhla_lightning.backbones.adapting import adapted_to, remember_geometry
from mhla_lightning.backbones.compiling import CompileModule, Parts
from mhla_lightning.backbones.layers import mixing_weights, modulate, time_sinusoid
from mhla_lightning.backbones.sizes import Sizes, whole_sizes
from mhla_lightning.backbones.text_attention import CROSS_ATTENTION, CrossEntry, Reader, resolve_cross
from mhla_lightning.errors import UserError, inside
from mhla_lightning.weights.adapted import Adapted, Geometry


@dataclass(frozen=True)
class Ends:
    """What stands before and behind the blocks.

    Args:
        axes: name of each axis, 2 or 3.
        input_size, patch_size: along each axis; on two axes one number stands for a square.
        in_channels: C, of the latents.
        embed_dim: channels of a token.
        freq_dim: channels of the time's sinusoid, even.
        text_dim: channels of the text's features.
        text_length: most rows of text.
        exact_time: whether the sinusoid is float64 before it is rounded, else float32.
    """

    axes: Sequence[str]
    input_size: int | Sequence[int]
    patch_size: int | Sequence[int]
    in_channels: int
    embed_dim: int
    freq_dim: int
    text_dim: int
    text_length: int
    exact_time: bool


class TextBlock(Protocol):
    """What :class:`TextDiT` asks of its blocks."""

    def flops(self, grid: Sequence[int], rows: int) -> int: ...


class TextDiT(KeptActivations, nn.Module):
    """A transformer of patches whose blocks are modulated by a time and attend to a text.

    A subclass calls :meth:`_reading`, builds `blocks` and calls :meth:`_finish`.

    Args:
        ends: see :class:`Ends`.

    Attributes:
        grid: tokens per axis of input_size.
        out_channels: C.
        cross: the resolved entry of `cross_attention`.

    Raises:
        UserError: a size that does not fit.
    """

    blocks: nn.ModuleList
    cross: LayerAttention

    def __init__(self, ends: Ends) -> None:
        super().__init__()
        axes, dim, channels = tuple(ends.axes), ends.embed_dim, ends.in_channels
        self.axes = axes
        self.input_size = whole_sizes("input_size", ends.input_size, axes)
        self.patch_size = whole_sizes("patch_size", ends.patch_size, axes)
        self.sizes = Sizes(axes, self.patch_size, self.input_size)
        self.grid = self.sizes.grid
        for key in ("embed_dim", "in_channels", "freq_dim", "text_dim", "text_length"):
            positive(key, getattr(ends, key))
        if ends.freq_dim % 2:
            raise UserError("freq_dim", f"{ends.freq_dim} is odd; half are cosines and half are sines")
        self.in_channels = self.out_channels = channels
        self.embed_dim, self.freq_dim = dim, ends.freq_dim
        self.text_dim, self.text_length = ends.text_dim, ends.text_length
        self.time_dtype = torch.float64 if ends.exact_time else torch.float32
        conv = (nn.Conv2d, nn.Conv3d)[len(axes) - 2]
        self.patch_embedding = conv(channels, dim, cast(Any, self.patch_size), cast(Any, self.patch_size))
        self.text_embedding = nn.Sequential(
            nn.Linear(ends.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(ends.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def _reading(
        self, entry: CrossEntry, heads: int, *, qk_norm: bool, blocks: int | Sequence[int]
    ) -> Callable[[], nn.Module]:
        """Return a function that builds a block's attention to the text.

        Args:
            entry: of `cross_attention`.
            heads: number of heads.
            qk_norm: whether the family has norms of q and k there.
            blocks: of the tokens per axis, where the entry names none.

        Raises:
            UserError: an entry that does not fit.
        """
        sizes = Reader(self.embed_dim, heads, self.grid, self.text_length, qk_norm)
        with inside("cross_attention"):
            self.cross = resolve_cross(entry, sizes, blocks)
        form, options = CROSS_ATTENTION[self.cross.name], self.cross.operator

        def build() -> nn.Module:
            with inside("cross_attention"):
                return form.build(sizes, options)

        return build

    def _finish(self, layers: Sequence[LayerAttention]) -> None:
        """Add the output layer, initialise all weights, and take only sizes that fit these layers.

        Args:
            layers: one resolved attention entry a block.
        """
        self.head = Head(self.embed_dim, math.prod(self.patch_size) * self.out_channels)
        self.sizes.lay_out([*layers, self.cross])
        self._initialise()
        remember_geometry(self)

    def _embed(self, x: Tensor) -> Tensor:
        """Return tokens (batch, tokens, dim) of latents in raster order, in the parameters' dtype."""
        weight = self.patch_embedding.weight
        # Under autocast the convolution returns bf16; the residual stream is as wide as the parameters.
        return self.patch_embedding(x.to(weight.dtype)).flatten(2).transpose(1, 2).to(weight.dtype)

    def _embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (batch, dim) and (batch, 6, dim), in float32 at least, also under autocast.

        Args:
            t: (batch,).
        """
        with full_precision(t):
            sinusoid = time_sinusoid(t, self.freq_dim, self.time_dtype)
            time = self.time_embedding(sinusoid.to(self.patch_embedding.weight.dtype))
            modulation = self.time_projection(time).unflatten(1, (6, -1))
        return time.to(accumulation_dtype(time)), modulation.to(accumulation_dtype(modulation))

    def _unpatched(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Put patches together to (batch, channels, *size).

        Args:
            tokens: (batch, tokens, pixels of a patch * channels), channels last.
            grid: tokens per axis.
        """
        axes = len(grid)
        patches = tokens.reshape(len(tokens), *grid, *self.patch_size, self.out_channels)
        order = [
            axis
            for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True)
            for axis in pair
        ]
        sides = [count * size for count, size in zip(grid, self.patch_size, strict=True)]
        return patches.permute(0, 2 * axes + 1, *order).reshape(len(tokens), self.out_channels, *sides)

    def _check(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None) -> tuple[int, ...]:
        """Return the tokens per axis of x. Raises UserError for shapes that do not fit."""
        if x.dim() != len(self.axes) + 2 or x.shape[1] != self.in_channels:
            wanted = f"(batch, {self.in_channels}, {', '.join(self.axes)})"
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
        check_mask(text_mask, text.shape[:2], "text_mask")
        return self.sizes.tokens("x", tuple(x.shape[2:]))

    def check_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens per axis of latents of a size.

        Args:
            shape: latent pixels along each axis.

        Raises:
            UserError: a size that the patch does not divide, or that gives another number of blocks than the
                mixing matrix has; the reason names the nearest sizes that work.
        """
        return self.sizes.tokens("shape", whole_sizes("shape", shape, self.axes))

    def take_sizes(self, sizes: Sequence[Sequence[int]]) -> None:
        """Check sizes of latents; these models take every size of :meth:`check_size` without a word.

        Raises:
            UserError: see :meth:`check_size`.
        """
        for size in sizes:
            self.check_size(size)

    def tokens_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens per axis of latents of a size, see :meth:`check_size`."""
        return self.check_size(size)

    def nearest(self, axis: int, size: int) -> tuple[int, ...]:
        """Return the nearest latent sizes along an axis that work, see :meth:`Sizes.nearest`."""
        return self.sizes.nearest(axis, size)

    def _kept(self) -> Collection[nn.Module]:
        """Return modules that keep torch's initialisation."""
        return ()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise all weights as Wan2.1 does.

        Linears Xavier-uniform with zero biases, text and time embeddings N(0, 0.02), output zero. Depthwise
        convolutions, which Wan lacks, start at zero, so a fresh one changes nothing. Mixing matrices, norms
        and modulations (N(0, 1 / dim)) keep theirs.
        """
        small = {*self.text_embedding, *self.time_embedding}
        # apply(), because under ZeRO-3 it gathers each module's weights around the call
        self.apply(partial(_initialise, small=small, zero={self.head.head}, kept=self._kept()))

    def flops(self, shape: Sequence[int]) -> int:
        """Return the forward FLOPs of one sample with text_length rows of text, 2 a multiply-add.

        Args:
            shape: token counts per axis.
        """
        tokens = math.prod(shape)
        ends = 2 * tokens * (self.patch_embedding.weight.numel() + self.head.head.weight.numel())
        text = self.text_length * linear_flops(self.text_embedding)
        time = linear_flops(self.time_embedding) + linear_flops(self.time_projection)
        blocks = (cast(TextBlock, block).flops(shape, self.text_length) for block in self.blocks)
        return ends + text + time + sum(blocks)

    def no_weight_decay(self) -> set[str]:
        """Return the names of mixing matrices (SPEC 1.4) and of modulations, which are offsets.

        Norms and biases are never decayed.
        """
        offsets = {name for name, _ in self.named_parameters() if name.rpartition(".")[2] == "modulation"}
        return mixing_weights(self) | offsets

    def compile_parts(self, what: Parts, compile_module: CompileModule) -> None:
        """Compile the model, or each of its blocks."""
        for part in [self] if what == "whole" else self.blocks:
            compile_module(part)

    def _placed(self, found: Mapping[str, Tensor], source: Geometry) -> Adapted:
        """Return tensors of our names in the places of this model.

        Args:
            found: the tensors.
            source: geometry of their model.

        Raises:
            UserError: weights of another width, or a tensor that is not finite.
        """
        width = found.get("patch_embedding.bias")
        if width is not None and tuple(width.shape) != (self.embed_dim,):
            needed = (self.embed_dim,)
            raise UserError(
                "state",
                f"these are weights of another size: patch_embedding.bias is {tuple(width.shape)}, "
                f"and this model needs {needed}",
            )
        heads = ("head.head.weight", "head.head.bias")
        return adapted_to(self, found, source, patches=("patch_embedding.weight", heads))


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
            return self.head(modulated(self.norm, x, shift, scale))


def modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Norm, scale and shift in float32 at least; the result has x's dtype."""
    return modulate(norm(x.to(accumulation_dtype(x))), shift, scale).to(x.dtype)


def linear_flops(layers: nn.Sequential) -> int:
    """Return the FLOPs of the Linears for one row."""
    return 2 * sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))


def laid_out(layer: SelfAttention, entry: Mapping[str, Any], grid: Sequence[int]) -> SelfAttention:
    """Return an attention layer for a grid, without weights, for its FLOPs.

    The filling of short blocks depends on the grid.

    Args:
        layer: the layer.
        entry: that it was built from.
        grid: tokens per axis.
    """
    if tuple(grid) == layer.grid:
        return layer
    with torch.device("meta"):
        return SelfAttention(layer.dim, layer.heads, attention=entry, grid=grid)


@torch.no_grad()
def _initialise(
    module: nn.Module, *, small: set[nn.Module], zero: set[nn.Module], kept: Collection[nn.Module]
) -> None:
    """Initialise the weights that belong to one module itself.

    Args:
        module: any module of the model.
        small: Linears that are drawn from N(0, 0.02).
        zero: modules whose weights are zero.
        kept: modules that keep torch's initialisation.
    """
    if module in kept:
        return
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
    elif isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.groups == 1:
        # The patches, as one Linear; its bias keeps torch's initialisation, as in Wan2.1.
        nn.init.xavier_uniform_(module.weight.flatten(1))
