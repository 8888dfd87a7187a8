"""DiT, the diffusion transformer with adaLN-zero, around any attention operator.

DiT: arXiv 2212.09748. With MHLA: paper Sec. 5.2; SPEC section 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from mhla_lightning.arguments.checked import CheckedOptions
from mhla_lightning.attention import BlockGrid, LayerAttention, SelfAttention, resolve_layers
from mhla_lightning.backbones.activations import KeptActivations
from mhla_lightning.backbones.adapting import Grid, adapted_to, remember_geometry, source_geometry
from mhla_lightning.backbones.compiling import CompileModule, Parts
from mhla_lightning.backbones.layers import (
    BlockOrderConv,
    ConditionalPosition,
    LabelEmbedder,
    TimestepEmbedder,
    check_heads,
    check_ratio,
    grid_sinusoid,
    mixing_weights,
    modulate,
)
from mhla_lightning.backbones.sizes import Sizes
from mhla_lightning.backbones.text_dit import laid_out
from mhla_lightning.backbones.vit import vit_name
from mhla_lightning.errors import UserError, inside
from mhla_lightning.weights.adapted import Adapted

_PLAIN = {"qkv_bias": True}
_LINEAR = {**_PLAIN, "feature_map": "relu_eps"}  # MHLA with one block

DIT_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "softmax": _PLAIN,
        "linear": _LINEAR,
        "mhla": {
            **_PLAIN,
            "blocks": 4,
            "normalizer": "block",
            "mix_init": "local_row",
            "pos_conv": "cpe3",
            "gate": True,
        },
    },
    "release": {
        "softmax": _PLAIN,
        "linear": _LINEAR,
        "mhla": {
            **_PLAIN,
            "block_size": 4,
            "normalizer": "slot",
            "mix_init": "linear",
            "pos_conv": "lepe3",
            "inner_norm": True,
            "dropout": 0.1,
        },
    },
}
"""Preset -> operator -> options (SPEC section 9, DiT)."""


@dataclass(frozen=True)
class DiTOptions(CheckedOptions):
    """Sizes of a :class:`DiT`.

    Args:
        input_size: height and width of the latent (or image), one number for a square.
        patch_size: latent pixels per side of a token; divides input_size.
        in_channels: C, of the latent.
        num_classes: classes without the null label, whose index is num_classes. The task drops labels in
            training.
        learn_sigma: predict 2C channels, noise and variance, instead of C.
        embed_dim: channels of a token, a multiple of 4.
        depth, num_heads, mlp_ratio: of the transformer.
        dwconv: add the release's convolution after every block, see :class:`BlockOrderConv`; the attention
            option `pos_conv: cpe3` is the paper's.
    """

    input_size: int | Sequence[int] = 32
    patch_size: int = 2
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    dwconv: bool = False


class DiT(KeptActivations, nn.Module):
    """Predicts the noise of latents or pixels, and its variance, given a time and a class.

    Args:
        attention: attention entry: name, mapping, or a list of these cycled over the layers.
        options: sizes; None takes the defaults.

    Attributes:
        grid: tokens per axis, (rows, columns).
        out_channels: C or 2C.
        pos_embed: (1, tokens, embed_dim), fixed.

    Raises:
        UserError: a size that does not fit, or an attention entry that does not.
    """

    def __init__(
        self, attention: str | Mapping[str, Any] | Sequence[Any] = "mhla", options: DiTOptions | None = None
    ) -> None:
        super().__init__()
        options = options or DiTOptions()
        dim, patch = options.embed_dim, options.patch_size
        self.input_size = _two_sides(options.input_size)
        self.grid = token_grid(self.input_size, patch)
        if dim % 4:
            raise UserError(
                "embed_dim", f"{dim} is no multiple of 4, which sine-cosine positions on two axes need"
            )
        check_heads(dim, options.num_heads)
        check_ratio(dim, options.mlp_ratio)
        if options.num_classes < 1:
            raise UserError("num_classes", f"{options.num_classes} is too few; it must be at least 1")
        self.patch_size, self.embed_dim = patch, dim
        self.in_channels, self.num_classes = options.in_channels, options.num_classes
        self.out_channels = options.in_channels * (2 if options.learn_sigma else 1)
        with inside("attention"):
            layers = resolve_layers(attention, options.depth, DIT_PRESETS, SelfAttention.layer_options())
        self.x_embedder = PatchEmbed(self.input_size, patch, options.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(options.num_classes, dim)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", grid_sinusoid(self.grid, dim)[None])
        self.sizes = Sizes(("height", "width"), (patch, patch), self.input_size)
        self._positions = {self.input_size: "pos_embed"}
        self.blocks = nn.ModuleList(
            DiTBlock(dim, options.num_heads, options.mlp_ratio, spec, self.grid, options.dwconv)
            for spec in layers
        )
        self.sizes.lay_out(layers)
        self.final_layer = FinalLayer(dim, patch**2 * self.out_channels)
        self._initialise()
        remember_geometry(self)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the prediction, (batch, out_channels, H, W) in the parameters' dtype.

        Args:
            x: (batch, C, H, W).
            t: model times (batch,) from 0 to 1000.
            y: labels (batch,) int64.

        Raises:
            UserError: another shape than the model was built for; on a CPU also a label out of range (reading
                labels would hold up a GPU).
        """
        self._check(x, t, y)
        height, width = x.shape[2:]
        grid = (height // self.patch_size, width // self.patch_size)
        positions = self.get_buffer(self._positions[height, width])
        tokens = self._embed(x.to(self.x_embedder.proj.weight.dtype)) + positions
        condition = self.t_embedder(t) + self.y_embedder(y)
        with self.offloaded():
            for block in self.blocks:
                tokens = self.run(block, tokens, condition, grid)
        return self._to_image(self.final_layer(tokens, condition), grid)

    def take_sizes(self, sizes: Sequence[Sequence[int]]) -> None:
        """Take latents of these sizes besides those of input_size; positions follow their formula.

        Args:
            sizes: (height, width) each.

        Raises:
            UserError: a size that the patch or a layer's blocks cannot take, or any with `dwconv`; nothing
                has changed then.
        """
        grids: dict[tuple[int, int], tuple[int, ...]] = {}
        for size in sizes:
            sides = _two_sides(size)
            if sides not in self._positions:
                if cast(DiTBlock, self.blocks[0]).dw_conv is not None:
                    raise UserError(
                        "dwconv", "it serves one size only; use the attention option `pos_conv` cpe3"
                    )
                grids[sides] = self.sizes.tokens("sizes", sides)
        for sides, grid in grids.items():
            name = f"pos_embed_{sides[0]}x{sides[1]}"
            positions = grid_sinusoid(grid, self.embed_dim)[None].to(self.pos_embed)
            self.register_buffer(name, positions, persistent=False)
            self._positions[sides] = name

    def tokens_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens per axis of latents of a size.

        Raises:
            UserError: a size that does not fit.
        """
        return self.sizes.tokens("size", _two_sides(size))

    def _embed(self, x: Tensor) -> Tensor:
        """Return tokens (batch, tokens, dim) of patches; timm's module takes one size only."""
        if tuple(x.shape[2:]) == self.input_size:
            return self.x_embedder(x)
        return self.x_embedder.norm(self.x_embedder.proj(x).flatten(2).transpose(1, 2))

    def _to_image(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Put patches together to (batch, channels, H, W).

        Args:
            tokens: (batch, tokens, patch * patch * channels), a patch's channels last.
            grid: tokens per axis.
        """
        patches = tokens.reshape(len(tokens), *grid, self.patch_size, self.patch_size, self.out_channels)
        sides = [count * self.patch_size for count in grid]
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), self.out_channels, *sides)

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels or tuple(x.shape[2:]) not in self._positions:
            wanted = " or ".join(str((self.in_channels, *size)) for size in self._positions)
            raise UserError(
                "x",
                f"a latent of shape {tuple(x.shape[1:])} does not fit this DiT, which takes "
                f"(channels, height, width) = {wanted}",
            )
        for key, name, given in (("t", "times", t), ("y", "labels", y)):
            if given.shape != x.shape[:1]:
                raise UserError(
                    key,
                    f"{name} have the shape {tuple(given.shape)}; a batch of {len(x)} takes one "
                    f"number a sample, ({len(x)},)",
                )
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_labels(y)

    def check_labels(self, y: Tensor) -> None:
        """Refuse a label out of range (UserError); reads the values, which holds up a GPU."""
        wrong = y[(y < 0) | (y > self.num_classes)]
        if len(wrong):
            last = self.num_classes - 1
            raise UserError(
                "y",
                f"class {int(wrong[0])} is out of range: classes are 0 to {last}, and "
                f"{self.num_classes} is the null label",
            )

    def _initialise(self) -> None:
        """Initialise all weights (SPEC 4.2); mixing matrices keep their own initialisation.

        Branches and output start at zero, convolutions of the release as the identity.
        """
        small: set[nn.Module] = {self.y_embedder.embedding_table, *self.t_embedder.mlp}
        zero: set[nn.Module] = {self.final_layer.linear}
        for module in self.modules():
            if isinstance(module, (DiTBlock, FinalLayer)):
                zero.add(module.adaLN_modulation[1])
            elif isinstance(module, ConditionalPosition):
                zero.add(module.depthwise.conv)
        # apply(), because under ZeRO-3 it gathers each module's weights around the call
        self.apply(partial(_initialise, small=small, zero=zero))

    def flops(self, shape: Sequence[int]) -> int:
        """Return the forward FLOPs of one sample, 2 a multiply-add.

        Args:
            shape: token counts per axis.
        """
        tokens = math.prod(shape)
        patch = 2 * tokens * self.x_embedder.proj.weight.numel()
        blocks = sum(cast(DiTBlock, block).flops(shape) for block in self.blocks)
        return patch + self.t_embedder.flops() + blocks + self.final_layer.flops(tokens)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the mixing matrices; norms and biases are never decayed (SPEC 1.4)."""
        return mixing_weights(self)

    def compile_parts(self, what: Parts, compile_module: CompileModule) -> None:
        """Compile the model, or each of its blocks."""
        for part in [self] if what == "whole" else self.blocks:
            compile_module(part)

    def adapt_state_dict(self, state: Mapping[str, Tensor], grid: Grid = None) -> Adapted:
        """Return weights of the public DiT or of the MHLA authors under our names.

        The public DiT is facebookresearch's. Positions of another grid are left out: ours follow from a
        formula. Mixing matrices of other blocks are resampled.

        Args:
            state: the tensors.
            grid: tokens per axis of the model that they come from, or its geometry; None takes what the
                state tells.

        Raises:
            UserError: weights of another width, or a tensor that is not finite.
        """
        source = source_geometry(state, grid)
        adapted = {dit_name(name): value for name, value in state.items()}
        width = adapted.get("x_embedder.proj.bias")
        if width is not None and tuple(width.shape) != (self.embed_dim,):
            needed = (self.embed_dim,)
            raise UserError(
                "state",
                f"these are weights of another size: x_embedder.proj.bias is {tuple(width.shape)}, "
                f"and this DiT needs {needed}",
            )
        found = Adapted((name, _our_shape(name, value)) for name, value in adapted.items())
        known = source.grid in (None, self.grid)
        if "pos_embed" in found and not (
            known and _of_this_grid(found["pos_embed"], self.grid, self.embed_dim)
        ):
            found.omit("pos_embed", "here positions follow from a formula", doubt=False)
        heads = ("final_layer.linear.weight", "final_layer.linear.bias")
        return adapted_to(self, found, source, patches=("x_embedder.proj.weight", heads))


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero).

    Args:
        dim, heads, mlp_ratio: the model's.
        spec: this layer's resolved attention entry.
        grid: tokens per axis.
        dwconv: see :class:`DiTOptions`.
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, spec: LayerAttention, grid: Sequence[int], dwconv: bool
    ) -> None:
        super().__init__()
        self.grid, self.spec = tuple(grid), spec
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(dim, heads, attention=spec.entry, grid=grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        gelu = partial(nn.GELU, approximate="tanh")
        # timm's annotation wants a class; timm only calls it
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=gelu)  # type: ignore[arg-type]
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.cpe = ConditionalPosition(dim, len(grid)) if spec.layer.get("pos_conv") == "cpe3" else None
        self.dw_conv = BlockOrderConv(dim, _partition(spec, grid), math.prod(grid)) if dwconv else None

    def forward(self, x: Tensor, condition: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Return (batch, tokens, dim).

        Args:
            x: (batch, tokens, dim) in raster order.
            condition: (batch, dim).
            grid: tokens per axis of x; None means those of the construction.
        """
        grid = self.grid if grid is None else grid
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), grid=grid)
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        if self.cpe is not None:
            x = self.cpe(x, grid)
        return x if self.dw_conv is None else self.dw_conv(x)

    def flops(self, grid: Sequence[int]) -> int:
        tokens = math.prod(grid)
        mlp = 2 * tokens * (self.mlp.fc1.weight.numel() + self.mlp.fc2.weight.numel())
        convolutions = sum(conv.flops(tokens) for conv in (self.cpe, self.dw_conv) if conv is not None)
        attention = laid_out(self.attn, self.spec.entry, grid).flops(grid)
        return attention + mlp + convolutions + _modulation_flops(self.adaLN_modulation)


class FinalLayer(nn.Module):
    """Shifted and scaled norm, then one Linear to the pixels of a patch.

    Args:
        dim: channels of a token.
        out: numbers for each token, patch * patch * channels.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.linear.weight.numel() + _modulation_flops(self.adaLN_modulation)


def token_grid(input_size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return (rows, columns) of tokens.

    Args:
        input_size: (height, width).
        patch_size: latent pixels per side of a token.

    Raises:
        UserError: the patch does not divide a side; names the sides that fit.
    """
    if patch_size < 1:
        raise UserError("patch_size", f"{patch_size} is too small; it must be at least 1")
    for side in input_size:
        if side % patch_size or side < 1:
            fit = [n * patch_size for n in (side // patch_size, side // patch_size + 1) if n > 0]
            raise UserError(
                "input_size",
                f"{side} is no multiple of `patch_size` {patch_size}; use "
                f"{' or '.join(map(str, fit)) or patch_size}",
            )
    return input_size[0] // patch_size, input_size[1] // patch_size


def dit_name(name: str) -> str:
    """Return our name of a parameter of the public DiT or of the MHLA authors; other names stay."""
    return re.sub(r"\.dw_conv\.(weight|bias)$", r".dw_conv.conv.\1", vit_name(name))


def _of_this_grid(table: Tensor, grid: Sequence[int], dim: int) -> bool:
    """Return whether a table may hold the positions of this grid.

    It may not where its shape differs, or where its numbers are those of another grid of as many tokens.
    """
    rows = math.prod(grid)
    if tuple(table.shape) != (1, rows, dim):
        return False
    if table.is_meta:
        return True
    given = table.detach().float().cpu()
    others = [(n, rows // n) for n in range(1, rows + 1) if rows % n == 0 and (n, rows // n) != tuple(grid)]
    return not any(
        torch.allclose(given, grid_sinusoid(other, dim)[None], rtol=0, atol=1e-2) for other in others
    )


def _our_shape(name: str, value: Tensor) -> Tensor:
    """Flatten a mixing matrix that the release stores as a 1x1 convolution, (M, M, 1, 1)."""
    return value.flatten(1) if name.endswith(".mixing.weight") and value.dim() == 4 else value


def _two_sides(size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise UserError("input_size", f"{size} does not fit; give one whole number or [height, width]")
    return sides


def _partition(spec: LayerAttention, grid: Sequence[int]) -> BlockGrid | None:
    options = {key: spec.operator[key] for key in ("blocks", "block_size") if key in spec.operator}
    return BlockGrid(grid, **options) if options else None


def _modulation_flops(modulation: nn.Sequential) -> int:
    return 2 * cast(nn.Linear, modulation[1]).weight.numel()


@torch.no_grad()
def _initialise(module: nn.Module, *, small: set[nn.Module], zero: set[nn.Module]) -> None:
    """Initialise the weights that belong to one module itself.

    Args:
        module: any module of the model.
        small: Linears and embeddings that are drawn from N(0, 0.02).
        zero: modules whose weights are zero.
    """
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if module in zero:
        nn.init.zeros_(cast(Tensor, module.weight))
    elif isinstance(module, (nn.Linear, nn.Embedding)) and module in small:
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Conv2d) and module.groups == 1:  # the patches, as one Linear
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
    elif isinstance(module, nn.Conv2d):  # depthwise: the identity
        nn.init.zeros_(module.weight)
        module.weight[..., module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 1.0
