"""The causal MHLA operator behind the attention contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.arguments.checked import CheckedOptions
from mhla_lightning.attention import base
from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.chunks import EXTRAPOLATIONS, SPANS, check_reach
from mhla_lightning.attention.context import Context, HalfRotary, Rotary
from mhla_lightning.attention.decay import spread_logits
from mhla_lightning.attention.mhla.causal import attend_in_chunks, prefill_in_chunks
from mhla_lightning.attention.mhla.decode import MHLAState, init_state, step_state
from mhla_lightning.attention.mhla.mixing import FORMS, MixingInit, MixingMatrix, keys_of_an_entry
from mhla_lightning.attention.mhla.rule import CAUSAL_NORMALIZERS, CausalFeatures, CausalRule
from mhla_lightning.attention.mhla.triton import choice
from mhla_lightning.attention.mhla.window import Window, window_after, window_attention
from mhla_lightning.attention.packing import Packing
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.attention.mhla.triton.terms import CausalTerms

INTRAS = ("plain", "decay", "window")
DECAYS = ("head", "token")


@dataclass
class WindowedState:
    """The state of `intra: window`.

    Attributes:
        far: mixed summaries of earlier chunks.
        near: keys and values of two chunks.
    """

    far: MHLAState
    near: Window

    @property
    def bytes(self) -> int:
        return self.far.bytes + self.near.bytes

    def reorder(self, indices: Tensor) -> WindowedState:
        return WindowedState(self.far.reorder(indices), self.near.reorder(indices))


@dataclass(frozen=True)
class CausalMHLAOptions(CheckedOptions):
    """Keys of a causal `mhla` entry that belong to the operator.

    Defaults are the paper's; `intra`, `decay` and `mix_form: relative` go beyond it.

    Args:
        chunk_size: tokens per chunk.
        max_chunks: rows of the mixing matrix, or distances of the relative form.
        extrapolation: for documents of more chunks. None refuses them; `shift` sees their last `max_chunks`
            chunks.
        normalizer: `none` (the paper's, for language) or `block`.
        mix_form, mix_init, mix_learnable, mix_clamp, mix_clamp_at: `form`, `init`, `learnable`, `clamp` and
            `clamp_at` of :class:`MixingMatrix`.
        mix_init_options: see :class:`MixingInit`; None means its defaults.
        mix_per_head: one mixing per head; None means False for the absolute form, True for the relative one.
        intra: how a token reads its own chunk. `plain` weighs q.k by m[i, i]; `decay` also by g^(t-s).
            `window` adds exact softmax over the own and the previous chunk to the read of earlier chunks,
            each with a learned scale per head. None means `decay` where a decay is named, else `plain`.
        decay: `head` is one learned g per head, `token` g = sigmoid(w.x_t + b) of every token. None means
            `head` with intra `decay`, else no decay.
        decay_span: `chunk` keeps summaries undecayed; `sequence` also decays across chunks.
        feature_map: see :func:`mhla_lightning.attention.base.feature_map`.
        eps: added to the normalizer, and by `relu_eps` to the features.
        kernel: `auto`, `triton` or `torch`, see :func:`choice.kernel_setting`; it serves whole rows, prompts
            and single tokens. Prompts that the kernels cannot take run on torch.
    """

    chunk_size: int = 64
    max_chunks: int = 32
    extrapolation: str | None = None
    normalizer: str = "none"
    mix_form: str = "absolute"
    mix_init: str = "causal_uniform"
    mix_init_options: Mapping[str, float] | None = None
    mix_learnable: bool = True
    mix_clamp: Sequence[float] | None = (0.0, 1.0)
    mix_clamp_at: str = "step"
    mix_per_head: bool | None = None
    intra: str | None = None
    decay: str | None = None
    decay_span: str = "chunk"
    feature_map: str = "relu"
    eps: float = 1e-6
    kernel: str = "auto"

    def checked(self) -> CausalMHLAOptions:
        """Return the options with the defaults of `intra` and `decay` filled in.

        Raises:
            UserError: unknown names, sizes below 1, or options that do not go together.
        """
        base.positive("chunk_size", self.chunk_size)
        base.positive("max_chunks", self.max_chunks)
        intra = self.intra or ("plain" if self.decay is None else "decay")
        decay = self.decay or ("head" if intra == "decay" else None)
        base.known("extrapolation", self.extrapolation, EXTRAPOLATIONS)
        base.known("normalizer", self.normalizer, CAUSAL_NORMALIZERS)
        base.known("mix_form", self.mix_form, FORMS)
        base.known("intra", intra, INTRAS)
        base.known("decay", decay, (None, *DECAYS))
        base.known("decay_span", self.decay_span, SPANS)
        options = replace(self, intra=intra, decay=decay)
        _together(options)
        return options


class CausalMHLA(base.CausalAttention):
    """Causal Multi-Head Linear Attention (SPEC section 2).

    Args:
        heads: number of heads.
        dim_k, dim_v: channels per head of q and k, and of v.
        grid: ignored; there is one axis.
        options: chunks, mixing matrix, decay and feature map.

    Raises:
        UserError: unknown names, sizes below 1, options that do not go together.
    """

    options_type = CausalMHLAOptions
    example = {"chunk_size": 8, "max_chunks": 4, "extrapolation": "shift"}  # noqa: RUF012  (read only)

    def __init__(
        self, *, heads: int, dim_k: int, dim_v: int, grid: Sequence[int] | None, options: CausalMHLAOptions
    ) -> None:
        super().__init__()
        options = options.checked()
        self.intra, self.token_decay = options.intra, options.decay == "token"
        self.rule = CausalRule(
            chunk_size=options.chunk_size,
            normalizer=options.normalizer,
            eps=options.eps,
            form=options.mix_form,
            extrapolation=options.extrapolation,
            decay_span=options.decay_span,
            own_chunk=options.intra != "window",
        )
        self.phi = base.feature_map(options.feature_map, options.eps)
        self.offset = base.relu_offset(options.feature_map, options.eps)
        self.kernel = choice.kernel_setting(options.kernel)
        per_head = self.rule.merges if options.mix_per_head is None else options.mix_per_head
        init_options = MixingInit.of(options.mix_init_options)
        with keys_of_an_entry():
            self.mixing = MixingMatrix(
                options.max_chunks,
                options.mix_init,
                options.mix_learnable,
                causal=True,
                clamp=options.mix_clamp,
                heads=heads if per_head else None,
                form=options.mix_form,
                clamp_at=options.mix_clamp_at,
                init_options=init_options,
            )
        self.decay = nn.Parameter(spread_logits(heads)) if options.decay == "head" else None
        self.near_scale = nn.Parameter(torch.ones(heads)) if options.intra == "window" else None
        self.far_scale = nn.Parameter(torch.ones(heads)) if options.intra == "window" else None

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk."""
        return self.rule.chunk_size

    def partition(self, grid: Sequence[int]) -> tuple[int, ...]:
        return (self.chunk_size,)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        lower = choice.operands(self.kernel, q, k, v)
        if choice.takes_causal(self.kernel, *lower, context, self._unfit()):
            return self._on_triton(*lower, context)
        return self._in_chunks(q, k, v, context, keep=False)[0]

    def attend_prefill(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, base.State]:
        lower = choice.operands(self.kernel, q, k, v)
        if choice.takes_prefill(self.kernel, *lower, context, self.mixing.weight, self._unfit()):
            return self._prefill_on_triton(*lower, context)
        out, state = self._in_chunks(q, k, v, context, keep=True)
        assert state is not None
        return out, state

    def _unfit(self) -> str | None:
        """Return what of this operator Triton kernels over whole rows cannot do."""
        if self.intra == "window":
            return "it takes no intra 'window'"
        return choice.causal_unfit(self.offset)

    def prepare(self, packing: Packing) -> None:
        choice.prepare(self.kernel, packing.chunks(self.chunk_size))

    def _on_triton(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        from mhla_lightning.attention.mhla.triton.causal_ops import triton_causal_mhla

        assert self.offset is not None
        rule, (terms, _, _) = self.rule, self._terms(q, context)
        eps = rule.eps if rule.normalizer == "block" else None
        return triton_causal_mhla(q, k, v, terms, rule.chunk_size, offset=self.offset, eps=eps)

    def _terms(self, q: Tensor, context: Context) -> tuple[CausalTerms, Tensor, Tensor | None]:
        """Return what the kernels read beside q, k and v; then the mixing and the decay of it."""
        from mhla_lightning.attention.mhla.triton.terms import causal_terms

        with base.full_precision(q):
            wide = torch.empty(0, device=q.device)  # mixing and decay are computed in float32
            log_decay, mixing = self._log_decay(wide, context.log_decay), self._mixing(wide)
            terms = causal_terms(q, mixing, self.rule, context.packed(), log_decay, context.rotary)
        return terms, mixing, log_decay

    def _prefill_on_triton(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context
    ) -> tuple[Tensor, base.State]:
        from mhla_lightning.attention.mhla.triton.causal_ops import triton_causal_mhla
        from mhla_lightning.attention.mhla.triton.prefill import state_of_prompt

        assert self.offset is not None
        rule, (terms, mixing, log_decay) = self.rule, self._terms(q, context)
        eps = rule.eps if rule.normalizer == "block" else None
        out = triton_causal_mhla(q, k, v, terms, rule.chunk_size, offset=self.offset, eps=eps)
        with base.full_precision(q):
            packing = context.packed()
            state = state_of_prompt(k, v, terms, mixing, rule, packing, log_decay, self.offset)
        return out, state

    def _in_chunks(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, *, keep: bool
    ) -> tuple[Tensor, base.State | None]:
        """Return the output and, with `keep`, the state after one document per row."""
        dtype, packing, state = v.dtype, context.packed(), None
        with base.full_precision(q):
            q, k, v = (x.to(base.accumulation_dtype(x)) for x in (q, k, v))
            q_norm, k_norm = self.phi(q), self.phi(k)
            q_far, k_far = _turned(q_norm, k_norm, context.rotary)
            features = CausalFeatures(
                q_far.transpose(1, 2),
                k_far.transpose(1, 2),
                v.transpose(1, 2),
                q_norm.transpose(1, 2),
                k_norm.transpose(1, 2),
                self._log_decay(q, context.log_decay),
            )
            if keep:
                out, state = prefill_in_chunks(features, self._mixing(q), self.rule, packing)
            else:
                out = attend_in_chunks(features, self._mixing(q), self.rule, packing)
            if self.near_scale is None or self.far_scale is None:
                return out.transpose(1, 2).to(dtype), state
            q, k, v = (x.transpose(1, 2) for x in (*_turned(q, k, context.rotary), v))
            near = window_attention(q, k, v, self.chunk_size, packing)
            out = self.near_scale[:, None, None] * near + self.far_scale[:, None, None] * out
            out = out.transpose(1, 2).to(dtype)
            if state is None:
                return out, None
            return out, WindowedState(state, window_after(k, v, self.chunk_size, packing))

    def fix_state(self, state: base.State, tokens: int) -> None:
        if isinstance(state, MHLAState):
            state.leave_host(tokens)

    def host_needed(self, state: base.State) -> str | None:
        if not isinstance(state, MHLAState):
            return "intra 'window' counts tokens on the host"
        return (
            None if state.tokens is not None else "its single tokens run on torch, which counts on the host"
        )

    def check_length(self, tokens: int) -> None:
        rule = self.rule
        if not rule.merges:
            chunks = ceil_div(tokens, rule.chunk_size)
            check_reach(chunks, self.mixing.blocks, rule.chunk_size, rule.extrapolation)

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: base.State, context: Context
    ) -> tuple[Tensor, base.State]:
        memory = state.far if isinstance(state, WindowedState) else state
        assert isinstance(memory, MHLAState)
        with base.full_precision(q):
            if choice.takes_step(self.kernel, q, k, v, context, memory.values.current, self.mixing.weight):
                out = self._step_on_triton(q, k, v, memory, context)
            else:
                out = self._step_on_torch(q, k, v, memory, context)
            if isinstance(state, WindowedState):
                assert self.near_scale is not None
                assert self.far_scale is not None
                precise = (
                    x.to(base.accumulation_dtype(x))[:, 0] for x in (*_turned(q, k, context.rotary), v)
                )
                near, window = state.near.step(*precise)
                out = self.near_scale[:, None] * near + self.far_scale[:, None] * out
                state = WindowedState(memory, window)
        return out.unsqueeze(1).to(v.dtype), state

    def _step_on_torch(self, q: Tensor, k: Tensor, v: Tensor, memory: MHLAState, context: Context) -> Tensor:
        """Return (batch, heads, dim_v) in the dtype of sums."""
        q, k, v = (x.to(base.accumulation_dtype(x)) for x in (q, k, v))
        q_norm, k_norm = self.phi(q), self.phi(k)
        q_far, k_far = _turned(q_norm, k_norm, context.rotary)
        log_decay = self._step_decay(q, context.log_decay)
        if log_decay is not None:
            log_decay = log_decay.expand(len(q), -1)
        token = CausalFeatures(q_far[:, 0], k_far[:, 0], v[:, 0], q_norm[:, 0], k_norm[:, 0], log_decay)
        return step_state(memory, token, self._mixing(q))

    def _step_on_triton(self, q: Tensor, k: Tensor, v: Tensor, memory: MHLAState, context: Context) -> Tensor:
        """Return (batch, heads, dim_v), of `plain` and `decay` in v's dtype."""
        from mhla_lightning.attention.mhla.triton.decode import Token, step_chunks

        wide = memory.values.current
        if self.offset is None:
            q, k = self.phi(q.float()), self.phi(k.float())
        dtype = torch.float32 if self.intra == "window" else v.dtype
        log_decay = self._step_decay(wide, context.log_decay)
        assert context.rotary is None or isinstance(context.rotary, HalfRotary)
        token = Token(q[:, 0], k[:, 0], v[:, 0], self.offset, context.rotary, log_decay, dtype)
        return step_chunks(memory, token, self._mixing(wide))

    def init_state(
        self,
        batch: int,
        *,
        heads: int,
        dim_k: int,
        dim_v: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> base.State:
        dtype = base.accumulation_dtype(torch.empty(0, dtype=dtype))
        far = init_state(
            batch,
            heads=heads,
            dim_k=dim_k,
            dim_v=dim_v,
            blocks=self.mixing.blocks,
            rule=self.rule,
            decays=self.token_decay or self.decay is not None,
            device=device,
            dtype=dtype,
        )
        if self.intra != "window":
            return far
        keys, values = (
            torch.zeros(batch, heads, 2 * self.chunk_size, dim, device=device, dtype=dtype)
            for dim in (dim_k, dim_v)
        )
        return WindowedState(far, Window(keys, values, [0] * batch))

    def _mixing(self, like: Tensor) -> Tensor:
        return self.mixing().to(like.dtype)

    def _log_decay(self, q: Tensor, log_decay: Tensor | None) -> Tensor | None:
        """Return (heads,), or (batch, heads, tokens) where tokens differ; None without decay."""
        if self.decay is not None:
            return F.logsigmoid(self.decay.to(q.dtype))
        return base.demand_decay(log_decay).to(q.dtype).transpose(1, 2) if self.token_decay else None

    def _step_decay(self, q: Tensor, log_decay: Tensor | None) -> Tensor | None:
        """Return (batch or 1, heads) of a single token; None without decay."""
        found = self._log_decay(q, log_decay)
        return None if found is None else found[None] if found.dim() == 1 else found[..., 0]

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        size = self.chunk_size
        chunks = ceil_div(tokens, size)
        places = chunks * size
        own = 0 if self.intra == "window" else places * size
        widths = [dim_v, 1] if self.rule.normalizer == "block" else [dim_v]
        each = sum(w * (2 * places * dim_k + chunks**2 * dim_k + own) + own * dim_k for w in widths)
        window = 2 * places * size * (dim_k + dim_v) if self.intra == "window" else 0
        return 2 * heads * (each + window)


def _turned(q: Tensor, k: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    return (q, k) if rotary is None else (rotary(q), rotary(k))


def _together(options: CausalMHLAOptions) -> None:
    """Refuse options of which one would have no effect.

    Raises:
        UserError: such a pair.
    """
    if options.mix_form == "relative" and options.extrapolation is not None:
        raise UserError(
            "extrapolation",
            f"'{options.extrapolation}' has no effect with mix_form 'relative', which serves any number of "
            "chunks; omit it",
        )
    if options.intra == "plain" and options.decay is not None:
        raise UserError("decay", f"'{options.decay}' needs intra 'decay'; found intra 'plain'")
    across = options.decay_span == "sequence"
    if options.intra == "window" and (options.decay is not None) != across:
        raise UserError(
            "intra",
            "with 'window' a decay acts across chunks only; give both a `decay` and decay_span 'sequence', "
            "or neither",
        )
    if options.decay is None and across:
        raise UserError("decay_span", "'sequence' needs a `decay`: 'head' or 'token'")
