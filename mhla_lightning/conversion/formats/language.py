"""Export language models as a folder of transformers."""

from __future__ import annotations

import json
from typing import cast

from torch import nn

from mhla_lightning.backbones import CausalLM
from mhla_lightning.conversion.formats.base import FOR_TORCH, Export, TrainedModel, shapes
from mhla_lightning.weights.streaming import parts_of


def hf(trained: TrainedModel, model: nn.Module) -> Export:
    """Plan a folder that AutoModelForCausalLM.from_pretrained opens.

    Its reader imports mhla_lightning.hf first. The folder holds the tokenizer's files, if there are any.

    Raises:
        UserError: transformers is not installed.
    """
    from mhla_lightning.hf import MHLAForCausalLM, language_config

    config = language_config(cast(CausalLM, model), trained.attention, trained.end)
    config.architectures = [MHLAForCausalLM.__name__]
    weights, prefix = trained.stored(), MHLAForCausalLM.base_model_prefix
    parts = parts_of(weights.renamed({f"{prefix}.{name}": name for name in weights}))
    opened_by = "import mhla_lightning.hf; transformers.AutoModelForCausalLM.from_pretrained('DIR')"
    return Export(
        "model.safetensors",
        parts,
        FOR_TORCH,
        json.loads(config.to_json_string()),
        shapes(parts),
        files=trained.files,
        opened_by=opened_by,
    )
