"""One more token of every sequence in one kernel.

`mhla/decode.py` explains the state, with a drawing. A program takes one head of one sequence. It reads and
writes the head's sums slice by slice of v's channels. Positions are on the device, and every head counts its
own tokens, so that no program waits for another. The kernel decides itself whether the token begins or ends a
chunk: no number crosses to the host.

Linear attention is the same without chunks: only the current sums, which all tokens enter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhla_lightning.attention.context import HalfRotary
from mhla_lightning.attention.mhla.decode import MHLAState, Summaries, make_room
from mhla_lightning.attention.mhla.triton import tiles
from mhla_lightning.attention.mhla.triton.launch import Launch, start
from mhla_lightning.errors import UserError


@triton.jit
def vector(
    base: tl.tensor, d: tl.tensor, offset: tl.tensor, D: tl.constexpr, RELU: tl.constexpr
) -> tl.tensor:
    """Load the channels of one token, with RELU through the feature map; absent channels are 0."""
    x = tl.load(base + d, mask=d < D, other=0.0).to(tl.float32)
    if RELU:
        x = tl.where(d < D, tl.maximum(x, 0.0) + offset, 0.0)
    return x


@triton.jit
def turned(
    x: tl.tensor,
    base: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    d: tl.tensor,
    offset: tl.tensor,
    D: tl.constexpr,
    RELU: tl.constexpr,
) -> tl.tensor:
    """Turn the features x at `base`: channel d with channel d + D / 2."""
    half: tl.constexpr = D // 2
    other = vector(base, tl.where(d < half, d + half, tl.where(d < D, d - half, d)), offset, D, RELU)
    c = tl.load(cos + d % half, mask=d < D, other=0.0)
    s = tl.load(sin + d % half, mask=d < D, other=0.0)
    return x * c + tl.where(d < half, -other, other) * s


@triton.jit
def step_slice(
    ring: tl.tensor,
    far: tl.tensor,
    current: tl.tensor,
    faded: tl.tensor,
    mixed: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    size: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    number: tl.tensor,
    begins: tl.tensor,
    ends: tl.tensor,
    gain: tl.tensor,
    since: tl.tensor,
    since_end: tl.tensor,
    mixing: tl.tensor,
    own: tl.tensor,
    PLACES: tl.tensor,
    KEPT: tl.tensor,
    BLOCKS: tl.tensor,
    CHUNKED: tl.constexpr,
    MERGES: tl.constexpr,
    DECAY: tl.constexpr,
) -> tl.tensor:
    """Add k v^T to a slice of the sums of one head, and return q's read of it.

    Args:
        ring, far, current, faded, mixed: first elements of the head's sums, see `Summaries`.
        at, inside: places of the slice in a sum, and which are there.
        size: elements of a sum.
        q, k, v: of the token; q is scaled.
        number: of the current chunk.
        begins, ends: whether the token is the first or the last of its chunk.
        gain: the token's decay.
        since: log decay since the chunk began.
        since_end: of the head, see `MHLAState`.
        mixing: first weight of the head's matrix.
        own: weight of the current chunk.
    """
    added = k[:, None] * v[None, :]
    here = tl.load(current + at, mask=inside, other=0.0)
    if DECAY == 2:
        here *= gain
    here += added
    read = here
    if DECAY == 1:
        read = tl.load(faded + at, mask=inside, other=0.0) * gain + added
        tl.store(faded + at, tl.where(ends, 0.0, read), mask=inside)
    out = tl.sum(q[:, None] * read, 0)
    if CHUNKED:
        if begins:
            past = tl.zeros_like(here)
            for place in range(PLACES):
                distance = 1 + (number - 1 - place + KEPT) % KEPT
                if MERGES:
                    w = tl.load(mixing + tl.minimum(distance, BLOCKS - 1))
                else:
                    row = tl.minimum(number, BLOCKS - 1)
                    w = tl.load(mixing + row * BLOCKS + tl.maximum(row - distance, 0))
                if DECAY == 2:
                    w *= tl.exp(tl.load(since_end + place))
                there = inside & (distance <= number)
                past += w * tl.load(ring + place * size + at, mask=there, other=0.0)
            if MERGES:
                past += tl.load(mixing + BLOCKS - 1) * tl.load(far + at, mask=inside, other=0.0)
            tl.store(mixed + at, past, mask=inside)
        else:
            past = tl.load(mixed + at, mask=inside, other=0.0)
        earlier = tl.sum(q[:, None] * past, 0)
        if DECAY == 2:
            earlier *= tl.exp(since)
        out = earlier + own * out
        if ends:
            place = number % tl.maximum(KEPT, 1)
            slot = ring + place * size + at
            if MERGES:
                gone = tl.load(far + at, mask=inside, other=0.0)
                leaving = here
                if DECAY == 2:
                    gone *= tl.exp(since)
                if KEPT > 0:
                    leaving = tl.load(slot, mask=inside & (place < PLACES), other=0.0)
                    if DECAY == 2:
                        leaving *= tl.exp(tl.load(since_end + place, mask=place < PLACES, other=0.0) + since)
                tl.store(far + at, gone + leaving, mask=inside)
            tl.store(slot, here, mask=inside & (place < PLACES))
            here = tl.zeros_like(here)
    tl.store(current + at, here, mask=inside)
    return out


@triton.jit
def decode_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    log_decay: tl.tensor,
    mixing: tl.tensor,
    tokens: tl.tensor,
    ring: tl.tensor,
    far: tl.tensor,
    current: tl.tensor,
    faded: tl.tensor,
    mixed: tl.tensor,
    z_ring: tl.tensor,
    z_far: tl.tensor,
    z_current: tl.tensor,
    z_faded: tl.tensor,
    z_mixed: tl.tensor,
    since_start: tl.tensor,
    since_end: tl.tensor,
    slb: tl.tensor,
    slh: tl.tensor,
    scb: tl.tensor,
    smh: tl.tensor,
    H: tl.tensor,
    PLACES: tl.tensor,
    KEPT: tl.tensor,
    BLOCKS: tl.tensor,
    offset: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    T: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    W: tl.constexpr,
    RELU: tl.constexpr,
    TURN: tl.constexpr,
    NORM: tl.constexpr,
    DECAY: tl.constexpr,
    CHUNKED: tl.constexpr,
    MERGES: tl.constexpr,
    SHIFT: tl.constexpr,
    OWN: tl.constexpr,
) -> None:
    """One token of one head of one sequence."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = b * H + h
    seen, number, begins, ends, own, since = 0, 0, False, False, 1.0, 0.0
    mixing += h * smh
    if CHUNKED:
        seen = tl.load(tokens + row)
        number, filled = seen // T, seen % T
        begins, ends = filled == 0, filled == T - 1
        diagonal = 0 if MERGES else tl.minimum(number, BLOCKS - 1) * (BLOCKS + 1)
        own = tl.load(mixing + diagonal) if OWN else 0.0
    gain = 1.0
    if DECAY > 0:
        log = tl.load(log_decay + b * slb + h * slh)
        gain = tl.exp(log)
        if CHUNKED and DECAY == 2:
            since = tl.load(since_start + row) + log
    since_end += row * PLACES
    d = tl.arange(0, DP)
    queries = vector(q + row * D, d, offset, D, RELU)
    keys = vector(k + row * D, d, offset, D, RELU)
    one_over = 1.0
    if NORM:
        one = tl.arange(0, 1)
        total = step_slice(
            z_ring + row * PLACES * D,
            z_far + row * D,
            z_current + row * D,
            z_faded + row * D,
            z_mixed + row * D,
            d[:, None] + one[None, :],
            (d < D)[:, None] & (one == 0)[None, :],
            D,
            queries * scale,
            keys,
            one + 1.0,
            number,
            begins,
            ends,
            gain,
            since,
            since_end,
            mixing,
            own,
            PLACES,
            KEPT,
            BLOCKS,
            CHUNKED,
            MERGES,
            DECAY,
        )
        one_over = 1.0 / (tl.sum(total, 0) + eps)
    if TURN:
        queries = turned(queries, q + row * D, cos + b * scb, sin + b * scb, d, offset, D, RELU)
        keys = turned(keys, k + row * D, cos + b * scb, sin + b * scb, d, offset, D, RELU)
    queries *= scale
    for first in range(0, DVP, W):
        channel = first + tl.arange(0, W)
        read = step_slice(
            ring + row * PLACES * D * DV,
            far + row * D * DV,
            current + row * D * DV,
            faded + row * D * DV,
            mixed + row * D * DV,
            d[:, None] * DV + channel[None, :],
            (d < D)[:, None] & (channel < DV)[None, :],
            D * DV,
            queries,
            keys,
            tl.load(v + row * DV + channel, mask=channel < DV, other=0.0).to(tl.float32),
            number,
            begins,
            ends,
            gain,
            since,
            since_end,
            mixing,
            own,
            PLACES,
            KEPT,
            BLOCKS,
            CHUNKED,
            MERGES,
            DECAY,
        )
        if NORM:
            read *= one_over
        if CHUNKED:
            # The host refuses a sequence beyond the matrix or beyond the state's memory; under a CUDA graph
            # it cannot see one.
            if not MERGES and not SHIFT:
                read = tl.where(number < BLOCKS, read, float("nan"))
            full = ends & (KEPT > 0) & (number % tl.maximum(KEPT, 1) >= PLACES)
            read = tl.where(full, float("nan"), read)
        tl.store(out + row * DV + channel, read.to(out.dtype.element_ty), mask=channel < DV)
    if CHUNKED:
        tl.debug_barrier()  # all threads have read the counters
        tl.store(tokens + row, seen + 1)
        if DECAY == 2:
            if ends:
                for place in range(PLACES):
                    older = tl.load(since_end + place) + since
                    tl.store(since_end + place, tl.where(place == number % KEPT, 0.0, older))
            tl.store(since_start + row, tl.where(ends, 0.0, since))


@dataclass(frozen=True, eq=False)
class Token:
    """One token of every sequence.

    Attributes:
        q, k: (batch, heads, dim_k), before the feature map relu(x) + `offset`; without an offset after it.
        v: (batch, heads, dim_v).
        offset: of the feature map; None where features come.
        rotary: turns the features of q and k; None means nothing does.
        log_decay: (batch or 1, heads); None means no decay.
        dtype: of the result.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    offset: float | None
    rotary: HalfRotary | None
    log_decay: Tensor | None
    dtype: torch.dtype


def step_chunks(state: MHLAState, token: Token, mixing: Tensor) -> Tensor:
    """Process one more token of every sequence, as :func:`mhla.decode.step_state` does.

    The first step makes the state's tensors its own and counts on the device. From then on every step is one
    kernel, and changes nothing but these tensors.

    Args:
        state: in float32; changed in place.
        token: to be added.
        mixing: as for `step_state`.

    Returns:
        (batch, heads, dim_v)

    Raises:
        UserError: a sequence beyond the matrix, without extrapolation; a CUDA graph that captures a step of a
            state that still grows.
    """
    tokens, rule, reach = state.count_on_device(), state.rule, state.reach
    if state.counted:
        state.check_reach([b for b, filled in enumerate(state.filled) if filled == 0])
        full = state.count()
        if full:
            make_room(state, max(state.finished[b] for b in full) + 1)
            state.turn_chunk(full)
    if state.counted and tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UserError("kernel", "a CUDA graph needs a state without the host; call its `leave_host` before")
    mixing = mixing.float().contiguous()
    per_head = mixing.dim() == (2 if rule.merges else 3) and mixing.shape[0] > 1
    arguments = {
        "mixing": mixing,
        "tokens": tokens,
        "since_start": state.since_start,
        "since_end": state.since_end,
        "smh": mixing.stride(0) if per_head else 0,
        "PLACES": state.values.ring.shape[2],
        "KEPT": reach.kept,
        "BLOCKS": reach.blocks,
        "scale": rule.scale_for(token.q.shape[-1]),
        "eps": rule.eps,
        "T": rule.chunk_size,
        "CHUNKED": True,
        "MERGES": rule.merges,
        "SHIFT": rule.extrapolation == "shift",
        "OWN": rule.own_chunk,
    }
    return _launch(token, state.values, state.norms, arguments, rule.decay_span == "sequence")


def step_sums(total: Tensor, norm: Tensor | None, token: Token, eps: float) -> Tensor:
    """Process one more token of linear attention, whose sums decay over the whole sequence.

    Args:
        total: (batch, heads, dim_k, dim_v) float32, contiguous; changed in place.
        norm: (batch, heads, dim_k, 1), likewise; None without normalizer.
        token: to be added.
        eps: added to the normalizer.

    Returns:
        (batch, heads, dim_v)
    """
    arguments = {
        "mixing": total,
        "tokens": total,
        "since_start": None,
        "since_end": None,
        "smh": 0,
        "PLACES": 0,
        "KEPT": 0,
        "BLOCKS": 0,
        "scale": token.q.shape[-1] ** -0.5,
        "eps": eps,
        "T": 1,
        "CHUNKED": False,
        "MERGES": False,
        "SHIFT": False,
        "OWN": True,
    }
    values, norms = (None if x is None else Summaries(x[:, :, None], None, x, None, x) for x in (total, norm))
    assert values is not None
    return _launch(token, values, norms, arguments, across=True)


def _launch(
    token: Token, values: Summaries, norms: Summaries | None, arguments: dict[str, Any], across: bool
) -> Tensor:
    """Start the kernel.

    Args:
        token: to be added.
        values, norms: the sums.
        arguments: those that differ between MHLA and linear attention.
        across: whether the decay spans the sequence.
    """
    q, k, v = (x.contiguous() for x in (token.q, token.k, token.v))
    (batch, heads, dim), dim_v = q.shape, v.shape[2]
    out = torch.empty((batch, heads, dim_v), dtype=token.dtype, device=v.device)
    decay = 0 if token.log_decay is None else 1 + across
    log_decay = values.current if token.log_decay is None else token.log_decay.float()
    cos = sin = values.current
    if token.rotary is not None:
        cos, sin = (x.float().contiguous() for x in (token.rotary.cos, token.rotary.sin))
    tile = tiles.decode_tile(tiles.power_of_two(dim), tiles.power_of_two(dim_v))
    absent = values.current
    arguments = {
        **{name: absent if x is None else x for name, x in arguments.items()},
        **_sums("", values, absent),
        **_sums("z_", norms, absent),
        "q": q,
        "k": k,
        "v": v,
        "cos": cos,
        "sin": sin,
        "out": out,
        "log_decay": log_decay,
        "slb": log_decay.stride(0) if log_decay.shape[0] > 1 else 0,
        "slh": log_decay.stride(1),
        "scb": cos.stride(0) if cos.shape[0] > 1 else 0,
        "H": heads,
        "offset": token.offset or 0.0,
        "D": dim,
        "DV": dim_v,
        "DP": tiles.power_of_two(dim),
        "DVP": tiles.power_of_two(dim_v),
        "W": tile.queries,
        "RELU": token.offset is not None,
        "TURN": token.rotary is not None,
        "NORM": norms is not None,
        "DECAY": decay,
    }
    sums = [f"{z}{name}" for z in ("", "z_")[: 1 + (norms is not None)] for name in _SUMS[decay == 1]]
    read = sums + [f"{z}mixed" for z in ("", "z_")[: 1 + (norms is not None)] if arguments["CHUNKED"]]
    flops = 2 * batch * heads * dim * dim_v * (3 if arguments["CHUNKED"] else 2)
    reads = ("q", "k", "v", *read)
    start(
        Launch(
            decode_kernel, (heads, batch), arguments, tile.warps, tile.stages, flops, reads, ("out", *sums)
        )
    )
    return out


_SUMS = (("current",), ("current", "faded"))
"""Sums that every token changes: without a decay inside chunks, and with one."""


def _sums(prefix: str, part: Summaries | None, absent: Tensor) -> dict[str, Tensor]:
    """Return the kernel's arguments of a kind of sums."""
    found = {}
    for name in ("ring", "far", "current", "faded", "mixed"):
        x = None if part is None else getattr(part, name)
        found[prefix + name] = absent if x is None else x
    return found
