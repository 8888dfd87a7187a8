"""A small convolutional classifier, to judge generated images with; it holds no attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import ClassifierHead, ConvNormAct
from torch import Tensor, nn

from mhla_lightning.errors import UserError

_STRIDE = 4  # pixels of a side behind one position of the last stage


class ConvNet(nn.Module):
    """Three stages of two 3x3 convolutions, the second and third at half the size of the one before;
    average-pooled.

    timm's small networks begin with strides of 4 and more, which leave nothing of 28 pixels. Methods as in
    timm: `forward_features`, `forward_head(features, pre_logits)`. Batch normalisation makes a step depend on
        what a rank sees at once (on several ranks set
    trainer.sync_batchnorm), and is worth it: on 4,000 digits group and layer normalisation stop at 96 %, this
    reaches 98.

    Args:
        attention: must be `none`: there is no layer that could hold an operator.
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
            raise UserError(f"model.attention is {attention}, and a convnet has no attention; write none")
        rows, columns = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(rows, columns) < _STRIDE:
            raise UserError(
                f"img_size {img_size} is below {_STRIDE} pixels, and nothing is left of it after two halvings"
            )
        if len(widths) != 3 or min(widths) < 1:
            raise UserError(
                f"widths is {list(widths)}; a convnet has three stages of at least one channel, for "
                "example [32, 64, 128]"
            )
        self.img_size = (rows, columns)
        self.grid = (math.ceil(math.ceil(rows / 2) / 2), math.ceil(math.ceil(columns / 2) / 2))
        layers: list[nn.Module] = []
        for before, width, stride in zip((in_chans, *widths), widths, (1, 2, 2), strict=False):
            layers += [ConvNormAct(before, width, 3, stride), ConvNormAct(width, width, 3)]
        self.stages = nn.Sequential(*layers)
        self.head = ClassifierHead(widths[-1], num_classes, drop_rate=drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> logits (batch, classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the last stage's (batch, widths[-1], *grid)."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stage -> logits (batch, classes), or with `pre_logits` its average (batch, widths[-1])."""
        return self.head(x, pre_logits=pre_logits)

    def no_weight_decay(self) -> set[str]:
        """None besides norms and biases."""
        return set()

    def flops(self, shape: Sequence[int]) -> int:
        """Forward FLOPs of one image of `img_size`, 2 a multiply-add; shape must be the grid."""
        if tuple(shape) != self.grid:
            raise UserError(
                f"this convnet of img_size {self.img_size} has a last stage of {self.grid}, not "
                f"{tuple(shape)}"
            )
        rows, columns = self.img_size
        total = 0
        for layer in self.stages:
            assert isinstance(layer, ConvNormAct)
            stride = layer.conv.stride[0]
            rows, columns = math.ceil(rows / stride), math.ceil(columns / stride)
            total += 2 * rows * columns * layer.conv.weight.numel()
        return total + 2 * self.head.fc.weight.numel()

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Only our own names are known."""
        return dict(state)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refused: the network is too small to gain from it."""
        if enable:
            raise UserError("model.checkpoint_activations: a convnet recomputes nothing; write none")
