"""Memory of a training step beside weights, gradients and optimizer.

Measured on tensors without data, for a model of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhla_lightning.backbones import default_options
from mhla_lightning.backbones.activations import offloading_as_on_gpu
from mhla_lightning.planning.memory import peak_bytes
from mhla_lightning.planning.torch_modes import (
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    tensors_in,
    unset_fake_temporarily,
)
from mhla_lightning.strategies.config import known_precision
from mhla_lightning.tasks import Task
from mhla_lightning.tasks.token_loss import chunks_as_on_gpu

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Precision:
    """What `trainer.precision` means for memory.

    Attributes:
        name: as Lightning calls it, with its ending.
        weights: dtype of weights and activations.
        autocast: dtype of matrix products where they differ from the weights; None without autocast.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None = None


# float16 takes as many bytes as bfloat16, which every operator has on a CPU.
_PRECISIONS = {
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.bfloat16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.bfloat16, None),
}


def find_precision(name: str | int) -> Precision:
    """The precision of `trainer.precision`. Raises UserError for one whose memory is not known."""
    known = known_precision(name)
    return Precision(known, *_PRECISIONS[known])


def activation_bytes(task: Task, micro_batch: int, precision: Precision, *, extrapolate: bool = True) -> int:
    """Return the peak bytes of forward and backward of a micro batch.

    Weights, gradients and the batch itself do not count.

    The task's own training step runs on tensors without data, and its allocations are added up.
    Where all layers of a model are alike, the bytes are linear in their number.
    A deep model is therefore measured twice, with few layers.

    Attention is torch's fused kernel, as on a GPU, without a matrix of tokens x tokens.
    Softmax that keeps documents apart is the exception: its mask is such a matrix.

    Args:
        task: without weights; it is not changed.
        micro_batch: samples.
        precision: of the step.
        extrapolate: False measures all layers.
    """

    def measure(few: Task) -> int:
        return _measure(few, micro_batch, precision)

    return in_few_layers(task, measure) if extrapolate else measure(task.rehearsal())


def in_few_layers(task: Task, measure: Callable[[Task], int]) -> int:
    """Return what `measure` would give for a task, from two copies with few layers.

    It is linear in the number of layers where all are alike. A shallow task is measured itself.

    Args:
        task: without weights; it is not changed.
        measure: called with a copy that it may change.
    """
    depth, cycle = layers(task), _cycle(task.attention)
    few = (
        depth % cycle + max(2, cycle) if depth is not None else 0
    )  # what is left of the depth makes whole cycles
    if depth is None or depth <= few + cycle:
        return measure(task.rehearsal())
    small, large = (measure(task.rehearsal(count)) for count in (few, few + cycle))
    return small + (large - small) * (depth - few) // cycle


def layers(task: Task) -> int | None:
    """How many layers a task's backbone has; None where it has no such option."""
    options = {**default_options(task.backbone_name), **task.backbone_options}
    return int(options["depth"]) if "depth" in options else None


def _cycle(attention: str | Mapping[str, Any] | Sequence[Any]) -> int:
    return len(attention) if isinstance(attention, Sequence) and not isinstance(attention, str) else 1


def _measure(task: Task, micro_batch: int, precision: Precision) -> int:
    with rehearsed_step(task, micro_batch, precision) as step:
        return peak_bytes(step, CPU)


@contextmanager
def rehearsed_step(task: Task, micro_batch: int, precision: Precision) -> Iterator[Callable[[], None]]:
    """Yield a training step on tensors without data, as a GPU would run it.

    The task gets weights.
    """
    example = task.example_batch(micro_batch)
    with chunks_as_on_gpu(), offloading_as_on_gpu(), FakeTensorMode(allow_non_fake_inputs=True), _Known():
        build(task, precision)
        samples = {
            name: torch.empty(x.shape, dtype=precision.weights) for name, x in example.items() if x.is_meta
        }
        yield training_step(task, example | samples, precision)


def build(task: Task, precision: Precision) -> None:
    """Gives a task weights and gradients in a precision, ready for a step of accumulation."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(precision.weights)  # as Lightning builds a model of true precision
    try:
        task.configure_model()
    finally:
        torch.set_default_dtype(before)
    _convert(task, precision.weights)
    for parameter in task.train().parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


def _convert(task: Task, dtype: torch.dtype) -> None:
    """Change the dtype of weights and buffers as Lightning's module.to(dtype) does.

    Tensors without data refuse `.to(dtype)` on a module.
    """
    for module in task.modules():
        held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, x in held:
            if x.is_floating_point() and x.dtype != dtype:
                changed = x.detach().to(dtype)
                is_weight = isinstance(x, nn.Parameter)
                setattr(module, name, nn.Parameter(changed, x.requires_grad) if is_weight else changed)


def training_step(task: Task, batch: Mapping[str, Tensor], precision: Precision) -> Callable[[], None]:
    """Forward and backward of a batch as Lightning runs them."""
    complete = {"key": [""] * len(batch["weight"]), **batch}  # as of our loaders, whose labels nobody checks

    def step() -> None:
        with torch.autocast(
            "cpu",
            precision.autocast or torch.bfloat16,
            enabled=precision.autocast is not None,
            cache_enabled=False,
        ):
            loss = cast(Tensor, task.training_step(complete, 0))
        loss.backward()

    return step


# A number among tensors (torch.where makes a tensor of it), and what timm reads the rates of its layers off.
_VALUES = {torch.ops.aten.scalar_tensor.default, torch.ops.aten.linspace.default}


_LARGEST = 2**22  # elements that are computed; a mask of tokens x tokens is only added up


def _elements(tensors: Sequence[Tensor]) -> int:
    """Of the largest tensor, or of what elementwise operations make of all."""
    try:
        return math.prod(torch.broadcast_shapes(*(x.shape for x in tensors)))
    except RuntimeError:
        return max(x.numel() for x in tensors)


class _Known(TorchDispatchMode):
    """Compute operations whose tensors all have data, inside a FakeTensorMode.

    These are keys, labels, documents and times: their values can then be read.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        tensors = list(tensors_in((args, kwargs or {})))
        known = (tensors or func in _VALUES) and not any(isinstance(x, FakeTensor) for x in tensors)
        if known and _elements(tensors) <= _LARGEST:
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
