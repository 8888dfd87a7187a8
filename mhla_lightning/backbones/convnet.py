"""A small convolutional classifier without attention, which judges generated images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import ClassifierHead, ConvNormAct
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.backbones.adapting import Grid, adapted_to
from mhla_lightning.backbones.compiling import CompileModule, Parts
from mhla_lightning.backbones.sizes import whole_sizes
from mhla_lightning.errors import UserError
from mhla_lightning.weights.adapted import Adapted, Geometry

_STRIDE = 4  # pixels of a side for each position of the last stage


class ConvNet(nn.Module):
    """Three stages of two 3x3 convolutions; each later stage halves the size; average-pooled.

    timm's small networks begin with strides of 4 and more, which leave nothing of 28 pixels. Methods are
    named as in timm: `forward_features`, `forward_head(features, pre_logits)`.

    With batch normalisation a step depends on the samples that a rank sees at once; on several ranks set
    trainer.sync_batchnorm. It is worth it: on 4,000 digits group and layer normalisation reach 96 %, batch
    normalisation 98 %.

    Args:
        attention: must be `none`: no layer could hold an operator.
        img_size: pixels per side, or (height, width).
        in_chans: channels of the image.
        num_classes: classes of the data.
        widths: channels of the three stages.
        drop_rate: dropout before the classifier.

    Raises:
        UserError: an attention, another number of stages, or a side below 4 pixels.
    """

    def __init__(
        self,
        attention: str | Mapping[str, Any] | Sequence[Any] = "none",
        img_size: int | Sequence[int] = 28,
        in_chans: int = 3,
        num_classes: int = 1000,
        widths: Sequence[int] = (32, 64, 128),
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if attention != "none":
            raise UserError(
                "attention", f"{attention} does not fit a convnet, which has no attention; write none"
            )
        rows, columns = whole_sizes("img_size", img_size, ("height", "width"))
        if min(rows, columns) < _STRIDE:
            raise UserError(
                "img_size",
                f"{img_size} is below {_STRIDE} pixels, and nothing is left of it after two halvings",
            )
        if len(widths) != 3 or min(widths) < 1:
            raise UserError(
                "widths",
                f"{list(widths)} does not fit; a convnet has three stages of at least one channel, for "
                "example [32, 64, 128]",
            )
        self.img_size = (rows, columns)
        self.grid = (math.ceil(math.ceil(rows / 2) / 2), math.ceil(math.ceil(columns / 2) / 2))
        layers: list[nn.Module] = []
        for before, width, stride in zip((in_chans, *widths), widths, (1, 2, 2), strict=False):
            layers += [_ConvNormReLU(before, width, stride), _ConvNormReLU(width, width)]
        self.stages = nn.Sequential(*layers)
        self.head = ClassifierHead(widths[-1], num_classes, drop_rate=drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, channels, height, width)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's output, (batch, widths[-1], *grid).

        Args:
            x: (batch, channels, height, width).
        """
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (batch, classes) of the last stage's output.

        Args:
            x: (batch, widths[-1], *grid).
            pre_logits: return the average over the grid instead, (batch, widths[-1]).
        """
        return self.head(x, pre_logits=pre_logits)

    def no_weight_decay(self) -> set[str]:
        """Return no names: only norms and biases are not decayed."""
        return set()

    def flops(self, shape: Sequence[int]) -> int:
        """Return the forward FLOPs of one image of `img_size`, 2 a multiply-add.

        Args:
            shape: must be the grid.
        """
        if tuple(shape) != self.grid:
            raise UserError(
                "shape",
                f"{tuple(shape)} is not the last stage of this convnet: {self.grid} for images of "
                f"{self.img_size} pixels",
            )
        rows, columns = self.img_size
        total = 0
        for layer in self.stages:
            assert isinstance(layer, ConvNormAct)
            stride = layer.conv.stride[0]
            rows, columns = math.ceil(rows / stride), math.ceil(columns / stride)
            total += 2 * rows * columns * layer.conv.weight.numel()
        return total + 2 * self.head.fc.weight.numel()

    def adapt_state_dict(self, state: Mapping[str, Tensor], grid: Grid = None) -> Adapted:
        """Return the weights as they are: only our own names are known.

        Args:
            state: the tensors.
            grid: ignored; no weight has a place.

        Raises:
            UserError: a tensor that is not finite.
        """
        return adapted_to(self, state, Geometry())

    def compile_parts(self, what: Parts, compile_module: CompileModule) -> None:
        """Compile the model, or each of its stages."""
        for part in [self] if what == "whole" else self.stages:
            compile_module(part)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse: the network is too small to gain from recomputing."""
        if enable:
            raise UserError("checkpoint_activations", "a convnet recomputes nothing; write none")


class _ConvNormReLU(ConvNormAct):
    """timm's layer with the activation outside of the norm.

    torch's synchronised batch normalisation takes the norm's place, and leaves out an activation inside.
    """

    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__(before, width, 3, stride, apply_act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))
