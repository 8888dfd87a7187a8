"""MHLA for long rows: summaries of blocks, their mixing, and reading.

    S_b = sum_t phi(k_t) v_t^T / T   one program a block and head
    S~ = m S                         a matrix product of all blocks
    o_t = phi(q_t) S~_b(t) T / (phi(q_t) . z~_b(t) + eps)

T is the tokens of a block; with it a summary is a mean, which fp16 holds too. The backward has the same three
steps with gradients. Tokens are read and written in raster order, and no float32 copy of them crosses memory.
Rotary turns phi(q) and phi(k) inside, in the numerator only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    place_of,
    precision,
    product,
    product_in_parts,
    rows,
    strides,
)
from mhla_lightning.attention.mhla.triton.launch import Launch, capability_of, start


@triton.jit
def turns(
    table: tl.tensor, place: tl.tensor, there: tl.tensor, D: tl.constexpr, DP: tl.constexpr
) -> tl.tuple:
    """Load cosines and sines, (rows, DP / 2) each, from a table (tokens, D / 2, 2)."""
    pairs = rows(table, place, there, D, D, DP)
    return tl.split(tl.reshape(pairs, (pairs.shape[0], DP // 2, 2)))


@triton.jit
def turned(x: tl.tensor, cos: tl.tensor, sin: tl.tensor) -> tl.tensor:
    """Turn neighbouring channels of (rows, DP); a negated sine turns back."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (x.shape[0], x.shape[1]))


@triton.jit
def summary_kernel(
    k: tl.tensor,
    v: tl.tensor,
    table: tl.tensor,
    summary: tl.tensor,
    z: tl.tensor,
    skb: tl.tensor,
    skn: tl.tensor,
    skh: tl.tensor,
    svb: tl.tensor,
    svn: tl.tensor,
    svh: tl.tensor,
    H: tl.tensor,
    M: tl.tensor,
    NB1: tl.tensor,
    NB2: tl.tensor,
    G0: tl.tensor,
    G1: tl.tensor,
    G2: tl.tensor,
    offset: tl.tensor,
    scale: tl.tensor,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BT: tl.constexpr,
    NORM: tl.constexpr,
    TURN: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """S and z of one block and head."""
    h, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += b * skb + h * skh
    v += b * svb + h * svh
    acc = tl.zeros((DP, DVP), tl.float32)
    total = tl.zeros((DP,), tl.float32)
    for t0 in range(0, B0 * B1 * B2, BT):
        place, there = place_of(block, t0 + tl.arange(0, BT), M, NB1, NB2, G0, G1, G2, B0, B1, B2)
        phi = features(rows(k, place, there, skn, D, DP), there, offset, D, DP)
        values = rows(v, place, there, svn, DV, DVP)
        if NORM:
            total += tl.sum(phi, 0)
        if TURN:
            cos, sin = turns(table, place, there, D, DP)
            phi = turned(phi, cos, sin)
        acc += product(tl.trans(phi.to(values.dtype)), values, UP, PREC)
    d = tl.arange(0, DP)
    row = (b * H + h) * M + block
    keep(summary + row * D * DV, d, d < D, DV, acc * scale, DV, DVP)
    if NORM:
        tl.store(z + row * D + d, total, mask=d < D)


@triton.jit
def read_kernel(
    q: tl.tensor,
    mixed: tl.tensor,
    z_mixed: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    inverse: tl.tensor,
    sqb: tl.tensor,
    sqn: tl.tensor,
    sqh: tl.tensor,
    sob: tl.tensor,
    son: tl.tensor,
    soh: tl.tensor,
    smr: tl.tensor,
    smn: tl.tensor,
    szr: tl.tensor,
    szn: tl.tensor,
    H: tl.tensor,
    N: tl.tensor,
    M: tl.tensor,
    NB1: tl.tensor,
    NB2: tl.tensor,
    G0: tl.tensor,
    G1: tl.tensor,
    G2: tl.tensor,
    offset: tl.tensor,
    eps: tl.tensor,
    back: tl.tensor,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BT: tl.constexpr,
    NORM: tl.constexpr,
    TURN: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Output of one block and head; `back` undoes the scale of the summaries."""
    h, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += b * sqb + h * sqh
    out += b * sob + h * soh
    d = tl.arange(0, DP)
    s = rows(mixed + (b * H + h) * smr + block * smn, d, d < D, DV, DV, DVP)
    if NORM:
        z = tl.load(z_mixed + (b * H + h) * szr + block * szn + d, mask=d < D, other=0.0)
    for t0 in range(0, B0 * B1 * B2, BT):
        place, there = place_of(block, t0 + tl.arange(0, BT), M, NB1, NB2, G0, G1, G2, B0, B1, B2)
        phi = features(rows(q, place, there, sqn, D, DP), there, offset, D, DP)
        if NORM:
            one_over = 1.0 / (tl.sum(phi * z[None, :], 1) + eps)
            tl.store(inverse + (b * H + h) * N + place, one_over, mask=there)
        if TURN:
            cos, sin = turns(table, place, there, D, DP)
            phi = turned(phi, cos, sin)
        o = product_in_parts(phi.to(s.dtype), s, UP, PREC) * back
        if NORM:
            o *= one_over[:, None]
        keep(out, place, there, son, o, DV, DVP)


@triton.jit
def read_backward_kernel(
    q: tl.tensor,
    mixed: tl.tensor,
    z_mixed: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    inverse: tl.tensor,
    grad: tl.tensor,
    dq: tl.tensor,
    d_mixed: tl.tensor,
    d_z_mixed: tl.tensor,
    sqb: tl.tensor,
    sqn: tl.tensor,
    sqh: tl.tensor,
    sob: tl.tensor,
    son: tl.tensor,
    soh: tl.tensor,
    sgb: tl.tensor,
    sgn: tl.tensor,
    sgh: tl.tensor,
    smr: tl.tensor,
    smn: tl.tensor,
    szr: tl.tensor,
    szn: tl.tensor,
    H: tl.tensor,
    N: tl.tensor,
    M: tl.tensor,
    NB1: tl.tensor,
    NB2: tl.tensor,
    G0: tl.tensor,
    G1: tl.tensor,
    G2: tl.tensor,
    offset: tl.tensor,
    back: tl.tensor,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BT: tl.constexpr,
    NORM: tl.constexpr,
    TURN: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Gradients of q, and of S~ and z~, of one block and head."""
    h, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += b * sqb + h * sqh
    out += b * sob + h * soh
    grad += b * sgb + h * sgh
    dq += (b * N * H + h) * D
    d = tl.arange(0, DP)
    s = rows(mixed + (b * H + h) * smr + block * smn, d, d < D, DV, DV, DVP)
    if NORM:
        z = tl.load(z_mixed + (b * H + h) * szr + block * szn + d, mask=d < D, other=0.0)
    acc = tl.zeros((DP, DVP), tl.float32)
    total = tl.zeros((DP,), tl.float32)
    for t0 in range(0, B0 * B1 * B2, BT):
        place, there = place_of(block, t0 + tl.arange(0, BT), M, NB1, NB2, G0, G1, G2, B0, B1, B2)
        raw = rows(q, place, there, sqn, D, DP)
        phi = features(raw, there, offset, D, DP)
        g = rows(grad, place, there, sgn, DV, DVP).to(tl.float32)
        if NORM:
            g *= tl.load(inverse + (b * H + h) * N + place, mask=there, other=0.0)[:, None]
            o = rows(out, place, there, son, DV, DVP).to(tl.float32)
            d_sum = -tl.sum(g * o, 1)
            total += tl.sum(phi * d_sum[:, None], 0)
        g = (g * back).to(s.dtype)
        if TURN:
            cos, sin = turns(table, place, there, D, DP)
            phi = turned(phi, cos, sin)
        acc += product(tl.trans(phi.to(s.dtype)), g, UP, PREC)
        d_phi = product(g, tl.trans(s), UP, PREC)
        if TURN:
            d_phi = turned(d_phi, cos, -sin)
        if NORM:
            d_phi += d_sum[:, None] * z[None, :]
        keep(dq, place, there, H * D, tl.where(raw > 0, d_phi, 0.0), D, DP)
    row = (b * H + h) * M + block
    keep(d_mixed + row * D * DV, d, d < D, DV, acc, DV, DVP)
    if NORM:
        tl.store(d_z_mixed + row * D + d, total, mask=d < D)


@triton.jit
def summary_backward_kernel(
    k: tl.tensor,
    v: tl.tensor,
    table: tl.tensor,
    d_summary: tl.tensor,
    d_z: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    skb: tl.tensor,
    skn: tl.tensor,
    skh: tl.tensor,
    svb: tl.tensor,
    svn: tl.tensor,
    svh: tl.tensor,
    smr: tl.tensor,
    smn: tl.tensor,
    szr: tl.tensor,
    szn: tl.tensor,
    H: tl.tensor,
    N: tl.tensor,
    M: tl.tensor,
    NB1: tl.tensor,
    NB2: tl.tensor,
    G0: tl.tensor,
    G1: tl.tensor,
    G2: tl.tensor,
    offset: tl.tensor,
    scale: tl.tensor,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BT: tl.constexpr,
    NORM: tl.constexpr,
    TURN: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Gradients of k and v of one block and head."""
    h, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += b * skb + h * skh
    v += b * svb + h * svh
    dk += (b * N * H + h) * D
    dv += (b * N * H + h) * DV
    d = tl.arange(0, DP)
    ds = rows(d_summary + (b * H + h) * smr + block * smn, d, d < D, DV, DV, DVP)
    if NORM:
        dz = tl.load(d_z + (b * H + h) * szr + block * szn + d, mask=d < D, other=0.0)
    for t0 in range(0, B0 * B1 * B2, BT):
        place, there = place_of(block, t0 + tl.arange(0, BT), M, NB1, NB2, G0, G1, G2, B0, B1, B2)
        raw = rows(k, place, there, skn, D, DP)
        phi = features(raw, there, offset, D, DP)
        if TURN:
            cos, sin = turns(table, place, there, D, DP)
            phi = turned(phi, cos, sin)
        keep(dv, place, there, H * DV, product(phi.to(ds.dtype), ds, UP, PREC) * scale, DV, DVP)
        values = rows(v, place, there, svn, DV, DVP).to(ds.dtype)
        d_phi = product(values, tl.trans(ds), UP, PREC) * scale
        if TURN:
            d_phi = turned(d_phi, cos, -sin)
        if NORM:
            d_phi += dz[None, :]
        keep(dk, place, there, H * D, tl.where(raw > 0, d_phi, 0.0), D, DP)


_TRAFFIC: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "summary": (("k", "v"), ("summary", "z")),
    "read": (("q", "mixed", "z_mixed"), ("out", "inverse")),
    "read_backward": (("q", "grad", "mixed", "z_mixed", "inverse"), ("dq", "d_mixed", "d_z_mixed")),
    "summary_backward": (("k", "v", "d_summary", "d_z"), ("dk", "dv")),
}
"""What each kernel reads and writes, beside rotary tables and the output for a normalizer's gradient."""


def _start(
    kernel: Any, q: Tensor, grid: BlockGrid, arguments: dict[str, Any], summaries: torch.dtype
) -> None:
    """Start one program a block, head and sample.

    Args:
        kernel: one of this file.
        q: a token tensor of the call.
        grid: the blocks.
        arguments: all but the tile and the precision.
        summaries: dtype in which the kernel multiplies summaries.
    """
    name = kernel.__name__.removesuffix("_kernel")
    wide = max(arguments["DP"], arguments["DVP"])
    element = max(q.element_size(), summaries.itemsize)
    tile = tiles.block_tile(name, wide, grid.tokens_per_block, element, capability_of(q))
    # Features of 16-bit tokens lose nothing that TF32 would keep.
    upcast = summaries.itemsize > q.element_size() and not INTERPRETED
    padded = ceil_div(grid.tokens_per_block, tile.queries) * tile.queries
    batch, _, heads, _ = q.shape
    products = 2 if name.endswith("backward") else 1
    reads, writes = _TRAFFIC[name]
    reads += ("table",) * arguments["TURN"] + ("out",) * (name == "read_backward" and arguments["NORM"])
    flops = 2 * products * batch * heads * grid.num_blocks * padded * arguments["DP"] * arguments["DVP"]
    arguments |= {"BT": tile.queries, "PREC": "tf32" if upcast else precision(q.dtype)}
    programs = (heads, grid.num_blocks, batch)
    start(Launch(kernel, programs, arguments, tile.warps, tile.stages, flops, reads, writes))


def mix(mixing: Tensor | None, x: Tensor) -> Tensor:
    """Return sum_b m[i, b] x_b, with float32 sums.

    Args:
        mixing: (blocks, blocks) or (heads, blocks, blocks); None means all ones, and one sum for all blocks.
        x: (batch, heads, blocks, ...) of any dtype; m is rounded to it.

    Returns:
        (batch, heads, blocks, ...), or (batch, heads, 1, ...) without a matrix.
    """
    if mixing is None:
        return x.sum(2, keepdim=True, dtype=torch.float32).to(x.dtype)
    m = mixing.to(x.dtype).expand(*x.shape[:2], -1, -1).flatten(0, 1)
    return torch.bmm(m, x.flatten(0, 1).flatten(2)).view(x.shape)


ELEMENTS = 2048
"""Elements of two summaries that one float32 product adds up."""


def _mix_gradient(mixing: Tensor, d_mixed: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of m in float32, summed over all that share it."""
    a, b = d_mixed.flatten(0, 1).flatten(2), x.flatten(0, 1).flatten(2).mT
    if a.dtype != torch.float32 and not INTERPRETED:
        products = torch.bmm(a, b, out_dtype=torch.float32)
    else:
        # One sum over all elements loses a digit more.
        parts = zip(a.float().split(ELEMENTS, 2), b.float().split(ELEMENTS, 1), strict=True)
        products = torch.stack([torch.bmm(x, y) for x, y in parts]).sum(0)
    products = products.unflatten(0, d_mixed.shape[:2])
    return products.sum((0, 1) if mixing.dim() == 2 else 0)


def _strides_of_sums(name: str, x: Tensor) -> dict[str, int]:
    """Return the strides of summaries over rows and blocks; 0 where all blocks share one."""
    return {f"s{name}r": x.stride(1), f"s{name}n": x.stride(2) if x.shape[2] > 1 else 0}


@dataclass(frozen=True)
class BlockPlan:
    """What one call of the block form shares between forward and backward.

    Attributes:
        grid: the blocks.
        offset: added by the feature map.
        eps: added to the normalizer; None means no normalizer.
        summaries: dtype of S and S~.
    """

    grid: BlockGrid
    offset: float
    eps: float | None
    summaries: torch.dtype

    def empty_sums(self, q: Tensor, dim_v: int) -> tuple[Tensor, Tensor]:
        """Return room for S and z.

        They are (batch, heads, blocks, dim_k, dim_v) and (batch, heads, blocks, dim_k). Without a normalizer
        z has no elements.
        """
        batch, _, heads, dim = q.shape
        lead = (batch, heads, self.grid.num_blocks, dim)
        z = torch.empty(lead if self.eps is not None else (0,) * 4, dtype=torch.float32, device=q.device)
        return torch.empty((*lead, dim_v), dtype=self.summaries, device=q.device), z

    def constants(self, q: Tensor, v: Tensor, table: Tensor | None) -> dict[str, Any]:
        """Return the arguments that all kernels of a call share."""
        heads, d, dv = q.shape[2], q.shape[3], v.shape[3]
        return {
            **geometry(self.grid),
            "table": q if table is None else table,
            "TURN": table is not None,
            "NORM": self.eps is not None,
            "offset": self.offset,
            "H": heads,
            "D": d,
            "DV": dv,
            "DP": tiles.power_of_two(d),
            "DVP": tiles.power_of_two(dv),
            "UP": INTERPRETED,
        }


def forward(
    q: Tensor, k: Tensor, v: Tensor, mixing: Tensor | None, table: Tensor | None, plan: BlockPlan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, 1 / normalizer, S~, z~, S and z; see `ops.blocks`."""
    q, k, v = (contiguous_channels(x) for x in (q, k, v))
    grid, size = plan.grid, plan.grid.tokens_per_block
    batch, _, heads, _ = q.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    shape = (batch, heads, grid.tokens if plan.eps is not None else 0)
    inverse = torch.empty(shape, dtype=torch.float32, device=q.device)
    summary, z = plan.empty_sums(q, v.shape[3])
    constants = plan.constants(q, v, table)
    arguments = {**constants, **strides("k", k), **strides("v", v), "scale": 1 / size}
    arguments |= {"k": k, "v": v, "summary": summary, "z": z}
    _start(summary_kernel, q, grid, arguments, q.dtype)
    mixed = mix(mixing, summary)
    z_mixed = torch.empty_like(z) if plan.eps is None else mix(mixing, z)
    arguments = {**constants, **strides("q", q), **strides("o", out)}
    arguments |= {**_strides_of_sums("m", mixed), **_strides_of_sums("z", z_mixed)}
    arguments |= {"N": grid.tokens, "eps": plan.eps or 0.0, "back": float(size)}
    arguments |= {"q": q, "mixed": mixed, "z_mixed": z_mixed, "out": out, "inverse": inverse}
    _start(read_kernel, q, grid, arguments, plan.summaries)
    return out, inverse, mixed, z_mixed, summary, z


def backward(
    grad: Tensor,
    tokens: Sequence[Tensor],
    mixing: Tensor | None,
    table: Tensor | None,
    saved: Sequence[Tensor],
    plan: BlockPlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the mixing matrix; the last is empty without one.

    Args:
        grad: of the output.
        tokens: q, k and v.
        mixing, table, plan: as in :func:`forward`.
        saved: the output, 1 / normalizer, S~, z~; with a matrix also S and z.
    """
    out, inverse, mixed, z_mixed, *sums = saved
    grad, q, k, v = (contiguous_channels(x) for x in (grad, *tokens))
    grid, size = plan.grid, plan.grid.tokens_per_block
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_mixed, d_z_mixed = plan.empty_sums(q, v.shape[3])
    constants = {**plan.constants(q, v, table), "N": grid.tokens}
    arguments = {**constants, **strides("q", q), **strides("o", out), **strides("g", grad)}
    arguments |= {**_strides_of_sums("m", mixed), **_strides_of_sums("z", z_mixed), "back": float(size)}
    arguments |= {"q": q, "mixed": mixed, "z_mixed": z_mixed, "out": out, "inverse": inverse, "grad": grad}
    arguments |= {"dq": dq, "d_mixed": d_mixed, "d_z_mixed": d_z_mixed}
    _start(read_backward_kernel, q, grid, arguments, plan.summaries)
    transposed = None if mixing is None else mixing.mT
    d_summary = mix(transposed, d_mixed)
    d_z = d_z_mixed if plan.eps is None else mix(transposed, d_z_mixed)
    arguments = {**constants, **strides("k", k), **strides("v", v), "scale": 1 / size}
    arguments |= {**_strides_of_sums("m", d_summary), **_strides_of_sums("z", d_z)}
    arguments |= {"k": k, "v": v, "d_summary": d_summary, "d_z": d_z, "dk": dk, "dv": dv}
    _start(summary_backward_kernel, q, grid, arguments, plan.summaries)
    if mixing is None:
        return dq, dk, dv, torch.empty(0, dtype=torch.float32, device=q.device)
    d_mixing = _mix_gradient(mixing, d_mixed, sums[0])
    if plan.eps is not None:
        d_mixing += _mix_gradient(mixing, d_z_mixed, sums[1])
    return dq, dk, dv, d_mixing.to(mixing.dtype)
