"""The streaming state behind a call in chunks: what `decode` would have reached token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.chunks import ChunkedTokens
from mhla_lightning.attention.mhla.decode import MHLAState, Reach, Summaries, enter_chunk


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

    real: (batch, tokens) bool, None is all; mixing, merges (relative form), extrapolation: as for
        :func:`causal_mhla`.
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
        enter_chunk(state, begun, mixing, extrapolation)
    return state


@dataclass(frozen=True)
class _Chosen:
    """Which chunks of a call the state behind it keeps.

    places: (batch, places) chunk in each place, -1 where there is none. far: (batch, heads or 1, M) weights
        of the chunks that are merged.
    current: (batch,) number of the chunk being filled. end: (batch, heads) log decay since it began, None
        without decay.
    age: (batch, heads, places) log decay from the end of a kept chunk to the beginning of the current one,
        None where it does not span the sequence.
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
            far = (
                (torch.arange(count, device=device) < current[:, None] - reach.kept)
                .to(tokens.k.dtype)
                .unsqueeze(1)
            )
        if tokens.decay is None:
            return cls(places, far, current, None, None)
        heads = tokens.decay.until.shape[1]
        until = _chunk(tokens.decay.until.expand(len(number), heads, count, -1), current)
        end = F.pad(until, (1, 0)).gather(-1, filled[:, None, None].expand(-1, heads, 1)).squeeze(-1)
        if tokens.decay.span == "chunk":
            return cls(places, far, current, end, None)
        ends = F.pad(
            tokens.decay.total.expand(len(number), heads, -1).cumsum(-1), (1, 0)
        )  # sum over the chunks before each
        before = ends.gather(-1, current[:, None, None].expand(-1, heads, 1))
        age = before - ends.gather(-1, (places + 1)[:, None].expand(-1, heads, -1))
        if far is not None:
            far = far * (before - ends[..., 1:]).clamp_max(0).exp()
        return cls(places, far, current, end, age)

    def summaries(self, tokens: ChunkedTokens, summaries: Tensor) -> Summaries:
        """Past, rest and the chunk being filled, of `summaries` (batch, heads, M, dim_k, dim_v)."""
        index = self.places.clamp_min(0)[:, None, :, None, None].expand(
            -1, summaries.shape[1], -1, *summaries.shape[3:]
        )
        past = summaries.gather(2, index) * (self.places >= 0)[:, None, :, None, None].to(summaries.dtype)
        rest = (
            None
            if self.far is None
            else (self.far.unsqueeze(-2) @ summaries.flatten(3))
            .squeeze(-2)
            .unflatten(-1, summaries.shape[3:])
        )
        k, v = _chunk(tokens.k, self.current), _chunk(tokens.v, self.current)
        own, near = k.transpose(-2, -1) @ v, None
        if tokens.decay is not None and self.end is not None:
            until = _chunk(tokens.decay.until.expand(len(k), -1, tokens.k.shape[2], -1), self.current)
            # Places behind the last token hold no key; the bound keeps their factor finite.
            decayed = (k * (self.end.unsqueeze(-1) - until).clamp_max(0).exp().unsqueeze(-1)).transpose(
                -2, -1
            ) @ v
            own, near = (decayed, None) if tokens.decay.span == "sequence" else (own, decayed)
        return Summaries(past, rest, own, near, torch.zeros_like(own))


def _chunk(x: Tensor, number: Tensor) -> Tensor:
    """x (batch, heads, M, ...) at each sequence's chunk `number` (batch,), zeros behind the last ->
    (batch, heads, ...).
    """
    padded = F.pad(x, (0, 0) * (x.dim() - 3) + (0, 1))
    return padded[torch.arange(len(x), device=x.device), :, number]
