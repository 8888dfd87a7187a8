"""Weights of keys by the mean query: RALA (arXiv 2411.07635; SPEC 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mhla_lightning.attention.base import accumulation_dtype


def reweighted(
    q: Tensor, k: Tensor, phi: Callable[[Tensor], Tensor], mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return features of q and k, where every key has a weight of its own.

    Of N tokens, key t is multiplied by N softmax_t(mean_s(phi(q_s)) . phi(k_t) / sqrt(dim)). The weights of
    a head have the mean 1.

    Args:
        q, k: (batch, tokens, heads, dim), before the feature map.
        phi: the feature map.
        mask: (batch, tokens) bool, True = real token; None means all tokens are real. Padded tokens change
            no weight.

    Returns:
        (batch, tokens, heads, dim) each, in float32 at least.
    """
    q, k = (phi(x.to(accumulation_dtype(x))) for x in (q, k))
    if mask is None:
        return q, k * (_weights(k, q.mean(1), None) * q.shape[1])
    count = mask.sum(1).clamp_min(1)[:, None, None].to(q.dtype)
    mean = (q * mask[:, :, None, None].to(q.dtype)).sum(1) / count
    return q, k * (_weights(k, mean, mask) * count.unsqueeze(-1))


def _weights(k: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
    """Return the softmax over the tokens, (batch, tokens, heads, 1).

    Args:
        k: features, (batch, tokens, heads, dim).
        mean: of the queries' features, (batch, heads, dim).
        mask: (batch, tokens) bool; None means all tokens are real.
    """
    scores = (k.transpose(1, 2) @ mean.unsqueeze(-1)).squeeze(-1)  # (batch, heads, tokens)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
    return (scores * k.shape[-1] ** -0.5).softmax(-1).transpose(1, 2).unsqueeze(-1)


def reweighting_flops(tokens: int, heads: int, dim_k: int) -> int:
    """Return the matrix-product FLOPs of one sample's forward, 2 a multiply-add."""
    return 2 * tokens * heads * dim_k
