"""Tiny language models whose greedy text is not one token again and again, for tests of what generates,
wraps and evaluates them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mhla_lightning.attention import CAUSAL_ATTENTION
from mhla_lightning.attention.baselines.causal_fla import FlashOperator
from mhla_lightning.backbones import CausalLM, CausalLMOptions

VOCABULARY = 61
_ENTRIES: dict[str, dict[str, Any]] = {
    "mhla": {"chunk_size": 8, "max_chunks": 200},
    "linear": {"chunk_size": 8},
    "deltanet": {"chunk_size": 8},
}
CUDA_ONLY = [name for name, operator in CAUSAL_ATTENTION.items() if issubclass(operator, FlashOperator)]


OPERATORS_ON_CPU = [
    name for name in CAUSAL_ATTENTION if name not in CUDA_ONLY
]  # tests/test_fla.py has the others
ENTRIES: list[dict[str, Any]] = [{"name": name, **_ENTRIES.get(name, {})} for name in OPERATORS_ON_CPU] + [
    {"name": "mhla", "chunk_size": 8, "max_chunks": 4, "extrapolation": "shift"}
]
"""An attention entry of every causal operator that runs on a CPU, fit for hundreds of tokens; new
operators come by themselves.
"""


def entry_id(entry: Mapping[str, Any]) -> str:
    return "-".join(str(value) for value in entry.values())


def tiny_model(entry: Any, dtype: torch.dtype = torch.float64, vocab_size: int = VOCABULARY) -> CausalLM:
    """Untied and with large weights: logits differ much from token to token, so that a wrong state shows."""
    torch.manual_seed(0)
    options = CausalLMOptions(
        vocab_size=vocab_size, context=64, embed_dim=32, depth=2, intermediate=64, tie_embeddings=False
    )
    model = CausalLM(entry, options)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.3)
    return model.to(dtype).eval()


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts of these lengths; token 0 stays free for an end."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
