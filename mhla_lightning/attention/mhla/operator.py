"""The MHLA operator behind the attention contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhla_lightning.arguments.checked import CheckedOptions
from mhla_lightning.attention import base
from mhla_lightning.attention.context import Context
from mhla_lightning.attention.mhla.bidirectional import NORMALIZERS, mhla_on_grid
from mhla_lightning.attention.mhla.fused import fused_mhla
from mhla_lightning.attention.mhla.grid import BlockGrid, cut_alike, single_frame
from mhla_lightning.attention.mhla.mixing import MixingInit, MixingMatrix, keys_of_an_entry
from mhla_lightning.attention.mhla.reference import dense_mhla
from mhla_lightning.attention.mhla.triton import choice
from mhla_lightning.attention.reweighting import reweighted, reweighting_flops
from mhla_lightning.errors import UserError


@dataclass(frozen=True)
class MHLAOptions(CheckedOptions):
    """Keys of an `mhla` entry that belong to the operator. Defaults are the paper's.

    Args:
        blocks: blocks per axis; give this or block_size.
        block_size: tokens of a block per axis.
        normalizer: `block` (Eq. 4), `slot` (the release's) or `none`.
        mix_init: initialization of the mixing matrix, see :func:`initial_mixing`.
        mix_init_options: its options, see :class:`MixingInit`; None means their defaults.
        mix_learnable, mix_clamp: `learnable` and `clamp` of :class:`MixingMatrix`.
        mix_form: `absolute`, or `relative` with one weight per head and offset between blocks, which serves
            any number of blocks (beyond the paper), see :class:`MixingMatrix`.
        mix_per_head: one mixing per head instead of one per layer (beyond the paper, SPEC P6); None means
            False for the absolute form, True for the relative one.
        feature_map: see :func:`mhla_lightning.attention.base.feature_map`.
        reweight_keys: weigh keys by the mean query, see
            :func:`mhla_lightning.attention.reweighting.reweighted` (RALA's, beyond the paper).
        eps: added to the normalizer, and by `relu_eps` to the features.
        kernel: `auto`, `triton` or `torch`, see :func:`choice.kernel_setting`.
        float32_summaries: keep the Triton kernels' summaries in float32; torch always does.
    """

    blocks: int | Sequence[int] | None = None
    block_size: int | Sequence[int] | None = None
    normalizer: str = "block"
    mix_init: str = "local_row"
    mix_init_options: Mapping[str, float] | None = None
    mix_learnable: bool = True
    mix_clamp: Sequence[float] | None = (0.0, 1.0)
    mix_form: str = "absolute"
    mix_per_head: bool | None = None
    feature_map: str = "relu_eps"
    reweight_keys: bool = False
    eps: float = 1e-6
    kernel: str = "auto"
    float32_summaries: bool = False


class MHLA(base.Attention):
    """Multi-Head Linear Attention, paper Eq. 4.

    Args:
        heads: number of heads.
        dim_k, dim_v: channels per head of q and k, and of v.
        grid: token counts per axis that the mixing matrix is made for.
        options: blocks, normalizer, mixing matrix and feature map.

    Raises:
        UserError: no grid, blocks that do not fit it, unknown names, `slot` with short blocks.
    """

    options_type = MHLAOptions
    example = {"block_size": 3}  # noqa: RUF012  (read only)

    def __init__(
        self, *, heads: int, dim_k: int, dim_v: int, grid: Sequence[int] | None, options: MHLAOptions
    ) -> None:
        super().__init__()
        if grid is None:
            raise UserError("grid", "missing; attention 'mhla' needs the token counts per axis")
        base.known("normalizer", options.normalizer, NORMALIZERS)
        init_options = MixingInit.of(options.mix_init_options)
        self.blocks, self.block_size = options.blocks, options.block_size
        self.grid = BlockGrid(grid, options.blocks, block_size=options.block_size)
        if options.normalizer == "slot" and not self.grid.even:
            raise UserError(
                "normalizer",
                f"'slot' needs full blocks, and {self.grid} has short ones; use 'block' or 'none'",
            )
        self.normalizer, self.eps = options.normalizer, options.eps
        self.phi = base.feature_map(options.feature_map, options.eps)
        self.reweight_keys = options.reweight_keys
        apart = options.normalizer == "slot" or options.reweight_keys
        self.fused_offset = None if apart else base.relu_offset(options.feature_map, options.eps)
        self.kernel, self.float32_summaries = choice.kernel_setting(options.kernel), options.float32_summaries
        per_head = options.mix_form == "relative" if options.mix_per_head is None else options.mix_per_head
        with keys_of_an_entry():
            self.mixing = MixingMatrix(
                self.grid,
                options.mix_init,
                learnable=options.mix_learnable,
                clamp=options.mix_clamp,
                heads=heads if per_head else None,
                form=options.mix_form,
                init_options=init_options,
            )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        base.no_documents(context.documents)
        rotary, mask = context.rotary, context.mask
        if mask is not None and self.normalizer == "slot":
            raise UserError(
                "mask",
                "found beside normalizer 'slot', which reads the queries of other blocks, padded ones too; "
                "use 'block' or 'none'",
            )
        blocks = self._blocks(context.grid)
        if q.shape[1] != blocks.tokens:
            raise UserError(
                "grid", f"{q.shape[1]} tokens do not fill {blocks.grid}, which has {blocks.tokens}"
            )
        mixing = self._matrix(blocks)
        lowered = choice.operands(self.kernel, q, k, v)
        if choice.takes_triton(self.kernel, *lowered, context, self._unfit()):
            from mhla_lightning.attention.mhla.triton.ops import triton_mhla

            assert self.fused_offset is not None
            return triton_mhla(
                *lowered,
                mixing,
                blocks,
                offset=self.fused_offset,
                eps=self.eps if self.normalizer == "block" else None,
                table=choice.turn_table(rotary),
                float32_summaries=self.float32_summaries,
            )
        # A compiler fuses the plain form itself. The fused form takes neither rotary nor masks.
        plain = rotary is not None or mask is not None or torch.compiler.is_compiling()
        with base.full_precision(q):
            if self.fused_offset is None or plain:
                phi = self.phi
                if self.reweight_keys:
                    q, k = reweighted(q, k, phi, mask)
                    phi = base.feature_map("identity", 0.0)
                return mhla_on_grid(
                    q,
                    k,
                    v,
                    mixing,
                    blocks,
                    phi=phi,
                    normalizer=self.normalizer,
                    eps=self.eps,
                    rotary=rotary,
                    mask=mask,
                )
            return fused_mhla(
                q,
                k,
                v,
                mixing,
                blocks,
                offset=self.fused_offset,
                normalize=self.normalizer == "block",
                eps=self.eps,
                dtype=base.accumulation_dtype(q),
                compiled=self.kernel != "torch",
            )

    def _unfit(self) -> str | None:
        """Return what of this operator Triton kernels cannot do."""
        if self.fused_offset is not None:
            return None
        return "it takes the feature maps 'relu' and 'relu_eps', no normalizer 'slot' and no `reweight_keys`"

    def _blocks(self, grid: Sequence[int] | None) -> BlockGrid:
        """Return the blocks of a grid; None means the grid given at construction."""
        if grid is None or tuple(grid) == self.grid.grid:
            return self.grid
        return cut_alike(self.grid, grid, self.blocks, self.block_size)

    def _matrix(self, blocks: BlockGrid) -> Tensor:
        if self.mixing.form == "relative":
            return self.mixing.matrix(blocks.blocks)
        if not single_frame(self.grid, blocks.grid, self.blocks):
            return self.mixing.matrix(blocks.num_blocks)
        return self.mixing.matrix(self.grid.num_blocks)[..., : blocks.num_blocks, : blocks.num_blocks]

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        padded = self.grid.num_blocks * self.grid.tokens_per_block
        mixed = self.grid.num_blocks**2
        normalizer = {
            "block": dim_k * (mixed + padded),
            "slot": dim_k * padded + mixed * self.grid.tokens_per_block,
            "none": 0,
        }
        weights = reweighting_flops(tokens, heads, dim_k) if self.reweight_keys else 0
        return 2 * heads * (dim_k * dim_v * (2 * padded + mixed) + normalizer[self.normalizer]) + weights

    def rank_bound(self, grid: Sequence[int], dim_k: int) -> int:
        """Return the sum over blocks of min(tokens of the block, dim_k) (SPEC 1)."""
        sizes = self._blocks(grid).block_of_token.bincount()
        return int(sizes.clamp(max=dim_k).sum())

    def partition(self, grid: Sequence[int]) -> tuple[int, ...]:
        return self._blocks(grid).block_size

    def dense(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        blocks = self._blocks(context.grid)
        q, k = reweighted(q, k, self.phi, context.mask) if self.reweight_keys else (self.phi(q), self.phi(k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = dense_mhla(
            q,
            k,
            v,
            self._matrix(blocks),
            blocks.block_of_token,
            normalizer=self.normalizer,
            eps=self.eps,
            mask=context.mask,
        )
        return out.transpose(1, 2)
