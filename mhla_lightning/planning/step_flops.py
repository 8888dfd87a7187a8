"""FLOPs that a training step spends on running parts of the forward again, counted by torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.backbones.activations import Activations
from mhla_lightning.planning.step_memory import Precision, in_few_layers, rehearsed_step
from mhla_lightning.planning.torch_modes import TorchDispatchMode
from mhla_lightning.tasks import Task

RECOMPUTING: tuple[Activations, ...] = ("blocks", "attention")


def recomputed_flops(task: Task, micro_batch: int, precision: Precision) -> int:
    """Return the FLOPs of one sample that `checkpoint_activations` adds to a training step.

    The step runs twice on tensors without data, with and without recomputation, and torch counts both.
    torch stops running a block again once it has what the backward needs.
    So this is less than a second forward.

    Args:
        task: without weights; it is not changed.
        micro_batch: samples of the counted step.
        precision: of the step.
    """
    if task.checkpoint_activations not in RECOMPUTING:
        return 0

    def count(few: Task) -> int:
        again, once = (
            step_flops(_keeping(few, how), micro_batch, precision)
            for how in (task.checkpoint_activations, "none")
        )
        return again - once

    added = in_few_layers(task, count) // micro_batch
    return round(added * task.flops_per_sample / task.largest_flops)  # of samples of all sizes on average


def step_flops(task: Task, micro_batch: int, precision: Precision) -> int:
    """Return the FLOPs of a micro batch's forward and backward.

    Matrix products and convolutions count, 2 a multiply-add.
    """
    with (
        rehearsed_step(task, micro_batch, precision) as step,
        FlopCounterMode(display=False, custom_mapping=_kernels_of_cpu()) as counter,
    ):
        step()
    return counter.get_total_flops()


def _keeping(task: Task, how: Activations) -> Task:
    twin = copy.deepcopy(task)
    twin.checkpoint_activations = how
    return twin


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Count q k^T and the product with v, of shapes (batch, heads, tokens, dim)."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _attention_backward(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any
) -> int:
    """Count five products: q k^T again, and the gradients of the weights, v, q and k."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


class _Seen(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.operators.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


@cache
def _kernels_of_cpu() -> dict[Any, Callable[..., int]]:
    """Return FLOP formulas of the CPU's fused attention, by operator.

    torch itself counts those of GPUs only.
    """
    q, k, v = (torch.zeros(1, 1, 2, 8, requires_grad=True) for _ in range(3))
    with _Seen() as seen:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    fused = [operator for operator in seen.operators if "attention" in str(operator)]
    return {one: _attention_backward if "backward" in str(one) else _attention for one in fused}
