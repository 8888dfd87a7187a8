"""What the causal kernels read beside q, k and v, from mixing matrix, decay and packing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.chunks import decays, weights
from mhla_lightning.attention.context import HalfRotary, Rotary
from mhla_lightning.attention.mhla.rule import CausalRule
from mhla_lightning.attention.packing import Packing


@dataclass(frozen=True, eq=False)
class CausalTerms:
    """What the kernels read beside q, k and v.

    Attributes:
        weights: (batch or 1, heads or 1, M, M) float32, row = query chunk: mixing, scale, documents and the
            decay between chunks. Entries above the diagonal are not read.
        layout: (batch, M, size + 2) int32, see :attr:`DocumentChunks.layout`; None means chunks in order.
        until: (batch, heads, M, size) float32, log decay from the chunk's first token to each, both
            included; None means no decay.
        after: (batch, heads, M, size) float32, log decay from each token to the chunk's end; None unless the
            decay spans the sequence.
        turns: (2, batch or 1, tokens, dim_k / 2) float32, cosines and sines of the features' turns. Channel d
            turns with channel d + dim_k / 2. None means no rotary.
    """

    weights: Tensor
    layout: Tensor | None = None
    until: Tensor | None = None
    after: Tensor | None = None
    turns: Tensor | None = None

    @property
    def chunks(self) -> int:
        """Chunks of a row, M."""
        return self.weights.shape[-1]


def causal_terms(
    q: Tensor,
    mixing: Tensor,
    rule: CausalRule,
    packing: Packing | None,
    log_decay: Tensor | None,
    rotary: Rotary | None = None,
) -> CausalTerms:
    """Return the terms of a call; gradients flow back to the mixing matrix and the decay.

    Args:
        q: (batch, tokens, heads, dim_k).
        mixing: (blocks, blocks) or (heads, blocks, blocks); of form `relative` (heads or 1, distances).
        rule: the settings.
        packing: of a padded or packed batch; None means one document per row.
        log_decay: (batch, heads, tokens), or (heads,) where all tokens decay alike; None means no decay.
        rotary: a :class:`HalfRotary`; None means none.

    Raises:
        UserError: a document beyond the matrix, without extrapolation.
    """
    (batch, tokens, heads, dim), size = q.shape, rule.chunk_size
    chunks = None if packing is None else packing.chunks(size)
    longest = ceil_div(tokens, size) if chunks is None else chunks.longest
    among, _ = weights(mixing, rule.form, rule.extrapolation, longest=longest, size=size, chunks=chunks)
    among = rule.scale_for(dim) * among.float()
    among = among[(None,) * (4 - among.dim())]
    count = among.shape[-1]
    if chunks is not None:
        own = torch.eye(count, dtype=torch.bool, device=q.device)
        among = among * (chunks.earlier().unsqueeze(1) | own)
    layout = None if chunks is None else chunks.layout
    turns: Tensor | None = None
    if rotary is not None:
        assert isinstance(rotary, HalfRotary)
        turns = torch.stack([rotary.cos, rotary.sin]).squeeze(3).float()
    if log_decay is None:
        return CausalTerms(among, layout, None, None, turns)
    decay = decays(log_decay.float(), tokens, size, chunks, rule.decay_span)
    lead = (batch, heads, count, size)
    until = decay.until.expand(lead)
    if rule.decay_span == "chunk":
        return CausalTerms(among, layout, until, None, turns)
    one = torch.ones(count, count, dtype=torch.bool, device=q.device)
    earlier = one.tril(-1) if chunks is None else chunks.earlier().unsqueeze(1)
    among = among * decay.between().masked_fill(~earlier, 0).exp()
    after = (decay.total[..., None] - decay.until).expand(lead)
    return CausalTerms(among, layout, until, after, turns)
