"""Causal softmax attention with a key-value cache, through torch's fused attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.base import CausalAttention, State, sent
from mhla_lightning.attention.context import Context, Rotary
from mhla_lightning.attention.packing import Packing

GROWTH = 256  # tokens per growth of the cache: fewer copies than one by one, less waste than doubling


@dataclass
class KeyValueCache:
    """Keys and values of all tokens so far; its bytes grow with the position.

    Attributes:
        keys: (batch, heads, places, dim_k).
        values: (batch, heads, places, dim_v).
        lengths: places in use of each sequence; these are its first ones.
    """

    keys: Tensor
    values: Tensor
    lengths: list[int]

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def reorder(self, indices: Tensor) -> KeyValueCache:
        keys, values = (x.index_select(0, indices.to(x.device)) for x in (self.keys, self.values))
        return KeyValueCache(keys, values, [self.lengths[i] for i in indices.tolist()])

    def append(self, k: Tensor, v: Tensor) -> KeyValueCache:
        """Return the cache with one more token, k and v (batch, heads, 1, dim).

        The token is written in place where there is room.
        """
        cache = self
        if max(self.lengths) == self.keys.shape[2]:
            cache = replace(
                self, keys=F.pad(self.keys, (0, 0, 0, GROWTH)), values=F.pad(self.values, (0, 0, 0, GROWTH))
            )
        if k.requires_grad or self.keys.requires_grad:  # the backward still needs the old contents
            cache = replace(cache, keys=cache.keys.clone(), values=cache.values.clone())
        rows = torch.arange(len(self.lengths), device=k.device)
        places = sent(self.lengths, k.device)
        cache.keys[rows, :, places], cache.values[rows, :, places] = k[:, :, 0], v[:, :, 0]
        return replace(cache, lengths=[length + 1 for length in self.lengths])

    def seen(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the keys and values in use.

        Where lengths differ, the third item is the mask (batch, 1, 1, places) of those in use, else None.
        """
        longest = max(self.lengths)
        keys, values = self.keys[:, :, :longest], self.values[:, :, :longest]
        if min(self.lengths) == longest:
            return keys, values, None
        lengths = sent(self.lengths, keys.device)
        used = torch.arange(longest, device=keys.device) < lengths[:, None]
        return keys, values, used[:, None, None]


class CausalSoftmax(CausalAttention):
    """Quadratic causal softmax, the baseline; the scale is dim_k ** -0.5.

    Rotary turns q and k before the product.
    """

    grouped = True

    def __init__(self, *, heads: int, dim_k: int, dim_v: int, grid: Sequence[int] | None = None) -> None:
        super().__init__()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return _softmax(*_turned(q, k, v, context.rotary), context.packed())

    def init_state(
        self,
        batch: int,
        *,
        heads: int,
        dim_k: int,
        dim_v: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> KeyValueCache:
        keys, values = (
            torch.zeros(batch, heads, 0, dim, device=device, dtype=dtype) for dim in (dim_k, dim_v)
        )
        return KeyValueCache(keys, values, [0] * batch)

    def host_needed(self, state: State) -> str | None:
        return "its cache grows with every token"

    def attend_prefill(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, State]:
        packing = context.packed()
        q, k, v = _turned(q, k, v, context.rotary)
        if packing is None:
            return _softmax(q, k, v, None), KeyValueCache(k, v, [k.shape[2]] * k.shape[0])
        chunk = packing.chunks(k.shape[2])  # one chunk per row: the real tokens moved to the left
        keys, values = (chunk.split(x.transpose(1, 2))[:, 0].transpose(1, 2) for x in (k, v))
        return _softmax(q, k, v, packing), KeyValueCache(keys, values, packing.real.sum(1).tolist())

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, context: Context
    ) -> tuple[Tensor, State]:
        assert isinstance(state, KeyValueCache)
        q, k, v = _turned(q, k, v, context.rotary)
        state = state.append(k, v)
        keys, values, used = state.seen()
        out = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=used, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2), state

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        return 2 * heads * tokens * tokens * (dim_k + dim_v)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def _softmax(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None) -> Tensor:
    """Return (batch, tokens, heads, dim_v) of turned (batch, heads, tokens, dim)."""
    grouped = q.shape[1] != k.shape[1]
    if packing is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    # Padded keys may hold anything, NaN included: 0 x NaN would reach the output through a masked product.
    real = packing.real[:, None, :, None]
    k, v = k.masked_fill(~real, 0), v.masked_fill(~real, 0)
    out = F.scaled_dot_product_attention(
        q.masked_fill(~real, 0), k, v, attn_mask=packing.allowed(), enable_gqa=grouped
    )
    return (out * real.to(out.dtype)).transpose(1, 2)


def _turned(q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (batch, heads, tokens, dim) of (batch, tokens, heads, dim), with q and k turned."""
    if rotary is not None:
        q, k = rotary(q), rotary(k)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
