"""Causal Multi-Head Linear Attention token by token: constant cost, however far the text has gone (SPEC
section 2; N2, N3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.chunks import check_reach


@dataclass(frozen=True)
class Reach:
    """Which earlier chunks keep a summary of their own.

    blocks: of the mixing matrix. merges: the last weight holds for all that are farther (relative form), so
        these share one summary;
    otherwise nothing that is `blocks` or more chunks away is read again.
    """

    blocks: int
    merges: bool

    @property
    def kept(self) -> int:
        return max(0, self.blocks - (2 if self.merges else 1))


@dataclass
class Summaries:
    """Sums of k v^T: of finished chunks, of the chunk being filled, and what a token reads of the finished
    ones.

    Attributes:
        past: (batch, heads, places, dim_k, dim_v); finished chunk b stands in place b mod `Reach.kept`. Grows
            up to that many places.
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
        """q (batch, heads, dim_k), own_weight (batch, heads), until: log decay since the chunk began
        (batch, heads) -> (batch, heads, dim_v).
        """
        q = q.unsqueeze(-2)
        earlier = (q @ self.prefix).squeeze(-2)
        own = (q @ (self.own if self.near is None else self.near)).squeeze(-2)
        return (earlier if until is None else earlier * until.exp().unsqueeze(-1)) + own_weight.unsqueeze(
            -1
        ) * own

    def mix(self, rows: Tensor, past: Tensor, rest: Tensor | None) -> None:
        """A new prefix for the sequences `rows` with weights past (rows, heads or 1, places) and rest
        (rows, heads or 1).
        """
        every = len(rows) == len(self.own)
        kept = self.past if every else self.past[rows]
        prefix = (
            (past.expand(-1, kept.shape[1], -1).unsqueeze(-2) @ kept.flatten(3))
            .squeeze(-2)
            .unflatten(-1, kept.shape[3:])
        )
        if rest is not None and self.rest is not None:
            prefix = prefix + rest[..., None, None] * (self.rest if every else self.rest[rows])
        self.prefix = prefix if every else self.prefix.index_copy(0, rows, prefix)

    def push(self, rows: Tensor, place: Tensor, leaving: Tensor, gain: Tensor | None) -> None:
        """Keeps the finished chunk of `rows` in `place` (rows,), whose chunk joins the rest with the decay
        `leaving` (rows, heads).

        gain: decay of the rest over the finished chunk, (rows, heads).
        """
        if self.rest is not None:
            rest = self.rest[rows] if gain is None else self.rest[rows] * gain[..., None, None]
            out = (
                self.past[rows, :, place] * leaving[..., None, None] if self.past.shape[2] else self.own[rows]
            )
            self.rest = self.rest.index_copy(0, rows, rest + out)
        if self.past.shape[2]:
            past = (
                self.past.clone() if self.own.requires_grad else self.past
            )  # a gradient still needs what stands there
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
        until: (batch, heads) log decay since the current chunk began; age: (batch, heads, places) from the
            end of a kept chunk to there. Both where the decay spans the sequence. span: of the decay, see
            `causal_mhla`.
    """

    size: int
    reach: Reach
    fill: list[int]
    number: list[int]
    values: Summaries
    norms: Summaries | None = None
    until: Tensor | None = None
    age: Tensor | None = None
    span: str = "chunk"

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in _tensors(self))

    def reorder(self, indices: Tensor) -> MHLAState:
        chosen = indices.tolist()
        return replace(
            _select(self, indices),
            fill=[self.fill[i] for i in chosen],
            number=[self.number[i] for i in chosen],
        )

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
    """The state before the first token. decay_span: None is no decay; see :func:`causal_mhla` for the
    rest.
    """

    def empty(width: int) -> Summaries:
        zeros = torch.zeros(batch, heads, dim_k, width, device=device, dtype=dtype)
        near = zeros if decay_span == "chunk" else None
        return Summaries(
            zeros.new_zeros(batch, heads, 0, dim_k, width), zeros if merges else None, zeros, near, zeros
        )

    state = MHLAState(
        chunk_size,
        Reach(blocks, merges),
        [0] * batch,
        [0] * batch,
        empty(dim_v),
        empty(1) if normalizer == "block" else None,
    )
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
        q, k: (batch, heads, dim_k), feature-mapped, q scaled. v: (batch, heads, dim_v). log_decay: (batch,
            heads).
        mixing: as the state was made for: (heads or 1, distances) where far chunks are merged.
        own: also reads the current chunk; False leaves it to the caller (softmax window).

    Returns:
        (batch, heads, dim_v)

    Raises:
        UserError: a sequence beyond the matrix without extrapolation.
    """
    entering = [b for b, fill in enumerate(state.fill) if fill == 0]
    if entering:
        enter_chunk(state, entering, mixing, extrapolation)
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


def enter_chunk(state: MHLAState, rows: Sequence[int], mixing: Tensor, extrapolation: str | None) -> None:
    """Mixes the prefix of the sequences that begin a chunk."""
    if not state.reach.merges:
        check_reach(max(state.number[b] for b in rows) + 1, state.reach.blocks, state.size, extrapolation)
    index = torch.tensor(rows, device=mixing.device)
    number = torch.tensor([state.number[b] for b in rows], device=mixing.device)[:, None]
    places = torch.arange(state.values.past.shape[2], device=mixing.device)
    distance = 1 + (number - 1 - places) % max(
        1, state.reach.kept
    )  # of the chunk in each place; one that is not there yet is farther than number
    there = (distance <= number).to(mixing.dtype).unsqueeze(1)
    rest = None
    if state.reach.merges:
        past = (
            mixing[:, distance.clamp_max(state.reach.blocks - 1)].transpose(0, 1) * there
        )  # (rows, heads or 1, places)
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


def _tensors(part: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for item in fields(part):
        value = getattr(part, item.name)
        found += (
            [value] if isinstance(value, Tensor) else _tensors(value) if isinstance(value, Summaries) else []
        )
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
