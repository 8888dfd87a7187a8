"""Memory of weights, gradients, optimizer and averages on one GPU, by strategy.

Pure functions of shapes and of DeepSpeed's configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mhla_lightning.planning.step_memory import Precision
from mhla_lightning.tasks import Task

Shape = tuple[int, ...]
_FLOAT = 4  # bytes of float32: moments, masters, averages
_COUNTER = 4  # bytes of AdamW's count of steps, one a tensor
_ALIGNMENT = 2  # elements a rank that DeepSpeed's flat groups are filled up to


@dataclass(frozen=True)
class ModelSize:
    """The tensors of a model, by what a strategy does with them.

    Attributes:
        trained: shapes of the parameters that train, by group of the optimizer.
        frozen: shapes of the others.
        floats: elements of floating buffers, which averages take too.
        fixed: bytes that every rank holds whatever the strategy: buffers, and a frozen teacher.
    """

    trained: tuple[tuple[Shape, ...], ...]
    frozen: tuple[Shape, ...] = ()
    floats: int = 0
    fixed: int = 0

    @classmethod
    def of(cls, task: Task) -> ModelSize:
        """Of a task with its backbone, on any device."""
        assert task.backbone is not None, "configure_model has not run"
        groups = tuple(
            tuple(tuple(p.shape) for p in group["params"]) for group in task.build_optimizer().param_groups
        )
        frozen = tuple(tuple(p.shape) for p in task.backbone.parameters() if not p.requires_grad)
        state = task.backbone.state_dict(keep_vars=True).values()
        floats = sum(
            x.numel() for x in state if x.is_floating_point() and not isinstance(x, torch.nn.Parameter)
        )
        frozen_models = [p for model in task.frozen_models() for p in model.parameters()]
        held = [*task.buffers(), *frozen_models]
        return cls(groups, frozen, floats, sum(x.numel() * x.element_size() for x in held))

    @property
    def trained_elements(self) -> int:
        return sum(map(elements, self.trained))

    @property
    def elements(self) -> int:
        """Parameters."""
        return self.trained_elements + elements(self.frozen)


@dataclass(frozen=True)
class StateMemory:
    """Bytes of one GPU, and of what is moved from it.

    Attributes:
        strategy: name of the preset.
        weights, gradients, optimizer: float32 masters count as optimizer.
        average: of the EMA.
        buffers: what the strategy gathers and sends in.
        step: what the optimizer's step takes for a moment beside all that.
        host, disk: moved to the host's memory, or to its disk, by each GPU.
    """

    strategy: str
    weights: int
    gradients: int
    optimizer: int
    average: int
    buffers: int
    step: int
    host: int = 0
    disk: int = 0

    def total(self, activations: int) -> int:
        """The most that is held at once: activations are gone when the optimizer steps."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.average
            + self.buffers
            + max(activations, self.step)
        )


def elements(shapes: Iterable[Shape]) -> int:
    """Elements of tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


def replicated(model: ModelSize, precision: Precision, average: bool) -> StateMemory:
    """One GPU, or DDP, whose buckets are the gradients: every rank holds everything.

    AdamW's moments have the weights' dtype, and its fused step takes no memory.
    """
    width, trained = precision.weights.itemsize, model.trained_elements
    return StateMemory(
        "ddp",
        weights=model.elements * width + model.fixed,
        gradients=trained * width,
        optimizer=2 * trained * width + _COUNTER * sum(map(len, model.trained)),
        average=_FLOAT * (model.elements + model.floats) if average else 0,
        buffers=0,
        step=0,
    )


def partitioned(
    name: str,
    model: ModelSize,
    precision: Precision,
    ranks: int,
    average: bool,
    config: Mapping[str, Any],
    gradient_width: int | None = None,
) -> StateMemory:
    """A ZeRO stage.

    Args:
        name: of the preset.
        model, precision: see their classes.
        ranks: over which the state is split.
        average: an EMA is kept, of the part that a rank owns.
        config: DeepSpeed's `zero_optimization`.
        gradient_width: bytes of an accumulated gradient; None is that of a weight.
    """
    width = precision.weights.itemsize
    gradient_width = gradient_width or width
    stage = int(config["stage"])
    split = _split_tensors if stage == 3 else _split_groups
    owned = sum(split(group, ranks) for group in model.trained)
    # Every stage clones a float32 master of what it owns, also where weights are float32: stage 3 means not
    # to, but compares a device with a string.
    state = StateMemory(
        name,
        weights=_weights(model, ranks, width, config) + model.fixed,
        gradients=gradient_width * (model.trained_elements if stage == 1 else owned),
        optimizer=3 * _FLOAT * owned + _COUNTER * len(model.trained),
        average=_FLOAT * (owned + _kept_whole(model, ranks, stage) + model.floats) if average else 0,
        buffers=_buffers(model, width, config),
        step=2
        * _FLOAT
        * max((split(group, ranks) for group in model.trained), default=0),  # flat gradients, square roots
    )
    return _offloaded(state, owned * width, width, config)


def _weights(model: ModelSize, ranks: int, width: int, config: Mapping[str, Any]) -> int:
    if config["stage"] < 3:
        flat = sum(_split_groups(group, ranks) * ranks for group in model.trained)
        return width * (flat + elements(model.frozen))
    shapes = [*(shape for group in model.trained for shape in group), *model.frozen]
    small = [
        shape for shape in shapes if math.prod(shape) < config.get("stage3_param_persistence_threshold", 1e5)
    ]
    return width * (
        _split_tensors(shapes, ranks) + elements(small)
    )  # small ones stay whole beside their parts


def _kept_whole(model: ModelSize, ranks: int, stage: int) -> int:
    """Elements of frozen weights on a rank."""
    return _split_tensors(model.frozen, ranks) if stage == 3 else elements(model.frozen)


def _buffers(model: ModelSize, width: int, config: Mapping[str, Any]) -> int:
    bucket = min(int(config.get("reduce_bucket_size", 5e8)), model.trained_elements) * width
    if config["stage"] < 3:
        return bucket * (2 if config.get("overlap_comm") else 1)
    # Weights stay gathered while they are used again within so many elements, forward and backward together,
    # and those ahead are fetched.
    reuse, ahead = (
        config.get("stage3_max_reuse_distance", 1e9),
        config.get("stage3_prefetch_bucket_size", 5e7),
    )
    gathered = min(model.elements, int(reuse / 2 + ahead), int(config.get("stage3_max_live_parameters", 1e9)))
    return bucket + width * gathered


def _split_groups(shapes: Sequence[Shape], ranks: int) -> int:
    """Elements of one rank of a group laid flat, filled up to a multiple of 2 x ranks."""
    return _ALIGNMENT * math.ceil(elements(shapes) / (_ALIGNMENT * ranks))


def _split_tensors(shapes: Sequence[Shape], ranks: int) -> int:
    """Elements of one rank of tensors that are each split, filled up to a multiple of the ranks."""
    return sum(math.ceil(math.prod(shape) / ranks) for shape in shapes)


def _offloaded(state: StateMemory, weights: int, width: int, config: Mapping[str, Any]) -> StateMemory:
    """Move to host or disk what the configuration moves.

    `offload_optimizer` moves optimizer, masters, gradients and average; `offload_param` moves split
    weights.

    weights: bytes of the split weights. width: bytes of a weight.
    """
    places = {
        key: (config.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")
    }
    if places["offload_optimizer"] != "none":
        owned, on_disk = weights // width, places["offload_optimizer"] == "nvme"
        # Gradients in float32, the average, and at stage 2 what goes back to the GPU stay in the host's
        # memory wherever the optimizer lies.
        near = _FLOAT * owned + state.average + (width * owned if config["stage"] < 3 else 0)
        host, disk = (near, state.optimizer) if on_disk else (near + state.optimizer, 0)
        state = replace(state, optimizer=0, gradients=0, average=0, step=0, host=host, disk=disk)
    if places["offload_param"] != "none":
        on_disk = places["offload_param"] == "nvme"
        state = replace(
            state,
            weights=state.weights - weights,
            host=state.host + (0 if on_disk else weights),
            disk=state.disk + on_disk * weights,
        )
    return state
