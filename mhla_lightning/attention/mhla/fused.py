"""Multi-Head Linear Attention with a hand-written backward, slice by slice so that temporaries stay in the
processor's cache.

Plain autograd makes about thirty passes over token-sized tensors; on a CPU at 16,384 tokens these cost more
than the matrix products. Here the features are recomputed in the backward, and a slice of tokens (whole rows
of blocks) is finished before the next one. Same numbers as `bidirectional.mhla` (a test).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhla_lightning.attention.base import full_precision
from mhla_lightning.attention.mhla.grid import BlockGrid

SLICE_ELEMENTS = 2**20
"""Elements of q that one slice holds on a CPU (4 MiB in float32); other devices take everything at once."""

PANELS_FROM = 2**21
"""Numbers in the summaries of one sample from which on a CPU mixes them panel by panel (8 MiB in float32):
one product of few rows and very many columns leaves the cache, and takes up to twice as long."""

PANEL = 2048  # columns
_PANELS_AT_ONCE = 4


def fused_mhla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor | None,
    grid: BlockGrid,
    *,
    offset: float,
    normalize: bool = True,
    eps: float = 1e-6,
    dtype: torch.dtype,
) -> Tensor:
    """relu features, block summaries, mixing, reading and Eq. 4's normalizer as one differentiable step.

    Args:
        q, k: (batch, tokens, heads, dim_k) in raster order, before the feature map relu(x) + offset.
        v: (batch, tokens, heads, dim_v).
        mixing: (blocks, blocks) or (heads, blocks, blocks); None reads the sum of all summaries, which is
            linear attention.
        grid: the blocks; short last blocks are allowed.
        offset: added by the feature map.
        normalize: divide by q . z~ + eps.
        eps: added to the normalizer.
        dtype: sums are taken in it.

    Returns:
        (batch, tokens, heads, dim_v) in v's dtype.
    """
    if torch.is_grad_enabled():
        return _FusedMHLA.apply(q, k, v, mixing, grid, offset, normalize, eps, dtype)
    return _by_heads(q, k, v, mixing, grid, offset, normalize, eps, dtype)


def _by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor | None,
    grid: BlockGrid,
    offset: float,
    normalize: bool,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The forward alone, some heads at a time: nothing is kept, so that all summaries share one piece of
    memory, about 32 MiB in float32.

    Too few heads at a time read little of every token's row, which costs more than summaries beyond the
    nearest cache.
    """
    work, out = _Workspace(offset, dtype, q.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    heads, summaries = q.shape[2], len(q) * grid.num_blocks * q.shape[-1] * v.shape[-1]
    step = max(1, 8 * SLICE_ELEMENTS // summaries) if q.device.type == "cpu" else heads
    m = None if mixing is None else mixing.to(dtype)
    for first in range(0, heads, step):
        part = slice(first, min(heads, first + step))
        own = m if m is None or m.dim() == 2 else m[part]
        _forward(
            q[:, :, part],
            k[:, :, part],
            v[:, :, part],
            own,
            grid,
            out[:, :, part],
            work,
            normalize,
            eps,
            keep=False,
        )
    return out


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    m: Tensor | None,
    grid: BlockGrid,
    out: Tensor,
    work: _Workspace,
    normalize: bool,
    eps: float,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fills out; returns S, z and their mixtures, all in the workspace's memory; without `keep` S may be
    lost.
    """
    summary, z = work.summaries(grid, q, v.shape[-1])
    for part in _slices(q, grid):
        kf = work.features("k", k, part, keys=True)
        torch.bmm(kf.mT, work.blocks("v", v, part), out=part.of(summary))
        if normalize:
            torch.sum(kf, -2, out=part.of(z))
    mixed, z_mixed = _mix(m, summary, work, keep=keep), _mix(m, z) if normalize else z
    for part in _slices(q, grid):
        qf = work.features("q", q, part)
        o = work.bmm("o", qf, part.of(mixed))
        if normalize:
            o.div_(_normalizer(qf, part.of(z_mixed), eps))
        part.store(out, o)
    return summary, z, mixed, z_mixed


class _FusedMHLA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mixing: Tensor | None,
        grid: BlockGrid,
        offset: float,
        normalize: bool,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        work = _Workspace(offset, dtype, q.device)
        m = None if mixing is None else mixing.to(dtype)
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        summary, z, mixed, z_mixed = _forward(q, k, v, m, grid, out, work, normalize, eps, keep=True)
        ctx.save_for_backward(q, k, v, m, out, summary, z, mixed, z_mixed)
        ctx.settings = (grid, offset, normalize, eps, dtype)
        ctx.mixing_dtype = None if mixing is None else mixing.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grad):  # backward may be called under autocast
            return _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, m, out, summary, z, mixed, z_mixed = ctx.saved_tensors
    grid, offset, normalize, eps, dtype = ctx.settings
    work = _Workspace(offset, dtype, q.device)
    d_mixed, d_z_mixed = work.summaries(grid, q, v.shape[-1])
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for part in _slices(q, grid):
        qf, g = work.features("q", q, part), work.blocks("v", grad, part)
        if normalize:
            g.div_(_normalizer(qf, part.of(z_mixed), eps))
        dq = work.bmm("dq", g, part.of(mixed).mT)
        torch.bmm(qf.mT, g, out=part.of(d_mixed))
        if normalize:
            g_norm = (
                work.blocks("o", out, part).mul_(g).sum(-1, keepdim=True).neg_()
            )  # gradient of the normalizer
            dq.addcmul_(g_norm, part.of(z_mixed).unsqueeze(-2))
            torch.bmm(g_norm.mT, qf, out=part.of(d_z_mixed).unsqueeze(-2))
        part.store(grad_q, work.relu_backward(dq, qf))
    m_turned = None if m is None else m.mT
    d_summary, d_z = _mix(m_turned, d_mixed, work), _mix(m_turned, d_z_mixed) if normalize else d_z_mixed
    for part in _slices(q, grid):
        kf, vb, ds = work.features("k", k, part, keys=True), work.blocks("v", v, part), part.of(d_summary)
        dk = work.bmm("dq", vb, ds.mT)
        if normalize:
            dk += part.of(d_z).unsqueeze(-2)
        part.store(grad_v, work.bmm("o", kf, ds))
        part.store(grad_k, work.relu_backward(dk, kf))
    d_mixing = None
    if m is not None:
        d_mixing = _mix_backward(m, d_mixed, summary)
        if normalize:
            d_mixing += _mix_backward(m, d_z_mixed, z)
        d_mixing = d_mixing.to(ctx.mixing_dtype)
    return grad_q, grad_k, grad_v, d_mixing, None, None, None, None, None


@dataclass(frozen=True)
class _Slice:
    """Some samples and some rows of blocks, along the first grid axis or, of one of those, along the second;
    all heads.

    Attributes:
        tokens: the part of every axis of `whole`.
        whole, grid: tokens per axis of everything, and the blocks of this slice.
    """

    samples: slice
    tokens: tuple[slice, ...]
    blocks: slice
    whole: tuple[int, ...]
    grid: BlockGrid

    def of(self, x: Tensor) -> Tensor:
        """This slice of (batch, blocks, heads, ...) as (samples x blocks x heads, ...): a view, to read or
        to write.
        """
        return x[self.samples, self.blocks].flatten(0, 2)

    def region(self, x: Tensor) -> Tensor:
        """This slice of (batch, tokens, heads, dim) as (samples, tokens of every axis..., heads, dim): a
        view.
        """
        return x.unflatten(1, self.whole)[(self.samples, *self.tokens)]

    def arrange(self, x: Tensor) -> Tensor:
        """This slice of (batch, tokens, heads, dim) as (samples, counts..., heads, sizes..., dim): a view
        when all blocks are full.
        """
        axes = len(self.grid.grid)
        counts = [1 + 2 * axis for axis in range(axes)]
        order = [0, *counts, 1 + 2 * axes, *(d + 1 for d in counts), 2 + 2 * axes]
        region = self.region(x)
        if self.grid.even:
            pairs = [
                size for pair in zip(self.grid.blocks, self.grid.block_size, strict=True) for size in pair
            ]
            return region.reshape(len(region), *pairs, *region.shape[-2:]).permute(order)
        return self.grid.split(region.flatten(1, axes), 1).permute(order)

    def store(self, x: Tensor, values: Tensor) -> None:
        """(samples x blocks x heads, tokens_per_block, dim) -> this slice of (batch, tokens, heads, dim)."""
        if self.grid.even:
            arranged = self.arrange(x)
            arranged.copy_(values.view(arranged.shape))
        else:
            destination = self.region(x)
            samples, heads, dim = len(destination), *destination.shape[-2:]
            raster = self.grid.from_blocks(
                values.view(samples, self.grid.num_blocks, heads, -1, dim).transpose(1, 2)
            )
            destination.copy_(raster.transpose(1, 2).unflatten(1, self.grid.grid))


def _slices(q: Tensor, grid: BlockGrid) -> Iterator[_Slice]:
    """Slices that cover q (batch, tokens, heads, dim)."""
    batch, _, heads, dim = q.shape
    every = tuple(slice(0, n) for n in grid.grid)
    room = SLICE_ELEMENTS // (heads * dim) if q.device.type == "cpu" else q.numel()  # tokens of a slice
    fit = max(1, room // (grid.block_size[0] * math.prod(grid.grid[1:])))
    samples, rows = max(1, fit // grid.blocks[0]), min(fit, grid.blocks[0])
    columns = (
        _columns(grid, room) if samples == rows == 1 else [(every[1:], slice(0, math.prod(grid.blocks[1:])))]
    )
    row_blocks = math.prod(grid.blocks[1:])
    for b in range(0, batch, samples):
        for r in range(0, grid.blocks[0], rows):
            first = slice(r * grid.block_size[0], min(grid.grid[0], (r + rows) * grid.block_size[0]))
            count = -(-(first.stop - first.start) // grid.block_size[0])
            for others, blocks in columns:
                tokens = (first, *others)
                inner = BlockGrid([part.stop - part.start for part in tokens], block_size=grid.block_size)
                start = r * row_blocks + blocks.start
                stop = start + (blocks.stop - blocks.start if count == 1 else count * row_blocks)
                yield _Slice(slice(b, b + samples), tokens, slice(start, stop), grid.grid, inner)


def _columns(grid: BlockGrid, room: int) -> list[tuple[tuple[slice, ...], slice]]:
    """One row of blocks along the first axis, in parts along the second axis that are to hold `room` tokens:
    their tokens along all axes but the first, and their blocks, counted from the row's first."""
    if len(grid.grid) == 1:
        return [((), slice(0, 1))]
    count, width, rest = grid.blocks[1], grid.block_size[1], math.prod(grid.blocks[2:])
    fit = min(count, max(1, room // (grid.block_size[0] * width * math.prod(grid.grid[2:]))))
    others = tuple(slice(0, n) for n in grid.grid[2:])
    starts = range(0, count, fit)
    tokens = [slice(c * width, min(grid.grid[1], (c + fit) * width)) for c in starts]
    return [
        ((part, *others), slice(c * rest, min(count, c + fit) * rest))
        for part, c in zip(tokens, starts, strict=True)
    ]


class _Workspace:
    """Buffers, (samples x blocks x heads, tokens_per_block, dim), that all slices of a call share: fresh
    memory costs page faults.
    """

    def __init__(self, offset: float, dtype: torch.dtype, device: torch.device) -> None:
        self.offset, self.dtype, self.device = offset, dtype, device
        self._buffers: dict[str, Tensor] = {}

    def summaries(self, grid: BlockGrid, q: Tensor, dim_v: int) -> tuple[Tensor, Tensor]:
        """Room for S (batch, blocks, heads, dim_k, dim_v) and z (batch, blocks, heads, dim_k)."""
        batch, _, heads, dim_k = q.shape
        lead = (batch, grid.num_blocks, heads)
        return self.room("S", (*lead, dim_k, dim_v)), self.room("z", (*lead, dim_k))

    def blocks(self, name: str, x: Tensor, part: _Slice) -> Tensor:
        view = part.arrange(x)
        return self._in_blocks(self.room(name, view.shape).copy_(view), part)

    def features(self, name: str, x: Tensor, part: _Slice, *, keys: bool = False) -> Tensor:
        """relu(x) + offset; keys are 0 at the missing places of short blocks."""
        view = part.arrange(x)
        phi = self._in_blocks(torch.clamp_min(view.to(self.dtype), 0, out=self.room(name, view.shape)), part)
        if self.offset:
            phi.add_(self.offset)
        mask = part.grid.mask if keys else None
        if mask is not None:
            phi.unflatten(0, (-1, part.grid.num_blocks, x.shape[2])).mul_(mask.to(phi)[:, None, :, None])
        return phi

    def bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self.room(name, (*a.shape[:2], b.shape[2])))

    def relu_backward(self, grad: Tensor, phi: Tensor) -> Tensor:
        """grad where the feature map's relu was open, else 0, in place."""
        return torch.ops.aten.threshold_backward.grad_input(grad, phi, self.offset, grad_input=grad)

    def _in_blocks(self, arranged: Tensor, part: _Slice) -> Tensor:
        return arranged.view(-1, part.grid.tokens_per_block, arranged.shape[-1])

    def room(self, name: str, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return held[:size].view(*shape)


def _mix(
    mixing: Tensor | None, summaries: Tensor, work: _Workspace | None = None, *, keep: bool = True
) -> Tensor:
    """sum_b m[i, b] S_b over the block axis, the second of (batch, blocks, heads, ...): one product for all
    heads, or one a head.

    Without `keep`, large ones are mixed in their place, which halves what passes through memory.
    """
    if mixing is None:
        return summaries.sum(1, keepdim=True).expand_as(summaries)
    if mixing.dim() == 3:
        return (mixing @ _head_first(summaries)).transpose(1, 2).reshape(summaries.shape)
    panels = _panels(summaries)
    if work is not None and not keep and len(panels) > 1:
        for x in panels:
            x.copy_(work.bmm("mixed", mixing.expand(len(x), -1, -1), x))
        return summaries
    out = torch.empty_like(summaries) if work is None else work.room("mixed", summaries.shape)
    for x, to in zip(panels, _panels(out), strict=True):
        torch.bmm(
            mixing.expand(len(x), -1, -1), x, out=to
        )  # matmul would fold the batch into the columns, with copies
    return out


def _mix_backward(mixing: Tensor, d_mixed: Tensor, summaries: Tensor) -> Tensor:
    """Gradient of the mixing matrix, summed over samples (and over heads that share it)."""
    if mixing.dim() == 3:
        return (_head_first(d_mixed) @ _head_first(summaries).mT).sum(0)
    gradient = torch.zeros_like(mixing)
    for d, x in zip(_panels(d_mixed), _panels(summaries), strict=True):
        gradient += torch.bmm(d, x.mT).sum(0)
    return gradient


def _panels(summaries: Tensor) -> list[Tensor]:
    """(batch, blocks, heads, ...) as the matrices (products, blocks, columns) that a shared mixing matrix
    is multiplied with: views.
    """
    flat = summaries.flatten(2)
    if flat.device.type != "cpu" or flat[0].numel() < PANELS_FROM:
        return [flat]
    panels: list[Tensor] = []
    whole = flat.shape[2] // PANEL * PANEL
    for sample in flat.unbind():
        panels += sample[:, :whole].unflatten(1, (-1, PANEL)).transpose(0, 1).split(_PANELS_AT_ONCE)
        if whole < flat.shape[2]:
            panels.append(sample[:, whole:].unsqueeze(0))
    return panels


def _head_first(summaries: Tensor) -> Tensor:
    """(batch, blocks, heads, ...) -> (batch, heads, blocks, numbers of one summary)."""
    return summaries.flatten(3).transpose(1, 2)


def _normalizer(qf: Tensor, z_mixed: Tensor, eps: float) -> Tensor:
    """q . z~ + eps, (..., tokens_per_block, 1)."""
    return (qf @ z_mixed.unsqueeze(-1)).add_(eps)
