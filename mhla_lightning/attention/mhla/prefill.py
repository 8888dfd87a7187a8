"""The streaming state after a call in chunks.

It equals the state that `decode` reaches token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.base import sent
from mhla_lightning.attention.chunks import ChunkedTokens, Decay
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
    batch, heads, count, size = tokens.k.shape[:4]
    lengths = [tokens.tokens] * batch if real is None else real.sum(1).tolist()
    kept = KeptChunks.of(lengths, count, tokens.decay, mixing, rule)
    values = kept.summaries(summaries, *_current(kept, tokens))
    norms = None if ones is None or sums is None else kept.summaries(sums, *_current(kept, ones))
    return kept.state(values, norms, heads, mixing, rule)


def _current(kept: KeptChunks, tokens: ChunkedTokens) -> tuple[Tensor, Tensor | None]:
    """Return the sums of the chunk being filled, and as its tokens read it; see `Summaries`."""
    k, v = chunk_of(tokens.k, kept.current), chunk_of(tokens.v, kept.current)
    current = k.transpose(-2, -1) @ v
    fade = kept.fade(tokens.decay)
    if tokens.decay is None or fade is None:
        return current, None
    decayed = (k * fade.exp().unsqueeze(-1)).transpose(-2, -1) @ v
    return (decayed, None) if tokens.decay.span == "sequence" else (current, decayed)


@dataclass(frozen=True)
class KeptChunks:
    """The chunks of a call that the state after it keeps.

    Attributes:
        filled, finished: tokens in the current chunk and finished chunks, of every sequence.
        places: (batch, places) int64, the chunk in each place of the ring; -1 where there is none.
        far: (batch, heads or 1, M), decays of the chunks that are merged and 0 for all others; None where far
            chunks are not read.
        current: (batch,) int64, the number of the chunk being filled.
        since_start: (batch, heads), log decay since it began; None without decay.
        since_end: (batch, heads, places), log decay between each kept chunk and the current one; None unless
            the decay spans the sequence.
    """

    filled: list[int]
    finished: list[int]
    places: Tensor
    far: Tensor | None
    current: Tensor
    since_start: Tensor | None
    since_end: Tensor | None

    @classmethod
    def of(
        cls, lengths: Sequence[int], count: int, decay: Decay | None, mixing: Tensor, rule: CausalRule
    ) -> KeptChunks:
        """Choose the chunks.

        Args:
            lengths: real tokens of every sequence.
            count: chunks of the call, M.
            decay: of the call; None means none.
            mixing: as for :func:`attend_in_chunks`.
            rule: the settings.
        """
        device, reach = mixing.device, Reach(mixing.shape[-1], rule.merges)
        filled, finished = [n % rule.chunk_size for n in lengths], [n // rule.chunk_size for n in lengths]
        current, in_chunk = sent(finished, device), sent(filled, device)
        place = torch.arange(min(max(finished), reach.kept), device=device)
        chunk = current[:, None] - 1 - (current[:, None] - 1 - place) % max(1, reach.kept)
        places = torch.where(chunk >= 0, chunk, -1)
        far = None
        if reach.merges:
            is_far = torch.arange(count, device=device) < current[:, None] - reach.kept
            far = is_far.to(mixing.dtype).unsqueeze(1)
        if decay is None:
            return cls(filled, finished, places, far, current, None, None)
        heads = decay.until.shape[1]
        until = chunk_of(decay.until.expand(len(finished), heads, count, -1), current)
        since_start = (
            F.pad(until, (1, 0)).gather(-1, in_chunk[:, None, None].expand(-1, heads, 1)).squeeze(-1)
        )
        if decay.span == "chunk":
            return cls(filled, finished, places, far, current, since_start, None)
        # At [.., i]: the decay over all chunks before chunk i.
        ends = F.pad(decay.total.expand(len(finished), heads, -1).cumsum(-1), (1, 0))
        before = ends.gather(-1, current[:, None, None].expand(-1, heads, 1))
        since_end = before - ends.gather(-1, (places + 1)[:, None].expand(-1, heads, -1))
        if far is not None:
            far = far * (before - ends[..., 1:]).clamp_max(0).exp()
        return cls(filled, finished, places, far, current, since_start, since_end)

    def fade(self, decay: Decay | None) -> Tensor | None:
        """Return the log decay from each place of the current chunk to its last token.

        It is (batch, heads, size); None without decay. Places after the last token hold no key; the bound
        keeps their factor finite.
        """
        if decay is None or self.since_start is None:
            return None
        until = decay.until.expand(len(self.filled), -1, decay.total.shape[-1], -1)
        return (self.since_start.unsqueeze(-1) - chunk_of(until, self.current)).clamp_max(0)

    def summaries(self, summaries: Tensor, current: Tensor, faded: Tensor | None) -> Summaries:
        """Return the chosen summaries beside the current chunk.

        Args:
            summaries: of all chunks, (batch, heads, M, dim_k, dim_v).
            current, faded: see `Summaries`.
        """
        least, most, places = min(self.finished), max(self.finished), self.places.shape[1]
        if least == most == places:  # place b holds chunk b of every sequence
            ring = summaries[:, :, :places]
        else:
            index = self.places.clamp_min(0)[:, None, :, None, None]
            ring = summaries.gather(2, index.expand(-1, summaries.shape[1], -1, *summaries.shape[3:]))
        if least < places:
            ring = ring * (self.places >= 0)[:, None, :, None, None].to(summaries.dtype)
        far = None
        if self.far is not None:
            flat = (self.far.unsqueeze(-2) @ summaries.flatten(3)).squeeze(-2)
            far = flat.unflatten(-1, summaries.shape[3:])
        return Summaries(ring, far, current, faded, torch.zeros_like(current))

    def state(
        self, values: Summaries, norms: Summaries | None, heads: int, mixing: Tensor, rule: CausalRule
    ) -> MHLAState:
        """Return the state, whose earlier chunks are mixed for the current one."""
        reach = Reach(mixing.shape[-1], rule.merges)
        state = MHLAState(rule, reach, self.filled, self.finished, values, norms)
        if self.since_start is not None and rule.decay_span == "sequence":
            state.since_start, state.since_end = self.since_start.expand(-1, heads), self.since_end
        begun = [b for b, filled in enumerate(self.filled) if filled]
        if begun:
            enter_chunk(state, begun, mixing)
        return state


def chunk_of(x: Tensor, number: Tensor) -> Tensor:
    """Take the chunk `number` (batch,) of every sequence.

    Args:
        x: (batch, heads, M, ...).
        number: (batch,) int64 in 0..M; M gives zeros.

    Returns:
        (batch, heads, ...)
    """
    padded = F.pad(x, (0, 0) * (x.dim() - 3) + (0, 1))
    return padded[torch.arange(len(x), device=x.device), :, number]
