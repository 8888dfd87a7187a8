"""What of a model's weights this process holds, whatever the strategy: one place for EMA, projection and checkpoints to read and write them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Fragment:
    """A stretch of a weight or buffer that this rank holds.

    Attributes:
        name: of the tensor in the module.
        shape: of the whole tensor.
        start: first element of the stretch, in the flattened tensor.
        values: flat view of the numbers that count: the float32 master where the strategy keeps one, else the weight itself.
        owned: whether it is this rank that saves it (a tensor that every rank holds whole is saved by rank 0).
        flat, offset: the optimizer's own tensor that `values` is a part of, and where; None where no optimizer steps it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    owned: bool = True
    flat: Tensor | None = None
    offset: int = 0


class LocalWeights(ABC):
    """The floating tensors of a module as this rank holds them."""

    sharded = True

    @abstractmethod
    def fragments(self, module: nn.Module) -> list[Fragment]:
        """Every floating weight and buffer of the module's state, or this rank's stretch of it."""

    @abstractmethod
    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        """All tensors of this process that hold values of a parameter: what changes one element by itself must change it in each of them."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """A context in which parameters can be read whole. Every rank enters it."""
        return nullcontext()

    @abstractmethod
    def publish(self, module: nn.Module) -> None:
        """The next forward of every rank sees what was written into `values`."""

    @abstractmethod
    def swapped(self, module: nn.Module, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A context in which forwards of the module see other values (flat stretches by fragment name); after it, its own again, bit for bit."""


class WholeWeights(LocalWeights):
    """One device, or DDP: every rank holds everything."""

    sharded = False

    def fragments(self, module: nn.Module) -> list[Fragment]:
        return [Fragment(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1)) for name, tensor in floating_state(module).items()]

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        return [parameter.data]

    def publish(self, module: nn.Module) -> None:
        """Nothing: weights and values are the same tensors."""

    @contextmanager
    def swapped(self, module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
        tensors = floating_state(module)
        own = {name: tensor.data for name, tensor in tensors.items()}
        try:
            for name, tensor in tensors.items():
                tensor.data = values[name].view(tensor.shape).to(tensor.dtype)
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.data = own[name]


def floating_state(module: nn.Module) -> dict[str, Tensor]:
    """Floating tensors of a module's state by name, the parameters themselves rather than copies."""
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_floating_point()}


class ZeroWeights(LocalWeights):
    """What the ZeRO stages share.

    Args:
        optimizer: DeepSpeed's; None in validation, where stage 3 alone splits anything.
        rank: of this process.
    """

    def __init__(self, optimizer: Any, rank: int) -> None:
        self.optimizer, self.rank = optimizer, rank

    @abstractmethod
    def _splits(self, tensor: Tensor) -> bool:
        """Whether ranks hold parts of a parameter."""

    @abstractmethod
    def _stretch(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        """This rank's stretch of a split parameter; None where it has none."""

    def fragments(self, module: nn.Module) -> list[Fragment]:
        stretches = [self._stretch(name, parameter) for name, parameter in self._split(module)]
        return [*(stretch for stretch in stretches if stretch is not None), *self._whole(module)]

    def _split(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(name, cast(nn.Parameter, tensor)) for name, tensor in floating_state(module).items() if self._splits(tensor)]

    def _whole(self, module: nn.Module) -> list[Fragment]:
        """Buffers, and at stages 1 and 2 frozen weights."""
        state = {name: tensor for name, tensor in floating_state(module).items() if not self._splits(tensor)}
        return [Fragment(name, tuple(tensor.shape), 0, tensor.detach().view(-1), self.rank == 0) for name, tensor in state.items()]

    @contextmanager
    def swapped(self, module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
        whole = self._whole(module)
        own = [fragment.values.clone() for fragment in whole]
        for fragment in whole:
            fragment.values.copy_(values[fragment.name])
        try:
            with self._swapped_parts(module, values):
                yield
        finally:
            for fragment, numbers in zip(whole, own, strict=True):
                fragment.values.copy_(numbers)

    @abstractmethod
    def _swapped_parts(self, module: nn.Module, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """:meth:`swapped` for the split weights."""


class Zero12Weights(ZeroWeights):
    """ZeRO stages 1 and 2: weights whole on every rank, float32 masters in one flat stretch a group of parameters and rank."""

    def _splits(self, tensor: Tensor) -> bool:
        return hasattr(tensor, "_hp_mapping")

    def _stretch(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        mapping = cast(Any, parameter)._hp_mapping
        if mapping is None:
            return None
        flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
        return Fragment(name, tuple(parameter.shape), start, mapping.hp_fragment.detach(), flat=flat, offset=offset)

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        stretch = self._stretch("", parameter) if self._splits(parameter) else None
        return [parameter.data, *([stretch.values] if stretch is not None else [])]

    def publish(self, module: nn.Module) -> None:
        self._spread(self.optimizer.single_partition_of_fp32_groups)

    @torch.no_grad()
    def _spread(self, parts: Sequence[Tensor]) -> None:
        """Puts every rank's part of each group into the weights of all ranks."""
        groups = zip(parts, self.optimizer.bit16_groups_flat, self.optimizer.real_dp_process_group, strict=True)
        for part, weights, process_group in groups:
            places = list(weights.view(distributed.get_world_size(process_group), -1))
            distributed.all_gather(places, part.detach().to(weights.device, weights.dtype), group=process_group)

    @contextmanager
    def _swapped_parts(self, module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
        masters = self.optimizer.single_partition_of_fp32_groups
        parts = [part.detach().clone() for part in masters]
        number = {id(flat): index for index, flat in enumerate(masters)}
        for fragment in self.fragments(module):
            if fragment.flat is not None:
                parts[number[id(fragment.flat)]].narrow(0, fragment.offset, len(fragment.values)).copy_(values[fragment.name])
        self._spread(parts)
        try:
            yield
        finally:
            self.publish(module)


class Zero3Weights(ZeroWeights):
    """ZeRO stage 3: every rank holds an equal stretch of each weight, and in training a float32 master of it."""

    def _splits(self, tensor: Tensor) -> bool:
        return hasattr(tensor, "ds_id")

    def _stretch(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        held = cast(Any, parameter)
        size = held.ds_tensor.ds_numel
        start = size * held.ds_zero_partition_rank
        numel = min(size, held.ds_numel - start)  # the last ranks' stretches are padded
        if numel <= 0:
            return None
        values, flat, offset = held.ds_tensor.detach(), None, 0
        if self.optimizer is not None and parameter.requires_grad:
            group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
            values = flat.detach().narrow(0, offset, size)
        return Fragment(name, tuple(held.ds_shape), start, values.narrow(0, 0, numel), flat=flat, offset=offset)

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        held, stretch = cast(Any, parameter), self._stretch("", parameter)
        tensors = [held.ds_tensor, *([stretch.values] if stretch is not None else [])]
        return [*tensors, parameter.data] if parameter.numel() else tensors  # a small weight stays whole besides

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        split: list[Any] = [parameter for parameter in parameters if self._splits(parameter) and not parameter.numel()]
        if split:
            split[0].all_gather(split)
        try:
            yield
        finally:
            if split:
                split[0].partition(split)

    @torch.no_grad()
    def publish(self, module: nn.Module) -> None:
        with self._released(module):
            for name, parameter in self._split(module):
                stretch = self._stretch(name, parameter)
                if stretch is not None:
                    cast(Any, parameter).ds_tensor.narrow(0, 0, len(stretch.values)).copy_(stretch.values)

    @contextmanager
    def _released(self, module: nn.Module) -> Iterator[None]:
        """Small weights, which stay whole on every rank, are put together anew after their stretches were changed inside."""
        whole = [cast(Any, parameter) for _, parameter in self._split(module) if parameter.numel()]
        if whole:
            whole[0].partition(whole)
        yield
        if whole:
            whole[0].all_gather(whole)

    @contextmanager
    def _swapped_parts(self, module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
        stretches = [cast(Any, parameter).ds_tensor for _, parameter in self._split(module)]
        own = [stretch.data for stretch in stretches]
        with self._released(module):
            for (name, _), stretch in zip(self._split(module), stretches, strict=True):
                if name in values:  # not where the whole stretch is padding
                    numbers = values[name].to(stretch.device, stretch.dtype)
                    stretch.data = nn.functional.pad(numbers, (0, stretch.ds_numel - len(numbers)))
        try:
            yield
        finally:
            with self._released(module):
                for stretch, numbers in zip(stretches, own, strict=True):
                    stretch.data = numbers


def local_weights(trainer: pl.Trainer) -> LocalWeights:
    """How this process holds the weights of the trainer's module."""
    return cast(LocalWeights, getattr(trainer.strategy, "local_weights", None) or WholeWeights())


def run_forward(trainer: pl.Trainer, function: Callable[[], Any]) -> Any:
    """Calls a function that runs the module's forward outside of Lightning's steps, as a step would: autocast on, split weights gathered.

    Every rank calls it.
    """
    inside = getattr(trainer.strategy, "forward_inside", None)
    if inside is not None:
        return inside(function)
    with trainer.precision_plugin.val_step_context():
        return function()
