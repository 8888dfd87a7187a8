"""Softmax attention through torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.base import Attention, Rotary, no_documents


class Softmax(Attention):
    """The quadratic baseline; scale is dim_k ** -0.5."""

    def __init__(self, *, heads: int, dim_k: int, dim_v: int, grid: Sequence[int] | None = None) -> None:
        super().__init__()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Sequence[int] | None = None,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        no_documents(documents)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        # A sample without any real token would have empty softmax rows (NaN): let it see all, its output is
        # zeroed below.
        keys = mask | ~mask.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None]).transpose(1, 2)
        return out * mask[:, :, None, None].to(out.dtype)

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        return 2 * heads * tokens * tokens * (dim_k + dim_v)
