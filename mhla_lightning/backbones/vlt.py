"""The vision linear transformer (VLT): four stages, any operator in every layer.

The paper's MHLA-VLT (Sec. 5.1; SPEC section 3.2) is RAVLT (arXiv 2411.07635) with MHLA in two stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from timm.layers import ClassifierHead, trunc_normal_
from timm.models.vision_transformer import update_model_input_size
from torch import Tensor, nn

from mhla_lightning.attention import LayerAttention
from mhla_lightning.backbones.activations import KeptActivations
from mhla_lightning.backbones.adapting import Grid, adapted_to, remember_geometry, source_geometry
from mhla_lightning.backbones.compiling import CompileModule, Parts
from mhla_lightning.backbones.layers import ImageRotation, mixing_weights
from mhla_lightning.backbones.ravlt_names import vlt_weights
from mhla_lightning.backbones.vlt_layers import Stem, VLTBlock, VLTStage, conv_norm
from mhla_lightning.backbones.vlt_options import STEM_STRIDE, VLTOptions, check_pool, resolve_stages
from mhla_lightning.errors import UserError
from mhla_lightning.weights.adapted import Adapted, Geometry


class VLT(KeptActivations, nn.Module):
    """A vision transformer of four stages, with 4, 8, 16 and 32 pixels a token on each axis.

    Convolutions lead from stage to stage. Methods are named as in timm. The stem, the convolutions between
    the stages and the one before the classifier have batch normalisation. So a step depends on the samples
    that a rank sees at once; on several ranks trainer.sync_batchnorm removes that.

    Args:
        attention: see :func:`resolve_stages`.
        options: sizes; None takes the defaults.

    Raises:
        UserError: a size that does not fit, or an attention entry that does not.
    """

    geometry: Geometry

    def __init__(
        self, attention: str | Mapping[str, Any] | Sequence[Any] = "mhla", options: VLTOptions | None = None
    ) -> None:
        super().__init__()
        options = options or VLTOptions()
        layers = resolve_stages(attention, options)
        self.attention_entry, self.options = attention, options
        self.img_size, self.grid = options.sides, options.grids[0]
        self.num_classes, self.num_features = options.num_classes, options.embed_dims[-1]
        self.head_hidden_size = options.head_dim
        self.stem = Stem(options.in_chans, options.embed_dims[0])
        self.stages = nn.ModuleList(self._stages(layers, not isinstance(attention, (str, Mapping))))
        self.head_conv = nn.Sequential(
            conv_norm(self.num_features, options.head_dim, kernel_size=1), nn.SiLU()
        )
        self.head = ClassifierHead(
            options.head_dim, options.num_classes, pool_type=options.global_pool, drop_rate=options.drop_rate
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": STEM_STRIDE * 2**number, "module": f"stages.{number}"}
            for number, dim in enumerate(options.embed_dims)
        ]
        self.apply(_initialise)
        remember_geometry(self)

    def _stages(self, layers: Sequence[Sequence[LayerAttention]], listed: bool) -> list[VLTStage]:
        options, stages, before = self.options, [], None
        steps = max(1, sum(options.depths) - 1)
        rates = (options.drop_path_rate * layer / steps for layer in range(sum(options.depths)))
        for number, (grid, dim) in enumerate(zip(options.grids, options.embed_dims, strict=True)):
            with _of_stage(number, listed):
                blocks = [
                    VLTBlock(
                        dim,
                        options.num_heads[number],
                        spec,
                        grid,
                        mlp_ratio=options.mlp_ratio,
                        layer_scale=options.layer_scale[number],
                        drop_path=next(rates),
                    )
                    for spec in layers[number]
                ]
            stages.append(VLTStage(before, blocks))
            before = dim
        return stages

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, channels, height, width)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's output, (batch, embed_dims[-1], height / 32, width / 32).

        Args:
            x: (batch, channels, height, width).

        Raises:
            UserError: images of another size.
        """
        return self._maps(x, len(self.stages))[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (batch, classes) of the last stage's output.

        Args:
            x: (batch, embed_dims[-1], rows, columns).
            pre_logits: return the pooled features instead, (batch, head_dim).
        """
        return self.head(self.head_conv(x), pre_logits=pre_logits)

    def _maps(self, x: Tensor, count: int) -> list[Tensor]:
        """Return the outputs of the first stages, (batch, channels, rows, columns) each."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise UserError(
                "x",
                f"images of {tuple(x.shape[-2:])} pixels do not fit this backbone, which takes "
                f"{self.img_size} pixels; set_input_size changes that",
            )
        if self.training and len(x) * math.prod(self.options.grids[count - 1]) == 1:
            raise UserError(
                "x",
                "batch normalisation cannot train on one image whose last map has one token; take a micro "
                "batch of at least 2, or larger images",
            )
        maps = []
        with self.offloaded():
            x = self.stem(x)
            for stage in self.stages[:count]:
                assert isinstance(stage, VLTStage)
                x = stage.downsample(x)
                tokens, rotary = x.flatten(2).mT, ImageRotation(stage.grid, stage.head_dim, x.device)
                for block in stage.blocks:
                    tokens = self.run(block, tokens, rotary)
                x = tokens.mT.unflatten(2, stage.grid)
                maps.append(x)
        return maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last stage's output and the outputs of some stages; as in timm.

        Args:
            x: (batch, channels, height, width).
            indices: stages from 0, or the number of last ones; None takes all.
            norm: ignored; no norm follows the stages.
            stop_early: run no stage after the last of `indices`.
            output_fmt: must be NCHW.
            intermediates_only: leave the last stage's output out.

        Raises:
            UserError: another format, or images of another size.
        """
        if output_fmt != "NCHW":
            raise UserError("output_fmt", f"found {output_fmt}; the stages of a VLT give NCHW")
        take = _stages_of(indices, len(self.stages))
        maps = self._maps(x, max(take) + 1 if stop_early or intermediates_only else len(self.stages))
        taken = [maps[index] for index in take]
        return taken if intermediates_only else (maps[-1], taken)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the head; return the stages; as in timm."""
        take = _stages_of(indices, len(self.stages))
        self.stages = self.stages[: max(take) + 1]
        if prune_head:
            self.head_conv = nn.Sequential()
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer, and the pooling where one is given.

        Raises:
            UserError: a pooling that this model cannot have.
        """
        pool = self.options.global_pool if global_pool is None else global_pool
        check_pool(pool, num_classes)
        self.options = replace(self.options, num_classes=num_classes, global_pool=pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, pool)

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Take images of another size; mixing matrices are resampled.

        Args:
            img_size: pixels per side, or (height, width); None keeps it.

        Raises:
            UserError: a size that does not fit; nothing has changed then.
        """
        options = replace(self.options, img_size=self.img_size if img_size is None else img_size)
        fresh = type(self)(self.attention_entry, options)
        state = {name: value for name, value in self.state_dict().items() if name.endswith("mixing.weight")}
        fresh.load_state_dict(fresh.adapt_state_dict(state, self.geometry), strict=False)
        for mine, new in zip(self.stages, fresh.stages, strict=False):  # some may have been pruned
            cast(VLTStage, mine).take_grid(cast(VLTStage, new))
        self.options, self.img_size, self.grid = options, options.sides, options.grids[0]
        self.geometry = fresh.geometry
        update_model_input_size(self, self.img_size)

    def compile_parts(self, what: Parts, compile_module: CompileModule) -> None:
        """Compile the model, or each of its blocks."""
        blocks = [block for stage in self.stages for block in cast(VLTStage, stage).blocks]
        for part in [self] if what == "whole" else blocks:
            compile_module(part)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the mixing matrices; norms and biases are never decayed."""
        return mixing_weights(self)

    def flops(self, shape: Sequence[int]) -> int:
        """Return the forward FLOPs of one image of `img_size`, 2 a multiply-add.

        Args:
            shape: must be the grid.
        """
        if tuple(shape) != self.grid:
            raise UserError(
                "shape",
                f"{tuple(shape)} is not the first stage of this model: {self.grid} for images of "
                f"{self.img_size} pixels",
            )
        stages = sum(cast(VLTStage, stage).flops() for stage in self.stages)
        tokens = math.prod(cast(VLTStage, self.stages[-1]).grid)
        head = tokens * self.num_features * self.head_hidden_size + self.head.num_features * self.num_classes
        return self.stem.flops(self.img_size) + stages + 2 * head

    def adapt_state_dict(self, state: Mapping[str, Tensor], grid: Grid = None) -> Adapted:
        """Return weights of RAVLT's authors under our names; ours stay.

        Mixing matrices of a known grid are resampled to this one.

        Args:
            state: the tensors.
            grid: the token grid of the first stage of the model that they come from, or its geometry; None
                takes what the state tells.

        Raises:
            UserError: a tensor that is not finite.
        """
        return adapted_to(self, vlt_weights(state), source_geometry(state, grid))


def _stages_of(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Return the stages that timm's `indices` mean. Raises UserError for one that is not there."""
    if isinstance(indices, int):
        indices = range(-indices, 0)
    found = [
        index + count if index < 0 else index for index in (range(count) if indices is None else indices)
    ]
    if not found or not 0 <= min(found) <= max(found) < count:
        raise UserError("indices", f"found {indices}; the stages are 0 to {count - 1}")
    return found


@contextmanager
def _of_stage(number: int, listed: bool) -> Iterator[None]:
    """Name the stage in the keys of an entry's errors, where stages have entries of their own."""
    try:
        yield
    except UserError as error:
        first, _, rest = (error.key or "").partition(".")
        if listed and first == "attention":
            error.key = f"attention.{number}.{rest}"
            error.args = (error.key, error.reason)  # another process rebuilds the error from them
        raise


def _initialise(module: nn.Module) -> None:
    """Draw the weights of a layer as RAVLT does."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
