"""What the causal kernels share: rows of chunks, turns, weights and decay of a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_rows(
    tile: tl.tensor,
    layout: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    T: tl.constexpr,
    W: tl.constexpr,
    TP: tl.constexpr,
    PACKED: tl.constexpr,
) -> tl.tuple:
    """Places of a tile's W rows, and which are tokens.

    Then come their chunks, their places there, and the tile's first chunk.
    """
    row = tl.arange(0, W)
    if TP <= W:
        first = tile * (W // TP)
        chunk = first + row // TP
        t = row % TP
    else:
        first = tile // (TP // W)
        chunk = first + row * 0
        t = tile % (TP // W) * W + row
    there = (t < T) & (chunk < M)
    place = chunk * T + t
    if PACKED:
        place = tl.load(layout + chunk * (T + 2) + t, mask=there, other=-1)
        there = there & (place >= 0)
    else:
        there = there & (place < N)
    return tl.where(there, place, 0), there, chunk, t, first


@triton.jit
def logs(base: tl.tensor, chunk: tl.tensor, t: tl.tensor, there: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """Load a log decay of every row."""
    return tl.load(base + chunk * stride + t, mask=there, other=0.0)


@triton.jit
def channels(D: tl.constexpr, DP: tl.constexpr, TURN: tl.constexpr) -> tl.tuple:
    """The channels of q and k in their DP columns, and which columns hold one.

    Where D is no power of two and channels turn in pairs, the second half begins at column DP / 2. The
    columns of a pair are DP / 2 apart then.
    """
    column = tl.arange(0, DP)
    d = column
    there = column < D
    if TURN and D < DP:
        half: tl.constexpr = D // 2
        columns: tl.constexpr = DP // 2
        d = tl.where(column < columns, column, column - columns + half)
        there = column % columns < half
    return d, there


@triton.jit
def channel_rows(
    base: tl.tensor, place: tl.tensor, inside: tl.tensor, stride: tl.tensor, d: tl.tensor
) -> tl.tensor:
    """Load the channels d of rows of a token tensor; 0 where not inside."""
    return tl.load(base + place[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def phi_of(raw: tl.tensor, inside: tl.tensor, offset: tl.tensor) -> tl.tensor:
    """relu(x) + offset in float32; 0 where not inside."""
    return tl.where(inside, tl.maximum(raw.to(tl.float32), 0.0) + offset, 0.0)


@triton.jit
def inside_of(there: tl.tensor, is_channel: tl.tensor, D: tl.constexpr, DP: tl.constexpr) -> tl.tensor:
    """Which of (rows, DP) are tokens and channels."""
    return there[:, None] if D == DP else there[:, None] & is_channel[None, :]


@triton.jit
def keep_positive(
    base: tl.tensor,
    x: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    sx: tl.tensor,
    stride: tl.tensor,
    d: tl.tensor,
    gradient: tl.tensor,
) -> tl.tensor:
    """Store the gradient of features to `base`, 0 where x is not above 0.

    A second load of x costs less than registers through a whole loop. Its policy differs from the first
    one's, or the compiler would merge the two.
    """
    at = x + place[:, None] * sx + d[None, :]
    kept = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first") > 0
    values = tl.where(kept, gradient, 0.0).to(base.dtype.element_ty)
    tl.store(base + place[:, None] * stride + d[None, :], values, mask=inside)


@triton.jit
def turned(
    phi: tl.tensor,
    base: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    stride: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    offset: tl.tensor,
    d: tl.tensor,
    D: tl.constexpr,
    TURN: tl.constexpr,
) -> tl.tensor:
    """Turn features of the rows at `base`: channel d with channel d + D / 2.

    The other channel of each pair is loaded anew: it is in the cache, and in another thread's registers.
    """
    if TURN:
        half: tl.constexpr = D // 2
        other = tl.where(d < half, d + half, d - half)
        raw = channel_rows(base, place, inside, stride, other)
        paired = phi_of(raw, inside, offset)
        at = place[:, None] * half + (d % half)[None, :]
        c = tl.load(cos + at, mask=inside, other=0.0)
        s = tl.load(sin + at, mask=inside, other=0.0)
        phi = phi * c + paired * tl.where((d < half)[None, :], -s, s)
    return phi


@triton.jit
def turned_back(
    x: tl.tensor,
    place: tl.tensor,
    there: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    W: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TURN: tl.constexpr,
) -> tl.tensor:
    """Turn (W, DP) back."""
    if TURN:
        half: tl.constexpr = D // 2
        columns: tl.constexpr = DP // 2
        first, second = tl.split(tl.permute(tl.reshape(x, (W, 2, columns)), (0, 2, 1)))
        j = tl.arange(0, columns)
        at = place[:, None] * half + j[None, :]
        inside = there[:, None] if D == DP else there[:, None] & (j < half)[None, :]
        c = tl.load(cos + at, mask=inside, other=0.0)
        s = tl.load(sin + at, mask=inside, other=0.0)
        pairs = tl.join(first * c + second * s, second * c - first * s)
        x = tl.reshape(tl.permute(pairs, (0, 2, 1)), (W, DP))
    return x


@triton.jit
def weight_tile(
    weights: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    M: tl.tensor,
    sa: tl.tensor,
    sb: tl.tensor,
    W: tl.constexpr,
    V: tl.constexpr,
    TP: tl.constexpr,
) -> tl.tensor:
    """Return w[a + i // TP, b + j // TP] of a W x V tile.

    M is no constant, unlike in `dense.py`: packed batches differ in their number of chunks.
    """
    NA: tl.constexpr = W // TP if TP <= W else 1
    NB: tl.constexpr = V // TP if TP <= V else 1
    row, column = a + tl.arange(0, NA), b + tl.arange(0, NB)
    there = (row < M)[:, None] & (column < M)[None, :]
    w = tl.load(weights + row[:, None] * sa + column[None, :] * sb, mask=there, other=0.0)
    return tl.reshape(tl.broadcast_to(w[:, None, :, None], (NA, W // NA, NB, V // NB)), (W, V))


@triton.jit
def fading(
    before: tl.tensor,
    same: tl.tensor,
    until_query: tl.tensor,
    until_key: tl.tensor,
    after_key: tl.tensor,
    DECAY: tl.constexpr,
) -> tl.tensor:
    """fade(t, s) of a tile; 0 where the key is later."""
    if DECAY == 0:
        fade = tl.where(before, 1.0, 0.0)
    else:
        exponent = tl.where(same, until_query - until_key, 0.0)
        if DECAY == 2:
            exponent = tl.where(same, exponent, until_query + after_key)
        fade = tl.where(before, tl.exp(tl.where(before, exponent, 0.0)), 0.0)
    return fade
