"""Export language models as a folder of transformers."""

from __future__ import annotations

import json
import math
from typing import Any, cast

from torch import nn

from mhla_lightning.backbones import CausalLM
from mhla_lightning.conversion.formats.base import FOR_TORCH, Export, TrainedModel, shapes
from mhla_lightning.conversion.formats.bundle import bundle
from mhla_lightning.conversion.formats.card import model_card
from mhla_lightning.conversion.formats.hf_tokenizer import tokenizer_files
from mhla_lightning.weights.streaming import parts_of

CODE, MAIN = "code", "modeling_mhla"
"""Folder of the model's code beside its weights, and its main module."""


def hf(trained: TrainedModel, model: nn.Module) -> Export:
    """Plan a folder that AutoModelForCausalLM.from_pretrained opens, without this package, too.

    It holds the model's code, the tokenizer's files, settings of `generate` and a model card.

    Raises:
        UserError: transformers is not installed.
    """
    from mhla_lightning.hf import MHLAForCausalLM, MHLALanguageConfig, language_config

    config = language_config(cast(CausalLM, model), trained.attention, trained.end)
    config.architectures = [MHLAForCausalLM.__name__]
    config.auto_map = {
        "AutoConfig": f"{CODE}/{MAIN}.{MHLALanguageConfig.__name__}",
        "AutoModelForCausalLM": f"{CODE}/{MAIN}.{MHLAForCausalLM.__name__}",
    }
    weights, prefix = trained.stored(), MHLAForCausalLM.base_model_prefix
    parts = parts_of(weights.renamed({f"{prefix}.{name}": name for name in weights}))
    code = bundle(MHLAForCausalLM.__module__, MAIN)
    written: dict[str, Any] = json.loads(config.to_json_string())
    return Export(
        "model.safetensors",
        parts,
        FOR_TORCH,
        written,
        shapes(parts),
        files={
            **tokenizer_files(trained.tokenizer, config.context),
            **{f"{CODE}/{name}": content for name, content in code.items()},
            "generation_config.json": _generation(trained, config.vocab_size),
            "README.md": _card(trained, written, sum(math.prod(shape) for _, shape in shapes(parts))),
        },
        opened_by="transformers.AutoModelForCausalLM.from_pretrained('DIR', trust_remote_code=True)",
    )


def _generation(trained: TrainedModel, vocab_size: int) -> bytes:
    """Return generation_config.json: ids that the tokenizer lacks are never drawn."""
    known = vocab_size if trained.tokenizer is None else trained.tokenizer.vocabulary
    settings = {
        "eos_token_id": trained.end,
        "pad_token_id": trained.end,
        "suppress_tokens": list(range(known, vocab_size)),
    }
    given = {key: value for key, value in settings.items() if value not in (None, [])}
    return f"{json.dumps(given)}\n".encode()


def _card(trained: TrainedModel, config: dict[str, Any], parameters: int) -> bytes:
    """Return the model card, README.md."""
    tokenizer = "none" if trained.tokenizer is None else trained.tokenizer.name
    rows = {
        "Source": trained.source,
        "Backbone": f"`{trained.backbone}`, {parameters:,} parameters",
        "Attention": f"`{json.dumps(trained.attention)}`",
        "Context": f"{config['context']} tokens",
        "Tokenizer": f"{tokenizer}, {config['vocab_size']} ids",
    }
    usage = """from transformers import pipeline

generate = pipeline("text-generation", model="DIR", trust_remote_code=True)
print(generate("Once upon a time", max_new_tokens=50, do_sample=False)[0]["generated_text"])"""
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mhla", "linear-attention"],
    }
    notes = f"""
The folder `{CODE}` holds the model's code, under the Apache-2.0 licence of mhla-lightning.
"""
    return model_card(trained.backbone, trained.record, rows, header, usage, notes)
