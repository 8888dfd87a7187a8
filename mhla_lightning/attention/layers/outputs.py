"""Reading what attention layers put out while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mhla_lightning.attention.layers.causal_self_attention import CausalSelfAttention
from mhla_lightning.attention.layers.self_attention import SelfAttention
from mhla_lightning.errors import UserError


@contextmanager
def attention_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within it every forward of `model` appends the output of each of its self-attention layers, (batch,
    tokens, dim) each, in layer order.

    What is appended is part of the forward's graph, so a loss on it reaches the weights (distillation from a
    teacher, layer by layer). A layer that activation checkpointing runs again in the backward appends
    nothing.

    Raises:
        UserError: a model without such layers.
    """
    layers = [
        module for module in model.modules() if isinstance(module, (SelfAttention, CausalSelfAttention))
    ]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no self-attention layer of ours whose output could be taken"
        )
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if (
            torch._C._current_graph_task_id() == -1
        ):  # else a backward is under way, and this forward is a recomputation
            outputs.append(output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
