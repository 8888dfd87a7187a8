"""MHLA of short rows on a CPU: Eq. 5 with its N x N matrix, and a backward written by hand.

Sums in float32 take the compiled form of `cpu/` where the machine has a compiler; what follows is in torch's
own operations, and serves everything.

Summaries of many small blocks are expensive: blocks x dim_k x dim_v numbers a head, and blocks^2 x dim_k x
dim_v products to mix them. Scores of all pairs of tokens are N^2 numbers and N^2 x dim_k products. A few
samples are finished before the next ones, so that their scores stay in the processor's cache. The numbers
equal those of `bidirectional.mhla` (a test), which takes over for gradients of gradients.

    P = m[b(i), b(j)] * (q k^T)      n = rows of P summed + eps      o = P v / n
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mhla_lightning.attention.mhla.bidirectional import ReluMHLA
from mhla_lightning.attention.mhla.by_hand import ByHand, WrittenForm
from mhla_lightning.attention.mhla.cpu import short_rows
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.triton.choice import CallSizes, Costs, block_seconds, dense_seconds

SCORES = 2**17
"""Scores or features that samples of one step have (512 KiB in float32)."""

CPU_COSTS = Costs(flops=45e9, bytes=1.2e9, launch=0.0)
"""Of one core in float32, measured with `mhla bench attention`; products of small blocks reach little."""


def dense_pays(q: Tensor, v: Tensor, grid: BlockGrid) -> bool:
    """Return whether the N x N form is the faster one on this device.

    Rows of at most N = blocks^2 tokens never ask the model: there runs from before it resume bit for bit.

    Args:
        q: (batch, tokens, heads, dim_k).
        v: (batch, tokens, heads, dim_v).
        grid: the blocks.
    """
    if q.device.type != "cpu" or grid.num_blocks**2 <= grid.tokens:
        return False
    sizes = CallSizes(1, grid.tokens, grid.num_blocks, grid.tokens, q.shape[3], v.shape[3])
    return dense_seconds(sizes, CPU_COSTS) < block_seconds(sizes, CPU_COSTS)


def dense_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, settings: ReluMHLA, *, compiled: bool = True
) -> Tensor:
    """Compute MHLA, Eq. 5, as one differentiable step.

    Args:
        q, k: (batch, tokens, heads, dim_k) in raster order, before the feature map.
        v: (batch, tokens, heads, dim_v).
        mixing: (blocks, blocks) or (heads, blocks, blocks).
        settings: blocks, feature map and normalizer.
        compiled: whether to take the compiled form where it serves the call.

    Returns:
        (batch, tokens, heads, dim_v) in v's dtype.
    """
    compiled = compiled and short_rows.serves(q, settings)
    if torch.is_grad_enabled():
        return ByHand.apply(q, k, v, mixing, settings, short_rows.FORM if compiled else _FORM)
    if compiled:
        return short_rows.FORM.forward(q, k, v, mixing, settings)[0]
    return _forward(q, k, v, mixing, settings, keep=False)[0]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, settings: ReluMHLA, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, q k^T (batch x heads, tokens, tokens) and n (batch, heads, tokens, 1).

    Without `keep`, all samples of q k^T share one piece of memory.
    """
    batch, tokens, heads, _ = q.shape
    steps = _Steps.of(q, v)
    m = _by_pair(mixing, settings)
    out = torch.empty(v.shape, dtype=v.dtype)
    scores, matrix = (steps.room(tokens, settings.dtype) for _ in range(2))
    if keep:
        scores = torch.empty(batch * heads, tokens, tokens, dtype=settings.dtype)
    n = torch.empty(batch, heads, tokens, 1, dtype=settings.dtype)
    for samples, rows in steps:
        x = scores[rows] if keep else scores[: rows.stop - rows.start]
        torch.bmm(_features(q[samples], settings), _features(k[samples], settings).mT, out=x)
        p = torch.mul(_by_head(x, heads), m, out=_by_head(matrix[: len(x)], heads))
        o = p.flatten(0, 1).bmm(_rows(v[samples].to(settings.dtype)))
        if settings.normalize:
            o.div_(torch.sum(p, -1, keepdim=True, out=n[samples]).add_(settings.eps).flatten(0, 1))
        _store(out[samples], o)
    return out, scores, n


def _backward(settings: ReluMHLA, grad: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    q, k, v, mixing, out, scores, n = saved
    tokens, heads = q.shape[1:3]
    steps = _Steps.of(q, v)
    m = _by_pair(mixing, settings)
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    matrix, d_matrix = (steps.room(tokens, settings.dtype) for _ in range(2))
    d_m = torch.zeros_like(matrix)  # summed over samples as they come, and over the others at the end
    for samples, rows in steps:
        x, count = scores[rows], rows.stop - rows.start
        g = grad[samples].to(settings.dtype)
        if settings.normalize:
            g = g / n[samples].transpose(1, 2)
        p = torch.mul(_by_head(x, heads), m, out=_by_head(matrix[:count], heads)).flatten(0, 1)
        _store(grad_v[samples], p.mT.bmm(_rows(g)))
        d_p = torch.bmm(_rows(g), _rows(v[samples].to(settings.dtype)).mT, out=d_matrix[:count])
        if settings.normalize:
            d_p.sub_(_rows((g * out[samples]).sum(-1, keepdim=True)))
        d_m[:count].addcmul_(d_p, x)
        _by_head(d_p, heads).mul_(m)
        q_features, k_features = (_features(y[samples], settings) for y in (q, k))
        _store(grad_q[samples], _relu_backward(d_p.bmm(k_features), q_features, settings))
        _store(grad_k[samples], _relu_backward(d_p.mT.bmm(q_features), k_features, settings))
    by_head = _by_head(d_m, heads).sum(0)
    by_matrix = by_head if mixing.dim() == 3 else by_head.sum(0)
    d_mixing = torch.zeros(mixing.shape, dtype=settings.dtype).flatten(-2)
    d_mixing.index_add_(-1, _pairs(settings), by_matrix.flatten(-2))
    return grad_q, grad_k, grad_v, d_mixing.view(mixing.shape).to(mixing.dtype)


def _keeping(
    q: Tensor, k: Tensor, v: Tensor, mixing: Tensor | None, settings: ReluMHLA
) -> tuple[Tensor, tuple[Tensor, ...]]:
    assert mixing is not None
    out, *kept = _forward(q, k, v, mixing, settings, keep=True)
    return out, tuple(kept)


_FORM = WrittenForm(_keeping, _backward)


@dataclass(frozen=True)
class _Steps:
    """Samples of a batch, a few at a time.

    Attributes:
        batch: samples of all.
        heads: of a sample.
        at_once: samples of one step.
    """

    batch: int
    heads: int
    at_once: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor) -> _Steps:
        batch, tokens, heads, dim = q.shape
        sample = heads * tokens * max(tokens, dim, v.shape[3])
        return cls(batch, heads, min(batch, max(1, SCORES // sample)))

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Yield the samples of a step, and their rows of (batch x heads)."""
        for first in range(0, self.batch, self.at_once):
            last = min(self.batch, first + self.at_once)
            yield slice(first, last), slice(first * self.heads, last * self.heads)

    def room(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """Return uninitialized scores of one step, (samples x heads, tokens, tokens)."""
        return torch.empty(self.at_once * self.heads, tokens, tokens, dtype=dtype)


def _rows(x: Tensor) -> Tensor:
    """Reorder (samples, tokens, heads, dim) to (samples x heads, tokens, dim).

    One sample alone is viewed and not copied.
    """
    return x.transpose(1, 2).flatten(0, 1)


def _store(x: Tensor, rows: Tensor) -> None:
    """Write rows (samples x heads, tokens, dim) to x (samples, tokens, heads, dim)."""
    x.copy_(_by_head(rows, x.shape[2]).transpose(1, 2))


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """View (samples x heads, ...) as (samples, heads, ...)."""
    return rows.unflatten(0, (-1, heads))


def _features(x: Tensor, settings: ReluMHLA) -> Tensor:
    """Return relu(x) + offset of x (samples, tokens, heads, dim) as rows."""
    features = _rows(x).to(settings.dtype).clamp_min(0)
    return features.add_(settings.offset) if settings.offset else features


def _relu_backward(grad: Tensor, features: Tensor, settings: ReluMHLA) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(grad, features, settings.offset, grad_input=grad)


def _by_pair(mixing: Tensor, settings: ReluMHLA) -> Tensor:
    """Return m[b(i), b(j)] of all pairs of tokens, (tokens, tokens) or (heads, tokens, tokens)."""
    flat = mixing.to(settings.dtype).flatten(-2).index_select(-1, _pairs(settings))
    return flat.unflatten(-1, (settings.grid.tokens, -1))


def _pairs(settings: ReluMHLA) -> Tensor:
    # A constant, lifted as torch.tensor lifts one: under a fake mode it is a fake tensor.
    return torch.ops.aten.lift_fresh(torch.frombuffer(settings.grid.pairs, dtype=torch.int64))
