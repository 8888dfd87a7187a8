"""What an import asks for, and the backbone that the weights are for."""

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
    """What the import command asks for; None where it leaves the choice open.

    Attributes:
        source: the checkpoint's path, for messages.
        backbone: name in the registry; None takes the one that fits.
        attention: attention entry; None takes the one that the checkpoint was trained with.
        options: the backbone's own options.
        heads: attention heads, which some checkpoints do not record.
        layout: blocks per axis of the MHLA layers, which no checkpoint records.
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
class ImportTarget:
    """The backbone that the weights are for.

    Attributes:
        backbone: name in the registry.
        attention: attention entry.
        options: the backbone's own options.
        optional: finds the names that may be new in the target or left over of the file; every other tensor
            must exist on both sides.
        stray: whether tensors outside of the blocks, such as a step count, may be left over too.
    """

    backbone: str
    attention: Entry
    options: Mapping[str, Any]
    optional: re.Pattern[str]
    stray: bool = True


def file_header(backbone: str, attention: Entry, options: Mapping[str, Any], source: str) -> dict[str, str]:
    """Return the metadata of a .safetensors file that is used without a run folder.

    It holds the model that the weights are for, and their source.
    """
    model = {
        "backbone": backbone,
        "attention": json.dumps(attention),
        "backbone_options": json.dumps(dict(options)),
    }
    return {"format": str(FORMAT), "source": source, **model}
