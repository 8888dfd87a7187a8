"""Causal MHLA token by token, at constant cost (SPEC section 2; N2, N3).

A state keeps the summaries S_b = sum k v^T of finished chunks in a ring. Chunk b is in place b mod `kept`, so
that each chunk that finishes takes the place of the one that has become too far. With `kept` = 4, while chunk
9 is being filled:

    chunks   0  1  2  3  4 | 5  6  7  8 | 9
             far           | ring       | current
                           |
    place    0      1      2      3                chunk 9 will take place 1, and chunk 5 becomes far
           [ S_8 ][ S_5 ][ S_6 ][ S_7 ]

The absolute form drops far chunks, because the matrix has no weights for them. The relative form gives them
all its last weight, and so keeps their sum as one summary. When a chunk begins, ring and far summaries are
mixed once; every token of the chunk then reads two matrices:

    mixed = sum_b m[9, b] S_b  (+ last weight x far)       once per chunk
    o_t   = q_t mixed + m[9, 9] q_t current                once per token

The host counts the tokens, and so knows which sequences begin or end a chunk without a question to the
device. A kernel (`triton/decode.py`) counts on the device instead, so that a CUDA graph can hold its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.base import sent
from mhla_lightning.attention.chunks import check_reach
from mhla_lightning.attention.mhla.rule import CausalFeatures, CausalRule


@dataclass(frozen=True)
class Reach:
    """Which earlier chunks keep a summary of their own.

    Attributes:
        blocks: of the mixing matrix.
        merges: the last weight serves all farther chunks (relative form), so these share one summary.
            Otherwise chunks that are `blocks` or more away are not read again.
    """

    blocks: int
    merges: bool

    @property
    def kept(self) -> int:
        """Places of the ring."""
        return max(0, self.blocks - (2 if self.merges else 1))

    def place(self, chunk: int) -> int:
        """Return the place of a chunk in the ring."""
        return chunk % max(1, self.kept)


@dataclass
class Summaries:
    """Sums of k v^T over chunks; see the drawing above.

    Attributes:
        ring: (batch, heads, places, dim_k, dim_v), the latest finished chunks. It grows to `Reach.kept`
            places.
        far: (batch, heads, dim_k, dim_v), the sum of all older chunks; None where they are not read.
        current: (batch, heads, dim_k, dim_v), of the chunk being filled, as the ring will keep it.
        faded: (batch, heads, dim_k, dim_v), the current chunk as its tokens read it, where that is decayed
            and `current` is not; else None.
        mixed: (batch, heads, dim_k, dim_v), ring and far mixed for the current chunk.
    """

    ring: Tensor
    far: Tensor | None
    current: Tensor
    faded: Tensor | None
    mixed: Tensor

    def add(self, k: Tensor, v: Tensor, gain: Tensor | None, span: str) -> None:
        """Add one token to the current chunk.

        Args:
            k: (batch, heads, dim_k).
            v: (batch, heads, dim_v).
            gain: (batch, heads), the token's decay; None means no decay.
            span: of the decay, see :class:`CausalRule`.
        """
        k, v = k.unsqueeze(-1), v.unsqueeze(-2)
        if self.faded is not None and gain is not None:
            self.faded = torch.addcmul(self.faded * gain[..., None, None], k, v)
        decays = gain is not None and span == "sequence"
        decayed = self.current * gain[..., None, None] if decays and gain is not None else self.current
        self.current = torch.addcmul(decayed, k, v)

    def read(self, q: Tensor, own_weight: Tensor, since_start: Tensor | None) -> Tensor:
        """Read earlier chunks and the current one, (batch, heads, dim_v).

        Args:
            q: (batch, heads, dim_k).
            own_weight: (batch, heads or 1), the weight of the current chunk.
            since_start: (batch, heads), log decay since the chunk began; None means no decay across chunks.
        """
        q = q.unsqueeze(-2)
        earlier = (q @ self.mixed).squeeze(-2)
        own = (q @ (self.current if self.faded is None else self.faded)).squeeze(-2)
        if since_start is not None:
            earlier = earlier * since_start.exp().unsqueeze(-1)
        return earlier + own_weight.unsqueeze(-1) * own

    def mix(self, rows: Tensor, ring_weights: Tensor, far_weights: Tensor | None) -> None:
        """Mix ring and far summaries anew for some sequences.

        Args:
            rows: (rows,) int64, the sequences.
            ring_weights: (rows, heads or 1, places).
            far_weights: (rows, heads or 1); None where far chunks are not read.
        """
        every = len(rows) == len(self.current)
        ring = self.ring if every else self.ring[rows]
        weights = ring_weights.expand(-1, ring.shape[1], -1).unsqueeze(-2)
        mixed = (weights @ ring.flatten(3)).squeeze(-2).unflatten(-1, ring.shape[3:])
        if far_weights is not None and self.far is not None:
            mixed = mixed + far_weights[..., None, None] * (self.far if every else self.far[rows])
        self.mixed = mixed if every else self.mixed.index_copy(0, rows, mixed)

    def finish(self, rows: Tensor, place: Tensor, leaving: Tensor, gain: Tensor | None) -> None:
        """Move the finished chunk of some sequences into the ring.

        The chunk that it replaces joins the far ones.

        Args:
            rows: (rows,) int64, the sequences.
            place: (rows,) int64, the place in the ring.
            leaving: (rows, heads), the decay of the chunk that leaves the ring.
            gain: (rows, heads), the decay of far chunks over the finished one; None means no decay.
        """
        if self.far is not None:
            far = self.far[rows] if gain is None else self.far[rows] * gain[..., None, None]
            if self.ring.shape[2]:
                out = self.ring[rows, :, place] * leaving[..., None, None]
            else:
                out = self.current[rows]
            self.far = self.far.index_copy(0, rows, far + out)
        if self.ring.shape[2]:
            # A backward still needs the ring's old contents.
            ring = self.ring.clone() if self.current.requires_grad else self.ring
            ring[rows, :, place] = self.current[rows]
            self.ring = ring
        self.current = self.current.index_fill(0, rows, 0)
        if self.faded is not None:
            self.faded = self.faded.index_fill(0, rows, 0)

    def grow(self, places: int) -> None:
        """Extend the ring to this many places."""
        self.ring = F.pad(self.ring, (0, 0) * 2 + (0, places - self.ring.shape[2]))

    def own(self) -> None:
        """Give every sum its own memory; a new state holds one tensor of zeros in several places."""
        self.ring = self.ring.contiguous()
        self.current, self.mixed = _copied(self.current), _copied(self.mixed)
        self.far = None if self.far is None else _copied(self.far)
        self.faded = None if self.faded is None else _copied(self.faded)


@dataclass
class MHLAState:
    """The state of causal MHLA; `step` changes it in place.

    Attributes:
        rule: the settings that the state was made for.
        reach: which summaries are kept.
        filled: tokens in the current chunk, of every sequence.
        finished: finished chunks, of every sequence; the number of its current chunk. Both are out of date
            unless `counted`.
        values: sums of k v^T.
        norms: sums of k for the normalizer, with dim_v = 1; None without normalizer.
        since_start: (batch, heads), log decay since the current chunk began; None unless the decay spans the
            sequence.
        since_end: (batch, heads, places), log decay between each chunk in the ring and the current one; None
            unless the decay spans the sequence.
        tokens: (batch, heads) int32, tokens so far of every sequence, which a kernel counts head by head;
            None where only the host counts.
        counted: whether the host has counted every token. It has not after `leave_host`.
    """

    rule: CausalRule
    reach: Reach
    filled: list[int]
    finished: list[int]
    values: Summaries
    norms: Summaries | None = None
    since_start: Tensor | None = None
    since_end: Tensor | None = None
    tokens: Tensor | None = None
    counted: bool = True

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in _tensors(self))

    def reorder(self, indices: Tensor) -> MHLAState:
        if not self.counted:
            return _select(self, indices)
        chosen = indices.tolist()
        return replace(
            _select(self, indices),
            filled=[self.filled[i] for i in chosen],
            finished=[self.finished[i] for i in chosen],
        )

    def parts(self) -> list[Summaries]:
        """Return the summaries of values and, where there are any, of the normalizer."""
        return [self.values] if self.norms is None else [self.values, self.norms]

    def count_on_device(self) -> Tensor:
        """Return `tokens`; from here on every tensor of the state may change in place."""
        if self.tokens is None:
            current = self.values.current
            size = self.rule.chunk_size
            counts = [n * size + m for n, m in zip(self.finished, self.filled, strict=True)]
            tokens = sent(counts, current.device).to(torch.int32)
            self.tokens = tokens[:, None].repeat(1, current.shape[1])
            for part in self.parts():
                part.own()
            if self.since_start is not None and self.since_end is not None:
                self.since_start, self.since_end = _copied(self.since_start), _copied(self.since_end)
        return self.tokens

    def leave_host(self, tokens: int) -> None:
        """Take all memory now, and count tokens on the device alone, as a CUDA graph needs.

        Args:
            tokens: of a sequence at most. A longer one gets NaN.
        """
        make_room(self, tokens // self.rule.chunk_size)
        self.count_on_device()
        self.counted = False

    def count_on_host(self) -> None:
        """Take the tokens' number over from the device; that waits for it only after `leave_host`."""
        if self.tokens is not None and not self.counted:
            counts, size = self.tokens[:, 0].tolist(), self.rule.chunk_size
            self.filled, self.finished = [n % size for n in counts], [n // size for n in counts]
        self.tokens, self.counted = None, True

    def count(self) -> list[int]:
        """Count one more token of every sequence; return the sequences whose chunk is full then."""
        self.filled = [filled + 1 for filled in self.filled]
        return [b for b, filled in enumerate(self.filled) if filled == self.rule.chunk_size]

    def turn_chunk(self, rows: Sequence[int]) -> None:
        """Count one more finished chunk of the sequences `rows`."""
        for b in rows:
            self.filled[b], self.finished[b] = 0, self.finished[b] + 1

    def check_reach(self, rows: Sequence[int]) -> None:
        """Refuse sequences `rows` that begin a chunk beyond the matrix, without extrapolation.

        Raises:
            UserError: there is such a sequence.
        """
        if rows and not self.reach.merges:
            chunks = max(self.finished[b] for b in rows) + 1
            check_reach(chunks, self.reach.blocks, self.rule.chunk_size, self.rule.extrapolation)


def init_state(
    batch: int,
    *,
    heads: int,
    dim_k: int,
    dim_v: int,
    blocks: int,
    rule: CausalRule,
    decays: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MHLAState:
    """Return the state before the first token.

    Args:
        batch: number of sequences.
        heads: number of heads.
        dim_k, dim_v: channels per head of k and of v.
        blocks: of the mixing matrix, or distances of the relative form.
        rule: the settings.
        decays: whether tokens come with a `log_decay`.
        device: of the state.
        dtype: of the sums.
    """

    def empty(width: int) -> Summaries:
        zeros = torch.zeros(batch, heads, dim_k, width, device=device, dtype=dtype)
        ring = zeros.new_zeros(batch, heads, 0, dim_k, width)
        faded = zeros if decays and rule.decay_span == "chunk" else None
        return Summaries(ring, zeros if rule.merges else None, zeros, faded, zeros)

    state = MHLAState(
        rule,
        Reach(blocks, rule.merges),
        [0] * batch,
        [0] * batch,
        empty(dim_v),
        empty(1) if rule.normalizer == "block" else None,
    )
    if decays and rule.decay_span == "sequence":
        state.since_start = torch.zeros(batch, heads, device=device, dtype=dtype)
        state.since_end = torch.zeros(batch, heads, 0, device=device, dtype=dtype)
    return state


def step_state(state: MHLAState, token: CausalFeatures, mixing: Tensor) -> Tensor:
    """Process one more token of every sequence; the same numbers as :func:`attend_in_chunks`.

    Args:
        state: of the tokens so far; it is changed in place.
        token: its features, without a token axis.
        mixing: (blocks, blocks) or (heads, blocks, blocks); of form `relative` (heads or 1, distances).

    Returns:
        (batch, heads, dim_v)

    Raises:
        UserError: a sequence beyond the matrix, without extrapolation.
    """
    state.count_on_host()
    rule, k, v = state.rule, token.k, token.v
    scale = rule.scale_for(token.q.shape[-1])
    q = token.q * scale
    entering = [b for b, filled in enumerate(state.filled) if filled == 0]
    if entering:
        enter_chunk(state, entering, mixing)
    gain = None if token.log_decay is None else token.log_decay.exp()
    if state.since_start is not None:
        assert token.log_decay is not None
        state.since_start = state.since_start + token.log_decay
    own_weight = _own_weights(state, mixing) if rule.own_chunk else torch.zeros_like(q[..., 0])
    state.values.add(k, v, gain, rule.decay_span)
    out = state.values.read(q, own_weight, state.since_start)
    if state.norms is not None:
        q_norm = q if token.q_norm is None else token.q_norm * scale
        k_norm = k if token.k_norm is None else token.k_norm
        state.norms.add(k_norm, torch.ones_like(v[..., :1]), gain, rule.decay_span)
        out = out / (state.norms.read(q_norm, own_weight, state.since_start) + rule.eps)
    full = state.count()
    if full:
        _finish_chunk(state, full)
    return out


def enter_chunk(state: MHLAState, rows: Sequence[int], mixing: Tensor) -> None:
    """Mix the earlier chunks for the sequences `rows`, which begin a chunk.

    Raises:
        UserError: a sequence beyond the matrix, without extrapolation.
    """
    reach = state.reach
    state.check_reach(rows)
    index = sent(rows, mixing.device)
    number = sent([state.finished[b] for b in rows], mixing.device)[:, None]
    places = torch.arange(state.values.ring.shape[2], device=mixing.device)
    # The distance of the chunk in each place. Where it exceeds the number, no chunk is there yet.
    distance = 1 + (number - 1 - places) % max(1, reach.kept)
    there = (distance <= number).to(mixing.dtype).unsqueeze(1)
    far_weights = None
    if reach.merges:
        weights = mixing[:, distance.clamp_max(reach.blocks - 1)].transpose(0, 1) * there
        far_weights = mixing[:, -1].expand(len(rows), -1)
    else:
        row = number.clamp_max(reach.blocks - 1)
        weights = mixing[..., row, (row - distance).clamp_min(0)]
        weights = (weights.unsqueeze(1) if mixing.dim() == 2 else weights.transpose(0, 1)) * there
    if state.since_end is not None:
        weights = weights * state.since_end[index].exp()
    for part in state.parts():
        part.mix(index, weights, far_weights)


def _own_weights(state: MHLAState, mixing: Tensor) -> Tensor:
    """Return (batch, heads or 1): the weight of each sequence's current chunk with itself."""
    if state.reach.merges:
        return mixing[:, 0].expand(len(state.finished), -1)
    number = sent(state.finished, mixing.device).clamp_max(state.reach.blocks - 1)
    own = mixing[..., number, number]
    return own.unsqueeze(1) if mixing.dim() == 2 else own.transpose(0, 1)


def _finish_chunk(state: MHLAState, rows: Sequence[int]) -> None:
    """Move the full chunks of the sequences `rows` into the ring."""
    current = state.values.current
    make_room(state, max(state.finished[b] for b in rows) + 1)
    index = sent(rows, current.device)
    place = sent([state.reach.place(state.finished[b]) for b in rows], current.device)
    gain, leaving = None, current.new_ones(len(rows), current.shape[1])
    if state.since_start is not None and state.since_end is not None:
        over_chunk = state.since_start[index]
        gain = over_chunk.exp()
        if state.since_end.shape[2]:
            leaving = (state.since_end[index, :, place] + over_chunk).exp()
        since_end = state.since_end[index] + over_chunk.unsqueeze(-1)
        state.since_end = state.since_end.index_copy(0, index, since_end)
        if state.since_end.shape[2]:
            state.since_end[index, :, place] = 0
        state.since_start = state.since_start.index_fill(0, index, 0)
    for part in state.parts():
        part.finish(index, place, leaving, gain)
    state.turn_chunk(rows)


def make_room(state: MHLAState, finished: int) -> None:
    """Extend the ring for this many finished chunks.

    It grows at least to twice its size, and at most to `Reach.kept`.
    """
    places = state.values.ring.shape[2]
    if places < min(finished, state.reach.kept):
        wanted = min(state.reach.kept, max(finished, 2 * places))
        for part in state.parts():
            part.grow(wanted)
        if state.since_end is not None:
            state.since_end = F.pad(state.since_end, (0, wanted - places))


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _tensors(part: MHLAState | Summaries) -> list[Tensor]:
    """Return all tensors of a state."""
    found: list[Tensor] = []
    for item in fields(part):
        value = getattr(part, item.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Summaries):
            found += _tensors(value)
    return found


def _select(part: Any, indices: Tensor) -> Any:
    """Return a copy of a state or summaries with only the sequences `indices`."""
    chosen = {}
    for item in fields(part):
        value = getattr(part, item.name)
        if isinstance(value, Tensor):
            chosen[item.name] = value.index_select(0, indices.to(value.device))
        elif isinstance(value, Summaries):
            chosen[item.name] = _select(value, indices)
    return replace(part, **chosen)
