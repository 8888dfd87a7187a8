"""Watching the attention of a model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from mhla_lightning.attention import Attention, CausalSelfAttention, Context, SelfAttention
from mhla_lightning.errors import UserError

AttentionLayer = SelfAttention | CausalSelfAttention


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of a layer's operator.

    Attributes:
        number: of the layer, from 0 on, among the self-attention layers.
        operator: of the layer.
        q, k, v, context: its inputs, see :meth:`Attention.forward`.
    """

    number: int
    operator: Attention
    q: Tensor
    k: Tensor
    v: Tensor
    context: Context


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Return the self-attention layers of a model, in order.

    Raises:
        UserError: there is none.
    """
    layers = [m for m in model.modules() if isinstance(m, SelfAttention | CausalSelfAttention)]
    if not layers:
        raise UserError("model", f"{type(model).__name__} has no self-attention layer of ours to look into")
    return layers


def partitions(model: nn.Module, grid: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the block sizes of the layers of this grid, see :meth:`Attention.partition`."""
    found = [
        layer.attention.partition(grid)
        for layer in attention_layers(model)
        if isinstance(layer, CausalSelfAttention) or layer.grid == tuple(grid)
    ]
    return [size for size in found if size is not None]


@contextmanager
def watching(model: nn.Module, visit: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Call a function after each call of an operator in a forward of the model.

    The function may call the operator itself; such calls are not visited. It runs inside the forward, where
    split weights are gathered.

    Args:
        model: runs in eval mode, and not compiled.
        visit: called once a layer and forward.

    Raises:
        UserError: a model without self-attention layers.
    """
    inside = False

    def record(number: int, operator: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal inside
        if inside:
            return
        inside = True
        try:
            assert isinstance(operator, Attention)
            visit(AttentionCall(number, operator, *inputs))
        finally:
            inside = False

    handles = [
        layer.attention.register_forward_hook(partial(record, number))
        for number, layer in enumerate(attention_layers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
