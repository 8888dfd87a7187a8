"""Causal operators written out with their full attention matrix, one document at a time. Slow, and meant
to be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention import CausalAttention
from mhla_lightning.attention.baselines.causal_deltanet import DeltaNet
from mhla_lightning.attention.baselines.causal_linear import CausalLinear
from mhla_lightning.attention.baselines.causal_softmax import CausalSoftmax
from mhla_lightning.attention.mhla import CausalMHLA


def dense(
    operator: CausalAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """(batch, tokens, heads, dim) of one document a row -> (batch, tokens, heads, dim_v)."""
    if isinstance(operator, DeltaNet):
        assert beta is not None
        return _delta(q, k, v, beta)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    decay = None if log_decay is None else log_decay.transpose(1, 2)
    forms: dict[type[CausalAttention], Callable[..., Tensor]] = {
        CausalSoftmax: _softmax,
        CausalLinear: _linear,
        CausalMHLA: _mhla,
    }
    return forms[type(operator)](operator, q, k, v, decay).transpose(1, 2)


def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """arXiv 2406.06484, Eq. 5: the state is multiplied by a Householder-like matrix of every token."""
    q, k = F.silu(q), F.silu(k)
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    eye, outs = torch.eye(q.shape[-1], dtype=q.dtype), []
    state = q.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[3])
    for key, value, query, rate in zip(k.unbind(1), v.unbind(1), q.unbind(1), beta.unbind(1), strict=True):
        rate = rate[..., None, None]
        state = (eye - rate * key[..., :, None] * key[..., None, :]) @ state
        state = state + rate * key[..., :, None] * value[..., None, :]
        outs.append((query[..., None, :] @ state).squeeze(-2) / math.sqrt(q.shape[-1]))
    return torch.stack(outs, 1)


def full_mixing(weight: Tensor, form: str, extrapolation: str | None, count: int) -> Tensor:
    """The (heads or 1, count, count) matrix that DESIGN section 2 describes, entry by entry."""
    blocks = weight.shape[-1]
    rows = weight.view(-1, *weight.shape[-(1 if form == "relative" else 2) :])
    full = torch.zeros(len(rows), count, count, dtype=weight.dtype)
    columns = []
    for i in range(count):
        for b in range(i + 1):
            if form == "relative":
                columns.append((i, b, rows[:, min(i - b, blocks - 1)]))
            elif i < blocks:
                columns.append((i, b, rows[:, i, b]))
            elif extrapolation == "shift" and i - b < blocks:
                columns.append((i, b, rows[:, blocks - 1, blocks - 1 - (i - b)]))
    at = torch.tensor([(i, b) for i, b, _ in columns])
    return full.index_put(
        (torch.arange(len(rows))[:, None], at[:, 0], at[:, 1]), torch.stack([w for _, _, w in columns], dim=1)
    )


def _softmax(operator: CausalSoftmax, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


def _decays(g: Tensor) -> Tensor:
    """g (batch or 1, heads, tokens), logs -> product of the decays of tokens s+1 to t at [t, s], 0 for s >
    t.
    """
    until = g.cumsum(-1)
    later = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool).triu(1)
    return (until[..., :, None] - until[..., None, :]).masked_fill(later, -math.inf).exp()


def _log_decay(operator: Any, q: Tensor, log_decay: Tensor | None) -> Tensor | None:
    return (
        log_decay
        if operator.decay is None
        else F.logsigmoid(operator.decay)[None, :, None].expand(1, -1, q.shape[2])
    )


def _linear(operator: CausalLinear, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    decay = _log_decay(operator, q, log_decay)
    attention = (operator.phi(q) @ operator.phi(k).mT / math.sqrt(q.shape[-1])).tril()
    attention = attention if decay is None else attention * _decays(decay)
    out = attention @ v
    return out / (attention.sum(-1, keepdim=True) + operator.eps) if operator.normalizer == "block" else out


def _mhla(operator: CausalMHLA, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    tokens, rule = q.shape[2], operator.rule
    chunk = torch.arange(tokens) // rule.chunk_size
    mixing = full_mixing(operator.mixing.weight, rule.form, rule.extrapolation, int(chunk[-1]) + 1)
    attention = (
        mixing[:, chunk[:, None], chunk] * (operator.phi(q) @ operator.phi(k).mT) / math.sqrt(q.shape[-1])
    )
    decay = _log_decay(operator, q, log_decay)
    same = chunk[:, None] == chunk
    if decay is not None:
        attention = attention * (
            _decays(decay) if rule.decay_span == "sequence" else torch.where(same, _decays(decay), 1)
        )
    attention = (attention.masked_fill(same, 0) if operator.intra == "window" else attention).tril()
    out = attention @ v
    if rule.normalizer == "block":
        out = out / (attention.sum(-1, keepdim=True) + rule.eps)
    if operator.intra != "window":
        return out
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    seen = (chunk[:, None] - chunk <= 1) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    near = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
    near_scale, far_scale = (
        cast(Tensor, x)[:, None, None] for x in (operator.near_scale, operator.far_scale)
    )
    return near_scale * near + far_scale * out
