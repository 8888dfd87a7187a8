"""Multi-Head Linear Attention with a hand-written backward, slice by slice so that temporaries stay in the processor's cache.

Plain autograd makes about thirty passes over token-sized tensors; on a CPU at 16,384 tokens these cost more than the matrix products. Here the
features are recomputed in the backward, and a slice of tokens (whole rows of blocks) is finished before the next one. Same numbers as
`bidirectional.mhla` (a test).
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

SLICE_ELEMENTS = 2**19
"""Elements of q that one slice holds on a CPU (2 MiB in float32); other devices take everything at once."""


def fused_mhla(
    q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, grid: BlockGrid, *, offset: float, normalize: bool = True, eps: float = 1e-6, dtype: torch.dtype
) -> Tensor:
    """relu features, block summaries, mixing, reading and Eq. 4's normalizer as one differentiable step.

    Args:
        q, k: (batch, tokens, heads, dim_k) in raster order, before the feature map relu(x) + offset.
        v: (batch, tokens, heads, dim_v).
        mixing: (blocks, blocks) or (heads, blocks, blocks).
        grid: the blocks; short last blocks are allowed.
        offset: added by the feature map.
        normalize: divide by q . z~ + eps.
        eps: added to the normalizer.
        dtype: sums are taken in it.

    Returns:
        (batch, tokens, heads, dim_v) in v's dtype.
    """
    return _FusedMHLA.apply(q, k, v, mixing, grid, offset, normalize, eps, dtype)


class _FusedMHLA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mixing: Tensor,
        grid: BlockGrid,
        offset: float,
        normalize: bool,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        work = _Workspace(offset, dtype, q.device)
        m = _every_head(mixing, q, dtype)
        summary, z = work.summaries(grid, q, v.shape[-1])
        for part in _slices(q, grid):
            kf = work.features("k", k, part, keys=True)
            part.put(summary, work.bmm("summary", kf.mT, work.blocks("v", v, part)))
            if normalize:
                part.put(z, kf.sum(-2))
        mixed, z_mixed = (m @ summary.flatten(3)).view_as(summary), m @ z if normalize else z
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        for part in _slices(q, grid):
            qf = work.features("q", q, part)
            o = work.bmm("o", qf, part.get(mixed))
            if normalize:
                o.div_(_normalizer(qf, part.get(z_mixed), eps))
            part.store(out, o)
        ctx.save_for_backward(q, k, v, m, out, summary, z, mixed, z_mixed)
        ctx.settings = (grid, offset, normalize, eps, dtype)
        ctx.mixing = mixing.shape, mixing.dtype
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
            g.div_(_normalizer(qf, part.get(z_mixed), eps))
        dq = work.bmm("dq", g, part.get(mixed).mT)
        part.put(d_mixed, work.bmm("summary", qf.mT, g))
        if normalize:
            g_norm = work.blocks("o", out, part).mul_(g).sum(-1, keepdim=True).neg_()  # gradient of the normalizer
            dq.addcmul_(g_norm, part.get(z_mixed).unsqueeze(-2))
            part.put(d_z_mixed, (g_norm.mT @ qf).squeeze(-2))
        part.store(grad_q, work.relu_backward(dq, qf))
    d_summary, d_z = (m.mT @ d_mixed.flatten(3)).view_as(summary), m.mT @ d_z_mixed if normalize else d_z_mixed
    for part in _slices(q, grid):
        kf, vb, ds = work.features("k", k, part, keys=True), work.blocks("v", v, part), part.get(d_summary)
        dk = work.bmm("dq", vb, ds.mT)
        if normalize:
            dk += part.get(d_z).unsqueeze(-2)
        part.store(grad_v, work.bmm("o", kf, ds))
        part.store(grad_k, work.relu_backward(dk, kf))
    d_mixing = d_mixed.flatten(3) @ summary.flatten(3).mT
    if normalize:
        d_mixing += d_z_mixed @ z.mT
    shape, mixing_dtype = ctx.mixing
    return grad_q, grad_k, grad_v, d_mixing.sum_to_size(shape).to(mixing_dtype), None, None, None, None, None


@dataclass(frozen=True)
class _Slice:
    """Some samples and some rows of blocks (along the first grid axis), all heads."""

    samples: slice
    tokens: slice
    blocks: slice
    grid: BlockGrid

    def get(self, x: Tensor) -> Tensor:
        """(batch, heads, blocks, ...) -> this slice's (samples x heads x blocks, ...)."""
        return x[self.samples, :, self.blocks].flatten(0, 2)

    def put(self, x: Tensor, values: Tensor) -> None:
        destination = x[self.samples, :, self.blocks]
        destination.copy_(values.view(destination.shape))

    def store(self, x: Tensor, values: Tensor) -> None:
        """(samples x heads x blocks, tokens_per_block, dim) -> this slice of (batch, tokens, heads, dim)."""
        destination = x[self.samples, self.tokens]
        in_blocks = values.view(destination.shape[0], destination.shape[2], self.grid.num_blocks, *values.shape[1:])
        destination.copy_(self.grid.from_blocks(in_blocks).transpose(1, 2))


def _slices(q: Tensor, grid: BlockGrid) -> Iterator[_Slice]:
    """Slices that cover q (batch, tokens, heads, dim)."""
    batch, tokens, heads, dim = q.shape
    row_tokens = grid.block_size[0] * math.prod(grid.grid[1:])
    row_blocks = math.prod(grid.blocks[1:])
    fit = max(1, SLICE_ELEMENTS // (row_tokens * heads * dim)) if q.device.type == "cpu" else batch * grid.blocks[0]
    samples, rows = max(1, fit // grid.blocks[0]), min(fit, grid.blocks[0])
    for b in range(0, batch, samples):
        for r in range(0, grid.blocks[0], rows):
            part = slice(r * row_tokens, min(tokens, (r + rows) * row_tokens))
            first_axis = (part.stop - part.start) // math.prod(grid.grid[1:])
            inner = BlockGrid((first_axis, *grid.grid[1:]), block_size=grid.block_size)
            yield _Slice(slice(b, b + samples), part, slice(r * row_blocks, (r + rows) * row_blocks), inner)


class _Workspace:
    """Buffers in block order, (samples x heads x blocks, tokens_per_block, dim), that all slices of a call share: fresh memory costs page faults."""

    def __init__(self, offset: float, dtype: torch.dtype, device: torch.device) -> None:
        self.offset, self.dtype, self.device = offset, dtype, device
        self._buffers: dict[str, Tensor] = {}

    def summaries(self, grid: BlockGrid, q: Tensor, dim_v: int) -> tuple[Tensor, Tensor]:
        """Room for S (batch, heads, blocks, dim_k, dim_v) and z (batch, heads, blocks, dim_k)."""
        batch, _, heads, dim_k = q.shape
        lead = (batch, heads, grid.num_blocks, dim_k)
        return torch.empty(*lead, dim_v, dtype=self.dtype, device=self.device), torch.empty(lead, dtype=self.dtype, device=self.device)

    def blocks(self, name: str, x: Tensor, part: _Slice) -> Tensor:
        view = part.grid.to_blocks(x[part.samples, part.tokens].transpose(1, 2))
        return self._buffer(name, view.shape).copy_(view).flatten(0, 2)

    def features(self, name: str, x: Tensor, part: _Slice, *, keys: bool = False) -> Tensor:
        """relu(x) + offset; keys are 0 at the missing places of short blocks."""
        view = part.grid.to_blocks(x[part.samples, part.tokens].transpose(1, 2))
        phi = torch.clamp_min(view.to(self.dtype), 0, out=self._buffer(name, view.shape)).add_(self.offset).flatten(0, 2)
        mask = part.grid.mask if keys else None
        if mask is not None:
            phi.unflatten(0, (-1, part.grid.num_blocks)).mul_(mask.to(phi).unsqueeze(-1))
        return phi

    def bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self._buffer(name, (*a.shape[:2], b.shape[2])))

    def relu_backward(self, grad: Tensor, phi: Tensor) -> Tensor:
        """grad where the feature map's relu was open, else 0, in place."""
        return torch.ops.aten.threshold_backward.grad_input(grad, phi, self.offset, grad_input=grad)

    def _buffer(self, name: str, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return held[:size].view(*shape)


def _every_head(mixing: Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, heads, blocks, blocks), expanded: torch then takes one batched product instead of folding and copying."""
    return mixing.to(dtype).expand(q.shape[0], q.shape[2], -1, -1)


def _normalizer(qf: Tensor, z_mixed: Tensor, eps: float) -> Tensor:
    """q . z~ + eps, (..., tokens_per_block, 1)."""
    return (qf @ z_mixed.unsqueeze(-1)).add_(eps)
