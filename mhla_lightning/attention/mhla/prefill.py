"""The streaming state after a call in chunks.

It equals the state that `decode` reaches token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.chunks import ChunkedTokens
from mhla_lightning.attention.mhla.decode import MHLAState, Reach, Summaries, enter_chunk
from mhla_lightning.attention.mhla.rule import CausalRule


def state_after(
    tokens: ChunkedTokens,
    summaries: Tensor,
    ones: ChunkedTokens | None,
    sums: Tensor | None,
    real: Tensor | None,
    mixing: Tensor,
    rule: CausalRule,
) -> MHLAState:
    """Return the state after a call in chunks.

    Args:
        tokens: q, k and v in chunks.
        summaries: of `tokens`, (batch, heads, M, dim_k, dim_v).
        ones: the chunks that read the normalizer; None without normalizer.
        sums: of `ones`, (batch, heads, M, dim_k, 1); None without normalizer.
        real: (batch, tokens) bool; None means all tokens are real.
        mixing: as for :func:`attend_in_chunks`.
        rule: the settings.
    """
    batch, heads, _, size = tokens.k.shape[:4]
    lengths = [tokens.tokens] * batch if real is None else real.sum(1).tolist()
    filled, finished = [n % size for n in lengths], [n // size for n in lengths]
    reach = Reach(mixing.shape[-1], rule.merges)
    chosen = _Chosen.of(tokens, filled, finished, reach)
    state = MHLAState(rule, reach, filled, finished, chosen.summaries(tokens, summaries))
    if ones is not None and sums is not None:
        state.norms = chosen.summaries(ones, sums)
    if chosen.since_start is not None and rule.decay_span == "sequence":
        state.since_start, state.since_end = chosen.since_start.expand(-1, heads), chosen.since_end
    begun = [b for b in range(batch) if filled[b]]
    if begun:
        enter_chunk(state, begun, mixing)
    return state


@dataclass(frozen=True)
class _Chosen:
    """The chunks of a call that the state after it keeps.

    Attributes:
        places: (batch, places) int64, the chunk in each place of the ring; -1 where there is none.
        far: (batch, heads or 1, M), decays of the chunks that are merged and 0 for all others; None where far
            chunks are not read.
        current: (batch,) int64, the number of the chunk being filled.
        since_start: (batch, heads), log decay since it began; None without decay.
        since_end: (batch, heads, places), log decay between each kept chunk and the current one; None unless
            the decay spans the sequence.
    """

    places: Tensor
    far: Tensor | None
    current: Tensor
    since_start: Tensor | None
    since_end: Tensor | None

    @classmethod
    def of(cls, tokens: ChunkedTokens, filled: list[int], finished: list[int], reach: Reach) -> _Chosen:
        """Choose by the tokens in the current chunk and the finished chunks of every sequence."""
        device, count = tokens.k.device, tokens.k.shape[2]
        current, in_chunk = torch.tensor(finished, device=device), torch.tensor(filled, device=device)
        place = torch.arange(min(max(finished), reach.kept), device=device)
        chunk = current[:, None] - 1 - (current[:, None] - 1 - place) % max(1, reach.kept)
        places = torch.where(chunk >= 0, chunk, -1)
        far = None
        if reach.merges:
            is_far = torch.arange(count, device=device) < current[:, None] - reach.kept
            far = is_far.to(tokens.k.dtype).unsqueeze(1)
        if tokens.decay is None:
            return cls(places, far, current, None, None)
        heads = tokens.decay.until.shape[1]
        until = _chunk(tokens.decay.until.expand(len(finished), heads, count, -1), current)
        since_start = (
            F.pad(until, (1, 0)).gather(-1, in_chunk[:, None, None].expand(-1, heads, 1)).squeeze(-1)
        )
        if tokens.decay.span == "chunk":
            return cls(places, far, current, since_start, None)
        # At [.., i]: the decay over all chunks before chunk i.
        ends = F.pad(tokens.decay.total.expand(len(finished), heads, -1).cumsum(-1), (1, 0))
        before = ends.gather(-1, current[:, None, None].expand(-1, heads, 1))
        since_end = before - ends.gather(-1, (places + 1)[:, None].expand(-1, heads, -1))
        if far is not None:
            far = far * (before - ends[..., 1:]).clamp_max(0).exp()
        return cls(places, far, current, since_start, since_end)

    def summaries(self, tokens: ChunkedTokens, summaries: Tensor) -> Summaries:
        """Return the chosen summaries and the current chunk.

        Args:
            tokens: q, k and v in chunks.
            summaries: of all chunks, (batch, heads, M, dim_k, dim_v).
        """
        index = self.places.clamp_min(0)[:, None, :, None, None].expand(
            -1, summaries.shape[1], -1, *summaries.shape[3:]
        )
        ring = summaries.gather(2, index) * (self.places >= 0)[:, None, :, None, None].to(summaries.dtype)
        far = None
        if self.far is not None:
            flat = (self.far.unsqueeze(-2) @ summaries.flatten(3)).squeeze(-2)
            far = flat.unflatten(-1, summaries.shape[3:])
        k, v = _chunk(tokens.k, self.current), _chunk(tokens.v, self.current)
        current, faded = k.transpose(-2, -1) @ v, None
        if tokens.decay is not None and self.since_start is not None:
            until = _chunk(tokens.decay.until.expand(len(k), -1, tokens.k.shape[2], -1), self.current)
            # Places after the last token hold no key; the bound keeps their factor finite.
            gains = (self.since_start.unsqueeze(-1) - until).clamp_max(0).exp().unsqueeze(-1)
            decayed = (k * gains).transpose(-2, -1) @ v
            current, faded = (decayed, None) if tokens.decay.span == "sequence" else (current, decayed)
        return Summaries(ring, far, current, faded, torch.zeros_like(current))


def _chunk(x: Tensor, number: Tensor) -> Tensor:
    """Take the chunk `number` (batch,) of every sequence.

    Args:
        x: (batch, heads, M, ...).
        number: (batch,) int64 in 0..M; M gives zeros.

    Returns:
        (batch, heads, ...)
    """
    padded = F.pad(x, (0, 0) * (x.dim() - 3) + (0, 1))
    return padded[torch.arange(len(x), device=x.device), :, number]
