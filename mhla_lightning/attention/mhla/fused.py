"""Multi-Head Linear Attention with a hand-written backward, slice by slice.

Temporaries of one slice stay in the processor's cache. Plain autograd makes about thirty passes over
token-sized tensors; on a CPU at 16,384 tokens these cost more than the matrix products. Here the backward
computes the features again, and one slice of tokens is finished before the next one. The numbers equal those
of `bidirectional.mhla` (a test), which takes over for torch.func and for gradients of gradients.

A slice is some samples, with all heads, and some whole rows of blocks of their grid. Where one row of blocks
of one sample exceeds the budget, a slice is some columns of it. A grid of 3 x 4 blocks, with two slices in
each case:

    +----+----+----+----+                  +----+----+----+----+
    | b0 | b1 | b2 | b3 |  slice 0         | b0 | b1 | b2 | b3 |  slices 0 and 1
    +----+----+----+----+  slice 0         +====+====#====+====+
    | b4 | b5 | b6 | b7 |                  | b4 | b5 # b6 | b7 |  slices 2 and 3
    +====+====+====+====+                  +====+====#====+====+
    | b8 | b9 |b10 |b11 |  slice 1         | b8 | b9 #b10 |b11 |  slices 4 and 5
    +----+----+----+----+                  +----+----+----+----+

The forward makes two passes over the slices, with the mixing of all blocks between them:

    pass 1 | k, v of a slice               | ->  S_b, z_b of its blocks
    mixing | S, z of all blocks            | ->  S~ = m S, z~ = m z
    pass 2 | q of a slice, S~, z~ of it    | ->  q S~ / (q . z~ + eps)

The backward does the same with gradients. Pass 1 is over q, the mixing uses the transposed matrix, and
pass 2 is over k and v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.mhla.bidirectional import ReluMHLA
from mhla_lightning.attention.mhla.by_hand import ByHand, WrittenForm
from mhla_lightning.attention.mhla.dense import dense_on_cpu, dense_pays
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.transforms import in_transform

SLICE_ELEMENTS = 2**20
"""Elements of q that one slice holds on a CPU (4 MiB in float32); other devices take everything at once."""

PANELS_FROM = 2**21
"""Elements of one sample's summaries from which on a CPU mixes them in panels (8 MiB in float32).

One product of few rows and very many columns leaves the cache, and takes up to twice as long."""

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
    compiled: bool = True,
) -> Tensor:
    """Compute MHLA, Eq. 4, with relu features as one differentiable step.

    Args:
        q, k: (batch, tokens, heads, dim_k) in raster order, before the feature map relu(x) + offset.
        v: (batch, tokens, heads, dim_v).
        mixing: (blocks, blocks) or (heads, blocks, blocks); None reads the sum of all summaries, which is
            linear attention.
        grid: the blocks; short last blocks are allowed.
        offset: added by the feature map.
        normalize: whether to divide by q . z~ + eps.
        eps: added to the normalizer.
        dtype: of the sums.
        compiled: whether short rows on a CPU may take the compiled form.

    Returns:
        (batch, tokens, heads, dim_v) in v's dtype.
    """
    settings = ReluMHLA(grid, offset, normalize, eps, dtype)
    # A compiler cannot follow memory that is filled by hand, and fuses the plain form itself.
    if not len(q) or torch.compiler.is_compiling() or in_transform(q, k, v, mixing):
        return settings.plain(q, k, v, mixing)
    if mixing is not None and dense_pays(q, v, grid):
        return dense_on_cpu(q, k, v, mixing, settings, compiled=compiled)
    if torch.is_grad_enabled():
        return ByHand.apply(q, k, v, mixing, settings, _FORM)
    return _by_heads(q, k, v, mixing, settings)


def _by_heads(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor | None, settings: ReluMHLA) -> Tensor:
    """Compute the forward alone, some heads at a time.

    Nothing is kept, so all summaries share one piece of memory, about 32 MiB in float32. With too few heads
    at a time, little of every token's row would be read; that costs more than summaries beyond the nearest
    cache.
    """
    work, out = _Workspace(settings, q.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    heads, summaries = q.shape[2], len(q) * settings.grid.num_blocks * q.shape[-1] * v.shape[-1]
    step = max(1, 8 * SLICE_ELEMENTS // summaries) if q.device.type == "cpu" else heads
    m = None if mixing is None else mixing.to(settings.dtype)
    for first in range(0, heads, step):
        some = slice(first, min(heads, first + step))
        own = m if m is None or m.dim() == 2 else m[some]
        _forward(q[:, :, some], k[:, :, some], v[:, :, some], own, out[:, :, some], work, keep=False)
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, out: Tensor, work: _Workspace, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write the output to `out`, and return S, z, S~ and z~, all in the workspace's memory.

    Without `keep`, S may be overwritten.
    """
    settings = work.settings
    summary, z = work.room_for_sums(q, v.shape[-1])
    for part in _slices(q, settings.grid):
        k_features = work.features(work.keys, k, part, keys=True)
        torch.bmm(k_features.mT, work.in_blocks(work.values, v, part), out=part.blocks_of(summary))
        if settings.normalize:
            torch.sum(k_features, -2, out=part.blocks_of(z))
    mixed = _mix(m, summary, work.mixed, keep=keep)
    z_mixed = _mix(m, z) if settings.normalize else z
    for part in _slices(q, settings.grid):
        q_features = work.features(work.queries, q, part)
        o = work.outputs.bmm(q_features, part.blocks_of(mixed))
        if settings.normalize:
            o.div_(_normalizer(q_features, part.blocks_of(z_mixed), settings.eps))
        part.store(out, o)
    return summary, z, mixed, z_mixed


def _keeping(
    q: Tensor, k: Tensor, v: Tensor, mixing: Tensor | None, settings: ReluMHLA
) -> tuple[Tensor, tuple[Tensor, ...]]:
    work = _Workspace(settings, q.device)
    m = None if mixing is None else mixing.to(settings.dtype)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return out, _forward(q, k, v, m, out, work, keep=True)


def _backward(settings: ReluMHLA, grad: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    q, k, v, mixing, out, summary, z, mixed, z_mixed = saved
    m = None if mixing is None else mixing.to(settings.dtype)
    work = _Workspace(settings, q.device)
    d_mixed, d_z_mixed = work.room_for_sums(q, v.shape[-1])
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for part in _slices(q, settings.grid):
        q_features, g = work.features(work.queries, q, part), work.in_blocks(work.values, grad, part)
        if settings.normalize:
            g.div_(_normalizer(q_features, part.blocks_of(z_mixed), settings.eps))
        dq = work.gradients.bmm(g, part.blocks_of(mixed).mT)
        torch.bmm(q_features.mT, g, out=part.blocks_of(d_mixed))
        if settings.normalize:
            products = work.in_blocks(work.outputs, out, part).mul_(g)
            d_normalizer = products.sum(-1, keepdim=True).neg_()
            dq.addcmul_(d_normalizer, part.blocks_of(z_mixed).unsqueeze(-2))
            torch.bmm(d_normalizer.mT, q_features, out=part.blocks_of(d_z_mixed).unsqueeze(-2))
        part.store(grad_q, work.relu_backward(dq, q_features))
    m_transposed = None if m is None else m.mT
    d_summary = _mix(m_transposed, d_mixed, work.mixed)
    d_z = _mix(m_transposed, d_z_mixed) if settings.normalize else d_z_mixed
    for part in _slices(q, settings.grid):
        k_features = work.features(work.keys, k, part, keys=True)
        v_blocks, ds = work.in_blocks(work.values, v, part), part.blocks_of(d_summary)
        dk = work.gradients.bmm(v_blocks, ds.mT)
        if settings.normalize:
            dk += part.blocks_of(d_z).unsqueeze(-2)
        part.store(grad_v, work.outputs.bmm(k_features, ds))
        part.store(grad_k, work.relu_backward(dk, k_features))
    d_mixing = None
    if m is not None:
        d_mixing = _mix_backward(m, d_mixed, summary)
        if settings.normalize:
            d_mixing += _mix_backward(m, d_z_mixed, z)
        d_mixing = d_mixing.to(mixing.dtype)
    return grad_q, grad_k, grad_v, d_mixing


_FORM = WrittenForm(_keeping, _backward)


@dataclass(frozen=True)
class _Slice:
    """Some samples and some blocks of their grid, with all heads; see the drawing above.

    Attributes:
        samples: of the batch.
        tokens: along every axis of `whole`.
        blocks: of all blocks in row-major order.
        whole: tokens per axis of the whole grid.
        grid: the blocks of this slice alone.
    """

    samples: slice
    tokens: tuple[slice, ...]
    blocks: slice
    whole: tuple[int, ...]
    grid: BlockGrid

    def blocks_of(self, x: Tensor) -> Tensor:
        """Return a view (samples x blocks x heads, ...) of x (batch, blocks, heads, ...)."""
        return x[self.samples, self.blocks].flatten(0, 2)

    def tokens_of(self, x: Tensor) -> Tensor:
        """Return a view of x (batch, tokens, heads, dim), with one dimension per axis of the grid.

        Its shape is (samples, tokens of every axis..., heads, dim).
        """
        return x.unflatten(1, self.whole)[(self.samples, *self.tokens)]

    def arrange(self, x: Tensor) -> Tensor:
        """Return this slice of (batch, tokens, heads, dim), cut into blocks.

        Its shape is (samples, counts..., heads, sizes..., dim). It is a view when all blocks are full.
        """
        axes = len(self.grid.grid)
        counts = [1 + 2 * axis for axis in range(axes)]
        order = [0, *counts, 1 + 2 * axes, *(d + 1 for d in counts), 2 + 2 * axes]
        tokens = self.tokens_of(x)
        if self.grid.even:
            pairs = zip(self.grid.blocks, self.grid.block_size, strict=True)
            cut = [size for pair in pairs for size in pair]
            return tokens.reshape(len(tokens), *cut, *tokens.shape[-2:]).permute(order)
        return self.grid.split(tokens.flatten(1, axes), 1).permute(order)

    def store(self, x: Tensor, values: Tensor) -> None:
        """Write values to this slice of x.

        Args:
            x: (batch, tokens, heads, dim).
            values: (samples x blocks x heads, tokens_per_block, dim).
        """
        if self.grid.even:
            arranged = self.arrange(x)
            arranged.copy_(values.view(arranged.shape))
        else:
            destination = self.tokens_of(x)
            samples, heads, dim = len(destination), *destination.shape[-2:]
            in_blocks = values.view(samples, self.grid.num_blocks, heads, -1, dim).transpose(1, 2)
            raster = self.grid.from_blocks(in_blocks)
            destination.copy_(raster.transpose(1, 2).unflatten(1, self.grid.grid))


def _slices(q: Tensor, grid: BlockGrid) -> Iterator[_Slice]:
    """Yield slices that cover q (batch, tokens, heads, dim)."""
    batch, _, heads, dim = q.shape
    room = SLICE_ELEMENTS // (heads * dim) if q.device.type == "cpu" else q.numel()  # tokens of a slice
    row_blocks = math.prod(grid.blocks[1:])
    fit = max(1, room // (grid.block_size[0] * math.prod(grid.grid[1:])))  # rows of blocks that fit
    samples, rows = max(1, fit // grid.blocks[0]), min(fit, grid.blocks[0])
    if samples == rows == 1:
        columns = _columns(grid, room)
    else:
        columns = [(tuple(slice(0, n) for n in grid.grid[1:]), slice(0, row_blocks))]
    for b in range(0, batch, samples):
        for r in range(0, grid.blocks[0], rows):
            first = slice(r * grid.block_size[0], min(grid.grid[0], (r + rows) * grid.block_size[0]))
            count = ceil_div(first.stop - first.start, grid.block_size[0])
            for others, blocks in columns:
                tokens = (first, *others)
                inner = BlockGrid([part.stop - part.start for part in tokens], block_size=grid.block_size)
                start = r * row_blocks + blocks.start
                stop = start + (blocks.stop - blocks.start if count == 1 else count * row_blocks)
                yield _Slice(slice(b, b + samples), tokens, slice(start, stop), grid.grid, inner)


def _columns(grid: BlockGrid, room: int) -> list[tuple[tuple[slice, ...], slice]]:
    """Cut one row of blocks along the first axis into parts along the second axis.

    Args:
        grid: the whole grid.
        room: tokens that one part should hold.

    Returns:
        Of each part, its tokens along all axes but the first, and its blocks, counted from the row's first.
    """
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


@dataclass
class _Memory:
    """One piece of memory that is used again and grows to the largest tensor asked for."""

    dtype: torch.dtype
    device: torch.device
    held: Tensor | None = None

    def room(self, shape: Sequence[int]) -> Tensor:
        """Return an uninitialized tensor in this memory; it overwrites the one before."""
        size = math.prod(shape)
        if self.held is None or self.held.numel() < size:
            self.held = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.held[:size].view(*shape)

    def bmm(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the batched product a @ b in this memory."""
        return torch.bmm(a, b, out=self.room((*a.shape[:2], b.shape[2])))


@dataclass
class _Workspace:
    """The memory of one call, shared by all its slices, because fresh memory costs page faults.

    Attributes:
        settings: of the call.
        device: of its tensors.
        summaries: S, (batch, blocks, heads, dim_k, dim_v); in the backward the gradient of S~.
        key_sums: z, (batch, blocks, heads, dim_k); in the backward the gradient of z~.
        mixed: S~, (batch, blocks, heads, dim_k, dim_v); in the backward the gradient of S.
        queries, keys: features of a slice, (samples x blocks x heads, tokens_per_block, dim_k).
        values: v of a slice, or the gradient of its output, (samples x blocks x heads, tokens_per_block,
            dim_v).
        outputs: the output of a slice, or the gradient of v, in the same shape.
        gradients: gradients of q or k of a slice, (samples x blocks x heads, tokens_per_block, dim_k).
    """

    settings: ReluMHLA
    device: torch.device
    summaries: _Memory = field(init=False)
    key_sums: _Memory = field(init=False)
    mixed: _Memory = field(init=False)
    queries: _Memory = field(init=False)
    keys: _Memory = field(init=False)
    values: _Memory = field(init=False)
    outputs: _Memory = field(init=False)
    gradients: _Memory = field(init=False)

    def __post_init__(self) -> None:
        pieces = (_Memory(self.settings.dtype, self.device) for _ in range(8))
        self.summaries, self.key_sums, self.mixed, *slices = pieces
        self.queries, self.keys, self.values, self.outputs, self.gradients = slices

    def room_for_sums(self, q: Tensor, dim_v: int) -> tuple[Tensor, Tensor]:
        """Return room for S and z.

        They are (batch, blocks, heads, dim_k, dim_v) and (batch, blocks, heads, dim_k).
        """
        batch, _, heads, dim_k = q.shape
        lead = (batch, self.settings.grid.num_blocks, heads)
        return self.summaries.room((*lead, dim_k, dim_v)), self.key_sums.room((*lead, dim_k))

    def in_blocks(self, memory: _Memory, x: Tensor, part: _Slice) -> Tensor:
        """Copy a slice of x (batch, tokens, heads, dim) to block order.

        Returns:
            (samples x blocks x heads, tokens_per_block, dim), in `memory`.
        """
        view = part.arrange(x)
        return _flat(memory.room(view.shape).copy_(view), part)

    def features(self, memory: _Memory, x: Tensor, part: _Slice, *, keys: bool = False) -> Tensor:
        """Return relu(x) + offset of a slice; keys are 0 at the empty places of short blocks."""
        view = part.arrange(x)
        phi = _flat(torch.clamp_min(view.to(self.settings.dtype), 0, out=memory.room(view.shape)), part)
        if self.settings.offset:
            phi.add_(self.settings.offset)
        mask = part.grid.mask if keys else None
        if mask is not None:
            phi.unflatten(0, (-1, part.grid.num_blocks, x.shape[2])).mul_(mask.to(phi)[:, None, :, None])
        return phi

    def relu_backward(self, grad: Tensor, phi: Tensor) -> Tensor:
        """Set grad to 0 where the feature map's relu was closed, in place."""
        return torch.ops.aten.threshold_backward.grad_input(grad, phi, self.settings.offset, grad_input=grad)


def _flat(arranged: Tensor, part: _Slice) -> Tensor:
    """View an arranged slice as (samples x blocks x heads, tokens_per_block, dim)."""
    return arranged.view(-1, part.grid.tokens_per_block, arranged.shape[-1])


def _mix(
    mixing: Tensor | None, summaries: Tensor, memory: _Memory | None = None, *, keep: bool = True
) -> Tensor:
    """Return sum_b m[i, b] S_b over the block axis.

    Args:
        mixing: m, (blocks, blocks) or (heads, blocks, blocks); None means all ones.
        summaries: S, (batch, blocks, heads, ...).
        memory: for the result; None allocates it.
        keep: False permits to overwrite S when it is large, which halves the traffic through memory.
    """
    if mixing is None:
        return summaries.sum(1, keepdim=True).expand_as(summaries)
    if mixing.dim() == 3:
        return (mixing @ _head_first(summaries)).transpose(1, 2).reshape(summaries.shape)
    panels = _panels(summaries)
    if memory is not None and not keep and len(panels) > 1:
        for x in panels:
            x.copy_(memory.bmm(mixing.expand(len(x), -1, -1), x))
        return summaries
    out = torch.empty_like(summaries) if memory is None else memory.room(summaries.shape)
    for x, to in zip(panels, _panels(out), strict=True):
        # matmul would fold the batch into the columns, with copies.
        torch.bmm(mixing.expand(len(x), -1, -1), x, out=to)
    return out


def _mix_backward(mixing: Tensor, d_mixed: Tensor, summaries: Tensor) -> Tensor:
    """Return the gradient of the mixing matrix, summed over all that share it."""
    if mixing.dim() == 3:
        return (_head_first(d_mixed) @ _head_first(summaries).mT).sum(0)
    gradient = torch.zeros_like(mixing)
    for d, x in zip(_panels(d_mixed), _panels(summaries), strict=True):
        gradient += torch.bmm(d, x.mT).sum(0)
    return gradient


def _panels(summaries: Tensor) -> list[Tensor]:
    """Cut summaries into the matrices that a shared mixing matrix multiplies.

    Args:
        summaries: (batch, blocks, heads, ...).

    Returns:
        Views (products, blocks, columns).
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
    """Reorder (batch, blocks, heads, ...) to (batch, heads, blocks, elements of one summary)."""
    return summaries.flatten(3).transpose(1, 2)


def _normalizer(q_features: Tensor, z_mixed: Tensor, eps: float) -> Tensor:
    """Return q . z~ + eps, (..., tokens_per_block, 1)."""
    return (q_features @ z_mixed.unsqueeze(-1)).add_(eps)
