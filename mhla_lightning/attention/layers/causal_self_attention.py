"""Causal self-attention around any operator: projections, short convolution, decay, output norm and gate
(SPEC 5.1).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.attention.base import CausalAttention, Rotary, State, accumulation_dtype
from mhla_lightning.attention.baselines.causal_conv import ShortConvolution
from mhla_lightning.attention.decay import spread_logits
from mhla_lightning.attention.entry import Entry, build_attention
from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.attention.packing import Packing
from mhla_lightning.errors import UserError


@dataclass(frozen=True)
class LayerState:
    """What one layer remembers of the tokens so far.

    operator: the operator's own state.
    inputs: of each short convolution (q, k, v) its last inputs, (batch, width - 1, channels); empty without
        convolutions.
    """

    operator: State
    inputs: tuple[Tensor, ...] = ()

    @property
    def bytes(self) -> int:
        return self.operator.bytes + sum(x.nbytes for x in self.inputs)

    def reorder(self, indices: Tensor) -> LayerState:
        """The sequences `indices` (int64, repeats allowed) as a new batch."""
        return LayerState(
            self.operator.reorder(indices),
            tuple(x.index_select(0, indices.to(x.device)) for x in self.inputs),
        )


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with any operator of CAUSAL_ATTENTION.

    Args:
        dim: channels C.
        attention: operator name, or a mapping of ``name`` and the operator's own options.
        context: tokens of a training row; operators whose size depends on it learn it here.
        heads: channel heads.
        kv_heads: heads of k and v, shared by groups of query heads; None is `heads`.
        expand_k, expand_v: channels of q and of v over all heads, as a share of dim.
        gate: multiplies the output by SiLU(x W_g).
        out_norm: RMSNorm per head on the operator's output.
        qk_norm: RMSNorm of q and k over all their channels.
        qkv_bias: bias of the q, k and v projections.
        short_conv: width of a convolution of q, k and v over earlier tokens (4 in the models that have one);
            0 is none.
        rotary: turns q and k by their positions; False has no positions but the operator's own.
        dropout: after the output projection.
        norm_eps: of all norms here.

    Raises:
        UserError: unknown names, heads that do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        *,
        attention: Entry = "mhla",
        context: int = 2048,
        heads: int = 4,
        kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate: bool = True,
        out_norm: bool = True,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        short_conv: int = 0,
        rotary: bool = True,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        self.dim_k, self.dim_v = (
            _head_dim(dim, expand_k, heads, "expand_k"),
            _head_dim(dim, expand_v, heads, "expand_v"),
        )
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise UserError(f"kv_heads is {self.kv_heads} and heads {heads}; kv_heads must divide heads")
        if rotary and self.dim_k % 2:
            raise UserError(
                f"rotary turns pairs of channels, and a head of {self.dim_k} (dim {dim}, expand_k "
                f"{expand_k}, heads {heads}) is odd"
            )
        self.rotary = rotary
        widths = {"q": heads * self.dim_k, "k": self.kv_heads * self.dim_k, "v": self.kv_heads * self.dim_v}
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(dim, width, bias=qkv_bias) for width in widths.values()
        )
        self.convs = nn.ModuleDict(
            {name: ShortConvolution(width, short_conv) for name, width in widths.items()}
            if short_conv
            else {}
        )
        self.q_norm = RMSNorm(widths["q"], eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(widths["k"], eps=norm_eps) if qk_norm else nn.Identity()
        operator = build_attention(
            attention, heads=heads, dim_k=self.dim_k, dim_v=self.dim_v, grid=(context,), causal=True
        )
        self.attention = cast(CausalAttention, operator)
        by_channel = self.attention.channel_decay
        self.decay_low = nn.Linear(dim, _DECAY_RANK, bias=False) if by_channel else nn.Identity()
        decay_in, decays = (_DECAY_RANK, heads * self.dim_k) if by_channel else (dim, heads)
        self.decay = nn.Linear(decay_in, decays) if self.attention.token_decay else None
        self.beta = nn.Linear(dim, heads, bias=False) if self.attention.token_beta else None
        self.out_norm = RMSNorm(self.dim_v, eps=norm_eps) if out_norm else nn.Identity()
        self.g_proj = nn.Linear(dim, heads * self.dim_v, bias=False) if gate else None
        self.o_proj = nn.Linear(heads * self.dim_v, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.reset_decay()

    @torch.no_grad()
    def reset_decay(self) -> None:
        """At the start every head (every channel of a head, where each has a decay) forgets at a rate of
        its own, whatever the token.
        """
        if self.decay is not None:
            nn.init.zeros_(self.decay.weight)
            self.decay.bias.copy_(
                spread_logits(self.dim_k).repeat(self.heads)
                if self.attention.channel_decay
                else spread_logits(self.heads)
            )

    def forward(self, x: Tensor, *, rotary: Rotary | None = None, packing: Packing | None = None) -> Tensor:
        """(batch, tokens, dim) -> same shape; packing None: every token is real and a row is one document."""
        q, k, v = self._heads(self._convolve(self._project(x), packing))
        return self._output(
            x, self.attention(q, k, v, rotary=self._turn(rotary), packing=packing, **self._gates(x))
        )

    def prefill(
        self, x: Tensor, *, rotary: Rotary | None = None, packing: Packing | None = None
    ) -> tuple[Tensor, LayerState]:
        """`forward`, and the state behind the last real token of each sequence."""
        projected = self._project(x)
        q, k, v = self._heads(self._convolve(projected, packing))
        out, state = self.attention.prefill(
            q, k, v, rotary=self._turn(rotary), packing=packing, **self._gates(x)
        )
        inputs = (conv.last_inputs(p, packing) for conv, p in zip(self._convs(), projected, strict=False))
        return self._output(x, out), LayerState(state, tuple(inputs))

    def step(
        self, x: Tensor, state: LayerState, *, rotary: Rotary | None = None
    ) -> tuple[Tensor, LayerState]:
        """One more token of each sequence, (batch, 1, dim) -> same shape."""
        projected, inputs = self._project(x), state.inputs
        if self.convs:
            moved = [
                conv.step(p, earlier)
                for conv, p, earlier in zip(self._convs(), projected, state.inputs, strict=True)
            ]
            projected, inputs = [out for out, _ in moved], tuple(kept for _, kept in moved)
        q, k, v = self._heads(projected)
        out, operator = self.attention.step(
            q, k, v, state.operator, rotary=self._turn(rotary), **self._gates(x)
        )
        return self._output(x, out), replace(state, operator=operator, inputs=inputs)

    def init_state(self, batch: int) -> LayerState:
        """The state before the first token."""
        weight = self.q_proj.weight
        heads = self.kv_heads if self.attention.grouped else self.heads
        operator = self.attention.init_state(
            batch, heads=heads, dim_k=self.dim_k, dim_v=self.dim_v, device=weight.device, dtype=weight.dtype
        )
        return LayerState(
            operator,
            tuple(weight.new_zeros(batch, conv.width - 1, len(conv.weight)) for conv in self._convs()),
        )

    def flops(self, tokens: int) -> int:
        """Matrix-product FLOPs of one sample's forward, 2 a multiply-add (shifted sums and norms are
        none).
        """
        projections = sum(child.weight.numel() for child in self.children() if isinstance(child, nn.Linear))
        return 2 * tokens * projections + self.attention.flops(tokens, self.heads, self.dim_k, self.dim_v)

    @classmethod
    def layer_options(cls) -> tuple[str, ...]:
        """The keys of an attention entry that belong to this layer rather than to the operator."""
        return tuple(name for name in inspect.signature(cls.__init__).parameters if name not in _NOT_IN_ENTRY)

    def _project(self, x: Tensor) -> list[Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    def _convs(self) -> list[ShortConvolution]:
        return [cast(ShortConvolution, conv) for conv in self.convs.values()]

    def _convolve(self, projected: list[Tensor], packing: Packing | None) -> list[Tensor]:
        return (
            [conv(p, packing) for conv, p in zip(self._convs(), projected, strict=True)]
            if self.convs
            else projected
        )

    def _heads(self, projected: list[Tensor]) -> list[Tensor]:
        """(batch, tokens, channels) each -> (batch, tokens, heads, dim_k or dim_v)."""
        q, k, v = projected
        q = self.q_norm(q).unflatten(-1, (self.heads, self.dim_k))
        k = self.k_norm(k).unflatten(-1, (self.kv_heads, self.dim_k))
        v = v.unflatten(-1, (self.kv_heads, self.dim_v))
        if self.kv_heads == self.heads or self.attention.grouped:
            return [q, k, v]
        return [q, *(t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (k, v))]

    def _turn(self, rotary: Rotary | None) -> Rotary | None:
        return rotary if self.rotary else None

    def _gates(self, x: Tensor) -> dict[str, Any]:
        """What the operator needs of each token beside q, k and v."""
        gates: dict[str, Any] = {"log_decay": self._log_decay(x)}
        return gates if self.beta is None else gates | {"beta": torch.sigmoid(self.beta(x))}

    def _log_decay(self, x: Tensor) -> Tensor | None:
        if self.decay is None:
            return None
        logits = self.decay(self.decay_low(x))
        decays = F.logsigmoid(logits.to(accumulation_dtype(logits)))
        return decays.unflatten(-1, (self.heads, self.dim_k)) if self.attention.channel_decay else decays

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        out = self.out_norm(out).flatten(2)
        if self.g_proj is not None:
            out = out * F.silu(self.g_proj(x))
        return self.dropout(self.o_proj(out))


_DECAY_RANK = 16  # a decay a channel would else cost as many parameters as k (GLA, arXiv 2312.06635)
_NOT_IN_ENTRY = ("self", "dim", "attention", "context")


def _head_dim(dim: int, expand: float, heads: int, option: str) -> int:
    channels = int(dim * expand)
    if heads < 1 or channels < heads or channels % heads:
        raise UserError(f"{heads} heads do not divide {channels} channels (dim {dim} x {option} {expand})")
    return channels // heads
