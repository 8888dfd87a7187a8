"""Activations on a GPU: recomputed or on the host, the gradients are those of plain training. `make gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mhla_lightning.backbones import build_backbone
from mhla_lightning.backbones.activations import Activations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_small", {"depth": 6}),
    "lm": (
        "lm_tiny",
        {"context": 512, "vocab_size": 512, "depth": 6, "embed_dim": 384, "intermediate": 1024},
    ),
}


def step(name: str, how: Activations) -> tuple[list[Tensor], int]:
    """Return the gradients of a step, and the bytes that it holds at most beside the weights."""
    backbone, options = MODELS[name]
    torch.manual_seed(0)
    model: Any = build_backbone(backbone, attention="mhla", **options).to(DEVICE).train()
    model.keep_activations(how)
    given = torch.randn(16, 3, 224, 224) if name == "deit" else torch.randint(512, (16, 512))
    given = given.to(DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = model(given).float().square().mean()
    loss.backward()
    torch.cuda.synchronize()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return gradients, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["blocks", "attention", "offload"])
def test_gradients_are_those_of_plain_training_in_less_memory(name: str, how: Activations) -> None:
    plain, peak = step(name, "none")
    other, lower = step(name, how)
    assert len(plain) == len(other) > 10
    for got, want in zip(other, plain, strict=True):
        assert torch.allclose(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))
    # The kernels save hardly more than the operator's inputs, so recomputing them alone may save nothing.
    assert lower < (1.05 * peak if how == "attention" else 0.9 * peak), (lower, peak)
