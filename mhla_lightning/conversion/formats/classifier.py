"""Export image classifiers as a folder of timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from mhla_lightning.backbones import TIMM_FACTS, VLT, VisionTransformer
from mhla_lightning.conversion.formats.base import FOR_TORCH, Export, TrainedModel, shapes
from mhla_lightning.weights.streaming import parts_of
from mhla_lightning.weights.target import Entry


def timm(trained: TrainedModel, model: nn.Module) -> Export:
    """Plan a folder that timm.create_model opens after `import mhla_lightning.backbones`.

    It opens by `local-dir:`, or by architecture and model_args of its config.json.
    """
    parts = parts_of(trained.stored())
    opened_by = "import mhla_lightning.backbones; timm.create_model('local-dir:DIR', pretrained=True)"
    return Export(
        "model.safetensors",
        parts,
        FOR_TORCH,
        _config(trained, cast(VisionTransformer | VLT, model)),
        shapes(parts),
        opened_by=opened_by,
    )


def _config(trained: TrainedModel, model: VisionTransformer | VLT) -> dict[str, Any]:
    architecture = f"{trained.backbone}_{_operator(trained.attention)}"
    facts = TIMM_FACTS[type(model)]
    weights = {
        "input_size": [model.options.in_chans, *model.img_size],
        "fixed_input_size": True,
        "num_classes": model.num_classes,
    }
    weights |= {"first_conv": facts.first_conv, "classifier": facts.classifier, **trained.pixels}
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {**trained.options, "attention": trained.attention},
        "pretrained_cfg": weights,
    }


def _operator(attention: Entry) -> str:
    """Return the operator in the name of a timm model; for a hybrid, that of its first layer."""
    if isinstance(attention, str):
        return attention
    return str(attention["name"]) if isinstance(attention, Mapping) else _operator(attention[0])
