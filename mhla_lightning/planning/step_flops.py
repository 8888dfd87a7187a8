"""FLOPs that a training step spends on running parts of the forward again, counted by torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.backbones.activations import Activations
from mhla_lightning.planning.step_memory import Precision, in_few_layers, rehearsed_step
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

    return in_few_layers(task, count) // micro_batch


def step_flops(task: Task, micro_batch: int, precision: Precision) -> int:
    """Return the FLOPs of a micro batch's forward and backward, 2 a multiply-add; matrix products count."""
    with (
        rehearsed_step(task, micro_batch, precision) as step,
        FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter,
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


# torch counts the kernels of GPUs only.
_ON_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
