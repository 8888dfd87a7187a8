"""Causal Multi-Head Linear Attention token by token: constant cost, however far the text has gone (SPEC section 2; N2, N3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.mhla.chunkwise import ChunkedTokens, check_reach


@dataclass(frozen=True)
class Reach:
    """Which earlier chunks keep a summary of their own.

    blocks: of the mixing matrix. merges: the last weight holds for all that are farther (relative form), so these share one summary;
    otherwise nothing that is `blocks` or more chunks away is read again.
    """

    blocks: int
    merges: bool

    @property
    def kept(self) -> int:
        return max(0, self.blocks - (2 if self.merges else 1))


@dataclass
class Summaries:
    """Sums of k v^T: of finished chunks, of the chunk being filled, and what a token reads of the finished ones.

    Attributes:
        past: (batch, heads, places, dim_k, dim_v); finished chunk b stands in place b mod `Reach.kept`. Grows up to that many places.
        rest: (batch, heads, dim_k, dim_v), all chunks farther than that, where they are merged.
        own: (batch, heads, dim_k, dim_v), of the current chunk, as it will be kept.
        near: the same as it is read, where that is decayed and `own` is not; else None.
        prefix: (batch, heads, dim_k, dim_v), past and rest mixed for the current chunk.
    """

    past: Tensor
    rest: Tensor | None
    own: Tensor
    near: Tensor | None
    prefix: Tensor

    def add(self, k: Tensor, v: Tensor, gain: Tensor | None, span: str) -> None:
        """One more token: k (batch, heads, dim_k), v (batch, heads, dim_v), gain (batch, heads) its decay."""
        k, v = k.unsqueeze(-1), v.unsqueeze(-2)
        if self.near is not None and gain is not None:
            self.near = torch.addcmul(self.near * gain[..., None, None], k, v)
        decayed = self.own * gain[..., None, None] if gain is not None and span == "sequence" else self.own
        self.own = torch.addcmul(decayed, k, v)

    def read(self, q: Tensor, own_weight: Tensor, until: Tensor | None) -> Tensor:
        """q (batch, heads, dim_k), own_weight (batch, heads), until: log decay since the chunk began (batch, heads) -> (batch, heads, dim_v)."""
        q = q.unsqueeze(-2)
        earlier = (q @ self.prefix).squeeze(-2)
        own = (q @ (self.own if self.near is None else self.near)).squeeze(-2)
        return (earlier if until is None else earlier * until.exp().unsqueeze(-1)) + own_weight.unsqueeze(-1) * own

    def mix(self, rows: Tensor, past: Tensor, rest: Tensor | None) -> None:
        """A new prefix for the sequences `rows` with weights past (rows, heads or 1, places) and rest (rows, heads or 1)."""
        every = len(rows) == len(self.own)
        kept = self.past if every else self.past[rows]
        prefix = (past.expand(-1, kept.shape[1], -1).unsqueeze(-2) @ kept.flatten(3)).squeeze(-2).unflatten(-1, kept.shape[3:])
        if rest is not None and self.rest is not None:
            prefix = prefix + rest[..., None, None] * (self.rest if every else self.rest[rows])
        self.prefix = prefix if every else self.prefix.index_copy(0, rows, prefix)

    def push(self, rows: Tensor, place: Tensor, leaving: Tensor, gain: Tensor | None) -> None:
        """Keeps the finished chunk of `rows` in `place` (rows,), whose chunk joins the rest with the decay `leaving` (rows, heads).

        gain: decay of the rest over the finished chunk, (rows, heads).
        """
        if self.rest is not None:
            rest = self.rest[rows] if gain is None else self.rest[rows] * gain[..., None, None]
            out = self.past[rows, :, place] * leaving[..., None, None] if self.past.shape[2] else self.own[rows]
            self.rest = self.rest.index_copy(0, rows, rest + out)
        if self.past.shape[2]:
            past = self.past.clone() if self.own.requires_grad else self.past  # a gradient still needs what stands there
            past[rows, :, place] = self.own[rows]
            self.past = past
        self.own = self.own.index_fill(0, rows, 0)
        if self.near is not None:
            self.near = self.near.index_fill(0, rows, 0)

    def grow(self, places: int) -> None:
        """Room for this many finished chunks."""
        self.past = F.pad(self.past, (0, 0) * 2 + (0, places - self.past.shape[2]))


@dataclass
class MHLAState:
    """What causal MHLA remembers; `step` changes it in place.

    Attributes:
        size: tokens a chunk. reach: which summaries are kept.
        fill, number: of every sequence, tokens in its current chunk and how many chunks are finished.
        values: sums of k v^T. norms: sums of k for the normalizer, with dim_v = 1.
        until: (batch, heads) log decay since the current chunk began; age: (batch, heads, places) from the end of a kept chunk to there.
            Both where the decay spans the sequence.
    """

    size: int
    reach: Reach
    fill: list[int]
    number: list[int]
    values: Summaries
    norms: Summaries | None = None
    until: Tensor | None = None
    age: Tensor | None = None
    span: str = field(default="chunk")

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in _tensors(self))

    def reorder(self, indices: Tensor) -> MHLAState:
        chosen = indices.tolist()
        return replace(_select(self, indices), fill=[self.fill[i] for i in chosen], number=[self.number[i] for i in chosen])

    def parts(self) -> list[Summaries]:
        return [self.values] if self.norms is None else [self.values, self.norms]


def init_state(
    batch: int,
    *,
    heads: int,
    dim_k: int,
    dim_v: int,
    chunk_size: int,
    blocks: int,
    merges: bool = False,
    normalizer: str = "none",
    decay_span: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MHLAState:
    """The state before the first token. decay_span: None is no decay; see :func:`causal_mhla` for the rest."""

    def empty(width: int) -> Summaries:
        zeros = torch.zeros(batch, heads, dim_k, width, device=device, dtype=dtype)
        near = zeros if decay_span == "chunk" else None
        return Summaries(zeros.new_zeros(batch, heads, 0, dim_k, width), zeros if merges else None, zeros, near, zeros)

    state = MHLAState(chunk_size, Reach(blocks, merges), [0] * batch, [0] * batch, empty(dim_v), empty(1) if normalizer == "block" else None)
    if decay_span == "sequence":
        state.until = torch.zeros(batch, heads, device=device, dtype=dtype)
        state.age = torch.zeros(batch, heads, 0, device=device, dtype=dtype)
    state.span = decay_span or "chunk"
    return state


def step_state(
    state: MHLAState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    *,
    eps: float = 1e-6,
    extrapolation: str | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    log_decay: Tensor | None = None,
    own: bool = True,
) -> Tensor:
    """One more token of every sequence; the same numbers as :func:`causal_mhla`, whose arguments these are.

    Args:
        q, k: (batch, heads, dim_k), feature-mapped, q scaled. v: (batch, heads, dim_v). log_decay: (batch, heads).
        mixing: as the state was made for: (heads or 1, distances) where far chunks are merged.
        own: also reads the current chunk; False leaves it to the caller (softmax window).

    Returns:
        (batch, heads, dim_v)

    Raises:
        UserError: a sequence beyond the matrix without extrapolation.
    """
    entering = [b for b, fill in enumerate(state.fill) if fill == 0]
    if entering:
        _enter(state, entering, mixing, extrapolation)
    gain = None if log_decay is None else log_decay.exp()
    if state.until is not None:
        assert log_decay is not None
        state.until = state.until + log_decay
    own_weight = _own_weights(state, mixing) if own else torch.zeros_like(q[..., 0])
    state.values.add(k, v, gain, state.span)
    out = state.values.read(q, own_weight, state.until)
    if state.norms is not None:
        ones = torch.ones_like(v[..., :1])
        state.norms.add(k if k_norm is None else k_norm, ones, gain, state.span)
        out = out / (state.norms.read(q if q_norm is None else q_norm, own_weight, state.until) + eps)
    state.fill = [fill + 1 for fill in state.fill]
    full = [b for b, fill in enumerate(state.fill) if fill == state.size]
    if full:
        _finish(state, full)
    return out


def _enter(state: MHLAState, rows: Sequence[int], mixing: Tensor, extrapolation: str | None) -> None:
    """Mixes the prefix of the sequences that begin a chunk."""
    if not state.reach.merges:
        check_reach(max(state.number[b] for b in rows) + 1, state.reach.blocks, state.size, extrapolation)
    index = torch.tensor(rows, device=mixing.device)
    number = torch.tensor([state.number[b] for b in rows], device=mixing.device)[:, None]
    places = torch.arange(state.values.past.shape[2], device=mixing.device)
    distance = 1 + (number - 1 - places) % max(1, state.reach.kept)  # of the chunk in each place; one that is not there yet is farther than number
    there = (distance <= number).to(mixing.dtype).unsqueeze(1)
    rest = None
    if state.reach.merges:
        past = mixing[:, distance.clamp_max(state.reach.blocks - 1)].transpose(0, 1) * there  # (rows, heads or 1, places)
        rest = mixing[:, -1].expand(len(rows), -1)
    else:
        row = number.clamp_max(state.reach.blocks - 1)
        past = mixing[..., row, (row - distance).clamp_min(0)]
        past = (past.unsqueeze(1) if mixing.dim() == 2 else past.transpose(0, 1)) * there
    if state.age is not None:
        past = past * state.age[index].exp()
    for part in state.parts():
        part.mix(index, past, rest)


def _own_weights(state: MHLAState, mixing: Tensor) -> Tensor:
    """(batch, heads or 1): the weight of each sequence's current chunk with itself."""
    if state.reach.merges:
        return mixing[:, 0].expand(len(state.number), -1)
    number = torch.tensor(state.number, device=mixing.device).clamp_max(state.reach.blocks - 1)
    own = mixing[..., number, number]
    return own.unsqueeze(1) if mixing.dim() == 2 else own.transpose(0, 1)


def _finish(state: MHLAState, rows: Sequence[int]) -> None:
    """Keeps the summaries of chunks that are full."""
    device = state.values.own.device
    _make_room(state, max(state.number[b] for b in rows) + 1)
    index = torch.tensor(rows, device=device)
    place = torch.tensor([state.number[b] % max(1, state.reach.kept) for b in rows], device=device)
    gain = None
    leaving = state.values.own.new_ones(len(rows), state.values.own.shape[1])
    if state.until is not None and state.age is not None:
        over = state.until[index]
        gain = over.exp()
        if state.age.shape[2]:
            leaving = (state.age[index, :, place] + over).exp()
        age = state.age[index] + over.unsqueeze(-1)
        state.age = state.age.index_copy(0, index, age)
        if state.age.shape[2]:
            state.age[index, :, place] = 0
        state.until = state.until.index_fill(0, index, 0)
    for part in state.parts():
        part.push(index, place, leaving, gain)
    for b in rows:
        state.fill[b], state.number[b] = 0, state.number[b] + 1


def _make_room(state: MHLAState, finished: int) -> None:
    places = state.values.past.shape[2]
    if places < min(finished, state.reach.kept):
        wanted = min(state.reach.kept, max(finished, 2 * places))
        for part in state.parts():
            part.grow(wanted)
        if state.age is not None:
            state.age = F.pad(state.age, (0, wanted - places))


def state_after(
    tokens: ChunkedTokens,
    summaries: Tensor,
    ones: ChunkedTokens | None,
    sums: Tensor | None,
    real: Tensor | None,
    mixing: Tensor,
    *,
    merges: bool,
    extrapolation: str | None,
) -> MHLAState:
    """The state behind a call in chunks: `summaries` of `tokens`, and `sums` of `ones` for the normalizer.

    real: (batch, tokens) bool, None is all; mixing, merges (relative form), extrapolation: as for :func:`causal_mhla`.
    """
    batch, heads, _, size = tokens.k.shape[:4]
    lengths = [tokens.tokens] * batch if real is None else real.sum(1).tolist()
    fill, number = [n % size for n in lengths], [n // size for n in lengths]
    reach = Reach(mixing.shape[-1], merges)
    chosen = _Chosen.of(tokens, fill, number, reach)
    state = MHLAState(size, reach, fill, number, chosen.summaries(tokens, summaries))
    if ones is not None and sums is not None:
        state.norms = chosen.summaries(ones, sums)
    if tokens.decay is not None:
        state.span = tokens.decay.span
    if chosen.end is not None and state.span == "sequence":
        state.until, state.age = chosen.end.expand(-1, heads), chosen.age
    begun = [b for b in range(batch) if fill[b]]
    if begun:
        _enter(state, begun, mixing, extrapolation)
    return state


@dataclass(frozen=True)
class _Chosen:
    """Which chunks of a call the state behind it keeps.

    places: (batch, places) chunk in each place, -1 where there is none. far: (batch, heads or 1, M) weights of the chunks that are merged.
    current: (batch,) number of the chunk being filled. end: (batch, heads) log decay since it began, None without decay.
    age: (batch, heads, places) log decay from the end of a kept chunk to the beginning of the current one, None where it does not span the sequence.
    """

    places: Tensor
    far: Tensor | None
    current: Tensor
    end: Tensor | None
    age: Tensor | None

    @classmethod
    def of(cls, tokens: ChunkedTokens, fill: list[int], number: list[int], reach: Reach) -> _Chosen:
        device, count = tokens.k.device, tokens.k.shape[2]
        current, filled = torch.tensor(number, device=device), torch.tensor(fill, device=device)
        place = torch.arange(min(max(number), reach.kept), device=device)
        chunk = current[:, None] - 1 - (current[:, None] - 1 - place) % max(1, reach.kept)
        places = torch.where(chunk >= 0, chunk, -1)
        far = None
        if reach.merges:
            far = (torch.arange(count, device=device) < current[:, None] - reach.kept).to(tokens.k.dtype).unsqueeze(1)
        if tokens.decay is None:
            return cls(places, far, current, None, None)
        heads = tokens.decay.until.shape[1]
        until = _chunk(tokens.decay.until.expand(len(number), heads, count, -1), current)
        end = F.pad(until, (1, 0)).gather(-1, filled[:, None, None].expand(-1, heads, 1)).squeeze(-1)
        if tokens.decay.span == "chunk":
            return cls(places, far, current, end, None)
        ends = F.pad(tokens.decay.total.expand(len(number), heads, -1).cumsum(-1), (1, 0))  # sum over the chunks before each
        before = ends.gather(-1, current[:, None, None].expand(-1, heads, 1))
        age = before - ends.gather(-1, (places + 1)[:, None].expand(-1, heads, -1))
        if far is not None:
            far = far * (before - ends[..., 1:]).clamp_max(0).exp()
        return cls(places, far, current, end, age)

    def summaries(self, tokens: ChunkedTokens, summaries: Tensor) -> Summaries:
        """Past, rest and the chunk being filled, of `summaries` (batch, heads, M, dim_k, dim_v)."""
        index = self.places.clamp_min(0)[:, None, :, None, None].expand(-1, summaries.shape[1], -1, *summaries.shape[3:])
        past = summaries.gather(2, index) * (self.places >= 0)[:, None, :, None, None].to(summaries.dtype)
        rest = None if self.far is None else (self.far.unsqueeze(-2) @ summaries.flatten(3)).squeeze(-2).unflatten(-1, summaries.shape[3:])
        k, v = _chunk(tokens.k, self.current), _chunk(tokens.v, self.current)
        own, near = k.transpose(-2, -1) @ v, None
        if tokens.decay is not None and self.end is not None:
            until = _chunk(tokens.decay.until.expand(len(k), -1, tokens.k.shape[2], -1), self.current)
            # Places behind the last token hold no key; the bound keeps their factor finite.
            decayed = (k * (self.end.unsqueeze(-1) - until).clamp_max(0).exp().unsqueeze(-1)).transpose(-2, -1) @ v
            own, near = (decayed, None) if tokens.decay.span == "sequence" else (own, decayed)
        return Summaries(past, rest, own, near, torch.zeros_like(own))


def _chunk(x: Tensor, number: Tensor) -> Tensor:
    """x (batch, heads, M, ...) at each sequence's chunk `number` (batch,), zeros behind the last -> (batch, heads, ...)."""
    padded = F.pad(x, (0, 0) * (x.dim() - 3) + (0, 1))
    return padded[torch.arange(len(x), device=x.device), :, number]


def _tensors(part: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for item in fields(part):
        value = getattr(part, item.name)
        found += [value] if isinstance(value, Tensor) else _tensors(value) if isinstance(value, Summaries) else []
    return found


def _select(part: Any, indices: Tensor) -> Any:
    """A copy with only the sequences `indices`."""
    chosen = {}
    for item in fields(part):
        value = getattr(part, item.name)
        if isinstance(value, Tensor):
            chosen[item.name] = value.index_select(0, indices.to(value.device))
        elif isinstance(value, Summaries):
            chosen[item.name] = _select(value, indices)
    return replace(part, **chosen)
