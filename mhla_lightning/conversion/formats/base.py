"""The input and the output of every export format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mhla_lightning.backbones.text_dit import TextDiT
from mhla_lightning.conversion.foreign import Shapes, table_rows
from mhla_lightning.conversion.formats.card import Record
from mhla_lightning.data.tokenizers.base import Tokenizer
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import FORMAT
from mhla_lightning.weights.stored import Stored, as_stored
from mhla_lightning.weights.streaming import FilePart
from mhla_lightning.weights.target import Entry

FOR_TORCH = {"format": "pt"}
"""Header of a .safetensors file that transformers requires."""


@dataclass(frozen=True)
class TrainedModel:
    """A model to export.

    Attributes:
        weights: by the backbone's own names.
        backbone: name in the registry.
        attention: attention entry.
        options: of the backbone; see backbones.build_backbone.
        source: origin of the weights, in words.
        end: id of the end-of-document token of a language model; None means none.
        tokenizer: of a language model; None means none.
        pixels: preprocessing of a classifier's images, by the keys of timm's pretrained_cfg.
        classes: names of a classifier's classes, by label; empty where they are not known.
        record: of the training, for the model card.
        averaged: whether the weights are an average (callbacks.EMA).
    """

    weights: Mapping[str, Tensor]
    backbone: str
    attention: Entry
    options: Mapping[str, Any]
    source: str
    end: int | None = None
    tokenizer: Tokenizer | None = None
    pixels: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()
    record: Record = Record()
    averaged: bool = False

    def stored(self) -> Stored:
        """Return the weights, each of which is read when it is used."""
        return as_stored(self.weights)

    def facts(self) -> dict[str, Any]:
        """Return the entries from which `mhla import` and build_backbone rebuild the model."""
        model = {
            "backbone": self.backbone,
            "attention": self.attention,
            "backbone_options": dict(self.options),
        }
        return {"format": FORMAT, "source": self.source, **model}


@dataclass(frozen=True)
class Export:
    """The content of an export.

    Attributes:
        file: name of the .safetensors file in its folder.
        parts: of that file.
        metadata: of its header.
        config: content of config.json.
        shared: (name, shape) of tensors that the other library's model has too; for our own formats, of all.
        added: (name, shape) of tensors that only MHLA has.
        files: further files of the folder, by name.
        opened_by: Python code that loads the folder, with `DIR` for its path; None where only ours can.
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
        """Return the rows of a table: see :func:`mhla_lightning.conversion.foreign.table_rows`."""
        return table_rows({"shared": self.shared, "added": self.added})


def check_text_attention(model: TextDiT, family: str) -> None:
    """Refuse a model of images or videos that reads its text otherwise than its family.

    Args:
        model: the model.
        family: whose format is written.

    Raises:
        UserError: another attention to the text than softmax.
    """
    if model.cross.name != "softmax":
        raise UserError(
            "format",
            f"this model reads its text by {model.cross.name} (`backbone_options.cross_attention`), and "
            f"{family} by softmax; take plain",
        )


def shapes(parts: Sequence[FilePart]) -> Shapes:
    """Return (name, shape) of all tensors."""
    return [(name, tuple(value.shape)) for part in parts for name, value in part.outline.items()]
