"""MHLA for short rows: Eq. 5 as one N x N kernel, like FlashAttention without a softmax.

A[i, j] = m[b(i), b(j)] phi(q_i) . phi(k_j) and o_i = sum_j A[i, j] v_j / (sum_j A[i, j] + eps).

Tiles hold tokens in block order, each block padded to a power of two. So a tile of A needs few entries of m,
and the gradient of m is a sum over whole rectangles of a tile. Tokens are read and written in raster order.

The backward of a row that fits one tile is one kernel: every token's gradient is finished in one program.
Longer rows take two kernels, one over queries and one over keys. Nothing is added atomically.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.triton import tiles
from mhla_lightning.attention.mhla.triton.device import (
    INTERPRETED,
    contiguous_channels,
    features,
    geometry,
    keep,
    precision,
    product,
    rows,
    rows_of_tile,
    strides,
)
from mhla_lightning.attention.mhla.triton.launch import Launch, start


@triton.jit
def mixing_tile(
    mixing: Any, a: Any, b: Any, M: Any, sa: Any, sb: Any, W: tl.constexpr, V: tl.constexpr, TP: tl.constexpr
) -> Any:
    """Return m[a + i // TP, b + j // TP] of a W x V tile; the strides may transpose m."""
    NA: tl.constexpr = W // TP if TP <= W else 1
    NB: tl.constexpr = V // TP if TP <= V else 1
    row, column = a + tl.arange(0, NA), b + tl.arange(0, NB)
    there = (row < M)[:, None] & (column < M)[None, :]
    m = tl.load(mixing + row[:, None] * sa + column[None, :] * sb, mask=there, other=0.0).to(tl.float32)
    return tl.reshape(tl.broadcast_to(m[:, None, :, None], (NA, W // NA, NB, V // NB)), (W, V))


@triton.jit
def dense_forward_kernel(
    q: Any,
    k: Any,
    v: Any,
    mixing: Any,
    out: Any,
    inverse: Any,
    sqb: Any,
    sqn: Any,
    sqh: Any,
    skb: Any,
    skn: Any,
    skh: Any,
    svb: Any,
    svn: Any,
    svh: Any,
    sob: Any,
    son: Any,
    soh: Any,
    smh: Any,
    H: Any,
    N: Any,
    TILES: Any,
    M: Any,
    NB1: Any,
    NB2: Any,
    G0: Any,
    G1: Any,
    G2: Any,
    offset: Any,
    eps: Any,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    TP: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Output of one tile of queries."""
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += b * skb + h * skh
    v += b * svb + h * svh
    place, there, qa = rows_of_tile(tile, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BQ, TP)
    raw = rows(q + b * sqb + h * sqh, place, there, sqn, D, DP)
    queries = features(raw, there, offset, D, DP).to(raw.dtype)
    acc = tl.zeros((BQ, DVP), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    for j in range(TILES):
        at, is_key, ka = rows_of_tile(j, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BK, TP)
        keys = features(rows(k, at, is_key, skn, D, DP), is_key, offset, D, DP).to(raw.dtype)
        values = rows(v, at, is_key, svn, DV, DVP)
        a = product(queries, tl.trans(keys), UP, PREC)
        a *= mixing_tile(mixing + h * smh, qa, ka, M, M, 1, BQ, BK, TP)
        total += tl.sum(a, 1)
        acc += product(a.to(values.dtype), values, UP, PREC)
    if NORM:
        one_over = 1.0 / (total + eps)
        acc *= one_over[:, None]
        tl.store(inverse + (b * H + h) * N + place, one_over, mask=there)
    keep(out + b * sob + h * soh, place, there, son, acc, DV, DVP)


@triton.jit
def dense_backward_kernel(
    q: Any,
    k: Any,
    v: Any,
    mixing: Any,
    out: Any,
    inverse: Any,
    grad: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    d_total: Any,
    d_mixing: Any,
    sqb: Any,
    sqn: Any,
    sqh: Any,
    skb: Any,
    skn: Any,
    skh: Any,
    svb: Any,
    svn: Any,
    svh: Any,
    sob: Any,
    son: Any,
    soh: Any,
    sgb: Any,
    sgn: Any,
    sgh: Any,
    smh: Any,
    H: Any,
    N: Any,
    TILES: Any,
    ROWS: Any,
    COLUMNS: Any,
    M: Any,
    NB1: Any,
    NB2: Any,
    G0: Any,
    G1: Any,
    G2: Any,
    offset: Any,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    TP: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    WHOLE: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Gradients of one tile of queries, and of all keys too where the tile holds the row.

    dq, dk and dv are contiguous. d_mixing is (batch, heads, ROWS, COLUMNS), a sum for every pair of blocks or
    of parts of blocks.
    """
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += b * skb + h * skh
    v += b * svb + h * svh
    place, there, qa = rows_of_tile(tile, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BQ, TP)
    raw = rows(q + b * sqb + h * sqh, place, there, sqn, D, DP)
    queries = features(raw, there, offset, D, DP).to(raw.dtype)
    g = rows(grad + b * sgb + h * sgh, place, there, sgn, DV, DVP).to(tl.float32)
    d_sum = tl.zeros((BQ,), tl.float32)
    if NORM:
        g *= tl.load(inverse + (b * H + h) * N + place, mask=there, other=0.0)[:, None]
        o = rows(out + b * sob + h * soh, place, there, son, DV, DVP).to(tl.float32)
        d_sum = -tl.sum(g * o, 1)
        if not WHOLE:
            tl.store(d_total + (b * H + h) * N + place, d_sum, mask=there)
    g = g.to(raw.dtype)
    NA: tl.constexpr = BQ // TP if TP <= BQ else 1
    NB: tl.constexpr = BK // TP if TP <= BK else 1
    d_mixing += (b * H + h) * ROWS * COLUMNS + tile * NA * COLUMNS
    cells = tl.arange(0, NA)[:, None] * COLUMNS + tl.arange(0, NB)[None, :]
    acc = tl.zeros((BQ, DP), tl.float32)
    for j in range(TILES):
        at, is_key, ka = rows_of_tile(j, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BK, TP)
        raw_keys = rows(k, at, is_key, skn, D, DP)
        keys = features(raw_keys, is_key, offset, D, DP).to(raw.dtype)
        values = rows(v, at, is_key, svn, DV, DVP)
        p = product(queries, tl.trans(keys), UP, PREC)
        da = product(g, tl.trans(values), UP, PREC) + d_sum[:, None]
        sums = tl.sum(tl.sum(tl.reshape(p * da, (NA, BQ // NA, NB, BK // NB)), 3), 1)
        tl.store(d_mixing + j * NB + cells, sums)
        m = mixing_tile(mixing + h * smh, qa, ka, M, M, 1, BQ, BK, TP)
        dp = (da * m).to(raw.dtype)
        acc += product(dp, keys, UP, PREC)
        if WHOLE:
            a = (p * m).to(raw.dtype)
            d_values = product(tl.trans(a), g, UP, PREC)
            keep(dv + (b * N * H + h) * DV, at, is_key, H * DV, d_values, DV, DVP)
            d_keys = product(tl.trans(dp), queries, UP, PREC)
            keep(dk + (b * N * H + h) * D, at, is_key, H * D, tl.where(raw_keys > 0, d_keys, 0.0), D, DP)
    keep(dq + (b * N * H + h) * D, place, there, H * D, tl.where(raw > 0, acc, 0.0), D, DP)


@triton.jit
def dense_keys_kernel(
    q: Any,
    k: Any,
    v: Any,
    mixing: Any,
    inverse: Any,
    grad: Any,
    d_total: Any,
    dk: Any,
    dv: Any,
    sqb: Any,
    sqn: Any,
    sqh: Any,
    skb: Any,
    skn: Any,
    skh: Any,
    svb: Any,
    svn: Any,
    svh: Any,
    sgb: Any,
    sgn: Any,
    sgh: Any,
    smh: Any,
    H: Any,
    N: Any,
    TILES: Any,
    M: Any,
    NB1: Any,
    NB2: Any,
    G0: Any,
    G1: Any,
    G2: Any,
    offset: Any,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    TP: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Gradients of one tile of keys and values."""
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += b * sqb + h * sqh
    grad += b * sgb + h * sgh
    place, there, ka = rows_of_tile(tile, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BK, TP)
    raw = rows(k + b * skb + h * skh, place, there, skn, D, DP)
    keys = features(raw, there, offset, D, DP).to(raw.dtype)
    values = rows(v + b * svb + h * svh, place, there, svn, DV, DVP)
    d_keys = tl.zeros((BK, DP), tl.float32)
    d_values = tl.zeros((BK, DVP), tl.float32)
    for i in range(TILES):
        at, is_query, qa = rows_of_tile(i, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BQ, TP)
        queries = features(rows(q, at, is_query, sqn, D, DP), is_query, offset, D, DP).to(raw.dtype)
        g = rows(grad, at, is_query, sgn, DV, DVP)
        if NORM:
            one_over = tl.load(inverse + (b * H + h) * N + at, mask=is_query, other=0.0)
            g = (g.to(tl.float32) * one_over[:, None]).to(raw.dtype)
        m = mixing_tile(mixing + h * smh, ka, qa, M, 1, M, BK, BQ, TP)
        a = (product(keys, tl.trans(queries), UP, PREC) * m).to(raw.dtype)
        d_values += product(a, g, UP, PREC)
        da = product(values, tl.trans(g), UP, PREC)
        if NORM:
            da += tl.load(d_total + (b * H + h) * N + at, mask=is_query, other=0.0)[None, :]
        d_keys += product((da * m).to(raw.dtype), queries, UP, PREC)
    keep(dv + (b * N * H + h) * DV, place, there, H * DV, d_values, DV, DVP)
    keep(dk + (b * N * H + h) * D, place, there, H * D, tl.where(raw > 0, d_keys, 0.0), D, DP)


def _constants(q: Tensor, v: Tensor, mixing: Tensor, grid: BlockGrid) -> dict[str, Any]:
    """Return the arguments that all kernels of a call share."""
    heads, d, dv = q.shape[2], q.shape[3], v.shape[3]
    return {
        **geometry(grid),
        "smh": mixing.stride(0) if mixing.dim() == 3 else 0,
        "H": heads,
        "N": grid.tokens,
        "D": d,
        "DV": dv,
        "DP": tiles.power_of_two(d),
        "DVP": tiles.power_of_two(dv),
        "TP": tiles.padded_block(grid.tokens_per_block),
        "UP": INTERPRETED,
        "PREC": precision(q.dtype),
    }


def _tiles_of(grid: BlockGrid, rows_of_a_tile: int) -> int:
    """Return the tiles that hold all blocks, each padded to a power of two."""
    padded = tiles.padded_block(grid.tokens_per_block)
    if padded <= rows_of_a_tile:
        return ceil_div(grid.num_blocks, rows_of_a_tile // padded)
    return grid.num_blocks * (padded // rows_of_a_tile)


def _wide(constants: dict[str, Any]) -> int:
    return max(constants["DP"], constants["DVP"])


def forward(
    q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, grid: BlockGrid, offset: float, eps: float | None
) -> tuple[Tensor, Tensor]:
    """Return the output and 1 / normalizer, (batch, heads, tokens) float32; see `ops.dense`."""
    q, k, v = (contiguous_channels(x) for x in (q, k, v))
    mixing = mixing.contiguous()
    batch, _, heads, _ = q.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    inverse = torch.empty(
        (batch, heads, grid.tokens if eps is not None else 0), dtype=torch.float32, device=q.device
    )
    constants = _constants(q, v, mixing, grid)
    padded = grid.num_blocks * constants["TP"]
    tile = tiles.dense_forward(_wide(constants), padded, q.element_size())
    across, down = _tiles_of(grid, tile.keys), _tiles_of(grid, tile.queries)
    arguments = {
        **constants,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("o", out),
        "q": q,
        "k": k,
        "v": v,
        "mixing": mixing,
        "out": out,
        "inverse": inverse,
        "TILES": across,
        "offset": offset,
        "eps": 0.0 if eps is None else eps,
        "BQ": tile.queries,
        "BK": tile.keys,
        "NORM": eps is not None,
    }
    pairs = batch * heads * down * across * tile.queries * tile.keys
    start(
        Launch(
            dense_forward_kernel,
            (heads, down, batch),
            arguments,
            tile.warps,
            tile.stages,
            flops=2 * pairs * (constants["DP"] + constants["DVP"]),
            reads=("q", "k", "v", "mixing"),
            writes=("out", "inverse"),
        )
    )
    return out, inverse


def backward(
    grad: Tensor,
    tokens: Sequence[Tensor],
    mixing: Tensor,
    saved: Sequence[Tensor],
    grid: BlockGrid,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the mixing matrix; `saved` is of :func:`forward`."""
    grad, q, k, v = (contiguous_channels(x) for x in (grad, *tokens))
    out, inverse = saved
    mixing = mixing.contiguous()
    batch, _, heads, _ = q.shape
    normalize = inverse.shape[2] > 0
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    constants = _constants(q, v, mixing, grid)
    whole = tiles.whole_row(grid.num_blocks, grid.tokens_per_block)
    tile = (
        tiles.dense_backward(_wide(constants), q.element_size())
        if whole is None
        else tiles.dense_whole_row(_wide(constants), whole, q.element_size())
    )
    down, across = _tiles_of(grid, tile.queries), _tiles_of(grid, tile.keys)
    rows_, columns = (
        count * max(1, width // constants["TP"])
        for count, width in ((down, tile.queries), (across, tile.keys))
    )
    d_total = torch.empty(
        (batch, heads, grid.tokens if normalize and whole is None else 0),
        dtype=torch.float32,
        device=q.device,
    )
    parts = torch.empty((batch, heads, rows_, columns), dtype=torch.float32, device=q.device)
    arguments = {
        **constants,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("g", grad),
        "q": q,
        "k": k,
        "v": v,
        "mixing": mixing,
        "inverse": inverse,
        "grad": grad,
        "dk": dk,
        "dv": dv,
        "d_total": d_total,
        "offset": offset,
        "NORM": normalize,
        "BQ": tile.queries,
        "BK": tile.keys,
    }
    pairs = batch * heads * down * across * tile.queries * tile.keys
    by_k, by_v = 2 * pairs * constants["DP"], 2 * pairs * constants["DVP"]
    start(
        Launch(
            dense_backward_kernel,
            (heads, down, batch),
            {
                **arguments,
                **strides("o", out),
                "out": out,
                "dq": dq,
                "d_mixing": parts,
                "TILES": across,
                "ROWS": rows_,
                "COLUMNS": columns,
                "WHOLE": whole is not None,
            },
            tile.warps,
            tile.stages,
            flops=(3 * by_k + 2 * by_v) if whole is not None else (2 * by_k + by_v),
            reads=("q", "k", "v", "mixing", "out", "inverse", "grad"),
            writes=("dq", "d_mixing", "dk", "dv") if whole is not None else ("dq", "d_mixing", "d_total"),
        )
    )
    if whole is None:
        start(
            Launch(
                dense_keys_kernel,
                (heads, across, batch),
                {**arguments, "TILES": down},
                tile.warps,
                tile.stages,
                flops=2 * by_k + 2 * by_v,
                reads=("q", "k", "v", "mixing", "inverse", "grad", "d_total"),
                writes=("dk", "dv"),
            )
        )
    d_mixing = parts.sum((0, 1) if mixing.dim() == 2 else 0)
    for axis, width in ((-2, tile.queries), (-1, tile.keys)):
        if constants["TP"] > width:  # a block has several tiles
            d_mixing = d_mixing.unflatten(axis, (grid.num_blocks, -1)).sum(axis)
        else:
            d_mixing = d_mixing.narrow(axis, 0, grid.num_blocks)
    return dq, dk, dv, d_mixing.to(mixing.dtype)
