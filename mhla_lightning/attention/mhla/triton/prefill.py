"""The state after a prompt, whose sums come from the kernel that sums up chunks.

`causal.py` computes the outputs of the prompt. One more kernel reads k and v for the sums of all chunks in
float32. With a decay another one sums the chunk being filled, whose decay ends at its last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mhla_lightning.attention.chunks import Decay, decays
from mhla_lightning.attention.mhla.decode import MHLAState
from mhla_lightning.attention.mhla.prefill import KeptChunks, chunk_of
from mhla_lightning.attention.mhla.rule import CausalRule
from mhla_lightning.attention.mhla.triton.causal import CausalPlan, chunk_sums
from mhla_lightning.attention.mhla.triton.device import contiguous_channels
from mhla_lightning.attention.mhla.triton.terms import CausalTerms
from mhla_lightning.attention.packing import Packing


def state_of_prompt(
    k: Tensor,
    v: Tensor,
    terms: CausalTerms,
    mixing: Tensor,
    rule: CausalRule,
    packing: Packing | None,
    log_decay: Tensor | None,
    offset: float,
) -> MHLAState:
    """Return the state after the last real token of each row.

    Args:
        k: (batch, tokens, heads, dim_k), before the feature map relu(x) + offset.
        v: (batch, tokens, heads, dim_v).
        terms: of the call.
        mixing: as for `causal_terms`.
        rule: the settings.
        packing: of a padded batch; None means that every token is real.
        log_decay: as for `causal_terms`.
        offset: of the feature map.
    """
    k, v = contiguous_channels(k), contiguous_channels(v)
    (batch, tokens, heads, _), size = k.shape, rule.chunk_size
    chunks = None if packing is None else packing.chunks(size)
    decay = None if log_decay is None else decays(log_decay.float(), tokens, size, chunks, rule.decay_span)
    lengths = [tokens] * batch if packing is None else packing.real.sum(1).tolist()
    kept = KeptChunks.of(lengths, terms.chunks, decay, mixing, rule)
    plan = CausalPlan(size, True, offset, rule.eps if rule.normalizer == "block" else None)
    sums, z = chunk_sums(k, v, terms.after, terms, plan, exact=True)
    found = [sums] if plan.eps is None else [sums, z.unsqueeze(-1)]
    current, faded = [chunk_of(x, kept.current) for x in found], _faded(k, v, terms, plan, kept, decay)
    if rule.decay_span == "sequence" and faded:
        current, faded = faded, []
    parts = [kept.summaries(x, current[i], faded[i] if faded else None) for i, x in enumerate(found)]
    return kept.state(parts[0], parts[1] if len(parts) > 1 else None, heads, mixing, rule)


def sums_of_prompt(
    k: Tensor,
    v: Tensor,
    terms: CausalTerms,
    rule: CausalRule,
    packing: Packing | None,
    log_decay: Tensor | None,
    offset: float,
) -> tuple[Tensor, Tensor | None]:
    """Return the sums of linear attention after the last real token of each row.

    Args:
        k, v, terms, rule, packing, offset: see :func:`state_of_prompt`.
        log_decay: (batch, heads, tokens), which spans the sequence; None means no decay.

    Returns:
        (batch, heads, dim_k, dim_v), and (batch, heads, dim_k, 1) where there is a normalizer.
    """
    k, v = contiguous_channels(k), contiguous_channels(v)
    plan = CausalPlan(rule.chunk_size, True, offset, rule.eps if rule.normalizer == "block" else None)
    fade, between = None, None
    if log_decay is not None:
        chunks = None if packing is None else packing.chunks(plan.size)
        decay = decays(log_decay.float(), k.shape[1], plan.size, chunks, "sequence")
        lead = (len(k), k.shape[2], terms.chunks, plan.size)
        fade = (decay.total[..., None] - decay.until).expand(lead).contiguous()
        end = decay.total.cumsum(-1)
        between = (end[..., -1:] - end).exp()[..., None, None]
    sums, z = chunk_sums(k, v, fade, terms, plan, exact=True)
    found = [
        x if between is None else between * x for x in (sums, z.unsqueeze(-1))[: 1 + (plan.eps is not None)]
    ]
    total, *norm = (x.sum(2) for x in found)
    return total, norm[0] if norm else None


def _faded(
    k: Tensor, v: Tensor, terms: CausalTerms, plan: CausalPlan, kept: KeptChunks, decay: Decay | None
) -> list[Tensor]:
    """Return the sums of the current chunk, decayed to its last token; empty without decay."""
    fade = kept.fade(decay)
    if fade is None:
        return []
    layout = _layout_of(kept.current, kept.filled, terms, plan.size, k.shape[1])
    one = replace(terms, weights=terms.weights.new_empty((1,) * 4), layout=layout)
    lead = (len(k), k.shape[2], 1, plan.size)
    fade = fade.unsqueeze(2).expand(lead).contiguous()
    sums, z = chunk_sums(k, v, fade, one, plan, exact=True)
    return [sums[:, :, 0]] if plan.eps is None else [sums[:, :, 0], z[:, :, 0].unsqueeze(-1)]


def _layout_of(current: Tensor, filled: Sequence[int], terms: CausalTerms, size: int, tokens: int) -> Tensor:
    """Return the places of the current chunk, (batch, 1, size + 2) int32; -1 without a token."""
    if terms.layout is not None:
        empty = terms.layout.new_full((len(current), 1, size + 2), -1)
        rows = torch.arange(len(current), device=current.device)
        return torch.cat([terms.layout, empty], 1)[rows, current][:, None].contiguous()
    place = current[:, None] * size + torch.arange(size + 2, device=current.device)
    return torch.where(place < tokens, place, -1).to(torch.int32)[:, None].contiguous()
