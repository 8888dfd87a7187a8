"""Initialisation of a model whose weights are split while it is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

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
    """Makes split weights whole for every operation in the block that reads or writes them.

    Every rank then keeps its part of the written numbers. deepspeed.zero.Init splits a layer's weights as
    soon as the layer is made, and gathers them again only inside `Module.apply`. A parent does more to its
    children: it initialises by name, or a warm start copies a file. Without this class that code would meet
    tensors of no elements and change nothing.

    One operation's weights are whole at a time. All ranks draw the same random numbers, so the model is that
    of one process, bit for bit.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # DeepSpeed reads a shape in the middle of splitting the weight.
        if func == _SHAPE and _is_split(args[0]):
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


def round_split(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the parts of split weights that have another dtype.

    DeepSpeed's engine converts the model as if it was whole, and the parts keep the dtype that they were made
    with.

    Args:
        model: built under :class:`InitialiseSplit`.
        dtype: of the weights in training.
    """
    for weight in model.parameters():
        if _is_split(weight) and weight.is_floating_point():
            part = cast(Any, weight).ds_tensor
            part.data = part.data.to(dtype)
            weight.data = weight.data.to(dtype)


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    """Yield the values, and those in lists and tuples."""
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
