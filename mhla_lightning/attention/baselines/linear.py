"""Linear attention with one summary for all tokens (SPEC 1.6): MHLA with M = 1, the baseline of the
paper's tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mhla_lightning.attention import base
from mhla_lightning.attention.mhla.fused import fused_mhla
from mhla_lightning.attention.mhla.grid import BlockGrid

_PART = 512  # tokens whose summary is taken at once, at most


class Linear(base.Attention):
    """o_t = phi(q_t) S / (phi(q_t) . z + eps), S = sum phi(k) v^T, z = sum phi(k).

    Args:
        feature_map: see :func:`mhla_lightning.attention.base.feature_map`; the release's baseline has relu
            without eps.
        eps: added to the normalizer (and by `relu_eps` to the features).
    """

    def __init__(
        self,
        *,
        heads: int,
        dim_k: int,
        dim_v: int,
        grid: Sequence[int] | None = None,
        feature_map: str = "relu",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.phi = base.feature_map(feature_map, eps)
        self.fused_offset = base.relu_offset(feature_map, eps)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Sequence[int] | None = None,
        rotary: base.Rotary | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        base.no_documents(documents)
        dtype = v.dtype
        with base.full_precision(q):
            # A compiler fuses the plain form itself; rotary and masks take it too.
            if (
                self.fused_offset is not None
                and rotary is None
                and mask is None
                and not torch.compiler.is_compiling()
            ):
                parts = BlockGrid((q.shape[1],), math.ceil(q.shape[1] / _PART))
                return fused_mhla(
                    q,
                    k,
                    v,
                    None,
                    parts,
                    offset=self.fused_offset,
                    eps=self.eps,
                    dtype=base.accumulation_dtype(q),
                )
            q, k, v = (x.to(base.accumulation_dtype(x)).transpose(1, 2) for x in (q, k, v))
            q, k = self.phi(q), self.phi(k)
            if mask is not None:
                k = k * mask[:, None, :, None].to(k.dtype)
            q_turned, k_turned = (
                (q, k) if rotary is None else (rotary(x.transpose(1, 2)).transpose(1, 2) for x in (q, k))
            )
            summary, z = k_turned.transpose(-2, -1) @ v, k.sum(-2)
            out = (q_turned @ summary) / (q @ z.unsqueeze(-1) + self.eps)
        out = out.transpose(1, 2)
        if mask is not None:
            out = out * mask[:, :, None, None].to(out.dtype)
        return out.to(dtype)

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        return 2 * heads * tokens * dim_k * (2 * dim_v + 1)
