"""DeiT with any attention operator, on timm's VisionTransformer.

Paper Sec. 5.1; SPEC section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block, update_model_input_size
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.arguments.checked import CheckedOptions
from mhla_lightning.attention import LayerAttention, SelfAttention, resolve_layers
from mhla_lightning.attention.base import known
from mhla_lightning.attention.entry import lookup_attention
from mhla_lightning.backbones.activations import Activations, KeptActivations
from mhla_lightning.backbones.adapting import (
    Grid,
    adapted_to,
    remember_geometry,
    resampled_positions,
    source_geometry,
)
from mhla_lightning.backbones.compiling import CompileModule, Parts
from mhla_lightning.backbones.layers import (
    ConditionalPosition,
    check_heads,
    check_ratio,
    mixing_weights,
    placed_as,
    take_grid,
)
from mhla_lightning.backbones.sizes import Sizes, whole_sizes
from mhla_lightning.backbones.text_dit import laid_out
from mhla_lightning.errors import UserError, inside
from mhla_lightning.weights.adapted import Adapted, Geometry

_LINEAR = {
    "feature_map": "relu",
    "qk_norm": True,
    "qk_norm_eps": 1e-6,
    "qkv_bias": False,
    "pos_conv": "none",
    "inner_norm": False,
}
_MHLA = {"blocks": 4, "qk_norm": True, "qkv_bias": False, "pos_conv": "lepe5"}
_SOFTMAX = {"qkv_bias": True}

VISION_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "softmax": _SOFTMAX,
        "linear": _LINEAR,
        "mhla": {
            **_MHLA,
            "normalizer": "block",
            "mix_init": "local_row",
            "inner_norm": False,
            "qk_norm_eps": 1e-6,
        },
    },
    "release": {
        "softmax": _SOFTMAX,
        "linear": _LINEAR,
        "mhla": {
            **_MHLA,
            "normalizer": "slot",
            "mix_init": "linear",
            "inner_norm": True,
            "qk_norm_eps": None,
        },
    },
}
"""Preset -> operator -> options (SPEC section 9, classification)."""


POOLS = ("avg", "max", "avgmax", "map", "")


@dataclass(frozen=True)
class ViTOptions(CheckedOptions):
    """Sizes of a :class:`VisionTransformer`.

    Args:
        img_size: pixels per side, or (height, width).
        patch_size: pixels per side of a patch; must divide img_size.
        token_multiple: the tokens per axis are a multiple of this; the image is zero-padded on all sides
            (224 px -> 256 px as in the paper).
        mask_padding: mask tokens that hold padding only, in attention and in pooling (the paper lets them
            take part, SPEC C9).
        in_chans, num_classes, embed_dim, depth, num_heads, mlp_ratio, drop_rate, drop_path_rate: as in timm.
        global_pool: `avg`, `max`, `avgmax` or `map` (learned pooling) of tokens, or empty for none; with a
            class token also `token`.
        fc_norm: normalize after pooling instead of before; None does so for `avg`, `max` and `avgmax`.
        class_token: put a learned token before those of the image, as the ViTs of timm. Only operators that
            read no grid take it, such as softmax.

    Raises:
        UserError: another `global_pool`, or a class token with `mask_padding`.
    """

    img_size: int | Sequence[int] = 224
    patch_size: int = 16
    token_multiple: int = 4
    mask_padding: bool = False
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    global_pool: str = "avg"
    fc_norm: bool | None = None
    class_token: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pool(self.global_pool, self.class_token)
        if self.class_token and self.mask_padding:
            raise UserError("mask_padding", "a mask has no place for the class token; leave one of them out")


def _check_pool(kind: str, class_token: bool) -> None:
    if kind == "token":
        if not class_token:
            raise UserError("global_pool", "found token; this model has no class token, take avg")
        return
    known("global_pool", kind, POOLS)


def takes_class_token(attention: Any, depth: int) -> bool:
    """Return whether no layer of an attention entry places every token on a grid.

    Raises:
        UserError: an entry that is wrong.
    """
    with inside("attention"):
        layers = resolve_layers(attention, depth, VISION_PRESETS, SelfAttention.layer_options())
    return _placed_by(layers) is None


def _placed_by(layers: Sequence[LayerAttention]) -> str | None:
    """Return what needs the place of every token, in words; None where nothing does."""
    for layer in layers:
        convolution = layer.layer.get("pos_conv", "none")
        if convolution != "none":
            return f"the convolution {convolution}"
        if not lookup_attention(layer.name).without_grid:
            return f"the operator {layer.name}"
    return None


def _mixed(grid: Sequence[int], class_token: bool) -> tuple[int, ...]:
    """Return the token counts that the layers see: with a class token, those of one row."""
    return (math.prod(grid) + 1,) if class_token else tuple(grid)


def _check_class_token(layers: Sequence[LayerAttention]) -> None:
    what = _placed_by(layers)
    if what is not None:
        raise UserError(
            "class_token", f"{what} needs the place of every token, and a class token has none; write false"
        )


class VisionTransformer(KeptActivations, TimmVisionTransformer):
    """A vision transformer, average-pooled, whose layers hold any operator of the registry.

    timm's own lacks an operator that knows the token grid, another operator in every layer, and zero padding
    of the image to full blocks.

    Args:
        attention: attention entry: name, mapping, or a list of these cycled over the layers.
        options: sizes; None takes the defaults.

    Raises:
        UserError: a size that does not fit, or an attention entry that does not.
    """

    geometry: Geometry

    def __init__(
        self, attention: str | Mapping[str, Any] | Sequence[Any] = "mhla", options: ViTOptions | None = None
    ) -> None:
        options = options or ViTOptions()
        side, patch = options.img_size, options.patch_size
        size = cast(tuple[int, int], whole_sizes("img_size", side, ("height", "width")))
        grid = padded_grid(size, patch, options.token_multiple)
        check_heads(options.embed_dim, options.num_heads)
        check_ratio(options.embed_dim, options.mlp_ratio)
        with inside("attention"):
            layers = resolve_layers(attention, options.depth, VISION_PRESETS, SelfAttention.layer_options())
        if options.class_token:
            _check_class_token(layers)
        mask = _image_tokens(size, grid, patch) if options.mask_padding else None
        super().__init__(
            img_size=(grid[0] * patch, grid[1] * patch),
            patch_size=patch,
            in_chans=options.in_chans,
            num_classes=options.num_classes,
            global_pool=cast(Any, options.global_pool),
            fc_norm=options.fc_norm,
            class_token=options.class_token,
            embed_dim=options.embed_dim,
            depth=options.depth,
            num_heads=options.num_heads,
            mlp_ratio=options.mlp_ratio,
            drop_rate=options.drop_rate,
            drop_path_rate=options.drop_path_rate,
            # timm's annotation wants a class; timm only calls it
            block_fn=partial(  # type: ignore[arg-type]
                MixedBlock, layers=layers, grid=_mixed(grid, options.class_token), token_mask=mask
            ),
        )
        self.attention_entry, self.options = attention, options
        self.sizes = Sizes(
            ("height", "width"), (patch, patch), [count * patch for count in grid], "padded images"
        )
        if not options.class_token:
            self.sizes.lay_out(layers)
        self.img_size, self.grid = size, grid
        self.token_mask: Tensor | None
        self.register_buffer("token_mask", mask, persistent=False)
        self.more_grids: dict[tuple[int, ...], tuple[int, int]] = {}
        remember_geometry(self)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return (batch, tokens, embed_dim) in raster order of images (batch, C, H, W)."""
        with self.offloaded():
            grid = self.more_grids.get(tuple(x.shape[-2:]))
            return super().forward_features(self._pad(x)) if grid is None else self._features_at(x, grid)

    def _features_at(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Do as timm's forward_features for images of another size, with resampled positions.

        Args:
            x: (batch, C, H, W), of a size of :meth:`take_sizes`.
            grid: its tokens per axis, after padding.
        """
        patch = self.patch_embed.patch_size[0]
        x = _padded(x, (grid[0] * patch, grid[1] * patch))
        x = self.patch_embed.norm(self.patch_embed.proj(x).flatten(2).transpose(1, 2))
        prefix = int(self.has_class_token)
        table = cast(Tensor, self.pos_embed)
        positions = resampled_positions(table[:, prefix:], self.grid, grid)
        if self.has_class_token:
            x = torch.cat([cast(Tensor, self.cls_token).expand(len(x), -1, -1), x], dim=1)
            positions = torch.cat([table[:, :1], positions], dim=1)
        x = self.norm_pre(self.patch_drop(self.pos_drop(x + positions)))
        for block in self.blocks:
            x = self.run(block, x, grid=_mixed(grid, self.has_class_token))
        return self.norm(x)

    def take_sizes(self, sizes: Sequence[Sequence[int]]) -> None:
        """Take images of these sizes besides those of img_size.

        Learned positions are resampled for them in every forward.

        Args:
            sizes: (height, width) in pixels each.

        Raises:
            UserError: a size that the patch or a layer's blocks cannot take, or any with `mask_padding`;
                nothing has changed then.
        """
        fitting = {tuple(size): self.tokens_of(size) for size in sizes if tuple(size) != tuple(self.img_size)}
        if fitting and self.options.mask_padding:
            raise UserError("mask_padding", "it masks the padding of one size only; write false")
        self.more_grids |= fitting

    def tokens_of(self, size: Sequence[int]) -> tuple[int, int]:
        """Return the tokens per axis of images of a size, padding included.

        Raises:
            UserError: a size that the patch or a layer's blocks cannot take.
        """
        patch = self.patch_embed.patch_size[0]
        grid = padded_grid(size, patch, self.options.token_multiple)
        self.sizes.tokens("img_size", [count * patch for count in grid])
        return grid

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Do as timm's.

        Maps show the tokens that hold at least one pixel of the image; lists of tokens include its padding.
        """
        found = super().forward_intermediates(self._pad(x), *args, **kwargs)
        if isinstance(found, dict):
            return {**found, "image_intermediates": self._shown(found["image_intermediates"], x)}
        return (found[0], self._shown(found[1], x)) if isinstance(found, tuple) else self._shown(found, x)

    def _shown(self, maps: list[Tensor], x: Tensor) -> list[Tensor]:
        """Cut maps (batch, C, rows, columns) to the image x; tokens (batch, tokens, C) stay."""
        patch, cut = self.patch_embed.patch_size[0], []
        for full, side in zip(self.patch_embed.img_size, x.shape[-2:], strict=True):
            start = (full - side) // 2
            cut.append(slice(start // patch, math.ceil((start + side) / patch)))
        return [found[:, :, cut[0], cut[1]] if found.dim() == 4 else found for found in maps]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, and the pooling where one is given.

        Raises:
            UserError: a pooling that this model cannot have, or `map` where it was not built with it.
        """
        if global_pool is not None:
            _check_pool(global_pool, self.has_class_token)
            if global_pool == "map" and self.attn_pool is None:
                raise UserError("global_pool", "map has weights of its own; build the model with it")
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
    ) -> None:
        """Take images of another size; patches, positions and mixing matrices are resampled.

        Args:
            img_size: pixels per side, or (height, width); None keeps it.
            patch_size: pixels per side of a patch; None keeps it.

        Raises:
            UserError: a size that does not fit; nothing has changed then.
        """
        patch = self.patch_embed.patch_size[0] if patch_size is None else _square(patch_size)
        size = self.img_size if img_size is None else img_size
        options = replace(
            self.options,
            img_size=size,
            patch_size=patch,
            num_classes=self.num_classes,
            global_pool="" if self.attn_pool is None else self.global_pool,
        )
        fresh = type(self)(self.attention_entry, options)
        kept = ("pos_embed", "mixing.weight")
        state = {name: value for name, value in self.state_dict().items() if name.endswith(kept)}
        fresh.load_state_dict(fresh.adapt_state_dict(state, self.geometry), strict=False)
        self.patch_embed.set_input_size(fresh.patch_embed.img_size, (patch, patch))
        self.pos_embed = placed_as(cast(nn.Parameter, fresh.pos_embed), cast(nn.Parameter, self.pos_embed))
        for block, new in zip(self.blocks, fresh.blocks, strict=True):
            cast(MixedBlock, block).take_grid(cast(MixedBlock, new))
        self.img_size, self.grid, self.geometry = fresh.img_size, fresh.grid, fresh.geometry
        self.sizes, self.more_grids = fresh.sizes, {}
        self.token_mask = _beside(fresh.token_mask, self.pos_embed)
        self.options = replace(options, global_pool=self.options.global_pool)
        update_model_input_size(self, self.img_size, patch_size=patch)

    def keep_activations(self, how: Activations) -> None:
        """Choose what the backward recomputes or fetches, see :data:`Activations`."""
        super().keep_activations(how)
        self.grad_checkpointing = how == "blocks"  # timm's forward reads it

    def compile_parts(self, what: Parts, compile_module: CompileModule) -> None:
        """Compile the model, or each of its blocks."""
        for part in [self] if what == "whole" else self.blocks:
            compile_module(part)

    def _pad(self, x: Tensor) -> Tensor:
        full = self.patch_embed.img_size
        if tuple(x.shape[-2:]) not in (self.img_size, tuple(full)):
            raise UserError(
                "x",
                f"images of {tuple(x.shape[-2:])} pixels do not fit this backbone, which takes "
                f"{self.img_size} pixels, or {tuple(full)} with its padding",
            )
        return _padded(x, full)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return super().pool(x if self.token_mask is None else x[:, self.token_mask], pool_type)

    def no_weight_decay(self) -> set[str]:
        """Return the names of positions and mixing matrices; timm adds norms and biases (SPEC 1.4)."""
        return {"pos_embed", *mixing_weights(self), *(["cls_token"] if self.has_class_token else [])}

    def flops(self, shape: Sequence[int]) -> int:
        """Return the forward FLOPs of one sample, 2 a multiply-add.

        Args:
            shape: token counts per axis.
        """
        tokens, dim = math.prod(shape), self.embed_dim
        patch = 2 * tokens * self.patch_embed.proj.weight.numel()
        mixed = _mixed(shape, self.has_class_token)
        return (
            patch
            + sum(cast(MixedBlock, block).flops(mixed) for block in self.blocks)
            + 2 * dim * self.num_classes
        )

    def adapt_state_dict(self, state: Mapping[str, Tensor], grid: Grid = None) -> Adapted:
        """Return weights of timm's ViTs or of the MHLA authors under our names.

        Positions and mixing matrices of a known grid are resampled to this one. Positions of an unknown grid
        are left out, and a warning says so.

        Args:
            state: the tensors.
            grid: tokens per axis of the model that they come from, or its geometry; None takes what the
                state tells.

        Raises:
            UserError: another grid than that of the positions, or a tensor that is not finite.
        """
        source = source_geometry(state, grid)
        adapted = {vit_name(name): value for name, value in state.items()}
        adapted = {
            name: value.flatten(2).squeeze(-1)
            if name.endswith("mixing.weight") and value.dim() == 4
            else value
            for name, value in adapted.items()
        }
        return adapted_to(self, adapted, source, ("pos_embed",), class_token=self.has_class_token)


class MixedBlock(Block):
    """timm's Block around our SelfAttention, with an optional conditional position before it.

    Args:
        dim, num_heads: the model's.
        layers: one resolved attention entry a layer; `depth` picks this block's.
        grid: token counts per axis.
        token_mask: (tokens,) bool, True = real token.
        depth: index of the block.
        timm_options: the arguments that timm's VisionTransformer passes to every block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        layers: Sequence[LayerAttention],
        grid: tuple[int, ...],
        token_mask: Tensor | None,
        depth: int,
        **timm_options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **{**timm_options, "attn_layer": nn.Identity})
        self.spec = spec = layers[depth]
        self.grid = grid
        self.token_mask: Tensor | None
        self.cpe = ConditionalPosition(dim, len(grid)) if spec.layer.get("pos_conv") == "cpe3" else None
        self.attn = SelfAttention(dim, num_heads, attention=spec.entry, grid=grid)
        self.register_buffer("token_mask", token_mask, persistent=False)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Do as timm's; a `grid` replaces the token counts of the construction."""
        if self.cpe is not None:
            x = self.cpe(x, self.grid if grid is None else grid)
        mask = None if self.token_mask is None else self.token_mask.expand(x.shape[0], -1)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid=grid, mask=mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def take_grid(self, other: MixedBlock) -> None:
        """Take the grid of another block, and its operator, which is made for that grid."""
        mine = cast(SelfAttention, self.attn)
        take_grid(mine, cast(SelfAttention, other.attn))
        self.grid, self.token_mask = other.grid, _beside(other.token_mask, mine.proj.weight)

    def flops(self, grid: Sequence[int]) -> int:
        tokens = math.prod(grid)
        mlp = (
            2
            * tokens
            * sum(layer.weight.numel() for layer in self.mlp.modules() if isinstance(layer, nn.Linear))
        )
        cpe = self.cpe.flops(tokens) if self.cpe is not None else 0
        return laid_out(cast(SelfAttention, self.attn), self.spec.entry, grid).flops(grid) + mlp + cpe


def _beside(mask: Tensor | None, other: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(other.device)


def _padded(x: Tensor, full: Sequence[int]) -> Tensor:
    """Zero-pad images (batch, C, H, W) on all sides to (height, width)."""
    spare_h, spare_w = full[0] - x.shape[-2], full[1] - x.shape[-1]
    return F.pad(x, (spare_w // 2, spare_w - spare_w // 2, spare_h // 2, spare_h - spare_h // 2))


def _square(patch_size: int | Sequence[int]) -> int:
    sides = {patch_size} if isinstance(patch_size, int) else set(patch_size)
    if len(sides) > 1:
        raise UserError("patch_size", f"found {patch_size}; patches are square")
    return sides.pop()


def padded_grid(img_size: Sequence[int], patch_size: int, token_multiple: int) -> tuple[int, int]:
    """Return (rows, columns) of tokens after padding to the next multiple.

    Args:
        img_size: (height, width) in pixels.
        patch_size: pixels per side of a patch.
        token_multiple: tokens per axis are a multiple of this.

    Raises:
        UserError: the patch does not divide the image; names the sizes that fit.
    """
    for side in img_size:
        if side % patch_size:
            fit = [n * patch_size for n in (side // patch_size, side // patch_size + 1) if n]
            raise UserError(
                "img_size",
                f"{side} is no multiple of `patch_size` {patch_size}; use {' or '.join(map(str, fit))}",
            )
    rows, columns = (math.ceil(side // patch_size / token_multiple) * token_multiple for side in img_size)
    return rows, columns


def _image_tokens(img_size: Sequence[int], grid: Sequence[int], patch_size: int) -> Tensor:
    """Return (tokens,) bool: True where a token shows at least one pixel of the image."""
    axes = []
    for side, count in zip(img_size, grid, strict=True):
        start = (count * patch_size - side) // 2
        first = torch.arange(count) * patch_size
        axes.append((first + patch_size > start) & (first < start + side))
    return (axes[0][:, None] & axes[1][None]).flatten()


_RELEASE_NAMES = (
    (".attn.to_qkv.", ".attn.qkv."),
    (".attn.to_out.0.", ".attn.proj."),
    (".attn.piece_attn.conv.", ".attn.attention.mixing."),
    (".attn.lepe.weight", ".attn.lepe.conv.weight"),
    (".attn.lepe.bias", ".attn.lepe.conv.bias"),
)


def vit_name(name: str) -> str:
    """Return our name of a parameter of the authors' release; other names stay."""
    for release, ours in _RELEASE_NAMES:
        name = name.replace(release, ours)
    return name
