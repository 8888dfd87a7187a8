"""Sizes of the vision linear transformer, and its attention by stage (SPEC section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mhla_lightning.arguments.checked import CheckedOptions
from mhla_lightning.attention import LayerAttention, SelfAttention, resolve_layers
from mhla_lightning.attention.base import known
from mhla_lightning.backbones.layers import check_heads, check_ratio
from mhla_lightning.backbones.sizes import whole_sizes
from mhla_lightning.errors import UserError, inside

STAGES = 4
STEM_STRIDE = 4
POOLS = ("avg", "max", "avgmax", "")
_BLOCKS = (7, 4, 3, 2)
"""Blocks per axis of each stage at 224 px: 49 and 16 are the paper's, and all keep M^2 <= N."""


@dataclass(frozen=True)
class VLTOptions(CheckedOptions):
    """Sizes of a VLT.

    Args:
        img_size: pixels per side, or (height, width); at least 4.
        in_chans: channels of the image.
        num_classes: classes of the data; 0 leaves the classifier out.
        embed_dims: channels of each stage.
        depths: layers of each stage.
        num_heads: heads of each stage; a head has a multiple of 4 channels.
        mlp_ratio: hidden channels of the feed-forward networks, in channels.
        layer_scale: start of the learned factor of the branches, for each stage.
        head_dim: channels of the convolution before the classifier.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last layer; it grows linearly from 0.
        global_pool: `avg`, `max` or `avgmax`, or empty for none, which needs `num_classes` 0.

    Raises:
        UserError: another number of stages, sizes that do not fit, an unknown pooling.
    """

    img_size: int | Sequence[int] = 224
    in_chans: int = 3
    num_classes: int = 1000
    embed_dims: Sequence[int] = (64, 128, 256, 512)
    depths: Sequence[int] = (2, 2, 6, 2)
    num_heads: Sequence[int] = (1, 2, 4, 8)
    mlp_ratio: float = 3.5
    layer_scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    head_dim: int = 1024
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    global_pool: str = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("embed_dims", "depths", "num_heads", "layer_scale"):
            values = getattr(self, key)
            if isinstance(values, (int, float, str)) or len(values) != STAGES:
                raise UserError(key, f"found {values}; give four numbers, one for each stage")
        check_ratio(min(self.embed_dims), self.mlp_ratio)
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            check_heads(dim, heads, "embed_dims")
            if dim // heads % 4:
                raise UserError(
                    "num_heads",
                    f"{heads} heads of {dim} channels have {dim // heads} each; rotary positions on two axes "
                    "need a multiple of 4",
                )
        if min(self.sides) < STEM_STRIDE:
            raise UserError("img_size", f"found {self.img_size}; a side has at least {STEM_STRIDE} pixels")
        check_pool(self.global_pool, self.num_classes)

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        rows, columns = whole_sizes("img_size", self.img_size, ("height", "width"))
        return rows, columns

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of tokens of each stage."""
        rows, columns = (math.ceil(math.ceil(side / 2) / 2) for side in self.sides)
        grids = [(rows, columns)]
        while len(grids) < STAGES:
            grids.append((math.ceil(grids[-1][0] / 2), math.ceil(grids[-1][1] / 2)))
        return grids


def check_pool(kind: str, num_classes: int) -> None:
    """Refuse an unknown pooling, and none before a classifier. Raises UserError."""
    known("global_pool", kind, POOLS)
    if not kind and num_classes:
        raise UserError("global_pool", "it is empty, and a classifier needs one vector an image; take avg")


def vlt_presets(stage: int, grid: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return preset -> operator -> options, for the layers of a stage (SPEC section 3.2).

    `paper` takes the features of the paper's other image models. `ravlt` takes those of RAVLT, whose own
    operator is its `linear`. The blocks of MHLA are the paper's at 224 px; other sizes take as many as keep
    M^2 <= N on every axis.

    Args:
        stage: from 0.
        grid: token counts per axis.
    """
    around = {"pos_conv": "lepe5", "gate": "linear"}
    sizes = [math.ceil(count / min(_BLOCKS[stage], math.isqrt(count))) for count in grid]
    blocks = [math.ceil(count / size) for count, size in zip(grid, sizes, strict=True)]
    features: dict[str, dict[str, Any]] = {
        "paper": {"feature_map": "relu_eps", "reweight_keys": False},
        "ravlt": {"feature_map": "elu", "reweight_keys": True},
    }
    return {
        name: {
            "softmax": around,
            "linear": {**around, **chosen},
            "mhla": {**around, **chosen, "blocks": blocks, "normalizer": "block", "mix_init": "local_row"},
        }
        for name, chosen in features.items()
    }


def resolve_stages(attention: Any, options: VLTOptions) -> list[list[LayerAttention]]:
    """Return the attention of every layer, for each stage.

    Args:
        attention: a name or mapping for the first two stages, with softmax in the others; or a list of four,
            one for each stage: a name, a mapping, or a list of these that is cycled over its layers.
        options: sizes.

    Raises:
        UserError: a list of another length, or an entry that does not fit.
    """
    alone = isinstance(attention, (str, Mapping))
    entries = [attention, attention, "softmax", "softmax"] if alone else list(attention)
    if len(entries) != STAGES:
        raise UserError(
            "attention",
            f"its list has {len(entries)} entries; give four, one for each stage, such as "
            "[mhla, [mhla, linear], softmax, softmax]",
        )
    stages = []
    for number, (entry, depth, grid) in enumerate(zip(entries, options.depths, options.grids, strict=True)):
        with inside("attention" if alone else f"attention.{number}"):
            presets, keys = vlt_presets(number, grid), SelfAttention.layer_options()
            stages.append(resolve_layers(entry, depth, presets, keys))
    return stages
