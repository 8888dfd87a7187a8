"""Which attention the layers of a model have."""

from __future__ import annotations

from typing import Any

from torch import nn

from mhla_lightning.attention.layers.causal_self_attention import CausalSelfAttention
from mhla_lightning.attention.layers.self_attention import SelfAttention


def attention_entries(model: nn.Module) -> list[dict[str, Any]]:
    """Return the distinct attentions of a model's layers, in the order of the layers.

    Returns:
        Mappings of `name`; `operator`, the options that were given to it or come from a preset; `layer`, all
        options of the layer around it; and `layers`, the number of layers that have it. Empty for a model
        without attention.
    """
    kinds = (SelfAttention, CausalSelfAttention)
    found: list[dict[str, Any]] = []
    for entry in [layer.entry for layer in model.modules() if isinstance(layer, kinds)]:
        same = next((other for other in found if {**entry, "layers": other["layers"]} == other), None)
        if same is None:
            found.append({**entry, "layers": 1})
        else:
            same["layers"] += 1
    return found
