"""What is exported, and what is written of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mhla_lightning.conversion.foreign import Shapes, table_rows
from mhla_lightning.runs.folder import FORMAT
from mhla_lightning.weights.stored import Stored, as_stored
from mhla_lightning.weights.streaming import FilePart
from mhla_lightning.weights.target import Entry

FOR_TORCH = {"format": "pt"}
"""What transformers wants to read in the header of a .safetensors file."""


@dataclass(frozen=True)
class Trained:
    """What is exported.

    Attributes:
        weights: by the backbone's own names.
        backbone, attention, options: see backbones.build_backbone.
        source: where the weights come from, in words.
        end: the id that ends a document, of a language model's tokenizer.
        files: of that tokenizer, by name.
        pixels: how a classifier's images were prepared, by the keys of timm's pretrained_cfg.
    """

    weights: Mapping[str, Tensor]
    backbone: str
    attention: Entry
    options: Mapping[str, Any]
    source: str
    end: int | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    pixels: Mapping[str, Any] = field(default_factory=dict)

    def stored(self) -> Stored:
        """The weights, to be read one at a time."""
        return as_stored(self.weights)

    def facts(self) -> dict[str, Any]:
        """What rebuilds the model: `mhla import` reads it, and so can
        mhla_lightning.backbones.build_backbone.
        """
        model = {
            "backbone": self.backbone,
            "attention": self.attention,
            "backbone_options": dict(self.options),
        }
        return {"format": FORMAT, "source": self.source, **model}


@dataclass(frozen=True)
class Export:
    """What is to be written.

    Attributes:
        file: name of the file of tensors in its folder.
        parts: of that file.
        metadata: of its header.
        config: of config.json.
        shared: (name, shape) of what other people's model has too; of our own formats everything.
        added: of what only MHLA has.
        files: further files of the folder, by name.
        opened_by: Python that loads the folder, where other code than ours can; `DIR` stands for it.
    """

    file: str
    parts: Sequence[FilePart]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    shared: Shapes
    added: Shapes = field(default_factory=list)
    files: Mapping[str, bytes] = field(default_factory=dict)
    opened_by: str | None = None

    def rows(self) -> list[dict[str, Any]]:
        """See :func:`table_rows`."""
        return table_rows({"shared": self.shared, "added": self.added})


def shapes(parts: Sequence[FilePart]) -> Shapes:
    """(name, shape) of all tensors."""
    return [(name, tuple(value.shape)) for part in parts for name, value in part.outline.items()]
