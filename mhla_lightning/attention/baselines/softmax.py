"""Softmax attention through torch's scaled_dot_product_attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.base import Attention, no_documents
from mhla_lightning.attention.context import Context


class Softmax(Attention):
    """Quadratic softmax attention, the baseline; the scale is dim_k ** -0.5."""

    def __init__(self, *, heads: int, dim_k: int, dim_v: int, grid: Sequence[int] | None = None) -> None:
        super().__init__()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        no_documents(context.documents)
        rotary, mask = context.rotary, context.mask
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        # A sample without any real token would have empty softmax rows (NaN). It sees all tokens instead, and
        # its output is set to zero below.
        keys = mask | ~mask.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None]).transpose(1, 2)
        return out * mask[:, :, None, None].to(out.dtype)

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        return 2 * heads * tokens * tokens * (dim_k + dim_v)

    def rank_bound(self, grid: Sequence[int], dim_k: int) -> int:
        return math.prod(grid)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
        if context.mask is not None:
            scores = scores.masked_fill(~context.mask[:, None, None], -torch.inf)
        out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return out if context.mask is None else out * context.mask[:, :, None, None]
