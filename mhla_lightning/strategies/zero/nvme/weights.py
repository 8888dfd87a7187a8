"""The weights that a rank holds under ZeRO-3 with a local disk (experimental)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import Tensor, nn

from mhla_lightning.strategies.local import Change, Fragment
from mhla_lightning.strategies.zero.weights import Zero3Weights, padded


class DiskWeights(Zero3Weights):
    """ZeRO stage 3 with a disk, experimental.

    Groups of masters with their moments, and large weights, are in memory by turns.
    """

    def _part(self, held: Tensor, offset: int, numel: int) -> Tensor:
        return (
            super()._part(held, offset, numel)
            if held.ndim and held.numel()
            else torch.empty(0, dtype=torch.float32)
        )

    def _group(self, fragment: Fragment) -> int | None:
        """Return the number of a fragment's optimizer group; None where it is not on a disk."""
        if fragment.flat is None:
            return None
        group = next(
            number
            for number, flat in enumerate(self.optimizer.fp32_partitioned_groups_flat)
            if flat is fragment.flat
        )
        return group if self._is_away(group) else None

    def _is_away(self, group: int) -> bool:
        """Whether an optimizer group is on the disk between steps."""
        numel = self.optimizer.fp16_partitioned_groups_flat_numel[group]
        swapper = self.optimizer.optimizer_swapper if self.optimizer.swap_optimizer else None
        return swapper is not None and bool(swapper.is_swappable_tensor(None, numel=numel))

    def lots(self, fragments: Sequence[Fragment]) -> list[list[Fragment]]:
        """Group fragments: those in memory, each optimizer group on the disk, each frozen weight."""
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
        """Hold masters and moments of a group in memory, as an optimizer step of DeepSpeed does.

        Args:
            group: its number.
            changed: write them back afterwards.
        """
        if not self._is_away(group):
            yield
            return
        swapper, master = self.optimizer.optimizer_swapper, self.optimizer.fp32_partitioned_groups_flat[group]
        swapper.swap_in_optimizer_state(parameter=master, async_parameter=None)
        try:
            yield
        finally:
            if changed:
                later = self.optimizer.next_swappable_fp32_partitioned_groups[group] is not None
                swapper.swap_out_optimizer_state(parameter=master, async_swap=later)
            else:
                swapper.release_swap_buffers(parameter=master)
            master.grad = None  # swapped in with the moments

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
                    self._write_weights(group)

    def _write_weights(self, group: int) -> None:
        """Write the weights of a group from its masters, in memory or to the disk."""
        master, offset = self.optimizer.fp32_partitioned_groups_flat[group], 0
        away: list[tuple[Any, Tensor]] = []
        for parameter in self.optimizer.fp16_groups[group]:
            values = master.narrow(0, offset, parameter.ds_tensor.ds_numel)
            offset += parameter.ds_tensor.ds_numel
            if parameter.ds_tensor.status == PartitionedParamStatus.AVAILABLE:
                parameter.ds_tensor.data.copy_(values.data)
            else:
                away.append((parameter, values))
        _swap_out(away)

    def change(self, changes: Sequence[Change]) -> None:
        """Change parameters in place; every group is loaded once."""
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
        away: list[tuple[Any, Tensor]] = []
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
        _swap_out(away)

    def _gather(self, parameters: list[Any]) -> None:
        # One by one: DeepSpeed has few buffers, and each is free again once its weight is whole.
        for parameter in parameters:
            parameter.all_gather([parameter])
            if parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme:
                parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])

    def _show(self, parameter: nn.Parameter, values: Tensor) -> Callable[[], None]:
        """Put other values into this rank's stretch; return a function that undoes it.

        The values of a weight on the disk are in memory meanwhile, and its file stays. The average of a
        frozen weight is the weight, so nothing is done.
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
    """Wait for reads on their way, and free the buffers of weights that were read ahead."""
    for parameter in parameters:
        parameter.nvme_swapper.synchronize_reads()
        if parameter.ds_tensor.status != PartitionedParamStatus.NOT_AVAILABLE:
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])


def _swap_out(weights: Sequence[tuple[Any, Tensor]]) -> None:
    """Write weights on the disk anew, each from its float32 values."""
    if weights:
        parameters, values = zip(*weights, strict=True)
        parameters[0].nvme_swapper.swap_out_partitioned_params(list(parameters), list(values))
