"""What of a model's weights this process holds, whatever the strategy: one place for EMA, projection and
checkpoints to read and write them.
"""

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
        size: its elements.
        values: flat view of the numbers that count: the float32 master where the strategy keeps one, else the
            weight itself. Empty while they lie on a disk (LocalWeights.loaded).
        owned: whether it is this rank that saves it (a tensor that every rank holds whole is saved by rank
            0).
        flat, offset: the optimizer's own tensor that `values` is a part of, and where; None where no
            optimizer steps it.
        parameter: of the module, where ranks hold it in parts.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    size: int
    values: Tensor
    owned: bool = True
    flat: Tensor | None = None
    offset: int = 0
    parameter: nn.Parameter | None = None


Change = tuple[nn.Parameter, Callable[[Tensor], object]]
"""A parameter, and what changes a stretch of it in place, each element by itself."""


class LocalWeights(ABC):
    """The floating tensors of a module as this rank holds them."""

    sharded = True

    @abstractmethod
    def fragments(self, module: nn.Module) -> list[Fragment]:
        """Every floating weight and buffer of the module's state, or this rank's stretch of it."""

    def lots(self, fragments: Sequence[Fragment]) -> list[list[Fragment]]:
        """The fragments by what is in memory at one time; all in one where nothing lies on a disk."""
        return [list(fragments)]

    def loaded(self, lot: list[Fragment], changed: bool = False) -> AbstractContextManager[list[Fragment]]:
        """A context in which the values of a lot, and the optimizer's state of them, are in memory;
        `changed` keeps what is written into them.
        """
        return nullcontext(lot)

    def change(self, changes: Sequence[Change]) -> None:
        """Changes parameters in place, in every tensor of this process that holds values of them. Every
        rank calls it.
        """
        for parameter, function in changes:
            for values in self._copies(parameter):
                function(values)

    @abstractmethod
    def _copies(self, parameter: nn.Parameter) -> list[Tensor]:
        """All tensors of this process that hold values of a parameter."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """A context in which parameters can be read whole. Every rank enters it."""
        return nullcontext()

    @abstractmethod
    def publish(self, module: nn.Module) -> None:
        """The next forward of every rank sees what was written into `values`."""

    @abstractmethod
    def swapped(self, module: nn.Module, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A context in which forwards of the module see other values (flat stretches by fragment name);
        after it, its own again, bit for bit.
        """


class WholeWeights(LocalWeights):
    """One device, or DDP: every rank holds everything."""

    sharded = False

    def fragments(self, module: nn.Module) -> list[Fragment]:
        return [_whole_fragment(name, tensor) for name, tensor in floating_state(module).items()]

    def _copies(self, parameter: nn.Parameter) -> list[Tensor]:
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
    return {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.is_floating_point()
    }


def _whole_fragment(name: str, tensor: Tensor, owned: bool = True) -> Fragment:
    return Fragment(name, tuple(tensor.shape), 0, tensor.numel(), tensor.detach().reshape(-1), owned)


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
        return [
            (name, cast(nn.Parameter, tensor))
            for name, tensor in floating_state(module).items()
            if self._splits(tensor)
        ]

    def _whole(self, module: nn.Module) -> list[Fragment]:
        """Buffers, and at stages 1 and 2 frozen weights."""
        state = {name: tensor for name, tensor in floating_state(module).items() if not self._splits(tensor)}
        return [_whole_fragment(name, tensor, owned=self.rank == 0) for name, tensor in state.items()]

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
    """ZeRO stages 1 and 2: weights whole on every rank, float32 masters in one flat stretch a group of
    parameters and rank.
    """

    def _splits(self, tensor: Tensor) -> bool:
        return hasattr(tensor, "_hp_mapping")

    def _stretch(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        mapping = cast(Any, parameter)._hp_mapping
        if mapping is None:
            return None
        flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
        values = mapping.hp_fragment.detach()
        return Fragment(
            name,
            tuple(parameter.shape),
            start,
            len(values),
            values,
            flat=flat,
            offset=offset,
            parameter=parameter,
        )

    def _copies(self, parameter: nn.Parameter) -> list[Tensor]:
        stretch = self._stretch("", parameter) if self._splits(parameter) else None
        return [parameter.data, *([stretch.values] if stretch is not None else [])]

    def publish(self, module: nn.Module) -> None:
        self._spread(self.optimizer.single_partition_of_fp32_groups)

    @torch.no_grad()
    def _spread(self, parts: Sequence[Tensor]) -> None:
        """Puts every rank's part of each group into the weights of all ranks."""
        groups = zip(
            parts, self.optimizer.bit16_groups_flat, self.optimizer.real_dp_process_group, strict=True
        )
        for part, weights, process_group in groups:
            places = list(weights.view(distributed.get_world_size(process_group), -1))
            distributed.all_gather(
                places, part.detach().to(weights.device, weights.dtype), group=process_group
            )

    @contextmanager
    def _swapped_parts(self, module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
        masters = self.optimizer.single_partition_of_fp32_groups
        parts = [part.detach().clone() for part in masters]
        number = {id(flat): index for index, flat in enumerate(masters)}
        for fragment in self.fragments(module):
            if fragment.flat is not None:
                parts[number[id(fragment.flat)]].narrow(0, fragment.offset, fragment.size).copy_(
                    values[fragment.name]
                )
        self._spread(parts)
        try:
            yield
        finally:
            self.publish(module)


class Zero3Weights(ZeroWeights):
    """ZeRO stage 3: every rank holds an equal stretch of each weight, and in training a float32 master of
    it.
    """

    def _splits(self, tensor: Tensor) -> bool:
        return hasattr(tensor, "ds_id")

    def _stretch(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        held = cast(Any, parameter)
        size = held.ds_tensor.ds_numel
        start = size * held.ds_zero_partition_rank
        numel = min(size, held.ds_numel - start)  # the last ranks' stretches are padded
        if numel <= 0:
            return None
        flat, offset = None, 0
        if self.optimizer is not None and parameter.requires_grad:
            group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
        values = self._part(held.ds_tensor if flat is None else flat, offset, numel)
        return Fragment(
            name, tuple(held.ds_shape), start, numel, values, flat=flat, offset=offset, parameter=parameter
        )

    def _part(self, held: Tensor, offset: int, numel: int) -> Tensor:
        return held.detach().narrow(0, offset, numel)

    def _copies(self, parameter: nn.Parameter) -> list[Tensor]:
        held, stretch = cast(Any, parameter), self._stretch("", parameter)
        tensors = [held.ds_tensor, *([stretch.values] if stretch is not None else [])]
        return (
            [*tensors, parameter.data] if parameter.numel() else tensors
        )  # a small weight stays whole besides

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        split: list[Any] = [
            parameter for parameter in parameters if self._splits(parameter) and not parameter.numel()
        ]
        self._gather(split)
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
                    cast(Any, parameter).ds_tensor.narrow(0, 0, stretch.size).copy_(stretch.values)

    @contextmanager
    def _released(self, module: nn.Module) -> Iterator[None]:
        """Small weights, which stay whole on every rank, are put together anew after their stretches were
        changed inside.
        """
        whole = [cast(Any, parameter) for _, parameter in self._split(module) if parameter.numel()]
        if whole:
            whole[0].partition(whole)
        yield
        self._gather(whole)

    def _gather(self, parameters: list[Any]) -> None:
        if parameters:
            parameters[0].all_gather(parameters)

    @contextmanager
    def _swapped_parts(self, module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
        split = [
            (name, parameter) for name, parameter in self._split(module) if name in values
        ]  # not where the whole stretch is padding
        with self._released(module):
            put_back = [self._show(parameter, values[name]) for name, parameter in split]
        try:
            yield
        finally:
            with self._released(module):
                for restore in put_back:
                    restore()

    def _show(self, parameter: nn.Parameter, values: Tensor) -> Callable[[], None]:
        """Puts other values into this rank's stretch of a weight; returns what puts its own back."""
        stretch = cast(Any, parameter).ds_tensor
        own = stretch.data
        stretch.data = padded(values.to(stretch.device, stretch.dtype), stretch.ds_numel)

        def restore() -> None:
            stretch.data = own

        return restore


def padded(values: Tensor, size: int) -> Tensor:
    """A flat tensor with zeros behind it."""
    return nn.functional.pad(values, (0, size - len(values)))


def local_weights(trainer: pl.Trainer) -> LocalWeights:
    """How this process holds the weights of the trainer's module."""
    return cast(LocalWeights, getattr(trainer.strategy, "local_weights", None) or WholeWeights())


def run_forward(trainer: pl.Trainer, function: Callable[[], Any]) -> Any:
    """Calls a function that runs the module's forward outside of Lightning's steps, as a step would: autocast
    on, split weights gathered.

    Every rank calls it.
    """
    inside = getattr(trainer.strategy, "forward_inside", None)
    if inside is not None:
        return inside(function)
    with trainer.precision_plugin.val_step_context():
        return function()
