"""What a backbone's blocks keep from the forward for the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mhla_lightning.attention import CausalSelfAttention, MHLACrossAttention, SelfAttention

Activations = Literal["none", "blocks", "attention", "offload"]
"""What the backward finds of the forward's activations.

- `none`: all of them.
- `blocks`: the inputs of every block, which the backward runs again.
- `attention`: all but those inside the attention operators, which the backward runs again.
- `offload`: all of them, in pinned memory of the host. On a CPU nothing moves.
"""
SMALL = 2**16  # bytes; smaller tensors stay on the GPU
_planned: ContextVar[bool] = ContextVar("planned", default=False)


@runtime_checkable
class KeepsActivations(Protocol):
    """A backbone that can recompute or offload."""

    def keep_activations(self, how: Activations) -> None: ...


class KeptActivations:
    """A mixin of modules that run blocks one after another."""

    activations: Activations = "none"

    def keep_activations(self, how: Activations) -> None:
        """Choose what the backward recomputes or fetches, see :data:`Activations`."""
        self.activations = how
        for module in cast(nn.Module, self).modules():
            if isinstance(module, SelfAttention | CausalSelfAttention | MHLACrossAttention):
                module.recompute = how == "attention"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward to save memory; timm's name."""
        self.keep_activations("blocks" if enable else "none")

    def run(self, block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Call a block, which the backward calls again where it is to be recomputed."""
        if self.activations == "blocks" and block.training:
            return cast(Tensor, checkpoint(block, *args, use_reentrant=False, **kwargs))
        return cast(Tensor, block(*args, **kwargs))

    def offloaded(self) -> AbstractContextManager[object]:
        """Return a context in which the activations move to the host, where that is chosen."""
        module = cast(nn.Module, self)
        return Offload(module) if self.activations == "offload" and module.training else nullcontext()


class Offload(saved_tensors_hooks):
    """Keeps what autograd saves in pinned memory of the host until the backward asks for it.

    Weights, their copies under autocast, and small tensors stay. A copy runs beside the computation, on a
    stream of its own.

    Args:
        model: whose weights stay.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = list(model.parameters())
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights if weight.is_cuda}
        # Under autocast a product saves a copy of the weight, which has its shape, or turned by a quarter.
        self._shapes = {frozenset(weight.shape) for weight in weights if weight.dim() == 2}
        super().__init__(self._pack, self._unpack)

    def moves(self, tensor: Tensor) -> bool:
        """Return whether a saved tensor leaves the GPU."""
        if not (tensor.is_cuda or _planned.get()) or tensor.nbytes < SMALL:
            return False
        if tensor.dim() == 2 and frozenset(tensor.shape) in self._shapes:
            return False
        return _planned.get() or tensor.untyped_storage().data_ptr() not in self._weights

    def _pack(self, tensor: Tensor) -> Tensor | _Away:
        return _Away(tensor) if self.moves(tensor) else tensor

    @staticmethod
    def _unpack(kept: Tensor | _Away) -> Tensor:
        return kept.back() if isinstance(kept, _Away) else kept


class _Away:
    """A saved tensor that is on the host.

    Args:
        tensor: on a GPU.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.device, self._ready = tensor.device, None
        if _planned.get():  # on tensors without data, whose bytes on a GPU are added up
            self._host = tensor.new_empty(()).expand(tensor.shape)
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream = _stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        self._ready = stream.record_event()

    def back(self) -> Tensor:
        """Return the tensor on its device."""
        if self._ready is None:
            return torch.empty_like(self._host, memory_format=torch.contiguous_format)
        torch.cuda.current_stream(self.device).wait_event(self._ready)
        return self._host.to(self.device, non_blocking=True)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of copies to the host."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


@contextmanager
def offloading_as_on_gpu() -> Iterator[None]:
    """Let tensors without data leave as on a GPU, so that their bytes can be added up on a CPU."""
    token = _planned.set(True)
    try:
        yield
    finally:
        _planned.reset(token)
