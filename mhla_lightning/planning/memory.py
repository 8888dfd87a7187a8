"""Peak memory of a piece of work: CUDA's statistics there, torch's MemTracker on CPU, whose allocator
keeps none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes of the tensors that `work` holds at once, at most; what was there before does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    tracker = MemTracker()
    tracker._mod_tracker = _NoModules()
    with tracker:
        work()
    peaks = tracker.get_tracker_snapshot("peak")
    return sum(int(kinds["Total"]) for where, kinds in peaks.items() if where.type == device.type)


class _NoModules(ModTracker):
    """torch's own puts hooks on the graph of every module it sees, which keep all activations for good;
    bytes in all need none of them.
    """

    def _fw_pre_hook(self, mod: nn.Module, input: Any) -> None:
        """Nothing."""

    def _fw_post_hook(self, mod: nn.Module, input: Any, output: Any) -> None:
        """Nothing."""
