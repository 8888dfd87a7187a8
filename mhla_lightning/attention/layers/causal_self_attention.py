"""Causal self-attention around any operator (SPEC 5.1).

The layer has projections, a short convolution, decays, an output norm and a gate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mhla_lightning.arguments.checked import CheckedOptions
from mhla_lightning.attention.base import CausalAttention, State, accumulation_dtype
from mhla_lightning.attention.baselines.causal_conv import ShortConvolution
from mhla_lightning.attention.context import Context, Rotary
from mhla_lightning.attention.decay import spread_logits
from mhla_lightning.attention.entry import Entry, build_operator, resolve_layer
from mhla_lightning.attention.layers.inputs import check_tokens
from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.attention.packing import Packing
from mhla_lightning.errors import UserError, inside


@dataclass(frozen=True)
class LayerState:
    """One layer's memory of the tokens so far.

    Attributes:
        operator: the operator's own state.
        inputs: the last inputs of each short convolution (q, k, v), (batch, width - 1, channels); empty
            without convolutions.
    """

    operator: State
    inputs: tuple[Tensor, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors, as allocated."""
        return self.operator.bytes + sum(x.nbytes for x in self.inputs)

    def reorder(self, indices: Tensor) -> LayerState:
        """Return the sequences `indices` (int64, repeats allowed) as a new batch."""
        return LayerState(
            self.operator.reorder(indices),
            tuple(x.index_select(0, indices.to(x.device)) for x in self.inputs),
        )


@dataclass(frozen=True)
class CausalLayerOptions(CheckedOptions):
    """Keys of an attention entry that belong to :class:`CausalSelfAttention`.

    Args:
        heads: number of query heads.
        kv_heads: heads of k and v, shared by groups of query heads; None means `heads`.
        expand_k, expand_v: channels of q and of v over all heads, as a share of dim.
        gate: output gate SiLU(x W_g).
        out_norm: RMSNorm per head on the operator's output.
        qk_norm: RMSNorm of q and k over all their channels.
        qkv_bias: bias of the q, k and v projections.
        short_conv: width of a convolution of q, k and v over earlier tokens (4 in the models that have one);
            0 means none.
        rotary: turns q and k by their positions; False leaves positions to the operator.
        dropout: after the output projection.
        norm_eps: epsilon of all norms here.
    """

    heads: int = 4
    kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate: bool = True
    out_norm: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    short_conv: int = 0
    rotary: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-6


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with any operator of CAUSAL_ATTENTION.

    Args:
        dim: channels C.
        attention: operator name, or a mapping of ``name``, the operator's own options and
            :class:`CausalLayerOptions`.
        context: tokens of a training row, for operators whose size depends on it.

    Raises:
        UserError: unknown names, heads that do not divide the channels.
    """

    def __init__(self, dim: int, *, attention: Entry = "mhla", context: int = 2048) -> None:
        super().__init__()
        with inside("attention"):
            spec = resolve_layer(attention, presets={}, layer_options=self.layer_options(), causal=True)
            options = CausalLayerOptions(**spec.layer)
            self.dim_k, self.dim_v = _head_dims(dim, options)
            if options.short_conv and options.short_conv < 2:
                raise UserError(
                    "short_conv",
                    f"found {options.short_conv}; give a width of at least 2 tokens, or 0 for none",
                )
        self.entry = {"name": spec.name, "operator": dict(spec.operator), "layer": asdict(options)}
        heads, eps = options.heads, options.norm_eps
        self.dim, self.heads = dim, heads
        self.kv_heads = heads if options.kv_heads is None else options.kv_heads
        self.rotary = options.rotary
        widths = {"q": heads * self.dim_k, "k": self.kv_heads * self.dim_k, "v": self.kv_heads * self.dim_v}
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(dim, width, bias=options.qkv_bias) for width in widths.values()
        )
        convs = {
            name: ShortConvolution(width, options.short_conv)
            for name, width in widths.items()
            if options.short_conv
        }
        self.convs = nn.ModuleDict(convs)
        self.q_norm = RMSNorm(widths["q"], eps=eps) if options.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(widths["k"], eps=eps) if options.qk_norm else nn.Identity()
        with inside("attention"):
            operator = build_operator(
                spec, heads=heads, dim_k=self.dim_k, dim_v=self.dim_v, grid=(context,), causal=True
            )
        self.attention = cast(CausalAttention, operator)
        by_channel = self.attention.channel_decay
        self.decay_low = nn.Linear(dim, _DECAY_RANK, bias=False) if by_channel else nn.Identity()
        decay_in, decays = (_DECAY_RANK, heads * self.dim_k) if by_channel else (dim, heads)
        self.decay = nn.Linear(decay_in, decays) if self.attention.token_decay else None
        self.beta = nn.Linear(dim, heads, bias=False) if self.attention.token_beta else None
        self.out_norm = RMSNorm(self.dim_v, eps=eps) if options.out_norm else nn.Identity()
        self.g_proj = nn.Linear(dim, heads * self.dim_v, bias=False) if options.gate else None
        self.o_proj = nn.Linear(heads * self.dim_v, dim, bias=False)
        self.dropout = nn.Dropout(options.dropout)
        self.recompute = False
        self.reset_decay()

    @torch.no_grad()
    def reset_decay(self) -> None:
        """Initialize the decays: independent of the token, with a different rate for each head.

        Where each channel of a head has a decay, its rates are spread over the channels instead.
        """
        if self.decay is not None:
            nn.init.zeros_(self.decay.weight)
            self.decay.bias.copy_(
                spread_logits(self.dim_k).repeat(self.heads)
                if self.attention.channel_decay
                else spread_logits(self.heads)
            )

    def forward(self, x: Tensor, *, rotary: Rotary | None = None, packing: Packing | None = None) -> Tensor:
        """Attend over (batch, tokens, dim) -> same shape.

        Args:
            x: (batch, tokens, dim).
            rotary: turns q and k by position; None means no positions.
            packing: of a padded or packed batch; None means one document per row.
        """
        heads = self._heads(self._convolve(self._project(x), packing))
        context = self._context(x, rotary, packing)
        if self.recompute and self.training:
            out = checkpoint(self.attention, *heads, context, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self.attention(*heads, context)
        return self._output(x, out)

    def prefill(
        self, x: Tensor, *, rotary: Rotary | None = None, packing: Packing | None = None
    ) -> tuple[Tensor, LayerState]:
        """Compute `forward`, and the state after the last real token of each sequence."""
        projected = self._project(x)
        q, k, v = self._heads(self._convolve(projected, packing))
        out, state = self.attention.prefill(q, k, v, self._context(x, rotary, packing))
        inputs = (conv.last_inputs(p, packing) for conv, p in zip(self._convs(), projected, strict=False))
        return self._output(x, out), LayerState(state, tuple(inputs))

    def step(
        self, x: Tensor, state: LayerState, *, rotary: Rotary | None = None
    ) -> tuple[Tensor, LayerState]:
        """Process one more token of each sequence, (batch, 1, dim) -> same shape."""
        projected, inputs = self._project(x), state.inputs
        if self.convs:
            moved = [
                conv.step(p, earlier)
                for conv, p, earlier in zip(self._convs(), projected, state.inputs, strict=True)
            ]
            projected, inputs = [out for out, _ in moved], tuple(kept for _, kept in moved)
        q, k, v = self._heads(projected)
        out, operator = self.attention.step(q, k, v, state.operator, self._context(x, rotary, None))
        return self._output(x, out), replace(state, operator=operator, inputs=inputs)

    def init_state(self, batch: int) -> LayerState:
        """Return the state before the first token."""
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
        """Return the matrix-product FLOPs of one sample's forward, 2 per multiply-add.

        Norms and the shifted sums of the convolutions have none.
        """
        projections = sum(child.weight.numel() for child in self.children() if isinstance(child, nn.Linear))
        return 2 * tokens * projections + self.attention.flops(tokens, self.heads, self.dim_k, self.dim_v)

    @classmethod
    def layer_options(cls) -> tuple[str, ...]:
        """Return the keys of an attention entry that belong to this layer, not to the operator."""
        return tuple(field.name for field in fields(CausalLayerOptions))

    def _project(self, x: Tensor) -> list[Tensor]:
        check_tokens(x, self.dim)
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    def _convs(self) -> list[ShortConvolution]:
        return [cast(ShortConvolution, conv) for conv in self.convs.values()]

    def _convolve(self, projected: list[Tensor], packing: Packing | None) -> list[Tensor]:
        if not self.convs:
            return projected
        return [conv(p, packing) for conv, p in zip(self._convs(), projected, strict=True)]

    def _heads(self, projected: list[Tensor]) -> list[Tensor]:
        """Split (batch, tokens, channels) each into (batch, tokens, heads, dim_k or dim_v)."""
        q, k, v = projected
        q = self.q_norm(q).unflatten(-1, (self.heads, self.dim_k))
        k = self.k_norm(k).unflatten(-1, (self.kv_heads, self.dim_k))
        v = v.unflatten(-1, (self.kv_heads, self.dim_v))
        if self.kv_heads == self.heads or self.attention.grouped:
            return [q, k, v]
        return [q, *(t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (k, v))]

    def _context(self, x: Tensor, rotary: Rotary | None, packing: Packing | None) -> Context:
        """Return everything that the operator reads of each token beside q, k and v."""
        return Context(
            rotary=rotary if self.rotary else None,
            packing=packing,
            log_decay=self._log_decay(x),
            beta=None if self.beta is None else torch.sigmoid(self.beta(x)),
        )

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


_DECAY_RANK = (
    16  # a full map to a decay per channel would cost as many parameters as k (GLA, arXiv 2312.06635)
)


def _head_dims(dim: int, options: CausalLayerOptions) -> tuple[int, int]:
    """Return the channels per head of q and k, and of v.

    Raises:
        UserError: heads that do not divide the channels, or an odd head that rotary cannot turn.
    """
    heads = options.heads
    dim_k = _head_dim(dim, options.expand_k, heads, "expand_k")
    dim_v = _head_dim(dim, options.expand_v, heads, "expand_v")
    kv_heads = heads if options.kv_heads is None else options.kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise UserError("kv_heads", f"{kv_heads} does not divide {heads} `heads`")
    if options.rotary and dim_k % 2:
        raise UserError(
            "heads",
            f"{heads} make heads of {dim_k} channels (dim {dim}, expand_k {options.expand_k}), and rotary "
            "turns pairs of channels; choose a number that makes an even size",
        )
    return dim_k, dim_v


def _head_dim(dim: int, expand: float, heads: int, option: str) -> int:
    channels = int(dim * expand)
    if heads < 1 or channels < heads or channels % heads:
        raise UserError(
            "heads", f"{heads} heads do not divide {channels} channels (dim {dim} x {option} {expand})"
        )
    return channels // heads
