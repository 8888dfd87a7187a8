"""The kernels as operators of torch, with gradients and FLOP formulas.

A compiler sees one node. The operators take plain numbers for the grid. The autocast rule is
`choice.operands`: the dispatcher's own rule would round the mixing matrix too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mhla_lightning.attention.base import full_precision
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.triton import blocks as block_form
from mhla_lightning.attention.mhla.triton import dense as dense_form
from mhla_lightning.attention.mhla.triton.choice import dense_is_cheaper
from mhla_lightning.attention.mhla.triton.tiles import call_sizes

FORMS = ("dense", "blocks")


def triton_mhla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor | None,
    grid: BlockGrid,
    *,
    offset: float,
    eps: float | None,
    table: Tensor | None = None,
    float32_summaries: bool = False,
    form: str | None = None,
) -> Tensor:
    """Compute MHLA, Eq. 4, with relu features on Triton kernels.

    Args:
        q, k: (batch, tokens, heads, dim_k) in raster order, before the feature map relu(x) + offset.
        v: (batch, tokens, heads, dim_v) of their dtype.
        mixing: (blocks, blocks) or (heads, blocks, blocks); None is linear attention, whatever the blocks.
        grid: the blocks; short last blocks are allowed.
        offset: added by the feature map.
        eps: added to the normalizer; None means no normalizer.
        table: (tokens, dim_k / 2, 2) float32, cosine and sine that turn neighbouring channels; block form.
        float32_summaries: keep summaries in float32; by default they have q's dtype.
        form: `dense` or `blocks`; None takes the cheaper one.

    Returns:
        (batch, tokens, heads, dim_v) in v's dtype.
    """
    batch, tokens, heads, dim = q.shape
    if form is None:
        sizes = call_sizes(batch * heads, grid, dim, v.shape[3], mixed=mixing is not None)
        form = "dense" if table is None and dense_is_cheaper(sizes) else "blocks"
    if form == "blocks":
        return blocks(q, k, v, mixing, table, grid.grid, grid.block_size, offset, eps, float32_summaries)[0]
    if mixing is None:
        grid, mixing = BlockGrid((tokens,), 1), torch.ones(1, 1, device=q.device)
    return dense(q, k, v, mixing, grid.grid, grid.block_size, offset, eps)[0]


@torch.library.custom_op("mhla::dense", mutates_args=())
def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    grid: Sequence[int],
    block_size: Sequence[int],
    offset: float,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the output and 1 / normalizer of the N x N form; see :func:`triton_mhla`."""
    with full_precision(q):
        return dense_form.forward(q, k, v, mixing, BlockGrid(grid, block_size=block_size), offset, eps)


@dense.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    grid: Sequence[int],
    block_size: Sequence[int],
    offset: float,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _inverse(q, eps)


def _inverse(q: Tensor, eps: float | None) -> Tensor:
    batch, tokens, heads, _ = q.shape
    return q.new_empty((batch, heads, 0 if eps is None else tokens), dtype=torch.float32)


@torch.library.custom_op("mhla::dense_backward", mutates_args=())
def dense_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    saved: Sequence[Tensor],
    grid: Sequence[int],
    block_size: Sequence[int],
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the mixing matrix; `saved` is of :func:`dense`."""
    with full_precision(q):
        blocks_of = BlockGrid(grid, block_size=block_size)
        return dense_form.backward(grad, (q, k, v), mixing, saved, blocks_of, offset)


@dense_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    saved: Sequence[Tensor],
    grid: Sequence[int],
    block_size: Sequence[int],
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), mixing.new_empty(mixing.shape)


def _save_dense(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mixing, *ctx.numbers, _ = inputs
    ctx.save_for_backward(q, k, v, mixing, *output)
    ctx.set_materialize_grads(False)


def _differentiate_dense(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    q, k, v, mixing, *saved = ctx.saved_tensors
    return (*dense_backward(grad, q, k, v, mixing, saved, *ctx.numbers), None, None, None, None)


dense.register_autograd(_differentiate_dense, setup_context=_save_dense)


@torch.library.custom_op("mhla::blocks", mutates_args=())
def blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor | None,
    table: Tensor | None,
    grid: Sequence[int],
    block_size: Sequence[int],
    offset: float,
    eps: float | None,
    float32_summaries: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, 1 / normalizer, S~, z~, S and z; see :func:`triton_mhla`."""
    plan = _plan(q, grid, block_size, offset, eps, float32_summaries)
    with full_precision(q):
        return block_form.forward(q, k, v, mixing, table, plan)


def _plan(
    q: Tensor,
    grid: Sequence[int],
    block_size: Sequence[int],
    offset: float,
    eps: float | None,
    float32_summaries: bool,
) -> block_form.BlockPlan:
    dtype = torch.float32 if float32_summaries else q.dtype
    return block_form.BlockPlan(BlockGrid(grid, block_size=block_size), offset, eps, dtype)


@blocks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor | None,
    table: Tensor | None,
    grid: Sequence[int],
    block_size: Sequence[int],
    offset: float,
    eps: float | None,
    float32_summaries: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    summary, z = _plan(q, grid, block_size, offset, eps, float32_summaries).empty_sums(q, v.shape[3])
    if mixing is None:
        mixed, z_mixed = (x.new_empty((*x.shape[:2], min(1, x.shape[2]), *x.shape[3:])) for x in (summary, z))
    else:
        mixed, z_mixed = torch.empty_like(summary), torch.empty_like(z)
    return v.new_empty(v.shape), _inverse(q, eps), mixed, z_mixed, summary, z


@torch.library.custom_op("mhla::blocks_backward", mutates_args=())
def blocks_backward(
    grad: Tensor,
    tokens: Sequence[Tensor],
    mixing: Tensor | None,
    table: Tensor | None,
    saved: Sequence[Tensor],
    grid: Sequence[int],
    block_size: Sequence[int],
    offset: float,
    eps: float | None,
    float32_summaries: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the mixing matrix; see `blocks.backward`."""
    plan = _plan(tokens[0], grid, block_size, offset, eps, float32_summaries)
    with full_precision(grad):
        return block_form.backward(grad, tokens, mixing, table, saved, plan)


@blocks_backward.register_fake
def _(
    grad: Tensor,
    tokens: Sequence[Tensor],
    mixing: Tensor | None,
    table: Tensor | None,
    saved: Sequence[Tensor],
    grid: Sequence[int],
    block_size: Sequence[int],
    offset: float,
    eps: float | None,
    float32_summaries: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in tokens)
    d_mixing = grad.new_empty(0, dtype=torch.float32) if mixing is None else mixing.new_empty(mixing.shape)
    return dq, dk, dv, d_mixing


def _save_blocks(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mixing, table, *ctx.numbers = inputs
    out, inverse, mixed, z_mixed, *sums = output
    sums = [] if mixing is None else sums  # only the gradient of a matrix reads them
    ctx.save_for_backward(q, k, v, mixing, table, out, inverse, mixed, z_mixed, *sums)
    ctx.set_materialize_grads(False)


def _differentiate_blocks(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    q, k, v, mixing, table, *saved = ctx.saved_tensors
    *tokens, d_mixing = blocks_backward(grad, [q, k, v], mixing, table, saved, *ctx.numbers)
    return (*tokens, None if mixing is None else d_mixing, *(None,) * 6)


blocks.register_autograd(_differentiate_blocks, setup_context=_save_blocks)

Shape = Sequence[int]


@register_flop_formula(torch.ops.mhla.dense)
def _dense_flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    batch, tokens, heads, dim = q
    return 2 * batch * heads * tokens**2 * (dim + v[3])


@register_flop_formula(torch.ops.mhla.dense_backward)
def _dense_backward_flops(grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    batch, tokens, heads, dim = q
    return 2 * batch * heads * tokens**2 * (3 * dim + 2 * v[3])


def _block_flops(q: Shape, v: Shape, mixing: Shape | None, eps: float | None) -> int:
    """Return the FLOPs of the forward; the backward has twice as many."""
    batch, tokens, heads, dim = q
    pairs = 0 if mixing is None else mixing[-1] ** 2
    return 2 * batch * heads * dim * (v[3] * (2 * tokens + pairs) + (0 if eps is None else pairs))


@register_flop_formula(torch.ops.mhla.blocks)
def _blocks_flops(
    q: Shape,
    k: Shape,
    v: Shape,
    mixing: Shape | None,
    table: Shape | None,
    grid: Shape,
    block_size: Shape,
    offset: float,
    eps: float | None,
    *_: Any,
    **__: Any,
) -> int:
    return _block_flops(q, v, mixing, eps)


@register_flop_formula(torch.ops.mhla.blocks_backward)
def _blocks_backward_flops(
    grad: Shape,
    tokens: Sequence[Shape],
    mixing: Shape | None,
    table: Shape | None,
    saved: Sequence[Shape],
    grid: Shape,
    block_size: Shape,
    offset: float,
    eps: float | None,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * _block_flops(tokens[0], tokens[2], mixing, eps)
