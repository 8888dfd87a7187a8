"""What an import is asked for, and the backbone that the weights are for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mhla_lightning.runs.folder import FORMAT

Entry = str | Mapping[str, Any] | Sequence[Any]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Wish:
    """What the command says, where it says anything.

    Attributes:
        source: the checkpoint's path, for messages.
        backbone: name in the registry; None is what fits.
        attention: attention entry; None is as the checkpoint was trained.
        options: the backbone's own options.
        heads: attention heads, which not every checkpoint tells.
        layout: blocks per axis of the MHLA layers, which no checkpoint tells.
        config: of the config.json beside the weights, empty where there is none.
    """

    source: str
    backbone: str | None = None
    attention: Entry | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    heads: int | None = None
    layout: tuple[int, ...] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """The backbone that the weights are for.

    Attributes:
        backbone: name in the registry.
        attention: attention entry.
        options: the backbone's own options.
        optional: finds the names that may be new in the target or left over of the file; every other tensor
            must have its place on both sides.
        stray: whether tensors outside of the blocks, such as a step count, may be left over too.
    """

    backbone: str
    attention: Entry
    options: Mapping[str, Any]
    optional: re.Pattern[str]
    stray: bool = True


def file_header(backbone: str, attention: Entry, options: Mapping[str, Any], source: str) -> dict[str, str]:
    """The metadata of a .safetensors file that stands alone: what the weights are for, and where they come
    from.
    """
    model = {
        "backbone": backbone,
        "attention": json.dumps(attention),
        "backbone_options": json.dumps(dict(options)),
    }
    return {"format": str(FORMAT), "source": source, **model}
