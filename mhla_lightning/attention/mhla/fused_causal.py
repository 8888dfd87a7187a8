"""Causal Multi-Head Linear Attention with a hand-written backward, for long rows on a CPU.

Plain autograd writes the scores of every chunk to memory and reads them back three times. At 16,384 tokens
that costs more than the matrix products. Here a few chunks of one head are finished before the next ones, and
the backward computes their scores again. The numbers equal those of the plain form in `causal.py` (a test).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.base import full_precision
from mhla_lightning.attention.transforms import in_transform, pulled_back

SLICE_ELEMENTS = 2**18
"""Scores that one slice holds (1 MiB in float32)."""
WORTHWHILE = 2**19
"""Scores of a head from which on slices are faster; below, all heads at once are."""


def pays(chunk_size: int, q: Tensor, *others: Tensor) -> bool:
    """Return whether slices are faster than plain autograd for q (batch, heads, tokens, dim_k).

    They are not under a compiler, which fuses the plain form itself, and cannot serve torch.func. `others`
    are the call's other tensors.
    """
    long = q.device.type == "cpu" and q.shape[2] * chunk_size >= WORTHWHILE
    return long and not torch.compiler.is_compiling() and not in_transform(q, *others)


def fused_causal(
    q: Tensor, k: Tensor, v: Tensor, among: Tensor | None, diagonal: Tensor, chunk_size: int
) -> Tensor:
    """Compute causal MHLA of feature-mapped tokens.

    A token of chunk i gets sum_{b<i} among[i, b] q S_b, plus diagonal[i] times the causal q k^T v of its own
    chunk.

    Args:
        q, k: (batch, heads, tokens, dim_k), feature-mapped; any strides.
        v: (batch, heads, tokens, dim_v); any strides.
        among: (M, M) or (heads, M, M), zero on and above the diagonal; None means all ones below it.
        diagonal: (M,) or (heads, M).
        chunk_size: tokens per chunk; there are M chunks.

    Returns:
        (batch, heads, tokens, dim_v)
    """
    tokens = q.shape[2]
    spare = -tokens % chunk_size
    cut = ((F.pad(x, (0, 0, 0, spare)) if spare else x).unflatten(2, (-1, chunk_size)) for x in (q, k, v))
    return _FusedCausal.apply(*cut, among, diagonal).flatten(2, 3)[:, :, :tokens]


class _FusedCausal(torch.autograd.Function):
    """The function on chunks; q, k, v: (batch, heads, M, size, dim)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, among: Tensor | None, diagonal: Tensor) -> Tensor:
        out = torch.empty_like(v)
        kept: list[Tensor] = []
        for qh, kh, vh, oh, head in _heads(q, k, v, out):
            summaries = kh.mT @ vh
            prefix = _mix(_of_head(among, head, 2), summaries)
            kept += [summaries, prefix]
            own = _of_head(diagonal, head, 1)
            for part in _slices(qh):
                inside = (qh[part] @ kh[part].mT).tril_() @ vh[part]
                oh[part] = inside.mul_(_column(own, part)).baddbmm_(qh[part], prefix[part])
        ctx.save_for_backward(q, k, v, among, diagonal, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, among, diagonal, *kept = ctx.saved_tensors
        if torch.is_grad_enabled() or in_transform(grad):  # gradients of these gradients may be asked for
            with full_precision(q):
                return tuple(pulled_back(_plain, (q, k, v, among, diagonal), grad))
        summaries_and_prefixes = zip(kept[::2], kept[1::2], strict=True)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_among = None if among is None else torch.zeros_like(among)
        d_diagonal = torch.zeros_like(diagonal)
        with full_precision(q):
            for qh, kh, vh, gh, dqh, dkh, dvh, head in _heads(q, k, v, grad, dq, dk, dv):
                mixing, own = _of_head(among, head, 2), _of_head(diagonal, head, 1)
                summaries, prefix = next(summaries_and_prefixes)
                d_prefix = qh.mT @ gh
                d_summaries = _mix_back(mixing, d_prefix)
                if d_among is not None:
                    _of_head(d_among, head, 2).add_(d_prefix.flatten(1) @ summaries.flatten(1).mT)
                d_own = _of_head(d_diagonal, head, 1)
                for part in _slices(qh):
                    qp, kp, vp, gp, weight = qh[part], kh[part], vh[part], gh[part], _column(own, part)
                    # The weight multiplies rows of dim_v, not the scores, which are wider.
                    unweighted = (qp @ kp.mT).tril_().mT @ gp
                    d_own[part] += (unweighted * vp).sum((-2, -1))
                    dvh[part] = unweighted.mul_(weight).baddbmm_(kp, d_summaries[part])
                    d_scores = ((gp * weight) @ vp.mT).tril_()
                    dqh[part] = (gp @ prefix[part].mT).baddbmm_(d_scores, kp)
                    dkh[part] = (vp @ d_summaries[part].mT).baddbmm_(d_scores.mT, qp)
        return dq, dk, dv, None if d_among is None else d_among.tril_(-1), d_diagonal


def _plain(q: Tensor, k: Tensor, v: Tensor, among: Tensor | None, diagonal: Tensor) -> Tensor:
    """Compute the function on chunks in torch's own operations."""
    summaries = k.mT @ v
    if among is None:
        prefix = F.pad(summaries[:, :, :-1], (0, 0, 0, 0, 1, 0)).cumsum(2)
    else:
        prefix = (among.tril(-1) @ summaries.flatten(3)).view_as(summaries)
    return q @ prefix + diagonal[..., None, None] * ((q @ k.mT).tril() @ v)


def _heads(*tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield (M, size, dim) of every tensor for each sample and head, and the head's number."""
    batch, heads = tensors[0].shape[:2]
    for sample in range(batch):
        for head in range(heads):
            yield *(x[sample, head] for x in tensors), head


def _slices(q: Tensor) -> Iterator[slice]:
    """Yield slices of the chunks of q (M, size, dim) whose scores fit the budget together."""
    count, size = q.shape[:2]
    step = max(1, SLICE_ELEMENTS // size**2)
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def _of_head(x: Any, head: int, dims: int) -> Any:
    """Return the part of one head; tensors of `dims` dimensions and None serve all heads."""
    return x if x is None or x.dim() == dims else x[head]


def _column(own: Tensor, part: slice) -> Tensor:
    """Return the weights of some chunks, broadcastable to (chunks, size, dim)."""
    return own[part, None, None]


def _mix(mixing: Tensor | None, summaries: Tensor) -> Tensor:
    """Return mixing @ summaries, (M, dim_k, dim_v).

    Without mixing, it is the sum over all earlier chunks.
    """
    if mixing is None:
        return F.pad(summaries[:-1], (0, 0, 0, 0, 1, 0)).cumsum(0)
    return (mixing @ summaries.flatten(1)).view_as(summaries)


def _mix_back(mixing: Tensor | None, d_prefix: Tensor) -> Tensor:
    """Return the gradient of the summaries from that of :func:`_mix`'s result."""
    if mixing is None:
        return F.pad(d_prefix[1:], (0, 0, 0, 0, 0, 1)).flip(0).cumsum(0).flip(0)
    return (mixing.mT @ d_prefix.flatten(1)).view_as(d_prefix)
