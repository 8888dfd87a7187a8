"""Attention of tokens to a text: the option `cross_attention` of SANA and Wan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.attention import CrossAttentionOptions, LayerAttention, MHLACrossAttention
from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.errors import UserError, unknown_name

MOST_BLOCKS = 16  # of a text, where an entry names none

CrossEntry = str | Mapping[str, Any]


class TextAttention(Protocol):
    """What blocks ask of their attention to the text."""

    def __call__(
        self, x: Tensor, context: Tensor, *, mask: Tensor | None = None, grid: Sequence[int] | None = None
    ) -> Tensor: ...

    def flops(self, grid: Sequence[int], keys: int) -> int: ...


class CrossAttention(nn.Module):
    """Softmax attention of tokens to a text (SPEC 6.2).

    Parameter names are Wan2.1's.

    Args:
        dim: channels, a multiple of heads.
        heads: channel heads.
        qk_norm: RMSNorm of q and k over all channels, as in Wan2.1.
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(dim, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))

    def forward(
        self, x: Tensor, context: Tensor, *, mask: Tensor | None = None, grid: Sequence[int] | None = None
    ) -> Tensor:
        """Return (batch, tokens, dim).

        Args:
            x: (batch, tokens, dim).
            context: the text, (batch, rows, dim).
            mask: (batch, rows) bool, True = a real row; None means all are. A sample without a real row
                attends to nothing: only the bias of the output remains.
            grid: token counts per axis of x; ignored.
        """
        parts = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = None if mask is None else mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o(out.transpose(1, 2).flatten(2))

    def flops(self, grid: Sequence[int], keys: int) -> int:
        """Return the matrix-product FLOPs of one sample's forward, 2 a multiply-add.

        Args:
            grid: token counts per axis of x.
            keys: rows of text.
        """
        weight, tokens = self.q.weight.numel(), torch.Size(grid).numel()
        return 4 * (tokens + keys) * weight + 4 * tokens * keys * len(self.q.weight)


@dataclass(frozen=True)
class Reader:
    """The sizes of an attention to the text.

    Args:
        dim: channels of a token.
        heads: number of heads.
        grid: tokens per axis that blocks are laid out for.
        text_length: most rows of text.
        qk_norm: whether the softmax form has norms of q and k.
    """

    dim: int
    heads: int
    grid: Sequence[int]
    text_length: int
    qk_norm: bool


def _softmax(sizes: Reader, options: Mapping[str, Any]) -> CrossAttention:
    return CrossAttention(sizes.dim, sizes.heads, sizes.qk_norm)


def _mhla(sizes: Reader, options: Mapping[str, Any]) -> MHLACrossAttention:
    return MHLACrossAttention(
        sizes.dim,
        sizes.heads,
        grid=sizes.grid,
        context_grid=(sizes.text_length,),
        options=CrossAttentionOptions(**options),
    )


@dataclass(frozen=True)
class CrossForm:
    """One way to read a text.

    Args:
        build: builds a layer of its sizes and options.
        options: keys of its entry besides `name`.
        masks_zeros: whether rows of zeros are padding, and texts are filled up to `text_length` rows.
    """

    build: Callable[[Reader, Mapping[str, Any]], nn.Module]
    options: tuple[str, ...] = ()
    masks_zeros: bool = False


CROSS_ATTENTION: dict[str, CrossForm] = {
    "softmax": CrossForm(_softmax),
    "mhla": CrossForm(_mhla, tuple(field.name for field in fields(CrossAttentionOptions)), masks_zeros=True),
}


def resolve_cross(entry: CrossEntry, sizes: Reader, blocks: int | Sequence[int]) -> LayerAttention:
    """Complete an entry of `cross_attention`, the same for all layers.

    Args:
        entry: a name, or a mapping of `name` and the options of that form.
        sizes: of the layers.
        blocks: of the tokens per axis, where the entry names none. A text then has at most 16 blocks.

    Raises:
        UserError: an unknown name or option.
    """
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = given.pop("name", None)
    if name not in CROSS_ATTENTION:
        reason = unknown_name("cross-attention", name, CROSS_ATTENTION)
        raise UserError("name", "missing in a mapping" if name is None else reason)
    valid = CROSS_ATTENTION[name].options
    for key in given:
        if key not in valid:
            reason = unknown_name("option", key, ("name", *valid), of=f"cross-attention '{name}'")
            raise UserError(str(key), reason)
    own = {
        "blocks": blocks,
        "context_block_size": ceil_div(sizes.text_length, MOST_BLOCKS),
        "qk_norm": sizes.qk_norm,
    }
    if given.keys() & {"blocks", "block_size"}:
        own.pop("blocks")
    if given.keys() & {"context_blocks", "context_block_size"}:
        own.pop("context_block_size")
    return LayerAttention(name, {key: own[key] for key in own if key in valid} | given, {})


def filled_up(text: Tensor, mask: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
    """Return a text of a number of rows, and the mask of its real ones.

    Args:
        text: (batch, at most `rows`, channels).
        mask: (batch, rows of text) bool, True = a real row; None means all are.
        rows: of the result.
    """
    missing = rows - text.shape[1]
    if not missing:
        return text, mask
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    return F.pad(text, (0, 0, 0, missing)), F.pad(mask, (0, missing))
