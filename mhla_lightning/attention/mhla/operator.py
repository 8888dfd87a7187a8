"""The MHLA operator behind the attention contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.attention import base
from mhla_lightning.attention.mhla.bidirectional import NORMALIZERS, mhla
from mhla_lightning.attention.mhla.fused import fused_mhla
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.mixing import MixingMatrix, mix_options
from mhla_lightning.errors import UserError, unknown_name


class MHLA(base.Attention):
    """Multi-Head Linear Attention, paper Eq. 4. Defaults are the paper's.

    Args:
        grid: token counts per axis that the mixing matrix is made for.
        blocks: blocks per axis (give this or block_size).
        block_size: tokens of a block per axis.
        normalizer: `block` (Eq. 4), `slot` (the release's) or `none`.
        mix_init, mix_init_options, mix_learnable, mix_clamp: see :class:`MixingMatrix`.
        mix_per_head: one mixing matrix a head instead of one a layer (beyond the paper, SPEC P6).
        feature_map: see :func:`mhla_lightning.attention.base.feature_map`.
        eps: added to the normalizer and by `relu_eps` to the features.

    Raises:
        UserError: blocks that do not fit the grid, unknown names, `slot` with short blocks.
    """

    def __init__(
        self,
        *,
        heads: int,
        dim_k: int,
        dim_v: int,
        grid: Sequence[int] | None = None,
        blocks: int | Sequence[int] | None = None,
        block_size: int | Sequence[int] | None = None,
        normalizer: str = "block",
        mix_init: str = "local_row",
        mix_init_options: Mapping[str, float] | None = None,
        mix_learnable: bool = True,
        mix_clamp: Sequence[float] | None = (0.0, 1.0),
        mix_per_head: bool = False,
        feature_map: str = "relu_eps",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if grid is None:
            raise UserError("attention 'mhla' needs a grid: the token counts per axis")
        if normalizer not in NORMALIZERS:
            raise UserError(unknown_name("normalizer", normalizer, NORMALIZERS))
        options: dict[str, Any] = mix_options(mix_init_options)
        self.partition = {"blocks": blocks, "block_size": block_size}
        self.grid = BlockGrid(grid, blocks, block_size=block_size)
        if normalizer == "slot" and not self.grid.even:
            raise UserError(
                f"normalizer 'slot' needs full blocks, and {self.grid} has short ones; use 'block' or 'none'"
            )
        self.normalizer = normalizer
        self.eps = eps
        self.phi = base.feature_map(feature_map, eps)
        self.fused_offset = None if normalizer == "slot" else base.relu_offset(feature_map, eps)
        self.mixing = MixingMatrix(
            self.grid,
            mix_init,
            learnable=mix_learnable,
            clamp=mix_clamp,
            heads=heads if mix_per_head else None,
            **options,
        )

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
        if mask is not None and self.normalizer == "slot":
            raise UserError(
                "normalizer 'slot' reads the queries of other blocks, padded ones too; use 'block' "
                "or 'none' with a mask"
            )
        blocks = self._blocks(grid)
        if q.shape[1] != blocks.tokens:
            raise UserError(f"{q.shape[1]} tokens do not fill the grid {blocks.grid} of {blocks.tokens}")
        mixing = self._matrix(blocks)
        with base.full_precision(q):
            # A compiler fuses the plain form itself; rotary and masks take it too.
            if (
                self.fused_offset is not None
                and rotary is None
                and mask is None
                and not torch.compiler.is_compiling()
            ):
                normalize, dtype = self.normalizer == "block", base.accumulation_dtype(q)
                return fused_mhla(
                    q,
                    k,
                    v,
                    mixing,
                    blocks,
                    offset=self.fused_offset,
                    normalize=normalize,
                    eps=self.eps,
                    dtype=dtype,
                )
            return self._plain(q, k, v, mixing, blocks, rotary, mask)

    def _blocks(self, grid: Sequence[int] | None) -> BlockGrid:
        if grid is None or tuple(grid) == self.grid.grid:
            return self.grid
        if self.is_image(grid):
            return BlockGrid(grid, (1, *self.grid.blocks[1:]))
        return BlockGrid(grid, **self.partition)

    def _matrix(self, blocks: BlockGrid) -> Tensor:
        if not self.is_image(blocks.grid):
            return self.mixing.matrix(blocks.num_blocks)
        return self.mixing.matrix(self.grid.num_blocks)[..., : blocks.num_blocks, : blocks.num_blocks]

    def is_image(self, grid: Sequence[int]) -> bool:
        """Whether a grid is one frame for blocks of videos: it is mixed like their first blocks in time,
        as the first frame of a video is.
        """
        return (
            len(grid) == 3
            and grid[0] == 1
            and self.partition["blocks"] is not None
            and self.grid.blocks[0] > 1
        )

    def _plain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mixing: Tensor,
        blocks: BlockGrid,
        rotary: base.Rotary | None,
        mask: Tensor | None,
    ) -> Tensor:
        dtype = v.dtype
        q, k, v = (x.to(base.accumulation_dtype(x)) for x in (q, k, v))
        q, k = self.phi(q), self.phi(k)
        if mask is not None:
            k = k * mask[:, :, None, None].to(k.dtype)
        # to_blocks fills short blocks with zeros after the feature map, so the missing places count nowhere
        # (SPEC 1.5).
        q_turned, k_turned = (q, k) if rotary is None else (rotary(q), rotary(k))
        apart = rotary is not None and self.normalizer != "none"  # the normalizer sees them unturned
        out = mhla(
            _to_blocks(q_turned, blocks),
            _to_blocks(k_turned, blocks),
            _to_blocks(v, blocks),
            mixing.to(q.dtype),
            normalizer=self.normalizer,
            eps=self.eps,
            q_norm=_to_blocks(q, blocks) if apart else None,
            k_norm=_to_blocks(k, blocks) if apart else None,
        )
        out = blocks.from_blocks(out).transpose(1, 2)
        if mask is not None:
            out = out * mask[:, :, None, None].to(out.dtype)
        return out.to(dtype)

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        padded = self.grid.num_blocks * self.grid.tokens_per_block
        mixed = self.grid.num_blocks**2
        normalizer = {
            "block": dim_k * (mixed + padded),
            "slot": dim_k * padded + mixed * self.grid.tokens_per_block,
            "none": 0,
        }
        return 2 * heads * (dim_k * dim_v * (2 * padded + mixed) + normalizer[self.normalizer])


def _to_blocks(x: Tensor, blocks: BlockGrid) -> Tensor:
    """(batch, tokens, heads, dim) in raster order -> (batch, heads, blocks, tokens_per_block, dim), one
    copy.
    """
    return blocks.to_blocks(x.transpose(1, 2))
