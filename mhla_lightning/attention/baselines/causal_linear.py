"""Causal linear attention, in chunks or token by token: MHLA without its mixing.

With a decay it is gated retention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.attention import base
from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.chunks import ChunkedTokens, chunk_tokens, real_places
from mhla_lightning.attention.context import Context, HalfRotary
from mhla_lightning.attention.decay import spread_logits
from mhla_lightning.attention.mhla.fused_causal import fused_causal, pays
from mhla_lightning.attention.mhla.rule import CausalRule
from mhla_lightning.attention.mhla.triton import choice
from mhla_lightning.attention.packing import Packing

NORMALIZERS = ("none", "block")
DECAYS = ("head", "token")


if TYPE_CHECKING:
    from mhla_lightning.attention.mhla.triton.terms import CausalTerms


@dataclass
class LinearState:
    """The sums over all tokens so far.

    Attributes:
        total: (batch, heads, dim_k, dim_v), the decayed sum of k v^T.
        norm: (batch, heads, dim_k, 1), the decayed sum of k; None without a normalizer.
    """

    total: Tensor
    norm: Tensor | None

    @property
    def bytes(self) -> int:
        return self.total.nbytes + (0 if self.norm is None else self.norm.nbytes)

    def reorder(self, indices: Tensor) -> LinearState:
        index = indices.to(self.total.device)
        return LinearState(
            self.total.index_select(0, index), None if self.norm is None else self.norm.index_select(0, index)
        )


class CausalLinear(base.CausalAttention):
    """o_t = sum_{s<=t} (prod_{r=s+1..t} g_r) (phi(q_t) . phi(k_s)) v_s dim_k ** -0.5.

    With a normalizer, o_t is divided by the same sum without v.

    Args:
        chunk_size: tokens computed at once; the result does not depend on it.
        feature_map: see :func:`mhla_lightning.attention.base.feature_map`.
        normalizer: `none` where a norm per head follows (language), else `block`.
        decay: `head` is one learned g per head (RetNet, arXiv 2307.08621). `token` is one g per token and
            head, which the layer computes. None means g = 1.
        eps: added to the normalizer, and by `relu_eps` to the features.
        kernel: `auto`, `triton` or `torch`, see :func:`choice.kernel_setting`; it serves whole rows, prompts
            and single tokens. Prompts that the kernels cannot take run on torch.

    Raises:
        UserError: unknown names.
    """

    example = {"chunk_size": 8}  # noqa: RUF012  (read only)

    def __init__(
        self,
        *,
        heads: int,
        dim_k: int,
        dim_v: int,
        grid: Sequence[int] | None = None,
        chunk_size: int = 64,
        feature_map: str = "relu",
        normalizer: str = "none",
        decay: str | None = None,
        eps: float = 1e-6,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        base.known("normalizer", normalizer, NORMALIZERS)
        base.known("decay", decay, (None, *DECAYS))
        base.positive("chunk_size", chunk_size)
        self.chunk_size, self.normalizer, self.eps = chunk_size, normalizer, eps
        self.kernel = choice.kernel_setting(kernel)
        self.phi = base.feature_map(feature_map, eps)
        self.offset = base.relu_offset(feature_map, eps)
        self.token_decay = decay == "token"
        self.decay = nn.Parameter(spread_logits(heads)) if decay == "head" else None

    def prepare(self, packing: Packing) -> None:
        choice.prepare(self.kernel, packing.chunks(self.chunk_size))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        lower = choice.operands(self.kernel, q, k, v)
        unfit = choice.causal_unfit(self.offset)
        if choice.takes_causal(self.kernel, *lower, context, unfit):
            return self._on_triton(*lower, context)
        with base.full_precision(q):
            return self._in_chunks(q, k, v, context, keep=False)[0]

    def attend_prefill(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, base.State]:
        lower = choice.operands(self.kernel, q, k, v)
        unfit = choice.causal_unfit(self.offset)
        if choice.takes_prefill(self.kernel, *lower, context, self.decay, unfit):
            return self._prefill_on_triton(*lower, context)
        with base.full_precision(q):
            out, state = self._in_chunks(q, k, v, context, keep=True)
        assert state is not None
        return out, state

    def _in_chunks(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, *, keep: bool
    ) -> tuple[Tensor, LinearState | None]:
        """Return the output and, with `keep`, the state after one document per row."""
        dtype, packing = v.dtype, context.packed()
        features = self._features(q, k, v, context.rotary)
        q, k, v, q_norm, k_norm = (x.transpose(1, 2) for x in features)
        log_decay = self._log_decay(q, context.log_decay)
        scale = q.shape[-1] ** -0.5
        plain = not keep and packing is None and log_decay is None and self.normalizer == "none"
        if plain and pays(self.chunk_size, q, k, v):
            weights = q.new_ones(ceil_div(q.shape[2], self.chunk_size))
            out = scale * fused_causal(q, k, v, None, weights, self.chunk_size)
            return out.transpose(1, 2).to(dtype), None
        tokens = chunk_tokens(q, k, v, self.chunk_size, packing, log_decay=log_decay, decay_span="sequence")
        summaries = tokens.summaries()
        out, sums = tokens.read_earlier(scale * summaries, None).add(tokens.read_own(), alpha=scale), None
        if self.normalizer == "block":
            ones = tokens.of_ones(tokens.split(q_norm), tokens.split(k_norm))
            sums = ones.summaries()
            normalizers = ones.read_earlier(scale * sums, None).add(ones.read_own(), alpha=scale) + self.eps
            out = out / normalizers.masked_fill(~real_places(tokens), 1)
        out = tokens.join(out).transpose(1, 2).to(dtype)
        if not keep:
            return out, None
        return out, LinearState(_last(tokens, summaries), None if sums is None else _last(tokens, sums))

    def _features(self, q: Tensor, k: Tensor, v: Tensor, rotary: base.Rotary | None) -> list[Tensor]:
        """Return turned q and k, v, and unturned q and k for the normalizer, in the dtype of sums."""
        q, k, v = (x.to(base.accumulation_dtype(x)) for x in (q, k, v))
        q, k = self.phi(q), self.phi(k)
        return [*((q, k) if rotary is None else (rotary(q), rotary(k))), v, q, k]

    def _log_decay(self, q: Tensor, log_decay: Tensor | None) -> Tensor | None:
        """Return (batch, heads, tokens) for q (batch, heads, tokens, dim_k); None without decay."""
        if self.decay is not None:
            return F.logsigmoid(self.decay.to(q.dtype))[:, None].expand(q.shape[:3])
        if not self.token_decay:
            return None
        return base.demand_decay(log_decay).to(q.dtype).transpose(1, 2)

    def init_state(
        self,
        batch: int,
        *,
        heads: int,
        dim_k: int,
        dim_v: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> LinearState:
        precise = base.accumulation_dtype(torch.empty(0, dtype=dtype))
        total = torch.zeros(batch, heads, dim_k, dim_v, device=device, dtype=precise)
        return LinearState(total, total[..., :1].clone() if self.normalizer == "block" else None)

    def host_needed(self, state: base.State) -> str | None:
        return None

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: base.State, context: Context
    ) -> tuple[Tensor, base.State]:
        assert isinstance(state, LinearState)
        dtype = v.dtype
        with base.full_precision(q):
            if choice.takes_step(self.kernel, q, k, v, context, state.total, self.decay):
                return self._step_on_triton(q, k, v, state, context)
            features = self._features(q, k, v, context.rotary)
            q, k, v, q_norm, k_norm = (x.transpose(1, 2) for x in features)  # (batch, heads, 1, dim)
            log_decay = self._log_decay(q, context.log_decay)
            gain = None if log_decay is None else log_decay.exp().unsqueeze(-1)
            state = replace(state, total=_grown(state.total, k, v, gain))
            out = q @ state.total * q.shape[-1] ** -0.5
            if state.norm is not None:
                norm = _grown(state.norm, k_norm, torch.ones_like(v[..., :1]), gain)
                out = out / (q_norm @ norm * q.shape[-1] ** -0.5 + self.eps)
                state = replace(state, norm=norm)
        return out.transpose(1, 2).to(dtype), state

    def _on_triton(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Compute MHLA of relative form whose one weight is 1."""
        from mhla_lightning.attention.mhla.triton.causal_ops import triton_causal_mhla

        assert self.offset is not None
        rule, terms = self._terms(q, context)
        eps = self.eps if self.normalizer == "block" else None
        return triton_causal_mhla(q, k, v, terms, rule.chunk_size, offset=self.offset, eps=eps)

    def _terms(self, q: Tensor, context: Context) -> tuple[CausalRule, CausalTerms]:
        """Return the rule of that MHLA, and what the kernels read beside q, k and v."""
        from mhla_lightning.attention.mhla.triton.terms import causal_terms

        rule = CausalRule(
            self.chunk_size,
            normalizer=self.normalizer,
            eps=self.eps,
            form="relative",
            decay_span="sequence",
        )
        with base.full_precision(q):
            one = torch.ones(1, 1, device=q.device)
            log_decay = self._kernel_decay(context.log_decay)
            return rule, causal_terms(q, one, rule, context.packed(), log_decay, context.rotary)

    def _prefill_on_triton(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context
    ) -> tuple[Tensor, LinearState]:
        from mhla_lightning.attention.mhla.triton.causal_ops import triton_causal_mhla
        from mhla_lightning.attention.mhla.triton.prefill import sums_of_prompt

        assert self.offset is not None
        rule, terms = self._terms(q, context)
        eps = self.eps if self.normalizer == "block" else None
        out = triton_causal_mhla(q, k, v, terms, rule.chunk_size, offset=self.offset, eps=eps)
        with base.full_precision(q):
            log_decay = self._kernel_decay(context.log_decay)
            if log_decay is not None and log_decay.dim() == 1:
                log_decay = log_decay[:, None].expand(len(q), -1, q.shape[1])
            packing = context.packed()
            state = sums_of_prompt(k, v, terms, rule, packing, log_decay, self.offset)
        return out, LinearState(*state)

    def _step_on_triton(
        self, q: Tensor, k: Tensor, v: Tensor, state: LinearState, context: Context
    ) -> tuple[Tensor, LinearState]:
        from mhla_lightning.attention.mhla.triton.decode import Token, step_sums

        state = LinearState(state.total.contiguous(), None if state.norm is None else state.norm.contiguous())
        if self.offset is None:
            q, k = self.phi(q.float()), self.phi(k.float())
        log_decay = self._kernel_decay(context.log_decay)
        if log_decay is not None:
            log_decay = log_decay[..., 0] if self.token_decay else log_decay[None]
        assert context.rotary is None or isinstance(context.rotary, HalfRotary)
        token = Token(q[:, 0], k[:, 0], v[:, 0], self.offset, context.rotary, log_decay, v.dtype)
        return step_sums(state.total, state.norm, token, self.eps).unsqueeze(1), state

    def _kernel_decay(self, log_decay: Tensor | None) -> Tensor | None:
        """Return (heads,), or (batch, heads, tokens) where tokens differ; None without decay."""
        if self.decay is not None:
            return F.logsigmoid(self.decay.float())
        return base.demand_decay(log_decay).float().transpose(1, 2) if self.token_decay else None

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        chunks = ceil_div(tokens, self.chunk_size)
        places = chunks * self.chunk_size
        decayed = self.token_decay or self.decay is not None
        widths = [dim_v, 1] if self.normalizer == "block" else [dim_v]
        # Per value channel: a summary, a read and the own chunk, and with a decay a matrix between chunks.
        # The scores count once per kind of value.
        each = sum(
            w * (2 * places * dim_k + places * self.chunk_size + (chunks**2 * dim_k if decayed else 0))
            for w in widths
        )
        return 2 * heads * (each + len(widths) * places * self.chunk_size * dim_k)


def _grown(total: Tensor, k: Tensor, v: Tensor, gain: Tensor | None) -> Tensor:
    """Return gain * total + k v^T of one token."""
    return torch.addcmul(total if gain is None else total * gain, k.transpose(-2, -1), v)


def _last(tokens: ChunkedTokens, summaries: Tensor) -> Tensor:
    """Return the decayed sum over all chunks, (batch, heads, dim_k, dim_v)."""
    if tokens.decay is None:
        return summaries.sum(2)
    end = tokens.decay.total.cumsum(-1)
    return ((end[..., -1:] - end).exp()[..., None, None] * summaries).sum(2)
