"""The part of a model's weights that a rank holds under DeepSpeed's ZeRO."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from mhla_lightning.strategies.local import Fragment, LocalWeights, floating_state, whole_fragment
from mhla_lightning.strategies.zero.patches import NO_MASTER, master_of


class ZeroWeights(LocalWeights):
    """The weights under any stage of ZeRO.

    Args:
        optimizer: DeepSpeed's; None in validation, where only stage 3 splits anything.
        rank: of this process.
    """

    def __init__(self, optimizer: Any, rank: int) -> None:
        self.optimizer, self.rank = optimizer, rank

    @abstractmethod
    def _splits(self, tensor: Tensor) -> bool:
        """Whether ranks hold parts of a parameter."""

    @abstractmethod
    def _stretch(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        """Return this rank's stretch of a split parameter; None where it has none."""

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
        """Return buffers, and at stages 1 and 2 frozen weights."""
        state = {name: tensor for name, tensor in floating_state(module).items() if not self._splits(tensor)}
        return [whole_fragment(name, tensor, owned=self.rank == 0) for name, tensor in state.items()]

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
        """Return the context of :meth:`swapped` for the split weights."""


class Zero12Weights(ZeroWeights):
    """ZeRO stages 1 and 2: whole weights, split float32 masters.

    The masters of a group of parameters are one flat tensor per rank.
    """

    def _splits(self, tensor: Tensor) -> bool:
        return master_of(tensor) is not NO_MASTER

    def _stretch(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        mapping = master_of(parameter)
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
        """Put every rank's part of each group into the weights of all ranks."""
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
    """ZeRO stage 3: every rank holds an equal stretch of each weight.

    In training it also holds a float32 master of the stretch.
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
        # A small weight also stays whole on every rank.
        return [*tensors, parameter.data] if parameter.numel() else tensors

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
        """Gather small weights anew after their stretches were changed in the block.

        Small weights stay whole on every rank.
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
        # A rank whose whole stretch is padding has no values.
        split = [(name, parameter) for name, parameter in self._split(module) if name in values]
        with self._released(module):
            put_back = [self._show(parameter, values[name]) for name, parameter in split]
        try:
            yield
        finally:
            with self._released(module):
                for restore in put_back:
                    restore()

    def _show(self, parameter: nn.Parameter, values: Tensor) -> Callable[[], None]:
        """Put other values into this rank's stretch of a weight; return a function that undoes it."""
        stretch = cast(Any, parameter).ds_tensor
        own = stretch.data
        stretch.data = padded(values.to(stretch.device, stretch.dtype), stretch.ds_numel)

        def restore() -> None:
            stretch.data = own

        return restore


def padded(values: Tensor, size: int) -> Tensor:
    """Append zeros to a flat tensor up to `size` elements."""
    return nn.functional.pad(values, (0, size - len(values)))
