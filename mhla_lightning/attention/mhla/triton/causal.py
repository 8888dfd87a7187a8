"""Launches of the causal kernels; see `causal_forward.py` for what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.mhla.triton import tiles
from mhla_lightning.attention.mhla.triton.causal_backward import (
    causal_keys_kernel,
    causal_own_kernel,
    causal_queries_kernel,
)
from mhla_lightning.attention.mhla.triton.causal_forward import (
    causal_forward_kernel,
    chunk_sum_kernel,
    mix_kernel,
)
from mhla_lightning.attention.mhla.triton.device import (
    INTERPRETED,
    contiguous_channels,
    precision,
    strides,
)
from mhla_lightning.attention.mhla.triton.launch import Launch, capability_of, start
from mhla_lightning.attention.mhla.triton.terms import CausalTerms


@dataclass(frozen=True)
class CausalPlan:
    """What one call shares between forward and backward.

    Attributes:
        size: tokens per chunk.
        far: whether chunks are summed up; else every key is read.
        offset: added by the feature map.
        eps: added to the normalizer; None means no normalizer.
    """

    size: int
    far: bool
    offset: float
    eps: float | None = None

    @property
    def padded(self) -> int:
        """Rows that a chunk takes in a tile."""
        rows_ = tiles.padded_block(self.size)
        return tiles.power_of_two(rows_) if self.far else rows_

    def tiles_of(self, chunks: int, rows_of_a_tile: int) -> int:
        """Return the tiles that hold all chunks."""
        if self.padded <= rows_of_a_tile:
            return ceil_div(chunks, rows_of_a_tile // self.padded)
        return chunks * (self.padded // rows_of_a_tile)


def _four(name: str, x: Tensor) -> dict[str, int]:
    """Return strides over batch and heads of a term; 0 where it is shared."""
    return {f"s{name}{axis}": x.stride(i) if x.shape[i] > 1 else 0 for i, axis in enumerate("bh")}


def _constants(q: Tensor, v: Tensor, terms: CausalTerms, plan: CausalPlan) -> dict[str, Any]:
    """Return the arguments that all kernels of a call share."""
    d, dv = q.shape[3], v.shape[3]
    return {
        "layout": q if terms.layout is None else terms.layout,
        "cos": q if terms.turns is None else terms.turns[0],
        "sin": q if terms.turns is None else terms.turns[1],
        "scb": 0 if terms.turns is None or terms.turns.shape[1] == 1 else terms.turns.stride(1),
        "offset": plan.offset,
        "H": q.shape[2],
        "N": q.shape[1],
        "M": terms.chunks,
        "T": plan.size,
        "D": d,
        "DV": dv,
        "DVP": tiles.power_of_two(dv),
        "NORM": plan.eps is not None,
        "PACKED": terms.layout is not None,
        "TURN": terms.turns is not None,
        "UP": INTERPRETED,
        "PREC": precision(q.dtype),
    }


def _pair_constants(q: Tensor, v: Tensor, terms: CausalTerms, plan: CausalPlan) -> dict[str, Any]:
    """Return the further arguments of the kernels that read pairs of tokens."""
    until = q.new_empty((1,) * 4) if terms.until is None else terms.until
    after = until if terms.after is None else terms.after
    return {
        **_constants(q, v, terms, plan),
        **_four("w", terms.weights),
        **_four("u", until),
        **_four("a", after),
        "suc": until.stride(2),
        "sac": after.stride(2),
        "weights": terms.weights,
        "until": until,
        "after": after,
        "back": float(plan.size),
        "DP": tiles.power_of_two(q.shape[3]),
        "TP": plan.padded,
        "DECAY": (terms.until is not None) + (terms.after is not None),
        "FAR": plan.far,
    }


def _tile(kernel: str, q: Tensor, v: Tensor, plan: CausalPlan, terms: CausalTerms) -> tiles.Tile:
    wide = max(tiles.power_of_two(q.shape[3]), tiles.power_of_two(v.shape[3]))
    rows_ = plan.padded if plan.far else terms.chunks * plan.padded
    apart, uneven = plan.eps is not None and terms.turns is not None, _uneven(q, terms)
    sizes = (wide, rows_, q.element_size(), capability_of(q))
    return tiles.causal_tile(kernel, *sizes, apart=apart, uneven=uneven)


def _uneven(q: Tensor, terms: CausalTerms) -> bool:
    """Return whether rotary turns a number of channels that is no power of two."""
    return terms.turns is not None and tiles.power_of_two(q.shape[3]) != q.shape[3]


def chunk_sums(
    x: Tensor,
    y: Tensor,
    fade: Tensor | None,
    terms: CausalTerms,
    plan: CausalPlan,
    forward_results: Sequence[Tensor] = (),
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the means of phi(x) y^T of every chunk, and the sums of phi(x) for the normalizer.

    Args:
        x: (batch, tokens, heads, dim_k), k or q.
        y: (batch, tokens, heads, dim_v), v or the gradient of the output.
        fade: (batch, heads, M, size), log decay of each x; None means no decay.
        terms, plan: of the call.
        forward_results: output and 1 / normalizer where y is a gradient.
        exact: return sums in float32 instead of means in x's dtype.

    Returns:
        (batch, heads, M, dim_k, dim_v) and (batch, heads, M, dim_k); the latter is empty without normalizer.
    """
    batch, _, heads, dim = x.shape
    dim_v, count = y.shape[3], terms.chunks
    dtype = torch.float32 if exact else x.dtype
    sums = torch.empty((batch, heads, count, dim, dim_v), dtype=dtype, device=x.device)
    z_shape = sums.shape[:-1] if plan.eps is not None else (0,) * 4
    z = torch.empty(z_shape, dtype=torch.float32, device=x.device)
    tile = _tile("sum", x, y, plan, terms)
    slice_, slices = tiles.slices_of(tiles.power_of_two(dim), tiles.power_of_two(dim_v))
    out, inverse = forward_results or (y, z)
    shared = x if fade is None else fade
    constants = _constants(x, y, terms, plan)
    arguments = {
        **constants,
        **strides("x", x),
        **strides("y", y),
        **strides("o", out),
        **_four("f", shared),
        "sfc": shared.stride(2),
        "x": x,
        "y": y,
        "fade": shared,
        "out": out,
        "inverse": inverse,
        "sums": sums,
        "z": z,
        "scale": 1.0 if exact else 1 / plan.size,
        "BD": slice_,
        "BT": tile.queries,
        "SLICES": slices,
        "FADES": fade is not None,
        "GRADIENT": bool(forward_results),
    }
    padded = ceil_div(plan.size, tile.queries) * tile.queries
    flops = 2 * batch * heads * count * padded * slice_ * slices * constants["DVP"]
    reads = ("x", "y") + (("out", "inverse") if forward_results and plan.eps is not None else ())
    grid = (heads, count * slices, batch)
    start(Launch(chunk_sum_kernel, grid, arguments, tile.warps, tile.stages, flops, reads, ("sums", "z")))
    return sums, z


def mix_earlier(weights: Tensor, x: Tensor) -> Tensor:
    """Return sum_b w[i, b] x_b, with float32 sums.

    Args:
        weights: (batch or 1, heads or 1, M, M); rounded to x's dtype.
        x: (batch, heads, M, ...).
    """
    w = weights.to(x.dtype).expand(*x.shape[:2], -1, -1).flatten(0, 1)
    return torch.bmm(w, x.flatten(0, 1).flatten(2)).view(x.shape)


def mix(
    terms: CausalTerms, x: Tensor, other: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Return the means of earlier chunks mixed, sum_b w[i, b] x_b over b < i.

    Args:
        terms: of the call.
        x: (batch, heads, M, ...).
        other: means whose products with x are wanted, for the gradient of the weights. The mixing is then
            transposed, sum_i w[i, b] x_i.
        scale: of these products.

    Returns:
        The mixed means, and the products (batch, heads, slices, M, M), 0 on and above the diagonal; None
        without `other`.
    """
    back, weights, count = other is not None, terms.weights, terms.chunks
    if count > tiles.MOST_MIXED:
        earlier = weights.tril(-1)
        if other is None:
            return mix_earlier(earlier, x), None
        return mix_earlier(earlier.mT, x), (_products(x, other) * scale).tril(-1).unsqueeze(2)
    rows_, heads, elements = x.shape[0] * x.shape[1], x.shape[1], x[0, 0, 0].numel()
    tile, each = tiles.mix_tile(count, elements)
    slices = ceil_div(elements, tile.keys * each)
    mixed = torch.empty_like(x)
    shape = (*x.shape[:2], slices, count, count) if back else (0,) * 5
    pairs = torch.empty(shape, dtype=torch.float32, device=x.device)
    arguments = {
        **_four("w", weights),
        "x": x,
        "other": x if other is None else other,
        "weights": weights,
        "mixed": mixed,
        "pairs": pairs,
        "H": heads,
        "M": count,
        "X": elements,
        "scale": scale,
        "MP": tile.queries,
        "XB": tile.keys,
        "TILES": each,
        "BACK": back,
        "UP": INTERPRETED,
        "PREC": precision(x.dtype),
    }
    flops = 2 * (1 + back) * rows_ * tile.queries**2 * elements
    reads = ("x", "weights", "other") if back else ("x", "weights")
    writes = ("mixed", "pairs")
    start(Launch(mix_kernel, (slices, rows_), arguments, tile.warps, tile.stages, flops, reads, writes))
    return mixed, pairs if back else None


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of all pairs of chunks in float32, (batch, heads, M, M)."""
    x, y = a.flatten(0, 1).flatten(2), b.flatten(0, 1).flatten(2).mT
    if a.dtype != torch.float32 and not INTERPRETED:
        pairs = torch.bmm(x, y, out_dtype=torch.float32)
    else:
        pairs = torch.bmm(x.float(), y.float())
    return pairs.unflatten(0, a.shape[:2])


def _launch_pairs(
    kernel: Any, tile: tiles.Tile, arguments: dict[str, Any], products: tuple[int, int], batch: int
) -> None:
    """Start a kernel over pairs of tokens.

    Args:
        kernel: one of this file.
        tile: its tile.
        arguments: all but the tile's sizes.
        products: matrix products of dim_k and of dim_v channels a pair.
        batch: samples.
    """
    over_keys = kernel is causal_keys_kernel
    padded, count, far = arguments["TP"], arguments["M"], arguments["FAR"]
    width = tile.keys if over_keys else tile.queries
    programs = ceil_div(count, width // padded) if padded <= width else count * (padded // width)
    pairs = batch * arguments["H"] * padded**2 * (count if far else count**2) // 2
    flops = 2 * pairs * (products[0] * arguments["DP"] + products[1] * arguments["DVP"])
    arguments = {**arguments, "BQ": tile.queries, "BK": tile.keys}
    reads, writes = _TRAFFIC[kernel.__name__]
    normal = {"inverse", "out"} if not arguments["NORM"] else set()
    absent = normal | ({"mixed", "d_summary"} if not far else set())
    reads = tuple(name for name in reads if name not in absent)
    start(
        Launch(
            kernel,
            (arguments["H"], programs, batch),
            arguments,
            tile.warps,
            tile.stages,
            flops,
            reads,
            writes,
        )
    )


def _launch_own(tile: tiles.Tile, arguments: dict[str, Any], batch: int) -> None:
    """Start the kernel of all gradients of a chunk."""
    names = set(causal_own_kernel.arg_names)
    arguments = {**{name: x for name, x in arguments.items() if name in names}, "VS": tile.keys}
    heads, count, rows_ = arguments["H"], arguments["M"], arguments["TP"]
    pairs = batch * heads * count * rows_
    dim, dim_v = arguments["DP"], arguments["DVP"]
    flops = 2 * pairs * (rows_ * (3 * dim + 2 * dim_v) + 3 * dim * dim_v)
    reads = ("q", "k", "v", "weights", "mixed", "d_summary", "grad")
    writes = ("dq", "dk", "dv", "d_weights")
    grid = (heads, count, batch)
    start(Launch(causal_own_kernel, grid, arguments, tile.warps, tile.stages, flops, reads, writes))


_TRAFFIC: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "causal_forward_kernel": (("q", "k", "v", "weights", "mixed"), ("out", "inverse")),
    "causal_queries_kernel": (
        ("q", "k", "v", "weights", "mixed", "inverse", "out", "grad"),
        ("dq", "d_weights", "d_total"),
    ),
    "causal_keys_kernel": (("q", "k", "v", "weights", "d_summary", "inverse", "grad"), ("dk", "dv")),
}
"""What each kernel reads and writes, beside decays and index arrays."""


def _room(x: Tensor, terms: CausalTerms) -> Tensor:
    """Return room for a token tensor; 0 where padding is not written."""
    make = torch.empty if terms.layout is None else torch.zeros
    return make(x.shape, dtype=x.dtype, device=x.device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, terms: CausalTerms, plan: CausalPlan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, 1 / normalizer, mixed means and sums, means and sums of chunks.

    The last four are empty in the dense form. See `causal_ops.causal`.
    """
    q, k, v = (contiguous_channels(x) for x in (q, k, v))
    batch, tokens, heads, _ = q.shape
    out = _room(v, terms)
    inverse = torch.empty(
        (batch, heads, tokens if plan.eps is not None else 0), dtype=torch.float32, device=q.device
    )
    empty = [q.new_empty((0,) * 5), inverse.new_empty((0,) * 4)]
    (mixed, z_mixed), (summary, z) = empty, [x.clone() for x in empty]
    if plan.far:
        summary, z = chunk_sums(k, v, terms.after, terms, plan)
        mixed = mix(terms, summary)[0]
        z_mixed = torch.empty_like(z) if plan.eps is None else mix_earlier(terms.weights.tril(-1), z)
    arguments = {
        **_pair_constants(q, v, terms, plan),
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("o", out),
        "q": q,
        "k": k,
        "v": v,
        "mixed": mixed,
        "z_mixed": z_mixed,
        "out": out,
        "inverse": inverse,
        "eps": plan.eps or 0.0,
    }
    tile = _tile("forward", q, v, plan, terms)
    _launch_pairs(causal_forward_kernel, tile, arguments, (1, 1), batch)
    return out, inverse, mixed, z_mixed, summary, z


def backward(
    grad: Tensor,
    tokens: Sequence[Tensor],
    terms: CausalTerms,
    saved: Sequence[Tensor],
    plan: CausalPlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, the weights, `until` and `after`; absent ones are empty.

    Args:
        grad: of the output.
        tokens: q, k and v.
        terms, plan: of the call.
        saved: of :func:`forward`.
    """
    out, inverse, mixed, z_mixed, summary, z = saved
    grad, q, k, v = (contiguous_channels(x) for x in (grad, *tokens))
    batch, length, heads, _ = q.shape
    dq, dk, dv = (_room(x, terms) for x in (q, k, v))
    count, device = terms.chunks, q.device
    d_until, d_after = (
        torch.zeros(
            (batch, heads, count, plan.size) if x is not None else (0,) * 4,
            dtype=torch.float32,
            device=device,
        )
        for x in (terms.until, terms.after)
    )
    d_total = torch.empty(inverse.shape, dtype=torch.float32, device=device)
    d_summary, d_z, pairs = mixed, z_mixed, None
    if plan.far:
        until = terms.until if terms.after is not None else None
        d_mixed, d_z_mixed = chunk_sums(q, grad, until, terms, plan, (out, inverse))
        d_summary, pairs = mix(terms, d_mixed, summary, float(plan.size**2))
        if plan.eps is not None:
            d_z = mix_earlier(terms.weights.tril(-1).mT, d_z_mixed)
    arguments = {
        **_pair_constants(q, v, terms, plan),
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("g", grad),
        "q": q,
        "k": k,
        "v": v,
        "grad": grad,
    }
    alone = None
    simple = plan.eps is None and terms.until is None and not _uneven(q, terms)
    if plan.far and simple and capability_of(q) >= 9:
        padded = arguments["DP"], arguments["DVP"], plan.padded
        alone = tiles.own_tile(*padded, q.element_size())
    if alone is not None:
        down, parts = 1, torch.empty((batch, heads, count, 1), dtype=torch.float32, device=device)
        gradients = {"dq": dq, "dk": dk, "dv": dv, "d_weights": parts}
        _launch_own(alone, {**arguments, "mixed": mixed, "d_summary": d_summary, **gradients}, batch)
    else:
        tile, keys_tile = (_tile(name, q, v, plan, terms) for name in ("queries", "keys"))
        down, across = (
            max(1, plan.padded // width) for width in (tile.queries, tile.keys)
        )  # tiles of a chunk
        shape = (batch, heads, count * down, 1 if plan.far else count * across)
        make = torch.empty if plan.far else torch.zeros  # the dense form passes over pairs without a weight
        parts = make(shape, dtype=torch.float32, device=device)
        arguments |= {"inverse": inverse, "d_total": d_total, "d_until": d_until}
        _launch_pairs(
            causal_queries_kernel,
            tile,
            {
                **arguments,
                **strides("o", out),
                "mixed": mixed,
                "z_mixed": z_mixed,
                "out": out,
                "dq": dq,
                "d_weights": parts,
                "ROWS": shape[2],
                "COLUMNS": shape[3],
            },
            (2, 1),
            batch,
        )
        _launch_pairs(
            causal_keys_kernel,
            keys_tile,
            {
                **arguments,
                "d_summary": d_summary,
                "d_z": d_z,
                "dk": dk,
                "dv": dv,
                "d_after": d_after,
                "TILES": plan.tiles_of(count, keys_tile.queries),
            },
            (2, 2),
            batch,
        )
    shared = [axis for axis in (0, 1) if terms.weights.shape[axis] == 1]
    if pairs is not None:
        own = parts.unflatten(2, (count, down))
        if plan.eps is not None:  # value and normalizer cancel, so no other sum comes first
            d_weights = (_products(d_z_mixed, z) + pairs.sum(2)).tril(-1) + torch.diag_embed(own.sum((3, 4)))
            d_weights = d_weights.sum(shared, keepdim=True) if shared else d_weights
        else:
            d_weights = pairs.sum([*shared, 2], keepdim=True).squeeze(2)
            d_weights.diagonal(dim1=-2, dim2=-1).add_(own.sum([*shared, 3], keepdim=True)[..., 0, 0])
        return dq, dk, dv, d_weights, d_until, d_after
    d_weights = parts
    if down * across > 1:
        d_weights = parts.unflatten(3, (count, across)).sum(4).unflatten(2, (count, down)).sum(3)
    if shared:
        d_weights = d_weights.sum(shared, keepdim=True)
    return dq, dk, dv, d_weights, d_until, d_after
