"""Peak memory of a piece of work, on a GPU or on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mhla_lightning.planning.torch_modes import TorchDispatchMode, tensors_in


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes of the tensors that `work` holds at once, at most.

    On CUDA torch's own statistics count. The CPU's allocator keeps none, so every new tensor is counted.

    Args:
        work: called once, without arguments. On a CPU a tensor that exists before the call counts once an
            operation returns a view of it or changes it in place.
        device: where the tensors are.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _Storages(device.type) as storages:
        work()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live.

    torch's MemTracker does the same by module, for which it keeps all activations alive.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.held, self.peak = kind, 0, 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if tensor.device.type == self.kind:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.held -= size
