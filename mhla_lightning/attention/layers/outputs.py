"""Recording the outputs of attention layers while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mhla_lightning.attention.layers.causal_self_attention import CausalSelfAttention
from mhla_lightning.attention.layers.self_attention import SelfAttention
from mhla_lightning.errors import UserError


@contextmanager
def attention_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the output of every self-attention layer during each forward of `model`.

    The list receives one tensor per layer and forward, (batch, tokens, dim), in layer order. These tensors
    are part of the forward's graph, so a loss on them reaches the weights (distillation, layer by layer).
    Activation checkpointing runs layers again in the backward, outside the forward of `model`: those runs
    record nothing.

    Args:
        model: the model that is called as a whole, or a single layer.

    Raises:
        UserError: a model without such layers.
    """
    kinds = (SelfAttention, CausalSelfAttention)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    if not layers:
        raise UserError("model", f"{type(model).__name__} has no self-attention layer of ours to record")
    outputs: list[Tensor] = []
    running = False

    def start(module: nn.Module, inputs: Any) -> None:
        nonlocal running
        running = True

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal running
        running = False

    def record(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if running:
            outputs.append(output)

    handles = [model.register_forward_pre_hook(start, prepend=True)]
    handles += [layer.register_forward_hook(record) for layer in layers]
    handles.append(model.register_forward_hook(stop, always_call=True))  # also after a failed forward
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
