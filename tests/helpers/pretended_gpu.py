"""A GPU that is only pretended: tensors on it hold real values on the CPU and say that they are on `cuda:0`.

Code runs there as on a GPU, with its true branches and numbers. The harness takes down every wait of the host
for the device and every copy that blocks, and refuses operations on tensors of two devices. It knows nothing
of time and memory.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from mhla_lightning.data import loader

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
_WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten._unique2.default,
}
# Functions that take tensors of both devices.
_BOTH = {Tensor.copy_, Tensor.to, Tensor.__getitem__, Tensor.__setitem__, Tensor.type_as, Tensor.set_}
_PINNED = "pretended_pinned"


class DeviceMismatchError(Exception):
    """An operation on tensors of two devices."""


class Record:
    """What happened.

    Attributes:
        waits: (phase, what, place in the code) of every wait of the host for the device.
        phase: name of what runs now.
        kernels: operations that start a kernel, by phase.
    """

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str, str]] = Counter()
        self.kernels: Counter[str] = Counter()
        self.phase = ""

    def wait(self, what: str) -> None:
        self.waits[self.phase, what, _place()] += 1

    def of(self, phase: str) -> dict[str, int]:
        """Return the waits of a phase, by what waits and where."""
        return {f"{what} {place}": n for (when, what, place), n in self.waits.items() if when == phase}


_records: list[Record] = []


class GpuTensor(torch.Tensor):
    """A tensor whose values are on the CPU and whose `device` is the pretended GPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[GpuTensor], held: Tensor) -> GpuTensor:
        new: GpuTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=int(held.storage_offset()),
            dtype=held.dtype,
            layout=held.layout,
            device=CPU,
        )
        new.held = held.detach()
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @property
    def data(self) -> Tensor:
        return GpuTensor(self.held)

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, GpuTensor)
        self.held = value.held

    def __deepcopy__(self, memo: dict[int, Any]) -> GpuTensor:
        return GpuTensor(self.held.clone()).requires_grad_(self.requires_grad)  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GpuTensor({self.held})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _records:
            _note(func, args)
        wrapped = {id(x.held): x for x in tree_leaves((args, kwargs)) if isinstance(x, GpuTensor)}
        held = tree_map(lambda x: x.held if isinstance(x, GpuTensor) else x, (args, kwargs))
        out = func(*held[0], **held[1])
        if func is aten.copy_.default and not isinstance(args[0], GpuTensor):
            return args[0]
        return tree_map(lambda x: wrapped.get(id(x), GpuTensor(x)) if type(x) is torch.Tensor else x, out)


def _note(func: Any, args: Sequence[Any]) -> None:
    record = _records[-1]
    if func in _WAITS or (func in (aten.index.Tensor, aten.index_put_.default) and _has_mask(args[1])):
        record.wait(f"wait {func}")
    elif not func.is_view:
        record.kernels[record.phase] += 1


def _has_mask(indices: Sequence[Any]) -> bool:
    return any(isinstance(x, GpuTensor) and x.dtype == torch.bool for x in indices)


class PretendedGpu(TorchFunctionMode):
    """Sends what is asked of `cuda` to pretended tensors, and refuses tensors of two devices."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "_has_compatible_shallow_copy_type":
            old, new = args[:2]
            return isinstance(old, GpuTensor) == isinstance(new, GpuTensor) and old.is_meta == new.is_meta
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._move(func, args, kwargs)
        if name == "tolist" and isinstance(args[0], GpuTensor):
            self.record.wait("wait tolist")
            return args[0].held.tolist()
        if name == "numpy" and isinstance(args[0], GpuTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "pin_memory":
            assert not isinstance(args[0], GpuTensor)
            return _pinned(args[0].clone())
        if func is Tensor.copy_:
            self._copied(args[0], args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        elif func not in _BOTH and name not in ("__get__", "__set__"):
            _check(name, (args, kwargs))
        pin = kwargs.pop("pin_memory", False)
        target = kwargs.get("device")
        on_gpu = target is not None and torch.device(target).type == "cuda"
        if on_gpu:
            kwargs["device"] = CPU
            if name in ("tensor", "as_tensor", "asarray"):
                self.record.wait(f"blocking copy to the device {name}")
        out = func(*args, **kwargs)
        if pin:
            _pinned(out)
        if on_gpu:
            out = tree_map(lambda x: GpuTensor(x) if type(x) is torch.Tensor else x, out)
        return out

    def _move(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        x, target, dtype, no_wait, options = _parsed(func, args, kwargs)
        on_gpu = isinstance(x, GpuTensor)
        if target is not None and target.type == "meta":
            return x.to(target, dtype or x.dtype)
        if target is None or (target.type == "cuda") == on_gpu:
            same = dtype in (None, x.dtype) and not any(options.values())
            return x if same else Tensor.to(x, dtype or x.dtype, **options)
        if on_gpu:
            self.record.wait("copy to the host")
            return cast(GpuTensor, x).held.to(dtype or x.dtype, copy=True)
        if not (no_wait and getattr(x, _PINNED, False)) and x.numel():
            self.record.wait("blocking copy to the device")
        new = GpuTensor(x.detach().to(dtype or x.dtype, copy=True))
        return new.requires_grad_(x.requires_grad) if x.is_leaf else new

    def _copied(self, into: Tensor, source: Any, no_wait: bool) -> None:
        if not isinstance(source, Tensor) or isinstance(into, GpuTensor) == isinstance(source, GpuTensor):
            return
        host = source if isinstance(into, GpuTensor) else into
        if not (no_wait and getattr(host, _PINNED, False)):
            self.record.wait(
                "blocking copy to the device" if isinstance(into, GpuTensor) else "copy to the host"
            )


def _parsed(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Tensor, torch.device | None, torch.dtype | None, bool, dict[str, Any]]:
    """Return what `to`, `cuda` or `cpu` is asked: tensor, device, dtype, non_blocking, and the rest."""
    x, *rest = args
    if func is not Tensor.to:
        return x, GPU if func is Tensor.cuda else CPU, None, kwargs.get("non_blocking", False), {}
    dtype: torch.dtype | None = kwargs.get("dtype")
    target, flags = kwargs.get("device"), []
    for value in [*rest, kwargs.get("other")]:
        if isinstance(value, Tensor):
            target, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            flags.append(value)
        elif value is not None:
            target = value
    no_wait = kwargs.get("non_blocking", flags[0] if flags else False)
    options: dict[str, Any] = {name: kwargs[name] for name in ("copy", "memory_format") if name in kwargs}
    if len(flags) > 1:
        options["copy"] = flags[1]
    return x, None if target is None else torch.device(target), dtype, bool(no_wait), options


def _check(name: str, arguments: Any) -> None:
    tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
    if any(isinstance(x, GpuTensor) for x in tensors):
        others = [x for x in tensors if not isinstance(x, GpuTensor) and x.dim() > 0 and not x.is_meta]
        if others:
            raise DeviceMismatchError(f"{name}: a tensor of {tuple(others[0].shape)} is on the host")


def _pinned(x: Tensor) -> Tensor:
    setattr(x, _PINNED, True)
    return x


def _in_backward(make: Any, record: Record) -> Any:
    """Watch a function that makes tensors also where torch has put the modes aside."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == GPU and not torch._C._len_torch_function_stack():
            with PretendedGpu(record):
                return make(*args, **kwargs)
        return make(*args, **kwargs)

    return made


class _Event:
    """In place of torch.cuda.Event."""

    def record(self) -> None: ...

    def synchronize(self) -> None:
        _records[-1].wait("wait for an event")


class _PinningLoader(torch.utils.data.DataLoader[Any]):
    """A DataLoader that pins as torch's does, without a GPU."""

    def __init__(self, *args: Any, pin_memory: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pins = pin_memory

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if self.pins:
                for value in batch.values():
                    if isinstance(value, Tensor):
                        _pinned(value)
            yield batch


def _place() -> str:
    """The innermost line of ours, or of Lightning and torchmetrics, that led here."""
    frame, other = sys._getframe(2), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/tests/helpers/" not in name:
            for folder in ("/mhla_lightning/", "/callbacks/"):
                if folder in name and "site-packages" not in name:
                    return f"{folder.strip('/')}/{name.rpartition(folder)[2]}:{frame.f_lineno}"
            if not other and "site-packages/" in name and "/torch/" not in name:
                other = f"{name.partition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return other


class PretendedAccelerator(CPUAccelerator):
    """Lightning's accelerator of the pretended GPU."""

    def setup_device(self, device: torch.device) -> None: ...


class PretendedStrategy(SingleDeviceStrategy):
    """Lightning's strategy of one pretended GPU."""

    def __init__(self) -> None:
        super().__init__(GPU)


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """Pretend a GPU in the block; yields what happens."""
    record = Record()
    group = torch.optim.Optimizer._group_tensors_by_device_and_dtype

    def grouped(tensors: Any, with_indices: bool = False) -> Any:
        found = group(tensors, with_indices)
        return {
            (GPU if isinstance(lists[0][0], GpuTensor) else device, dtype): (lists, indices)
            for (device, dtype), (lists, indices) in found.items()
        }

    monkeypatch.setattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(grouped))
    monkeypatch.setattr(torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", grouped)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    for name in ("empty", "zeros", "ones", "full", "arange", "tensor"):
        monkeypatch.setattr(torch, name, _in_backward(getattr(torch, name), record))
    monkeypatch.setattr(loader, "DataLoader", _PinningLoader)
    _records.append(record)
    try:
        with PretendedGpu(record):
            yield record
    finally:
        _records.pop()
