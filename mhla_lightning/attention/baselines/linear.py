"""Linear attention with one summary for all tokens (SPEC 1.6).

It is MHLA with M = 1, and a baseline of the paper's tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mhla_lightning.attention import base
from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.context import Context
from mhla_lightning.attention.mhla.fused import fused_mhla
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.reference import dense_mhla
from mhla_lightning.attention.mhla.triton import choice
from mhla_lightning.attention.reweighting import reweighted, reweighting_flops

_PART = 512  # most tokens that are summed up at once
_KERNEL_PART = 1024  # the same for one program of a Triton kernel


class Linear(base.Attention):
    """o_t = phi(q_t) S / (phi(q_t) . z + eps), with S = sum phi(k) v^T and z = sum phi(k).

    Args:
        feature_map: see :func:`mhla_lightning.attention.base.feature_map`; the release's baseline has `relu`.
        reweight_keys: weigh keys by the mean query, as RALA does, see
            :func:`mhla_lightning.attention.reweighting.reweighted`.
        eps: added to the normalizer, and by `relu_eps` to the features.
        kernel: `auto`, `triton` or `torch`, see :func:`choice.kernel_setting`.

    Raises:
        UserError: unknown feature map or kernel.
    """

    def __init__(
        self,
        *,
        heads: int,
        dim_k: int,
        dim_v: int,
        grid: Sequence[int] | None = None,
        feature_map: str = "relu",
        reweight_keys: bool = False,
        eps: float = 1e-6,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.eps, self.kernel = eps, choice.kernel_setting(kernel)
        self.phi = base.feature_map(feature_map, eps)
        self.reweight_keys = reweight_keys
        self.fused_offset = None if reweight_keys else base.relu_offset(feature_map, eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        base.no_documents(context.documents)
        rotary, mask = context.rotary, context.mask
        lowered = choice.operands(self.kernel, q, k, v)
        unfit = None
        if self.fused_offset is None:
            unfit = "it takes the feature maps 'relu' and 'relu_eps', and no `reweight_keys`"
        if choice.takes_triton(self.kernel, *lowered, context, unfit):
            from mhla_lightning.attention.mhla.triton.ops import triton_mhla

            assert self.fused_offset is not None
            parts, table = self.parts(q.shape[1]), choice.turn_table(rotary)
            return triton_mhla(*lowered, None, parts, offset=self.fused_offset, eps=self.eps, table=table)
        # A compiler fuses the plain form itself. The fused form takes neither rotary nor masks.
        plain = rotary is not None or mask is not None or torch.compiler.is_compiling()
        with base.full_precision(q):
            if self.fused_offset is None or plain:
                return self._plain(q, k, v, rotary, mask)
            parts = BlockGrid((q.shape[1],), ceil_div(q.shape[1], _PART))
            dtype = base.accumulation_dtype(q)
            return fused_mhla(q, k, v, None, parts, offset=self.fused_offset, eps=self.eps, dtype=dtype)

    @staticmethod
    def parts(tokens: int) -> BlockGrid:
        """Return the parts of a row that one program of a Triton kernel sums up each."""
        return BlockGrid((tokens,), ceil_div(tokens, _KERNEL_PART))

    def _plain(
        self, q: Tensor, k: Tensor, v: Tensor, rotary: base.Rotary | None, mask: Tensor | None
    ) -> Tensor:
        dtype = v.dtype
        q, k = self._features(q, k, mask)
        q, k, v = (x.to(base.accumulation_dtype(x)).transpose(1, 2) for x in (q, k, v))
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

    def _features(self, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return phi(q) and the keys' features, in float32 at least."""
        if self.reweight_keys:
            return reweighted(q, k, self.phi, mask)
        return self.phi(q.to(base.accumulation_dtype(q))), self.phi(k.to(base.accumulation_dtype(k)))

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        weights = reweighting_flops(tokens, heads, dim_k) if self.reweight_keys else 0
        return 2 * heads * tokens * dim_k * (2 * dim_v + 1) + weights

    def rank_bound(self, grid: Sequence[int], dim_k: int) -> int:
        """Return min(N, dim_k): one summary serves all queries."""
        return min(math.prod(grid), dim_k)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        q, k = self._features(q, k, context.mask)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        one, block = q.new_ones(1, 1), torch.zeros(q.shape[2], dtype=torch.int64, device=q.device)
        return dense_mhla(q, k, v, one, block, eps=self.eps, mask=context.mask).transpose(1, 2)
