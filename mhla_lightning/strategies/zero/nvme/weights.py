"""What of a model's weights a rank holds where ZeRO-3 keeps them, or the optimizer's state, on a local
disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import Tensor, nn

from mhla_lightning.strategies.local import Change, Fragment, Zero3Weights, padded


class DiskWeights(Zero3Weights):
    """ZeRO stage 3 with a disk: groups of masters and their moments, and large weights, are in memory by
    turns.
    """

    def _part(self, held: Tensor, offset: int, numel: int) -> Tensor:
        return (
            super()._part(held, offset, numel)
            if held.ndim and held.numel()
            else torch.empty(0, dtype=torch.float32)
        )

    def _group(self, fragment: Fragment) -> int | None:
        """The number of the optimizer's group that a fragment is in, where it lies on a disk."""
        if fragment.flat is None:
            return None
        group = next(
            number
            for number, flat in enumerate(self.optimizer.fp32_partitioned_groups_flat)
            if flat is fragment.flat
        )
        return group if self.optimizer._swappable_optimizer_subgroup(group) else None

    def lots(self, fragments: Sequence[Fragment]) -> list[list[Fragment]]:
        """What is in memory, every group on the disk, and every frozen weight there by itself."""
        found: dict[Any, list[Fragment]] = {}
        for fragment in fragments:
            frozen = fragment.flat is None and fragment.parameter is not None and _away(fragment.parameter)
            found.setdefault(fragment.name if frozen else self._group(fragment), []).append(fragment)
        return list(found.values())

    def loaded(self, lot: list[Fragment], changed: bool = False) -> AbstractContextManager[list[Fragment]]:
        if not lot:
            return nullcontext(lot)
        first, group = lot[0], self._group(lot[0])
        if group is not None:
            return self._loaded_group(group, lot, changed)
        if first.flat is None and first.parameter is not None and _away(first.parameter):
            return self._loaded_weight(first, changed)
        return nullcontext(lot)

    @contextmanager
    def _loaded_group(self, group: int, lot: list[Fragment], changed: bool) -> Iterator[list[Fragment]]:
        with self._masters(group, changed):
            yield [
                replace(
                    fragment, values=self._part(cast(Tensor, fragment.flat), fragment.offset, fragment.size)
                )
                for fragment in lot
            ]

    @contextmanager
    def _masters(self, group: int, changed: bool) -> Iterator[None]:
        """Masters and moments of a group are in memory."""
        if not self.optimizer._swappable_optimizer_subgroup(group):
            yield
            return
        self.optimizer._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        finally:
            leave = (
                self.optimizer._optimizer_states_and_gradient_swap_out
                if changed
                else self.optimizer._release_swap_buffers
            )
            leave(group)

    @contextmanager
    def _loaded_weight(self, fragment: Fragment, changed: bool) -> Iterator[list[Fragment]]:
        weight = cast(Any, fragment.parameter)
        _settle([weight])
        weight.nvme_swapper.swap_in([weight], async_op=False)
        try:
            yield [replace(fragment, values=self._part(weight.ds_tensor, 0, fragment.size))]
        finally:
            if changed:
                weight.nvme_swapper.swap_out_and_release([weight])
            else:
                weight.nvme_swapper.remove_partition_and_release_buffers([weight])

    @torch.no_grad()
    def publish(self, module: nn.Module) -> None:
        _settle([parameter for _, parameter in self._split(module) if _away(parameter)])
        with self._released(module):
            for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                with self._masters(group, changed=False):
                    self.optimizer._partitioned_params_swap_out(group)

    def change(self, changes: Sequence[Change]) -> None:
        """Every group is loaded once."""
        groups: dict[int, list[tuple[Any, Fragment, Any]]] = {}
        for parameter, function in changes:
            stretch = self._stretch("", parameter)
            if stretch is None or stretch.flat is None:
                super().change([(parameter, function)])
            else:
                group = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)][0]
                groups.setdefault(group, []).append((parameter, stretch, function))
        for group, members in groups.items():
            with self._masters(group, changed=True):
                self._change_loaded(members)

    def _change_loaded(self, members: Sequence[tuple[Any, Fragment, Any]]) -> None:
        away = []
        _settle([parameter for parameter, _, _ in members if _away(parameter)])
        for parameter, stretch, function in members:
            master = self._part(cast(Tensor, stretch.flat), stretch.offset, parameter.ds_tensor.ds_numel)
            for values in (
                master,
                *([] if _away(parameter) else [parameter.ds_tensor]),
                *([parameter.data] if parameter.numel() else []),
            ):
                function(values)
            if _away(parameter):
                away.append((parameter, master))
        if away:
            parameters, masters = zip(*away, strict=True)
            parameters[0].nvme_swapper.swap_out_partitioned_params(list(parameters), list(masters))

    def _gather(self, parameters: list[Any]) -> None:
        for parameter in (
            parameters
        ):  # one by one: DeepSpeed has few buffers, and each is free again once its weight is whole
            parameter.all_gather([parameter])
            if parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme:
                parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])

    def _show(self, parameter: nn.Parameter, values: Tensor) -> Callable[[], None]:
        """What takes the place of a weight on the disk stands in memory meanwhile: its file stays. A
        frozen one is its own average.
        """
        if not _away(parameter):
            return super()._show(parameter, values)
        if not parameter.requires_grad:
            return lambda: None
        _settle([parameter])
        stretch = cast(Any, parameter).ds_tensor
        own = stretch.data
        stretch.data = padded(values.to("cpu", parameter.dtype), stretch.ds_numel)
        stretch.status, stretch.final_location = PartitionedParamStatus.AVAILABLE, None

        def restore() -> None:
            stretch.data = own
            stretch.status, stretch.final_location = (
                PartitionedParamStatus.NOT_AVAILABLE,
                OffloadDeviceEnum.nvme,
            )

        return restore


def _away(parameter: nn.Parameter) -> bool:
    """Whether this rank's part of a weight belongs on a disk."""
    return cast(Any, parameter).ds_tensor.final_location == OffloadDeviceEnum.nvme


def _settle(parameters: Sequence[Any]) -> None:
    """Has nothing on its way from the disk, and no weight in a buffer that was read ahead."""
    for parameter in parameters:
        parameter.nvme_swapper.synchronize_reads()
        if parameter.ds_tensor.status != PartitionedParamStatus.NOT_AVAILABLE:
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
