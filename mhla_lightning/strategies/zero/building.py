"""Initialisation of a model whose weights are split while it is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch.overrides import TorchFunctionMode

_NEED_NO_NUMBERS = frozenset(
    {
        torch.Tensor.requires_grad_,
        torch.Tensor.is_floating_point,
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("dtype", "device", "requires_grad", "grad", "is_meta", "is_leaf", "grad_fn")
        ),
        *(getattr(torch.Tensor, name).__set__ for name in ("data", "requires_grad", "grad")),
    }
)

_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


class InitialiseSplit(TorchFunctionMode):
    """Inside, code that reads or writes a split weight meets it whole, and every rank keeps its part of what
    was written.

    deepspeed.zero.Init splits a layer's weights as soon as the layer is made, and gathers them again only
    inside `Module.apply`. Anything else that a parent does to its children (an initialisation by name, a warm
    start that copies a file) would meet tensors of no elements and change nothing. One operation's weights
    are whole at a time. All ranks draw the same numbers, so the model is that of one process, bit for bit.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func == _SHAPE and _is_split(
            args[0]
        ):  # DeepSpeed itself asks, in the middle of splitting a weight
            return args[0].ds_shape
        split = (
            [] if func in _NEED_NO_NUMBERS else [x for x in _flat([*args, *kwargs.values()]) if _is_split(x)]
        )
        for weight in split:
            weight.all_gather()
        try:
            return func(*args, **kwargs)
        finally:
            for weight in split:
                weight.partition(has_been_updated=True)


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    """Arguments, those in lists and tuples too."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _is_split(value: Any) -> bool:
    return (
        isinstance(value, torch.nn.Parameter)
        and getattr(value, "ds_status", None) is ZeroParamStatus.NOT_AVAILABLE
    )
