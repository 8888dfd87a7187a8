"""What the hand-written operators need for torch.func and for second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_transform(*tensors: Tensor | None) -> bool:
    """Return whether torch.func or forward-mode differentiation runs through one of these.

    A hand-written operator fills its own memory, which no transform can follow.
    """
    if torch.compiler.is_compiling():
        return False
    return any(
        x is not None
        and (torch.func.debug_unwrap(x) is not x or forward_ad.unpack_dual(x).tangent is not None)
        for x in tensors
    )


def pulled_back(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again.

    Args:
        function: of the inputs, in torch's own operations.
        inputs: None stays None.
        grad: the gradient of the function's result.
    """
    given = [x for x in inputs if x is not None]

    def of_given(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        return function(*(None if x is None else next(rest) for x in inputs))

    pull = torch.func.vjp(of_given, *given)[1]
    gradients = iter(pull(grad))
    return [None if x is None else next(gradients) for x in inputs]
