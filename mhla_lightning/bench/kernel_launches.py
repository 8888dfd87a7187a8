"""What one layer's operator starts on a GPU, and its modelled time.

All is counted on tensors without data. The launches of Triton kernels are those of a real call: the same
functions choose tiles and build arguments. The operations of torch are those that the dispatcher sees. Times
are a roofline, never measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from mhla_lightning.attention import Attention, BlockGrid, Linear, Rotary, build_attention
from mhla_lightning.attention.context import PairRotary
from mhla_lightning.attention.mhla.triton.choice import (
    dense_is_cheaper,
)
from mhla_lightning.attention.mhla.triton.launch import Launch, recorded
from mhla_lightning.attention.mhla.triton.tiles import call_sizes
from mhla_lightning.planning.torch_modes import TorchDispatchMode, tensors_in


class TableCase(Protocol):
    """One row of the table.

    Attributes:
        name: shown in tables.
        form: the form of the kernels.
    """

    @property
    def name(self) -> str: ...

    @property
    def form(self) -> str: ...

    def torch_work(self) -> tuple[list[Work], list[Work]]:
        """Return the kernels of the torch path, forward and backward."""

    def recorded_call(self, major: int) -> list[tuple[list[Launch], list[Work]]]:
        """Return launches and operations of torch, forward and backward."""

    def flash_seconds(self, gpu: Gpu) -> float:
        """Return FlashAttention's modelled time, forward and backward."""


@dataclass(frozen=True)
class OperatorCase:
    """One operator of images or videos at one size.

    Attributes:
        name: shown in tables.
        batch, heads, dim: of bf16 tokens; q, k and v have as many channels.
        grid, blocks: tokens and blocks per axis; no blocks is linear attention.
        normalize: whether there is a normalizer.
        rotary: whether rotary positions of the grid turn q and k.
    """

    name: str
    batch: int
    heads: int
    dim: int
    grid: tuple[int, ...]
    blocks: tuple[int, ...] | None
    normalize: bool = True
    rotary: bool = False

    @property
    def partition(self) -> BlockGrid:
        """The blocks; those of linear attention are the parts that one program sums up."""
        if self.blocks is not None:
            return BlockGrid(self.grid, self.blocks)
        return Linear.parts(BlockGrid(self.grid, 1).tokens)

    @property
    def form(self) -> str:
        """The form that `auto` takes."""
        rows, mixed = self.batch * self.heads, self.blocks is not None
        sizes = call_sizes(rows, self.partition, self.dim, self.dim, mixed)
        return "dense" if not self.rotary and dense_is_cheaper(sizes) else "blocks"

    def tokens(self, count: int) -> list[Tensor]:
        """Return token tensors on the meta device."""
        shape = (self.batch, self.partition.tokens, self.heads, self.dim)
        return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(count)]

    def torch_work(self) -> tuple[list[Work], list[Work]]:
        """Return the kernels of the torch path, forward and backward."""
        entry: dict[str, Any] = {"name": "linear", "kernel": "torch"}
        if self.blocks is not None:
            norm = "block" if self.normalize else "none"
            entry = {"name": "mhla", "kernel": "torch", "blocks": list(self.blocks), "normalizer": norm}
        heads, dim = self.heads, self.dim
        operator = build_attention(entry, heads=heads, dim_k=dim, dim_v=dim, grid=self.grid).to("meta")
        q, k, v = (x.requires_grad_() for x in self.tokens(3))
        return torch_operations(
            operator, (q, k, v), _MetaRotary(q.shape[1], self.dim) if self.rotary else None
        )

    def recorded_call(self, major: int) -> list[tuple[list[Launch], list[Work]]]:
        """Return launches and operations of torch, forward and backward."""
        from mhla_lightning.attention.mhla.triton import blocks, dense

        grid, form = self.partition, self.form
        q, k, v, grad = self.tokens(4)
        mixing = (
            torch.empty(grid.num_blocks, grid.num_blocks, device="meta") if self.blocks is not None else None
        )
        eps = 1e-6 if self.normalize else None
        if form == "dense":
            if mixing is None:
                grid, mixing = BlockGrid(self.grid, 1), torch.empty(1, 1, device="meta")
            with recorded(major) as launches, Operations() as operations:
                saved = dense.forward(q, k, v, mixing, grid, 1e-6, eps)
            forward = list(launches), operations.found
            with recorded(major) as launches, Operations() as operations:
                dense.backward(grad, (q, k, v), mixing, saved, grid, 1e-6)
            return [forward, (list(launches), operations.found)]
        table = _MetaRotary(grid.tokens, self.dim).table if self.rotary else None
        plan = blocks.BlockPlan(grid, 1e-6, eps, torch.bfloat16)
        with recorded(major) as launches, Operations() as operations:
            results = blocks.forward(q, k, v, mixing, table, plan)
        forward = list(launches), operations.found
        with recorded(major) as launches, Operations() as operations:
            blocks.backward(grad, (q, k, v), mixing, table, results, plan)
        return [forward, (list(launches), operations.found)]

    def flash_seconds(self, gpu: Gpu) -> float:
        """Return FlashAttention's modelled time, forward and backward."""
        tokens = self.partition.tokens
        size = 2 * self.batch * self.heads * tokens * self.dim
        return flash_seconds(4 * self.batch * self.heads * tokens**2 * self.dim, 4 * size, gpu)


CASES = (
    OperatorCase("DeiT-T 224, batch 1,024", 1024, 3, 64, (16, 16), (4, 4)),
    OperatorCase("DeiT-T 384, batch 128", 128, 3, 64, (24, 24), (4, 4)),
    OperatorCase("DiT-XL/2 256 px, batch 32", 32, 16, 72, (16, 16), (4, 4)),
    OperatorCase("DiT-S/2 2,048 px, batch 4", 4, 6, 64, (128, 128), (8, 8)),
    OperatorCase("Wan, 31,500 tokens, rotary", 1, 12, 128, (21, 30, 50), (3, 5, 10), False, True),
    OperatorCase("Wan linear, rotary", 1, 12, 128, (21, 30, 50), None, True, True),
    OperatorCase("DeiT-T 224 linear, batch 1,024", 1024, 3, 64, (16, 16), None),
)


@dataclass(frozen=True)
class Gpu:
    """Rates that the model assumes, per second.

    Attributes:
        name: of the chip.
        bf16, float32: FLOPs of matrix products.
        bytes: to and from memory.
        flash: FLOPs that FlashAttention reaches, forward and backward.
        major: compute capability, whose tiles are taken.
        least: seconds of the shortest kernel.
    """

    name: str
    bf16: float
    float32: float
    bytes: float
    flash: tuple[float, float]
    major: int
    least: float = 3e-6


H100 = Gpu("H100", 800e12, 50e12, 3.0e12, (600e12, 500e12), 9)
H200 = Gpu("H200", 800e12, 50e12, 4.3e12, (600e12, 500e12), 9)
A100 = Gpu("A100", 250e12, 17e12, 1.6e12, (200e12, 170e12), 8)
GPUS = (H100, A100)


def modelled_gpu(device: str) -> Gpu | None:
    """Return the rates of a GPU by its name in torch; None for one that is not modelled."""
    return next((gpu for gpu in (H100, H200, A100) if gpu.name in device), None)


@dataclass(frozen=True)
class Work:
    """One kernel: its name, matrix-product FLOPs, bytes and whether its operands are 16-bit."""

    name: str
    flops: int
    bytes: int
    short: bool

    def seconds(self, gpu: Gpu) -> float:
        """Return the roofline's time."""
        peak = gpu.bf16 if self.short else gpu.float32
        return max(self.flops / peak, self.bytes / gpu.bytes, gpu.least)


def _held_bytes(x: Tensor) -> int:
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1  # a broadcast dimension is read once
    return count


class Operations(TorchDispatchMode):
    """Collects the operations of torch that are kernels on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Work] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name().partition("::")[2]
        reads, writes = list(tensors_in(args)), list(tensors_in(result))
        fresh = {id(x.untyped_storage()) for x in reads}
        in_place = name.split(".")[0].endswith("_") or "out" in kwargs or name.endswith("grad_input")
        if "empty" in name or (not in_place and all(id(x.untyped_storage()) in fresh for x in writes)):
            return result  # a view, or room
        if not any(x.numel() for x in writes):
            return result  # nothing to write: torch starts no kernel
        flops = 0
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*reads[:2], out_val=writes[0])
        reads = reads[1:] if name.startswith("copy_") else reads
        size = sum(map(_held_bytes, (*{id(x): x for x in reads}.values(), *writes)))
        self.found.append(Work(name, flops, size, bool(reads) and reads[0].element_size() == 2))
        return result


class _MetaRotary(PairRotary):
    """Rotary positions of a grid, as tables without data."""

    def __init__(self, tokens: int, dim: int) -> None:
        self.table = torch.empty(tokens, dim // 2, 2, device="meta")

    def __call__(self, x: Tensor) -> Tensor:
        turns = torch.view_as_complex(self.table.unsqueeze(1))
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)

    def turn_table(self) -> Tensor:
        return self.table


def torch_operations(
    operator: Attention, inputs: Sequence[Tensor], rotary: Rotary | None
) -> tuple[list[Work], list[Work]]:
    """Return the kernels of an operator's torch path, forward and backward.

    Args:
        operator: on the meta device.
        inputs: q, k and v, which need gradients.
        rotary: turns q and k; None means no positions.
    """
    with Operations() as forward:
        out = operator(*inputs, rotary=rotary)
    grad = torch.empty_like(out)
    with Operations() as backward:
        out.backward(grad)
    return forward.found, backward.found


def kernel_launches(case: TableCase, major: int = 9) -> tuple[list[Launch], list[Launch]]:
    """Return the Triton launches of a call, forward and backward."""
    (forward, _), (backward, _) = case.recorded_call(major)
    return forward, backward


def kernel_work(case: TableCase, major: int = 9) -> tuple[list[Work], list[Work]]:
    """Return all kernels of a call on Triton, forward and backward."""
    both = []
    for launches, operations in case.recorded_call(major):
        works = [Work(launch.name, launch.flops, launch.bytes, True) for launch in launches]
        both.append(works + operations)
    return both[0], both[1]


def flash_seconds(flops: int, size: int, gpu: Gpu) -> float:
    """Return FlashAttention's modelled time, forward and backward.

    Args:
        flops: of the forward.
        size: bytes of q, k, v and the output.
        gpu: whose rates are taken.
    """
    return sum(_flash(flops, size, gpu))


def flash_forward_seconds(flops: int, size: int, gpu: Gpu) -> float:
    """Return FlashAttention's modelled time, forward alone; see :func:`flash_seconds`."""
    return _flash(flops, size, gpu)[0]


def flash_times(rows: int, tokens: int, dim: int, gpu: Gpu, causal: bool = False) -> tuple[float, float]:
    """Return FlashAttention's modelled seconds, forward and backward.

    Args:
        rows: batch x heads.
        tokens, dim: of a row.
        gpu: whose rates are taken.
        causal: half of the products.
    """
    flops = 4 * rows * tokens**2 * dim // (2 if causal else 1)
    return _flash(flops, 8 * rows * tokens * dim, gpu)


def _flash(flops: int, size: int, gpu: Gpu) -> tuple[float, float]:
    backward = max(2.5 * flops / gpu.flash[1], 2 * size / gpu.bytes)
    return max(flops / gpu.flash[0], size / gpu.bytes), backward


def seconds_of(works: Sequence[Work], gpu: Gpu) -> float:
    """Return the modelled time of kernels one after another."""
    return sum(work.seconds(gpu) for work in works)


@dataclass(frozen=True)
class OperatorTimes:
    """One row of the modelled table: forward and backward of one layer's operator.

    Attributes:
        case: the row.
        torch, triton: kernels of the two paths, forward and backward.
        gpu: whose rates are taken.
    """

    case: TableCase
    torch: tuple[list[Work], list[Work]]
    triton: tuple[list[Work], list[Work]]
    gpu: Gpu

    def row(self) -> dict[str, Any]:
        """Return kernels, bytes and milliseconds, as the table and the JSON file show them."""
        row: dict[str, Any] = {"case": self.case.name, "form": self.case.form, "gpu": self.gpu.name}
        for name, both in (("torch", self.torch), ("triton", self.triton)):
            works = [*both[0], *both[1]]
            row[f"{name}_kernels"] = [len(both[0]), len(both[1])]
            row[f"{name}_gigabytes"] = sum(work.bytes for work in works) / 1e9
            row[f"{name}_gigaflop"] = sum(work.flops for work in works) / 1e9
            row[f"{name}_ms"] = 1e3 * seconds_of(works, self.gpu)
        row["flash_ms"] = 1e3 * self.case.flash_seconds(self.gpu)
        return row


def operator_times(cases: Sequence[TableCase] = CASES, gpu: Gpu = H100) -> list[OperatorTimes]:
    """Return the modelled table; nothing in it is measured."""
    return [OperatorTimes(case, case.torch_work(), kernel_work(case, gpu.major), gpu) for case in cases]
