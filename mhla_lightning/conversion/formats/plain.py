"""Export weights under our own names, for model.init_from and for plain torch."""

from __future__ import annotations

from torch import nn

from mhla_lightning.conversion.formats.base import FOR_TORCH, Export, TrainedModel, shapes
from mhla_lightning.weights.streaming import parts_of


def plain(trained: TrainedModel, model: nn.Module) -> Export:
    """Plan a folder with the weights and the model's name and options."""
    parts = parts_of(trained.stored())
    opened_by = "mhla_lightning.conversion.hub.HubModel.from_pretrained('DIR')"
    return Export("model.safetensors", parts, FOR_TORCH, trained.facts(), shapes(parts), opened_by=opened_by)
