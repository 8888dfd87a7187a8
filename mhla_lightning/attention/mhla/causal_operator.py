"""The causal MHLA operator behind the attention contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.attention import base
from mhla_lightning.attention.chunks import EXTRAPOLATIONS, SPANS
from mhla_lightning.attention.decay import spread_logits
from mhla_lightning.attention.mhla.causal import CAUSAL_NORMALIZERS, causal_mhla
from mhla_lightning.attention.mhla.decode import MHLAState, init_state, step_state
from mhla_lightning.attention.mhla.mixing import FORMS, MixingMatrix, mix_options
from mhla_lightning.attention.mhla.window import Window, window_after, window_attention
from mhla_lightning.attention.packing import Packing
from mhla_lightning.errors import UserError, unknown_name

INTRAS = ("plain", "decay", "window")
DECAYS = ("head", "token")


@dataclass
class WindowedState:
    """The state of `intra: window`: mixed summaries of earlier chunks, and the keys and values of two
    chunks.
    """

    far: MHLAState
    near: Window

    @property
    def bytes(self) -> int:
        return self.far.bytes + self.near.bytes

    def reorder(self, indices: Tensor) -> WindowedState:
        return WindowedState(self.far.reorder(indices), self.near.reorder(indices))


class CausalMHLA(base.CausalAttention):
    """Causal Multi-Head Linear Attention (SPEC section 2). Defaults are the paper's; `intra`, `decay` and
    `mix_form: relative` go beyond it.

    Args:
        chunk_size: tokens a chunk.
        max_chunks: rows of the mixing matrix, or distances of the relative form.
        extrapolation: what happens to a document of more chunks: None refuses it, `shift` sees its last
            `max_chunks` chunks.
        normalizer: `none` (the paper's, for language) or `block`.
        mix_form, mix_init, mix_init_options, mix_learnable, mix_clamp, mix_clamp_at: see
        :class:`MixingMatrix`.
        mix_per_head: one mixing a head; None is False for the absolute form and True for the relative one.
        intra: what a token reads of its own chunk. `plain` is m[i, i] q.k; `decay` also takes g^(t-s);
            `window` is exact softmax over the own and the previous chunk, added to what earlier chunks give,
            each with a learned scale a head. None is `decay` where a decay is named, else `plain`.
        decay: `head` is one learned g a head, `token` g = sigmoid(w.x_t + b) of every token. None is `head`
            with intra `decay`.
        decay_span: `chunk` keeps undecayed summaries; with `sequence` the decay also runs across chunks.
        feature_map: see :func:`mhla_lightning.attention.base.feature_map`.
        eps: added to the normalizer and by `relu_eps` to the features.

    Raises:
        UserError: unknown names, sizes below 1, options that do not go together.
    """

    def __init__(
        self,
        *,
        heads: int,
        dim_k: int,
        dim_v: int,
        grid: Sequence[int] | None = None,
        chunk_size: int = 64,
        max_chunks: int = 32,
        extrapolation: str | None = None,
        normalizer: str = "none",
        mix_form: str = "absolute",
        mix_init: str = "causal_uniform",
        mix_init_options: Mapping[str, float] | None = None,
        mix_learnable: bool = True,
        mix_clamp: Sequence[float] | None = (0.0, 1.0),
        mix_clamp_at: str = "step",
        mix_per_head: bool | None = None,
        intra: str | None = None,
        decay: str | None = None,
        decay_span: str = "chunk",
        feature_map: str = "relu",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        base.positive("chunk_size", chunk_size)
        base.positive("max_chunks", max_chunks)
        intra = intra or ("plain" if decay is None else "decay")
        decay = decay or ("head" if intra == "decay" else None)
        _known("extrapolation", extrapolation, EXTRAPOLATIONS)
        _known("normalizer", normalizer, CAUSAL_NORMALIZERS)
        _known("mix_form", mix_form, FORMS)
        _known("intra", intra, INTRAS)
        _known("decay", decay, (None, *DECAYS))
        _known("decay_span", decay_span, SPANS)
        _together(mix_form, extrapolation, intra, decay, decay_span)
        self.chunk_size, self.extrapolation, self.normalizer, self.eps = (
            chunk_size,
            extrapolation,
            normalizer,
            eps,
        )
        self.intra, self.decay_span, self.token_decay = intra, decay_span, decay == "token"
        self.phi = base.feature_map(feature_map, eps)
        per_head = mix_form == "relative" if mix_per_head is None else mix_per_head
        options: dict[str, Any] = mix_options(mix_init_options)
        self.mixing = MixingMatrix(
            max_chunks,
            mix_init,
            mix_learnable,
            causal=True,
            clamp=mix_clamp,
            heads=heads if per_head else None,
            form=mix_form,
            clamp_at=mix_clamp_at,
            **options,
        )
        self.decay = nn.Parameter(spread_logits(heads)) if decay == "head" else None
        self.near_scale = nn.Parameter(torch.ones(heads)) if intra == "window" else None
        self.far_scale = nn.Parameter(torch.ones(heads)) if intra == "window" else None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: Sequence[int] | None = None,
        rotary: base.Rotary | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        packing: Packing | None = None,
        log_decay: Tensor | None = None,
    ) -> Tensor:
        return self._attend(q, k, v, rotary, packing or Packing.of(mask, documents), log_decay, keep=False)[0]

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rotary: base.Rotary | None = None,
        mask: Tensor | None = None,
        packing: Packing | None = None,
        log_decay: Tensor | None = None,
    ) -> tuple[Tensor, base.State]:
        out, state = self._attend(q, k, v, rotary, packing or Packing.of(mask, None), log_decay, keep=True)
        assert state is not None
        return out, state

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: base.Rotary | None,
        packing: Packing | None,
        log_decay: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, base.State | None]:
        dtype = v.dtype
        with base.full_precision(q):
            q, k, v = (x.to(base.accumulation_dtype(x)) for x in (q, k, v))
            far = self._far(q, k, rotary)
            found = causal_mhla(
                far.q.transpose(1, 2),
                far.k.transpose(1, 2),
                v.transpose(1, 2),
                self._mixing(q),
                chunk_size=self.chunk_size,
                normalizer=self.normalizer,
                eps=self.eps,
                form=self.mixing.form,
                extrapolation=self.extrapolation,
                q_norm=far.q_norm.transpose(1, 2),
                k_norm=far.k_norm.transpose(1, 2),
                packing=packing,
                log_decay=self._log_decay(q, log_decay),
                decay_span=self.decay_span,
                own=self.intra != "window",
                return_state=keep,
            )
            out, state = found if isinstance(found, tuple) else (found, None)
            if self.near_scale is None or self.far_scale is None:
                return out.transpose(1, 2).to(dtype), state
            q, k, v = (x.transpose(1, 2) for x in (*_turned(q, k, rotary), v))
            near = window_attention(q, k, v, self.chunk_size, packing)
            out = self.near_scale[:, None, None] * near + self.far_scale[:, None, None] * out
            both = (
                None if state is None else WindowedState(state, window_after(k, v, self.chunk_size, packing))
            )
        return out.transpose(1, 2).to(dtype), both

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: base.State,
        *,
        rotary: base.Rotary | None = None,
        log_decay: Tensor | None = None,
    ) -> tuple[Tensor, base.State]:
        dtype = v.dtype
        with base.full_precision(q):
            q, k, v = (x.to(base.accumulation_dtype(x)) for x in (q, k, v))
            far, decays = self._far(q, k, rotary), self._log_decay(q, log_decay)
            memory = state.far if isinstance(state, WindowedState) else state
            assert isinstance(memory, MHLAState)
            scale = q.shape[-1] ** -0.5
            out = step_state(
                memory,
                far.q[:, 0] * scale,
                far.k[:, 0],
                v[:, 0],
                self._mixing(q),
                eps=self.eps,
                extrapolation=self.extrapolation,
                q_norm=far.q_norm[:, 0] * scale,
                k_norm=far.k_norm[:, 0],
                log_decay=None
                if decays is None
                else decays.expand(q.shape[0], -1)
                if decays.dim() == 1
                else decays[..., 0],
                own=self.intra != "window",
            )
            if (
                isinstance(state, WindowedState)
                and self.near_scale is not None
                and self.far_scale is not None
            ):
                q, k = _turned(q, k, rotary)
                near, window = state.near.step(q[:, 0], k[:, 0], v[:, 0])
                out = self.near_scale[:, None] * near + self.far_scale[:, None] * out
                state = WindowedState(memory, window)
        return out.unsqueeze(1).to(dtype), state

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
            chunk_size=self.chunk_size,
            blocks=self.mixing.blocks,
            merges=self.mixing.form == "relative",
            normalizer=self.normalizer,
            decay_span=self.decay_span if self.token_decay or self.decay is not None else None,
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
        return self.mixing.values().to(like.dtype)

    def _far(self, q: Tensor, k: Tensor, rotary: base.Rotary | None) -> _Features:
        q, k = self.phi(q), self.phi(k)
        return _Features(*_turned(q, k, rotary), q, k)

    def _log_decay(self, q: Tensor, log_decay: Tensor | None) -> Tensor | None:
        """(heads,), or (batch, heads, tokens) where tokens differ; None without decay."""
        if self.decay is not None:
            return F.logsigmoid(self.decay.to(q.dtype))
        return base.demand_decay(log_decay).to(q.dtype).transpose(1, 2) if self.token_decay else None

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        size = self.chunk_size
        chunks = -(-tokens // size)
        places = chunks * size
        own = 0 if self.intra == "window" else places * size
        widths = [dim_v, 1] if self.normalizer == "block" else [dim_v]
        each = sum(w * (2 * places * dim_k + chunks**2 * dim_k + own) + own * dim_k for w in widths)
        window = 2 * places * size * (dim_k + dim_v) if self.intra == "window" else 0
        return 2 * heads * (each + window)


@dataclass(frozen=True)
class _Features:
    """Turned features (batch, tokens, heads, dim_k), and the unturned ones for the normalizer."""

    q: Tensor
    k: Tensor
    q_norm: Tensor
    k_norm: Tensor


def _turned(q: Tensor, k: Tensor, rotary: base.Rotary | None) -> tuple[Tensor, Tensor]:
    return (q, k) if rotary is None else (rotary(q), rotary(k))


def _known(key: str, value: str | None, names: Sequence[str | None]) -> None:
    if value not in names:
        raise UserError(unknown_name(key, value, ["null" if name is None else name for name in names]))


def _together(
    mix_form: str, extrapolation: str | None, intra: str, decay: str | None, decay_span: str
) -> None:
    """Refuses options of which one would do nothing. Raises UserError."""
    if mix_form == "relative" and extrapolation is not None:
        raise UserError(
            f"mix_form 'relative' serves any number of chunks; extrapolation '{extrapolation}' would "
            "do nothing, leave it out"
        )
    if intra == "plain" and decay is not None:
        raise UserError(f"decay '{decay}' needs intra 'decay'; intra is 'plain'")
    if intra == "window" and (decay is None) != (decay_span == "chunk"):
        raise UserError(
            "with intra 'window' a decay acts across chunks only: give both decay and decay_span "
            "'sequence', or neither"
        )
    if decay is None and decay_span == "sequence":
        raise UserError("decay_span 'sequence' needs a decay: head or token")
